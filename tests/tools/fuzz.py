"""
Ask a real server everything that its own OpenAPI description allows, and much that it does not.

Twice, with and without a token: no answer may be a fault, and each must be one that is described. Needs
schemathesis; `make fuzz` has an environment with it.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.support import ROOT, live_server

_TOKEN = "fuzzing-token"
#: Not those that ask whether a description says everything: texts that are no times are described as texts.
_EXCLUDED = "negative_data_rejection,positive_data_acceptance,allow_header_conformance"


def main() -> int:
    """Return 0 if all was well."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=120, help="for each of the two servers")
    parser.add_argument("--seed", type=int)
    asked = parser.parse_args()
    return max(_fuzz(asked.seconds, asked.seed, token=token) for token in (None, _TOKEN))


def _fuzz(seconds: int, seed: int | None, *, token: str | None) -> int:
    with tempfile.TemporaryDirectory() as folder:
        db = Path(folder) / "events.db"
        with live_server(db, *(("--token", token) if token else ())) as server:
            command = [str(Path(sys.executable).with_name("schemathesis")), "run", f"{server.url}/openapi.json"]
            options = [
                *("--max-time", str(seconds), "--request-timeout", "30", "--continue-on-failure"),
                *("--checks", "all", "--exclude-checks", _EXCLUDED),
                *("--exclude-path", "/api/stage/live", "--generation-database", "none"),
                *(("--seed", str(seed)) if seed is not None else ()),
                *(("--header", f"Authorization: Bearer {token}") if token else ()),
            ]
            environment = {**os.environ, "SCHEMATHESIS_HOOKS": "tests.tools.fuzz_hooks", "PYTHONPATH": str(ROOT)}
            # In a folder of its own: it leaves notes where it is started.
            status = subprocess.run([*command, *options], env=environment, cwd=folder, check=False).returncode
            alive = server.process.poll() is None
            server.stop()
        written = db.with_suffix(".log").read_text()
    if not alive or "Traceback" in written:
        print(written[-20_000:])
        return 1
    return status


if __name__ == "__main__":
    sys.exit(main())

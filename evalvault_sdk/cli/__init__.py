"""
The command `evalvault-sdk`, as the extra `[cli]`.

In:   arguments.
Out:  what was asked for, on the terminal; status 1 with one clear line when it cannot be done.
"""

from __future__ import annotations

import io
import sys


def main() -> None:
    """Run the command, or say how to install what it needs."""
    try:
        from evalvault_sdk.cli.app import app
    except ImportError as error:
        if error.name is not None and error.name.startswith("evalvault_sdk"):
            raise
        sys.exit(f"evalvault-sdk needs the package {error.name!r}: pip install 'evalvault-sdk[cli]'")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")  # a terminal of another encoding shows what it can
    app()

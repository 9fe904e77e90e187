"""
The real EvalVault: its classes in this process, its command line and its API in processes of their own.

The only module that imports it. All of them are kept to the test's folder: by default EvalVault wants PostgreSQL,
writes into `data/` of the working directory, reads `.env` there, and starts a container where no Phoenix answers.
"""

from __future__ import annotations

import os
import subprocess
import sys
import warnings
from pathlib import Path

from tests.support import LiveServer, clean_environment, free_port, wait_for

# Where `make interop` puts it; without, importing EvalVault would download it.
os.environ.setdefault("TIKTOKEN_CACHE_DIR", str(Path(sys.prefix) / "tokenizer"))

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # from its dependencies: here only our own are errors
    from evalvault.adapters.inbound.api.main import create_app, require_api_token
    from evalvault.adapters.inbound.cli.commands.stage import _load_thresholds_map as load_thresholds
    from evalvault.adapters.outbound.storage.sqlite_adapter import SQLiteStorageAdapter
    from evalvault.config.settings import get_settings
    from evalvault.domain.entities.result import EvaluationRun
    from evalvault.domain.entities.stage import StageEvent as TheirEvent
    from evalvault.domain.services.debug_report_service import DebugReportService
    from evalvault.domain.services.stage_metric_service import StageMetricService
    from evalvault.domain.services.stage_summary_service import StageSummaryService

__all__ = [
    "TOKEN",
    "DebugReportService",
    "EvalVaultApi",
    "EvaluationRun",
    "SQLiteStorageAdapter",
    "StageMetricService",
    "StageSummaryService",
    "TheirEvent",
    "create_app",
    "evalvault",
    "evalvault_environment",
    "get_settings",
    "load_thresholds",
    "require_api_token",
    "tables",
]

#: What EvalVault's API asks for in these tests.
TOKEN = "shared-token"


def evalvault_environment(**more: str) -> dict[str, str]:
    """Return the environment in which EvalVault keeps to itself."""
    return {
        **clean_environment(),
        "COLUMNS": "200",  # it cuts its tables to the terminal
        "DB_BACKEND": "sqlite",
        "PHOENIX_ENDPOINT": "http://phoenix.invalid:6006/v1/traces",  # not of this machine: nothing to start here
        "PYTHONUTF8": "1",
        **more,
    }


def evalvault(*arguments: str | Path, cwd: Path) -> str:
    """Run `evalvault ...` as an operator does; return what it prints."""
    command = [str(Path(sys.executable).with_name("evalvault")), *map(str, arguments)]
    done = subprocess.run(command, env=evalvault_environment(), cwd=cwd, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tables(output: str) -> list[list[dict[str, str]]]:
    """Return the tables drawn in `output`: of each its rows, of each row its cells by the name of their column."""
    found: list[list[dict[str, str]]] = []
    names: list[str] = []
    for line in output.splitlines():
        if line.startswith("┃"):
            names = [cell.strip() for cell in line.strip("┃").split("┃")]
            found.append([])
        elif line.startswith("│"):
            cells = [cell.strip() for cell in line.strip("│").split("│")]
            found[-1].append(dict(zip(names, cells, strict=True)))
    return found


class EvalVaultApi(LiveServer):
    """EvalVault's own API with our endpoints in it, in a process of its own; see `tests.interop.api`."""

    def __init__(self, db: Path, way: str, **environ: str) -> None:
        self.db = db
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self._log = db.with_suffix(".log").open("wb")
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.interop.api", way, str(self.port)],
            env=evalvault_environment(EVALVAULT_DB_PATH=str(db), API_AUTH_TOKENS=TOKEN, **environ),
            cwd=db.parent,
            stdout=self._log,
            stderr=self._log,
        )
        wait_for(self._ready, 60)

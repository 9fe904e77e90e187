"""What no rival does: every event is stored exactly once, whatever the network, the server and the process do."""

from __future__ import annotations

import contextlib
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.support import LiveServer, clean_environment, free_port, live_server, wait_for

COUNT = 2000

PROGRAM = """
    import os, sys, time
    from evalvault_sdk import StageTracer
    tracer = StageTracer("r", {url!r}, durability={durability!r}, connect_timeout_s=1, retry_max_s=0.5)
    for number in range({count}):
        with tracer.stage("work", attributes={{"number": number}}):
            pass
"""


def start(url: str, *, first: str = "", then: str = "", durability: str = "spool") -> subprocess.Popen[str]:
    """Run a program that records; it prints the time when it is at its end."""
    program = textwrap.dedent(PROGRAM).format(url=url, durability=durability, count=COUNT)
    script = textwrap.dedent(first) + program + textwrap.dedent(then) + "\nprint(time.time(), flush=True)\n"
    return subprocess.Popen(
        [sys.executable, "-c", script],
        env=clean_environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def end(process: subprocess.Popen[str]) -> tuple[float, str]:
    """Wait for the program; return how long its exit took after its last line, and what it said."""
    out, said = process.communicate(timeout=60)
    took_s = time.time() - float(out.split()[-1])
    assert process.returncode == 0, said
    return took_s, said


def stored(db: Path) -> list[int]:
    with contextlib.closing(sqlite3.connect(db)) as connection:
        rows = connection.execute("SELECT json_extract(attributes, '$.number') FROM stage_events WHERE run_id = 'r'")
        return sorted(number for (number,) in rows)


def next_process(url: str, *, wait_s: float = 30) -> None:
    """Run a program that records nothing, until it has delivered what was left."""
    script = f"""
        import pathlib, time
        from evalvault_sdk import StageTracer
        tracer = StageTracer("another", {url!r}, retry_max_s=0.5)
        until = time.monotonic() + {wait_s}
        folder = tracer._outbox.worker._spool.folder
        while list(folder.glob("*-*-*.jsonl")) and time.monotonic() < until:
            time.sleep(0.02)
        assert tracer.shutdown().recorded == 0
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=clean_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


@pytest.fixture
def port() -> int:
    return free_port()


def test_exit_without_flush(tmp_path: Path) -> None:
    with live_server(tmp_path / "x.db") as server:
        took_s, said = end(start(server.url))
        assert took_s < 2.2
        assert said == ""
    assert stored(tmp_path / "x.db") == list(range(COUNT))


def test_killed_after_the_last_recording_with_a_journal(tmp_path: Path) -> None:
    with live_server(tmp_path / "x.db") as server:
        process = start(server.url, durability="journal", then="os.kill(os.getpid(), 9)")
        process.communicate(timeout=60)
        assert process.returncode == -signal.SIGKILL
        next_process(server.url)
    assert stored(tmp_path / "x.db") == list(range(COUNT))


def test_recorded_in_a_forked_child(tmp_path: Path) -> None:
    then = f"""
    child = os.fork()
    if child == 0:
        for number in range({COUNT}, {2 * COUNT}):
            tracer.record_stage("work", attributes={{"number": number}})
        sys.exit(0)
    assert os.waitpid(child, 0)[1] == 0
    """
    with live_server(tmp_path / "x.db") as server:
        process = start(server.url, then=then)
        _, said = process.communicate(timeout=60)
        assert process.returncode == 0, said
    assert stored(tmp_path / "x.db") == list(range(2 * COUNT))


def test_a_server_that_answers_503_for_a_while(tmp_path: Path) -> None:
    class Unavailable(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(503)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Unavailable) as unavailable:
        port = unavailable.server_port
        threading.Thread(target=unavailable.serve_forever, daemon=True).start()
        process = start(f"http://127.0.0.1:{port}", then="assert tracer.flush(60).complete")
        time.sleep(3)
        unavailable.shutdown()
    server = LiveServer(tmp_path / "x.db", port=port)
    try:
        took_s, _ = end(process)
        assert took_s < 2.2
    finally:
        server.stop()
    assert stored(tmp_path / "x.db") == list(range(COUNT))


def test_nothing_listens_for_a_while_and_the_process_lives_on(tmp_path: Path, port: int) -> None:
    process = start(f"http://127.0.0.1:{port}", then="assert tracer.flush(60).complete")
    time.sleep(3)
    server = LiveServer(tmp_path / "x.db", port=port)
    try:
        end(process)
    finally:
        server.stop()
    assert stored(tmp_path / "x.db") == list(range(COUNT))


@contextlib.contextmanager
def nothing(port: int) -> Iterator[str]:
    yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def black_hole(port: int) -> Iterator[str]:
    """A socket that nobody accepts from and whose backlog is full: packets to it are dropped."""
    with socket.socket() as listener, contextlib.ExitStack() as fillers:
        listener.bind(("127.0.0.1", port))
        listener.listen(0)
        for _ in range(4):
            filler = fillers.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(("127.0.0.1", port))
        yield f"http://127.0.0.1:{port}"


@contextlib.contextmanager
def answers(port: int, answer: bytes, *, pause_s: float = 0.0) -> Iterator[str]:
    """A server that gives every connection the same answer, byte by byte if there is a pause."""
    stop = threading.Event()

    def serve(connection: socket.socket) -> None:
        with connection, contextlib.suppress(OSError):
            connection.recv(1 << 20)
            if not pause_s:
                connection.sendall(answer)
            for byte in answer if pause_s else b"":
                if stop.wait(pause_s):
                    return
                connection.sendall(bytes([byte]))
            stop.wait(30)

    def accept(listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=serve, args=(connection,), daemon=True).start()

    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(("127.0.0.1", port))
        listener.listen(100)
        thread = threading.Thread(target=accept, args=(listener,), daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{port}"
        stop.set()
        listener.shutdown(socket.SHUT_RDWR)
    thread.join(5)


HTTP_503 = b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
LOGIN_PAGE = b"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: 22\r\n\r\n<html>Sign in</html>  "
NETWORKS: dict[str, Callable[[int], contextlib.AbstractContextManager[str]]] = {
    "nothing listens": nothing,
    "a black hole": black_hole,
    "a server that hangs": lambda port: answers(port, b""),
    "a server that sends a byte a second": lambda port: answers(port, b"HTTP/1.1 200 OK\r\n" * 10, pause_s=1.0),
    "503": lambda port: answers(port, HTTP_503),
    "a login page": lambda port: answers(port, LOGIN_PAGE),
}


# With a journal all is on the disk already: one network that refuses and one that keeps silent tell enough.
@pytest.mark.parametrize(
    ("durability", "network"),
    [*(("spool", network) for network in NETWORKS), ("journal", "nothing listens"), ("journal", "a server that hangs")],
)
def test_the_process_ends_in_time_and_the_next_one_delivers(
    tmp_path: Path, port: int, network: str, durability: str
) -> None:
    with NETWORKS[network](port) as url:
        took_s, said = end(start(url, durability=durability))
    assert took_s < 2.2
    assert f"{COUNT} events for {url}/api/stage/events are kept in" in said
    server = LiveServer(tmp_path / "x.db", port=port)
    try:
        next_process(server.url)
    finally:
        server.stop()
    assert stored(tmp_path / "x.db") == list(range(COUNT))


def test_a_name_that_is_never_resolved_holds_up_neither_flush_nor_exit(tmp_path: Path) -> None:
    then = """
    started = time.monotonic()
    report = tracer.flush(0.5)
    assert time.monotonic() - started < 1, "flush holds its deadline"
    assert report.pending == 2000 and not report.in_time
    """
    first = """
    import socket, time
    socket.getaddrinfo = lambda *arguments, **options: time.sleep(3600)
    """
    process = start("http://name.test", first=first, then=then)
    took_s, said = end(process)
    assert took_s < 2.2
    assert "2000 events for http://name.test/api/stage/events are kept in" in said


JOURNAL_UNDER_LOAD = """
    import os, sys, threading
    from evalvault_sdk import StageTracer
    tracer = StageTracer("r", {url!r}, durability="journal", flush_interval_s=0.05, batch_events=50)
    log = os.open(sys.argv[1], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def record(thread):
        number = 0
        while True:
            stage_id = tracer.record_stage("work", attributes={{"text": "보험" * 20, "thread": thread}})
            os.write(log, stage_id.encode() + b"\\n")

    for thread in range(3):
        threading.Thread(target=record, args=(thread,), daemon=True).start()
    threading.Event().wait()
"""


def test_a_process_with_a_journal_that_is_killed_at_any_instant_loses_nothing(tmp_path: Path) -> None:
    instants, rng = 50, random.Random(20261122)
    with live_server(tmp_path / "x.db") as server:
        script = textwrap.dedent(JOURNAL_UNDER_LOAD).format(url=server.url)
        for number in range(instants):
            log = tmp_path / f"{number}.log"
            process = subprocess.Popen([sys.executable, "-c", script, str(log)], env=clean_environment())
            wait_for(lambda log=log: log.exists() and log.stat().st_size > 0, 30)  # type: ignore[misc]
            time.sleep(rng.uniform(0, 0.15))
            process.send_signal(signal.SIGKILL)
            process.wait(10)
        next_process(server.url)
        recorded = {
            line for number in range(instants) for line in (tmp_path / f"{number}.log").read_text().split("\n") if line
        }
    with contextlib.closing(sqlite3.connect(tmp_path / "x.db")) as connection:
        ids = [stage_id for (stage_id,) in connection.execute("SELECT stage_id FROM stage_events")]
    assert len(recorded) > 20 * instants
    assert recorded - set(ids) == set(), "every event whose recording returned is stored"
    assert len(ids) == len(set(ids))
    assert len(set(ids) - recorded) <= 3 * instants, "of each thread at most the one that was killed before it returned"


def test_ten_thousand_tracers_leave_no_thread_no_descriptor_and_no_memory(server: LiveServer) -> None:
    script = f"""
        import gc, os, resource, threading
        from evalvault_sdk import StageTracer

        def many(count):
            for number in range(count):
                tracer = StageTracer("many", {server.url!r})
                if number % 100 == 0:
                    tracer.record_stage("x")
                tracer.shutdown()
                if number % 10 == 0:
                    StageTracer("forgotten", {server.url!r})
            gc.collect()

        def measure():
            pages = int(open("/proc/self/statm").read().split()[1])
            return threading.active_count(), len(os.listdir("/proc/self/fd")), pages * resource.getpagesize()

        many(500)
        before = measure()
        many(10_000)
        after = measure()
        assert after[:2] == before[:2], (before, after)
        assert after[2] - before[2] < 8 << 20, (before, after)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)], env=clean_environment(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr

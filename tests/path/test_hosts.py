"""The hosts that RAG services run in: each ends in its own way, and every stage recorded in it is stored."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import textwrap
import threading
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from evalvault_sdk import StageTracer
from tests.support import LiveServer, MemoryTransport, clean_environment, free_port, wait_for

#: Nothing is delivered by luck: only a full batch, or the end of the process, comes before this.
NEVER_S = 600


@pytest.fixture
def run() -> str:
    return f"run-{uuid.uuid4()}"


class Host:
    """A real host in a process group of its own, which says on its output what went wrong."""

    def __init__(self, folder: Path, *command: str) -> None:
        self.port = free_port()
        self.log = folder / "host.log"
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [sys.executable, *(part.format(port=self.port) for part in command)],
                cwd=folder,
                env=clean_environment(),
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def get(self, number: int) -> int | None:
        """Ask for `number`; return the id of the process that answered, None if none did."""
        try:
            response = requests.get(f"http://127.0.0.1:{self.port}/{number}", timeout=30)
        except requests.ConnectionError:
            return None
        response.raise_for_status()
        return int(response.text)

    def ask(self, numbers: Iterable[int]) -> dict[int, int]:
        """Ask for many at a time; return who answered each that was answered."""
        numbers = list(numbers)
        with ThreadPoolExecutor(8) as pool:
            return {number: pid for number, pid in zip(numbers, pool.map(self.get, numbers), strict=True) if pid}

    def until(self, condition: Callable[[], bool]) -> None:
        def met() -> bool:
            assert self.process.poll() is None, self.log.read_text()
            return condition()

        wait_for(met, 60)

    def end(self, signal_number: int = signal.SIGTERM) -> int:
        self.process.send_signal(signal_number)
        try:
            return self.process.wait(30)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"it hangs:\n{self.log.read_text()}") from None


@contextlib.contextmanager
def host(folder: Path, *command: str) -> Iterator[Host]:
    running = Host(folder, *command)
    try:
        yield running
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(running.process.pid, signal.SIGKILL)
        running.process.wait(30)


def write(folder: Path, name: str, text: str, **values: object) -> None:
    text = textwrap.dedent(text)
    for key, value in values.items():
        text = text.replace(f"<{key}>", str(value))
    (folder / name).write_text(text, "utf-8")


def numbers(server: LiveServer, run: str) -> list[int]:
    """Return the numbers of all requests stored, each as often as it is."""
    answer = requests.get(f"{server.url}/api/stage/events/{run}?stage_type=request&limit=10000", timeout=60)
    events = answer.json()["events"] if answer.ok else []  # the server knows no run before its first event
    return sorted(event["attributes"]["number"] for event in events)


def left_on_disk(tmp_path: Path) -> list[Path]:
    return list((tmp_path / "spool").glob("*/*-*-*.jsonl"))


# -- gunicorn ---------------------------------------------------------------------------------------

WSGI = """
    import os, time
    from evalvault_sdk import StageTracer

    tracer = StageTracer("<run>", "<url>", flush_interval_s=<interval>, durability="<durability>")
    if <in_master>:
        tracer.record_stage("request", attributes={"number": 0})

    def app(environ, start_response):
        number = int(environ["PATH_INFO"][1:])
        with tracer.stage("trace"), tracer.stage("request", attributes={"number": number}):
            time.sleep(0.01)  # so that one worker does not answer everything
        start_response("200 OK", [("Content-Type", "text/plain")])
        return [str(os.getpid()).encode()]
"""
GUNICORN = ("-m", "gunicorn", "app:app", "--preload", "--bind", "127.0.0.1:{port}", "--graceful-timeout", "20")


def ask_all_workers(running: Host, workers: int) -> list[int]:
    """Ask until every worker has answered; return all numbers asked for."""
    pids: set[int] = set()
    asked = [0]
    running.until(lambda: running.get(1) is not None)

    def all_have_answered() -> bool:
        new = range(asked[-1] + 1, asked[-1] + 41)
        answers = running.ask(new)
        assert answers.keys() == set(new)
        asked.extend(new)
        pids.update(answers.values())
        return len(pids) >= workers

    running.until(all_have_answered)
    return sorted([1, *asked])


@pytest.mark.parametrize(
    "workers",
    [("--workers", "3", "--worker-class", "sync"), ("--workers", "2", "--worker-class", "gthread", "--threads", "4")],
    ids=["sync", "gthread"],
)
def test_gunicorn_forks_its_workers_from_a_master_that_has_recorded(
    server: LiveServer, run: str, tmp_path: Path, workers: tuple[str, ...]
) -> None:
    write(tmp_path, "app.py", WSGI, run=run, url=server.url, interval=NEVER_S, durability="spool", in_master=True)
    with host(tmp_path, *GUNICORN, *workers) as running:
        asked = ask_all_workers(running, int(workers[1]))
        assert running.end() == 0, running.log.read_text()
    assert numbers(server, run) == asked
    assert not left_on_disk(tmp_path)


@pytest.mark.parametrize("in_master", [True, False], ids=["the master has recorded", "the master has not"])
def test_gunicorn_patches_its_gevent_workers_after_the_tracer_was_made(
    server: LiveServer, run: str, tmp_path: Path, in_master: bool
) -> None:
    write(tmp_path, "app.py", WSGI, run=run, url=server.url, interval=NEVER_S, durability="spool", in_master=in_master)
    with host(tmp_path, *GUNICORN, "--workers", "2", "--worker-class", "gevent", "--timeout", "20") as running:
        asked = ask_all_workers(running, 2)
        assert running.end() == 0, running.log.read_text()
    assert numbers(server, run) == (asked if in_master else asked[1:])


def test_what_a_killed_worker_has_in_its_journal_is_delivered_by_the_others(
    server: LiveServer, run: str, tmp_path: Path
) -> None:
    write(tmp_path, "app.py", WSGI, run=run, url=server.url, interval=1, durability="journal", in_master=False)
    with host(tmp_path, *GUNICORN, "--workers", "2") as running:
        asked = ask_all_workers(running, 2)
        sent = range(asked[-1] + 1, asked[-1] + 301)
        with ThreadPoolExecutor(1) as pool:
            load = pool.submit(running.ask, sent)
            victim = running.get(0)
            assert victim is not None
            os.kill(victim, signal.SIGKILL)
            answered = load.result()
        assert victim not in {running.get(0) for _ in range(5)}
        recorded = {*asked, *answered}
        running.until(lambda: recorded <= set(numbers(server, run)))
        running.until(lambda: not left_on_disk(tmp_path))
        assert running.end() == 0, running.log.read_text()
    stored = [number for number in numbers(server, run) if number > 1]
    assert len(stored) == len(set(stored))
    assert set(stored) <= {*asked, *sent}


# -- gevent -----------------------------------------------------------------------------------------

SDK = "from evalvault_sdk import StageTracer"
TRACER = 'tracer = StageTracer("<run>", "<url>", flush_interval_s=30)'
RECORD = "tracer.record_stage('request', attributes={'number': 0})"
PATCH = "from gevent import monkey; monkey.patch_all()"
GREENLETS = """
    import gevent, threading, time

    def work(number):
        with tracer.stage("trace"):
            gevent.sleep(0.001)
            with tracer.stage("request", attributes={"number": number}):
                gevent.sleep(0.001)

    began = time.monotonic()
    work(1)
    gevent.joinall([gevent.spawn(work, number) for number in range(2, 201)], raise_error=True)
    while time.monotonic() < began + 0.5:
        gevent.sleep(0.01)  # while the thread that delivers sleeps
    assert tracer.flush(20).complete
    thread = threading.Thread(target=work, args=(201,))
    thread.start()
    thread.join()
    took = time.monotonic() - began
    assert took < 15, f"greenlets had to wait: {took}"
"""


@pytest.mark.parametrize(
    "order",
    [
        (PATCH, SDK, TRACER, RECORD),
        (SDK, PATCH, TRACER, RECORD),
        (SDK, TRACER, PATCH, RECORD),
        (SDK, TRACER, RECORD, PATCH),
    ],
    ids=["first of all", "after the import", "after the tracer", "after a stage"],
)
def test_greenlets_record_whenever_gevent_has_patched(
    server: LiveServer, run: str, tmp_path: Path, order: tuple[str, ...]
) -> None:
    write(tmp_path, "program.py", "\n".join([*order, textwrap.dedent(GREENLETS)]), run=run, url=server.url)
    with host(tmp_path, "program.py") as running:
        assert running.process.wait(60) == 0, running.log.read_text()
    assert numbers(server, run) == list(range(202))


# -- Celery, and billiard without it ------------------------------------------------------------------

TASKS = """
    from pathlib import Path
    from celery import Celery
    from evalvault_sdk import StageTracer

    app = Celery("tasks", broker="filesystem://")
    app.conf.broker_transport_options = {
        "data_folder_in": "queue", "data_folder_out": "queue", "control_folder": "control", "polling_interval": 0.02
    }
    tracer = StageTracer("<run>", "<url>", flush_interval_s=<interval>)

    @app.task
    def work(number):
        with tracer.stage("trace"), tracer.stage("request", attributes={"number": number}):
            pass
        Path("done", str(number)).touch()
"""
CELERY = ("-m", "celery", "--app", "tasks", "worker", "--concurrency", "2", "--loglevel", "info")
SEND = "import tasks\nfor number in range({count}):\n    tasks.work.delay(number)\n"


@pytest.mark.parametrize("options", [(), ("--max-tasks-per-child", "5")], ids=["for ever", "for five tasks"])
def test_celery_children_deliver_before_they_leave(
    server: LiveServer, run: str, tmp_path: Path, options: tuple[str, ...]
) -> None:
    for name in ("queue", "control", "done"):
        (tmp_path / name).mkdir()
    write(tmp_path, "tasks.py", TASKS, run=run, url=server.url, interval=NEVER_S)
    count = 20
    with host(tmp_path, "-c", SEND.format(count=count)) as sender:
        assert sender.process.wait(60) == 0, sender.log.read_text()
    with host(tmp_path, *CELERY, *options) as running:
        running.until(lambda: len(list((tmp_path / "done").iterdir())) == count)
        assert running.end() == 0, running.log.read_text()
    assert numbers(server, run) == list(range(count))


def test_a_child_of_billiard_that_just_returns_loses_nothing(server: LiveServer, run: str, tmp_path: Path) -> None:
    program = """
        import billiard
        from evalvault_sdk import StageTracer

        tracer = StageTracer("<run>", "<url>", flush_interval_s=<interval>)

        def work(number):
            tracer.record_stage("request", attributes={"number": number})

        children = [billiard.Process(target=work, args=(number,)) for number in range(2)]
        for child in children:
            child.start()
        for child in children:
            child.join()
    """
    write(tmp_path, "program.py", program, run=run, url=server.url, interval=NEVER_S)
    with host(tmp_path, "program.py") as running:
        assert running.process.wait(60) == 0, running.log.read_text()
    assert numbers(server, run) == [0, 1]


# -- uvicorn ----------------------------------------------------------------------------------------

ASGI = """
    import os
    from contextlib import asynccontextmanager
    from fastapi import FastAPI
    from evalvault_sdk import StageTracer

    tracer = StageTracer("<run>", "<url>", flush_interval_s=<interval>, <settings>)

    @asynccontextmanager
    async def lifespan(app):
        yield
        <at_end>

    app = FastAPI(lifespan=lifespan)

    @app.get("/{number}")
    async def answer(number: int):
        async with tracer.stage("trace"), tracer.stage("request", attributes={"number": number}):
            return os.getpid()
"""
UVICORN = ("-m", "uvicorn", "app:app", "--workers", "2", "--port", "{port}")


def serve_and_end(folder: Path) -> list[int]:
    with host(folder, *UVICORN) as running:
        running.until(lambda: running.get(0) is not None)
        asked = range(1, 201)
        assert running.ask(asked).keys() == set(asked)
        running.end()
    return [0, *asked]


@pytest.mark.parametrize(
    ("settings", "at_end"),
    [("", "tracer.shutdown()"), ("handle_sigterm=True", "pass")],
    ids=["shutdown in lifespan", "handle_sigterm"],
)
def test_uvicorn_workers_deliver_before_they_end(
    server: LiveServer, run: str, tmp_path: Path, settings: str, at_end: str
) -> None:
    write(tmp_path, "app.py", ASGI, run=run, url=server.url, interval=NEVER_S, settings=settings, at_end=at_end)
    asked = serve_and_end(tmp_path)
    assert numbers(server, run) == asked


def test_what_is_recorded_while_uvicorn_ends_is_on_disk_if_sigterm_is_handled(
    server: LiveServer, run: str, tmp_path: Path
) -> None:
    at_end = "tracer.record_stage('request', attributes={'number': 1000})"
    settings = "handle_sigterm=True"
    write(tmp_path, "app.py", ASGI, run=run, url=server.url, interval=NEVER_S, settings=settings, at_end=at_end)
    asked = serve_and_end(tmp_path)
    with StageTracer(run, server.url):
        wait_for(lambda: numbers(server, run) == [*asked, 1000, 1000], 30)  # one of each worker


def test_the_next_process_delivers_the_journal_of_uvicorn_workers_that_were_told_nothing(
    server: LiveServer, run: str, tmp_path: Path
) -> None:
    settings = "durability='journal'"
    write(tmp_path, "app.py", ASGI, run=run, url=server.url, interval=NEVER_S, settings=settings, at_end="pass")
    asked = serve_and_end(tmp_path)
    assert left_on_disk(tmp_path)
    with StageTracer(run, server.url):
        wait_for(lambda: numbers(server, run) == asked and not left_on_disk(tmp_path), 30)


# -- SIGTERM ----------------------------------------------------------------------------------------

PROGRAM = """
    import logging, os, signal, sys, threading, time
    from pathlib import Path
    from evalvault_sdk import StageTracer

    logging.basicConfig(format="%(message)s")

    def make(name="<run>"):
        return StageTracer(name, "<url>", flush_interval_s=<interval>, handle_sigterm=True)

    def record(tracer, numbers):
        for number in numbers:
            tracer.record_stage("request", attributes={"number": number})

    def wait(name):
        while not Path(name).exists():
            time.sleep(0.01)
"""
WAIT = """
    Path("ready").touch()
    wait("stop")
"""


def prepare(folder: Path, text: str, run: str, url: str) -> None:
    text = "".join(textwrap.dedent(part) for part in (PROGRAM, text, WAIT))
    write(folder, "program.py", text, run=run, url=url, interval=NEVER_S)


@contextlib.contextmanager
def ready_program(folder: Path) -> Iterator[Host]:
    with host(folder, "program.py") as running:
        running.until((folder / "ready").exists)
        yield running


def lines_on_disk(folder: Path) -> int:
    return sum(len(path.read_bytes().splitlines()) for path in left_on_disk(folder))


@pytest.fixture
def silent_url() -> Iterator[str]:
    """The address of something that takes connections, and never answers."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_on_sigterm_a_program_delivers_and_dies_of_it(server: LiveServer, run: str, tmp_path: Path) -> None:
    prepare(tmp_path, "record(make(), range(100))", run, server.url)
    with ready_program(tmp_path) as running:
        assert running.end() == -signal.SIGTERM
        assert running.log.read_text() == ""
    assert numbers(server, run) == list(range(100))


def test_on_sigterm_in_the_middle_of_recording_all_before_it_is_stored(
    server: LiveServer, run: str, tmp_path: Path
) -> None:
    text = """
        tracer = make()

        def work(thread):
            for number in range(thread, 8_000, 4):
                record(tracer, [number])
                time.sleep(0.0002)

        for thread in range(3):
            threading.Thread(target=work, args=(thread,), daemon=True).start()
        threading.Timer(0.2, Path("ready").touch).start()
        work(3)
    """
    prepare(tmp_path, text, run, server.url)
    with ready_program(tmp_path) as running:
        assert running.end() == -signal.SIGTERM
    with StageTracer(run, server.url):
        wait_for(lambda: not left_on_disk(tmp_path), 60)
    stored = numbers(server, run)
    for thread in range(4):
        found = [number for number in stored if number % 4 == thread]
        assert found
        assert found == list(range(thread, found[-1] + 1, 4))


def test_a_shutdown_that_interrupts_recording_lets_another_one_come_to_its_end() -> None:
    telling, go_on = threading.Event(), threading.Event()

    def on_drop(reason: str, count: int) -> None:
        telling.set()
        go_on.wait(20)

    tracer = StageTracer("run", transport=MemoryTransport(), on_drop=on_drop)
    tracer.record_batch([{"no": "stage event"}])

    def interrupted() -> None:
        with tracer._outbox.worker.ledger.lock:  # as a signal handler in the middle of recording
            go_on.set()
            tracer.shutdown()

    ending = [threading.Thread(target=target, daemon=True) for target in (tracer.shutdown, interrupted)]
    ending[0].start()
    assert telling.wait(20)
    ending[1].start()
    for thread in ending:
        thread.join(20)
        assert not thread.is_alive()


def test_on_sigterm_without_a_server_it_is_all_on_disk(run: str, tmp_path: Path) -> None:
    prepare(tmp_path, "record(make(), range(100))", run, f"http://127.0.0.1:{free_port()}")
    with ready_program(tmp_path) as running:
        assert running.end() == -signal.SIGTERM
    assert lines_on_disk(tmp_path) == 100


def test_on_sigterm_the_handler_of_the_program_is_called_once(server: LiveServer, run: str, tmp_path: Path) -> None:
    text = """
        def leave(number, frame):
            print("called with", number, flush=True)
            sys.exit(7)

        signal.signal(signal.SIGTERM, leave)
        record(make(), range(100))
        make()
    """
    prepare(tmp_path, text, run, server.url)
    with ready_program(tmp_path) as running:
        assert running.end() == 7
        assert running.log.read_text() == "called with 15\n"
    assert numbers(server, run) == list(range(100))


def test_on_sigterm_a_handler_between_two_tracers_is_called_once(server: LiveServer, run: str, tmp_path: Path) -> None:
    text = """
        first = make()
        before = signal.getsignal(signal.SIGTERM)

        def tell(number, frame):
            print("called with", number, flush=True)
            before(number, frame)

        signal.signal(signal.SIGTERM, tell)
        record(first, range(50))
        record(make(), range(50, 100))
    """
    prepare(tmp_path, text, run, server.url)
    with ready_program(tmp_path) as running:
        assert running.end() == -signal.SIGTERM, running.log.read_text()
        assert running.log.read_text() == "called with 15\n"
    assert numbers(server, run) == list(range(100))


@pytest.mark.parametrize("before", [50, 0])
def test_a_program_that_leaves_in_its_own_time_after_sigterm_has_all_on_disk(
    server: LiveServer, run: str, tmp_path: Path, before: int
) -> None:
    text = """
        signal.signal(signal.SIGTERM, lambda number, frame: Path("stop").touch())
        tracer = make()
        record(tracer, range(before))
        Path("ready").touch()
        wait("stop")
        record(tracer, range(before, 100))
        os._exit(0)  # as rude as can be
    """
    prepare(tmp_path, f"before = {before}\n" + textwrap.dedent(text), run, server.url)
    with ready_program(tmp_path) as running:
        assert running.end() == 0
    with StageTracer(run, server.url):
        wait_for(lambda: numbers(server, run) == list(range(100)), 30)


def test_a_program_leaves_in_time_with_all_on_disk_although_the_server_is_silent(
    silent_url: str, run: str, tmp_path: Path
) -> None:
    text = """
        signal.signal(signal.SIGTERM, lambda number, frame: os._exit(0))
        tracers = [make(f"run-{number}") for number in range(5)]
        for tracer in tracers:
            record(tracer, range(20))
    """
    prepare(tmp_path, text, run, silent_url)
    with ready_program(tmp_path) as running:
        began = time.monotonic()
        assert running.end() == 0
        assert time.monotonic() - began < 6  # of 2, however many tracers there are
    assert lines_on_disk(tmp_path) == 100


def test_a_tracer_in_a_thread_says_that_it_cannot_handle_sigterm(server: LiveServer, run: str, tmp_path: Path) -> None:
    text = """
        def work():
            tracer = make()
            record(tracer, range(100))
            assert tracer.flush(20).complete

        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    """
    prepare(tmp_path, text, run, server.url)
    with ready_program(tmp_path) as running:
        assert running.end() == -signal.SIGTERM
        (line,) = running.log.read_text().splitlines()
    assert "main thread" in line
    assert numbers(server, run) == list(range(100))


def test_a_program_that_ignores_sigterm_goes_on(server: LiveServer, run: str, tmp_path: Path) -> None:
    text = """
        import subprocess
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        tracer = make()
        record(tracer, range(50))
        os.kill(os.getpid(), signal.SIGTERM)
        record(tracer, range(50, 100))
        tell = "import signal; print(signal.getsignal(signal.SIGTERM).name)"
        subprocess.run([sys.executable, "-c", tell], check=True)
        Path("stop").touch()
    """
    prepare(tmp_path, text, run, server.url)
    with host(tmp_path, "program.py") as running:
        assert running.process.wait(60) == 0, running.log.read_text()
        assert running.log.read_text() == "SIG_IGN\n"  # its own children ignore it as well
    assert numbers(server, run) == list(range(100))

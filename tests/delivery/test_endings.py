"""The end of a worker, at the worst moment: deadlines hold, nothing is lost, nobody waits for ever."""

from __future__ import annotations

import errno
import gc
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from types import FrameType
from typing import Any

import orjson
import pytest

from evalvault_sdk import Settings
from evalvault_sdk.delivery import segment as segment_module
from evalvault_sdk.delivery.batch import Batch
from evalvault_sdk.delivery.outbox import Outbox, open_outbox
from evalvault_sdk.delivery.transport import Delivered, Outcome, RetryLater, TooLarge, Transport
from tests.support import MemoryTransport, balances, clean_environment, cpu_used, wait_for


class Hangs(MemoryTransport):
    """Takes as long as it may, and then fails."""

    def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
        super().send(batch)
        time.sleep(30 if timeout_s is None else timeout_s)
        return RetryLater("timeout")


def make(root: Path, transport: Transport | None, **settings: Any) -> Outbox:
    quick = {"flush_interval_s": 0.02, "retry_initial_s": 0.01, "retry_max_s": 0.05, "spool_dir": str(root)}
    return open_outbox(Settings(run_id="r", **{**quick, **settings}), transport)


def put(outbox: Outbox, count: int, size: int = 10) -> None:
    for number in range(count):
        outbox.queue.put(orjson.dumps({"n": number, "padding": "x" * size}))


def on_disk(root: Path) -> list[int]:
    return [
        json.loads(line)["n"] for path in sorted(root.glob("*/*-*-*.jsonl")) for line in path.read_text().splitlines()
    ]


def run(root: Path, script: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        env={**clean_environment(), "EVALVAULT_SPOOL_DIR": str(root)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_request_that_fails_at_the_instant_at_which_time_is_up_loses_and_doubles_nothing(tmp_path: Path) -> None:
    for number in range(20):
        root = tmp_path / str(number)
        outbox = make(root, Hangs(), flush_interval_s=60, batch_events=10**6)
        put(outbox, 4000, size=200)
        report = outbox.shutdown(0.2)
        assert (report.spooled, report.pending, dict(report.dropped)) == (4000, 4000, {})
        wait_for(lambda outbox=outbox: not outbox.worker.is_alive)  # type: ignore[misc]
        assert outbox.stats() == report or outbox.stats().spooled == 4000
        assert set(on_disk(root)) == set(range(4000))
        spool = outbox.worker._spool
        assert spool is not None
        assert spool._owners._lock is None, "the next process can have it"


@pytest.mark.parametrize("how", ["SIGTERM, by default", "SIGTERM, in the program's own handler"])
def test_a_signal_in_the_middle_of_a_recording_ends_the_program_in_time(tmp_path: Path, how: str) -> None:
    script = f"""
        import signal, sys
        from evalvault_sdk import StageTracer
        from tests.support import MemoryTransport
        by_default = {how == "SIGTERM, by default"}
        tracer = StageTracer(
            "r", transport=MemoryTransport(), durability="journal", flush_interval_s=0.01, handle_sigterm=by_default
        )
        if not by_default:
            signal.signal(signal.SIGTERM, lambda number, frame: (tracer.shutdown(1), sys.exit(0)))
        put = tracer._outbox.queue.put
        print("ready", flush=True)
        while True:
            put(b'{{"n": 1}}')
    """
    for number in range(6):
        process = run(tmp_path / str(number), script)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(0.05 + number * 0.01)
        process.send_signal(signal.SIGTERM)
        started = time.monotonic()
        process.communicate(timeout=20)
        assert time.monotonic() - started < 3
        assert process.returncode == (-signal.SIGTERM if how == "SIGTERM, by default" else 0)


@pytest.mark.parametrize("kind", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_the_rest_is_put_on_disk_does_not_cost_the_rest(tmp_path: Path, kind: signal.Signals) -> None:
    script = """
        import time
        from evalvault_sdk import StageTracer
        from evalvault_sdk.delivery.worker import Worker
        from tests.delivery.test_endings import Hangs
        # Time enough on a busy machine, too: how long an end may take is another test's.
        tracer = StageTracer(
            "r",
            transport=Hangs(),
            handle_sigterm=True,
            flush_interval_s=60,
            batch_events=10**6,
            shutdown_timeout_s=60,
        )
        for number in range(20_000):
            tracer._outbox.queue.put(b'{"n": %d, "x": "%s"}' % (number, b"x" * 800))
        rescue = Worker._rescue

        def said(self, *arguments, **options):
            print("now", flush=True)
            rescue(self, *arguments, **options)

        Worker._rescue = said
        tracer.shutdown(0)
    """
    process = run(tmp_path, script)
    assert process.stdout is not None
    process.stdout.readline()
    time.sleep(0.01)
    process.send_signal(kind)
    process.communicate(timeout=90)
    assert set(on_disk(tmp_path)) == set(range(20_000))


def test_an_interrupt_at_any_line_of_taking_costs_no_event(tmp_path: Path) -> None:
    lines, number = 0, 0
    while number == lines:  # until taking is done before the interrupt comes
        number += 1
        root = tmp_path / str(number)
        outbox = make(root, Hangs(), flush_interval_s=60, batch_events=10**6)
        put(outbox, 600)
        lines = 0

        def interrupt(frame: FrameType, event: str, _: object, at: int = number) -> Any:
            nonlocal lines
            if frame.f_code.co_filename.endswith(("courier.py", "account.py", "batch.py")):
                if event == "line":
                    lines += 1
                    if lines == at:
                        raise KeyboardInterrupt
                return interrupt
            return None

        worker = outbox.worker
        tracing = sys.gettrace()
        sys.settrace(interrupt)
        try:
            worker._courier.take([outbox.queue], worker._courier.limits)
        except KeyboardInterrupt:
            pass
        finally:
            sys.settrace(tracing)
        outbox.shutdown(0)
        assert set(on_disk(root)) == set(range(600)), f"interrupted at line {number}"
    assert number > 50


def test_once_all_is_stopped_only_who_puts_the_rest_on_disk_takes_events(tmp_path: Path) -> None:
    outbox = make(tmp_path, Hangs(), flush_interval_s=60, batch_events=10**6)
    put(outbox, 10)
    courier = outbox.worker._courier
    courier.stopped = True
    assert courier.take([outbox.queue], courier.limits) is None
    assert outbox.stats().queued == 10
    outbox.shutdown(0)
    assert set(on_disk(tmp_path)) == set(range(10))


def test_the_end_of_the_process_does_not_wait_for_a_long_shutdown_elsewhere(tmp_path: Path) -> None:
    script = """
        import threading, time
        from evalvault_sdk import StageTracer
        from tests.delivery.test_endings import Hangs
        tracer = StageTracer("r", transport=Hangs(), flush_interval_s=0.01, shutdown_timeout_s=0.5)
        tracer.record_stage("x")
        time.sleep(0.2)
        threading.Thread(target=tracer.shutdown, args=(20,), daemon=True).start()
        time.sleep(0.1)
        print(time.time(), flush=True)
    """
    process = run(tmp_path, script)
    out, _ = process.communicate(timeout=30)
    assert time.time() - float(out) < 2
    outbox = make(tmp_path / "2", Hangs())
    put(outbox, 3)
    wait_for(lambda: outbox.stats().in_flight == 3)
    long = threading.Thread(target=outbox.shutdown, args=(20,))
    long.start()
    time.sleep(0.05)
    started = time.monotonic()
    assert outbox.shutdown(0.1).spooled == 3
    assert time.monotonic() - started < 1
    long.join(5)
    assert not long.is_alive()


def test_a_logging_handler_or_callback_that_hangs_does_not_hold_up_the_end(tmp_path: Path) -> None:
    release = threading.Event()

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            release.wait(20)

    handler, logger = Handler(), logging.getLogger("evalvault_sdk")
    logger.addHandler(handler)
    try:
        outbox = make(tmp_path, Hangs(), on_error=lambda message: release.wait(20))
        put(outbox, 5)
        started = time.monotonic()
        assert outbox.shutdown(0.3).spooled == 5
        assert time.monotonic() - started < 1
    finally:
        release.set()
        logger.removeHandler(handler)


def test_a_finalizer_of_a_forgotten_tracer_waits_for_no_lock(tmp_path: Path) -> None:
    outbox = make(tmp_path, MemoryTransport())
    put(outbox, 1)
    assert outbox.flush(5).complete
    closed = threading.Event()

    def close() -> None:
        outbox.close()
        closed.set()

    with outbox.worker.ledger.lock:
        closer = threading.Thread(target=close)
        closer.start()
        assert closed.wait(5)
    closer.join()
    wait_for(lambda: not outbox.worker.is_alive)


def test_a_tracer_that_is_made_while_the_last_one_is_collected_works(tmp_path: Path) -> None:
    for _ in range(200):
        first = make(tmp_path, None, api_url="http://127.0.0.1:9")
        put(first, 1)
        closer = threading.Thread(target=first.close)
        closer.start()
        second = make(tmp_path, None, api_url="http://127.0.0.1:9")
        closer.join()
        put(second, 1)
        report = second.shutdown(0.01)
        assert (report.recorded, report.spooled + report.delivered) == (1, 1), report
        del first, second
    gc.collect()


def test_without_a_disk_the_end_of_one_tracer_costs_the_others_nothing(tmp_path: Path) -> None:
    release = threading.Event()

    class Slow(MemoryTransport):
        def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
            super().send(batch)
            release.wait(10)
            return Delivered()

    outbox = make(tmp_path, Slow(), durability="memory", flush_interval_s=60)
    other = Outbox(outbox.worker, outbox.worker.open_queue(), Settings(run_id="other"))
    put(outbox, 3)
    put(other, 10)
    outbox.worker.speed_up()
    wait_for(lambda: other.stats().in_flight == 10)
    outbox.shutdown(0.1)
    release.set()
    assert other.flush(5).complete
    assert balances(outbox.stats())
    other.shutdown(5)


def test_nothing_spins_while_there_is_nothing_to_do(tmp_path: Path) -> None:
    waiting = make(tmp_path, MemoryTransport(*[RetryLater("x")] * 1000), durability="memory", flush_interval_s=10)
    put(waiting, 1)
    waiting.worker.speed_up()
    asked = make(tmp_path / "2", MemoryTransport(*[RetryLater("x", wait_s=60)] * 1000), flush_interval_s=10)
    put(asked, 1)
    asked.worker.speed_up()
    emptied = make(tmp_path / "3", MemoryTransport(*[RetryLater("x")] * 100_000), retry_max_s=0.5)
    put(emptied, 1)
    wait_for(lambda: len(on_disk(tmp_path / "3")) == 1)
    for path in (tmp_path / "3").glob("*/*-*-*.jsonl"):
        path.unlink()
    with cpu_used(waiting.worker, asked.worker, emptied.worker) as seconds:
        time.sleep(1.0)
    assert seconds[0] < 0.3
    for outbox in (waiting, asked, emptied):
        assert outbox.shutdown(0.1).in_flight == 0


def test_a_segment_that_cannot_be_read_for_now_holds_up_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    unreadable: set[str] = set()

    class Faulty:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def open(self, path: str, *arguments: Any) -> int:
            if path in unreadable and len(arguments) == 1:
                raise OSError(errno.EIO, "input/output error")
            return os.open(path, *arguments)

    monkeypatch.setattr(segment_module, "os", Faulty())
    first = make(tmp_path, Hangs())
    put(first, 5)
    first.shutdown(0.1)
    unreadable.update(str(path) for path in tmp_path.glob("*/*-*-*.jsonl"))
    transport = MemoryTransport(RetryLater("x"))
    second = make(tmp_path, transport)
    put(second, 10)
    wait_for(lambda: second.stats().complete)
    started = time.monotonic()
    assert second.shutdown(2).complete
    assert time.monotonic() - started < 1


def test_what_cannot_be_deleted_is_not_delivered_again_and_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class NoDelete:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def unlink(self, path: str) -> None:
            raise OSError(errno.EROFS, "read-only")

        def truncate(self, path: str, size: int) -> None:
            raise OSError(errno.EROFS, "read-only")

    monkeypatch.setattr("evalvault_sdk.delivery.worker._LOOK_AROUND_S", 0.05)
    first = make(tmp_path, Hangs())
    put(first, 5)
    first.shutdown(0.1)
    monkeypatch.setattr(segment_module, "os", NoDelete())
    transport = MemoryTransport()
    second = make(tmp_path, transport)
    wait_for(lambda: len(transport.events) == 5)
    time.sleep(0.5)
    assert len(transport.events) == 5
    assert second.stats().recovered == 5
    second.shutdown(1)


def test_a_limit_that_the_event_was_within_is_not_believed(tmp_path: Path) -> None:
    class Lies(MemoryTransport):
        def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
            super().send(batch)
            return TooLarge(1 << 20)

    transport = Lies()
    outbox = make(tmp_path, transport)
    outbox.queue.put(orjson.dumps({"n": 1, "attributes": {"text": "x" * 3000}}))
    report = outbox.shutdown(5)
    assert report.rejected == 1
    assert len(transport.batches) < 20


def test_a_disk_that_is_full_leaves_events_in_memory_and_one_line(tmp_path: Path) -> None:
    script = """
        import resource, time
        from evalvault_sdk import StageTracer
        from tests.support import MemoryTransport
        from evalvault_sdk.delivery.transport import RetryLater

        class Switched(MemoryTransport):
            up = False
            def send(self, batch, *, timeout_s=None):
                super().send(batch)
                return super().send(batch) if self.up else RetryLater("HTTP 503")

        transport = Switched()
        tracer = StageTracer(
            "r", transport=transport, durability="journal", flush_interval_s=0.02, retry_max_s=0.05, max_queue_events=50
        )
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (0, limits[1]))
        for number in range(60):
            tracer.record_stage("x")
        time.sleep(0.3)
        stats = tracer.stats()
        assert (stats.queued + stats.in_flight, stats.spooled) == (50, 0), stats
        assert dict(stats.dropped) == {"queue_full": 10}
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        time.sleep(1.2)
        assert tracer.stats().spooled == 50, tracer.stats()
        transport.up = True
        report = tracer.shutdown(5)
        assert (report.delivered, report.pending) == (50, 0), report
    """
    process = run(tmp_path, script)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 0, said
    assert said.count("cannot write to") == 1
    assert "stay in memory as far as its bounds allow" in said
    assert said.count("were lost (queue_full)") == 1

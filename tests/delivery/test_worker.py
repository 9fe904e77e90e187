from __future__ import annotations

import logging
import re
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from evalvault_sdk import Settings
from evalvault_sdk.delivery.batch import Batch
from evalvault_sdk.delivery.outbox import Outbox, open_outbox
from evalvault_sdk.delivery.transport import (
    Delivered,
    Outcome,
    Refused,
    RejectedEvent,
    RetryLater,
    TooLarge,
    Transport,
)
from tests.support import MemoryTransport, balances, clean_environment, new_threads, wait_for


def make(transport: Transport, **settings: Any) -> Outbox:
    quick = {"flush_interval_s": 0.05, "retry_initial_s": 0.01, "retry_max_s": 0.05, "durability": "memory"}
    return open_outbox(Settings(run_id="r", **{**quick, **settings}), transport)


def put(outbox: Outbox, count: int, start: int = 0) -> None:
    for number in range(start, start + count):
        outbox.queue.put(orjson.dumps({"n": number}))


def numbers(transport: MemoryTransport) -> list[int]:
    return [event["n"] for event in transport.events]


def test_no_thread_runs_before_the_first_event() -> None:
    before = set(threading.enumerate())
    outbox = make(MemoryTransport())
    assert new_threads(before) == 0
    put(outbox, 1)
    assert new_threads(before) == 1
    outbox.shutdown(5)
    assert new_threads(before) == 0


def test_events_arrive_in_order_without_a_flush_within_the_interval() -> None:
    transport = MemoryTransport()
    outbox = make(transport)
    put(outbox, 5)
    wait_for(lambda: outbox.queue.account.stats().delivered == 5, 5)
    assert numbers(transport) == [0, 1, 2, 3, 4]
    outbox.shutdown(5)


def test_a_full_batch_goes_without_waiting_for_the_interval() -> None:
    transport = MemoryTransport()
    outbox = make(transport, flush_interval_s=60, batch_events=10)
    put(outbox, 10)
    wait_for(lambda: outbox.queue.account.stats().delivered == 10, 5)
    outbox.shutdown(5)


def test_batches_grow_with_the_backlog_up_to_their_ceiling() -> None:
    transport = MemoryTransport()
    outbox = make(transport, flush_interval_s=60, batch_events=10_000, max_batch_events=1000)
    put(outbox, 2500)
    stats = outbox.flush(10)
    assert (stats.delivered, stats.complete) == (2500, True)
    assert [len(batch) for batch in transport.batches] == [1000, 1000, 500]
    outbox.shutdown(5)


def test_flush_waits_for_what_was_recorded_before_and_only_for_that() -> None:
    started, release = threading.Event(), threading.Event()

    class Slow(MemoryTransport):
        def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
            outcome = super().send(batch)
            if len(self.batches) == 2:
                started.set()
                release.wait(30)
            return outcome

    outbox = make(Slow(), flush_interval_s=60)
    put(outbox, 3)
    assert outbox.flush(10).delivered == 3
    put(outbox, 2)
    assert not outbox.flush(0.1).complete, "the second batch is held up"
    started.wait(10)
    stats = outbox.queue.account.stats()
    assert (stats.delivered, stats.in_flight) == (3, 2)
    assert balances(stats)
    release.set()
    assert outbox.flush(10).complete
    outbox.shutdown(5)


def test_flush_of_nothing_returns_at_once() -> None:
    outbox = make(MemoryTransport())
    started = time.monotonic()
    assert outbox.flush(30).recorded == 0
    assert time.monotonic() - started < 1
    outbox.shutdown(1)


def test_a_failed_batch_is_sent_again_before_newer_ones_and_nothing_is_lost() -> None:
    transport = MemoryTransport(RetryLater("HTTP 503"), RetryLater("HTTP 503"))
    outbox = make(transport)
    put(outbox, 3)
    assert outbox.flush(10).delivered == 3
    put(outbox, 2, start=3)
    assert outbox.flush(10).delivered == 5
    sent = [[orjson.loads(event)["n"] for event in batch.events] for batch in transport.batches]
    assert sent == [[0, 1, 2]] * 3 + [[3, 4]]
    outbox.shutdown(5)


def test_refused_events_are_counted_and_their_neighbours_delivered(caplog: pytest.LogCaptureFixture) -> None:
    transport = MemoryTransport(Delivered((RejectedEvent(1, "attempt must be an integer"),)))
    outbox = make(transport)
    put(outbox, 3)
    stats = outbox.flush(10)
    assert (stats.delivered, stats.rejected, stats.complete) == (2, 1, False)
    wait_for(lambda: "attempt must be an integer" in caplog.text)
    outbox.shutdown(5)


class Judge(MemoryTransport):
    """Refuses every batch that holds a bad number, and every one of more than `most` events."""

    def __init__(self, bad: set[int], most: int = 1000) -> None:
        super().__init__()
        self.bad, self.most = bad, most
        self.stored: list[int] = []

    def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
        super().send(batch)
        found = [orjson.loads(event)["n"] for event in batch.events]
        if len(found) > self.most:
            return TooLarge()
        if self.bad.intersection(found):
            return Refused("Malformed")
        self.stored += found
        return Delivered()


def test_one_poisonous_event_does_not_cost_its_batch() -> None:
    judge = Judge(bad={13, 77})
    outbox = make(judge, flush_interval_s=60)
    put(outbox, 100)
    stats = outbox.flush(10)
    assert (stats.delivered, stats.rejected) == (98, 2)
    assert judge.stored == [number for number in range(100) if number not in judge.bad]
    outbox.shutdown(5)


def test_what_is_too_large_is_halved_and_the_limit_remembered() -> None:
    class Small(MemoryTransport):
        def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
            super().send(batch)
            return Delivered() if len(batch.body()) <= 10_000 else TooLarge()

    transport = Small()
    outbox = make(transport, flush_interval_s=60, batch_events=1000)
    for _ in range(2):
        transport.batches.clear()
        for _ in range(64):
            outbox.queue.put(orjson.dumps({"n": 1, "padding": "x" * 500}))
        assert outbox.flush(10).complete
    assert all(len(batch.body()) <= 10_000 for batch in transport.batches), "the second time none was too large"
    outbox.shutdown(5)


def test_a_single_event_that_is_too_large_is_rejected_not_tried_for_ever() -> None:
    judge = Judge(bad=set(), most=0)
    outbox = make(judge)
    put(outbox, 3)
    stats = outbox.flush(10)
    assert (stats.delivered, stats.rejected) == (0, 3)
    outbox.shutdown(5)


def test_an_outage_is_said_once_when_it_begins_and_once_when_it_ends(caplog: pytest.LogCaptureFixture) -> None:
    transport = MemoryTransport(*[RetryLater("HTTP 401", advice="set EVALVAULT_API_TOKEN")] * 20)
    outbox = make(transport)
    put(outbox, 2)
    wait_for(lambda: outbox.queue.account.stats().delivered == 2, 10)
    put(outbox, 2)
    assert outbox.flush(10).delivered == 4
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert "HTTP 401" in lines[0]
    assert "EVALVAULT_API_TOKEN" in lines[0]
    assert "again" in lines[1]
    outbox.shutdown(5)


def test_shutdown_delivers_what_is_left_and_drops_what_comes_later() -> None:
    transport = MemoryTransport()
    outbox = make(transport, flush_interval_s=60)
    put(outbox, 100)
    stats = outbox.shutdown(10)
    assert stats.complete
    assert transport.closed
    put(outbox, 2)
    stats = outbox.shutdown(10)
    assert (stats.delivered, stats.dropped) == (100, {"closed": 2})
    assert balances(stats)


def test_shutdown_holds_its_deadline_and_counts_what_is_lost(caplog: pytest.LogCaptureFixture) -> None:
    release = threading.Event()

    class Hangs(MemoryTransport):
        def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
            super().send(batch)
            release.wait(30)
            return Delivered()

    transport = Hangs()
    outbox = make(transport, max_batch_events=2)
    put(outbox, 5)
    wait_for(lambda: len(transport.batches) == 1)
    started = time.monotonic()
    stats = outbox.shutdown(0.3)
    assert 0.2 < time.monotonic() - started < 1.5
    assert stats.dropped == {"shutdown": 5}
    assert balances(stats)
    assert "5 events for memory were lost (shutdown)" in caplog.text
    release.set()
    wait_for(lambda: not outbox.worker.is_alive)
    assert outbox.queue.account.report(in_time=False) == stats, (
        "what a request comes to after the end is not counted twice"
    )
    assert len(transport.batches) == 1


def test_shutdown_during_an_outage_holds_its_deadline() -> None:
    class Down(MemoryTransport):
        def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
            super().send(batch)
            return RetryLater("ConnectionError")

    outbox = make(Down(), retry_initial_s=60, retry_max_s=60)
    put(outbox, 5)
    started = time.monotonic()
    stats = outbox.shutdown(0.5)
    assert time.monotonic() - started < 1.5
    assert stats.dropped == {"shutdown": 5}
    assert balances(stats)


def test_a_fault_of_the_transport_loses_nothing_and_does_not_end_the_thread(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evalvault_sdk.delivery.worker._FAULT_PAUSE_S", 0.01)
    transport = MemoryTransport(ZeroDivisionError("secret"), ZeroDivisionError("secret"))
    outbox = make(transport)
    put(outbox, 3)
    assert outbox.flush(10).delivered == 3
    assert "ZeroDivisionError" in caplog.text
    assert "secret" not in caplog.text
    outbox.shutdown(5)


def test_a_full_queue_drops_the_newest_never_blocks_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    outbox = make(MemoryTransport(), flush_interval_s=60, max_queue_events=10, batch_events=1000)
    started = time.monotonic()
    put(outbox, 100_000)
    assert time.monotonic() - started < 5
    stats = outbox.shutdown(5)
    assert stats.delivered + stats.dropped["queue_full"] == stats.recorded == 100_000
    assert stats.dropped["queue_full"] > 0
    assert "lost (queue_full)" in caplog.text


def test_the_account_balances_at_every_moment_it_can_be_observed() -> None:
    class Random(MemoryTransport):
        def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
            super().send(batch)
            kind = len(self.batches) % 5
            if kind == 1:
                return RetryLater("x")
            if kind == 2 and len(batch) > 1:
                return Delivered((RejectedEvent(0, "x"),))
            if kind == 3:
                raise ZeroDivisionError
            return Delivered()

    logging.getLogger("evalvault_sdk").setLevel(logging.ERROR)
    try:
        outbox = make(Random(), max_queue_events=500, batch_events=20, retry_initial_s=0.001, retry_max_s=0.002)
        done = threading.Event()

        def record() -> None:
            put(outbox, 3000)

        threads = [threading.Thread(target=record) for _ in range(4)]
        for thread in threads:
            thread.start()
        observed = 0
        while any(thread.is_alive() for thread in threads) or observed < 1000:
            assert balances(outbox.queue.account.stats())
            observed += 1
        done.set()
        stats = outbox.shutdown(20)
        assert balances(stats)
        assert stats.recorded == 12_000
        assert stats.pending == 0
    finally:
        logging.getLogger("evalvault_sdk").setLevel(logging.NOTSET)


def test_no_thread_is_left_by_many_workers_made_and_ended() -> None:
    before = set(threading.enumerate())
    for _ in range(100):
        outbox = make(MemoryTransport())
        put(outbox, 1)
        assert outbox.shutdown(5).complete
    assert new_threads(before) == 0


def test_a_fault_in_the_middle_of_a_halved_batch_counts_nothing_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    transport = MemoryTransport(TooLarge(), Delivered())
    outbox = make(transport, flush_interval_s=60, retry_initial_s=5, retry_max_s=5)
    worker, sent = outbox.worker, 0
    send = worker._courier._send

    def send_and_fail_once(batch: Batch) -> Outcome:
        nonlocal sent
        sent += 1
        if sent == 3:
            raise ZeroDivisionError
        return send(batch)

    monkeypatch.setattr(worker._courier, "_send", send_and_fail_once)
    put(outbox, 4)
    worker.speed_up()
    wait_for(lambda: outbox.stats().delivered == 2)
    wait_for(lambda: outbox.stats().queued == 2)
    stats = outbox.stats()
    assert balances(stats)
    assert (stats.in_flight, numbers(transport)[4:]) == (0, [0, 1])
    stats = outbox.shutdown(5)
    assert (stats.delivered, stats.complete, balances(stats)) == (4, True, True)
    assert numbers(transport)[4:] == [0, 1, 2, 3]


def test_a_logging_filter_that_raises_is_not_felt() -> None:
    class Raises(logging.Filter):
        def filter(self, record: logging.LogRecord) -> bool:
            raise ValueError("host's filter")

    logger, refuses = logging.getLogger("evalvault_sdk"), Raises()
    logger.addFilter(refuses)
    try:
        transport = MemoryTransport(RetryLater("x"), Delivered((RejectedEvent(0, "x"),)), *[ZeroDivisionError()] * 2)
        outbox = make(transport)
        put(outbox, 2)
        stats = outbox.flush(10)
        assert (stats.delivered, stats.rejected, stats.in_time) == (1, 1, True)
        put(outbox, 2)
        stats = outbox.shutdown(10)
        assert (stats.delivered, stats.in_time, balances(stats)) == (3, True, True)
    finally:
        logger.removeFilter(refuses)


def test_a_burst_of_large_events_wakes_the_worker_before_the_queue_is_full() -> None:
    outbox = make(MemoryTransport(), flush_interval_s=60)
    for _ in range(500):
        outbox.queue.put(b"x" * 200_000)
        time.sleep(0.0005)  # a program that does something in between
    stats = outbox.shutdown(20)
    assert (stats.delivered, stats.dropped) == (500, {})


def test_a_signal_handler_that_records_while_the_thread_is_being_started_does_not_deadlock() -> None:
    script = textwrap.dedent(
        """
        import signal
        from evalvault_sdk import StageTracer
        from tests.support import MemoryTransport

        tracer, recorded = None, 0

        def handler(number, frame):
            global recorded
            if tracer is not None:
                tracer.record_stage("from a handler")
                recorded += 1

        signal.signal(signal.SIGALRM, handler)
        signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
        for _ in range(300):
            tracer = StageTracer("r", transport=MemoryTransport())
            tracer.record_stage("x")
            report = tracer.shutdown(5)
            assert report.pending == 0, report
            tracer = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        assert recorded > 10
        """
    )
    done = subprocess.run([sys.executable, "-c", script], env=clean_environment(), capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


def test_workers_that_never_got_an_event_and_those_that_ended_are_not_kept() -> None:
    from evalvault_sdk.delivery import lifecycle

    before = set(lifecycle._running)
    idle = [make(MemoryTransport()) for _ in range(100)]
    busy = make(MemoryTransport())
    put(busy, 1)
    assert lifecycle._running - before == {busy.worker}
    busy.shutdown(5)
    assert lifecycle._running - before == set()
    assert all(outbox.shutdown(1).in_time for outbox in idle)


def test_a_flush_says_whether_it_was_in_time_whatever_was_lost_before() -> None:
    release = threading.Event()

    class Slow(MemoryTransport):
        def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
            if len(self.batches) == 1:
                release.wait(30)
            return super().send(batch)

    outbox = make(Slow(Delivered((RejectedEvent(0, "x"),))))
    put(outbox, 2)
    report = outbox.flush(10)
    assert (report.in_time, report.complete, report.rejected) == (True, False, 1)
    put(outbox, 1)
    assert not outbox.flush(0.1).in_time
    release.set()
    assert outbox.flush(float("inf")).in_time
    assert outbox.shutdown(float("inf")).in_time


def test_a_server_that_refuses_everything_is_not_asked_for_ever() -> None:
    judge = Judge(bad=set(range(5000)))
    outbox = make(judge, flush_interval_s=60, batch_events=10_000)
    put(outbox, 5000)
    stats = outbox.shutdown(20)
    assert (stats.rejected, stats.pending) == (5000, 0)
    assert len(judge.batches) < 200


def test_the_last_request_gets_the_time_that_is_left() -> None:
    asked: list[float | None] = []

    class Asks(MemoryTransport):
        def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
            asked.append(timeout_s)
            return super().send(batch)

    outbox = make(Asks())
    put(outbox, 1)
    outbox.flush(10)
    put(outbox, 1)
    outbox.shutdown(7)
    assert asked[0] is None
    assert asked[1] is not None
    assert 0 < asked[1] <= 7


def test_flushes_of_many_threads_at_the_very_start_leave_a_worker_that_goes_on() -> None:
    for _ in range(150):
        transport = MemoryTransport()
        outbox = make(transport, flush_interval_s=0.01)
        together = threading.Barrier(6)

        def first_action(outbox: Outbox = outbox, together: threading.Barrier = together) -> None:
            together.wait(10)
            put(outbox, 1)
            outbox.flush(0.02)

        threads = [threading.Thread(target=first_action) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert outbox.worker._courier.deadline == float("inf")
        put(outbox, 1)
        assert outbox.shutdown(5).complete


def test_a_thread_that_cannot_be_started_once_is_started_later(monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = make(MemoryTransport())
    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", lambda self: (_ for _ in ()).throw(RuntimeError("can't start")))
        put(outbox, 2)
        assert outbox.flush(0.5).complete, "delivered in the caller's thread"
    time.sleep(0.6)  # the flush's own deadline passes, and must not be the worker's
    put(outbox, 1)
    wait_for(lambda: outbox.queue.account.stats().delivered == 3, 5)
    assert outbox.shutdown(5).complete


def test_a_flush_without_a_thread_that_runs_out_of_time_loses_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    outbox = make(MemoryTransport(*[RetryLater("x")] * 3), retry_initial_s=0.2, retry_max_s=0.2)
    monkeypatch.setattr(outbox.worker, "start", lambda wait_s=0.0: None)
    outbox.queue.on_first_put = None
    put(outbox, 2)
    report = outbox.flush(0.01)
    assert (report.in_time, report.queued, report.dropped) == (False, 2, {})
    assert outbox.shutdown(5).complete


def test_shutdown_uses_its_time_although_there_was_a_long_outage() -> None:
    transport = MemoryTransport(*[RetryLater("x")] * 10)
    outbox = make(transport, retry_initial_s=0.01, retry_max_s=60)
    put(outbox, 1)
    wait_for(lambda: len(transport.batches) >= 4, 20)
    assert outbox.shutdown(10).complete


def test_all_losses_are_told_in_the_end(caplog: pytest.LogCaptureFixture) -> None:
    outbox = make(MemoryTransport(), max_queue_events=10, flush_interval_s=0.01)
    for _ in range(5):
        put(outbox, 200)
        outbox.flush(5)
    stats = outbox.shutdown(5)
    told = [int(words[0]) for words in re.findall(r"(\d+) events for memory were lost \((queue_full)\)", caplog.text)]
    assert sum(told) == stats.dropped["queue_full"]
    assert len(told) <= 2


def test_a_limit_is_learnt_from_what_passed_not_from_what_was_refused() -> None:
    outbox = make(MemoryTransport(*[TooLarge()] * 200), flush_interval_s=60)
    for _ in range(50):
        outbox.queue.put(orjson.dumps({"n": 1, "padding": "x" * 5000}))
    assert outbox.flush(10).rejected == 50
    assert outbox.worker._courier.limits.max_bytes == 4 << 20
    outbox.shutdown(5)


def test_the_second_shutdown_says_what_the_first_said() -> None:
    outbox = make(MemoryTransport(*[RetryLater("x")] * 1000))
    put(outbox, 1)
    assert not outbox.shutdown(0.1).in_time
    assert not outbox.shutdown(0.1).in_time


def test_what_is_being_sent_when_sigterm_comes_is_on_disk_before_the_programs_own_handler_runs(tmp_path: Path) -> None:
    answer = threading.Event()

    class Hanging(MemoryTransport):
        def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
            outcome = super().send(batch, timeout_s=timeout_s)
            answer.wait(10)
            return outcome

    transport = Hanging()
    outbox = make(transport, durability="spool", spool_dir=str(tmp_path), shutdown_timeout_s=0.1)
    put(outbox, 3)
    wait_for(lambda: bool(transport.batches))
    outbox.worker.brace(time.monotonic() + 0.1)
    lines = b"".join(path.read_bytes() for path in tmp_path.glob("*/*-*.jsonl")).splitlines()
    assert [orjson.loads(line)["n"] for line in lines] == [0, 1, 2], "the handler may end the process at once"
    answer.set()
    stats = outbox.shutdown(10)
    assert stats.complete, str(stats)
    assert balances(stats)
    assert numbers(transport) == [0, 1, 2, 0, 1, 2]

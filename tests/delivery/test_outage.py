"""What becomes of events while the destination does not take them: the worker and its spool."""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import random
import threading
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from evalvault_sdk import Settings
from evalvault_sdk.delivery.account import Ledger
from evalvault_sdk.delivery.batch import Batch
from evalvault_sdk.delivery.notices import Notices
from evalvault_sdk.delivery.outbox import Outbox, open_outbox
from evalvault_sdk.delivery.transport import Delivered, Outcome, Refused, RejectedEvent, RetryLater, TooLarge, Transport
from tests.support import MemoryTransport, balances, new_threads, wait_for


class Destination:
    """Takes events while it is `up`; refuses what holds a number of `poison`; remembers what it stored."""

    destination = "http://destination.test"

    def __init__(self, up: bool = True, poison: set[int] | None = None, takes_s: float = 0.0) -> None:
        self.up, self.poison, self.takes_s = up, poison or set(), takes_s
        self.stored: list[int] = []
        self.sizes: list[int] = []
        self.down: Outcome = RetryLater("HTTP 503")

    def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
        time.sleep(self.takes_s)
        self.sizes.append(len(batch))
        if not self.up:
            return self.down
        numbers = [orjson.loads(event)["n"] for event in batch.events]
        if self.poison.intersection(numbers):
            return RetryLater("HTTP 400 from something else", advice="check the proxy", blame="request")
        self.stored += numbers
        return Delivered()

    def close(self) -> None:
        pass

    def after_fork_in_child(self) -> None:
        pass


def make(transport: Transport, **settings: Any) -> Outbox:
    quick = {"flush_interval_s": 0.02, "retry_initial_s": 0.01, "retry_max_s": 0.05}
    return open_outbox(Settings(run_id="r", **{**quick, **settings}), transport)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EVALVAULT_SPOOL_DIR", str(tmp_path / "spool"))
    return tmp_path / "spool"


@pytest.fixture(autouse=True)
def spool_dir(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`Settings(...)` reads no variables: give it the folder by its default."""
    monkeypatch.setattr("evalvault_sdk.delivery.worker.default_root", lambda environ: folder)


def put(outbox: Outbox, numbers: range | list[int], padding: str = "") -> None:
    for number in numbers:
        outbox.queue.put(orjson.dumps({"n": number, "padding": padding}))


def segments(folder: Path) -> list[Path]:
    return sorted(folder.glob("*/*-*-*.jsonl"))


def on_disk(folder: Path) -> list[int]:
    """Return what is there so far: a line may just be in the writing, and a file just be deleted."""
    found: list[int] = []
    for path in segments(folder):
        with contextlib.suppress(FileNotFoundError):
            found += [json.loads(line)["n"] for line in path.read_text().split("\n")[:-1]]
    return found


def test_what_cannot_be_delivered_is_on_disk_within_an_interval_and_delivered_once_when_it_can(folder: Path) -> None:
    destination = Destination(up=False)
    outbox = make(destination)
    put(outbox, range(100))
    wait_for(lambda: on_disk(folder) == list(range(100)))
    wait_for(lambda: outbox.stats().spooled == 100 or outbox.stats().in_flight > 0)
    put(outbox, range(100, 150))
    wait_for(lambda: len(on_disk(folder)) == 150)
    assert balances(outbox.stats())
    destination.up = True
    wait_for(lambda: outbox.stats().complete)
    assert destination.stored == list(range(150)), "the oldest first, each once"
    assert segments(folder) == []
    assert outbox.shutdown(5).in_time


def test_what_is_left_at_the_end_is_adopted_by_the_next_without_a_recording(folder: Path) -> None:
    first = make(Destination(up=False))
    put(first, range(1000))
    started = time.monotonic()
    report = first.shutdown(0.3)
    assert time.monotonic() - started < 0.6
    assert (report.spooled, report.pending, report.in_time, dict(report.dropped)) == (1000, 1000, False, {})
    destination = Destination()
    second = make(destination)
    wait_for(lambda: sorted(destination.stored) == list(range(1000)))
    wait_for(lambda: segments(folder) == [])
    stats = second.stats()
    assert (stats.recorded, stats.recovered, stats.recovered_lost) == (0, 1000, 0)
    assert str(stats).endswith("(and recovered 1,000 of ended processes)")
    second.shutdown(5)
    assert list(folder.glob("*/*.lock")) == []


def test_what_is_left_is_adopted_by_one_that_runs_already(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evalvault_sdk.delivery.worker._LOOK_AROUND_S", 0.1)
    destination = Destination()
    running = make(destination)
    put(running, [-1])
    assert running.flush(5).complete
    ended = make(Destination(up=False))
    put(ended, range(10))
    ended.shutdown(0.1)
    wait_for(lambda: destination.stored == [-1, *range(10)])
    running.shutdown(5)


def test_a_journal_has_every_event_on_disk_when_put_returns_and_nothing_when_it_is_delivered(folder: Path) -> None:
    destination = Destination()
    outbox = make(destination, durability="journal", flush_interval_s=60)
    for number in range(50):
        put(outbox, [number])
        assert on_disk(folder) == list(range(number + 1))
    stats = outbox.stats()
    assert (stats.recorded, stats.spooled, stats.queued) == (50, 50, 0)
    assert outbox.flush(10).complete
    assert destination.stored == list(range(50))
    wait_for(lambda: segments(folder) == [])
    outbox.shutdown(5)


@pytest.mark.parametrize("durability", ["spool", "journal"])
def test_new_events_do_not_wait_for_the_backlog(folder: Path, durability: str) -> None:
    destination = Destination(up=False)
    outbox = make(destination, durability=durability, flush_interval_s=0.1, max_batch_events=200)
    put(outbox, range(20_000))
    wait_for(lambda: len(on_disk(folder)) == 20_000 and len(destination.sizes) > 3)
    destination.up, destination.takes_s = True, 0.02
    wait_for(lambda: len(destination.stored) > 0)
    late: list[float] = []
    for number in range(20_000, 20_020):
        put(outbox, [number])
        started = time.monotonic()
        wait_for(lambda number=number: number in destination.stored)  # type: ignore[misc]
        late.append(time.monotonic() - started)
        assert number > 20_005 or outbox.stats().spooled > 0, "the backlog is still there"
    assert sorted(late)[len(late) // 2] < 2 * 0.1
    wait_for(lambda: outbox.stats().complete, 30)
    assert sorted(destination.stored) == list(range(20_020))
    outbox.shutdown(5)


def test_a_backlog_is_delivered_slowly_at_first(folder: Path) -> None:
    destination = Destination(up=False)
    outbox = make(destination)
    put(outbox, range(5000))
    wait_for(lambda: len(on_disk(folder)) == 5000)
    failed = len(destination.sizes)
    destination.up = True
    wait_for(lambda: outbox.stats().complete)
    sizes = destination.sizes[failed:]
    assert sizes[0] <= 64
    assert all(later <= 2 * earlier for earlier, later in itertools.pairwise(sizes))
    outbox.shutdown(5)


def test_what_something_on_the_way_refuses_for_ever_ends_in_the_dead_letter_and_holds_up_nothing(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evalvault_sdk.delivery.courier._SUSPECT_WAITS_AT_MOST_S", 0.05)
    destination = Destination(poison={300, 777})
    outbox = make(destination, flush_interval_s=0.05)
    put(outbox, range(1000))
    wait_for(lambda: len(destination.stored) == 998, 60)
    put(outbox, range(1000, 1010))
    wait_for(lambda: len(destination.stored) == 1008)
    put(outbox, range(1010, 1100))
    wait_for(lambda: len(destination.stored) == 1098)
    for number in range(1100, 2000):  # others pass, now and then
        if outbox.stats().rejected == 2:
            break
        put(outbox, [number])
        time.sleep(0.02)
    stats = outbox.stats()
    assert (stats.rejected, stats.delivered, balances(stats)) == (2, len(destination.stored), True)
    assert not destination.poison.intersection(destination.stored)
    assert len(destination.stored) == len(set(destination.stored))
    (dead,) = folder.glob("*/dead-letter.jsonl")
    letters = [json.loads(line) for line in dead.read_text().splitlines()]
    assert sorted(letter["event"]["n"] for letter in letters) == [300, 777]
    assert "HTTP 400 from something else" in letters[0]["reason"]
    assert segments(folder) == []
    outbox.shutdown(5)


def test_a_destination_that_refuses_everything_keeps_everything(folder: Path) -> None:
    destination = Destination(poison=set(range(200)))
    outbox = make(destination)
    put(outbox, range(200))
    wait_for(lambda: len(destination.sizes) > 30)
    stats = outbox.stats()
    assert (stats.rejected, stats.pending, dict(stats.dropped)) == (0, 200, {})
    destination.poison = set()
    wait_for(lambda: outbox.stats().complete)
    outbox.shutdown(5)


def test_refused_events_are_in_the_dead_letter_with_the_reason(folder: Path) -> None:
    class Judge(Destination):
        def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
            return Delivered((RejectedEvent(1, "stage_type is required"),))

    outbox = make(Judge(), flush_interval_s=60)
    put(outbox, range(3), padding="보험")
    assert outbox.flush(5).rejected == 1
    (dead,) = folder.glob("*/dead-letter.jsonl")
    assert dead.stat().st_mode & 0o777 == 0o600
    (letter,) = [json.loads(line) for line in dead.read_text(encoding="utf-8").splitlines()]
    assert letter["reason"] == "stage_type is required"
    assert letter["event"] == {"n": 1, "padding": "보험"}
    outbox.shutdown(5)


def test_an_event_that_is_too_large_is_truncated_and_says_so(folder: Path) -> None:
    class Small(Destination):
        def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
            self.sizes.append(len(batch.body()))
            if len(batch.body()) > 5000:
                return TooLarge(5000)
            self.bodies = [*getattr(self, "bodies", []), *map(orjson.loads, batch.events)]
            return Delivered()

    small = Small()
    outbox = make(small, flush_interval_s=60)
    large = {"attributes": {"query": "짧다", "answer": "가" * 100_000, "list": list(range(5000))}, "stage_id": "large"}
    for event in ({"stage_id": "a"}, large, {"stage_id": "b"}):
        outbox.queue.put(orjson.dumps(event))
    assert outbox.flush(10).complete
    events = {event["stage_id"]: event for event in small.bodies}
    assert set(events) == {"a", "b", "large"}
    attributes = events["large"]["attributes"]
    assert attributes["query"] == "짧다"
    assert attributes["answer"].startswith("가" * 100)
    assert "truncated: it was 300002 bytes" in attributes["answer"]
    assert events["large"]["metadata"]["truncated"] == ["attributes.answer", "attributes.list"]
    outbox.shutdown(5)


def test_a_single_event_that_stays_too_large_is_rejected_not_tried_for_ever(folder: Path) -> None:
    class Never(Destination):
        def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
            self.sizes.append(len(batch))
            return TooLarge()

    never = Never()
    outbox = make(never, flush_interval_s=60)
    put(outbox, range(2), padding="x" * 10_000)
    report = outbox.flush(10)
    assert (report.rejected, report.pending) == (2, 0)
    assert len(never.sizes) < 40
    outbox.shutdown(5)


def test_one_line_says_that_an_outage_began_and_one_that_it_is_over(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    destination = Destination(up=False)
    states: list[str] = []
    errors: list[str] = []
    outbox = make(destination, on_state_change=states.append, on_error=errors.append)
    put(outbox, range(100))
    wait_for(lambda: len(destination.sizes) >= 6)
    put(outbox, range(100, 200))
    wait_for(lambda: len(on_disk(folder)) == 200)
    destination.up = True
    wait_for(lambda: outbox.stats().complete)
    wait_for(lambda: len(caplog.records) == 2)
    began, ended = [record.getMessage() for record in caplog.records]
    assert "HTTP 503" in began
    assert str(folder) in began
    assert "of 200 events put on disk meanwhile 200 are delivered" in ended
    assert states == ["outage", "delivering"]
    assert len(errors) >= 6
    outbox.shutdown(5)


def test_a_single_failure_is_no_outage(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    outbox = make(MemoryTransport(RetryLater("HTTP 503"), RetryLater("HTTP 503")))
    put(outbox, [1])
    wait_for(lambda: outbox.stats().complete)
    outbox.shutdown(5)
    assert caplog.records == []


def test_callbacks_that_raise_record_or_flush_do_no_harm(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    outbox: Outbox
    called: list[str] = []

    def callback(*values: object) -> None:
        called.append(str(values[0]))
        outbox.queue.put(b'{"n": 0}')
        outbox.flush(0.01)
        outbox.stats()
        raise ValueError("the host's")

    destination = Destination(up=False)
    outbox = make(
        destination,
        on_drop=callback,
        on_error=callback,
        on_state_change=callback,
        max_queue_events=5,
        queue_policy="drop_newest",
    )
    put(outbox, range(50))
    wait_for(lambda: len(called) > 10)
    destination.up = True
    wait_for(lambda: "delivering" in called)
    wait_for(lambda: "queue_full" in called)
    report = outbox.shutdown(5)
    assert balances(report)
    assert report.pending == 0


def test_several_tracers_share_a_worker_and_each_has_its_own_account(folder: Path) -> None:
    settings = [Settings(run_id=run, api_url="http://127.0.0.1:1", flush_interval_s=0.02) for run in ("a", "b", "c")]
    before = set(threading.enumerate())
    outboxes = [open_outbox(each) for each in settings]
    assert len({id(outbox.worker) for outbox in outboxes}) == 1
    other = open_outbox(Settings(run_id="a", api_url="http://127.0.0.1:1", token="another"))
    assert other.worker is not outboxes[0].worker
    for number, outbox in enumerate(outboxes):
        put(outbox, range(number * 10))
    assert new_threads(before) == 1
    assert [outbox.stats().recorded for outbox in outboxes] == [0, 10, 20]
    report = outboxes[1].shutdown(0.2)
    assert (report.recorded, report.spooled, report.queued, report.in_flight) == (10, 10, 0, 0)
    put(outboxes[2], range(5))
    assert new_threads(before) == 1
    assert outboxes[0].shutdown(0.2).recorded == 0
    assert outboxes[2].shutdown(0.2).spooled == 25
    other.shutdown(0.2)
    wait_for(lambda: new_threads(before) == 0)
    assert len(on_disk(folder)) == 35
    again = open_outbox(settings[0])
    assert again.worker is not outboxes[0].worker
    again.shutdown(0.1)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_dies_is_replaced(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    destination = Destination()
    outbox = make(destination)
    put(outbox, [1])
    assert outbox.flush(5).complete
    thread = outbox.worker._thread
    assert thread is not None

    def dies() -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(outbox.worker, "_round", dies)
        thread.join(5)
    assert not thread.is_alive()
    put(outbox, [2])
    wait_for(lambda: outbox.stats().delivered == 2)
    assert outbox.worker._thread is not thread
    outbox.shutdown(5)


@pytest.mark.parametrize("durability", ["memory", "spool", "journal"])
def test_the_account_balances_through_outages_overflow_and_refusals(folder: Path, durability: str) -> None:
    class Moody(Destination):
        def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
            self.sizes.append(len(batch))
            kind = len(self.sizes) % 7
            if kind in (1, 2):
                return RetryLater("x")
            if kind == 3:
                return Delivered((RejectedEvent(0, "x"),))
            if kind == 4:
                raise ZeroDivisionError
            if kind == 5 and len(batch) > 1:
                return TooLarge()
            if kind == 6 and len(batch) > 1:
                return Refused("x")
            return Delivered()

    logging.getLogger("evalvault_sdk").setLevel(logging.ERROR)
    try:
        outbox = make(
            Moody(),
            durability=durability,
            max_queue_events=300,
            batch_events=20,
            retry_initial_s=0.001,
            retry_max_s=0.002,
            spool_max_bytes=1 << 18,
        )
        threads = [threading.Thread(target=put, args=(outbox, range(3000))) for _ in range(4)]
        for thread in threads:
            thread.start()
        observed = 0
        while any(thread.is_alive() for thread in threads) or observed < 1000:
            stats = outbox.stats()
            assert balances(stats), stats
            assert min(stats.queued, stats.in_flight, stats.spooled, stats.delivered) >= 0
            observed += 1
        report = outbox.shutdown(60)
        assert balances(report)
        assert (report.recorded, report.pending) == (12_000, 0)
    finally:
        logging.getLogger("evalvault_sdk").setLevel(logging.NOTSET)


def test_a_flush_in_an_outage_tries_at_once_and_then_in_short_steps(folder: Path) -> None:
    destination = Destination(up=False)
    outbox = make(destination, retry_initial_s=0.2, retry_max_s=60.0, batch_events=1)
    for number in range(8):
        put(outbox, [number])
        time.sleep(0.05)
    tried = len(destination.sizes)
    flusher = threading.Thread(target=outbox.flush, args=(1.5,))
    flusher.start()
    wait_for(lambda: len(destination.sizes) > tried, 0.2)
    for number in range(8, 300):  # each wakes the worker
        put(outbox, [number])
        time.sleep(0.004)
    flusher.join()
    assert 4 < len(destination.sizes) - tried < 60
    destination.up = True
    assert outbox.shutdown(10).complete


def test_a_short_flush_interval_does_not_make_a_backlog_trickle(folder: Path) -> None:
    destination = Destination(up=False)
    outbox = make(destination, flush_interval_s=0.01)
    put(outbox, range(5000))
    wait_for(lambda: len(on_disk(folder)) == 5000)
    failed = len(destination.sizes)
    destination.up, destination.takes_s = True, 0.03
    wait_for(lambda: outbox.stats().complete, 5)
    assert len(destination.sizes) - failed < 20
    outbox.shutdown(5)


def test_without_a_disk_what_is_refused_on_the_way_lets_others_go_first(folder: Path) -> None:
    destination = Destination(poison={0})
    outbox = make(destination, durability="memory")
    put(outbox, range(300))
    wait_for(lambda: len(destination.stored) == 299)
    stats = outbox.stats()
    assert (stats.delivered, stats.rejected, stats.queued + stats.in_flight, balances(stats)) == (299, 0, 1, True)
    outbox.shutdown(0.1)


def test_a_good_event_is_never_given_up_because_the_destination_is_flaky(folder: Path) -> None:
    class Flaky(Destination):
        random = random.Random(20261122)

        def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
            if self.up and self.random.random() < 0.3:
                return RetryLater("HTTP 400 from something else", advice="check the proxy", blame="request")
            self.stored += [orjson.loads(event)["n"] for event in batch.events]
            return Delivered()

    destination = Flaky()
    outbox = make(destination)
    for number in range(1000):
        put(outbox, [number])
        time.sleep(0.003)
    destination.up = False  # that is, well
    assert outbox.flush(60).in_time
    assert outbox.stats().rejected == 0
    assert sorted(destination.stored) == list(range(1000))
    outbox.shutdown(5)


def test_a_fault_while_events_are_put_on_disk_leaves_none_in_nobody_s_hand(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evalvault_sdk.delivery.segment import Segment

    append, faults = Segment.append, [1]

    def fails_once(self: Segment, lines: bytes) -> None:
        if faults:
            faults.pop()
            raise MemoryError
        append(self, lines)

    monkeypatch.setattr(Segment, "append", fails_once)
    destination = Destination(up=False)
    outbox = make(destination)
    put(outbox, range(5))
    wait_for(lambda: on_disk(folder) == list(range(5)))
    destination.up = True
    assert outbox.shutdown(10).complete


def test_two_who_say_at_once_that_an_outage_is_over_say_it_once(caplog: pytest.LogCaptureFixture) -> None:
    both = threading.Barrier(2)

    class Emptied:
        """A spool of which both find out in the same moment that it is empty."""

        folder = Path("spool")

        @property
        def has_backlog(self) -> bool:
            if threading.current_thread() in tellers:
                both.wait(10)
                return False
            return True

    spool: Any = Emptied()
    tellers: list[threading.Thread] = []
    notices = Notices("memory", Ledger(), Settings(run_id="r"), spool, time.monotonic)
    notices.failed(RetryLater("no"), is_outage=True, since=0.0)
    notices.recovered()
    tellers += [threading.Thread(target=notices.tell_recovery) for _ in range(2)]
    for teller in tellers:
        teller.start()
    for teller in tellers:
        teller.join()
    assert sum("again after" in record.getMessage() for record in caplog.records) == 1

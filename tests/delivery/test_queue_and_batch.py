from __future__ import annotations

import collections
import gc
import signal
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

import orjson
import pytest

from evalvault_sdk.delivery.account import Account, Ledger
from evalvault_sdk.delivery.batch import ENVELOPE_BYTES, Batch, BatchLimits
from evalvault_sdk.delivery.queue import EventQueue, QueueLimits, QueuePolicy, Wakeup
from tests.support import a_courier, balances, take_all, wait_for


def make_queue(
    max_events: int = 100, max_bytes: int = 10_000, policy: QueuePolicy = "drop_newest", **limits: Any
) -> EventQueue:
    limits = {"wake_at_events": 10, "wake_at_bytes": 1000, **limits}
    return EventQueue(Ledger(), QueueLimits(max_events=max_events, max_bytes=max_bytes, policy=policy, **limits))


def take_from(queue: EventQueue, **limits: int) -> Batch:
    return take_all(queue, BatchLimits(**limits))


def put_back(queue: EventQueue, batch: Batch) -> None:
    (share,) = batch.shares
    queue.account.put_back(share, batch.events)


def test_the_body_of_a_batch_is_the_events_own_bytes() -> None:
    batch = Batch((b'{"a":1}', b'{"b":2}'))
    assert batch.body() == b'{"events":[{"a":1},{"b":2}]}'
    assert orjson.loads(batch.body()) == {"events": [{"a": 1}, {"b": 2}]}


@pytest.mark.parametrize(("count", "halves"), [(2, (1, 1)), (5, (2, 3))])
def test_halves_keep_order_and_lose_nothing(count: int, halves: tuple[int, int]) -> None:
    batch = Batch(tuple(str(number).encode() for number in range(count)))
    first, second = batch.halves()
    assert (len(first), len(second)) == halves
    assert first.events + second.events == batch.events


def taken(limits: BatchLimits, events: list[bytes]) -> int:
    count, size = limits.fitting(events, 0, ENVELOPE_BYTES)
    assert not count or size - 1 == len(Batch(tuple(events[:count])).body())
    first = count // 2
    if first:
        halfway = len(Batch(tuple(events[:first])).body()) + 1
        assert limits.fitting(events[first:], first, halfway) == (count - first, size), "in two steps as in one"
    return count


def test_a_batch_is_cut_by_whichever_ceiling_is_met_first() -> None:
    events = [b"x" * 99] * 50
    assert taken(BatchLimits(max_events=10, max_bytes=1 << 20), events) == 10
    assert taken(BatchLimits(max_events=1000, max_bytes=1000 + ENVELOPE_BYTES), events) == 10
    assert taken(BatchLimits(max_events=1000, max_bytes=1 << 20), events) == 50
    assert taken(BatchLimits(), []) == 0


def test_an_event_larger_than_the_ceiling_still_goes_alone() -> None:
    assert taken(BatchLimits(max_bytes=100), [b"x" * 1000, b"y"]) == 1


def test_a_body_never_exceeds_its_ceiling_and_uses_it_up() -> None:
    events = [b"x" * size for size in (10, 20, 30, 40, 50)]
    for ceiling in range(60, 200):
        count = taken(BatchLimits(max_bytes=ceiling), events)
        assert len(Batch(tuple(events[:count])).body()) <= ceiling
        assert count == 5 or len(Batch(tuple(events[: count + 1])).body()) > ceiling


def test_what_does_not_fit_is_dropped_and_counted_by_reason() -> None:
    by_count = make_queue(max_events=3)
    assert [by_count.put(b"x") for _ in range(5)] == [True, True, True, False, False]
    by_bytes = make_queue(max_bytes=25)
    assert [by_bytes.put(b"x" * 10) for _ in range(3)] == [True, True, False]
    by_size = make_queue(max_bytes=5)
    assert [by_size.put(b"x" * 6), by_size.put(b"x" * 5)] == [False, True]
    closed = make_queue()
    closed.close()
    assert not closed.put(b"x")
    closed.refuse("invalid")
    dropped = [queue.account.stats().dropped for queue in (by_count, by_bytes, by_size, closed)]
    assert dropped == [{"queue_full": 2}, {"queue_full": 1}, {"too_large": 1}, {"closed": 1, "invalid": 1}]
    assert all(balances(queue.account.stats()) for queue in (by_count, by_bytes, by_size, closed))


def test_what_is_taken_is_in_flight_and_what_is_put_back_is_first_again() -> None:
    queue = make_queue()
    for number in range(5):
        queue.put(str(number).encode())
    batch = take_from(queue, max_events=2)
    stats = queue.account.stats()
    assert (stats.queued, stats.in_flight) == (3, 2)
    put_back(queue, batch)
    stats = queue.account.stats()
    assert (stats.queued, stats.in_flight, balances(stats)) == (5, 0, True)
    assert take_from(queue).events == (b"0", b"1", b"2", b"3", b"4")
    assert take_from(queue).events == ()


def test_what_is_put_back_takes_its_room_again() -> None:
    queue = make_queue(max_bytes=30)
    for _ in range(3):
        queue.put(b"x" * 10)
    put_back(queue, take_from(queue, max_events=1))
    assert not queue.put(b"x")


def test_room_is_made_by_taking() -> None:
    queue = make_queue(max_bytes=20)
    for _ in range(100):
        assert queue.put(b"x" * 15)
        assert len(take_from(queue)) == 1


@pytest.mark.parametrize(("size", "puts"), [(1, 10), (600, 2)])
def test_the_worker_is_woken_by_events_and_by_bytes(size: int, puts: int) -> None:
    queue = make_queue()
    for _ in range(puts - 1):
        queue.put(b"x" * size)
    assert not queue.wakeup.wait(0)
    queue.put(b"x" * size)
    assert queue.wakeup.wait(0)


def test_a_small_queue_wakes_the_worker_before_it_is_full() -> None:
    queue = make_queue(max_events=6)
    for _ in range(3):
        queue.put(b"x")
    assert queue.wakeup.wait(0)


def test_a_signal_handler_that_records_in_the_middle_of_a_put_breaks_no_account() -> None:
    queue = make_queue(max_events=10**6, max_bytes=10**9)
    recorded = 0

    def handler(signal_number: int, frame: object) -> None:
        nonlocal recorded
        queue.put(b"from a handler")
        recorded += 1

    before = signal.signal(signal.SIGALRM, handler)
    signal.setitimer(signal.ITIMER_REAL, 0.0002, 0.0002)
    try:
        for _ in range(100_000):
            queue.put(b"x")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    stats = queue.account.stats()
    assert recorded > 10
    assert (stats.recorded, stats.queued) == (100_000 + recorded, 100_000 + recorded)


def test_a_wakeup_wakes_at_once_and_is_down_afterwards() -> None:
    wakeup = Wakeup()
    woken: list[float] = []

    def sleep() -> None:
        wakeup.wait(30)
        woken.append(time.monotonic())

    sleeper = threading.Thread(target=sleep)
    sleeper.start()
    time.sleep(0.05)
    wakeup.set()
    wakeup.set()
    sleeper.join(5)
    assert woken
    started = time.monotonic()
    wakeup.wait(0.05)
    assert time.monotonic() - started >= 0.04
    wakeup.set()
    started = time.monotonic()
    wakeup.wait(30)
    assert time.monotonic() - started < 5


def test_no_wakeup_is_lost_between_threads() -> None:
    wakeup = Wakeup()
    items: collections.deque[int] = collections.deque()
    total = 4 * 5000

    def produce() -> None:
        for number in range(5000):
            items.append(number)
            wakeup.set()

    producers = [threading.Thread(target=produce) for _ in range(4)]
    for producer in producers:
        producer.start()
    started, seen = time.monotonic(), 0
    while seen < total:
        wakeup.wait(5)  # a lost wakeup costs five seconds, and shows
        while items:
            items.popleft()
            seen += 1
    assert time.monotonic() - started < 5
    for producer in producers:
        producer.join()


def test_a_finalizer_that_records_while_its_thread_is_putting_does_not_deadlock() -> None:
    queue = make_queue(max_events=10**6, max_bytes=10**9)

    class Records:
        def __init__(self) -> None:
            self.itself = self

        def __del__(self) -> None:
            queue.put(b"from a finalizer")

    threshold = gc.get_threshold()
    gc.set_threshold(1)
    try:
        for _ in range(2000):
            Records()
            queue.put(b"x")
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    stats = queue.account.stats()
    assert balances(stats)
    assert stats.queued == 4000


def test_the_oldest_events_make_room_if_that_is_the_policy() -> None:
    queue = make_queue(max_events=3, max_bytes=1000, policy="drop_oldest")
    for number in range(10):
        assert queue.put(str(number).encode())
    assert not queue.put(b"x" * 1001)
    assert queue.put(b"x" * 999)
    stats = queue.account.stats()
    assert (stats.queued, dict(stats.dropped)) == (2, {"queue_full": 9, "too_large": 1})
    assert balances(stats)
    assert take_from(queue).events == (b"9", b"x" * 999)


def test_a_thread_waits_for_room_if_that_is_the_policy_but_not_for_ever() -> None:
    queue = make_queue(max_events=2, policy="block", block_timeout_s=0.2)
    assert queue.put(b"1")
    assert queue.put(b"2")
    started = time.monotonic()
    assert not queue.put(b"3")
    assert 0.15 < time.monotonic() - started < 2
    taker = threading.Timer(0.05, lambda: take_from(queue))
    taker.start()
    assert queue.put(b"4")
    taker.join()
    queue.is_worker = lambda: True
    assert queue.put(b"5")
    started = time.monotonic()
    assert not queue.put(b"6"), "whoever makes the room must not wait for it"
    assert time.monotonic() - started < 0.1
    stats = queue.account.stats()
    assert balances(stats)
    assert dict(stats.dropped) == {"queue_full": 2}


def test_events_of_several_queues_go_into_one_batch_and_each_account_has_its_own() -> None:
    ledger = Ledger()
    queues = [EventQueue(ledger) for _ in range(3)]
    for number, queue in enumerate(queues):
        for _ in range(number * 300):
            queue.put(b"%d" % number)
    hand = a_courier(ledger).take(queues, BatchLimits(max_events=500))
    assert hand is not None
    batch = hand.rest()
    assert batch.events == (b"1",) * 300 + (b"2",) * 200
    assert [(queue.account.in_flight, len(queue.account.waiting)) for queue in queues] == [(0, 0), (300, 0), (200, 400)]
    first, rest = batch.split(350)
    assert sum(share.count for share in first.shares) == 350
    assert sum(share.count for share in rest.shares) == 150
    with ledger.lock:
        for share in first.shares:
            share.account.settle(share, 0)
        for share in rest.shares:
            share.account.lose(share, "shutdown", in_flight=True)
    assert [queue.account.stats().delivered for queue in queues] == [0, 300, 50]
    assert all(balances(queue.account.stats()) for queue in queues)


def test_a_flush_waits_for_what_was_there_and_not_for_what_came_later() -> None:
    queue = make_queue(max_events=1000)
    queue.put(b"old")
    flying = take_from(queue)
    queue.put(b"waits")
    results: list[bool] = []
    flusher = threading.Thread(target=lambda: results.append(queue.account.wait_until_ended(20)))
    flusher.start()
    time.sleep(0.05)

    def settle(batch: Batch) -> None:
        with queue._ledger.lock:
            for share in batch.shares:
                share.account.settle(share, 0)
            queue._ledger.settled.notify_all()

    second = take_from(queue)
    time.sleep(0.05)
    queue.put(b"later")
    settle(second)
    time.sleep(0.05)
    assert not results, "the first is still in flight, though a later one has ended"
    with queue._ledger.lock:
        put_back(queue, flying)
        queue._ledger.settled.notify_all()
    again = take_from(queue, max_events=1)
    assert again.events == (b"old",)
    time.sleep(0.05)
    assert not results, "it came back, and flies again"
    settle(again)
    flusher.join(5)
    assert results == [True]
    assert queue.account.stats().queued == 1
    assert not queue.account.wait_until_ended(0.05)


def test_what_is_being_sent_counts_in_the_bounds() -> None:
    queue = make_queue(max_events=3)
    courier = a_courier(queue._ledger)
    for _ in range(3):
        assert queue.put(b"x" * 10)
    hand = courier.take([queue], BatchLimits(max_events=2))
    assert hand is not None
    assert not queue.put(b"y")
    courier.keep(hand)  # without a disk: back to where it was
    stats = queue.account.stats()
    assert (stats.queued, stats.in_flight, dict(stats.dropped)) == (3, 0, {"queue_full": 1})
    assert (queue.account.lent, queue.account.lent_bytes, queue.account.waiting_bytes) == (0, 0, 30)
    hand = courier.take([queue], BatchLimits())
    assert hand is not None
    assert courier.deliver(hand)
    assert queue.put(b"y")
    assert queue.account.lent == 0


# --- Drafts ---


class Finishing:
    """A queue of drafts; each becomes an event of twice its size, unless told otherwise."""

    def __init__(self) -> None:
        self.queue = EventQueue(Ledger(), QueueLimits(max_events=1000), finish=self.finish)
        #: What happens while the next one is finished.
        self.before: list[Callable[[], None]] = []

    def finish(self, drafts: Sequence[tuple[bytes]], counter: EventQueue, /) -> list[bytes | None]:
        assert counter is self.queue
        for happens in [*self.before]:
            happens()
        if (b"odd",) in drafts:
            raise RuntimeError("no")
        return [None if content == b"too large" else content * 2 for (content,) in drafts]


def test_drafts_are_finished_when_they_are_taken_and_events_left_as_they_are() -> None:
    queue = Finishing().queue
    for event in ((b"a",), b"b", (b"c",)):
        queue.put(event)
    assert queue.account.stats().queued == 3
    assert take_all(queue).events == (b"aa", b"b", b"cc")
    assert queue.account.waiting_bytes == 0


def test_a_draft_that_cannot_be_finished_is_lost_alone_and_counted() -> None:
    queue = Finishing().queue
    for event in ((b"odd",), (b"a",), (b"too large",), (b"odd",)):
        queue.put(event)
    assert take_all(queue).events == (b"aa",)
    stats = queue.account.stats()
    assert stats.dropped == {"internal_error": 2, "too_large": 1}
    assert balances(stats)
    assert queue.account.waiting_bytes == 0


def test_drafts_that_are_all_lost_do_not_keep_back_those_behind() -> None:
    queue = Finishing().queue
    for event in [(b"odd",)] * 600 + [(b"a",)]:
        queue.put(event)
    assert take_all(queue).events == (b"aa",)


def test_threads_record_on_while_drafts_are_finished() -> None:
    finishing = Finishing()
    queue = finishing.queue
    queue.put((b"a",))

    def put_elsewhere() -> None:
        finishing.before.clear()
        thread = threading.Thread(target=queue.put, args=[(b"b",)], daemon=True)
        thread.start()
        thread.join(10)
        assert not thread.is_alive()

    finishing.before.append(put_elsewhere)
    assert take_all(queue).events == (b"aa",)
    assert take_all(queue).events == (b"bb",)


def test_threads_record_on_while_a_draft_is_finished_for_the_journal() -> None:
    finishing, disk = Finishing(), Disk()
    queue = finishing.queue
    queue.begin_journal(disk)
    finished: list[bool] = []

    def put_elsewhere() -> None:
        finishing.before.clear()
        thread = threading.Thread(target=queue.put, args=[b"b"], daemon=True)
        thread.start()
        thread.join(5)
        finished.append(not thread.is_alive())

    finishing.before.append(put_elsewhere)
    assert queue.put((b"a",))
    assert (finished, disk.events) == ([True], [b"b", b"aa"])


def test_what_somebody_else_takes_while_it_is_finished_is_taken_once() -> None:
    finishing = Finishing()
    queue = finishing.queue
    for event in ((b"a",), (b"b",), (b"c",)):
        queue.put(event)
    others: list[tuple[bytes, ...]] = []

    def take_first() -> None:
        finishing.before.clear()
        others.append(take_from(queue, max_events=1).events)

    finishing.before.append(take_first)
    assert take_all(queue).events == (b"bb", b"cc")
    assert others == [(b"aa",)]
    assert queue.account.stats().in_flight == 3


# --- What happens between the steps of a put, which takes no lock ---


class Interrupted(collections.deque[Any]):
    """Something happens right after the next append."""

    def __init__(self, happens: Callable[[], object]) -> None:
        super().__init__()
        self._happens: Callable[[], object] | None = happens

    def append(self, item: Any, /) -> None:
        super().append(item)
        happens, self._happens = self._happens, None
        if happens is not None:
            happens()


class Disk:
    """An overflow that takes everything."""

    full = False

    def __init__(self) -> None:
        self.events: list[bytes] = []

    def append(self, event: bytes, account: Account) -> bool:
        self.events.append(event)
        account._ledger.direct.append(account)
        return True


def test_an_event_put_while_the_queue_is_closed_is_not_forgotten_in_it() -> None:
    queue = make_queue()
    queue.account.waiting = Interrupted(queue.close)
    assert not queue.put(b"x")
    stats = queue.account.stats()
    assert (stats.queued, stats.dropped, queue.account.waiting_bytes) == (0, {"closed": 1}, 0)
    assert balances(stats)


def test_an_event_put_while_the_queue_is_closed_and_emptied_was_taken() -> None:
    queue = make_queue()
    taken: list[Batch] = []

    def happens() -> None:
        queue.close()
        taken.append(take_from(queue))

    queue.account.waiting = Interrupted(happens)
    assert queue.put(b"x")
    stats = queue.account.stats()
    assert (taken[0].events, stats.in_flight, stats.dropped) == ((b"x",), 1, {})
    assert balances(stats)


def test_an_event_put_while_a_journal_begins_is_on_disk_when_the_put_returns() -> None:
    queue, disk = make_queue(), Disk()
    queue.account.waiting = Interrupted(lambda: queue.begin_journal(disk))
    assert queue.put(b"x")
    stats = queue.account.stats()
    assert (disk.events, stats.queued, stats.spooled, queue.account.waiting_bytes) == ([b"x"], 0, 1, 0)
    assert balances(stats)


def test_many_threads_and_a_taker_leave_the_account_of_bytes_right() -> None:
    queue = make_queue(max_events=10**7, max_bytes=10**9)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    threads = [threading.Thread(target=lambda: [queue.put(b"x" * 100) for _ in range(5000)]) for _ in range(8)]
    taken = 0
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            batch = take_from(queue)
            taken += len(batch)
            for share in batch.shares:
                queue.account.settle(share, 0)
            queue.account.lent = queue.account.lent_bytes = 0
            waiting = queue.account.waiting_bytes
            assert -800 <= waiting <= 100 * 8 * 5000
    finally:
        sys.setswitchinterval(interval)
        for thread in threads:
            thread.join()
    taken += len(take_from(queue, max_events=10**6))
    assert taken == 8 * 5000
    assert queue.account.waiting_bytes == 0
    assert balances(queue.account.stats())


def test_a_flush_does_not_wait_for_an_event_that_was_taken_back() -> None:
    queue = make_queue()
    ended: list[bool] = []

    def flush() -> None:
        ended.append(queue.account.wait_until_ended(10))

    flushing = threading.Thread(target=flush)

    def happens() -> None:
        flushing.start()
        wait_for(lambda: bool(queue.account._ledger.settled._waiters))  # type: ignore[attr-defined]
        queue.close()

    queue.account.waiting = Interrupted(happens)
    assert not queue.put(b"x")
    flushing.join(5)
    assert ended == [True]


def test_bytes_that_are_counted_after_their_event_was_taken_do_not_fill_the_queue() -> None:
    queue = make_queue(max_bytes=100)
    queue.account.waiting = Interrupted(lambda: take_from(queue))
    assert queue.put(b"x" * 60)
    queue.account.lent = queue.account.lent_bytes = 0  # it was delivered
    assert queue.account.waiting_bytes == 60
    assert queue.put(b"x" * 60)
    assert queue.account.waiting_bytes == 60


def test_there_is_no_room_before_the_events_that_are_taken_are_delivered() -> None:
    queue = make_queue(max_events=4)
    put: list[bool] = []

    class Leaving(collections.deque[Any]):
        def popleft(self) -> Any:
            event = super().popleft()
            put.append(queue.put(b"more"))
            return event

    queue.account.waiting = Leaving()
    assert all(queue.put(b"x") for _ in range(4))
    assert a_courier(queue._ledger).take([queue], BatchLimits()) is not None
    assert put == [False] * 4
    assert queue.account.stats().dropped == {"queue_full": 4}


def test_what_waits_first_is_found_though_threads_append_meanwhile() -> None:
    queue = make_queue(max_events=10**7, max_bytes=10**9)
    stopped = threading.Event()

    def record() -> None:
        while not stopped.is_set():
            queue.put(b"x")

    threads = [threading.Thread(target=record) for _ in range(2)]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for thread in threads:
            thread.start()
        for _ in range(20_000):
            assert len(queue.account.first(3)) <= 3
    finally:
        sys.setswitchinterval(interval)
        stopped.set()
        for thread in threads:
            thread.join()

"""
Keep the account of every event: what became of it, and why.

In:   one call per batch whose state changes, under one lock; one step per event that is recorded.
Out:  `Stats`, a snapshot that always balances:
      recorded = delivered + spooled + queued + in flight + rejected + dropped.
Any thread. One `Account` per tracer; tracers that share a worker share a `Ledger`, which has the lock.

Recording changes one thing in one step (it appends to `waiting`, or to the ledger's `direct`): a finalizer or a
signal handler in the middle of it may itself record, and must find the account in balance.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import itertools
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any, Literal

import attrs

#: What is counted besides what becomes of events.
Note = Literal["truncated", "sampled_out", "hook_errors"]

#: Why an event was lost.
DropReason = Literal[
    "queue_full", "spool_full", "expired", "damaged", "too_large", "invalid", "shutdown", "closed", "internal_error"
]


@attrs.frozen(kw_only=True)
class Stats:
    """
    What became of all events recorded so far with one tracer, at one instant.

    `recorded == delivered + spooled + queued + in_flight + rejected + sum(dropped.values())`, always.
    """

    #: Events handed to the SDK.
    recorded: int
    #: Stored, says the server.
    delivered: int
    #: On disk, to be delivered later: by this process, or when it has ended by the next.
    spooled: int
    #: In memory, waiting to be sent.
    queued: int
    #: Being sent just now.
    in_flight: int
    #: Refused by the server for what they are: sending them again would not help. See the dead letter.
    rejected: int
    #: Lost, by reason; only reasons that occurred.
    dropped: Mapping[DropReason, int]
    #: Events of ended processes that this one found in the spool and delivered; no part of the balance.
    recovered: int = 0
    #: Those of them that could not be: rejected, too old, damaged.
    recovered_lost: int = 0
    #: Fields that were cut to the limits; each says so in its place. These three are no part of the balance either.
    truncated: int = 0
    #: Stages of traces that were not drawn, and so not recorded.
    sampled_out: int = 0
    #: How often a function of the user's (`mask`, `attributes`, `on_result` ...) or a payload store raised.
    hook_errors: int = 0

    @property
    def pending(self) -> int:
        """Events whose fate is still open: queued, in flight or spooled."""
        return self.queued + self.in_flight + self.spooled

    @property
    def complete(self) -> bool:
        """Whether every event recorded so far was delivered: none pending, rejected or dropped."""
        return self.delivered == self.recorded

    def __str__(self) -> str:
        parts = [f"recorded {self.recorded:,} = delivered {self.delivered:,}"]
        for name in ("spooled", "queued", "in_flight", "rejected"):
            count = getattr(self, name)
            if count:
                parts.append(f"{name.replace('_', ' ')} {count:,}")
        parts += [f"dropped ({reason}) {count:,}" for reason, count in sorted(self.dropped.items())]
        recovered = f" (and recovered {self.recovered:,} of ended processes)" if self.recovered else ""
        return " + ".join(parts) + recovered


@attrs.frozen(kw_only=True)
class FlushReport(Stats):
    """What `flush` and `shutdown` return: the account, and whether they got done in time."""

    #: Whether every event recorded before the call has met its fate: delivered, rejected or dropped.
    in_time: bool


#: What is counted for the numbers of a draft.
DRAFT_BYTES = 290
#: An event's JSON; or a draft of it, a tuple whose last item is bytes.
Entry = bytes | tuple[Any, ...]


def size_of(entry: Entry) -> int:
    """Return about how many bytes of memory an event takes up."""
    return len(entry) if isinstance(entry, bytes) else len(entry[-1]) + DRAFT_BYTES


class Ledger:
    """The lock, and what the accounts under it have in common."""

    def __init__(self) -> None:
        self.inherited = Account(self)
        self.start_over()

    def start_over(self) -> None:
        """Begin with a lock of one's own: at first, and in a forked child."""
        # Reentrant: a finalizer or a signal handler that runs while this thread holds the lock may itself
        # record a stage.
        self.lock = threading.RLock()
        #: Notified whenever events leave the queue or reach their end.
        self.settled = threading.Condition(self.lock)
        #: Whose are the lines of the segment that the program's own threads are writing, in order.
        self.direct: list[Account] = []
        #: Events lost by all accounts, by reason: for who tells of it.
        self.lost: dict[DropReason, int] = {}
        self.inherited.start_over()

    def seal_direct(self) -> tuple[Share, ...]:
        """Say whose the lines of that segment are, and begin a new list for the next segment. The lock is held."""
        lines, self.direct = self.direct, []
        return tuple(account.seal(len(list(group))) for account, group in itertools.groupby(lines))


class Account:
    """The counts behind `Stats`. All methods but `stats` and `wait_until_ended` want the ledger's lock held."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self.start_over()

    def start_over(self) -> None:
        """Begin at nothing: at first, and in a forked child."""
        #: Events in memory, oldest first, and their bytes.
        self.waiting: collections.deque[Entry] = collections.deque()
        self.waiting_bytes = 0
        #: Events, and their bytes, that left `waiting` and still take up memory: they are being sent.
        self.lent = 0
        self.lent_bytes = 0
        #: Events that left `waiting`, less those that came back.
        self.taken = 0
        #: Events that left it to be put anew, as if they had never been there.
        self.retracted = 0
        #: Events that were recorded into a segment that is sealed.
        self.sealed = 0
        #: Events that were recorded and could not be taken.
        self.refused = 0
        self.delivered = 0
        self.spooled = 0
        self.in_flight = 0
        self.rejected = 0
        self.dropped: dict[DropReason, int] = {}
        self.notes: dict[Note, int] = {}
        self._mark = 0
        self._open: dict[int, int] = {}
        self._returns = 0

    @property
    def direct(self) -> int:
        """Events in the segment that the program's threads are writing."""
        return self._ledger.direct.count(self)

    @property
    def in_memory(self) -> int:
        """Events that would be lost with the process."""
        return len(self.waiting) + self.in_flight

    @property
    def pending(self) -> int:
        """Events whose fate is open."""
        return len(self.waiting) + self.in_flight + self.spooled + self.direct

    # -- what becomes of events; a share stands for events that left the queue ---------------------

    def refuse(self, reason: DropReason) -> None:
        """Count an event that was recorded and could not be taken."""
        self.refused += 1
        self.drop(reason)

    def drop(self, reason: DropReason, count: int = 1) -> None:
        """Count `count` events as lost, which were taken from where they were."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count
        self._ledger.lost[reason] = self._ledger.lost.get(reason, 0) + count

    def note(self, what: Note, count: int) -> None:
        """Count something that is no end of an event."""
        self.notes[what] = self.notes.get(what, 0) + count

    def first(self, count: int) -> list[Entry]:
        """Return the first `count` events that wait, or fewer. Wants no lock."""
        while True:
            with contextlib.suppress(RuntimeError):  # between the two calls, a thread has appended one
                return list(itertools.islice(self.waiting, count))

    def begins_with(self, events: list[Entry]) -> bool:
        """Whether `events`, the first that waited a moment ago, still are: nobody has taken any meanwhile."""
        waiting, count = self.waiting, len(events)
        return len(waiting) >= count and waiting[0] is events[0] and waiting[count - 1] is events[-1]

    def replace_first(self, old: list[Entry], new: list[bytes | DropReason]) -> None:
        """Put `new` in place of `old`, the first that waited a moment ago, or drop them."""
        waiting, number = self.waiting, 0
        for before, after in zip(old, new, strict=True):
            if number >= len(waiting) or waiting[number] is not before:
                break  # somebody has taken them meanwhile
            if isinstance(after, str):
                del waiting[number]
                size = size_of(before)  # before the account is read: another thread may come in between
                self.waiting_bytes -= size
                self.taken += 1
                self.drop(after)
            else:
                waiting[number] = after
                size = len(after) - size_of(before)
                self.waiting_bytes += size
                number += 1

    def take(self, count: int) -> Share:
        """Count the next `count` events as in flight."""
        self.taken += count
        self.in_flight += count
        return self._opened(count)

    def retract(self, event: Entry) -> bool:
        """Take out an event that has just been appended, unless somebody has taken it already."""
        for number in range(len(self.waiting) - 1, -1, -1):
            if self.waiting[number] is event:
                del self.waiting[number]
                size = size_of(event)
                self.waiting_bytes -= size
                self.retracted += 1
                self._ledger.settled.notify_all()  # a flush may wait for it
                return True
        return False

    def remove_first(self, count: int, size: int) -> None:
        """Take out the first events, of `size` bytes: all in one step, which no interrupt comes into the middle of."""
        waiting = self.waiting
        collections.deque(itertools.islice(iter(waiting.popleft, None), min(count, len(waiting))), maxlen=0)
        # What an interrupt between two lines of `put` may have left over ends with the last event.
        self.waiting_bytes = self.waiting_bytes - size if waiting else 0

    def put_back(self, share: Share, events: tuple[bytes, ...], *, last: bool = False) -> None:
        """Return events in flight to where they were, or to the end."""
        self._closed(share)
        if last:
            self.waiting.extend(events)
        else:
            self.waiting.extendleft(reversed(events))
        size = sum(map(len, events))
        self.waiting_bytes += size
        self.taken -= share.count
        self.in_flight -= share.count
        self._returns += 1

    def seal(self, count: int) -> Share:
        """Count events that are in a segment which is sealed now."""
        self.sealed += count
        self.spooled += count
        return self._opened(count)

    def pick_up(self, share: Share) -> None:
        """Count spooled events as in flight: they are being sent."""
        self.spooled -= share.count
        self.in_flight += share.count

    def park(self, share: Share) -> None:
        """Count events in flight as spooled: they are on disk."""
        self.in_flight -= share.count
        self.spooled += share.count

    def settle(self, share: Share, rejected: int) -> None:
        """Count events in flight as delivered, but for those rejected."""
        self._closed(share)
        self.in_flight -= share.count
        self.delivered += share.count - rejected
        self.rejected += rejected

    def lose(self, share: Share, reason: DropReason, *, in_flight: bool) -> None:
        """Count events in flight, or spooled ones, as lost."""
        self._closed(share)
        if in_flight:
            self.in_flight -= share.count
        else:
            self.spooled -= share.count
        self.drop(reason, share.count)

    def _opened(self, count: int) -> Share:
        self._open[self._mark] = self._open.get(self._mark, 0) + count
        return Share(self, self._mark, count)

    def _closed(self, share: Share) -> None:
        left = self._open.get(share.mark, 0) - share.count
        if left > 0:
            self._open[share.mark] = left
        else:
            self._open.pop(share.mark, None)

    # -- what the program sees ----------------------------------------------------------------------

    def wait_until_ended(self, timeout_s: float, clock: Callable[[], float] = time.monotonic) -> bool:
        """Wait until every event recorded before this call has met its fate; say whether that was in time."""
        until = clock() + timeout_s
        settled = self._ledger.settled

        def wait_for(done: Callable[[], bool]) -> bool:
            return settled.wait_for(done, max(0.0, min(until - clock(), threading.TIMEOUT_MAX)))

        with self._ledger.lock:
            gone, sealed = self.taken + self.retracted + len(self.waiting), self.sealed + self.direct
            while wait_for(lambda: self.taken + self.retracted >= gone and self.sealed >= sealed):
                # Now all of them are in flight or spooled, with the mark that holds so far. Later ones get the next.
                self._mark += 1
                returns = self._returns
                if not wait_for(functools.partial(self._ended_below, self._mark, returns)):
                    return False
                if self._returns == returns:
                    return True
            return False

    def _ended_below(self, mark: int, returns: int) -> bool:
        """Whether nothing with a lower mark is open, or if anything has come back meanwhile."""
        return self._returns != returns or all(opened >= mark for opened in self._open)

    def stats(self) -> Stats:
        """Return a snapshot."""
        ledger = self._ledger
        with ledger.lock:
            queued, direct = len(self.waiting), self.direct
            inherited = ledger.inherited
            return Stats(
                recorded=self.refused + self.taken + self.sealed + queued + direct,
                delivered=self.delivered,
                spooled=self.spooled + direct,
                queued=queued,
                in_flight=self.in_flight,
                rejected=self.rejected,
                dropped=dict(self.dropped),
                recovered=inherited.delivered,
                recovered_lost=inherited.rejected + sum(inherited.dropped.values()),
                **self.notes,
            )

    def report(self, *, in_time: bool) -> FlushReport:
        """Return a snapshot as the result of a flush."""
        return FlushReport(**attrs.asdict(self.stats(), recurse=False), in_time=in_time)


@attrs.frozen(eq=False)
class Share:
    """Consecutive events of one account, in a batch or a segment."""

    account: Account
    #: When they left the queue, as the account counts: what a flush waits for has a lower one.
    mark: int
    count: int

    def part(self, count: int) -> Share:
        """Return a share of `count` of these events."""
        return attrs.evolve(self, count=count)

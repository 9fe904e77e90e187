"""
Keep the account of every event: what became of it, and why.

In:   one call per event or batch whose state changes, under one lock.
Out:  `Stats`, a snapshot that always balances:
      recorded = delivered + spooled + queued + in flight + rejected + dropped.
Any thread.
"""

from __future__ import annotations

import collections
import threading
from collections.abc import Mapping
from typing import Literal

import attrs

#: Why an event was lost.
DropReason = Literal["queue_full", "too_large", "invalid", "shutdown", "closed", "internal_error"]


@attrs.frozen(kw_only=True)
class Stats:
    """
    What became of all events recorded so far, at one instant.

    `recorded == delivered + spooled + queued + in_flight + rejected + sum(dropped.values())`, always.
    """

    #: Events handed to the SDK.
    recorded: int
    #: Stored, says the server.
    delivered: int
    #: On disk, to be delivered later.
    spooled: int
    #: In memory, waiting to be sent.
    queued: int
    #: Being sent, or waiting to be sent again.
    in_flight: int
    #: Refused by the server for what they are: sending them again would not help.
    rejected: int
    #: Lost, by reason; only reasons that occurred.
    dropped: Mapping[DropReason, int]

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
        return " + ".join(parts)


@attrs.frozen(kw_only=True)
class FlushReport(Stats):
    """What `flush` and `shutdown` return: the account, and whether they got done in time."""

    #: Whether every event recorded before the call has met its fate: delivered, rejected or dropped.
    in_time: bool


class Account:
    """
    The counts behind `Stats`, and the lock that makes them consistent.

    The queue and the worker change several counts at once while holding `lock`; `settled` is notified
    whenever events reach their end, so that a flush can wait for it.
    """

    def __init__(self) -> None:
        self.start_over()

    def start_over(self) -> None:
        """Begin at nothing, with a lock of one's own: at first, and in a forked child."""
        # Reentrant: a finalizer or a signal handler that runs while this thread holds the lock may itself
        # record a stage. For its sake, too, recording changes nothing but `waiting`, in one step.
        self.lock = threading.RLock()
        self.settled = threading.Condition(self.lock)
        #: Events in memory, oldest first; the queue's.
        self.waiting: collections.deque[bytes] = collections.deque()
        #: Events that ever left `waiting`, less those that were put back.
        self.taken = 0
        #: Events that were recorded and could not be taken.
        self.refused = 0
        self.delivered = 0
        self.spooled = 0
        self.in_flight = 0
        self.rejected = 0
        self.dropped: dict[DropReason, int] = {}

    @property
    def ended(self) -> int:
        """Events that were taken and whose fate is decided; as the queue is in order, the oldest ones."""
        return self.taken - self.in_flight

    @property
    def open(self) -> int:
        """Events that are still to be delivered."""
        return len(self.waiting) + self.in_flight

    def drop(self, reason: DropReason, count: int = 1) -> None:
        """Count `count` events as lost. The caller holds the lock and has taken them from where they were."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count

    def stats(self) -> Stats:
        """Return a snapshot."""
        with self.lock:
            queued = len(self.waiting)
            return Stats(
                recorded=self.refused + self.taken + queued,
                delivered=self.delivered,
                spooled=self.spooled,
                queued=queued,
                in_flight=self.in_flight,
                rejected=self.rejected,
                dropped=dict(self.dropped),
            )

    def report(self, *, in_time: bool) -> FlushReport:
        """Return a snapshot as the result of a flush."""
        return FlushReport(**attrs.asdict(self.stats(), recurse=False), in_time=in_time)

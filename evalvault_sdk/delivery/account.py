"""
Keep the account of every event: what became of it, and why.

In:   one call per event or batch whose state changes, under one lock.
Out:  `Stats`, a snapshot that always balances:
      recorded = delivered + spooled + queued + in flight + rejected + dropped.
Any thread.
"""

from __future__ import annotations

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
        """Whether every event recorded so far was delivered: nothing pending, rejected or dropped."""
        return self.delivered == self.recorded

    def __str__(self) -> str:
        parts = [f"recorded {self.recorded:,} = delivered {self.delivered:,}"]
        for name in ("spooled", "queued", "in_flight", "rejected"):
            count = getattr(self, name)
            if count:
                parts.append(f"{name.replace('_', ' ')} {count:,}")
        parts += [f"dropped ({reason}) {count:,}" for reason, count in sorted(self.dropped.items())]
        return " + ".join(parts)


class Account:
    """
    The counts behind `Stats`, and the lock that makes them consistent.

    The queue and the worker change several counts at once while holding `lock`; `settled` is notified
    whenever events reach their end, so that a flush can wait for it.
    """

    def __init__(self) -> None:
        # Reentrant: a finalizer that runs while this thread holds the lock may itself record a stage.
        self.lock = threading.RLock()
        self.settled = threading.Condition(self.lock)
        #: Events the queue took, and events that were recorded and could not be taken.
        self.accepted = 0
        self.refused = 0
        self.delivered = 0
        self.spooled = 0
        self.queued = 0
        self.in_flight = 0
        self.rejected = 0
        self.dropped: dict[DropReason, int] = {}

    @property
    def ended(self) -> int:
        """Accepted events whose fate in this process is decided; as the queue is in order, the oldest ones."""
        return self.accepted - self.queued - self.in_flight

    def drop(self, reason: DropReason, count: int = 1) -> None:
        """Count `count` events as lost. The caller holds the lock and has taken them from where they were."""
        self.dropped[reason] = self.dropped.get(reason, 0) + count

    def stats(self) -> Stats:
        """Return a snapshot."""
        with self.lock:
            return Stats(
                recorded=self.accepted + self.refused,
                delivered=self.delivered,
                spooled=self.spooled,
                queued=self.queued,
                in_flight=self.in_flight,
                rejected=self.rejected,
                dropped=dict(self.dropped),
            )

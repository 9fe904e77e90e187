"""
Hold encoded events between the program's threads and the worker.

In:   `put`, from any thread of the program: an append, and no lock as long as there is room.
Out:  `account.waiting`, from which the courier takes the oldest.

An event may come as a draft, a tuple whose last item is bytes; whoever made it finishes it, and many at once, when it
is to leave the memory: `finish`.

Bounded in events and in bytes; what happens to an event that does not fit is the `QueuePolicy`. The worker
sleeps on `wakeup` and is woken when a batch is full; otherwise it comes by itself once per flush interval, so
that a put costs no context switch. With a journal, an event goes to disk first and into memory only if it
cannot.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import attrs

from evalvault_sdk.delivery.account import DRAFT_BYTES, Account, DropReason, Entry, Ledger, Note, size_of

#: What becomes of an event for which the queue has no room: it goes to disk; the oldest one makes room; it is
#: lost; its thread waits for room.
QueuePolicy = Literal["spool", "drop_oldest", "drop_newest", "block"]


class Wakeup:
    """
    A flag that one thread sleeps on and any other sets.

    Built on a bare lock, not on `threading.Event`: a finalizer that records a stage while its own thread is
    inside `Event.set` or `Event.wait` would wait for itself for ever. The lock is made by the sleeper: gevent may
    have replaced threads and locks since the tracer was made, and a greenlet that sleeps on a real lock stops all.
    """

    def __init__(self) -> None:
        self._lock: threading.Lock | None = None
        self._set = False

    def set(self) -> None:
        """Wake the sleeper, or let its next `wait` return at once."""
        if not self._set:
            self._set = True
            if self._lock is not None:
                with contextlib.suppress(RuntimeError):  # two threads came at once, and the other has released it
                    self._lock.release()

    def wait(self, timeout_s: float) -> bool:
        """Sleep until `set`, at most `timeout_s` seconds; say whether it was set. The flag is down afterwards."""
        if self._lock is None:
            lock = threading.Lock()
            lock.acquire()
            self._lock = lock  # from here on `set` releases it; before, it left no more than its flag
            if self._set:
                self._set = False
                return True
        woken = self._lock.acquire(timeout=min(max(timeout_s, 0.0), threading.TIMEOUT_MAX))
        self._set = False
        return woken


class Finish(Protocol):
    """What makes events of drafts; None of one that is too large."""

    def __call__(self, drafts: Sequence[Any], counter: EventQueue, /) -> list[bytes | None]:
        """Return the events."""


class Overflow(Protocol):
    """Where events go that are not to stay in memory: the spool. Its methods want the ledger's lock held."""

    #: Whether the last event was refused because the bounds on disk are reached.
    full: bool

    def append(self, event: bytes, account: Account) -> bool:
        """Write an event to disk, or return False."""


@attrs.frozen(kw_only=True)
class QueueLimits:
    """How much may wait in memory, and what happens beyond."""

    max_events: int = 100_000
    max_bytes: int = 64 << 20
    policy: QueuePolicy = "drop_newest"
    #: Seconds that the policy `block` waits for room.
    block_timeout_s: float = 1.0
    #: The worker is woken when so much waits: a batch is full.
    wake_at_events: int = 512
    wake_at_bytes: int = 4 << 20


class EventQueue:
    """One tracer's encoded events, oldest first."""

    def __init__(
        self,
        ledger: Ledger,
        limits: QueueLimits | None = None,
        *,
        wakeup: Wakeup | None = None,
        overflow: Overflow | None = None,
        journal: bool = False,
        finish: Finish | None = None,
    ) -> None:
        limits = limits or QueueLimits()
        self.account = Account(ledger)
        self._ledger = ledger
        self._limits = limits
        self._max_events = limits.max_events
        self._max_bytes = limits.max_bytes
        # At half of the bounds at the latest: the worker needs room to come in time.
        self._wake_at_events = min(limits.wake_at_events, (limits.max_events + 1) // 2)
        self._wake_at_bytes = min(limits.wake_at_bytes, limits.max_bytes // 2)
        self._overflow = overflow
        self._journal = overflow if journal else None
        self._finish = finish
        self.closed = False
        #: Whether an event cannot just be appended.
        self._is_careful = self._journal is not None
        #: Called after a put, in the caller's thread, until it is set to None: it starts the worker.
        self.on_first_put: Callable[[], None] | None = None
        #: Whether the calling thread is the one that makes room: then it must not wait for it.
        self.is_worker: Callable[[], bool] = lambda: False
        self.start_over(wakeup or Wakeup())

    def start_over(self, wakeup: Wakeup) -> None:
        """Begin empty, with the ledger's lock, which is new: at first, and in a forked child."""
        self.account.start_over()
        self._lock = self._ledger.lock
        self.wakeup = wakeup

    def put(self, event: Entry) -> bool:
        """Take an event, or count it as dropped and return False."""
        account = self.account
        waiting = account.waiting
        size = len(event) if isinstance(event, bytes) else len(event[-1]) + DRAFT_BYTES  # as `size_of`, without a call
        if (
            self._is_careful
            or account.waiting_bytes + account.lent_bytes + size > self._max_bytes
            or len(waiting) + account.lent >= self._max_events
        ):
            return self._put_carefully(event, size)
        # Recording takes no lock: an append is one step, and so, for Python, is an addition between two calls.
        waiting.append(event)
        account.waiting_bytes += size
        if self._is_careful and self._take_back(event):  # it became so meanwhile
            return self._put_carefully(event, size)
        if len(waiting) >= self._wake_at_events or account.waiting_bytes >= self._wake_at_bytes:
            self.wakeup.set()
        start = self.on_first_put
        if start is not None:
            start()
        return True

    def _take_back(self, event: Entry) -> bool:
        with self._lock:
            return self.account.retract(event)

    def _put_carefully(self, event: Entry, size: int) -> bool:
        """Put an event where there may be no room, or it has to go to disk first."""
        if self._journal is not None and not isinstance(event, bytes):
            (finished,) = self._finished([event])  # before the lock is taken, which the worker may be waiting for
            if isinstance(finished, str):
                self.refuse(finished)
                return False
            event, size = finished, len(finished)
        with self._lock:
            account = self.account
            if not account.waiting:
                account.waiting_bytes = 0  # what a thread adds after its event was taken already is never taken
            if self._journal is not None and not self.closed and self._append_to(self._journal, event):
                count, total = len(self._ledger.direct), 0
            else:
                if not self.closed and self._has_room(size):
                    account.waiting.append(event)
                    account.waiting_bytes += size
                elif not self._find_room(event, size):
                    return False
                count, total = len(account.waiting), account.waiting_bytes
        if count >= self._wake_at_events or total >= self._wake_at_bytes:
            self.wakeup.set()
        start = self.on_first_put
        if start is not None:
            start()
        return True

    def _find_room(self, event: Entry, size: int) -> bool:
        """Keep an event although the queue is full or closed, as the policy says, or count it as dropped."""
        account, limits = self.account, self._limits
        if self.closed or size > self._max_bytes:
            self.refuse("closed" if self.closed else "too_large")
            return False
        reason: DropReason = "queue_full"
        if limits.policy == "spool" and self._overflow is not None:
            if self._append_to(self._overflow, event):
                return True
            if self._overflow.full:
                reason = "spool_full"
        elif limits.policy == "drop_oldest":
            while account.waiting and not self._has_room(size):
                dropped = size_of(account.waiting.popleft())
                account.waiting_bytes -= dropped
                account.taken += 1
                account.drop("queue_full")
        elif limits.policy == "block" and not self.is_worker():
            self.wakeup.set()
            self._ledger.settled.wait_for(lambda: self.closed or self._has_room(size), limits.block_timeout_s)
            if self.closed:
                reason = "closed"
        if self.closed or not self._has_room(size):
            self.refuse(reason)
            return False
        account.waiting.append(event)
        account.waiting_bytes += size
        return True

    def _append_to(self, disk: Overflow, event: Entry) -> bool:
        """Write an event to disk, finished; say whether that worked."""
        (finished,) = [event] if isinstance(event, bytes) else self._finished([event])
        return not isinstance(finished, str) and disk.append(finished, self.account)

    def finished(self, entries: list[Entry]) -> list[bytes | DropReason]:
        """Return events with the drafts among them finished, or why they are lost. Takes its time: wants no lock."""
        drafts = [entry for entry in entries if type(entry) is not bytes]
        finished = iter(self._finished(drafts))
        return [entry if type(entry) is bytes else next(finished) for entry in entries]

    def _finished(self, drafts: list[Entry]) -> list[bytes | DropReason]:
        if not drafts:
            return []
        try:
            assert self._finish is not None  # noqa: S101 - or nobody would have made drafts
            return [event or "too_large" for event in self._finish(drafts, self)]
        except Exception:  # noqa: BLE001 - a bug of ours must not stop the events beside or behind this one
            if len(drafts) == 1:
                return ["internal_error"]
            return [event for draft in drafts for event in self._finished([draft])]

    def _has_room(self, size: int) -> bool:
        account = self.account
        return (
            account.waiting_bytes + account.lent_bytes + size <= self._max_bytes
            and len(account.waiting) + account.lent < self._max_events
        )

    def refuse(self, reason: DropReason) -> None:
        """Count an event that was recorded and could not be put."""
        with self._lock:
            self.account.refuse(reason)

    def note(self, what: Note, count: int = 1) -> None:
        """Count something that is no end of an event."""
        with self._lock:
            self.account.note(what, count)

    def begin_journal(self, journal: Overflow) -> None:
        """From now on write every event to disk before `put` returns."""
        self._journal = journal
        self._is_careful = True

    @property
    def due(self) -> bool:
        """Whether a full batch waits."""
        account = self.account
        return len(account.waiting) >= self._wake_at_events or account.waiting_bytes >= self._wake_at_bytes

    def close(self) -> None:
        """From now on count every put as dropped (`closed`)."""
        self.closed = self._is_careful = True

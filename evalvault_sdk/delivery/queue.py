"""
Hold encoded events between the program's threads and the worker.

In:   `put`, from any thread of the program: an append under a lock held for a moment, never a wait.
Out:  `take`, from the worker: the oldest events, as a batch that it then owns.

Bounded in events and in bytes; what does not fit is dropped and counted. The worker sleeps on `wakeup` and
is woken when a batch is full; otherwise it comes by itself once per flush interval, so that a put costs no
context switch.
"""

from __future__ import annotations

import collections
import contextlib
import threading
from collections.abc import Callable

from evalvault_sdk.delivery.account import Account, DropReason
from evalvault_sdk.delivery.batch import Batch, BatchLimits


class Wakeup:
    """
    A flag that one thread sleeps on and any other sets.

    Built on a bare lock, not on `threading.Event`: a finalizer that records a stage while its own thread is
    inside `Event.set` or `Event.wait` would wait for itself for ever.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()
        self._set = False

    def set(self) -> None:
        """Wake the sleeper, or let its next `wait` return at once."""
        if not self._set:
            self._set = True
            with contextlib.suppress(RuntimeError):  # two threads came at once, and the other has released it
                self._lock.release()

    def wait(self, timeout_s: float) -> None:
        """Sleep until `set`, at most `timeout_s` seconds; the flag is down afterwards."""
        self._lock.acquire(timeout=timeout_s)
        self._set = False


class EventQueue:
    """Encoded events, oldest first."""

    def __init__(
        self, account: Account, *, max_events: int, max_bytes: int, max_event_bytes: int, wake_at: int
    ) -> None:
        self._account = account
        self._lock = account.lock
        self._events: collections.deque[bytes] = collections.deque()
        self._bytes = 0
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._max_event_bytes = max_event_bytes
        self._wake_at = wake_at
        self._closed_because: DropReason | None = None
        self.wakeup = Wakeup()
        #: Called after a put, in the caller's thread, until it is set to None: it starts the worker.
        self.on_first_put: Callable[[], None] | None = None

    def put(self, event: bytes) -> bool:
        """Take an event, or count it as dropped and return False."""
        size = len(event)
        account = self._account
        with self._lock:
            queued = account.queued + 1
            if (
                self._closed_because is not None
                or queued > self._max_events
                or self._bytes + size > self._max_bytes
                or size > self._max_event_bytes
            ):
                account.refused += 1
                account.drop(self._why_not(size))
                return False
            self._events.append(event)
            self._bytes += size
            account.accepted += 1
            account.queued = queued
        if queued >= self._wake_at:
            self.wakeup.set()
        if self.on_first_put is not None:
            self.on_first_put()
        return True

    def _why_not(self, size: int) -> DropReason:
        if self._closed_because is not None:
            return self._closed_because
        return "too_large" if size > self._max_event_bytes else "queue_full"

    def refuse(self, reason: DropReason) -> None:
        """Count an event that was recorded and could not be put."""
        with self._lock:
            self._account.refused += 1
            self._account.drop(reason)

    def take(self, limits: BatchLimits) -> Batch | None:
        """Move the oldest events from queued to in flight and return them; None if there are none."""
        with self._lock:
            count = limits.count(self._events)
            if not count:
                return None
            batch = Batch(tuple(self._events.popleft() for _ in range(count)))
            self._bytes -= sum(map(len, batch.events))
            self._account.queued -= count
            self._account.in_flight += count
            return batch

    def put_back(self, batch: Batch) -> None:
        """Return events that were taken and not sent, to where they were."""
        with self._lock:
            self._events.extendleft(reversed(batch.events))
            self._bytes += sum(map(len, batch.events))
            self._account.queued += len(batch)
            self._account.in_flight -= len(batch)

    def close(self, reason: DropReason) -> None:
        """From now on count every put as dropped for `reason`."""
        with self._lock:
            self._closed_because = reason

    def drop_all(self, reason: DropReason) -> int:
        """Give up what is waiting, count it as dropped for `reason`, and return how much it was."""
        with self._lock:
            count = len(self._events)
            self._events.clear()
            self._bytes = 0
            self._account.queued = 0
            if count:
                self._account.drop(reason, count)
                self._account.settled.notify_all()
            return count

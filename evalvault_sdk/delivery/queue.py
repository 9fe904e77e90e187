"""
Hold encoded events between the program's threads and the worker.

In:   `put`, from any thread of the program: an append under a lock held for a moment, never a wait.
Out:  `take`, from the worker: the oldest events, as a batch that it then owns.

Bounded in events and in bytes; what does not fit is dropped and counted. The worker sleeps on `wakeup` and
is woken when a batch is full; otherwise it comes by itself once per flush interval, so that a put costs no
context switch.
"""

from __future__ import annotations

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

    def wait(self, timeout_s: float) -> bool:
        """Sleep until `set`, at most `timeout_s` seconds; say whether it was set. The flag is down afterwards."""
        woken = self._lock.acquire(timeout=min(max(timeout_s, 0.0), threading.TIMEOUT_MAX))
        self._set = False
        return woken


class EventQueue:
    """Encoded events, oldest first."""

    def __init__(
        self,
        account: Account,
        *,
        max_events: int,
        max_bytes: int,
        max_event_bytes: int,
        wake_at_events: int,
        wake_at_bytes: int,
    ) -> None:
        self._account = account
        self._max_events = max_events
        self._max_bytes = max_bytes
        self._max_event_bytes = min(max_event_bytes, max_bytes)
        # At half of the bounds at the latest: the worker needs room to come in time.
        self._wake_at_events = min(wake_at_events, (max_events + 1) // 2)
        self._wake_at_bytes = min(wake_at_bytes, max_bytes // 2)
        self._closed = False
        #: Called after a put, in the caller's thread, until it is set to None: it starts the worker.
        self.on_first_put: Callable[[], None] | None = None
        self.start_over()

    def start_over(self) -> None:
        """Begin with the account's own lock and events, which are new: at first, and in a forked child."""
        self._lock = self._account.lock
        self._events = self._account.waiting
        self._bytes = 0
        self.wakeup = Wakeup()

    def put(self, event: bytes) -> bool:
        """Take an event, or count it as dropped and return False."""
        size = len(event)
        with self._lock:
            total = self._bytes + size
            if (
                total > self._max_bytes
                or len(self._events) >= self._max_events
                or size > self._max_event_bytes
                or self._closed
            ):
                self.refuse(self._why_not(size))
                return False
            self._events.append(event)
            self._bytes = total
        if total >= self._wake_at_bytes or len(self._events) >= self._wake_at_events:
            self.wakeup.set()
        start = self.on_first_put
        if start is not None:
            start()
        return True

    def _why_not(self, size: int) -> DropReason:
        if self._closed:
            return "closed"
        return "too_large" if size > self._max_event_bytes else "queue_full"

    def refuse(self, reason: DropReason) -> None:
        """Count an event that was recorded and could not be put."""
        with self._lock:
            self._account.refused += 1
            self._account.drop(reason)

    def take(self, limits: BatchLimits) -> Batch:
        """Move the oldest events from queued to in flight and return them: none, if there are none."""
        with self._lock:
            batch = limits.take_from(self._events)
            self._account.taken += len(batch)
            self._account.in_flight += len(batch)
            # What an interrupt between two lines of `put` may have left over ends with the last event.
            self._bytes = self._bytes - sum(map(len, batch.events)) if self._events else 0
            return batch

    def put_back(self, batch: Batch) -> None:
        """Return events that were taken and not sent, to where they were."""
        with self._lock:
            self._events.extendleft(reversed(batch.events))
            self._bytes += sum(map(len, batch.events))
            self._account.taken -= len(batch)
            self._account.in_flight -= len(batch)

    def close(self) -> None:
        """From now on count every put as dropped (`closed`)."""
        self._closed = True

    def drop_all(self, reason: DropReason) -> int:
        """Give up what is waiting, count it as dropped for `reason`, and return how much it was."""
        with self._lock:
            count = len(self._events)
            self._events.clear()
            self._bytes = 0
            self._account.taken += count
            if count:
                self._account.drop(reason, count)
                self._account.settled.notify_all()
            return count

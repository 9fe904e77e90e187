"""
Take events from the queue, deliver them, and settle the account.

In:   events in the queue; the wish to flush or to end, from the program's threads.
Out:  every event delivered, rejected, or counted as dropped.

One daemon thread per worker, started by the first event. Only it touches the transport. What it has taken
from the queue stays on the account as in flight until its outcome is known.
"""

from __future__ import annotations

import atexit
import logging
import threading
import time
from collections.abc import Callable

import attrs

from evalvault_sdk.config import Settings
from evalvault_sdk.delivery.account import Account, Stats
from evalvault_sdk.delivery.batch import Batch, BatchLimits
from evalvault_sdk.delivery.queue import EventQueue, Wakeup
from evalvault_sdk.delivery.retry import Retry
from evalvault_sdk.delivery.transport.base import Delivered, Outcome, Refused, RetryLater, TooLarge, Transport

logger = logging.getLogger("evalvault_sdk")

#: Rejections are logged at most once in so many seconds; all are counted.
_LOG_INTERVAL_S = 60.0
#: After a fault of our own, so many seconds pass before the next try.
_FAULT_PAUSE_S = 1.0


class Worker:
    """The thread between one queue and one transport."""

    def __init__(
        self, transport: Transport, settings: Settings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.account = Account()
        self.queue = EventQueue(
            self.account,
            max_events=settings.max_queue_events,
            max_bytes=settings.max_queue_bytes,
            max_event_bytes=settings.max_batch_bytes,
            wake_at=settings.batch_events,
        )
        self.queue.on_first_put = self._start
        self._transport = transport
        self._limits = BatchLimits(max_events=settings.max_batch_events, max_bytes=settings.max_batch_bytes)
        self._flush_interval_s = settings.flush_interval_s
        self._shutdown_timeout_s = settings.shutdown_timeout_s
        self._clock = clock
        self._hurry = Wakeup()
        self._retry = Retry(
            initial_s=settings.retry_initial_s,
            max_s=settings.retry_max_s,
            hurry=self._hurry,
            should_stop=lambda: self._abandoned or (self._closing and self._clock() >= self._deadline),
            on_failure=self._failed,
        )
        self._starting = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closing = False
        self._deadline = float("inf")
        self._abandoned = False
        self._outage_since: float | None = None
        self._rejection_logged_at = float("-inf")
        _live.add(self)

    # -- in the program's threads ---------------------------------------------------------------

    def flush(self, timeout_s: float) -> Stats:
        """Deliver what was recorded before this call, waiting at most `timeout_s` seconds."""
        account = self.account
        with account.lock:
            goal = account.ended + account.queued + account.in_flight
            if account.ended < goal:
                self._speed_up()
                account.settled.wait_for(lambda: account.ended >= goal, timeout_s)
            return account.stats()

    def shutdown(self, timeout_s: float) -> Stats:
        """Take no more events, deliver those taken, and end the thread; give up after `timeout_s` seconds."""
        self.close(timeout_s)
        thread = self._thread
        if thread is None:
            # No event was recorded, or it was too late to start a thread: the interpreter is ending.
            self._run()
        elif thread is not threading.current_thread():
            thread.join(max(0.0, self._deadline - self._clock()))
        self._abandon()
        _live.discard(self)
        return self.account.stats()

    def close(self, timeout_s: float | None = None) -> None:
        """Take no more events, and let the thread end by itself when those taken are delivered."""
        if not self._closing:
            self.queue.close("closed")
            self._deadline = self._clock() + (self._shutdown_timeout_s if timeout_s is None else timeout_s)
            self._closing = True
        self._speed_up()

    def _speed_up(self) -> None:
        self.queue.wakeup.set()
        self._hurry.set()

    def _start(self) -> None:
        with self._starting:
            if self._thread is None:
                thread = threading.Thread(target=self._run, name="evalvault-delivery", daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    return  # the interpreter is ending: shutdown() delivers in its own thread
                self._thread = thread
            self.queue.on_first_put = None

    def _abandon(self) -> None:
        """Give up what is left; what its request comes to after this is not waited for, nor counted."""
        with self.account.lock:
            if self._abandoned:
                return
            self._abandoned = True
            lost = self.queue.drop_all("shutdown") + self.account.in_flight
            if self.account.in_flight:
                self.account.drop("shutdown", self.account.in_flight)
                self.account.in_flight = 0
            self.account.settled.notify_all()
        self._hurry.set()
        if lost:
            logger.warning(
                "evalvault: %d events were not delivered to %s before shutdown and are lost",
                lost,
                self._transport.destination,
            )

    # -- in the worker's thread -----------------------------------------------------------------

    def _run(self) -> None:
        while not self._abandoned:
            try:
                if not self._closing:
                    self.queue.wakeup.wait(self._flush_interval_s)
                self._deliver_waiting()
                if self._closing and not self.account.queued:
                    break
            except Exception as fault:  # noqa: BLE001 - a bug of ours must end neither the thread nor the events
                logger.warning("evalvault: delivery failed by a fault of its own (%s)", type(fault).__name__)
                self._hurry.wait(_FAULT_PAUSE_S)
        self._transport.close()

    def _deliver_waiting(self) -> None:
        """Deliver what waits now; what comes meanwhile waits for a full batch or the next interval."""
        waiting = self.account.queued
        while waiting > 0 and not self._abandoned:
            batch = self.queue.take(self._limits)
            if batch is None:
                return
            waiting -= len(batch)
            try:
                self._deliver(batch)
            except BaseException:
                self._return(batch)
                raise

    def _deliver(self, batch: Batch) -> None:
        """Send a batch until its outcome is final, in halves where it must be; settle every event of it."""
        pending = [batch]
        while pending:
            part = pending.pop()
            outcome = self._retry.run(lambda part=part: self._send(part))  # type: ignore[misc]
            if isinstance(outcome, (TooLarge, Refused)) and len(part) > 1:
                # Refused as a whole: one event may be the reason, and must not cost its neighbours.
                if isinstance(outcome, TooLarge):
                    self._learn_limit(part, outcome)
                pending += reversed(part.halves())
            else:
                self._settle(part, outcome)

    def _send(self, batch: Batch) -> Outcome:
        if self._abandoned:
            return RetryLater("shut down")
        return self._transport.send(batch)

    def _learn_limit(self, batch: Batch, outcome: TooLarge) -> None:
        learnt = min(outcome.limit_bytes or self._limits.max_bytes, len(batch.body()) // 2)
        self._limits = attrs.evolve(self._limits, max_bytes=max(learnt, 1024))

    def _settle(self, batch: Batch, outcome: Outcome) -> None:
        """Enter the outcome of a batch into the account."""
        account = self.account
        with account.lock:
            if self._abandoned:
                return
            account.in_flight -= len(batch)
            if isinstance(outcome, Delivered):
                account.delivered += len(batch) - len(outcome.rejected)
                account.rejected += len(outcome.rejected)
            elif isinstance(outcome, RetryLater):
                account.drop("shutdown", len(batch))  # the retry only gives up when time is up
            else:
                account.rejected += len(batch)
            account.settled.notify_all()
        if isinstance(outcome, RetryLater):
            logger.warning(
                "evalvault: %d events were not delivered to %s before shutdown and are lost",
                len(batch),
                self._transport.destination,
            )
            return
        self._recovered()
        if isinstance(outcome, Delivered):
            if outcome.rejected:
                self._log_rejected(len(outcome.rejected), outcome.rejected[0].reason)
        else:
            self._log_rejected(len(batch), outcome.reason if isinstance(outcome, Refused) else "too large")

    def _return(self, batch: Batch) -> None:
        """Put a batch back whose delivery failed by a fault of ours; resending what was stored is harmless."""
        with self.account.lock:
            if not self._abandoned:
                self.queue.put_back(batch)

    def _failed(self, outcome: RetryLater) -> None:
        """Say once that an outage began."""
        if self._outage_since is None and not self._abandoned:
            self._outage_since = self._clock()
            logger.warning(
                "evalvault: cannot deliver to %s (%s); events are kept in memory and sent again%s",
                self._transport.destination,
                outcome.reason,
                f"; {outcome.advice}" if outcome.advice else "",
            )

    def _recovered(self) -> None:
        """Say once that an outage is over."""
        if self._outage_since is not None:
            lasted_s, self._outage_since = self._clock() - self._outage_since, None
            logger.warning("evalvault: delivering to %s again after %.1f s", self._transport.destination, lasted_s)

    def _log_rejected(self, count: int, reason: str) -> None:
        now = self._clock()
        if now - self._rejection_logged_at >= _LOG_INTERVAL_S:
            self._rejection_logged_at = now
            logger.warning("evalvault: the server rejected %d events, the first because: %s", count, reason)


#: Workers that still have to be ended when the process ends.
_live: set[Worker] = set()


def _end_all() -> None:
    """End every worker, all within the longest of their timeouts."""
    workers = list(_live)
    for worker in workers:
        worker.close()
    for worker in workers:
        worker.shutdown(0.0)


atexit.register(_end_all)

"""
Take events from the queue, deliver them, and settle the account.

In:   events in the queue; the wish to flush or to end, from the program's threads.
Out:  every event delivered, rejected, or counted as dropped.

One daemon thread per worker, started by the first event. Only whoever runs `_run` touches the transport:
that thread, or at the very end of the interpreter, when no thread can be started any more, the one that
shuts down. What was taken from the queue stays on the account as in flight until its outcome is known.

A forked child has none of its parent's threads and all of its memory: its workers start over, empty, with
locks and a connection of their own; what waited at the fork is the parent's to deliver.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable

import attrs

from evalvault_sdk.config import Settings
from evalvault_sdk.delivery import lifecycle
from evalvault_sdk.delivery.account import Account, FlushReport
from evalvault_sdk.delivery.batch import ENVELOPE_BYTES, Batch, BatchLimits
from evalvault_sdk.delivery.queue import EventQueue, Wakeup
from evalvault_sdk.delivery.retry import Retry
from evalvault_sdk.delivery.transport.base import Delivered, Outcome, Refused, RetryLater, TooLarge, Transport
from evalvault_sdk.log import Rarely, warn

#: After a fault of our own, so many seconds pass before the next try.
_FAULT_PAUSE_S = 1.0
#: A flush waits so long for another thread that is about to start the worker.
_START_WAIT_S = 5.0
#: So long a shutdown waits for another thread that is saying what was lost.
_TELL_WAIT_S = 0.5
#: A batch that is refused as a whole is halved at most so often in the search for the events at fault.
_MAX_HALVINGS = 64


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
            max_event_bytes=settings.max_batch_bytes - ENVELOPE_BYTES,
            wake_at_events=settings.batch_events,
            wake_at_bytes=settings.max_batch_bytes,
        )
        self.queue.on_first_put = self._start
        self._transport = transport
        self._limits = BatchLimits(max_events=settings.max_batch_events, max_bytes=settings.max_batch_bytes)
        self._flush_interval_s = settings.flush_interval_s
        self._shutdown_timeout_s = settings.shutdown_timeout_s
        self._clock = clock
        self._retry_initial_s = settings.retry_initial_s
        self._retry_max_s = settings.retry_max_s
        self._closing = False
        self._deadline = float("inf")
        self._abandoned = False
        self._ended_in_time = True
        self._start_over()
        lifecycle.made(self)

    def _start_over(self) -> None:
        """Make what belongs to one process: at first, and in a forked child."""
        self._hurry = Wakeup()
        self._retry = Retry(
            initial_s=self._retry_initial_s,
            max_s=self._retry_max_s,
            hurry=self._hurry,
            should_stop=self._out_of_time,
            ending=lambda: self._closing,
            urgent=lambda: self._closing or self._flushes > 0,
            left_s=lambda: self._deadline - self._clock(),
            on_failure=self._failed,
            clock=self._clock,
        )
        self._starting = threading.Lock()
        self._running = threading.Lock()
        self._thread: threading.Thread | None = None
        self._flushes = 0
        self._outage_since: float | None = None
        self._log = Rarely(self._clock)
        self._telling = threading.RLock()
        self._told_dropped: dict[str, int] = {}

    def after_fork_in_child(self) -> None:
        """Forget the parent's events, threads, locks and connection."""
        self.account.start_over()
        self.queue.start_over()
        self._start_over()
        self.queue.on_first_put = None if self._closing else self._start
        with contextlib.suppress(Exception):
            self._transport.after_fork_in_child()

    @property
    def destination(self) -> str:
        """Where events go."""
        return self._transport.destination

    # -- in the program's threads ---------------------------------------------------------------

    def flush(self, timeout_s: float) -> FlushReport:
        """Deliver what was recorded before this call, waiting at most `timeout_s` seconds."""
        account, until = self.account, self._clock() + timeout_s
        with account.lock:
            goal = account.taken + len(account.waiting)
            self._flushes += 1
        try:
            if account.ended < goal:
                if self._thread is None:
                    self._start(wait_s=min(timeout_s, _START_WAIT_S))
                if self._thread is None:
                    self._run_here(until)
                self._speed_up()
                self._wait_until(lambda: account.ended >= goal, until - self._clock())
        finally:
            with account.lock:
                self._flushes -= 1
        return account.report(in_time=account.ended >= goal)

    def shutdown(self, timeout_s: float) -> FlushReport:
        """Take no more events, deliver those taken, and end the thread; give up after `timeout_s` seconds."""
        self.close(timeout_s)
        if self._thread is None:
            self._run_here(self._deadline)
        if self._thread is not threading.current_thread():
            self._wait_until(lambda: not self.account.open, self._deadline - self._clock())
        self._abandon()
        self._tell_dropped(at_once=True)
        if self._thread is not None and self._thread is not threading.current_thread():
            with contextlib.suppress(RuntimeError):  # not started yet: a signal handler ends what began just now
                self._thread.join(max(0.0, min(self._deadline - self._clock(), threading.TIMEOUT_MAX)))
        lifecycle.ended(self)
        return self.account.report(in_time=self._ended_in_time)

    def close(self, timeout_s: float | None = None) -> None:
        """Take no more events, and let the thread end by itself when those taken are delivered."""
        if not self._closing:
            self.queue.close()
            self._deadline = self._clock() + (self._shutdown_timeout_s if timeout_s is None else timeout_s)
            self._closing = True
        self._speed_up()

    def _speed_up(self) -> None:
        self.queue.wakeup.set()
        self._hurry.set()

    def _wait_until(self, done: Callable[[], bool], timeout_s: float) -> None:
        with self.account.lock:
            self.account.settled.wait_for(done, max(0.0, min(timeout_s, threading.TIMEOUT_MAX)))

    def _start(self, wait_s: float = 0.0) -> None:
        # Recording never waits: whoever holds the lock, perhaps this very thread below a signal handler, starts
        # the worker. A flush waits a little, to see whether it was started.
        if not self._starting.acquire(timeout=max(0.0, wait_s)):
            return
        try:
            if self._thread is None and not self._closing:
                thread = threading.Thread(target=self._run, name="evalvault-delivery", daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    return  # the interpreter is ending: flush and shutdown deliver in their own thread
                finally:
                    lifecycle.started(self)
                self._thread = thread
            self.queue.on_first_put = None
        finally:
            self._starting.release()

    def _run_here(self, until: float) -> None:
        """Deliver in the caller's thread, until then at most: no other could be started."""
        if self._running.acquire(blocking=False):
            deadline = self._deadline
            self._deadline = min(deadline, until)
            try:
                self._deliver_waiting()
            finally:
                if not self._closing:
                    self._deadline = deadline
                self._running.release()

    def _abandon(self) -> None:
        """Give up what is left. What a request still under way comes to is not waited for, nor counted."""
        account = self.account
        with account.lock:
            if self._abandoned:
                return
            self._abandoned = True
            lost = self.queue.drop_all("shutdown") + account.in_flight
            if account.in_flight:
                account.drop("shutdown", account.in_flight)
                account.in_flight = 0
            self._ended_in_time = not lost
            account.settled.notify_all()
        self._speed_up()

    def _out_of_time(self) -> bool:
        return self._abandoned or self._clock() >= self._deadline

    # -- in the worker's thread -----------------------------------------------------------------

    def _run(self) -> None:
        if not self._running.acquire(blocking=False):
            return
        try:
            while not self._abandoned:
                try:
                    if not self._closing:
                        self.queue.wakeup.wait(self._flush_interval_s)
                    self._deliver_waiting()
                    if self._closing and (not self.account.waiting or self._out_of_time()):
                        break
                except Exception as fault:  # noqa: BLE001 - a bug of ours must end neither the thread nor the events
                    self._log.warn("fault", "delivery failed by a fault of its own (%s)", type(fault).__name__)
                    self._hurry.wait(_FAULT_PAUSE_S)
            if self._closing:
                self._abandon()  # nobody may be waiting in shutdown: the tracer was dropped
                self._tell_dropped(at_once=True)
        finally:
            with contextlib.suppress(Exception):
                self._transport.close()
            lifecycle.ended(self)
            self._running.release()

    def _deliver_waiting(self) -> None:
        """Deliver what waits now; what comes meanwhile waits for a full batch or the next interval."""
        waiting = len(self.account.waiting)
        while waiting > 0 and not self._out_of_time():
            batch = self.queue.take(self._limits)
            waiting -= len(batch)
            if not batch.events:
                break
            self._deliver(batch)
        self._tell_dropped()

    def _deliver(self, batch: Batch) -> None:
        """Send a batch until its outcome is final, in halves where it must be; settle every event of it."""
        pending, halvings, too_large = [batch], 0, False
        try:
            while pending:
                part = pending[-1]
                outcome = self._retry.run(lambda part=part: self._send(part))  # type: ignore[misc]
                if isinstance(outcome, RetryLater):
                    return  # out of time
                pending.pop()
                if isinstance(outcome, TooLarge):
                    too_large = True
                    if outcome.limit_bytes is not None:
                        self._learn_limit(outcome.limit_bytes)
                elif isinstance(outcome, Delivered) and too_large:
                    self._learn_limit(len(part.body()))  # from what passed: a gateway may refuse everything for a while
                if len(part) > 1 and (
                    isinstance(outcome, TooLarge) or (isinstance(outcome, Refused) and halvings < _MAX_HALVINGS)
                ):
                    # Refused as a whole: one event may be the reason, and must not cost its neighbours.
                    halvings += isinstance(outcome, Refused)
                    pending += reversed(part.halves())
                else:
                    self._settle(part, outcome)
        finally:
            # What was not sent, for want of time or by a fault of ours, goes back to where it was. Sending again
            # what the server has stored is harmless.
            for unsent in pending:
                self._return(unsent)

    def _send(self, batch: Batch) -> Outcome:
        if self._abandoned:
            return RetryLater("shut down")
        left_s = self._deadline - self._clock() if self._deadline != float("inf") else None
        try:
            return self._transport.send(batch, timeout_s=left_s)
        except Exception as fault:  # noqa: BLE001 - whatever a transport meets, the events are not to blame
            return RetryLater(f"a fault in sending, {type(fault).__name__}")

    def _learn_limit(self, max_bytes: int) -> None:
        self._limits = attrs.evolve(self._limits, max_bytes=min(self._limits.max_bytes, max(max_bytes, 1024)))

    def _settle(self, batch: Batch, outcome: Delivered | Refused | TooLarge) -> None:
        """Enter the outcome of a batch into the account, then say what there is to say."""
        account = self.account
        rejected, reason = 0, ""
        if isinstance(outcome, Delivered):
            rejected = len(outcome.rejected)
            reason = outcome.rejected[0].reason if rejected else ""
        else:
            rejected = len(batch)
            reason = outcome.reason if isinstance(outcome, Refused) else "it is too large for the server"
        with account.lock:
            if self._abandoned:
                return
            account.in_flight -= len(batch)
            account.delivered += len(batch) - rejected
            account.rejected += rejected
            account.settled.notify_all()
        self._recovered()
        if rejected:
            self._log.warn("rejected", "the server rejected %d events, the first because: %s", rejected, reason)

    def _return(self, batch: Batch) -> None:
        with self.account.lock:
            if not self._abandoned:
                self.queue.put_back(batch)

    def _failed(self, outcome: RetryLater) -> None:
        """Say once that an outage began."""
        if self._outage_since is None and not self._abandoned:
            self._outage_since = self._clock()
            warn(
                "cannot deliver to %s (%s); events are kept in memory and sent again%s",
                self._transport.destination,
                outcome.reason,
                f"; {outcome.advice}" if outcome.advice else "",
            )

    def _recovered(self) -> None:
        """Say once that an outage is over."""
        if self._outage_since is not None:
            lasted_s, self._outage_since = self._clock() - self._outage_since, None
            warn("delivering to %s again after %.1f s", self._transport.destination, lasted_s)

    def _tell_dropped(self, *, at_once: bool = False) -> None:
        """Say that events were lost, by reason, at most once a minute; at the end, what was not said yet."""
        # The thread and whoever shuts down may both be here: one says it, and the other waits until it is said,
        # for the process may end right after. A logging handler of the host that hangs is not waited for.
        if not self._telling.acquire(timeout=_TELL_WAIT_S):
            return
        try:
            for reason, count in self.account.stats().dropped.items():
                new = count - self._told_dropped.get(reason, 0)
                if not new or reason in ("invalid", "internal_error"):  # the recorder says these, with their cause
                    continue
                line = ("%d events for %s were lost (%s)", new, self._transport.destination, reason)
                if at_once:
                    warn(*line)
                elif not self._log.warn(reason, *line):
                    continue
                self._told_dropped[reason] = count
        finally:
            self._telling.release()

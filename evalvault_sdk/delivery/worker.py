"""
Take events from queues and spool, deliver them, and settle the account.

In:   events in the queues of all tracers that share this worker; the wish to flush or to end.
Out:  every event delivered, rejected, on disk for later, or counted as dropped.

One daemon thread per worker, started by the first event. Only whoever runs `_run` touches the transport:
that thread, or at the very end of the interpreter, when no thread can be started any more, the one that
shuts down. What was taken is in hand until its outcome is known; when time is up, whoever ends the worker takes
it out of the thread's hand and puts it on disk.

What is new goes first, then one batch of the backlog, and so in turn: neither starves the other. What could
not be delivered goes to disk at once, and so does, as long as the destination does not answer, all that comes.

A forked child has none of its parent's threads and all of its memory: its workers start over, empty, with
locks, files and a connection of their own; what waited at the fork is the parent's to deliver.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable

import attrs

from evalvault_sdk.config import Settings
from evalvault_sdk.delivery import lifecycle
from evalvault_sdk.delivery.account import Ledger
from evalvault_sdk.delivery.batch import ENVELOPE_BYTES, Batch, BatchLimits
from evalvault_sdk.delivery.breaker import Breaker
from evalvault_sdk.delivery.folder import default_root
from evalvault_sdk.delivery.notices import Notices
from evalvault_sdk.delivery.oversize import shrink
from evalvault_sdk.delivery.queue import EventQueue, QueueLimits, Wakeup, take
from evalvault_sdk.delivery.segment import Segment
from evalvault_sdk.delivery.spool import Reading, Spool
from evalvault_sdk.delivery.transport.base import Delivered, Outcome, Refused, RetryLater, TooLarge, Transport

#: A batch that is refused as a whole is halved at most so often in the search for the events at fault.
_MAX_HALVINGS = 64
#: So many events the first batch of a backlog has; each one that goes well doubles it.
_SLOW_START = 64
#: So often the spool's folder is looked at, for what ended processes left.
_LOOK_AROUND_S = 5.0
#: So many single events are suspected in a row; if then none has passed, the destination is at fault.
_MAX_SUSPECTED = 3
#: An event that was refused on the way so often while others passed will never pass.
_MAX_FAILURES = 3
#: A suspect waits so long for its next try, twice as long each time, and at most so long.
_SUSPECT_WAITS_S, _SUSPECT_WAITS_AT_MOST_S = 0.25, 60.0
#: More segments than this, freshly written by the program's threads, are a backlog.
_MAX_FRESH = 2


@attrs.define(eq=False)
class _Hand:
    """What is being sent: parts of a batch, the next one last; and where it came from."""

    parts: list[Batch]
    segment: Segment | None = None
    reading: Reading | None = None

    def rest(self) -> Batch:
        parts = self.parts[::-1]
        return Batch(
            tuple(event for part in parts for event in part.events), tuple(s for part in parts for s in part.shares)
        )


class Worker:
    """The thread between the queues of one destination and its transport."""

    def __init__(
        self, transport: Transport, settings: Settings, *, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self.ledger = Ledger()
        self.queues: list[EventQueue] = []
        self._transport = transport
        self._settings = settings
        self._clock = clock
        self._spool: Spool | None = None
        if settings.durability != "memory":
            self._spool = Spool(
                settings.spool_dir or default_root(os.environ),
                transport.destination,
                self.ledger,
                max_bytes=settings.spool_max_bytes,
                max_age_s=settings.spool_max_age_s,
                policy=settings.spool_policy,
            )
        self._notices = Notices(transport.destination, self.ledger, settings, self._spool, clock)
        self._breaker = Breaker(initial_s=settings.retry_initial_s, max_s=settings.retry_max_s, clock=clock)
        self._limits = BatchLimits(max_events=settings.max_batch_events, max_bytes=settings.max_batch_bytes)
        self._closing = False
        self._deadline = float("inf")
        self._abandoned = False
        self._start_over()
        lifecycle.made(self)

    def _start_over(self) -> None:
        """Make what belongs to one process: at first, and in a forked child."""
        self._wakeup = Wakeup()
        self._hurry = Wakeup()
        self._starting = threading.Lock()
        self._running = threading.Lock()
        self._ending = threading.RLock()
        self._thread: threading.Thread | None = None
        self._hand: _Hand | None = None
        self._flushes = 0
        self._backlog_events = _SLOW_START
        self._successes = 0
        self._suspicious = False  # whether the last failure may be for what the request held
        self._live_at = float("-inf")
        self._look_around_at = float("-inf")

    def after_fork_in_child(self) -> None:
        """Forget the parent's events, threads, locks, files and connection."""
        self.ledger.start_over()
        self._start_over()
        self._breaker.start_over()
        self._notices.start_over()
        for queue in self.queues:
            queue.start_over(self._wakeup)
            queue.on_first_put = None if self._closing else self.start
        if self._spool is not None:
            self._spool.after_fork_in_child()
        with contextlib.suppress(Exception):
            self._transport.after_fork_in_child()

    @property
    def destination(self) -> str:
        """Where events go."""
        return self._transport.destination

    @property
    def closing(self) -> bool:
        """Whether it takes no more events."""
        return self._closing

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive()

    # -- in the program's threads ---------------------------------------------------------------

    def open_queue(self) -> EventQueue:
        """Return a new queue whose events this worker delivers."""
        settings = self._settings
        policy = settings.queue_policy
        if policy == "spool" and self._spool is None:
            policy = "drop_newest"
        queue = EventQueue(
            self.ledger,
            QueueLimits(
                max_events=settings.max_queue_events,
                max_bytes=settings.max_queue_bytes,
                policy=policy,
                block_timeout_s=settings.queue_block_timeout_s,
                wake_at_events=settings.batch_events,
                wake_at_bytes=settings.max_batch_bytes,
            ),
            wakeup=self._wakeup,
            overflow=self._spool,
            journal=settings.durability == "journal",
        )
        queue.on_first_put = self.start
        queue.is_worker = lambda: threading.current_thread() is self._thread
        with self.ledger.lock:
            self.queues = [*self.queues, queue]
        return queue

    def adopt_orphans(self) -> None:
        """Begin with what ended processes left for this destination, if there is anything."""
        if self._spool is not None and self._thread is None and self._spool.has_orphans():
            self.start()

    def flush(self, queue: EventQueue, timeout_s: float) -> bool:
        """Deliver what was recorded into `queue` before this call; say whether all of it met its fate in time."""
        account, until = queue.account, self._clock() + timeout_s
        with self.ledger.lock:
            self._flushes += 1
        try:
            if not account.pending:
                return True
            if not self.is_alive:
                self.start(wait_s=min(timeout_s, _START_WAIT_S))
            if not self.is_alive:
                self._run_here(until)
            self.speed_up()
            return account.wait_until_ended(until - self._clock(), self._clock)
        finally:
            with self.ledger.lock:
                self._flushes -= 1

    def leave(self, queue: EventQueue, timeout_s: float) -> bool:
        """Close `queue`, and if it was the last, the worker; the thread ends when all is delivered. Was it the last?"""
        queue.close()
        if all(other.closed for other in self.queues):
            self.close(timeout_s)
            return True
        self.speed_up()
        return False

    def see_off(self, queue: EventQueue, timeout_s: float, *, last: bool) -> None:
        """Wait until a closed queue is delivered; after `timeout_s` seconds put what is left of it on disk."""
        if last:
            self.end()
            return
        if not self.flush(queue, timeout_s - _reserve_s(timeout_s)) and queue.account.in_memory:
            self._rescue([queue])
        self._notices.tell_losses(at_once=True)

    def brace(self) -> None:
        """Expect the end at any time: deliver what waits, or put it on disk, and from now on write a journal."""
        spool, timeout_s = self._spool, self._settings.shutdown_timeout_s
        for queue in self.queues:
            if not self._breaker.failing:
                self.flush(queue, timeout_s)
            if spool is not None:
                queue.begin_journal(spool)
                while len(batch := take([queue], self._limits, self.ledger)) and self._keep(batch, alone=True):
                    pass

    def close(self, timeout_s: float | None = None) -> None:
        """Take no more events, and let the thread end by itself when those taken are delivered."""
        for queue in self.queues:
            queue.close()
        if not self._closing:
            timeout_s = self._settings.shutdown_timeout_s if timeout_s is None else timeout_s
            self._deadline = self._clock() + timeout_s - _reserve_s(timeout_s)
            self._closing = True
        self.speed_up()

    def end(self) -> None:
        """Wait until what was taken is delivered and the thread has ended, or time is up. `close` comes before."""
        if not self.is_alive:
            self._run_here(self._deadline)
        if self._thread is not threading.current_thread():
            with self.ledger.lock:
                left_s = max(0.0, min(self._deadline - self._clock(), threading.TIMEOUT_MAX))
                self.ledger.settled.wait_for(lambda: self._abandoned or not self._pending(), left_s)
        self._finish()
        if self._thread is not None and self._thread is not threading.current_thread():
            with contextlib.suppress(RuntimeError):  # not started yet: a signal handler ends what began just now
                left_s = self._deadline + _JOIN_S - self._clock()
                self._thread.join(max(0.0, min(left_s, threading.TIMEOUT_MAX)))
        lifecycle.ended(self)

    def speed_up(self) -> None:
        """Let the thread do what there is to do, now."""
        self._wakeup.set()
        self._hurry.set()

    def start(self, wait_s: float = 0.0) -> None:
        """Start the thread, unless it runs or another thread is just starting it; for that one wait a little."""
        # Recording never waits: whoever holds the lock, perhaps this very thread below a signal handler, starts
        # the worker. A flush waits a little, to see whether it was started.
        if not self._starting.acquire(timeout=max(0.0, wait_s)):
            return
        try:
            if not self.is_alive and not self._closing:
                thread = threading.Thread(target=self._run, name="evalvault-delivery", daemon=True)
                try:
                    thread.start()
                except RuntimeError:
                    return  # the interpreter is ending: flush and shutdown deliver in their own thread
                finally:
                    lifecycle.started(self)
                self._thread = thread
            for queue in self.queues:
                queue.on_first_put = None
        finally:
            self._starting.release()

    def _run_here(self, until: float) -> None:
        """Deliver in the caller's thread, until then at most: no other could be started."""
        if self._running.acquire(blocking=False):
            deadline = self._deadline
            self._deadline = min(deadline, until)
            try:
                while self._pending() and not self._out_of_time():
                    self._round()
                    self._hurry.wait(min(self._breaker.wait_s(ending=True), self._deadline - self._clock()))
            finally:
                if not self._closing:
                    self._deadline = deadline
                self._running.release()

    def _pending(self) -> bool:
        """Whether events of ours are not delivered yet."""
        return any(queue.account.pending for queue in self.queues)

    # -- the end of time ------------------------------------------------------------------------

    def _out_of_time(self) -> bool:
        return self._abandoned or self._clock() >= self._deadline

    def _rescue(self, queues: list[EventQueue]) -> None:
        """Put on disk what is in hand and what waits in `queues`, or count it as lost if there is no disk."""
        ledger, spool = self.ledger, self._spool
        with ledger.lock:
            hand, self._hand = self._hand, None
        if hand is not None:
            rest = hand.rest()
            if hand.segment is not None and hand.reading is not None and spool is not None:
                spool.advance(hand.segment, hand.reading, rest)
            elif len(rest) and (spool is None or not spool.store(rest, alone=True)):
                with ledger.lock:
                    for share in rest.shares:
                        share.account.lose(share, "shutdown", in_flight=True)
        while len(batch := take(queues, self._limits, ledger)):
            if spool is None or not spool.store(batch, alone=True):
                with ledger.lock:
                    for share in batch.shares:
                        share.account.lose(share, "shutdown", in_flight=True)
        with ledger.lock:
            ledger.settled.notify_all()

    def _finish(self) -> None:
        """End for good: give up what is under way, put the rest on disk, leave that to the next process."""
        with self._ending:
            if self._abandoned:
                return
            self._abandoned = True
            with contextlib.suppress(Exception):
                self._rescue(self.queues)
            self.speed_up()
            self._notices.tell_end(sum(queue.account.spooled + queue.account.direct for queue in self.queues))
            if self._spool is not None:
                with contextlib.suppress(Exception):
                    self._spool.close()

    # -- in the worker's thread -----------------------------------------------------------------

    def _run(self) -> None:
        if not self._running.acquire(blocking=False):
            return
        try:
            while not self._abandoned:
                try:
                    self._sleep()
                    self._round()
                    if self._closing and (self._out_of_time() or not self._pending()):
                        self._finish()
                except Exception as fault:  # noqa: BLE001 - a bug of ours must end neither the thread nor the events
                    self._notices.fault(fault)
                    self._hurry.wait(_FAULT_PAUSE_S)
        finally:
            if self._abandoned:
                with contextlib.suppress(Exception):
                    self._transport.close()
                lifecycle.ended(self)
            else:  # something has ended the thread: the next event starts another
                for queue in self.queues:
                    queue.on_first_put = self.start
                self._thread = None
            self._running.release()

    def _sleep(self) -> None:
        """Wait until there is something to do."""
        interval_s, spool = self._settings.flush_interval_s, self._spool
        wait_s = self._breaker.wait_s(ending=self._closing)
        if not wait_s and not self._has_work():
            wait_s = interval_s
        if self._closing:
            self._hurry.wait(min(wait_s, self._deadline - self._clock()))
        elif not self._breaker.failing:
            if spool is None or not spool.has_backlog:
                self._wakeup.wait(interval_s)
        elif spool is None or not spool.usable:
            # Nothing to do before the next probe: a full queue must not wake us with every event.
            self._hurry.wait(wait_s if spool is None else min(wait_s, interval_s))
        else:
            self._wakeup.wait(min(wait_s, interval_s))

    def _has_work(self) -> bool:
        """Whether there is anything that could be sent now."""
        spool = self._spool
        return any(queue.account.waiting for queue in self.queues) or (
            spool is not None and (spool.has_fresh or spool.has_backlog)
        )

    def _round(self) -> None:
        """Do once what there is to do: what is new, then a batch of the backlog."""
        now, spool = self._clock(), self._spool
        with self.ledger.lock:
            self.queues = [queue for queue in self.queues if not queue.closed or queue.account.pending]
        if spool is not None and now >= self._look_around_at and not self._closing:
            self._look_around_at = now + _LOOK_AROUND_S
            spool.look_around()
        urgent = self._flushes > 0 or self._closing
        if urgent:
            self._breaker.hurry()
        if self._breaker.wait_s(ending=self._closing) > 0:
            self._put_off()
        elif self._breaker.failing and spool is not None and spool.has_backlog:
            self._deliver_backlog()  # the probe
        elif urgent or now - self._live_at >= self._settings.flush_interval_s or self._live_is_due():
            self._live_at = now
            self._deliver_live()
        if spool is not None and not self._breaker.failing and not self._out_of_time() and spool.has_backlog:
            self._deliver_backlog()
        self._notices.tell_losses()
        self._notices.tell_recovery()

    def _live_is_due(self) -> bool:
        return any(queue.due for queue in self.queues) or len(self.ledger.direct) >= self._settings.batch_events

    def _may_send(self) -> bool:
        return not self._breaker.failing and not self._out_of_time()

    def _deliver_live(self) -> None:
        """Deliver what waits now; what comes meanwhile waits for a full batch or the next interval."""
        waiting = sum(len(queue.account.waiting) for queue in self.queues)
        first = True  # a probe, if the last request failed
        while waiting > 0 and (first or self._may_send()):
            first = False
            batch = take(self.queues, self._limits, self.ledger)
            waiting -= len(batch)
            if not len(batch):
                break
            rest = self._deliver(_Hand([batch]))
            if rest is not None and len(rest):
                self._keep(rest)
        spool = self._spool
        if spool is None or not spool.has_fresh:
            return
        for _ in range(_MAX_FRESH):
            if not (first or self._may_send()) or (segment := spool.take_fresh()) is None:
                break
            first = False
            while self._deliver_from(segment, self._limits) and self._may_send():
                pass
        spool.put_off(more_than=0 if self._breaker.failing else _MAX_FRESH)

    def _deliver_backlog(self) -> None:
        """Deliver one batch of the oldest segment: small at first, larger as long as that is quick."""
        assert self._spool is not None  # noqa: S101 - asked before
        segment = self._spool.take_backlog(probe=self._breaker.failing)
        if segment is None:
            return
        started = self._clock()
        limits = attrs.evolve(self._limits, max_events=min(self._backlog_events, self._limits.max_events))
        self._deliver_from(segment, limits)
        if self._breaker.failing:
            self._backlog_events = max(self._backlog_events // 2, 1 if self._suspicious else _SLOW_START)
        elif self._clock() - started < self._settings.flush_interval_s / 2:
            self._backlog_events = min(self._backlog_events * 2, self._limits.max_events)
        else:
            self._backlog_events = max(self._backlog_events // 2, 1)

    def _deliver_from(self, segment: Segment, limits: BatchLimits) -> bool:
        """Deliver the next batch of a segment; say whether there may be more in it."""
        spool = self._spool
        assert spool is not None  # noqa: S101 - the segment is its
        try:
            reading = spool.read(segment, limits)
        except OSError:
            return False
        if reading is None:
            spool.finish(segment)
            return False
        rest: Batch | None = reading.batch
        if len(reading.batch):
            rest = self._deliver(_Hand([reading.batch], segment, reading))
        if rest is None:
            return False  # somebody took it out of our hand
        spool.advance(segment, reading, rest)
        self._notices.delivered_from_spool(len(reading.batch) - len(rest))
        if len(rest):
            return False
        if segment.offset < segment.size:
            return True
        spool.finish(segment)
        return False

    def _put_off(self) -> None:
        """Put on disk what waits: nothing can be sent for now."""
        spool = self._spool
        if spool is None or not spool.usable:
            return
        spool.put_off()
        while len(batch := take(self.queues, self._limits, self.ledger)):
            if not self._keep(batch):
                break

    def _keep(self, batch: Batch, *, alone: bool = False) -> bool:
        """Put a batch that was not delivered on disk; if that cannot be, back to where it was."""
        if self._spool is not None and self._spool.store(batch, alone=alone):
            self._notices.spooled(len(batch))
            return True
        with self.ledger.lock:
            events = batch.events
            # The last first: each is put before what waits already.
            for share in reversed(batch.shares):
                events, own = events[: len(events) - share.count], events[len(events) - share.count :]
                share.account.put_back(share, own)
            self.ledger.settled.notify_all()
        return False

    def _deliver(self, hand: _Hand) -> Batch | None:
        """Send a batch until its outcome is final, in parts where it must be; return what could not be sent."""
        with self.ledger.lock:
            self._hand = hand
        try:
            self._send_all(hand)
        except Exception as fault:  # noqa: BLE001 - the events are not to blame: they are sent again
            self._notices.fault(fault)
            self._failed(RetryLater(f"a fault of its own, {type(fault).__name__}"))
        with self.ledger.lock:
            if self._hand is not hand:
                return None  # time was up, and somebody put it on disk
            self._hand = None
            return hand.rest()

    def _send_all(self, hand: _Hand) -> None:
        halvings, too_large, suspected, parts = 0, False, 0, hand.parts
        failure: RetryLater | None = None
        while parts and self._hand is hand:
            part = self._fitting(parts[-1])
            outcome = self._send(part)
            if isinstance(outcome, RetryLater):
                failure = outcome
                probe = self._breaker.failing
                if hand.segment is not None and hand.segment.suspect:
                    refused = self._judge_suspect(hand.segment, outcome)
                    if refused is None:
                        return
                    outcome = refused
                elif outcome.blame == "request" and len(part) > 1 and not probe and halvings < _MAX_HALVINGS:
                    halvings += 1
                    self._replace(parts, list(part.halves())[::-1])
                    continue
                elif (
                    outcome.blame != "destination"
                    and len(part) == 1
                    and suspected < _MAX_SUSPECTED
                    and self._suspect(hand, part)
                ):
                    suspected += 1
                    if probe:
                        break
                    continue
                else:
                    break
            failure, suspected = None, 0
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
                smaller = list(part.halves())[::-1]
            elif isinstance(outcome, TooLarge) and (shrunk := _shrunk(part, outcome.limit_bytes)) is not None:
                smaller = [shrunk]
            else:
                self._settle(hand, part, outcome)
                continue
            self._replace(parts, smaller)
        if failure is not None:
            self._failed(failure)

    def _replace(self, parts: list[Batch], smaller: list[Batch]) -> None:
        with self.ledger.lock:
            parts[-1:] = smaller

    def _suspect(self, hand: _Hand, event: Batch) -> bool:
        """Put a single event aside, on disk, that may be the reason why its request failed; say whether that worked."""
        with self.ledger.lock:
            if self._spool is None or self._hand is not hand:
                return False
            hand.parts.pop()
        if self._spool.store_suspect(event, self._successes):
            return True
        with self.ledger.lock:
            if self._hand is hand:
                hand.parts.append(event)
            else:  # time was up meanwhile
                for share in event.shares:
                    share.account.lose(share, "shutdown", in_flight=True)
        return False

    def _judge_suspect(self, segment: Segment, outcome: RetryLater) -> Refused | None:
        """Say whether an event that failed again is at fault: only if others have passed since it failed before."""
        assert self._spool is not None  # noqa: S101 - the segment is its
        if outcome.blame == "destination" or self._breaker.failing:
            self._failed(outcome)
            return None
        if self._successes > segment.failed_after:  # others have passed since
            segment.failed_after = self._successes
            segment.failures += 1
            if outcome.blame == "request" and segment.failures >= _MAX_FAILURES:
                return Refused(f"{outcome.reason}, again and again, while other events pass")
        segment.tries += 1
        self._spool.set_aside(segment, min(_SUSPECT_WAITS_S * 2**segment.tries, _SUSPECT_WAITS_AT_MOST_S))
        return None

    def _fitting(self, part: Batch) -> Batch:
        """Return the batch, but an event that no request may hold made smaller."""
        if len(part) == 1 and len(part.events[0]) > self._settings.max_batch_bytes - ENVELOPE_BYTES:
            return _shrunk(part, self._settings.max_batch_bytes) or part
        return part

    def _send(self, batch: Batch) -> Outcome:
        if self._abandoned:
            return RetryLater("shut down")
        left_s = self._deadline - self._clock() if self._deadline != float("inf") else None
        try:
            return self._transport.send(batch, timeout_s=left_s)
        except Exception as fault:  # noqa: BLE001 - whatever a transport meets, the events are not to blame
            self._notices.fault(fault)
            return RetryLater(f"a fault in sending, {type(fault).__name__}")

    def _learn_limit(self, max_bytes: int) -> None:
        self._limits = attrs.evolve(self._limits, max_bytes=min(self._limits.max_bytes, max(max_bytes, 1024)))

    def _settle(self, hand: _Hand, part: Batch, outcome: Delivered | Refused | TooLarge) -> None:
        """Enter the outcome of a part into the account, and the refused events into the dead letter."""
        if isinstance(outcome, Delivered):
            refused = {rejected.index: rejected.reason for rejected in outcome.rejected}
        else:
            reason = outcome.reason if isinstance(outcome, Refused) else "it is too large for the server"
            refused = dict.fromkeys(range(len(part)), reason)
        kept = True
        if refused and self._spool is not None:
            kept = self._spool.dead_letter.add((part.events[index], refused[index]) for index in sorted(refused))
        with self.ledger.lock:
            if self._hand is not hand:
                return
            hand.parts.pop()
            begin = 0
            for share in part.shares:
                end = begin + share.count
                share.account.settle(share, sum(begin <= index < end for index in refused) if refused else 0)
                begin = end
            self.ledger.settled.notify_all()
        self._successes += isinstance(outcome, Delivered)
        if self._breaker.failing:
            self._breaker.succeeded()
            self._notices.recovered()
        if refused:
            self._notices.rejected(len(refused), next(iter(refused.values())), kept=kept)

    def _failed(self, outcome: RetryLater) -> None:
        self._suspicious = outcome.blame != "destination"
        self._breaker.failed(outcome, urgent=self._closing or self._flushes > 0)
        if not self._abandoned:
            self._notices.failed(outcome, is_outage=self._breaker.open, since=self._breaker.failing_since)


#: After a fault of our own, so many seconds pass before the next try.
_FAULT_PAUSE_S = 1.0
#: A flush waits so long for another thread that is about to start the worker.
_START_WAIT_S = 5.0
#: So long the end waits for a thread that has nothing more to do.
_JOIN_S = 0.1


def _reserve_s(timeout_s: float) -> float:
    """Return how much of a timeout is kept for putting on disk what could not be delivered."""
    return min(0.1, timeout_s / 10)


def _shrunk(part: Batch, limit_bytes: int | None) -> Batch | None:
    """Return a batch of one event with less in it, or None if it cannot be made small enough."""
    (event,) = part.events
    most = len(event) // 2 if limit_bytes is None else min(limit_bytes - ENVELOPE_BYTES, len(event) - 1)
    smaller = shrink(event, most) if most > 0 else None
    return None if smaller is None else Batch((smaller,), part.shares)

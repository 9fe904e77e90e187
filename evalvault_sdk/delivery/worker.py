"""
Decide when something is delivered, and live and end with the process.

In:   events in the queues of all tracers that share this worker; the wish to flush or to end.
Out:  every event handed to the courier in time; at the end, what could not be delivered put on disk.

One daemon thread per worker, started by the first event. Only whoever runs `_run` touches the transport:
that thread, or at the very end of the interpreter, when no thread can be started any more, the one that
shuts down.

What is new goes first, then one batch of the backlog, and so in turn: neither starves the other. What could
not be delivered goes to disk at once, and so does, as long as the destination does not answer, all that comes.

Locks: only the ledger's is ever waited for without a limit, and never while another is held. A signal handler or
a finalizer may come at any line of the program's threads, with the ledger's lock held: so waiting is done on the
ledger's condition, which lets go of the lock.

A forked child has none of its parent's threads and all of its memory: its workers start over, empty, with
locks, files and a connection of their own; what waited at the fork is the parent's to deliver.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterable

import attrs

from evalvault_sdk.config import Settings
from evalvault_sdk.delivery import lifecycle
from evalvault_sdk.delivery.account import Ledger
from evalvault_sdk.delivery.batch import BatchLimits
from evalvault_sdk.delivery.courier import Courier
from evalvault_sdk.delivery.folder import default_root
from evalvault_sdk.delivery.notices import Notices
from evalvault_sdk.delivery.queue import EventQueue, Finish, QueueLimits, Wakeup
from evalvault_sdk.delivery.segment import Segment
from evalvault_sdk.delivery.spool import Spool
from evalvault_sdk.delivery.transport.base import Transport

#: So many events the first batch of a backlog has; each one that goes well doubles it.
_SLOW_START = 64
#: A batch that took no longer than this, or half a flush interval, keeps nobody waiting.
_QUICK_S = 0.25
#: So often the spool's folder is looked at, for what ended processes left.
_LOOK_AROUND_S = 5.0
#: More segments than this, freshly written by the program's threads, are a backlog.
_MAX_FRESH = 2
#: How much is put on disk at once.
_DISK_LIMITS = BatchLimits()
#: After a fault of our own, so many seconds pass before the next try.
_FAULT_PAUSE_S = 1.0
#: A flush waits so long for another thread that is about to start the worker.
_START_WAIT_S = 5.0
#: So long the end waits for a thread that has nothing more to do.
_JOIN_S = 0.05
#: An event that waits takes about so long to be finished and put on disk.
_FINISH_S = 8e-6
#: Near the end, whoever has nothing to do looks again after so many seconds.
_LAST_PAUSE_S = 0.02


class Worker:
    """The thread between the queues of one destination and its courier."""

    def __init__(
        self,
        transport: Transport,
        settings: Settings,
        *,
        on_unused: Callable[[Worker], None] = lambda worker: None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.ledger = Ledger()
        #: Changed only by appending and removing, which need no lock.
        self.queues: list[EventQueue] = []
        self._settings = settings
        self._on_unused = on_unused
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
        self._courier = Courier(transport, settings, self.ledger, self._spool, self._notices, clock=clock)
        self._breaker = self._courier.breaker
        self._closing = False
        self._start_over()
        lifecycle.made(self)

    def _start_over(self) -> None:
        """Make what belongs to one process: at first, and in a forked child."""
        self._wakeup = Wakeup()
        self._hurry = Wakeup()
        self._starting = threading.Lock()
        self._running = threading.Lock()
        self._thread: threading.Thread | None = None
        self._thread_ended = True
        self._finisher: int | None = None
        self._finished = False
        self._flushes = 0
        self._hurried = False
        self._backlog_events = _SLOW_START
        self._live_at = float("-inf")
        self._look_around_at = float("-inf")
        self._idle = True

    def after_fork_in_child(self) -> None:
        """Forget the parent's events, threads, locks, files and connection."""
        self.ledger.start_over()
        self._start_over()
        self._courier.start_over()
        self._notices.start_over()
        for queue in self.queues:
            queue.start_over(self._wakeup)
            queue.on_first_put = None if self._closing else self.start
        if self._spool is not None:
            self._spool.after_fork_in_child()
        with contextlib.suppress(Exception):
            self._courier.transport.after_fork_in_child()

    @property
    def destination(self) -> str:
        """Where events go."""
        return self._courier.transport.destination

    @property
    def closing(self) -> bool:
        """Whether it takes no more events."""
        return self._closing

    @property
    def shutdown_timeout_s(self) -> float:
        """How long its end may take."""
        return self._settings.shutdown_timeout_s

    @property
    def unused(self) -> bool:
        """Whether every tracer that used it is gone."""
        return all(queue.closed for queue in list(self.queues))

    @property
    def is_alive(self) -> bool:
        """Whether its thread runs."""
        return self._thread is not None and self._thread.is_alive() and not self._thread_ended

    @property
    def _is_here(self) -> bool:
        """Whether its thread is the one that asks."""
        return self._thread is threading.current_thread()

    # -- in the program's threads ---------------------------------------------------------------

    def open_queue(self, finish: Finish | None = None) -> EventQueue:
        """Return a new queue whose events this worker delivers; its drafts become events with `finish`."""
        self._prune()
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
            finish=finish,
        )
        queue.on_first_put = self.start
        queue.is_worker = lambda: self._is_here
        self.queues.append(queue)
        return queue

    def _prune(self) -> None:
        """Forget the queues that are closed and delivered."""
        for queue in list(self.queues):
            if queue.closed and not queue.account.pending:
                with contextlib.suppress(ValueError):  # another thread was faster
                    self.queues.remove(queue)

    def adopt_orphans(self) -> None:
        """Begin with what ended processes left for this destination, if there is anything."""
        if self._spool is not None and self._thread is None and self._spool.has_orphans():
            self.start()
            self._wakeup.set()

    def flush(self, queue: EventQueue, timeout_s: float) -> bool:
        """Deliver what was recorded into `queue` before this call; say whether all of it met its fate in time."""
        account, until = queue.account, self._clock() + timeout_s
        with self.ledger.lock:
            if not account.pending:
                return True
            if self._is_here or self._finished:
                return False  # who waits in a callback waits for itself, and after the end there is nothing to wait for
            self._flushes += 1
        try:
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
        if self.unused:
            self.close(timeout_s)
        self.speed_up()
        return self._closing

    def see_off(self, queue: EventQueue, timeout_s: float) -> None:
        """Wait until a closed queue is delivered; after `timeout_s` seconds put what is left of it on disk."""
        if self._closing:
            self.end()
        elif (
            not self.flush(queue, timeout_s - _reserve_s(timeout_s, len(queue.account.waiting)))
            and queue.account.in_memory
        ):
            self._rescue([queue])

    def brace(self, until: float) -> None:
        """Expect the end at any time: deliver what waits, or put it on disk, and from now on write a journal."""
        queues = list(self.queues)
        if self._spool is not None:
            for queue in queues:
                queue.begin_journal(self._spool)
        for queue in queues:
            if not self._breaker.failing:
                self.flush(queue, max(0.0, until - self._clock()))
        if self._spool is not None:
            self._rescue(queues)

    def close(self, timeout_s: float | None = None) -> None:
        """Take no more events, and let the thread end by itself when those taken are delivered."""
        queues = list(self.queues)
        for queue in queues:
            queue.close()
        timeout_s = self._settings.shutdown_timeout_s if timeout_s is None else timeout_s
        waiting = sum(len(queue.account.waiting) for queue in queues)
        # Whoever has less time decides: the end of the process does not wait for a long shutdown elsewhere.
        self._courier.deadline = min(self._courier.deadline, self._clock() + timeout_s - _reserve_s(timeout_s, waiting))
        self._closing = True
        self.speed_up()

    def end(self) -> None:
        """Wait until what was taken is delivered and the thread has ended, or time is up. `close` comes before."""
        if self._is_here:
            return  # a callback: the thread ends by itself
        if not self.is_alive:
            self._run_here(self._courier.deadline)
        settled = self.ledger.settled
        with self.ledger.lock:
            while self._pending() and not self._finished and (left_s := self._left_s()) > 0:
                settled.wait(min(left_s, 1.0))  # the deadline may come nearer meanwhile
        self._finish()
        with self.ledger.lock:
            settled.wait_for(lambda: self._thread_ended, _JOIN_S)
        if self._thread is not None and self._thread_ended:
            with contextlib.suppress(RuntimeError):  # not started yet: a signal handler ends what began just now
                self._thread.join(_JOIN_S)
        lifecycle.ended(self)

    def _left_s(self) -> float:
        return min(self._courier.deadline - self._clock(), threading.TIMEOUT_MAX)

    def speed_up(self) -> None:
        """Let the thread do what there is to do, now. Takes no lock."""
        self._hurried = True
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
                self._thread_ended = False
                try:
                    thread.start()
                except RuntimeError:
                    self._thread_ended = True
                    return  # the interpreter is ending: flush and shutdown deliver in their own thread
                finally:
                    lifecycle.started(self)
                self._thread = thread
            for queue in list(self.queues):
                queue.on_first_put = None
        finally:
            self._starting.release()

    def _run_here(self, until: float) -> None:
        """Deliver in the caller's thread, until then at most: no other could be started."""
        if self._running.acquire(blocking=False):
            deadline = self._courier.deadline
            self._courier.deadline = min(deadline, until)
            self._hurried = True
            try:
                while self._pending() and not self._out_of_time():
                    self._round()
                    pause_s = max(self._breaker.wait_s(ending=True), _LAST_PAUSE_S if self._idle else 0.0)
                    self._hurry.wait(min(pause_s, self._left_s()))
            finally:
                if not self._closing:
                    self._courier.deadline = deadline
                self._running.release()

    def _pending(self) -> bool:
        """Whether events of ours are not delivered yet."""
        with self.ledger.lock:
            return any(queue.account.pending for queue in list(self.queues))

    # -- the end of time ------------------------------------------------------------------------

    def _out_of_time(self) -> bool:
        return self._courier.stopped or self._clock() >= self._courier.deadline

    def _rescue(self, queues: Iterable[EventQueue], *, last: bool = False) -> None:
        """Put on disk what is in hand and what waits in `queues`; without a disk, count what waits there as lost."""
        courier, queues = self._courier, list(queues)
        # Without a disk, what others have in hand is better left there.
        for hand in courier.snatch() if last or self._spool is not None else []:
            courier.keep(hand, alone=True, last=last)
        while (hand := courier.take(queues, _DISK_LIMITS, last=last)) is not None:  # type: ignore[assignment]
            if not courier.keep(hand, alone=True, last=last or all(queue.closed for queue in queues)) and not last:
                break
        with self.ledger.lock:
            self.ledger.settled.notify_all()

    def _finish(self) -> None:
        """End for good: give up what is under way, put the rest on disk, leave that to the next process."""
        me, settled = threading.get_ident(), self.ledger.settled
        with self.ledger.lock:
            if self._finisher is not None and self._finisher != me:
                settled.wait_for(lambda: self._finished, max(0.0, self._left_s()) + 2 * _JOIN_S)
            if self._finished or (self._finisher is not None and self._finisher != me):
                return
            # It may be this very thread that is at it already, below a signal handler: then the rest is done here.
            self._finisher = me
            self._courier.stopped = True
        with contextlib.suppress(Exception):
            self._rescue(self.queues, last=True)
        if self._spool is not None:
            with contextlib.suppress(Exception):
                self._spool.close()
        with self.ledger.lock:
            left = sum(queue.account.spooled for queue in list(self.queues))
            self._finished = True
            settled.notify_all()
        self.speed_up()
        self._notices.tell_end(left)

    # -- in the worker's thread -----------------------------------------------------------------

    def _run(self) -> None:
        if not self._running.acquire(blocking=False):
            return
        began = self._clock()
        try:
            while not self._courier.stopped:
                try:
                    self._sleep()
                    self._round()
                    if not self._closing and self.unused:
                        self._on_unused(self)
                    if self._closing and (self._out_of_time() or not self._pending()):
                        self._finish()
                except Exception as fault:  # noqa: BLE001 - a bug of ours must end neither the thread nor the events
                    self._notices.fault(fault)
                    self._hurry.wait(_FAULT_PAUSE_S)
        finally:
            self._running.release()
            if self._courier.stopped:
                with contextlib.suppress(Exception):
                    self._courier.transport.close()
                lifecycle.ended(self)
            else:  # something has ended the thread: the next event, or if it was not the first thing, we, start another
                for queue in list(self.queues):
                    queue.on_first_put = self.start
            with self.ledger.lock:
                self._thread_ended = True
                self.ledger.settled.notify_all()
            if not self._courier.stopped and self._clock() - began > _FAULT_PAUSE_S:
                self.start()

    def _sleep(self) -> None:
        """Wait until there is something to do."""
        interval_s, spool = self._settings.flush_interval_s, self._spool
        wait_s = self._breaker.wait_s(ending=self._closing)
        if self._closing:
            pause_s = max(wait_s, _LAST_PAUSE_S if self._idle else 0.0)
            self._hurry.wait(max(0.0, min(pause_s, self._left_s())))
        elif not self._breaker.failing:
            if self._idle and not (spool is not None and spool.wants_more):
                self._wakeup.wait(interval_s)
        elif not wait_s and not self._idle:
            pass  # the next probe
        elif spool is None or not spool.usable:
            # Nothing to do before the next probe: a full queue must not wake us with every event.
            self._hurry.wait(wait_s or interval_s)
        else:
            self._wakeup.wait(min(wait_s or interval_s, interval_s))

    def _round(self) -> None:
        """Do once what there is to do: what is new, then a batch of the backlog."""
        now, spool = self._clock(), self._spool
        self._prune()
        if spool is not None and not self._closing and (now >= self._look_around_at or spool.wants_more):
            self._look_around_at = now + _LOOK_AROUND_S
            spool.look_around()
        urgent = self._courier.urgent = self._flushes > 0 or self._closing
        if self._hurried:
            self._hurried = False
            self._breaker.hurry()  # once: the next waits are short, but they are waits
        sent = False
        due = urgent or now - self._live_at >= self._settings.flush_interval_s or self._live_is_due()
        if due:
            self._live_at = now
        if self._breaker.failing:
            if due:
                self._put_off()
            if self._breaker.wait_s(ending=self._closing) <= 0:
                sent = self._deliver_backlog() or self._deliver_live()  # the probe
                if spool is not None and not self._breaker.failing:
                    spool.put_off(seal=True)  # what was written so far waits its turn: from here on the new goes first
        elif due:
            self._deliver_live()
        if not self._breaker.failing and not self._out_of_time():
            sent = self._deliver_backlog()
        self._idle = not sent
        self._notices.tell_losses()
        self._notices.tell_recovery()

    def _live_is_due(self) -> bool:
        queues = list(self.queues)
        return any(queue.due for queue in queues) or len(self.ledger.direct) >= self._settings.batch_events

    def _may_send(self) -> bool:
        return not self._breaker.failing and not self._out_of_time()

    def _deliver_live(self) -> bool:
        """Deliver what waits now; what comes meanwhile waits for a full batch or the next interval. Was there any?"""
        courier, spool, queues = self._courier, self._spool, list(self.queues)
        waiting = sum(len(queue.account.waiting) for queue in queues)
        sent = False
        while waiting > 0 and (not sent or self._may_send()):
            before = sum(queue.account.taken for queue in queues)
            hand = courier.take(queues, courier.limits)
            if hand is None:
                break
            waiting -= sum(queue.account.taken for queue in queues) - before
            sent = True
            courier.deliver(hand)
        for _ in range(_MAX_FRESH if spool is not None else 0):
            assert spool is not None  # noqa: S101 - asked before
            if (sent and not self._may_send()) or (segment := spool.take_fresh()) is None:
                break
            sent = True
            while self._deliver_from(segment, courier.limits) and self._may_send():
                pass
        if spool is not None:
            spool.put_off(more_than=0 if self._breaker.failing else _MAX_FRESH)
        return sent

    def _deliver_backlog(self) -> bool:
        """Deliver one batch of the oldest segment: small at first, larger as long as that is quick. Was there one?"""
        segment = self._spool.take_backlog(probe=self._breaker.failing) if self._spool is not None else None
        if segment is None:
            return False
        started, courier = self._clock(), self._courier
        limits = attrs.evolve(courier.limits, max_events=min(self._backlog_events, courier.limits.max_events))
        self._deliver_from(segment, limits)
        if self._breaker.failing:
            self._backlog_events = max(self._backlog_events // 2, 1 if courier.suspicious else _SLOW_START)
        elif self._clock() - started < max(self._settings.flush_interval_s / 2, _QUICK_S):
            self._backlog_events = min(self._backlog_events * 2, courier.limits.max_events)
        else:
            self._backlog_events = max(self._backlog_events // 2, _SLOW_START)
        return True

    def _deliver_from(self, segment: Segment, limits: BatchLimits) -> bool:
        """Deliver the next batch of a segment; say whether there may be more in it."""
        spool = self._spool
        assert spool is not None  # noqa: S101 - the segment is its
        try:
            hand = self._courier.take_from(segment, limits)
        except OSError:
            return False
        if hand is None:
            spool.finish(segment)
            return False
        if not self._courier.deliver(hand):
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
        while (hand := self._courier.take(list(self.queues), _DISK_LIMITS)) is not None:
            if not self._courier.keep(hand):
                break


def _reserve_s(timeout_s: float, waiting: int) -> float:
    """Return how much of a timeout is kept for putting on disk what could not be delivered."""
    return min(0.1, timeout_s / 10) + min(waiting * _FINISH_S, timeout_s / 4)

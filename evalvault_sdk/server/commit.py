"""
Store the events of many requests in few transactions.

In:   batches of valid events, from requests that are being answered at the same time.
Out:  for each batch a future, which holds what the store refused of it once the rest is durable.

A few threads (one, where the store writes one transaction at a time) take all that waits and store it
together: what arrives while one commit waits for the disk is the next one. What may wait is bounded.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import attrs

from evalvault_sdk.errors import StoreError
from evalvault_sdk.server.answers import come_again, logger
from evalvault_sdk.server.store.base import Incoming, Store

#: Events stored in one transaction; one request may have more.
_GROUP_EVENTS = 10_000
#: Events that may wait for one: some seconds' worth.
_MAX_WAITING_EVENTS = 100_000

#: Seconds that storing what waits may take at the end. Who sent it was told nothing yet, and will send it again.
_CLOSE_S = 20.0

Refused = Mapping[int, str]


@attrs.frozen
class _Waiting:
    events: Sequence[Incoming]
    done: Future[Refused]


class GroupCommit:
    """The one way into the store."""

    def __init__(
        self,
        store: Store,
        *,
        on_commit: Callable[[], None] = lambda: None,
        on_timed: Callable[[float], None] = lambda seconds: None,
        on_waiting: Callable[[int], None] = lambda events: None,
    ) -> None:
        """
        Store into `store`, with as many threads as it can use.

        `on_commit` is called after each transaction, `on_timed` with the seconds that it took, `on_waiting` with
        the number of events that wait whenever it changes; all in any thread.
        """
        self._on_waiting = on_waiting
        self._store = store
        self._on_commit = on_commit
        self._on_timed = on_timed
        self._waiting: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        #: Since when the store has failed; None while it works.
        self._failing_since: float | None = None
        self._threads: list[threading.Thread] = []
        #: Events that wait, or are being stored.
        self.waiting_events = 0

    def submit(self, events: Sequence[Incoming], *, continued: bool = False) -> Future[Refused]:
        """
        Have `events` stored; the future fails with `StoreError` if not all of them are known to be.

        Raises `ApiError` when too many wait already, unless these are `continued`: more of a body that was begun.
        """
        waiting = _Waiting(events, Future())
        with self._changed:
            room = continued or not self.waiting_events or self.waiting_events + len(events) <= _MAX_WAITING_EVENTS
            if self._closed or not room:
                raise come_again(
                    "Overloaded", "too many events wait to be stored; try again later", reason="overloaded"
                )
            self._waiting.append(waiting)
            self.waiting_events += len(events)
            self._start_threads()
            self._changed.notify()
        self._on_waiting(self.waiting_events)
        return waiting.done

    def open(self) -> None:
        """Begin again, after `close`."""
        with self._changed:
            if self._closed:
                self._closed, self._threads = False, []

    def close(self) -> None:
        """Store what waits, then end. What comes later is told to come again. A store that hangs is given up."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        deadline = time.monotonic() + _CLOSE_S
        for thread in self._threads:
            thread.join(max(deadline - time.monotonic(), 0))

    def _start_threads(self) -> None:
        # With the first batch, not before: a process may fork until then.
        while len(self._threads) < self._store.writers:
            name = f"evalvault-commit-{len(self._threads)}"
            thread = threading.Thread(target=self._run, name=name, daemon=True)
            thread.start()
            self._threads.append(thread)

    def _run(self) -> None:
        while group := self._take():
            started = time.perf_counter()
            try:
                self._save(group)
                self._on_timed(time.perf_counter() - started)
                self._on_commit()
            except Exception:  # noqa: BLE001 - whoever listens; storing must go on
                logger.exception("evalvault: storing met a fault of the server")
            finally:
                with self._changed:
                    self.waiting_events -= sum(len(waiting.events) for waiting in group)
                self._on_waiting(self.waiting_events)

    def _take(self) -> list[_Waiting]:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed)
            group: list[_Waiting] = []
            size = 0
            while self._waiting and (not group or size + len(self._waiting[0].events) <= _GROUP_EVENTS):
                group.append(self._waiting.popleft())
                group[-1].done.set_running_or_notify_cancel()  # from here on it is done, whoever waits for it
                size += len(group[-1].events)
            return group

    def _save(self, group: Sequence[_Waiting]) -> None:
        events = [event for waiting in group for event in waiting.events]
        try:
            refused = self._store.save(events)
        except StoreError as error:
            if self._failing_since is None:
                self._failing_since = time.monotonic()
                logger.error("evalvault: storing fails, and clients are told to come again: %s", error)
            for waiting in group:
                waiting.done.set_exception(error)
            return
        except BaseException as error:  # noqa: BLE001 - a fault of ours; each request is answered, the thread lives on
            if len(group) > 1:  # which the neighbours of the one that brings it about need not feel
                for waiting in group:
                    self._save([waiting])
            else:
                # What is no Exception would end the loop, or the thread, that asks for it.
                known = error if isinstance(error, Exception) else RuntimeError(f"{type(error).__name__} while storing")
                group[0].done.set_exception(known)
            return
        if self._failing_since is not None:
            logger.warning("evalvault: storing works again, after %.0f s", time.monotonic() - self._failing_since)
            self._failing_since = None
        start = 0
        for waiting in group:
            end = start + len(waiting.events)
            mine = {index - start: why for index, why in refused.items() if start <= index < end} if refused else {}
            waiting.done.set_result(mine)
            start = end

"""
Measure what a framework runs, from what it tells of it: that something began, and that it ended.

In:   a framework's own ids of what it runs and of what is around that, in whatever thread or task it tells them.
Out:  stages: each is recorded when its end is told. Stages of the program's own code find the observed one that
      they run in, and observed ones the program's stage that they run in.
In the framework's threads and tasks. Never raises, never waits, and keeps a bounded number of what never ends.
"""

from __future__ import annotations

import itertools
import os
import weakref
from collections.abc import Callable, Hashable, Mapping
from contextvars import ContextVar
from typing import Any

from evalvault_sdk.capture.clock import clock
from evalvault_sdk.capture.context import Scope, add_finder, here, remove_finder
from evalvault_sdk.capture.given import Given
from evalvault_sdk.capture.recorder import Recorder
from evalvault_sdk.capture.stage import StageContext
from evalvault_sdk.capture.stages import Stages

#: So many that have ended are known still: what they began may go on, a stream that is read later for example.
_MAX_ENDED = 4_096
#: What an end that nobody told of is recorded with, as `cancelled_by`.
EVICTED = "never_ended"


#: The stages that were entered, the innermost first; ended ones are passed over.
_Entered = tuple["weakref.ref[StageContext]", Any]
_entered: ContextVar[_Entered | None] = ContextVar("evalvault_entered", default=None)


def _innermost(entered: _Entered | None, recorder: Recorder | None = None) -> _Entered | None:
    """Return what is left of them from the innermost open one on, which is `recorder`'s if that is given."""
    while entered is not None:
        stage = entered[0]()
        if stage is not None and stage._open and (recorder is None or stage._recorder is recorder):
            return entered
        entered = entered[1]
    return None


class ObservedStages:
    """
    The stages of one framework.

    `find` returns the framework's id of what the code runs in, from the framework's own context; None outside.
    With more than `max_open` open, or one open for more than `max_open_s` seconds, the oldest is taken to have no
    end: it is recorded as `cancelled`, with `cancelled_by="never_ended"`.
    """

    def __init__(
        self,
        stages: Stages,
        find: Callable[[], Hashable | None] | None = None,
        *,
        max_open: int = 10_000,
        max_open_s: float = 3_600.0,
    ) -> None:
        self._recorder: Recorder = stages._recorder
        self._find = find
        self._max_open = max_open
        self._max_open_ns = int(max_open_s * 1e9)
        # No lock: each change is one step of a dict.
        self._open: dict[Hashable, StageContext] = {}
        self._known: dict[Hashable, Scope] = {}
        self._pid = os.getpid()

    def __len__(self) -> int:
        """How many are open."""
        return len(self._open)

    def attach(self) -> None:
        """Let the program's own stages find the observed ones that they run in."""
        if self._find is not None:
            add_finder(self._scope_here)

    def detach(self) -> None:
        """Undo `attach`."""
        remove_finder(self._scope_here)

    def begin(
        self,
        key: Hashable,
        parent_key: Hashable | None,
        stage_type: str,
        *,
        stage_name: str | None = None,
        attributes: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        trace_id: str | None = None,
        parent_stage_id: str | None = None,
    ) -> StageContext | None:
        """
        Begin the stage of what the framework calls `key`, below that of `parent_key`; None if nothing is recorded.

        Where the parent is not known, or the program opened a stage of its own inside the parent, that is the parent
        which the code runs in.
        """
        if not self._recorder.enabled:
            return None
        try:
            given = Given(
                stage_name=stage_name,
                parent_stage_id=parent_stage_id,
                trace_id=trace_id,
                attributes=attributes,
                metadata=metadata,
            )
            stage = _ObservedStage(self._recorder, stage_type, given)
            stage._start(self._around(parent_key))
            self._open[key] = stage
            self._evict()
            return stage
        except Exception as error:  # noqa: BLE001 - the host program must not feel our faults
            self._recorder.fault("beginning an observed stage", error)
            return None

    def enter(self, stage: StageContext) -> None:
        """
        Take it that what this code goes on to do runs in `stage`, until that ends.

        For what a framework runs in the context in which it told of the beginning, without a variable of its own.
        """
        _entered.set((weakref.ref(stage), _innermost(_entered.get())))

    def leave_out(self, key: Hashable, parent_key: Hashable | None) -> None:
        """Make no stage of `key`: what runs in it is below `parent_key`. Its end may be told, and need not be."""
        if self._recorder.enabled:
            scope = self._around(parent_key)
            if scope is not None:
                self._remember(key, scope)

    def get(self, key: Hashable) -> StageContext | None:
        """Return the open stage of `key`."""
        return self._open.get(key)

    def knows(self, key: Hashable | None) -> bool:
        """Whether `key` was begun, or left out, not too long ago."""
        return key in self._open or key in self._known

    def take(self, key: Hashable) -> StageContext | None:
        """Take the open stage of `key` out: to whoever has it, it is up to record it, when more is known of it."""
        stage = self._open.pop(key, None)
        if stage is not None:
            self._remember(key, _Ended(stage))
        elif isinstance(around := self._known.get(key), StageContext):  # it was left out
            self._known[key] = _Ended(around)
        return stage

    def end(self, key: Hashable, error: BaseException | None = None) -> None:
        """Record the stage of `key`, which ended now, with `error` or without. What is not open is left alone."""
        ended_perf_ns = clock.perf_counter_ns()
        stage = self.take(key)
        if stage is not None:
            stage._end(error, ended_perf_ns)

    def close(self, why: str = EVICTED) -> None:
        """End all that is open as `cancelled`."""
        for key in list(self._open):
            self._cancel(key, why)

    def _cancel(self, key: Hashable, why: str) -> None:
        stage = self._open.get(key)
        if stage is not None:
            stage.status = "cancelled"
            stage.set(cancelled_by=why)
            self.end(key)

    def _around(self, parent_key: Hashable | None) -> Scope | None:
        """Return the scope of what begins now."""
        scope = here()
        parent = self._scope_of(parent_key) if parent_key is not None else None
        if parent is None:
            return scope
        near = scope
        while near is not None and not near._is_observed:
            near = near._outer
        # What another thing was pulled by, as the steps of a stream are by the last one, is not what is around it.
        return scope if near is not None and near.stage_id == parent.stage_id else parent

    def _scope_of(self, key: Hashable) -> Scope | None:
        return self._open.get(key) or self._known.get(key)

    def _scope_here(self) -> Scope | None:
        key = self._find() if self._find is not None else None
        scope = None if key is None else self._scope_of(key)
        if scope is not None and not scope._open:
            scope = None
        entered = _innermost(_entered.get(), self._recorder)
        stage = None if entered is None else entered[0]()
        return scope if stage is None or stage.is_around(scope) else stage

    def _remember(self, key: Hashable, scope: Scope) -> None:
        known = self._known
        known[key] = scope
        if len(known) > _MAX_ENDED:
            for old in _first(known, len(known) - _MAX_ENDED):
                known.pop(old, None)

    def _evict(self) -> None:
        """Give up the oldest if there are too many, or if they are too old."""
        if self._pid != os.getpid():  # what the parent process had open is for the parent to record
            self._pid = os.getpid()
            for key in list(self._open)[:-1]:
                self._open.pop(key, None)
            return
        oldest_ns = clock.perf_counter_ns() - self._max_open_ns
        for key in _first(self._open, max(1, len(self._open) - self._max_open)):
            stage = self._open.get(key)
            if stage is not None and (len(self._open) > self._max_open or stage._started_perf_ns < oldest_ns):
                self._cancel(key, EVICTED)


class _ObservedStage(StageContext):
    """A stage that a framework begins and ends."""

    __slots__ = ("__weakref__",)

    _is_observed = True


class _Ended(Scope):
    """What is kept of a stage that has ended: its place, none of its content."""

    __slots__ = ()

    _is_observed = True

    def __init__(self, stage: StageContext) -> None:
        self._recorder, self._trace = stage._recorder, stage._trace
        self._made_of, self._stage_id, self._span_id = stage._made_of, stage._stage_id, stage._span_id
        self._outer = self._before = None
        self._open = False


def _first(mapping: Mapping[Hashable, object], count: int) -> list[Hashable]:
    try:
        return list(itertools.islice(mapping, count))
    except RuntimeError:  # another thread put something in meanwhile: next time
        return []

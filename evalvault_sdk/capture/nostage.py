"""
Stand in for a stage where nothing is recorded.

In:   code that asks for the current stage where there is none, or for a stage of a tracer that is switched off.
Out:  an object that takes everything a stage does, keeps nothing and costs next to nothing.
Caller's thread.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from evalvault_sdk.capture.context import here
from evalvault_sdk.capture.recorder import Note, Recorder, RefusalReason
from evalvault_sdk.capture.stage import StageContext

T = TypeVar("T")


class _Nowhere:
    """A sink for stages that nobody measures."""

    closed = False

    def put(self, event: bytes) -> bool:
        return False

    def refuse(self, reason: RefusalReason) -> None:
        pass

    def note(self, what: Note, count: int = 1) -> None:
        pass


NOWHERE = Recorder("", _Nowhere())


class _NoStage(StageContext):
    """What takes everything a stage does, keeps nothing and costs next to nothing: one object for all."""

    __slots__ = ()

    stage_type, status, attempt = "none", "success", 1
    stage_name = input_ref = output_ref = None
    stage_id = span_id = trace_id = parent_stage_id = property(lambda _: None)
    #: A new one at each look: what is put in goes nowhere.
    attributes = metadata = property(lambda _: {}, lambda _, value: None)

    def __init__(self) -> None:
        pass

    def __setattr__(self, name: str, value: Any) -> None:
        pass

    def __copy__(self) -> StageContext:
        return self

    def __deepcopy__(self, memo: object) -> StageContext:
        return self

    def __enter__(self) -> StageContext:
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        pass

    def __call__(self, function: T) -> T:
        return function

    def set(self, /, **attributes: Any) -> None:
        pass

    def fail(self, reason: str, *, kind: str = "Error") -> None:
        pass

    def skip(self, reason: str | None = None) -> None:
        pass

    def save_input(self, value: Any) -> None:
        pass

    def save_output(self, value: Any) -> None:
        pass


NO_STAGE: StageContext = _NoStage()


class _Dormant(_NoStage):
    """The same, but that what it decorates is measured once there is something to record with."""

    __slots__ = ("_make",)

    _make: Callable[[], StageContext]

    def __init__(self, make: Callable[[], StageContext]) -> None:
        _Dormant._make.__set__(self, make)  # type: ignore[attr-defined,misc]  # below `__setattr__`, which keeps nothing

    def __call__(self, function: T) -> T:
        return self._make()(function)


def dormant(make: Callable[[], StageContext]) -> StageContext:
    """Return what stands for the stage that `make` makes while its recorder is switched off."""
    return _Dormant(make)


def current_stage() -> StageContext:
    """
    Return the stage that this code runs in, so that code below a decorator can say what it learnt.

    Where there is none (at the top of a trace, too) it is one that is recorded nowhere: the code need not ask.
    """
    scope = here()
    return scope if isinstance(scope, StageContext) else NO_STAGE

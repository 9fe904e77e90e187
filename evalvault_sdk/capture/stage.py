"""
Measure a stage: a with-block or a decorator around the code that does the work.

In:   the start and the end of a block of the user's code, and what that code tells about itself.
Out:  one event for the recorder when the block ends, whether it returned or raised.
Caller's thread or task. The block's exceptions pass through unchanged; ours never reach it.
"""

from __future__ import annotations

import copy
import functools
import inspect
from collections.abc import Callable, Mapping
from time import perf_counter_ns, time_ns
from types import TracebackType
from typing import Any, TypeGuard, TypeVar, cast

from evalvault_sdk.capture.context import open_stage
from evalvault_sdk.capture.encode import iso_time
from evalvault_sdk.capture.recorder import Recorder, RefusalReason
from evalvault_sdk.errors import describe_error
from evalvault_sdk.events import StagePayloadRef
from evalvault_sdk.ids import new_stage_id, span_id_of, trace_id_of

F = TypeVar("F", bound=Callable[..., Any])


class StageContext:
    """
    One stage being measured: what `StageTracer.stage()` gives.

    As `with` or `async with`, entering starts the clock and makes the stage the parent of stages opened
    inside; leaving records it. As a decorator, every call is a stage of its own. What the code learns on
    the way goes into `attributes`, `metadata`, `stage_name`, `status`, `input_ref` and `output_ref`, which
    may be changed until the block is left. Entering the same object again records another stage, with what was
    given when it was made.
    """

    __slots__ = (
        "_given",
        "_open",
        "_outer",
        "_recorder",
        "_started_ns",
        "_started_perf_ns",
        "_template",
        "_trace_id",
        "attempt",
        "attributes",
        "input_ref",
        "metadata",
        "output_ref",
        "parent_stage_id",
        "span_id",
        "stage_id",
        "stage_name",
        "stage_type",
        "status",
        "trace_id",
    )

    #: What the stage did. Assign a new dict or add keys; read when the block is left.
    attributes: dict[str, Any]
    #: What it ran under.
    metadata: dict[str, Any]
    #: The ids: None until the block is entered.
    stage_id: str | None
    trace_id: str | None
    span_id: str | None
    parent_stage_id: str | None

    def __init__(
        self,
        recorder: Recorder,
        stage_type: str,
        *,
        stage_name: str | None = None,
        parent_stage_id: str | None = None,
        trace_id: str | None = None,
        attempt: int = 1,
        attributes: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        input_ref: StagePayloadRef | Mapping[str, str] | None = None,
        output_ref: StagePayloadRef | Mapping[str, str] | None = None,
    ) -> None:
        self._recorder = recorder
        self.stage_type = stage_type
        self._given = (stage_name, parent_stage_id, trace_id, attempt, attributes, metadata, input_ref, output_ref)
        self.stage_name = stage_name
        self.parent_stage_id = parent_stage_id
        self._trace_id = trace_id
        self.attempt = attempt
        self.attributes = {} if attributes is None else as_object(attributes).copy()
        self.metadata = {} if metadata is None else as_object(metadata).copy()
        self.input_ref = input_ref
        self.output_ref = output_ref
        self.status = "success"
        self.stage_id = self.trace_id = self.span_id = None
        self._open = False
        self._outer: StageContext | None = None
        self._template: StageContext = self

    def set(self, **attributes: Any) -> None:
        """Add attributes: `stage.set(query=query, top_k=5)`."""
        if type(self.attributes) is not dict:
            self.attributes = as_object(self.attributes).copy()
        self.attributes.update(attributes)

    def fail(self, reason: str, *, kind: str = "Error") -> None:
        """Record the stage as failed although the block does not raise."""
        self.status = "error"
        self.set(error={"type": kind, "message": reason})

    def __enter__(self) -> StageContext:
        if self._open:
            # In a recursion, or in another thread: each entry is a stage with a clock of its own.
            return self._again().__enter__()
        self._open = True
        if self.stage_id is not None:
            self._start_over()
        started_ns = time_ns()
        stage_id = new_stage_id(started_ns)
        self.stage_id = stage_id
        self.span_id = span_id_of(stage_id)
        self._outer = outer = open_stage.get()
        self.parent_stage_id, self.trace_id = parent_and_trace(
            outer, self._recorder.run_id, stage_id, self.parent_stage_id, self._trace_id
        )
        self._started_ns = started_ns
        open_stage.set(self)
        self._started_perf_ns = perf_counter_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ended_perf_ns = perf_counter_ns()
        stage = open_stage.get()
        if stage is not self:
            # Left out of order, or entered more than once: the innermost open stage of this context that
            # came from this object; where there is none (left in another context), this object itself.
            while stage is not None and not (stage._open and stage._template is self):
                stage = stage._outer
            if stage is None:
                stage = self
        if stage._open:
            stage._exit(error, ended_perf_ns)

    def _exit(self, error: BaseException | None, ended_perf_ns: int) -> None:
        self._open = False
        if open_stage.get() is self:
            outer = self._outer
            while outer is not None and not outer._open and outer._outer is not None:
                outer = outer._outer  # ended before this one: back to the nearest that still runs
            open_stage.set(outer)
        try:
            if error is not None:
                self.status = "error"
                self.attributes = {**as_object(self.attributes), "error": describe_error(error)}
            self._recorder.record(self._fields(ended_perf_ns - self._started_perf_ns))
        except Exception as fault:  # noqa: BLE001 - what a user assigned to our fields
            self._recorder.fault("ending a stage", fault)

    async def __aenter__(self) -> StageContext:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)

    def __call__(self, function: F) -> F:
        """Decorate a function or a coroutine function: every call becomes a stage of its own."""
        name = self.stage_name or getattr(function, "__qualname__", type(function).__qualname__)
        # What is called in the end: below partials, and of an object its method.
        called: Any = function
        while isinstance(called, functools.partial):
            called = called.func
        if not inspect.isroutine(called):
            called = getattr(called, "__call__", called)  # noqa: B004
        if inspect.isgeneratorfunction(called) or inspect.isasyncgenfunction(called):
            # Measuring only the call that makes the generator would record a false duration.
            raise TypeError(
                f"{name} is a generator: it cannot be decorated yet; "
                "put `with tracer.stage(...)` around the work inside it"
            )

        if inspect.iscoroutinefunction(called):

            @functools.wraps(function)
            async def measured_coroutine(*args: Any, **kwargs: Any) -> Any:
                with self._again(name):
                    return await function(*args, **kwargs)

            return cast(F, measured_coroutine)

        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            with self._again(name):
                return function(*args, **kwargs)

        return cast(F, measured)

    def _start_over(self) -> None:
        """Forget what the last time in this block set."""
        self.stage_name, self.parent_stage_id, _, self.attempt, attributes, metadata, ref_in, ref_out = self._given
        self.attributes = as_object(_snapshot(attributes)).copy()
        self.metadata = as_object(_snapshot(metadata)).copy()
        self.input_ref, self.output_ref, self.status = ref_in, ref_out, "success"

    def _again(self, name: str | None = None) -> StageContext:
        """Return a stage as this one was when it was made, not entered yet."""
        stage_name, parent_stage_id, trace_id, attempt, attributes, metadata, input_ref, output_ref = self._given
        again = StageContext(
            self._recorder,
            self.stage_type,
            stage_name=name or stage_name,
            parent_stage_id=parent_stage_id,
            trace_id=trace_id,
            attempt=attempt,
            attributes=_snapshot(attributes),
            metadata=_snapshot(metadata),
            input_ref=input_ref,
            output_ref=output_ref,
        )
        again._template = self
        return again

    def _fields(self, elapsed_ns: int) -> dict[str, Any]:
        started_ns = self._started_ns
        fields: dict[str, Any] = {
            "run_id": self._recorder.run_id,
            "stage_id": self.stage_id,
            "stage_type": self.stage_type,
            "status": self.status,
            "started_at": iso_time(started_ns),
            # From the monotonic clock: a step of the wall clock cannot make a stage end before it began.
            "finished_at": iso_time(started_ns + elapsed_ns),
            "duration_ms": elapsed_ns / 1_000_000,
            "attributes": as_object(self.attributes),
            "trace_id": self.trace_id,
            "span_id": self.span_id,
        }
        if self.parent_stage_id is not None:
            fields["parent_stage_id"] = self.parent_stage_id
        if self.stage_name is not None:
            fields["stage_name"] = self.stage_name
        if self.attempt != 1:
            fields["attempt"] = self.attempt
        metadata = as_object(self.metadata)
        if metadata:
            fields["metadata"] = metadata
        if self.input_ref is not None:
            fields["input_ref"] = as_reference(self.input_ref)
        if self.output_ref is not None:
            fields["output_ref"] = as_reference(self.output_ref)
        return fields


class _Nowhere:
    """A sink for stages that nobody measures."""

    closed = False

    def put(self, event: bytes) -> bool:
        return False

    def refuse(self, reason: RefusalReason) -> None:
        pass


NOWHERE = Recorder("nowhere", _Nowhere())


def current_stage() -> StageContext:
    """
    Return the innermost open stage, so that code below a decorator can say what it learnt.

    Where no stage is open it is one that is recorded nowhere: the code need not ask.
    """
    return open_stage.get() or StageContext(NOWHERE, "none")


def parent_and_trace(
    outer: StageContext | None, run_id: str, stage_id: str, parent_id: str | None, trace_id: str | None
) -> tuple[str | None, str]:
    """
    Return the parent and the trace of a new stage: what was given, else those of the stage around it.

    A trace goes through all runs that a request touches; a parent is one only within the same run, since
    that is where EvalVault looks it up. A given parent tells its trace by its id if it opened that trace;
    of any other the caller has to give `trace_id` too, unless the stage around it is of the same trace.
    """
    if outer is None:
        if trace_id is None:
            trace_id = trace_id_of(parent_id if _is_our_id(parent_id) else stage_id)
        return parent_id, trace_id
    if parent_id is None and outer._recorder.run_id == run_id:
        parent_id = outer.stage_id
    return parent_id, trace_id or outer.trace_id or trace_id_of(stage_id)


def _is_our_id(value: object) -> TypeGuard[str]:
    if not isinstance(value, str) or len(value) != 36 or value[14] != "7":
        return False
    digits = value.replace("-", "")
    return len(digits) == 32 and not digits.strip("0123456789abcdef")


def as_object(value: Any) -> dict[str, Any]:
    """Return attributes or metadata as the JSON object that the contract asks for, whatever was assigned."""
    if type(value) is dict:
        return value
    if value is None:
        return {}
    try:
        return dict(value) if isinstance(value, Mapping) else {"value": value}
    except Exception:  # noqa: BLE001 - a mapping of a user's own making
        return {"value": value}


def as_reference(value: StagePayloadRef | Mapping[str, str]) -> Any:
    """Return a payload reference as its JSON object; what is none is left for the server to refuse by name."""
    return value.to_dict() if isinstance(value, StagePayloadRef) else value


def _snapshot(given: Any) -> Any:
    """Return a copy that shares no list with what was given: calls must not see each other's appends."""
    try:
        return None if given is None else copy.deepcopy(given)
    except Exception:  # noqa: BLE001 - something in it cannot be copied
        return given

"""
Measure a stage: a with-block or a decorator around the code that does the work.

In:   the start and the end of a block of the user's code, and what that code tells about itself.
Out:  one event for the recorder when the block ends, whether it returned or raised.
Caller's thread or task. The block's exceptions pass through unchanged; ours never reach it.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from contextvars import Token
from time import perf_counter_ns, time_ns
from types import TracebackType
from typing import Any, TypeVar, cast

from evalvault_sdk.capture.context import open_stage
from evalvault_sdk.capture.encode import describe_error, iso_time
from evalvault_sdk.capture.recorder import Recorder, RefusalReason
from evalvault_sdk.events import StagePayloadRef
from evalvault_sdk.ids import new_stage_id, span_id_of, trace_id_of

F = TypeVar("F", bound=Callable[..., Any])


class StageContext:
    """
    One stage being measured: what `StageTracer.stage()` gives.

    As `with` or `async with`, entering starts the clock and makes the stage the parent of stages opened
    inside; leaving records it. As a decorator, every call is a stage of its own. What the code learns on
    the way goes into `attributes`, `metadata`, `stage_name`, `status`, `input_ref` and `output_ref`, which
    may be changed until the block is left. Entering the same object again records another stage.
    """

    __slots__ = (
        "_given_attributes",
        "_given_metadata",
        "_given_parent_id",
        "_given_trace_id",
        "_inner",
        "_recorder",
        "_started_ns",
        "_started_perf_ns",
        "_token",
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
        input_ref: StagePayloadRef | None = None,
        output_ref: StagePayloadRef | None = None,
    ) -> None:
        self._recorder = recorder
        self.stage_type = stage_type
        self.stage_name = stage_name
        self._given_parent_id = parent_stage_id
        self._given_trace_id = trace_id
        self.attempt = attempt
        self._given_attributes = attributes
        self._given_metadata = metadata
        self.attributes = dict(attributes) if attributes else {}
        self.metadata = dict(metadata) if metadata else {}
        self.input_ref = input_ref
        self.output_ref = output_ref
        self.status = "success"
        self.stage_id = self.trace_id = self.span_id = None
        self.parent_stage_id = parent_stage_id
        self._token: Token[StageContext | None] | None = None
        self._inner: list[StageContext] | None = None

    def set(self, **attributes: Any) -> None:
        """Add attributes: `stage.set(query=query, top_k=5)`."""
        self.attributes.update(attributes)

    def fail(self, reason: str, *, kind: str = "Error") -> None:
        """Record the stage as failed although the block does not raise."""
        self.status = "error"
        self.attributes["error"] = {"type": kind, "message": reason}

    def __enter__(self) -> StageContext:
        if self.stage_id is not None:
            if self._token is not None:
                # Entered while open, as in a recursion: each entry is a stage with a clock of its own.
                inner = self._again()
                self._inner = [*(self._inner or ()), inner]
                return inner.__enter__()
            self.status = "success"
            self.attributes = dict(self._given_attributes or ())
            self.metadata = dict(self._given_metadata or ())
        started_ns = time_ns()
        stage_id = new_stage_id(started_ns)
        self.stage_id = stage_id
        self.span_id = span_id_of(stage_id)
        self.parent_stage_id, self.trace_id = parent_and_trace(
            self._recorder.run_id, stage_id, self._given_parent_id, self._given_trace_id
        )
        self._started_ns = started_ns
        self._token = open_stage.set(self)
        self._started_perf_ns = perf_counter_ns()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._inner:
            return self._inner.pop().__exit__(kind, error, traceback)
        elapsed_ns = perf_counter_ns() - self._started_perf_ns
        token, self._token = self._token, None
        try:
            if token is not None:
                open_stage.reset(token)
        except (ValueError, RuntimeError):
            # Left in another context than it was entered in; that context keeps what it had.
            pass
        try:
            if error is not None:
                self.status = "error"
                self.attributes = {**as_object(self.attributes), "error": describe_error(error)}
            self._recorder.record(self._fields(elapsed_ns))
        except Exception as fault:  # noqa: BLE001 - attributes that are no mapping, say
            self._recorder.fault("ending a stage", fault)

    async def __aenter__(self) -> StageContext:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)

    def __call__(self, function: F) -> F:
        """Decorate a function or a coroutine function: every call becomes a stage of its own."""
        if inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function):
            # Measuring only the call that makes the generator would record a false duration.
            raise TypeError(
                f"{function.__qualname__} is a generator: it cannot be decorated yet; "
                "put `with tracer.stage(...)` around the work inside it"
            )
        name = self.stage_name or getattr(function, "__qualname__", None)

        if inspect.iscoroutinefunction(function):

            @functools.wraps(function)
            async def measured_coroutine(*args: Any, **kwargs: Any) -> Any:
                with self._again(name):
                    return await function(*args, **kwargs)

            return cast("F", measured_coroutine)

        @functools.wraps(function)
        def measured(*args: Any, **kwargs: Any) -> Any:
            with self._again(name):
                return function(*args, **kwargs)

        return cast("F", measured)

    def _again(self, name: str | None = None) -> StageContext:
        """Return a stage like this one was when it was made, not entered yet."""
        return StageContext(
            self._recorder,
            self.stage_type,
            stage_name=name or self.stage_name,
            parent_stage_id=self._given_parent_id,
            trace_id=self._given_trace_id,
            attempt=self.attempt,
            attributes=self._given_attributes,
            metadata=self._given_metadata,
            input_ref=self.input_ref,
            output_ref=self.output_ref,
        )

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
        if self.metadata:
            fields["metadata"] = as_object(self.metadata)
        if self.input_ref is not None:
            fields["input_ref"] = self.input_ref.to_dict()
        if self.output_ref is not None:
            fields["output_ref"] = self.output_ref.to_dict()
        return fields


class _Nowhere:
    """A sink for stages that nobody measures."""

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


def parent_and_trace(run_id: str, stage_id: str, parent_id: str | None, trace_id: str | None) -> tuple[str | None, str]:
    """
    Return the parent and the trace of a new stage: what was given, else those of the open stage around it.

    A trace goes through all runs that a request touches; a parent is one only within the same run, since
    that is where EvalVault looks it up.
    """
    around = open_stage.get()
    if around is None:
        if trace_id is None:
            # A parent made by us that opened its trace tells the trace by its id.
            trace_id = trace_id_of(parent_id if parent_id is not None and _is_uuid_text(parent_id) else stage_id)
        return parent_id, trace_id
    if parent_id is None and around._recorder.run_id == run_id:
        parent_id = around.stage_id
    return parent_id, trace_id or around.trace_id or trace_id_of(stage_id)


def _is_uuid_text(text: str) -> bool:
    return isinstance(text, str) and len(text) == 36 and text[8] == text[13] == text[18] == text[23] == "-"


def as_object(value: Any) -> dict[str, Any]:
    """Return attributes or metadata as the JSON object that the contract asks for, whatever was assigned."""
    if type(value) is dict:
        return value
    if value is None:
        return {}
    return dict(value) if isinstance(value, Mapping) else {"value": value}

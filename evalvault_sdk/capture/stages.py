"""
The ways to record a stage: what a tracer, and the package itself, have in common.

In:   the user's calls, in any thread or task.
Out:  stages to measure code with; events for the recorder.
Nothing here raises, but for `TypeError` when something is decorated that is not called.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, overload

from evalvault_sdk.capture.bind import bind
from evalvault_sdk.capture.call import Call, CallCapture
from evalvault_sdk.capture.clock import clock
from evalvault_sdk.capture.context import Scope, Trace, as_id, has_begun, here, is_in_stage_of, place
from evalvault_sdk.capture.draft import iso_time
from evalvault_sdk.capture.given import Given, as_object, as_reference
from evalvault_sdk.capture.nostage import NO_STAGE, dormant
from evalvault_sdk.capture.propagate import current_span
from evalvault_sdk.capture.recorder import Recorder
from evalvault_sdk.capture.stage import StageContext
from evalvault_sdk.capture.trace import TraceContext
from evalvault_sdk.errors import InvalidStageEventError
from evalvault_sdk.ids import new_stage_id, span_id_of, trace_id_of
from evalvault_sdk.late import load

if TYPE_CHECKING:
    from datetime import datetime

    from evalvault_sdk.events import StageEvent, StagePayloadRef

F = TypeVar("F", bound=Callable[..., Any])

#: A stage that took longer (30 years) gets no derived start: it would lie before the calendar's.
_LONGEST_MS = 1e12


class Stages:
    """Records stages with one recorder."""

    #: Whether what is decorated while nothing is recorded need not be recorded later, either.
    _stays_off = True
    #: Whether stages are made although nothing is recorded: for decorators that wait for that.
    _is_dormant = False

    def __init__(self, recorder: Recorder) -> None:
        self._recorder = recorder

    @overload
    def stage(self, stage_type: F, /) -> F: ...

    @overload
    def stage(
        self,
        stage_type: str | None = None,
        *,
        stage_name: str | None = None,
        parent: Scope | None = None,
        parent_stage_id: str | None = None,
        trace_id: str | None = None,
        attempt: int = 1,
        attributes: Mapping[str, Any] | Callable[[Call], Mapping[str, Any] | None] | None = None,
        metadata: Mapping[str, Any] | None = None,
        input_ref: StagePayloadRef | Mapping[str, str] | None = None,
        output_ref: StagePayloadRef | Mapping[str, str] | None = None,
        capture_args: bool | Sequence[str] = False,
        capture_result: bool = False,
        on_result: Callable[[Any], Mapping[str, Any] | None] | None = None,
    ) -> StageContext: ...

    def stage(self, stage_type: Any = None, **given: Any) -> Any:
        """
        Measure a stage: use the result as `with`, `async with`, or as a decorator of anything that is called.

        `@tracer.stage` alone, or without a type, takes the function's name as the type. The stage open around it
        becomes its parent, unless `parent` is given, or `parent_stage_id` (which, if that is neither open here nor
        the root of its trace, wants its `trace_id` too). An exception is recorded as `status="error"` with its type
        and message, a cancellation as `"cancelled"`; both pass through unchanged.

        A stream (a generator or an async generator) is one stage from its first step to its end, with `item_count` and
        `time_to_first_item_ms` among its attributes.

        Of the calls of a decorated function nothing is recorded but what is asked for: `capture_args` puts all
        arguments, or those named, among the attributes, under the names of their parameters; `capture_result` the
        result, as `result` (of a stream its items, texts joined); `attributes` may be a function of a `Call`, and
        `on_result` one of the result, that return attributes. Arguments are looked at before the call.
        """
        if not given and type(stage_type) is str:
            if self._recorder.setup.enabled:
                return StageContext(self._recorder, stage_type)
            if self._stays_off:
                return NO_STAGE
            if not self._is_dormant:
                return dormant(functools.partial(self._stage_of_decorator, stage_type))
        return self._stage(stage_type, **given)

    def _stage(
        self,
        stage_type: Any = None,
        *,
        stage_name: str | None = None,
        parent: Scope | None = None,
        parent_stage_id: str | None = None,
        trace_id: str | None = None,
        attempt: int = 1,
        attributes: Mapping[str, Any] | Callable[[Call], Mapping[str, Any] | None] | None = None,
        metadata: Mapping[str, Any] | None = None,
        input_ref: StagePayloadRef | Mapping[str, str] | None = None,
        output_ref: StagePayloadRef | Mapping[str, str] | None = None,
        capture_args: bool | Sequence[str] = False,
        capture_result: bool = False,
        on_result: Callable[[Any], Mapping[str, Any] | None] | None = None,
    ) -> Any:
        """Do what `stage` says, with whatever is given."""
        recorder = self._recorder
        if not recorder.setup.enabled and not self._is_dormant:
            if self._stays_off:
                return stage_type if callable(stage_type) else NO_STAGE
            made = functools.partial(
                self._stage_of_decorator,
                stage_name=stage_name,
                parent=parent,
                parent_stage_id=parent_stage_id,
                trace_id=trace_id,
                attempt=attempt,
                attributes=attributes,
                metadata=metadata,
                input_ref=input_ref,
                output_ref=output_ref,
                capture_args=capture_args,
                capture_result=capture_result,
                on_result=on_result,
            )
            return made(stage_type) if callable(stage_type) else dormant(functools.partial(made, stage_type))
        function = None
        if type(stage_type) is not str and callable(stage_type):
            function, stage_type = stage_type, None
        call = None
        if capture_args or capture_result or on_result is not None or (attributes is not None and callable(attributes)):
            call = CallCapture(
                args=capture_args,
                result=capture_result,
                attributes=attributes if callable(attributes) else None,
                on_result=on_result,
            )
            attributes = None if callable(attributes) else attributes
        given = Given(
            stage_name, parent, parent_stage_id, trace_id, attempt, attributes, metadata, input_ref, output_ref, call
        )
        stage = StageContext(recorder, stage_type, given)
        return stage if function is None else stage(function)

    def _stage_of_decorator(self, stage_type: Any, **given: Any) -> Any:
        """Make a stage although nothing is recorded for now."""
        return _Dormant(self._recorder).stage(stage_type, **given)

    # Its parameters are those that `inspect` and editors show, and errors are of `stage`.
    stage.__wrapped__ = _stage  # type: ignore[attr-defined]
    _stage.__name__, _stage.__qualname__ = stage.__name__, stage.__qualname__

    def trace(
        self,
        *,
        trace_id: str | None = None,
        traceparent: str | None = None,
        tracestate: str | None = None,
        session_id: str | None = None,
        user_id: str | None = None,
        test_case_id: str | None = None,
        metadata: Mapping[str, Any] | None = None,
    ) -> TraceContext:
        """
        Hold together the stages of one request: use the result as `with` or `async with`.

        All stages inside have one trace id, and what is given as metadata here. A stage that is open around it is of
        another trace, and no parent. `traceparent` and `tracestate` are
        the headers of the service that called this one (W3C Trace Context; `trace_headers()` gives them out there):
        the trace is then the caller's. Without them it has `trace_id`, or the id of OpenTelemetry's current trace
        if there is one, or a new one.
        """
        self._recorder.make_ready()  # who called us is told apart by the run
        known = {"session_id": session_id, "user_id": user_id, "test_case_id": test_case_id}
        known = {name: value for name, value in known.items() if value is not None}
        return TraceContext(
            self._recorder,
            trace_id=trace_id,
            traceparent=traceparent,
            tracestate=tracestate,
            metadata={**as_object(metadata), **known},
        )

    def bind(self, function: F) -> F:
        """
        Return `function` such that, wherever it is called, its stages find the one that is open now as their parent.

        For threads, callbacks and background tasks: `Thread(target=tracer.bind(work))`.
        """
        return bind(function)

    def record_stage(
        self,
        stage_type: str,
        *,
        stage_name: str | None = None,
        attributes: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        duration_ms: float | None = None,
        started_at: datetime | str | None = None,
        finished_at: datetime | str | None = None,
        status: str = "success",
        attempt: int = 1,
        stage_id: str | None = None,
        parent: Scope | None = None,
        parent_stage_id: str | None = None,
        trace_id: str | None = None,
        span_id: str | None = None,
        input_ref: StagePayloadRef | Mapping[str, str] | None = None,
        output_ref: StagePayloadRef | Mapping[str, str] | None = None,
    ) -> str:
        """
        Record a stage that was measured elsewhere, or that takes no time; return its id for its children.

        Without times it ended now, and began `duration_ms` milliseconds before; a time without an offset is taken as
        UTC (`datetime.now().astimezone()` has one). Parent and trace are found as for `stage`. What breaks
        EvalVault's rules is rejected by the server, counted and logged.
        """
        now_ns = clock.time_ns()
        made_id = new_stage_id(now_ns)
        if stage_id is None:
            stage_id = made_id
        recorder = self._recorder
        if not recorder.enabled:
            return stage_id
        try:
            around = parent if has_begun(parent) else here()
            if trace_id is not None:
                trace_id = as_id(trace_id)
            parent_id, trace = place(around, recorder, parent_stage_id, trace_id)
            if trace is None:
                trace = Trace(trace_id_of(made_id))
            is_root = around is None or trace is not around._trace
            span = current_span()
            if span is not None and is_in_stage_of(here(), span[1]):
                span = None
            if span is not None and is_root and trace_id is None and parent_id is None:
                trace.trace_id = span[0]
            if started_at is None and finished_at is None:
                finished_at = iso_time(now_ns)
                if isinstance(duration_ms, (int, float)) and 0 <= duration_ms < _LONGEST_MS:
                    started_at = iso_time(now_ns - round(duration_ms * 1_000_000))
            else:
                started_at, finished_at = _instant(started_at), _instant(finished_at)
            fields = {
                "run_id": recorder.run_id,
                "stage_id": stage_id,
                "parent_stage_id": parent_id,
                "stage_type": stage_type,
                "stage_name": stage_name,
                "status": status,
                "attempt": attempt,
                "started_at": started_at,
                "finished_at": finished_at,
                "duration_ms": duration_ms,
                "input_ref": as_reference(input_ref) if input_ref is not None else None,
                "output_ref": as_reference(output_ref) if output_ref is not None else None,
                "attributes": as_object(attributes),
                "metadata": {**trace.metadata, **as_object(metadata)} if trace.metadata else as_object(metadata),
                "trace_id": trace.trace_id,
                "span_id": span_id or (span[1] if span and span[0] == trace.trace_id else span_id_of(made_id)),
            }
            trace.ended = trace.ended or is_root  # nobody will: what it decides, this event decides alone
            if status == "error":
                recorder.fail_trace(trace)
            recorder.record({name: value for name, value in fields.items() if value is not None}, trace)
        except Exception as error:  # noqa: BLE001 - the host program must not feel our faults
            recorder.fault("recording a stage", error)
        return stage_id

    def record_batch(self, events: Iterable[StageEvent | Mapping[str, Any]]) -> list[str | None]:
        """
        Record ready-made events: `StageEvent`s, or JSON objects of the contract.

        An object without a `run_id` gets this tracer's. Returns the id of each, in order; None stands for one
        that breaks EvalVault's rules, which is counted as dropped (`invalid`) and logged.
        """
        ids: list[str | None] = []
        self._recorder.make_ready()
        try:
            load("evalvault_sdk.events")  # nothing to do, where there is a tracer
            from evalvault_sdk.events import StageEvent

            if isinstance(events, (StageEvent, Mapping)):
                events = [events]  # one event, meant as a batch of one
            for event in events:
                ids.append(self._record_ready_made(event))
        except Exception as error:  # noqa: BLE001 - an iterable of the user's own
            self._recorder.fault("reading a batch", error)
        return ids

    def _record_ready_made(self, event: StageEvent | Mapping[str, Any]) -> str | None:
        from evalvault_sdk.events import StageEvent

        try:
            if not isinstance(event, StageEvent):
                run_id = event.get("run_id")
                own = self._recorder.run_id or "none"  # where nothing is recorded there may be no run
                event = StageEvent.from_dict({**event, "run_id": own if run_id is None else run_id})
            self._recorder.record(event.to_dict())
        except Exception as error:  # noqa: BLE001 - invalid, or no event at all
            self._recorder.fault("checking a ready-made event", error, reason="invalid")
            return None
        return event.stage_id


def _instant(given: datetime | str | None) -> Any:
    """Return a time given as text with its offset: EvalVault cannot compare times of which one has none."""
    if isinstance(given, str):
        load("evalvault_sdk.events")
        from evalvault_sdk.events import parse_time

        with contextlib.suppress(InvalidStageEventError):  # left as it is, for the server to refuse by name
            return parse_time("time", given)
    return given


class _Dormant(Stages):
    """Makes the stages of decorators for a recorder that is switched off for now."""

    _is_dormant = True
    _stays_off = False

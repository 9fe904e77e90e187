"""
Measure a stage: a with-block around the code that does the work (as a decorator: `capture.decorate`).

In:   the start and the end of a block of the user's code, and what that code tells about itself.
Out:  one event for the recorder when the block ends, whether it returned or raised.
Caller's thread or task. The block's exceptions pass through unchanged; ours never reach it.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from evalvault_sdk.capture import clock, context
from evalvault_sdk.capture.call import CallCapture
from evalvault_sdk.capture.context import Scope, Trace, as_id, here, is_in_stage_of, leave, open_scope, place
from evalvault_sdk.capture.propagate import current_span
from evalvault_sdk.capture.recorder import Recorder
from evalvault_sdk.errors import cancellation, describe_error
from evalvault_sdk.ids import digits_of, new_random_bits, span_id_of, stage_id_of
from evalvault_sdk.late import load

if TYPE_CHECKING:
    from evalvault_sdk.events import StagePayloadRef

T = TypeVar("T")

_modules = sys.modules


class StageContext(Scope):
    """
    One stage being measured: what `StageTracer.stage()` gives.

    As `with` or `async with`, entering starts the clock and makes the stage the parent of stages opened
    inside; leaving records it. As a decorator, every call is a stage of its own. What the code learns on
    the way goes into `attributes`, `metadata`, `stage_name`, `status`, `input_ref` and `output_ref`, which
    may be changed until the block is left. Entering the same object again records another stage, with what was
    given when it was made.
    """

    __slots__ = (
        "_call",
        "_given",
        "_made_from",
        "_opened_trace",
        "_own",
        "_parent",
        "_random_bits",
        "_started_ns",
        "_started_perf_ns",
        "_trace_id",
        "attempt",
        "attributes",
        "input_ref",
        "metadata",
        "output_ref",
        "parent_stage_id",
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
    trace_id: str | None
    parent_stage_id: str | None
    #: Unix time; 0 until the block is entered.
    _started_ns: int
    _random_bits: int
    _made_from: StageContext | None

    def __init__(
        self,
        recorder: Recorder,
        stage_type: str | None,
        stage_name: str | None = None,
        parent: Scope | None = None,
        parent_stage_id: str | None = None,
        trace_id: str | None = None,
        attempt: int = 1,
        attributes: Mapping[str, Any] | None = None,
        metadata: Mapping[str, Any] | None = None,
        input_ref: StagePayloadRef | Mapping[str, str] | None = None,
        output_ref: StagePayloadRef | Mapping[str, str] | None = None,
        call: CallCapture | None = None,
    ) -> None:
        self._recorder = recorder
        self.stage_type = "stage" if stage_type is None else stage_type
        # In one tuple: nobody wants them but who enters it again.
        self._given = (
            stage_type,
            stage_name,
            parent_stage_id,
            trace_id,
            attempt,
            input_ref,
            output_ref,
            attributes,
            metadata,
        )
        self.stage_name = stage_name
        self._parent = parent
        self.parent_stage_id = parent_stage_id
        self._trace_id = None if trace_id is None else as_id(trace_id)
        self.attempt = attempt
        self.attributes = self._own = {} if attributes is None else as_object(attributes).copy()
        self.metadata = {} if metadata is None else as_object(metadata).copy()
        self.input_ref = input_ref
        self.output_ref = output_ref
        self.status = "success"
        # `_made_from` None: from itself. A reference to itself would leave every stage to the garbage collector.
        self._made_from = self._stage_id = self.trace_id = self._span_id = None
        self._started_ns = 0
        self._open = False
        self._call = call

    @property
    def _template(self) -> StageContext:
        """The stage that the program made, of which this one is an entry."""
        return self._made_from or self

    # Most stages are never asked for their ids: these are made from numbers when somebody does, or the worker.

    @property
    def stage_id(self) -> str | None:
        """The stage's own id, a UUIDv7 of 36 characters; None until the block is entered."""
        if self._stage_id is None and self._started_ns:
            self._stage_id = stage_id_of(digits_of(self._started_ns, self._random_bits))
        return self._stage_id

    @property
    def span_id(self) -> str | None:
        """The span that the stage is in W3C Trace Context, 16 hexadecimal digits; None until the block is entered."""
        if self._span_id is None and (stage_id := self.stage_id) is not None:
            self._span_id = span_id_of(stage_id)
        return self._span_id

    def set(self, /, **attributes: Any) -> None:
        """Add attributes: `stage.set(query=query, top_k=5)`."""
        if self.attributes is not self._own:  # a dict that was assigned is not ours to change
            self.attributes = self._own = as_object(self.attributes).copy()
        self._own.update(attributes)

    def fail(self, reason: str, *, kind: str = "Error") -> None:
        """Record the stage as failed although the block does not raise."""
        self.status = "error"
        self.set(error={"type": kind, "message": reason})

    def skip(self, reason: str | None = None) -> None:
        """Record that the stage had nothing to do, as `status="skipped"`."""
        self.status = "skipped"
        if reason is not None:
            self.set(skip_reason=reason)

    def save_input(self, value: Any) -> None:
        """
        Keep what the stage was given in the tracer's `payload_store`, and refer to it as `input_ref`.

        For what is too large for an attribute. It is written before this returns. Without a store, and with
        `content="none"`, nothing happens; an error of the store is counted (`hook_errors`) and logged.
        """
        self.input_ref = self._saved("input", value) or self.input_ref

    def save_output(self, value: Any) -> None:
        """Keep what the stage made in the tracer's `payload_store`, and refer to it as `output_ref`."""
        self.output_ref = self._saved("output", value) or self.output_ref

    def _saved(self, name: str, value: Any) -> StagePayloadRef | None:
        recorder = self._recorder
        setup = recorder.setup
        if setup.payload_store is None:
            return None
        try:
            payload = setup.encoder.payload(name, value, recorder)
            return None if payload is None else setup.payload_store.put(payload)
        except Exception as error:  # noqa: BLE001 - a disk, or a store of the user's own
            recorder.hook_failed("payload_store", error)
            return None

    def __enter__(self) -> StageContext:
        before = outer = open_scope.get()
        if context.finders:
            outer = here()
        if self._open or (self._started_ns and self.is_around(outer)):
            # In a recursion, in another thread, or in what began inside: each entry is a stage with a clock of its own.
            return self._again().__enter__()
        if self._started_ns:
            self._start_over()
        self._start(outer)
        self._before = before
        open_scope.set(self)
        return self

    def _start(self, outer: Scope | None) -> None:
        """Begin, in the scope `outer` or below the given parent."""
        self._open = True
        self._started_ns = started_ns = clock.time_ns()
        self._random_bits = random_bits = new_random_bits()
        self._outer = self._before = outer
        if self._parent is not None:
            outer = self._below() or outer
        self.parent_stage_id, trace = place(outer, self._recorder, self.parent_stage_id, self._trace_id)
        if trace is None:
            digits = digits_of(started_ns, random_bits)
            trace = Trace(digits)
            self._stage_id = stage_id_of(digits)  # which its children will ask for
        self._opened_trace = outer is None or trace is not outer._trace
        self._trace = trace
        self.trace_id = trace.trace_id
        if "opentelemetry.trace" in _modules and (span := current_span()) is not None:
            self._take_over(span)
        self._started_perf_ns = clock.perf_counter_ns()

    def _below(self) -> Scope | None:
        """Return the given parent, if it has begun: one of a tracer that is switched off never does."""
        return self._parent if issubclass(type(self._parent), Scope) and hasattr(self._parent, "_trace") else None

    def _take_over(self, span: tuple[str, str]) -> None:
        """Be part of the trace that OpenTelemetry is in, and bear the id of its span, where we have no trace yet."""
        if self._opened_trace and self._trace_id is None and self.parent_stage_id is None:
            self._trace.trace_id = self.trace_id = span[0]
        if span[0] == self.trace_id and not is_in_stage_of(self._outer, span[1]):
            self._span_id = span[1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ended_perf_ns = clock.perf_counter_ns()
        scope = open_scope.get()
        if scope is self and self._open:  # as it is almost always
            open_scope.set(self._before)
            self._end(error, ended_perf_ns)
            return
        # Left out of order, or entered more than once: the innermost open stage of this context that
        # came from this object; where there is none (left in another context), this object itself.
        while scope is not None and not (isinstance(scope, StageContext) and scope._open and scope._template is self):
            scope = scope._outer
        if scope is None:
            scope = self
        if scope._open:
            leave(scope)
            scope._end(error, ended_perf_ns)

    def _end(self, error: BaseException | None, ended_perf_ns: int) -> None:
        """Record the stage, which was left with `error`."""
        elapsed_ns = ended_perf_ns - self._started_perf_ns
        self._open = False
        recorder = self._recorder
        try:
            if error is not None:
                self._tell_of(error)
            if self.status == "error":
                recorder.fail_trace(self._trace)
            span = 0 if self._span_id is None else int(self._span_id, 16)
            numbers = self._started_ns, elapsed_ns, self._random_bits, span
            recorder.record(self._fields(), self._trace, numbers)
        except Exception as fault:  # noqa: BLE001 - what a user assigned to our fields
            recorder.fault("ending a stage", fault)
        if self._opened_trace:
            recorder.end_trace(self._trace, elapsed_ns / 1_000_000)
        self._outer = self._before = None

    def _tell_of(self, error: BaseException) -> None:
        cancelled_by = cancellation(error)
        if cancelled_by is None:
            self.status = "error"
            described = describe_error(error, self._recorder.setup.traceback_frames)
            self.attributes = {**as_object(self.attributes), "error": described}
        elif self.status == "success":
            self.status = "cancelled"
            self.attributes = {**as_object(self.attributes), "cancelled_by": cancelled_by}

    async def __aenter__(self) -> StageContext:
        return self.__enter__()

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.__exit__(kind, error, traceback)

    def __call__(self, function: T) -> T:
        """Decorate a function, or anything else that is called: every call becomes a stage of its own."""
        from evalvault_sdk.capture.decorate import decorated  # which builds upon this module

        result: T = decorated(self, function)
        return result

    def _start_over(self) -> None:
        """Forget what the last time in this block set."""
        _, self.stage_name, self.parent_stage_id, _, self.attempt, *given = self._given
        self.input_ref, self.output_ref, attributes, metadata = given
        self._stage_id = self._span_id = None
        self.attributes = self._own = as_object(_snapshot(attributes)).copy()
        self.metadata = as_object(_snapshot(metadata)).copy()
        self.status = "success"

    def _again(self, name: str | None = None, stage_type: str | None = None) -> StageContext:
        """Return a stage as this one was when it was made, not entered yet."""
        given_type, given_name, parent_stage_id, trace_id, attempt, input_ref, output_ref, *content = self._given
        attributes, metadata = content
        again = StageContext(
            self._recorder,
            given_type or stage_type,
            stage_name=given_name or name,
            parent=self._parent,
            parent_stage_id=parent_stage_id,
            trace_id=trace_id,
            attempt=attempt,
            attributes=_snapshot(attributes),
            metadata=_snapshot(metadata),
            input_ref=input_ref,
            output_ref=output_ref,
        )
        again._made_from = self._template
        return again

    def _fields(self) -> dict[str, Any]:
        """Return the fields of the event, but for those of `draft.fields_of`."""
        attributes, metadata, trace_metadata = self.attributes, self.metadata, self._trace.metadata
        # The order saves the encoder from looking for secrets in what can hold none: content begins with the type.
        fields: dict[str, Any] = {
            "run_id": self._recorder.setup.run_id,
            "trace_id": self.trace_id,
            "parent_stage_id": self.parent_stage_id,
            "stage_type": self.stage_type,
            # Null means the default to our server; EvalVault's ingest breaks on it, and on the file that it is in.
            "status": "success" if self.status is None else self.status,
            "attributes": attributes if type(attributes) is dict else as_object(attributes),
        }
        if self.parent_stage_id is None:
            del fields["parent_stage_id"]
        if self.stage_name is not None:
            fields["stage_name"] = self.stage_name
        if self.attempt != 1 and self.attempt is not None:
            fields["attempt"] = self.attempt
        if type(metadata) is not dict:
            metadata = as_object(metadata)
        if trace_metadata:
            metadata = {**trace_metadata, **metadata}
        if metadata:
            fields["metadata"] = metadata
        if self.input_ref is not None:
            fields["input_ref"] = as_reference(self.input_ref)
        if self.output_ref is not None:
            fields["output_ref"] = as_reference(self.output_ref)
        return fields


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
    load("evalvault_sdk.events")  # nothing to do, where there is a tracer
    from evalvault_sdk.events import StagePayloadRef

    return value.to_dict() if isinstance(value, StagePayloadRef) else value


def _snapshot(given: Any) -> Any:
    """Return a copy whose lists and dicts are not those that were given: calls must not see each other's appends."""
    if type(given) is not dict:
        return given
    return {key: value.copy() if type(value) in (dict, list) else value for key, value in given.items()}

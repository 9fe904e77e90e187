"""
Measure a stage: a with-block around the code that does the work (as a decorator: `capture.decorate`).

In:   the start and the end of a block of the user's code, and what that code tells about itself.
Out:  one event for the recorder when the block ends, whether it returned or raised.
Caller's thread or task. The block's exceptions pass through unchanged; ours never reach it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

from evalvault_sdk.capture import context
from evalvault_sdk.capture.clock import clock
from evalvault_sdk.capture.context import (
    Scope,
    Trace,
    as_id,
    get_open_scope,
    has_begun,
    here,
    is_in_stage_of,
    leave,
    place,
    set_open_scope,
)
from evalvault_sdk.capture.draft import Draft, fields_of
from evalvault_sdk.capture.given import NOTHING_GIVEN, Given, as_object, as_reference
from evalvault_sdk.capture.propagate import current_span
from evalvault_sdk.capture.recorder import Recorder
from evalvault_sdk.errors import cancellation, describe_error
from evalvault_sdk.ids import NO_ID, Id, digits_of, new_random_bits, stage_id_of

if TYPE_CHECKING:
    from evalvault_sdk.capture.encode import Encoder
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
        "_attributes",
        "_call",
        "_given",
        "_given_type",
        "_is_own",
        "_is_placed",
        "_made_from",
        "_metadata",
        "_opened_trace",
        "_parent",
        "_parent_stage_id",
        "_started_perf_ns",
        "attempt",
        "input_ref",
        "output_ref",
        "stage_name",
        "stage_type",
        "status",
    )

    _made_from: StageContext | None
    #: What the parent's id is made of; `NO_ID` where it is a text, or there is none.
    _parent: Id
    _parent_stage_id: str | None
    stage_name: str | None
    input_ref: StagePayloadRef | Mapping[str, str] | None
    output_ref: StagePayloadRef | Mapping[str, str] | None
    #: None until somebody looks, or sets one.
    _attributes: dict[str, Any] | None
    _metadata: dict[str, Any] | None
    #: Whether the attributes are ours to change.
    _is_own: bool
    #: Whether it is given where the stage belongs.
    _is_placed: bool

    def __init__(self, recorder: Recorder, stage_type: str | None, given: Given = NOTHING_GIVEN) -> None:
        self._recorder = recorder
        self.stage_type = "stage" if stage_type is None else stage_type
        self._given_type, self._given = stage_type, given
        self._made_of = self._parent = NO_ID
        # `_made_from` None: from itself. A reference to itself would leave every stage to the garbage collector.
        self._made_from = self._stage_id = self._span_id = self._parent_stage_id = None
        self._open = False
        self._is_own = True
        self.status = "success"
        if given is NOTHING_GIVEN:
            self.stage_name = self._attributes = self._metadata = self.input_ref = self.output_ref = None
            self.attempt = 1
            self._is_placed = False
            self._call = None
        else:
            self._take(given)
            self._is_placed = given[1:4] != (None, None, None)  # parent, parent_stage_id, trace_id
            self._call = given.call

    def _take(self, given: Given) -> None:
        """Set what the program may change to what was given."""
        self.stage_name, _, self._parent_stage_id, _, self.attempt, attributes, metadata, *references, _ = given
        self._attributes = None if attributes is None else as_object(attributes).copy()
        self._metadata = None if metadata is None else as_object(metadata).copy()
        self._is_own = True
        self.input_ref, self.output_ref = references

    @property
    def _template(self) -> StageContext:
        """The stage that the program made, of which this one is an entry."""
        return self._made_from or self

    @property
    def attributes(self) -> dict[str, Any]:
        """What the stage did. Assign a new dict or add keys; read when the block is left."""
        if self._attributes is None:
            self._attributes = {}
        return self._attributes

    @attributes.setter
    def attributes(self, attributes: dict[str, Any]) -> None:
        self._attributes = attributes
        self._is_own = False  # a dict that was assigned is not ours to change

    @property
    def metadata(self) -> dict[str, Any]:
        """What it ran under."""
        if self._metadata is None:
            self._metadata = {}
        return self._metadata

    @metadata.setter
    def metadata(self, metadata: dict[str, Any]) -> None:
        self._metadata = metadata

    @property
    def trace_id(self) -> str | None:
        """The id that all stages of the request share; None until the block is entered."""
        return None if self._made_of is NO_ID else self._trace.trace_id

    @property
    def parent_stage_id(self) -> str | None:
        """The id of the stage around it, or the given one; None until the block is entered, and for a root."""
        if self._parent_stage_id is None and self._parent is not NO_ID:
            self._parent_stage_id = stage_id_of(digits_of(*self._parent))
        return self._parent_stage_id

    def set(self, /, **attributes: Any) -> None:
        """Add attributes: `stage.set(query=query, top_k=5)`."""
        own = self._attributes
        if own is None:
            self._attributes = attributes  # which Python has made for this call
        elif self._is_own:
            own.update(attributes)
        else:
            self._attributes, self._is_own = {**as_object(own), **attributes}, True

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
        before = outer = get_open_scope()
        if context.finders:
            outer = here()
        if self._open or self._made_of is not NO_ID:
            # In a recursion, in another thread, or in what began inside: each entry is a stage with a clock of its own.
            if self._open or self.is_around(outer):
                return self._again().__enter__()
            self._start_over()
        self._start(outer)
        self._before = before
        set_open_scope(self)
        return self

    def _start(self, outer: Scope | None) -> None:
        """Begin, in the scope `outer` or below the given parent."""
        self._open = True
        self._made_of = made_of = clock.time_ns(), new_random_bits()
        self._outer = self._before = outer
        if self._is_placed:
            self._find_place(outer)
        elif outer is None:
            self._trace, self._opened_trace = Trace(None, None, made_of), True
        else:
            self._trace, self._opened_trace = outer._trace, False
            if outer._recorder is self._recorder and (outer._made_of is not NO_ID or outer._stage_id is None):
                self._parent = outer._made_of
            else:
                self._find_place(outer)
        if "opentelemetry.trace" in _modules and (span := current_span()) is not None:
            self._take_over(span)
        self._started_perf_ns = clock.perf_counter_ns()

    def _find_place(self, outer: Scope | None) -> None:
        """Find parent and trace, of which something may be given."""
        _, parent, parent_stage_id, trace_id, *_ = self._given
        if has_begun(parent):
            outer = parent
        self._parent_stage_id, trace = place(
            outer, self._recorder, parent_stage_id, None if trace_id is None else as_id(trace_id)
        )
        self._trace = Trace(None, None, self._made_of) if trace is None else trace
        self._opened_trace = outer is None or trace is not outer._trace

    def _take_over(self, span: tuple[str, str]) -> None:
        """Be part of the trace that OpenTelemetry is in, and bear the id of its span, where we have no trace yet."""
        if self._opened_trace and self._given.trace_id is None and self.parent_stage_id is None:
            self._trace.trace_id = span[0]
        if span[0] == self._trace.trace_id and not is_in_stage_of(self._outer, span[1]):
            self._span_id = span[1]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        ended_perf_ns = clock.perf_counter_ns()
        scope = get_open_scope()
        if scope is self and self._open:  # as it is almost always
            set_open_scope(self._before)
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
            if self.status is None:
                # Null means the default to our server; EvalVault's ingest breaks on it, and on the file that it is in.
                self.status = "success"
            if type(self._attributes) is not dict:
                self._attributes = as_object(self._attributes)
            setup = recorder.setup
            put = setup.put_draft
            if put is None or not self._draft(setup.encoder, put, elapsed_ns):
                recorder.record(self._fields(elapsed_ns), self._trace)
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
        self._take(self._given.again())
        self._stage_id = self._span_id = None
        self._parent = NO_ID
        self.status = "success"

    def _again(self) -> StageContext:
        """Return a stage as this one was when it was made, not entered yet."""
        return self._entry(self._given_type, self._given)

    def _entry(self, stage_type: str | None, given: Given) -> StageContext:
        """Return a stage for one entering of this one, made with what that was given, or with more."""
        again = StageContext(self._recorder, stage_type, given.again())
        again._made_from = self._template
        return again

    def _draft(self, encoder: Encoder, put: Callable[[Draft], bool], elapsed_ns: int) -> bool:
        """Put the stage as a draft, whose ids and times are formatted later; say whether that does."""
        trace, rest = self._trace, self._rest()
        in_trace = trace.opened
        if trace.given_id is not None:
            rest, in_trace = {**(rest or {}), "trace_id": trace.given_id}, NO_ID
        if self._parent_stage_id is not None and self._parent is NO_ID:
            rest = {**(rest or {}), "parent_stage_id": self._parent_stage_id}
        content = encoder.content(self.stage_type, self.status, self._attributes, rest)
        if content is None:
            return False
        span = 0 if self._span_id is None else int(self._span_id, 16)
        draft = self._made_of, elapsed_ns, span, self._parent, in_trace, content
        return put(draft) or not self._recorder.not_taken(draft)

    def _fields(self, elapsed_ns: int) -> dict[str, Any]:
        """Return the fields of the event."""
        outer = self._outer
        if outer is not None and outer._made_of is self._parent is not NO_ID:
            self._parent_stage_id = outer.stage_id  # which it makes but once for all that are in it
        # The order saves the encoder from looking for secrets in what can hold none: content begins with the type.
        fields = {
            "run_id": self._recorder.setup.run_id,
            "trace_id": self._trace.trace_id,
            "parent_stage_id": self.parent_stage_id,
            **fields_of(self._made_of, elapsed_ns, 0 if self._span_id is None else int(self._span_id, 16)),
            "stage_type": self.stage_type,
            "status": self.status,
            "attributes": self._attributes,
            **(self._rest() or {}),
        }
        if fields["parent_stage_id"] is None:
            del fields["parent_stage_id"]
        return fields

    def _rest(self) -> dict[str, Any] | None:
        """Return the fields that few stages have, if this one has any."""
        metadata, trace_metadata = self._metadata, self._trace.metadata
        fields: dict[str, Any] = {}
        if self.stage_name is not None:
            fields["stage_name"] = self.stage_name
        if self.attempt != 1 and self.attempt is not None:
            fields["attempt"] = self.attempt
        if metadata is not None or trace_metadata:
            metadata = {**(trace_metadata or {}), **as_object(metadata)}
            if metadata:
                fields["metadata"] = metadata
        if self.input_ref is not None:
            fields["input_ref"] = as_reference(self.input_ref)
        if self.output_ref is not None:
            fields["output_ref"] = as_reference(self.output_ref)
        return fields or None

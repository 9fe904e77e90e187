"""
Record the spans of OpenTelemetry as stages, as the extra `[otel]`.

In:   spans as they begin and end, from the SDK of OpenTelemetry, in the threads of the program.
Out:  for each that is sampled one event, when it ends: the same that the server makes of it when it comes by OTLP::

    provider.add_span_processor(EvalVaultSpanProcessor(tracer))

Spans and the program's own stages find each other as parents. Never raises, never waits. What is kept of spans is
their place, none of their content, and of a bounded number of them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from evalvault_sdk.capture.context import Scope as StageScope
from evalvault_sdk.capture.context import Trace, add_finder, here, place, remove_finder
from evalvault_sdk.capture.recorder import Recorder
from evalvault_sdk.default import DefaultTracer, default
from evalvault_sdk.errors import MissingDependencyError
from evalvault_sdk.ids import NO_ID
from evalvault_sdk.otel.mapping import stage_event_of
from evalvault_sdk.otel.plain import shared, storable
from evalvault_sdk.otel.span import Scope, Span, SpanEvent, SpanLink
from evalvault_sdk.tracer import StageTracer

try:
    from opentelemetry import trace
    from opentelemetry.context import Context
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import ReadableSpan, SpanProcessor
except ImportError as error:
    raise MissingDependencyError.for_extra("the span processor", "otel", error) from error

#: So many spans have a place that others may be below, ended ones among them; the oldest are forgotten first.
_MAX_KNOWN = 10_000


class EvalVaultSpanProcessor(SpanProcessor):
    """
    Gives spans to `tracer` (that of the package if None), as stages of its run.

    Stage ids are span ids. A span inside a stage of the program is below that, in the stage's trace, and a stage
    inside a span is below the span. Shutting it down, as a provider does at its end, leaves the tracer running.
    """

    def __init__(self, tracer: StageTracer | None = None) -> None:
        self._tracer: StageTracer | DefaultTracer = default if tracer is None else tracer
        self._recorder: Recorder = self._tracer._recorder
        # No lock: each change is one step of a dict.
        self._known: dict[int, _SpanScope] = {}
        #: The last resource, and what events say of it: mostly there is one.
        self._resource: tuple[Resource | None, dict[str, Any]] = (None, {})
        add_finder(self._scope_here)

    def on_start(self, span: trace.Span, parent_context: Context | None = None) -> None:
        """Take in where a span is, for the stages inside it."""
        try:
            context = span.get_span_context()
            if not self._recorder.enabled or not context.trace_flags.sampled:
                return
            parent = self._scope_of(trace.get_current_span(parent_context).get_span_context())
            self._known[context.span_id] = _SpanScope(self._recorder, context, self._around(parent))
            for oldest in list(itertools.islice(self._known, max(0, len(self._known) - _MAX_KNOWN))):
                self._known.pop(oldest, None)
        except Exception as error:  # noqa: BLE001 - another thread changed the dict, or a span of another make
            self._recorder.misread("OpenTelemetry", error)

    def on_end(self, span: ReadableSpan) -> None:
        """Record a span."""
        recorder = self._recorder
        context = span.context
        if not recorder.enabled or context is None or not context.trace_flags.sampled:
            return
        try:
            recorder.make_ready()
            event = stage_event_of(self._read(span, context), run_id=recorder.run_id)
            fields = {name: value for name, value in event.to_dict().items() if value is not None}
            scope = self._scope_of(context)
            if scope is None:
                recorder.record(fields)
                return
            fields["trace_id"] = scope._trace.trace_id
            if scope.parent_stage_id is not None:
                fields["parent_stage_id"] = scope.parent_stage_id
            if event.status == "error":
                recorder.fail_trace(scope._trace)
            recorder.record(fields, scope._trace)
            scope.end(event.duration_ms or 0.0)
        except Exception as error:  # noqa: BLE001 - the host program must not feel our faults
            recorder.fault("recording a span", error)

    def force_flush(self, timeout_millis: int = 30_000) -> bool:
        """Deliver what was recorded so far; say whether that was done in time."""
        return self._tracer.flush(timeout_millis / 1000).in_time

    def shutdown(self) -> None:
        """Let go of the spans. The tracer is not ours to shut down."""
        remove_finder(self._scope_here)
        self._known.clear()

    def _scope_of(self, context: trace.SpanContext) -> _SpanScope | None:
        scope = self._known.get(context.span_id)
        return scope if scope is not None and scope.otel_trace_id == context.trace_id else None

    def _scope_here(self) -> StageScope | None:
        return self._scope_of(trace.get_current_span().get_span_context())

    def _around(self, parent: _SpanScope | None) -> StageScope | None:
        """Return the scope of a span: where its code runs, if that is in the parent that the span names, or in none."""
        near = scope = here()
        while near is not None and not isinstance(near, _SpanScope):
            near = near._outer
        return scope if near is parent else parent

    def _read(self, span: ReadableSpan, context: trace.SpanContext) -> Span:
        """Return a span as the server would have read it."""
        if self._resource[0] is not span.resource:
            self._resource = (span.resource, shared(_attributes(span.resource.attributes)))
        made_by = span.instrumentation_scope
        started = max(int(span.start_time or 0), 0)  # a program may give a float
        return Span(
            trace_id=f"{context.trace_id:032x}",
            span_id=f"{context.span_id:016x}",
            parent_span_id=None if span.parent is None else f"{span.parent.span_id:016x}",
            trace_state=context.trace_state.to_header() if context.trace_state else "",
            name=storable(span.name),
            kind=span.kind.name.lower(),
            start_time_unix_nano=started,
            # The wall clock may have been set back meanwhile.
            end_time_unix_nano=max(int(span.end_time or 0), started),
            status_code=span.status.status_code.name.lower(),
            status_message=storable(span.status.description or ""),
            attributes=_attributes(span.attributes),
            events=[
                SpanEvent(
                    storable(event.name), event.timestamp, _attributes(event.attributes), event.dropped_attributes
                )
                for event in span.events
            ],
            links=[
                SpanLink(
                    f"{link.context.trace_id:032x}",
                    f"{link.context.span_id:016x}",
                    attributes=_attributes(link.attributes),
                )
                for link in span.links
            ],
            resource=self._resource[1],
            scope=Scope()
            if made_by is None
            else Scope(made_by.name, made_by.version or "", shared(_attributes(made_by.attributes))),
            dropped_attributes_count=span.dropped_attributes,
            dropped_events_count=span.dropped_events,
            dropped_links_count=span.dropped_links,
        )


class _SpanScope(StageScope):
    """The place of a span."""

    __slots__ = ("_opened_trace", "otel_trace_id", "parent_stage_id")

    _is_observed = True

    def __init__(self, recorder: Recorder, context: trace.SpanContext, outer: StageScope | None) -> None:
        self._recorder = recorder
        self.otel_trace_id = context.trace_id
        self._made_of = NO_ID
        self._stage_id = self._span_id = f"{context.span_id:016x}"
        self._outer = self._before = outer
        self._open = True
        self.parent_stage_id, around = place(outer, recorder, None, None)
        self._opened_trace = around is None
        self._trace = around or Trace(f"{context.trace_id:032x}")

    def end(self, duration_ms: float) -> None:
        """End the trace that the span opened, and keep nothing alive."""
        self._open = False
        self._outer = self._before = None
        if self._opened_trace:
            self._recorder.end_trace(self._trace, duration_ms)


def _attributes(given: Mapping[str, Any] | None) -> dict[str, Any]:
    return {storable(str(name)): _value(value) for name, value in given.items()} if given else {}


def _value(value: Any) -> Any:
    """Return a value as the decoders of the server leave it: lists for sequences."""
    if isinstance(value, str):
        return storable(value)
    if value is None or isinstance(value, (bool, int, float, bytes)):
        return value
    if isinstance(value, Mapping):
        return _attributes(value)
    return [_value(item) for item in value] if isinstance(value, Sequence) else str(value)

"""
Turn a span into the stage event that EvalVault stores.

In:   a `Span`, and the run that the request names, if it names one.
Out:  a `StageEvent`: stage id and parent are those of the span.
Pure, and never raises for a span that was decoded: what a convention leaves open, or gets wrong, costs a name only.

The run is, in this order: the request's; `evalvault.run_id`, `rag.run_id` or `run_id` of the span, then of its
resource; the resource's `service.name`, unless it is the SDK's "unknown_service"; "otel".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta, timezone
from typing import Any

from evalvault_sdk.events import StageEvent
from evalvault_sdk.otel.plain import parsed, plain
from evalvault_sdk.otel.span import Span, SpanEvent
from evalvault_sdk.otel.tospan import event_of
from evalvault_sdk.otel.vocabulary import Words, attributes_of, take_stage_type

DEFAULT_RUN_ID = "otel"

_RUN_IDS = ("evalvault.run_id", "rag.run_id", "run_id")
#: What the SDKs call a service that nobody named; some add ":python", say.
_UNKNOWN_SERVICE = "unknown_service"
#: Fields of the metadata, and the attributes they are taken from.
_METADATA: Mapping[str, tuple[str, ...]] = {
    "session_id": ("session.id", "gen_ai.conversation.id"),
    "user_id": ("user.id", "enduser.id"),
    "test_case_id": ("evalvault.test_case_id", "test_case_id"),
    "tags": ("tag.tags",),
}
#: Fields of our own that are set after what the sender calls metadata was read.
_SET_LATER = ("events", "status_message", "resource", "metadata")
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_EXCEPTION = "exception"


def stage_event_of(span: Span, *, run_id: str | None = None) -> StageEvent:
    """
    Return the stage event of a span; a `run_id` given here wins over what the span says.

    A span that was a stage of ours before (`otel.tospan`) becomes that again. For any other:

    A stage has failed if its span's status is ERROR, or if it is unset, the span is of Open RAG Trace (`rag.module`)
    and recorded an exception. `attributes.error` then has the type and message of the last exception, else of the
    status. Raises `InvalidStageEventError` for a `run_id` that no event may have, else never.
    """
    words = Words(span.attributes)
    run_id = _run_id(words, span) if run_id is None else run_id
    if (own := event_of(span, run_id)) is not None:
        return own
    # EvalVault's own adapter records an exception and ends the span, before OpenTelemetry could set its status.
    failed = span.status_code == "error" or (
        span.status_code == "unset" and "rag.module" in words.left and _last_exception(span.events) is not None
    )
    # A span without a kind is to be taken as internal (the comments of trace.proto).
    stage_type = take_stage_type(words) or ("internal" if span.kind == "unspecified" else span.kind)
    metadata = _metadata(words, span)
    error, events = _failure(words, span) if failed else (None, span.events)
    attributes = attributes_of(words, stage_type)
    if error is not None:
        attributes["error"] = error
    if span.status_message and not _is_repeated(span.status_message, error):
        metadata["status_message"] = span.status_message
    if events:
        metadata["events"] = [_event(event) for event in events]
    started, finished = span.start_time_unix_nano, span.end_time_unix_nano
    return StageEvent(
        run_id=run_id,
        stage_type=stage_type,
        stage_id=span.span_id,
        stage_name=span.name or None,
        parent_stage_id=span.parent_span_id,
        status="error" if failed else "success",
        started_at=_time(started),
        finished_at=_time(finished),
        # Exact: a difference of the times would have lost the nanoseconds.
        duration_ms=(finished - started) / 1_000_000 if started and finished else None,
        attributes=plain(attributes),
        # The resource is plain, and one object for all its spans: a copy for each could fill the memory.
        metadata={**plain(metadata), **({"resource": span.resource} if span.resource else {})},
        trace_id=span.trace_id,
        span_id=span.span_id,
    )


def _run_id(words: Words, span: Span) -> str:
    taken = words.take(*_RUN_IDS, read=_name)
    if taken is None:
        taken = Words(span.resource).take(*_RUN_IDS, read=_name)
    if taken is not None:
        return str(taken)
    service = _name(span.resource.get("service.name"))
    return DEFAULT_RUN_ID if service is None or service.startswith(_UNKNOWN_SERVICE) else service


def _name(value: Any) -> str | None:
    """Return a name as text, or None for what is none."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    return value.strip() or None if isinstance(value, str) else None


def _time(unix_nano: int) -> datetime | None:
    return _EPOCH + timedelta(microseconds=unix_nano // 1000) if unix_nano else None


def _last_exception(events: Sequence[SpanEvent]) -> SpanEvent | None:
    return next((event for event in reversed(events) if event.name == _EXCEPTION), None)


def _failure(words: Words, span: Span) -> tuple[dict[str, Any], list[SpanEvent]]:
    """Return what a failed stage says in `attributes.error`, and the events that are left."""
    exception = _last_exception(span.events)
    said = {} if exception is None else exception.attributes
    own = words.left.pop("error", None)
    error: dict[str, Any] = {}
    for what, otherwise in (
        ("type", "Error"),
        ("message", span.status_message or (own if isinstance(own, str) else "")),
    ):
        error[what] = said.get(f"exception.{what}") or words.left.get(f"error.{what}") or otherwise
        if words.left.get(f"error.{what}") == error[what]:
            del words.left[f"error.{what}"]
    stacktrace = said.get("exception.stacktrace")
    if stacktrace:
        error["stacktrace"] = stacktrace
    if own and own is not True and own != error["message"]:
        error["value"] = own  # the name is taken, what it said is not lost
    return error, [event for event in span.events if event is not exception]


def _is_repeated(message: str, error: Mapping[str, Any] | None) -> bool:
    # SDKs write "type: message" of the exception into the status, OpenInference its traceback as well.
    return error is not None and str(error["message"]) in message


def _metadata(words: Words, span: Span) -> dict[str, Any]:
    """Return what the stage ran under: what the sender calls so, then the span's surroundings."""
    metadata: dict[str, Any] = {"span_kind": span.kind}
    for name, names in _METADATA.items():
        value = words.take(*names)
        if value is not None:
            metadata[name] = value
    if span.scope.name or span.scope.version or span.scope.attributes:
        metadata["scope"] = {"name": span.scope.name, "version": span.scope.version, **_some(span.scope.attributes)}
    if span.trace_state:
        metadata["trace_state"] = span.trace_state
    if span.links:
        metadata["links"] = [
            {"trace_id": link.trace_id, "span_id": link.span_id, **_some(link.attributes)} for link in span.links
        ]
    dropped = {
        "attributes": span.dropped_attributes_count,
        "events": span.dropped_events_count,
        "links": span.dropped_links_count,
    }
    if any(dropped.values()):
        metadata["dropped"] = {what: count for what, count in dropped.items() if count}
    given = parsed(words.left.get("metadata"))  # OpenInference's, and LangChain's: an object as JSON
    if isinstance(given, dict):
        del words.left["metadata"]
        clash = {key: value for key, value in given.items() if key in metadata or key in _SET_LATER}
        metadata = {**given, **metadata, **({"metadata": clash} if clash else {})}
    return metadata


def _some(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {"attributes": dict(attributes)} if attributes else {}


def _event(event: SpanEvent) -> dict[str, Any]:
    time = _time(event.time_unix_nano)
    dropped = {"dropped_attributes": event.dropped_attributes_count} if event.dropped_attributes_count else {}
    return {
        "name": event.name,
        "time": time.isoformat() if time else None,
        **_some(event.attributes),
        **dropped,
    }

"""
Read the spans of a request in protobuf: the one file that knows `opentelemetry-proto`.

In:   the bytes of an ExportTraceServiceRequest.
Out:  for each span in it, in order, a function that reads it or raises `InvalidSpanError`.
Pure. The two levels around the spans are walked here, by the rules of the wire format, and each span is parsed on
its own: so a span that is no valid message costs no other one, and the number of spans is known before any of them
takes memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

from google.protobuf.message import DecodeError
from opentelemetry.proto.common.v1 import common_pb2
from opentelemetry.proto.resource.v1 import resource_pb2
from opentelemetry.proto.trace.v1 import trace_pb2

from evalvault_sdk.otel.plain import TOO_DEEP, shared, storable
from evalvault_sdk.otel.span import KINDS, STATUS_CODES, InvalidSpanError, Scope, Span, SpanEvent, SpanLink
from evalvault_sdk.server.answers import ApiError
from evalvault_sdk.server.otlp.bounds import MAX_SPAN_BYTES, Bounds, is_too_deep

# Numbers of fields: ExportTraceServiceRequest, ResourceSpans, ScopeSpans. They never change.
_RESOURCE_SPANS = 1
_RESOURCE, _SCOPE_SPANS = 1, 2
_SCOPE, _SPANS = 1, 2

#: Where protobuf has no compiled part, it lets errors of Python through: a UnicodeDecodeError for one.
_PARSE_ERRORS = (DecodeError, RecursionError, ValueError)

_VARINT, _FIXED64, _LENGTH_DELIMITED, _FIXED32 = 0, 1, 2, 5
#: A varint has up to 64 bits, 7 in a byte.
_MAX_VARINT_BYTES = 10


def spans_in(body: bytes, bounds: Bounds) -> Iterator[Callable[[], Span]]:
    """Yield a reader for each span. Raises `ApiError` for what is no such request, or for too much of it."""
    for resource_spans in _messages(body, _RESOURCE_SPANS, bounds):
        given = _parse(resource_pb2.Resource, resource_spans, _RESOURCE, bounds)
        resource = shared(_attributes(given.attributes, bounds))
        for scope_spans in _messages(resource_spans, _SCOPE_SPANS, bounds):
            scope = _scope(_parse(common_pb2.InstrumentationScope, scope_spans, _SCOPE, bounds), bounds)
            for span in _messages(scope_spans, _SPANS, bounds):
                bounds.span()
                yield partial(_span, span, resource, scope, bounds)


def _parse(kind: Any, message: bytes, number: int, bounds: Bounds) -> Any:
    # A message may come in pieces, and protobuf merges those that follow each other ("Last One Wins").
    try:
        return kind.FromString(b"".join(_messages(message, number, bounds)))
    except _PARSE_ERRORS:
        raise _malformed(f"its {kind.DESCRIPTOR.name} is no valid message") from None


def _messages(message: bytes, wanted: int, bounds: Bounds) -> Iterator[bytes]:
    """Yield the length-delimited fields with the number `wanted`; any other field is skipped."""
    place = 0
    while place < len(message):
        key, place = _varint(message, place)
        number, wire_type = key >> 3, key & 7
        if number == 0:
            raise _malformed("a field has the number 0")
        if wire_type == _LENGTH_DELIMITED:
            length, place = _varint(message, place)
            end = place + length
            if number == wanted and end <= len(message):
                bounds.container()
                yield message[place:end]
        elif wire_type == _VARINT:
            _, end = _varint(message, place)
        elif wire_type in (_FIXED64, _FIXED32):
            end = place + (8 if wire_type == _FIXED64 else 4)
        else:  # groups, which OTLP never had
            raise _malformed(f"a field has the wire type {wire_type}")
        if end > len(message):
            raise _malformed("it ends within a field")
        place = end


def _varint(message: bytes, place: int) -> tuple[int, int]:
    """Return the number at `place`, and the place after it."""
    value = 0
    for offset, byte in enumerate(message[place : place + _MAX_VARINT_BYTES]):
        value |= (byte & 0x7F) << (7 * offset)
        if byte < 0x80:
            return value, place + offset + 1
    raise _malformed("it ends within a number, or the number is too long")


def _malformed(how: str) -> ApiError:
    return ApiError(400, "Malformed protobuf", f"the body is no ExportTraceServiceRequest: {how}")


def _span(message: bytes, resource: dict[str, Any], scope: Scope, bounds: Bounds) -> Span:
    if len(message) > MAX_SPAN_BYTES:
        raise InvalidSpanError(f"it is larger than {MAX_SPAN_BYTES} bytes")
    try:
        span = trace_pb2.Span.FromString(message)
    except _PARSE_ERRORS:
        raise InvalidSpanError("it is no valid protobuf message, or is nested too deeply") from None
    return Span(
        trace_id=span.trace_id.hex(),
        span_id=span.span_id.hex(),
        parent_span_id=span.parent_span_id.hex() or None,
        trace_state=storable(span.trace_state),
        name=storable(span.name),
        kind=_named(KINDS, span.kind),
        start_time_unix_nano=span.start_time_unix_nano,
        end_time_unix_nano=span.end_time_unix_nano,
        status_code=_named(STATUS_CODES, span.status.code),
        status_message=storable(span.status.message),
        attributes=_attributes(span.attributes, bounds),
        events=[_event(event, bounds) for event in span.events],
        links=[_link(link, bounds) for link in span.links],
        resource=resource,
        scope=scope,
        dropped_attributes_count=span.dropped_attributes_count,
        dropped_events_count=span.dropped_events_count,
        dropped_links_count=span.dropped_links_count,
    )


def _named(names: tuple[str, ...], number: int) -> str:
    return names[number] if 0 <= number < len(names) else names[0]


def _scope(scope: Any, bounds: Bounds) -> Scope:
    return Scope(storable(scope.name), storable(scope.version), shared(_attributes(scope.attributes, bounds)))


def _event(event: Any, bounds: Bounds) -> SpanEvent:
    bounds.container()
    return SpanEvent(
        storable(event.name),
        event.time_unix_nano,
        _attributes(event.attributes, bounds),
        event.dropped_attributes_count,
    )


def _link(link: Any, bounds: Bounds) -> SpanLink:
    bounds.container()
    return SpanLink(
        link.trace_id.hex(),
        link.span_id.hex(),
        storable(link.trace_state),
        _attributes(link.attributes, bounds),
        link.dropped_attributes_count,
    )


def _attributes(pairs: Sequence[Any], bounds: Bounds, depth: int = 0) -> dict[str, Any]:
    bounds.values(len(pairs))
    return {storable(pair.key): _value(pair.value, bounds, depth) for pair in pairs}


def _value(value: Any, bounds: Bounds, depth: int) -> Any:
    kind = value.WhichOneof("value")
    if kind == "string_value":
        return storable(value.string_value)
    if kind not in ("array_value", "kvlist_value"):
        # No value at all is null. An index into a dictionary of texts is for profiles, which are none of ours.
        return getattr(value, kind) if kind in ("bool_value", "int_value", "double_value", "bytes_value") else None
    bounds.container()
    if is_too_deep(depth + 1):
        return TOO_DEEP
    if kind == "array_value":
        items = value.array_value.values
        bounds.values(len(items))
        return [_value(item, bounds, depth + 1) for item in items]
    return _attributes(value.kvlist_value.values, bounds, depth + 1)

"""
Read the spans of a request in OTLP/JSON.

In:   the bytes of an ExportTraceServiceRequest as JSON (OTLP 1.x, "JSON Protobuf Encoding").
Out:  for each span in it, in order, a function that reads it or raises `InvalidSpanError`.
Pure. Ids are hexadecimal in either case, names lowerCamelCase, 64-bit numbers text or numbers, unknown names ignored.
Beyond the specification, for senders that are nearly right: names in snake_case, enums by name, integral floats.
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

from evalvault_sdk.otel.plain import TOO_DEEP, shared, storable
from evalvault_sdk.otel.span import KINDS, STATUS_CODES, InvalidSpanError, Scope, Span, SpanEvent, SpanLink
from evalvault_sdk.server.answers import ApiError
from evalvault_sdk.server.ingest import parse_json
from evalvault_sdk.server.otlp.bounds import Bounds, is_too_deep

_INTEGER = re.compile(r"-?[0-9]{1,20}")
_UINT32 = range(2**32)
_UINT64 = range(2**64)
_INT64 = range(-(2**63), 2**63)
_CAPITAL = re.compile(r"[A-Z]")

#: The kinds of a value, in the order in which protobuf numbers them.
_VALUE_KINDS = (
    *("stringValue", "boolValue", "intValue", "doubleValue"),
    *("arrayValue", "kvlistValue", "bytesValue"),
)


def spans_in(body: bytes, bounds: Bounds) -> Iterator[Callable[[], Span]]:
    """Yield a reader for each span. Raises `ApiError` for what is no such request, or for too much of it."""
    request, _ = parse_json(body)  # what may be odd in it, is made good wherever it stands
    if not isinstance(request, dict):
        raise ApiError(400, "Malformed OTLP", "the body is no ExportTraceServiceRequest: it must be an object")
    try:
        for resource_spans in _objects(_object(request, "the body"), "resourceSpans"):
            resource = shared(_attributes(_object(_field(resource_spans, "resource"), "resource")))
            for scope_spans in _objects(resource_spans, "scopeSpans"):
                scope = _scope(_object(_field(scope_spans, "scope"), "scope"))
                for span in _list(scope_spans, "spans"):
                    bounds.span()
                    yield partial(_span, span, resource, scope)
    except InvalidSpanError as error:
        raise ApiError(400, "Malformed OTLP", f"the body is no ExportTraceServiceRequest: {error}") from None


_SNAKE_CASE: dict[str, str] = {}


def _field(message: Mapping[str, Any], name: str) -> Any:
    """Return a field by its name in lowerCamelCase, or else in snake_case; null is as good as absent."""
    value = message.get(name)
    if value is None:
        snake_case = _SNAKE_CASE.get(name)
        if snake_case is None:  # a handful of names, each of them ours
            snake_case = _SNAKE_CASE[name] = _CAPITAL.sub(lambda capital: "_" + capital[0].lower(), name)
        value = message.get(snake_case)
    return value


def _object(value: Any, name: str) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidSpanError(f"{name} must be an object")
    return value


def _list(message: Mapping[str, Any], name: str) -> list[Any]:
    value = _field(message, name)
    if value is None:
        return []
    if not isinstance(value, list):
        raise InvalidSpanError(f"{name} must be a list")
    return value


def _objects(message: Mapping[str, Any], name: str) -> Iterator[Mapping[str, Any]]:
    for item in _list(message, name):
        yield _object(item, f"each of {name}")


def _text(message: Mapping[str, Any], name: str) -> str:
    value = _field(message, name)
    if value is None:
        return ""
    if not isinstance(value, str):
        raise InvalidSpanError(f"{name} must be a string")
    return storable(value)


def _integer(value: Any, name: str, allowed: range) -> int:
    if (isinstance(value, str) and _INTEGER.fullmatch(value)) or (isinstance(value, float) and value.is_integer()):
        value = int(value)
    if isinstance(value, bool) or not isinstance(value, int) or value not in allowed:
        raise InvalidSpanError(f"{name} must be an integer from {allowed[0]} to {allowed[-1]}")
    return value


def _count(message: Mapping[str, Any], name: str, allowed: range = _UINT32) -> int:
    value = _field(message, name)
    return 0 if value is None else _integer(value, name, allowed)


def _enum(message: Mapping[str, Any], name: str, names: tuple[str, ...], prefix: str) -> str:
    value = _field(message, name)
    if isinstance(value, str) and not _INTEGER.fullmatch(value):
        known = value.removeprefix(prefix).lower()
        return known if known in names else names[0]
    number = 0 if value is None else _integer(value, name, _INT64)
    return names[number] if 0 <= number < len(names) else names[0]


def _span(given: Any, resource: dict[str, Any], scope: Scope) -> Span:
    span = _object(given, "a span")
    status = _object(_field(span, "status"), "status")
    return Span(
        trace_id=_text(span, "traceId").lower(),
        span_id=_text(span, "spanId").lower(),
        parent_span_id=_text(span, "parentSpanId").lower() or None,
        trace_state=_text(span, "traceState"),
        name=_text(span, "name"),
        kind=_enum(span, "kind", KINDS, "SPAN_KIND_"),
        start_time_unix_nano=_count(span, "startTimeUnixNano", _UINT64),
        end_time_unix_nano=_count(span, "endTimeUnixNano", _UINT64),
        status_code=_enum(status, "code", STATUS_CODES, "STATUS_CODE_"),
        status_message=_text(status, "message"),
        attributes=_attributes(span),
        events=[_event(event) for event in _objects(span, "events")],
        links=[_link(link) for link in _objects(span, "links")],
        resource=resource,
        scope=scope,
        dropped_attributes_count=_count(span, "droppedAttributesCount"),
        dropped_events_count=_count(span, "droppedEventsCount"),
        dropped_links_count=_count(span, "droppedLinksCount"),
    )


def _scope(scope: Mapping[str, Any]) -> Scope:
    return Scope(_text(scope, "name"), _text(scope, "version"), shared(_attributes(scope)))


def _event(event: Mapping[str, Any]) -> SpanEvent:
    return SpanEvent(
        _text(event, "name"),
        _count(event, "timeUnixNano", _UINT64),
        _attributes(event),
        _count(event, "droppedAttributesCount"),
    )


def _link(link: Mapping[str, Any]) -> SpanLink:
    return SpanLink(
        _text(link, "traceId").lower(),
        _text(link, "spanId").lower(),
        _text(link, "traceState"),
        _attributes(link),
        _count(link, "droppedAttributesCount"),
    )


def _attributes(message: Mapping[str, Any], name: str = "attributes", depth: int = 0) -> dict[str, Any]:
    return {_text(pair, "key"): _value(_field(pair, "value"), depth) for pair in _objects(message, name)}


def _value(given: Any, depth: int) -> Any:
    value = _object(given, "the value of an attribute")
    for kind in _VALUE_KINDS:
        inner = _field(value, kind)
        if inner is not None:
            return _value_of(kind, inner, depth)
    return None


def _value_of(kind: str, inner: Any, depth: int) -> Any:
    if kind == "stringValue" and isinstance(inner, str):
        return storable(inner)
    if kind == "boolValue" and isinstance(inner, bool):
        return inner
    if kind == "intValue":
        return _integer(inner, kind, _INT64)
    if kind == "doubleValue" and isinstance(inner, int | float | str) and not isinstance(inner, bool):
        try:
            return float(inner)  # also "NaN", "Infinity" and "-Infinity", which protobuf writes as text
        except (ValueError, OverflowError):
            pass
    if kind == "bytesValue" and isinstance(inner, str):
        try:
            # Either alphabet and missing padding are taken, as protobuf takes them.
            return base64.b64decode(inner.replace("-", "+").replace("_", "/") + "=" * (-len(inner) % 4), validate=True)
        except (binascii.Error, ValueError):
            pass
    if kind in ("arrayValue", "kvlistValue") and isinstance(inner, dict):
        if is_too_deep(depth + 1):
            return TOO_DEEP
        if kind == "arrayValue":
            return [_value(item, depth + 1) for item in _list(inner, "values")]
        return _attributes(inner, "values", depth + 1)
    raise InvalidSpanError(f"an attribute has a malformed {kind}")

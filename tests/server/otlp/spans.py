"""Requests to read, and spans to map, made by hand."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, KeyValue, KeyValueList
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtobufSpan

from evalvault_sdk import StageEvent
from evalvault_sdk.server.metrics import metrics_of
from evalvault_sdk.server.otlp import Span, read_spans, stage_event_of

DATA = Path(__file__).resolve().parent / "data"

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN_ID = "00f067aa0ba902b7"
OTHER_SPAN_ID = "b9c7c989f97918e1"
START = 1_730_000_000_000_000_000


def json_value(value: Any) -> dict[str, Any]:
    """Return a value of an attribute as OTLP/JSON writes it."""
    if value is None:
        return {}
    if isinstance(value, bool):
        return {"boolValue": value}
    if isinstance(value, int):
        return {"intValue": str(value)}
    if isinstance(value, float):
        return {
            "doubleValue": value
            if value - value == 0
            else {"inf": "Infinity", "-inf": "-Infinity"}.get(str(value), "NaN")
        }
    if isinstance(value, bytes):
        return {"bytesValue": base64.b64encode(value).decode()}
    if isinstance(value, list):
        return {"arrayValue": {"values": [json_value(item) for item in value]}}
    if isinstance(value, dict):
        return {"kvlistValue": {"values": json_attributes(value)}}
    return {"stringValue": value}


def json_attributes(attributes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"key": key, "value": json_value(value)} for key, value in attributes.items()]


def json_span(attributes: dict[str, Any] | None = None, **fields: Any) -> dict[str, Any]:
    """Return a valid span as OTLP/JSON writes it; a field that is None is left out."""
    span = {
        "traceId": TRACE_ID,
        "spanId": SPAN_ID,
        "name": "step",
        "startTimeUnixNano": str(START),
        "endTimeUnixNano": str(START + 1_500_000),
        "attributes": json_attributes(attributes or {}),
        **fields,
    }
    return {name: value for name, value in span.items() if value is not None}


def json_request(*spans: Any, resource: dict[str, Any] | None = None, scope: dict[str, Any] | None = None) -> Any:
    scoped: dict[str, Any] = {"spans": list(spans)}
    if scope is not None:
        scoped["scope"] = scope
    return {"resourceSpans": [{"resource": {"attributes": json_attributes(resource or {})}, "scopeSpans": [scoped]}]}


def protobuf_value(value: Any) -> AnyValue:
    if value is None:
        return AnyValue()
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, int):
        return AnyValue(int_value=value)
    if isinstance(value, float):
        return AnyValue(double_value=value)
    if isinstance(value, bytes):
        return AnyValue(bytes_value=value)
    if isinstance(value, list):
        return AnyValue(array_value=ArrayValue(values=[protobuf_value(item) for item in value]))
    if isinstance(value, dict):
        return AnyValue(kvlist_value=KeyValueList(values=protobuf_attributes(value)))
    return AnyValue(string_value=value)


def protobuf_attributes(attributes: dict[str, Any]) -> list[KeyValue]:
    return [KeyValue(key=key, value=protobuf_value(value)) for key, value in attributes.items()]


def protobuf_span(attributes: dict[str, Any] | None = None, **fields: Any) -> ProtobufSpan:
    given = {
        "trace_id": bytes.fromhex(TRACE_ID),
        "span_id": bytes.fromhex(SPAN_ID),
        "name": "step",
        "start_time_unix_nano": START,
        "end_time_unix_nano": START + 1_500_000,
        "attributes": protobuf_attributes(attributes or {}),
        **fields,
    }
    return ProtobufSpan(**given)


def protobuf_request(*spans: ProtobufSpan, resource: dict[str, Any] | None = None) -> bytes:
    request = ExportTraceServiceRequest()
    resource_spans = request.resource_spans.add()
    resource_spans.resource.attributes.extend(protobuf_attributes(resource or {}))
    resource_spans.scope_spans.add().spans.extend(spans)
    body: bytes = request.SerializeToString()
    return body


def read_json(request: Any) -> Any:
    return read_spans(json.dumps(request).encode(), protobuf=False)


def one_span(attributes: dict[str, Any] | None = None, resource: dict[str, Any] | None = None, **fields: Any) -> Span:
    """Return a span that went through OTLP/JSON."""
    batch = read_json(json_request(json_span(attributes, **fields), resource=resource))
    assert not batch.rejected, batch.rejected
    span: Span = batch.spans[0]
    return span


def event_with(attributes: dict[str, Any] | None = None, **fields: Any) -> StageEvent:
    return stage_event_of(one_span(attributes, **fields))


def metrics_with(event: StageEvent) -> dict[str, float]:
    return {metric.metric_name: metric.score for metric in metrics_of(event)}


def least_seconds(work: Callable[[], object]) -> float:
    """Return how long some work takes where nothing comes between."""

    def once() -> float:
        started = time.perf_counter()
        work()
        return time.perf_counter() - started

    return min(once() for _ in range(3))


def recorded(name: str) -> dict[str, StageEvent]:
    """Return the stage events of a recorded request, by the names of their spans."""
    batch = read_spans((DATA / name).read_bytes(), protobuf=False)
    assert not batch.rejected
    return {span.name: stage_event_of(span) for span in batch.spans}

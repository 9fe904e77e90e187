"""
OTLP > SPAN > STAGE EVENT: what lets a program traced by OpenTelemetry send to us without our SDK.

    batch = read_spans(body, protobuf=is_protobuf(content_type))
    events = [stage_event_of(span) for span in batch.spans]
    answer = response_body(batch.rejected, protobuf=...)

Nothing here needs FastAPI, and JSON not even the package for protobuf.
"""

from __future__ import annotations

from evalvault_sdk.otel.mapping import DEFAULT_RUN_ID, stage_event_of
from evalvault_sdk.otel.span import InvalidSpanError, Span
from evalvault_sdk.server.otlp.answer import error_body, response_body
from evalvault_sdk.server.otlp.decode import (
    JSON_TYPE,
    PROTOBUF_TYPE,
    RejectedSpan,
    SpanBatch,
    is_protobuf,
    read_spans,
)

__all__ = [
    "DEFAULT_RUN_ID",
    "JSON_TYPE",
    "PROTOBUF_TYPE",
    "InvalidSpanError",
    "RejectedSpan",
    "Span",
    "SpanBatch",
    "error_body",
    "is_protobuf",
    "read_spans",
    "response_body",
    "stage_event_of",
]

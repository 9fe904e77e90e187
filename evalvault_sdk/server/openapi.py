"""
What the generated API documentation says beyond the signatures: bodies, answers, examples.

In:   nothing.
Out:  constants for the routes; `/docs` shows them.
"""

from __future__ import annotations

from typing import Any

_EVENT: dict[str, Any] = {
    "run_id": "rag-001",
    "stage_id": "01a1f6d0-7c00-7abc-9def-0123456789ab",
    "stage_type": "query_rewrite",
    "stage_name": "query_rewriter_v2",
    "parent_stage_id": "input-123",
    "status": "success",
    "started_at": "2026-01-07T10:00:00Z",
    "finished_at": "2026-01-07T10:00:00.045Z",
    "duration_ms": 45.2,
    "attributes": {"original": "보험 보장금액은?", "rewritten": "보험 보장금액이 얼마인지 알려주세요"},
    "metadata": {"model": "gpt-4", "temperature": 0.7},
    "trace_id": "4bf92f3577b34da6a3ce929d0e0e4736",
    "span_id": "00f067aa0ba902b7",
}
_RETRIEVAL: dict[str, Any] = {
    "run_id": "rag-001",
    "stage_id": "01a1f6d0-7c10-7abc-9def-0123456789ac",
    "stage_type": "retrieval",
    "duration_ms": 120,
    "attributes": {"doc_ids": ["doc-1", "doc-7"], "scores": [0.91, 0.72], "top_k": 5},
}
_REJECTED = {
    "index": 1,
    "stage_id": None,
    "error": "Invalid stage event",
    "details": "stage_type is required",
}
_METRIC = {
    "run_id": "rag-001",
    "stage_id": _RETRIEVAL["stage_id"],
    "metric_name": "retrieval.latency_ms",
    "score": 120.0,
    "threshold": 500.0,
    "passed": True,
    "evidence": {"duration_ms": 120.0, "comparison": "max"},
}
_SUMMARY = {
    "run_id": "rag-001",
    "total_events": 2,
    "stage_type_counts": {"query_rewrite": 1, "retrieval": 1},
    "stage_type_avg_durations": {"query_rewrite": 45.2, "retrieval": 120.0},
    "missing_required_stage_types": ["system_prompt", "input", "output"],
}

_PAYLOAD_REF_SCHEMA = {
    "type": ["object", "null"],
    "required": ["store", "id"],
    "properties": {
        "store": {"type": "string", "minLength": 1},
        "id": {"type": "string", "minLength": 1},
        "type": {"type": "string", "default": "json"},
    },
}
_TIME_SCHEMA = {
    "type": ["string", "null"],
    "description": "ISO 8601; without an offset it is taken as UTC.",
}
_TEXT_SCHEMA = {"type": ["string", "null"]}
_EVENT_SCHEMA: dict[str, Any] = {
    "title": "StageEvent",
    "type": "object",
    "required": ["run_id", "stage_type"],
    "properties": {
        "run_id": {"type": "string", "minLength": 1},
        "stage_type": {"type": "string", "minLength": 1, "description": "Stripped and lower-cased."},
        "stage_id": {"type": ["string", "null"], "description": "The event's identity; made by the sender."},
        "stage_name": _TEXT_SCHEMA,
        "parent_stage_id": _TEXT_SCHEMA,
        "status": {"type": ["string", "null"], "default": "success"},
        "attempt": {"type": ["integer", "null"], "minimum": 1, "default": 1},
        "started_at": _TIME_SCHEMA,
        "finished_at": _TIME_SCHEMA,
        "duration_ms": {"type": ["number", "null"], "minimum": 0},
        "input_ref": _PAYLOAD_REF_SCHEMA,
        "output_ref": _PAYLOAD_REF_SCHEMA,
        "attributes": {"type": ["object", "null"]},
        "metadata": {"type": ["object", "null"]},
        "trace_id": _TEXT_SCHEMA,
        "span_id": _TEXT_SCHEMA,
        "trace": {
            "type": ["object", "null"],
            "properties": {"trace_id": _TEXT_SCHEMA, "span_id": _TEXT_SCHEMA},
        },
    },
}
_BATCH_SCHEMA = {
    "title": "StageEventBatch",
    "type": "object",
    "required": ["events"],
    "properties": {"events": {"type": "array", "minItems": 1, "items": _EVENT_SCHEMA}},
}


def _answer(description: str, example: Any) -> dict[str, Any]:
    return {"description": description, "content": {"application/json": {"example": example}}}


_Responses = dict[int | str, dict[str, Any]]

_UNAUTHORIZED: _Responses = {
    401: _answer(
        "The server has a token, and the request does not bear it.",
        {"error": "Unauthorized", "details": "..."},
    )
}
_UNAVAILABLE: _Responses = {
    503: _answer(
        "The database is not to be had; `Retry-After` says when to try again.",
        {"error": "Database unavailable", "details": "nothing was stored; try again later"},
    )
}
_NOT_FOUND: _Responses = {
    404: _answer(
        "The run has no events.",
        {"error": "Run not found", "details": "there are no stage events of the run 'rag-001'"},
    )
}

POST_EVENTS: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "One event, or a batch; `Content-Encoding: gzip` is understood.",
        "content": {
            "application/json": {
                "schema": {"oneOf": [_EVENT_SCHEMA, _BATCH_SCHEMA]},
                "examples": {
                    "one event": {"value": _EVENT},
                    "a batch": {"value": {"events": [_EVENT, _RETRIEVAL]}},
                },
            }
        },
    }
}
_STORED = {"stored": 1, "run_id": "rag-001", "stage_ids": [_EVENT["stage_id"]]}
POST_EVENTS_RESPONSES: _Responses = {
    200: _answer("All events are stored.", _STORED),
    207: _answer("Some events are stored; the others are named.", {**_STORED, "rejected": [_REJECTED]}),
    400: _answer(
        "The body is no JSON, or not what its encoding says.",
        {"error": "Malformed JSON", "details": "unexpected character at line 1 column 2"},
    ),
    413: _answer(
        "The body, or the number of its events, is over the limit.",
        {"error": "Request too large", "details": "a body may have 16777216 bytes", "limit_bytes": 16777216},
    ),
    415: _answer(
        "The body's type or encoding is not understood.",
        {"error": "Unsupported content type", "details": "Content-Type must be application/json"},
    ),
    422: _answer(
        "No event is valid.",
        {
            "error": "Invalid stage event",
            "details": "stage_type is required",
            "index": 0,
            "rejected": [{**_REJECTED, "index": 0}],
        },
    ),
    **_UNAUTHORIZED,
    **_UNAVAILABLE,
}


def _reads(description: str, example: Any) -> _Responses:
    return {200: _answer(description, example), **_NOT_FOUND, **_UNAUTHORIZED, **_UNAVAILABLE}


EVENTS_RESPONSES = _reads("The events.", {"run_id": "rag-001", "events": [_EVENT], "total": 5, "returned": 1})
METRICS_RESPONSES = _reads("The metrics.", {"run_id": "rag-001", "metrics": [_METRIC], "total": 4, "returned": 1})
SUMMARY_RESPONSES = _reads("The summary.", _SUMMARY)
DEBUG_RESPONSES = _reads(
    "The report.",
    {
        "run_summary": {
            "run_id": "rag-001",
            "started_at": "2026-01-07T10:00:00+00:00",
            "finished_at": "2026-01-07T10:00:00.165000+00:00",
            "duration_seconds": 0.165,
            "total_events": 2,
            "total_traces": 1,
            "error_count": 0,
            "total_stage_metrics": 5,
        },
        "stage_summary": _SUMMARY,
        "stage_metrics": [_METRIC],
        "bottlenecks": [
            {"type": "missing_stage", "stage_type": "output", "detail": "required stage missing"},
            {"type": "latency", "stage_type": "retrieval", "avg_duration_ms": 120.0},
        ],
        "recommendations": ["[p0_critical] retriever: Documents match their queries weakly - ..."],
        "phoenix_trace_url": None,
        "langfuse_trace_url": None,
    },
)

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


def _schema_of(example: Any) -> dict[str, Any]:
    """Return the schema of an answer by its example: its fields and their kinds."""
    if isinstance(example, dict):
        return {"type": "object", "properties": {name: _schema_of(value) for name, value in example.items()}}
    if isinstance(example, list):
        return {"type": "array", "items": _schema_of(example[0])} if example else {"type": "array"}
    for kind, name in ((bool, "boolean"), (int, "integer"), (float, "number"), (str, "string")):
        if isinstance(example, kind):
            return {"type": [name, "null"]}
    return {}


def _answer(description: str, example: dict[str, Any], schema: dict[str, Any] | None = None) -> dict[str, Any]:
    content = {"schema": schema or _schema_of(example), "example": example}
    return {"description": description, "content": {"application/json": content}}


_ERROR_SCHEMA = {
    "title": "Error",
    "type": "object",
    "required": ["error", "details"],
    "properties": {"error": {"type": "string"}, "details": {"type": "string"}},
}


def _error(description: str, error: str, details: str, **more: Any) -> dict[str, Any]:
    return _answer(description, {"error": error, "details": details, **more}, _ERROR_SCHEMA)


_Responses = dict[int | str, dict[str, Any]]

_UNAUTHORIZED: _Responses = {
    401: _error(
        "The server has a token, and the request does not bear it.",
        "Unauthorized",
        "send the header 'Authorization: Bearer <token>' with the server's token",
    )
}
_FORBIDDEN: _Responses = {
    403: _error(
        "The token does not allow that, or not for this run.",
        "Forbidden",
        "this token is for runs whose id begins with 'prod-'",
    )
}
_TOO_MANY: _Responses = {
    429: {
        **_error(
            "There is a rate limit, and it is reached.", "Too many requests", "50 a second are allowed; try again later"
        ),
        "headers": {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}},
    }
}
_UNAVAILABLE: _Responses = {
    503: {
        **_error(
            "The database is not to be had, or too many requests came at once.",
            "Database unavailable",
            "the database does not do what it should; send the same again later",
        ),
        "headers": {"Retry-After": {"description": "Seconds to wait.", "schema": {"type": "integer"}}},
    }
}
_ALWAYS: _Responses = {**_UNAUTHORIZED, **_FORBIDDEN, **_TOO_MANY, **_UNAVAILABLE}
_SLOW_BODY: _Responses = {
    408: _error("The body takes too long to arrive.", "Request timeout", "the body did not arrive within 30 s")
}
_NOT_FOUND: _Responses = {
    404: _error("The run has no events.", "Run not found", "there are no stage events of the run 'rag-001'")
}
_BAD_QUERY: _Responses = {
    422: _error(
        "A parameter is not what it may be.",
        "Invalid request",
        "limit: Input should be a valid integer, unable to parse string as an integer",
    )
}

_LINES = '{"run_id": "rag-001", "stage_type": "input"}\n{"run_id": "rag-001", "stage_type": "output"}\n'

POST_EVENTS: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "One event, a batch, or one event a line; `Content-Encoding` may be `gzip` or `zstd`.",
        "content": {
            "application/x-ndjson": {"schema": {"type": "string"}, "example": _LINES},
            "application/json": {
                "schema": {"oneOf": [_EVENT_SCHEMA, _BATCH_SCHEMA]},
                "examples": {
                    "one event": {"value": _EVENT},
                    "a batch": {"value": {"events": [_EVENT, _RETRIEVAL]}},
                },
            },
        },
    }
}
_STORED = {"stored": 1, "run_id": "rag-001", "stage_ids": [_EVENT["stage_id"]]}
POST_EVENTS_RESPONSES: _Responses = {
    200: _answer("All events are stored.", _STORED),
    207: _answer("Some events are stored; the others are named.", {**_STORED, "rejected": [_REJECTED]}),
    400: _error(
        "The body is no JSON, or not what its encoding says.",
        "Malformed JSON",
        "unexpected character at line 1 column 2",
    ),
    413: _error(
        "The body, or the number of its events, is over the limit.",
        "Request too large",
        "a body may have 16777216 bytes",
        limit_bytes=16777216,
    ),
    415: _error(
        "The body's type or encoding is not understood.",
        "Unsupported content type",
        "Content-Type must be application/json or application/x-ndjson",
    ),
    422: _error(
        "No event is valid.",
        "Invalid stage event",
        "stage_type is required",
        index=0,
        rejected=[{**_REJECTED, "index": 0}],
    ),
    **_SLOW_BODY,
    **_ALWAYS,
}


def _reads(description: str, example: Any) -> _Responses:
    return {200: _answer(description, example), **_NOT_FOUND, **_BAD_QUERY, **_ALWAYS}


EVENTS_RESPONSES = _reads(
    "The events.", {"run_id": "rag-001", "events": [_EVENT], "total": 5, "returned": 1, "next_cursor": "17"}
)
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
            "slowest_trace_id": _EVENT["trace_id"],
            "total_stage_metrics": 5,
        },
        "stage_summary": _SUMMARY,
        "stage_metrics": [_METRIC],
        "failing_metrics": [
            {"metric_name": "retrieval.avg_score", "failing": 1, "of": 1, "threshold": 0.2, "worst": 0.1}
        ],
        "bottlenecks": [
            {"type": "missing_stage", "stage_type": "output", "detail": "required stage missing"},
            {"type": "latency", "stage_type": "retrieval", "avg_duration_ms": 120.0},
        ],
        "recommendations": ["[p0_critical] retriever: Documents match their queries weakly - ..."],
        "phoenix_trace_url": None,
        "langfuse_trace_url": None,
    },
)

DEBUG_RESPONSES[200]["content"]["text/markdown"] = {
    "schema": {"type": "string"},
    "example": "# Debug report: rag-001\n",
}

RUNS_RESPONSES: _Responses = {
    200: _answer(
        "The runs.",
        {
            "runs": [
                {
                    "run_id": "rag-001",
                    "total_events": 972,
                    "error_count": 3,
                    "first_event_at": "2026-01-07T10:00:00+00:00",
                    "last_event_at": "2026-01-07T10:31:07.165000+00:00",
                }
            ],
            "returned": 1,
            "next_cursor": None,
        },
    ),
    **_BAD_QUERY,
    **_ALWAYS,
}
TRACES_RESPONSES = _reads(
    "The traces.",
    {
        "run_id": "rag-001",
        "traces": [
            {
                "trace_id": _EVENT["trace_id"],
                "name": "answer_question",
                "status": "success",
                "started_at": "2026-01-07T10:00:00+00:00",
                "finished_at": "2026-01-07T10:00:00.165000+00:00",
                "duration_ms": 165.0,
                "stage_count": 1,
                "error_count": 0,
                "complete": True,
                "stages": [
                    {
                        "stage_id": _EVENT["stage_id"],
                        "parent_stage_id": "input-123",
                        "stage_type": "query_rewrite",
                        "stage_name": "query_rewriter_v2",
                        "status": "success",
                        "started_at": "2026-01-07T10:00:00+00:00",
                        "duration_ms": 45.2,
                    }
                ],
            }
        ],
        "returned": 1,
        "next_cursor": None,
    },
)
STORE_METRICS_RESPONSES = _reads("The metrics are stored.", {"run_id": "rag-001", "stored": 4})
_UNSUPPORTED: _Responses = {
    501: _error("The database is of a kind that cannot do that.", "Not supported", "EvalVault's storage ...")
}
DELETE_RESPONSES: _Responses = {**_reads("The run is deleted.", {"run_id": "rag-001", "deleted": 972}), **_UNSUPPORTED}


def _streams(description: str, **examples: str) -> _Responses:
    content = {
        media_type.replace("_", "/", 1): {"schema": {"type": "string"}, "example": example}
        for media_type, example in examples.items()
    }
    return {200: {"description": description, "content": content}, **_BAD_QUERY, **_ALWAYS}


EXPORT_RESPONSES: _Responses = {
    **_streams("The events.", **{"application_x-ndjson": _LINES, "text_csv": "run_id,stage_id,parent_stage_id\r\n"}),
    **_NOT_FOUND,
}
LIVE_RESPONSES = _streams(
    "Events, as they are stored, without end.",
    **{"text_event-stream": 'event: stage\nid: 17\ndata: {"run_id": "rag-001"}\n\n'},
)

_OTLP_EXAMPLE = {
    "resourceSpans": [
        {
            "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "rag-service"}}]},
            "scopeSpans": [
                {
                    "spans": [
                        {
                            "traceId": _EVENT["trace_id"],
                            "spanId": _EVENT["span_id"],
                            "name": "retrieve",
                            "startTimeUnixNano": "1730000000000000000",
                            "endTimeUnixNano": "1730000000500000000",
                            "attributes": [{"key": "rag.module", "value": {"stringValue": "retrieve"}}],
                        }
                    ]
                }
            ],
        }
    ]
}
_OTLP_JSON = {"schema": {"type": "object"}, "example": _OTLP_EXAMPLE}
POST_OTLP_JSON: dict[str, Any] = {"requestBody": {"required": True, "content": {"application/json": _OTLP_JSON}}}
POST_TRACES: dict[str, Any] = {
    "parameters": [
        {
            "name": "X-EvalVault-Run-Id",
            "in": "header",
            "required": False,
            "schema": {"type": "string"},
            "description": "The run of all spans.",
        }
    ],
    "requestBody": {
        "required": True,
        "description": "An ExportTraceServiceRequest; `Content-Encoding` may be `gzip` or `zstd`.",
        "content": {
            "application/x-protobuf": {"schema": {"type": "string", "format": "binary"}},
            "application/json": _OTLP_JSON,
        },
    },
}
_STATUS = {"code": 3, "message": "Malformed protobuf: ..."}
POST_TRACES_RESPONSES: _Responses = {
    200: _answer("The spans are stored, but for those that are counted here.", {"partialSuccess": {}}),
    **{
        status: _answer(description, _STATUS)
        for status, description in {
            400: "The body is no request of OTLP's; do not send it again.",
            401: "The token is missing, or unknown.",
            403: "The token does not allow that.",
            408: "The body takes too long to arrive.",
            413: "The request is over a limit.",
            415: "The body's type or encoding is not understood.",
            429: "The rate limit is reached; send the same again after `Retry-After`.",
            503: "Send the same again after `Retry-After`.",
        }.items()
    },
}
POST_LINES: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {"application/jsonl": {"schema": {"type": "string"}, "example": _LINES}},
    }
}
_DRAFTED_ERROR = {"status": "error", "error_code": "invalid_payload", "message": "stage_type is required"}
DRAFTED_RESPONSES: _Responses = {
    200: _answer("Stored.", {"status": "ok", "run_id": "rag-001", "ingested": 5, "message": "stored stage events"}),
    **{
        status: _answer(description, _DRAFTED_ERROR)
        for status, description in {
            400: "The body cannot be parsed.",
            401: "The token is missing, or unknown.",
            403: "The token does not allow that.",
            408: "The body takes too long to arrive.",
            413: "The request is over a limit.",
            415: "The body's type or encoding is not understood.",
            422: "A field is missing, or not what it may be.",
            429: "The rate limit is reached.",
            503: "Nothing was stored; try again later.",
        }.items()
    },
}
READY_RESPONSES: _Responses = {200: _answer("Events can be stored.", {"status": "ready"}), **_UNAVAILABLE}
PROMETHEUS_RESPONSES: _Responses = {
    200: {
        "description": "The metrics.",
        "content": {"text/plain": {"schema": {"type": "string"}, "example": "evalvault_server_events_total 1.0\n"}},
    },
    **_ALWAYS,
}

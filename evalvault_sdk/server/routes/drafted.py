"""
The endpoints that EvalVault's own draft of an ingest API names, with its answers.

In:   stage events, one a line; spans as OTLP/JSON.
Out:  `{"status": "ok", "ingested", "message", ...}`, or `{"status": "error", "error_code", "message"}`: 400 for
      what cannot be parsed, 422 for what lacks a field.

Where the draft is silent we do as elsewhere: what is good of a body is stored, and the answer names the rest.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from fastapi import APIRouter, Request, Response

from evalvault_sdk.server import openapi
from evalvault_sdk.server.answers import ApiError
from evalvault_sdk.server.ingest import Submission, read_submissions
from evalvault_sdk.server.routes.base import access_of, content_type, create_router, json_response
from evalvault_sdk.server.routes.otlp import take_spans
from evalvault_sdk.server.routes.write import LINES
from evalvault_sdk.server.services import Services

_CODES = {400: "invalid_payload", 413: "too_large", 422: "invalid_payload", 429: "rate_limited", 503: "unavailable"}


def create_routes(services: Services) -> APIRouter:
    """Return the endpoints."""
    router = create_router(services, prefix="/api/v1/ingest", tags=("EvalVault's draft",), answer=_answer)

    @router.post("/stage-events", openapi_extra=openapi.POST_LINES, responses=openapi.DRAFTED_RESPONSES)
    async def post_stage_events(request: Request) -> Response:
        """Store events, one JSON object a line."""
        if content_type(request) not in LINES:
            raise ApiError(415, "Unsupported content type", "Content-Type must be application/jsonl")
        async with services.bodies.receive(request) as body:
            read = partial(read_submissions, lines=True, settings=services.settings)
            submission = await services.take(body, access_of(request), read)
        _check_any(submission)
        return _ok(submission, "stored stage events", run_id=submission.events[0].run_id)

    @router.post("/otel-traces", openapi_extra=openapi.POST_OTLP_JSON, responses=openapi.DRAFTED_RESPONSES)
    async def post_otel_traces(request: Request) -> Response:
        """Store OpenTelemetry's spans as stage events; see `/v1/traces`."""
        if content_type(request) != "application/json":
            raise ApiError(415, "Unsupported content type", "Content-Type must be application/json")
        submission = await take_spans(services, request, protobuf=False)
        if submission.rejected:
            _check_any(submission)
        run_id = submission.events[0].run_id if submission.events else None
        traces = list(dict.fromkeys(event.trace_id for event in submission.events))
        return _ok(submission, "ingested otlp traces", run_id=run_id, trace_ids=traces)

    return router


def _check_any(submission: Submission) -> None:
    if not submission.events:
        first = submission.rejected[0]
        status = 400 if first["error"].startswith("Malformed") else 422
        raise ApiError(status, first["error"], first["details"], extra={"rejected": list(submission.rejected)})


def _ok(submission: Submission, message: str, **more: Any) -> Response:
    answer: dict[str, Any] = {"status": "ok", **more, "ingested": len(submission.events), "message": message}
    if submission.rejected:
        answer["message"] = f"{message}; {len(submission.rejected)} were refused"
        answer["rejected"] = list(submission.rejected)
    return json_response(answer)


def _answer(request: Request, error: ApiError) -> Response:
    code = _CODES.get(error.status, error.error.lower().replace(" ", "_"))
    body = {"status": "error", "error_code": code, "message": error.details, **error.extra}
    return json_response(body, error.status, dict(error.headers))

"""
The endpoint that OpenTelemetry's exporters post to: OTLP over HTTP.

In:   an ExportTraceServiceRequest, in protobuf or JSON.
Out:  its spans as stage events; answers and errors as the specification has them ("OTLP/HTTP Response").
"""

from __future__ import annotations

from collections.abc import Iterator

from fastapi import APIRouter, Request, Response

from evalvault_sdk.errors import InvalidStageEventError
from evalvault_sdk.events import StageEvent
from evalvault_sdk.server import openapi
from evalvault_sdk.server.answers import ApiError
from evalvault_sdk.server.ingest import Submission, check_event, rejection
from evalvault_sdk.server.otlp import (
    JSON_TYPE,
    PROTOBUF_TYPE,
    RejectedSpan,
    error_body,
    is_protobuf,
    read_spans,
    response_body,
    stage_event_of,
)
from evalvault_sdk.server.routes.base import access_of, create_router
from evalvault_sdk.server.services import Services

#: A header by which an exporter names the run of all its spans (`OTEL_EXPORTER_OTLP_HEADERS`).
RUN_ID_HEADER = "x-evalvault-run-id"


def create_routes(services: Services) -> APIRouter:
    """Return the endpoint."""
    router = create_router(services, prefix="", tags=("OpenTelemetry",), answer=_answer)

    @router.post("/v1/traces", openapi_extra=openapi.POST_TRACES, responses=openapi.POST_TRACES_RESPONSES)
    async def post_traces(request: Request) -> Response:
        """
        Store OpenTelemetry's spans as stage events.

        Attributes of Open RAG Trace, OpenInference and the GenAI semantic conventions become stage types and
        the attributes that metrics are computed from. The run is the header `X-EvalVault-Run-Id`, else the
        attribute `evalvault.run_id` of span or resource, else the resource's `service.name`.
        """
        protobuf = is_protobuf(request.headers.get("content-type"))
        submission = await take_spans(services, request, protobuf=protobuf)
        rejected = [RejectedSpan(entry["index"], entry["details"]) for entry in submission.rejected]
        return Response(response_body(rejected, protobuf=protobuf), media_type=PROTOBUF_TYPE if protobuf else JSON_TYPE)

    return router


async def take_spans(services: Services, request: Request, *, protobuf: bool) -> Submission:
    """Store the spans in a request's body. Raises `ApiError` and `StoreError`."""
    run_id = request.headers.get(RUN_ID_HEADER)

    def read(body: bytes) -> Iterator[Submission]:
        batch = read_spans(body, protobuf=protobuf, settings=services.settings)
        refused = {span.index for span in batch.rejected}
        places = (index for index in range(len(batch.spans) + len(refused)) if index not in refused)
        events: list[StageEvent] = []
        kept: list[int] = []
        rejected = [rejection(span.index, None, span.reason) for span in batch.rejected]
        for index, span in zip(places, batch.spans, strict=True):
            try:
                event = stage_event_of(span, run_id=run_id)
                check_event(event)
            except InvalidStageEventError as error:
                rejected.append(rejection(index, span.span_id, str(error)))
            else:
                events.append(event)
                kept.append(index)
        yield Submission(events=events, places=kept, rejected=sorted(rejected, key=lambda entry: entry["index"]))

    async with services.bodies.receive(request) as body:
        return await services.take(body, access_of(request), read)


def _answer(request: Request, error: ApiError) -> Response:
    try:
        protobuf = is_protobuf(request.headers.get("content-type"))
    except ApiError:
        protobuf = False
    # What is wrong with the data is 400 in OTLP, whatever it is.
    status = 400 if error.status == 422 else error.status
    body = error_body(ApiError(status, error.error, error.details), protobuf=protobuf)
    return Response(body, status, dict(error.headers), PROTOBUF_TYPE if protobuf else JSON_TYPE)

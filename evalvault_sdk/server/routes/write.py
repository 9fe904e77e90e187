"""
Endpoints that change what is stored.

In:   bodies of events; the name of a run.
Out:  the contract's verdict on each event, after the commit.
"""

from __future__ import annotations

from functools import partial

from fastapi import APIRouter, Request, Response

from evalvault_sdk.errors import RunNotFoundError
from evalvault_sdk.server import openapi
from evalvault_sdk.server.answers import ApiError
from evalvault_sdk.server.ingest import read_submissions
from evalvault_sdk.server.routes.base import access_of, content_type, create_router, json_response
from evalvault_sdk.server.services import Services

#: One event a line.
LINES = frozenset({"application/x-ndjson", "application/ndjson", "application/jsonl", "application/x-jsonl"})


def create_routes(services: Services) -> APIRouter:
    """Return the endpoints."""
    router = create_router(services)

    @router.post("/events", openapi_extra=openapi.POST_EVENTS, responses=openapi.POST_EVENTS_RESPONSES)
    async def post_events(request: Request) -> Response:
        """
        Store one event, or a batch of them.

        Storing is an upsert by `run_id` and `stage_id`: sending an event again stores it once. Bad events
        are refused one by one, the others are stored. The answer comes after the commit.
        """
        kind = content_type(request)
        if kind != "application/json" and kind not in LINES:
            raise ApiError(
                415, "Unsupported content type", "Content-Type must be application/json or application/x-ndjson"
            )
        async with services.bodies.receive(request) as body:
            read = partial(read_submissions, lines=kind in LINES, settings=services.settings)
            submission = await services.take(body, access_of(request), read)
        status, answer = submission.answer()
        return json_response(answer, status)

    @router.delete("/runs/{run_id:path}", responses=openapi.DELETE_RESPONSES)
    async def delete_run(request: Request, run_id: str) -> Response:
        """Delete a run: its events, and the metrics that are stored for them."""
        access_of(request).check_run(run_id)
        deleted = await services.ask(services.store.delete_run, run_id)
        if not deleted:
            raise RunNotFoundError(run_id)
        services.telemetry.deleted.inc(deleted)
        return json_response({"run_id": run_id, "deleted": deleted})

    @router.post("/metrics/{run_id:path}", responses=openapi.STORE_METRICS_RESPONSES)
    async def store_metrics(request: Request, run_id: str) -> Response:
        """Compute the metrics of a run's stages, and store them where EvalVault's tools read them."""
        access_of(request).check_run(run_id)
        return json_response(await services.ask(services.reader.store_metrics, run_id))

    return router

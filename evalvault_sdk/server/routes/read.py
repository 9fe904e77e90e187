"""
Endpoints that answer questions about runs.

In:   the name of a run, filters, a cursor.
Out:  the contract's objects; an export as a stream.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Annotated, Any
from urllib.parse import quote

from fastapi import APIRouter, Query, Request, Response

from evalvault_sdk.errors import InvalidStageEventError
from evalvault_sdk.events import parse_time
from evalvault_sdk.server import openapi
from evalvault_sdk.server.answers import ApiError
from evalvault_sdk.server.export import FORMATS
from evalvault_sdk.server.report import as_markdown
from evalvault_sdk.server.routes.base import Stream, access_of, create_router, json_response
from evalvault_sdk.server.services import Services
from evalvault_sdk.server.store.base import EventFilter

_BLANK_OFFSET = re.compile(r" (\d\d:?\d\d)$")
_StageType = Annotated[str | None, Query(description="Only events of this stage type.")]
_TraceId = Annotated[str | None, Query(description="Only events of this trace.")]
_Status = Annotated[str | None, Query(description="Only events of this status: `success`, `error` ...")]
_Since = Annotated[str | None, Query(description="Only events that started then or later: ISO 8601.")]
#: Places are counted by the database, in 64 bits.
_Cursor = Annotated[
    int | None, Query(ge=0, lt=2**63, description="`next_cursor` of the page before; without it, the first page.")
]


def create_routes(services: Services) -> APIRouter:
    """Return the endpoints."""
    router = create_router(services)
    reader = services.reader

    @router.get("/runs", responses=openapi.RUNS_RESPONSES)
    async def get_runs(
        request: Request,
        cursor: _Cursor = None,
        limit: Annotated[int, Query(ge=1, le=1_000, description="Runs returned at most.")] = 100,
    ) -> Response:
        """List runs, the one that was stored to last first: events, errors, first and last time."""
        prefixes = access_of(request).runs
        return json_response(await services.ask(reader.runs, prefixes=prefixes, cursor=cursor, limit=limit))

    @router.get("/events/{run_id:path}", responses=openapi.EVENTS_RESPONSES)
    async def get_events(
        request: Request,
        run_id: str,
        stage_type: _StageType = None,
        status: _Status = None,
        trace_id: _TraceId = None,
        since: _Since = None,
        cursor: _Cursor = None,
        limit: Annotated[int, Query(ge=1, le=10_000, description="Events returned at most.")] = 200,
    ) -> Response:
        """List a run's events, in the order in which they were first stored."""
        access_of(request).check_run(run_id)
        which = _filter(stage_type=stage_type, status=status, trace_id=trace_id, since=since)
        return json_response(await services.ask(reader.events, run_id, which, cursor=cursor, limit=limit))

    @router.get("/traces/{run_id:path}", responses=openapi.TRACES_RESPONSES)
    async def get_traces(
        request: Request,
        run_id: str,
        status: Annotated[str | None, Query(description="Only traces with a stage of this status.")] = None,
        cursor: _Cursor = None,
        limit: Annotated[int, Query(ge=1, le=200, description="Traces returned at most.")] = 50,
    ) -> Response:
        """List a run's traces, the one that was stored to last first: duration, status, stages."""
        access_of(request).check_run(run_id)
        return json_response(await services.ask(reader.traces, run_id, status=status, cursor=cursor, limit=limit))

    @router.get("/metrics/{run_id:path}", responses=openapi.METRICS_RESPONSES)
    async def get_metrics(
        request: Request,
        run_id: str,
        stage_id: Annotated[str | None, Query(description="Only metrics of this stage.")] = None,
        metric_name: Annotated[str | None, Query(description="Only metrics of this name.")] = None,
        stored: Annotated[
            bool, Query(description="Those that are in `stage_metrics`, EvalVault's too; by default computed now.")
        ] = False,
        limit: Annotated[int, Query(ge=1, le=100_000, description="Metrics returned at most.")] = 10_000,
    ) -> Response:
        """List the metrics of a run's stages."""
        access_of(request).check_run(run_id)
        return json_response(
            await services.ask(
                reader.metrics, run_id, stage_id=stage_id, metric_name=metric_name, limit=limit, stored=stored
            )
        )

    @router.get("/summary/{run_id:path}", responses=openapi.SUMMARY_RESPONSES)
    async def get_summary(
        request: Request,
        run_id: str,
        detail: Annotated[
            bool, Query(description="Add `stage_types`: errors, mean and percentiles of each type.")
        ] = False,
    ) -> Response:
        """Sum up a run: events and mean duration by stage type, required types that are missing."""
        access_of(request).check_run(run_id)
        return json_response(await services.ask(reader.summary, run_id, detail=detail))

    @router.get("/debug/{run_id:path}", responses=openapi.DEBUG_RESPONSES)
    async def get_debug(
        request: Request,
        run_id: str,
        format: Annotated[str, Query(pattern="^(json|markdown)$", description="`json` or `markdown`.")] = "json",
        limit: Annotated[int, Query(ge=1, le=100_000, description="Metrics listed at most.")] = 10_000,
    ) -> Response:
        """Report a run's bottlenecks, failing metrics, and what to do about them."""
        access_of(request).check_run(run_id)
        report = await services.ask(reader.debug, run_id, limit=limit)
        if format == "markdown":
            return Response(as_markdown(report), media_type="text/markdown; charset=utf-8")
        return json_response(report)

    @router.get("/export/{run_id:path}", responses=openapi.EXPORT_RESPONSES)
    async def get_export(
        request: Request,
        run_id: str,
        format: Annotated[str, Query(pattern="^(jsonl|csv)$", description="`jsonl` or `csv`.")] = "jsonl",
        stage_type: _StageType = None,
        status: _Status = None,
        trace_id: _TraceId = None,
        since: _Since = None,
    ) -> Response:
        """Export a run: JSONL, which can be ingested elsewhere, or CSV for a spreadsheet. Sent as it is read."""
        access_of(request).check_run(run_id)
        which = _filter(stage_type=stage_type, status=status, trace_id=trace_id, since=since)
        write, media_type = FORMATS[format]
        pages = reader.pages(run_id, which)
        first = await services.ask(next, pages, None)  # a run that is not there is an answer, not a broken stream
        chunks = write(itertools.chain([] if first is None else [first], pages))
        name = quote(f"{run_id}.{format}", safe="")
        disposition = {"Content-Disposition": f"attachment; filename*=UTF-8''{name}"}  # RFC 6266, 4.3

        async def stream() -> AsyncIterator[bytes]:
            while (chunk := await services.ask(next, chunks, None)) is not None:
                yield chunk

        return Stream(stream(), headers=disposition, media_type=media_type)

    return router


def _filter(*, stage_type: str | None, status: str | None, trace_id: str | None, since: str | None) -> EventFilter:
    for name, value in (("stage_type", stage_type), ("status", status), ("trace_id", trace_id)):
        if value is not None and "\x00" in value:
            raise ApiError(422, "Invalid request", f"{name}: must not hold a NUL character")
    try:
        # A plus sign in an address that nobody escaped is a blank.
        moment: datetime | None = parse_time("since", since and _BLANK_OFFSET.sub(r"+\1", since))
    except InvalidStageEventError as error:
        raise ApiError(422, "Invalid request", str(error)) from None
    given: dict[str, Any] = {"status": status, "trace_id": trace_id, "since": moment}
    return EventFilter(stage_type=stage_type.strip().lower() if stage_type else None, **given)

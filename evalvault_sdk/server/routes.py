"""
The endpoints under `/api/stage`.

In:   HTTP requests.
Out:  the answers of the contract ("HTTP, as the plan has it"); every error is `{"error", "details", ...}`.

On the event loop, which does nothing but read bodies: parsing, storing and reading happen in threads.
The router carries all it needs, so that it works the same in our own app and in another FastAPI program.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Coroutine
from http import HTTPStatus
from typing import Annotated, Any

import orjson
from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from evalvault_sdk.errors import RunNotFoundError, StoreError
from evalvault_sdk.server import openapi
from evalvault_sdk.server.ingest import ApiError, IngestLimits, read_submission, too_large
from evalvault_sdk.server.reader import RunReader
from evalvault_sdk.server.report import as_markdown
from evalvault_sdk.server.security import check_token, check_token_setting
from evalvault_sdk.server.store.base import Store

logger = logging.getLogger("evalvault_sdk.server")

#: Seconds after which a client may try again when the database failed, or too many came at once.
_RETRY_AFTER = {"Retry-After": "2"}
#: Bodies parsed at once: each may cost some hundred megabytes. Reads have threads of their own.
_WRITE_THREADS = 4

_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return `body` as a JSON answer; a number that is none (NaN) becomes null."""
    return Response(orjson.dumps(body, option=orjson.OPT_NON_STR_KEYS), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    """Return an error as the contract has it."""
    return json_response(error.body(), error.status, dict(error.headers))


def as_api_error(error: Exception) -> ApiError:
    """Return the answer to whatever a handler raised; what it was goes to the log, not to the client."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RunNotFoundError):
        return ApiError(404, "Run not found", str(error))
    if isinstance(error, HTTPException):  # of the app that the router is included in: its own token check, say
        return ApiError(
            error.status_code, HTTPStatus(error.status_code).phrase, str(error.detail), headers=error.headers or {}
        )
    if isinstance(error, ClientDisconnect):
        return ApiError(400, "Incomplete request", "the connection was closed before the body was complete")
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:])
        return ApiError(422, "Invalid request", f"{field}: {first['msg']}")
    if isinstance(error, StoreError):
        logger.error("evalvault: %s", error)
        return ApiError(
            503,
            "Database unavailable",
            "nothing was stored; try again later",
            headers=_RETRY_AFTER,
        )
    logger.error("evalvault: a request failed by a fault of the server", exc_info=error)
    return ApiError(500, "Internal error", "this is a fault of the server; its log has the details")


class _Route(APIRoute):
    """A route whose errors are answered in the contract's form, whatever app it is included in."""

    def get_route_handler(self) -> _Handler:
        handler = super().get_route_handler()

        async def answer(request: Request) -> Response:
            try:
                return await handler(request)
            except Exception as error:  # noqa: BLE001 - each becomes an answer
                return error_response(as_api_error(error))

        return answer


def create_router(
    store: Store,
    *,
    token: str | None = None,
    limits: IngestLimits | None = None,
    reader: RunReader | None = None,
) -> APIRouter:
    """
    Return the endpoints `/api/stage/...` over `store`, to be included in a FastAPI app.

    With `token` every request must bear it. Whoever made the store closes it. Raises `ConfigurationError`
    for a blank token.
    """
    limits = limits or IngestLimits()
    reader = reader or RunReader(store)
    token = check_token_setting(token)
    write_threads = CapacityLimiter(_WRITE_THREADS)
    waiting = 0

    def authorize(request: Request) -> None:
        check_token(request.headers.get("authorization"), token)

    router = APIRouter(
        prefix="/api/stage",
        tags=["stage events"],
        route_class=_Route,
        dependencies=[Depends(authorize), *([Depends(HTTPBearer(auto_error=False))] if token else [])],
    )

    def take(body: bytes, content_encoding: str | None) -> tuple[int, dict[str, Any]]:
        submission = read_submission(body, content_encoding=content_encoding, limits=limits)
        if submission.events:
            submission = submission.without(store.save(submission.events))
        return submission.answer()

    @router.post("/events", openapi_extra=openapi.POST_EVENTS, responses=openapi.POST_EVENTS_RESPONSES)
    async def post_events(request: Request) -> Response:
        """
        Store one event, or a batch of them.

        Storing is an upsert by `run_id` and `stage_id`: sending an event again stores it once. Bad events
        are refused one by one, the others are stored. The answer comes after the commit.
        """
        nonlocal waiting
        if _content_type(request) != "application/json":
            raise ApiError(415, "Unsupported content type", "Content-Type must be application/json")
        body = await _read_body(request, limits)
        if waiting >= limits.max_waiting_requests:
            raise ApiError(503, "Overloaded", "too many requests are waiting; try again later", headers=_RETRY_AFTER)
        waiting += 1
        try:
            encoding = request.headers.get("content-encoding")
            status, answer = await to_thread.run_sync(take, body, encoding, limiter=write_threads)
        finally:
            waiting -= 1
        return json_response(answer, status)

    @router.get("/events/{run_id:path}", responses=openapi.EVENTS_RESPONSES)
    async def get_events(
        run_id: str,
        stage_type: Annotated[str | None, Query(description="Only events of this stage type.")] = None,
        trace_id: Annotated[str | None, Query(description="Only events of this trace.")] = None,
        limit: Annotated[int, Query(ge=1, le=10_000, description="Events returned at most.")] = 200,
    ) -> Response:
        """List a run's events, in the order in which they were first stored."""
        kind = stage_type.strip().lower() if stage_type else None
        return json_response(
            await run_in_threadpool(reader.events, run_id, stage_type=kind, trace_id=trace_id, limit=limit)
        )

    @router.get("/metrics/{run_id:path}", responses=openapi.METRICS_RESPONSES)
    async def get_metrics(
        run_id: str,
        stage_id: Annotated[str | None, Query(description="Only metrics of this stage.")] = None,
        metric_name: Annotated[str | None, Query(description="Only metrics of this name.")] = None,
        limit: Annotated[int, Query(ge=1, le=100_000, description="Metrics returned at most.")] = 10_000,
    ) -> Response:
        """Compute the metrics of a run's stages."""
        return json_response(
            await run_in_threadpool(reader.metrics, run_id, stage_id=stage_id, metric_name=metric_name, limit=limit)
        )

    @router.get("/summary/{run_id:path}", responses=openapi.SUMMARY_RESPONSES)
    async def get_summary(
        run_id: str,
        detail: Annotated[
            bool, Query(description="Add `stage_types`: errors, mean and percentiles of each type.")
        ] = False,
    ) -> Response:
        """Sum up a run: events and mean duration by stage type, required types that are missing."""
        return json_response(await run_in_threadpool(reader.summary, run_id, detail=detail))

    @router.get("/debug/{run_id:path}", responses=openapi.DEBUG_RESPONSES)
    async def get_debug(
        run_id: str,
        format: Annotated[str, Query(pattern="^(json|markdown)$", description="`json` or `markdown`.")] = "json",
        limit: Annotated[int, Query(ge=1, le=100_000, description="Metrics listed at most.")] = 10_000,
    ) -> Response:
        """Report a run's bottlenecks, failing metrics, and what to do about them."""
        report = await run_in_threadpool(reader.debug, run_id, limit=limit)
        if format == "markdown":
            return Response(as_markdown(report), media_type="text/markdown; charset=utf-8")
        return json_response(report)

    return router


def _content_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def _read_body(request: Request, limits: IngestLimits) -> bytes:
    """Read the body as it comes, and stop at the limit: what it claims to be is not trusted."""
    limit = limits.max_body_bytes
    chunks, size = [], 0
    async for chunk in request.stream():
        size += len(chunk)
        if size > limit:
            raise too_large(f"a body may have {limit} bytes", limit_bytes=limit)
        chunks.append(chunk)
    return b"".join(chunks)

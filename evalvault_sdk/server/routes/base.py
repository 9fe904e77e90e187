"""
What all endpoints share: who may in, and how errors are answered.

In:   a request, before its handler and after it.
Out:  `request.state.access`; every error in the form that the endpoint's clients expect.

On the event loop, which does nothing but read bodies: parsing, storing and reading happen in threads.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Coroutine
from http import HTTPStatus
from typing import Any

import anyio
import orjson
from fastapi import APIRouter, Depends, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import StreamingResponse
from fastapi.routing import APIRoute
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.requests import HTTPConnection
from starlette.types import Message, Send

from evalvault_sdk.server.answers import ApiError, as_api_error
from evalvault_sdk.server.security import Access
from evalvault_sdk.server.services import Services

_PHRASES = {status.value: status.phrase for status in HTTPStatus}
_Handler = Callable[[Request], Coroutine[Any, Any, Response]]


#: Seconds that a reader may take to take a part of a stream; then it has gone, or is too slow.
SEND_TIMEOUT_S = 60.0


class Stream(StreamingResponse):
    """An answer without a known end, which is given up when its reader takes nothing of it any more."""

    async def stream_response(self, send: Send) -> None:
        """Send what there is."""

        async def send_in_time(message: Message) -> None:
            with anyio.fail_after(SEND_TIMEOUT_S):
                await send(message)

        with contextlib.suppress(TimeoutError):
            await super().stream_response(send_in_time)


def json_response(body: Any, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    """Return `body` as a JSON answer; a number that is none (NaN) becomes null."""
    return Response(orjson.dumps(body, option=orjson.OPT_NON_STR_KEYS), status, headers, "application/json")


def error_response(error: ApiError) -> Response:
    """Return an error as the contract has it."""
    return json_response(error.body(), error.status, dict(error.headers))


def as_answer(error: Exception) -> ApiError:
    """Return the answer to whatever was raised, FastAPI's own errors too."""
    if isinstance(error, HTTPException):  # of the app that the router is included in: its own token check, say
        phrase = _PHRASES.get(error.status_code, "Error")
        return ApiError(error.status_code, phrase, str(error.detail), headers=error.headers or {})
    if isinstance(error, RequestValidationError):
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"][1:])
        return ApiError(422, "Invalid request", f"{field}: {first['msg']}")
    return as_api_error(error)


def create_router(
    services: Services,
    *,
    prefix: str = "/api/stage",
    tags: tuple[str, ...] = ("stage events",),
    answer: Callable[[Request, ApiError], Response] = lambda request, error: error_response(error),
) -> APIRouter:
    """Return a router whose endpoints ask for a token, and answer every error with `answer`."""

    class Route(APIRoute):
        def get_route_handler(self) -> _Handler:
            handler = super().get_route_handler()

            async def handle(request: Request) -> Response:
                try:
                    return await handler(request)
                except Exception as error:  # noqa: BLE001 - each becomes an answer
                    said = as_answer(error)
                    services.telemetry.refusals.labels(said.reason).inc()
                    return answer(request, said)

            return handle

    async def admit(request: Request) -> None:  # on the event loop: a thread for each request would cost more
        write = request.method not in ("GET", "HEAD")
        address = request.client.host if request.client else None
        if write:
            check_origin(request, services.settings.cors_origins)
        request.state.access = services.admit(request.headers, address, write=write)

    documented = [] if services.guard.is_open else [Depends(HTTPBearer(auto_error=False))]
    return APIRouter(
        prefix=prefix,
        tags=list(tags),
        route_class=Route,
        dependencies=[Depends(admit), *documented],
    )


def check_origin(connection: HTTPConnection, allowed: Collection[str]) -> None:
    """
    Raise `ApiError` 403 for a page of another site.

    Browsers let any page open a WebSocket to any server, and send it simple requests: on a machine where a
    server listens without a token, that would be enough to read along, and to write.
    """
    origin = connection.headers.get("origin")
    if (
        origin is not None
        and not {origin, "*"} & set(allowed)
        and origin.partition("://")[2] != connection.headers.get("host")
    ):
        raise ApiError(403, "Forbidden", "this origin is not among cors_origins", reason="forbidden")


def access_of(request: Request) -> Access:
    """Return what the sender of a request may do."""
    access: Access = request.state.access
    return access


def content_type(request: Request) -> str:
    """Return a request's media type, without its parameters."""
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()

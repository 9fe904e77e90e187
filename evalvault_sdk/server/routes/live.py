"""
Endpoints that send events as they are stored.

In:   a run, or none for all; a cursor to go on from.
Out:  server-sent events, or the messages of a WebSocket, until the reader goes or the server ends.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Annotated, Any

import orjson
from fastapi import APIRouter, Header, Query, Request, Response, WebSocket
from starlette.websockets import WebSocketDisconnect, WebSocketState

from evalvault_sdk.server import openapi
from evalvault_sdk.server.answers import ApiError, as_api_error
from evalvault_sdk.server.routes.base import (
    SEND_TIMEOUT_S,
    Stream,
    access_of,
    check_origin,
    create_router,
    error_response,
)
from evalvault_sdk.server.security import Access
from evalvault_sdk.server.services import Services
from evalvault_sdk.server.store.base import StoredEvent

_JSON = orjson.OPT_NON_STR_KEYS
_RunId = Annotated[str | None, Query(description="Only events of this run; without it, of all.")]
_Cursor = Annotated[
    int | None,
    Query(ge=0, lt=2**63, description="Go on after this; 0 is the beginning. Without it: what is stored from now on."),
]
#: Seconds of silence after which a sign of life is sent: proxies cut what is silent for a minute.
_SIGN_OF_LIFE_S = 15.0
#: WebSocket close codes (RFC 6455, 7.4.1): going away; an error of ours.
_GOING_AWAY, _INTERNAL_ERROR = 1001, 1011


def create_routes(services: Services) -> APIRouter:
    """Return the endpoints."""
    router = create_router(services)
    live = services.live

    async def pages(
        access: Access, run_id: str | None, place: int | None
    ) -> AsyncIterator[tuple[list[StoredEvent], int]]:
        with services.telemetry.live_streams.track_inprogress():
            async for page in live.follow(access, run_id=run_id, place=place):
                yield page

    @router.get("/live", responses=openapi.LIVE_RESPONSES)
    async def get_live(
        request: Request,
        run_id: _RunId = None,
        cursor: _Cursor = None,
        last_event_id: Annotated[str | None, Header(description="As `cursor`: what browsers send.")] = None,
    ) -> Response:
        """
        Follow a run, or all, as server-sent events.

        `event: ready` comes first, then `event: stage` for each event, with its JSON as `data` and as `id`
        what to go on from: a reader that comes again with it misses nothing.
        """
        access = access_of(request)
        if run_id is not None:
            access.check_run(run_id)
        if last_event_id:  # a browser that comes again keeps its address, and with it an older cursor
            cursor = _as_place(last_event_id)
        live.check_room()  # while it can still be said with a status

        async def stream() -> AsyncIterator[bytes]:
            said_at = 0.0
            try:
                async with live.open():
                    async for found, place in pages(access, run_id, cursor):
                        now = time.monotonic()
                        if not said_at:
                            yield _message("ready", place, b"{}")
                        elif not found and now - said_at >= _SIGN_OF_LIFE_S:
                            yield f": nothing new\nid: {place}\n\n".encode()
                        elif not found:
                            continue
                        said_at = now
                        for stored in found:
                            yield _message("stage", stored.place, _event_json(stored))
            except Exception as error:  # noqa: BLE001 - the status is sent already: the reader comes again
                yield _message("failure", None, orjson.dumps(as_api_error(error).body()))

        return Stream(stream(), media_type="text/event-stream", headers={"X-Accel-Buffering": "no"})

    plain = APIRouter(prefix="/api/stage")

    @plain.websocket("/live")
    async def websocket_live(socket: WebSocket, run_id: str | None = None, cursor: str | None = None) -> None:
        address = socket.client.host if socket.client else None
        try:
            check_origin(socket, services.settings.cors_origins)
            access = services.admit(socket.headers, address, write=False)
            if run_id is not None:
                access.check_run(run_id)
            place = None if cursor is None else _as_place(cursor)
            async with live.open():
                await socket.accept()
                await _serve(socket, pages(access, run_id, place))
        except ApiError as error:
            services.telemetry.refusals.labels(error.reason).inc()
            if socket.application_state is WebSocketState.CONNECTING:
                await socket.send_denial_response(error_response(error))

    router_and_socket = APIRouter()
    router_and_socket.include_router(router)
    router_and_socket.include_router(plain)
    return router_and_socket


async def _serve(socket: WebSocket, pages: AsyncIterator[tuple[list[StoredEvent], int]]) -> None:
    """Send pages until the reader goes. What it says is not listened to, but that it goes is noticed."""
    gone = asyncio.ensure_future(_wait_until_gone(socket))
    try:
        first = True
        async for found, place in pages:
            if gone.done():
                return
            if first:
                await _send(socket, {"cursor": str(place), "ready": True})
            first = False
            for stored in found:
                await _send(socket, {"cursor": str(stored.place), "event": stored.event.to_dict()})
        await socket.close(_GOING_AWAY, "the server ends; come again with the last cursor")
    except (WebSocketDisconnect, asyncio.TimeoutError, RuntimeError):
        return  # gone while something was sent to it
    except Exception as error:  # noqa: BLE001 - it is accepted already: the reader comes again
        with contextlib.suppress(Exception):
            await socket.close(_INTERNAL_ERROR, as_api_error(error).error)
    finally:
        gone.cancel()
        await pages.aclose()  # type: ignore[attr-defined]


async def _send(socket: WebSocket, message: dict[str, Any]) -> None:
    await asyncio.wait_for(socket.send_text(orjson.dumps(message, option=_JSON).decode()), SEND_TIMEOUT_S)


async def _wait_until_gone(socket: WebSocket) -> None:
    with contextlib.suppress(WebSocketDisconnect, RuntimeError):
        while True:
            if (await socket.receive())["type"] == "websocket.disconnect":
                return


def _message(kind: str, place: int | None, data: bytes) -> bytes:
    number = b"" if place is None else f"id: {place}\n".encode()
    return b"event: " + kind.encode() + b"\n" + number + b"data: " + data + b"\n\n"


def _event_json(stored: StoredEvent) -> bytes:
    return orjson.dumps(stored.event.to_dict(), option=_JSON)


def _as_place(text: str) -> int:
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise ApiError(422, "Invalid request", "cursor: must be what an earlier message said, or 0")
    return int(text)

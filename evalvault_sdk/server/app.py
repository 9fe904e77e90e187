"""
The server as an app of its own.

In:   the settings, or a store that is open already.
Out:  an ASGI app, for uvicorn or any other server.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import threading
from collections.abc import AsyncIterator, Callable
from types import FrameType
from typing import Any

import attrs
from fastapi import FastAPI, Request, Response
from fastapi.middleware.cors import CORSMiddleware
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from evalvault_sdk import __version__
from evalvault_sdk.errors import StoreError
from evalvault_sdk.server import openapi
from evalvault_sdk.server.answers import come_again, logger
from evalvault_sdk.server.routes import create_routes
from evalvault_sdk.server.routes.base import as_answer, create_router, error_response, json_response
from evalvault_sdk.server.services import Services
from evalvault_sdk.server.settings import ServerSettings
from evalvault_sdk.server.store import open_store
from evalvault_sdk.server.store.base import Store
from evalvault_sdk.server.telemetry import RequestTelemetry


def create_app(
    db: str | None = None, *, settings: ServerSettings | None = None, store: Store | None = None, **options: Any
) -> FastAPI:
    """
    Return an app that receives, keeps and analyses stage events.

    `db` and `options` are the fields of `ServerSettings`; what is not given is read from `EVALVAULT_SERVER_*`
    variables. A `store` given instead of a database stays its maker's to close. Raises `ConfigurationError`
    for a setting that cannot work, `StoreError` when the database cannot be opened.
    """
    settings = settings or ServerSettings.resolve(db=db, **options)
    kept = store or open_store(settings.db)
    try:
        services = Services(kept, settings)
    except BaseException:
        if store is None:
            kept.close()
        raise

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with running(services, kept if store is None else None):
            yield

    app = FastAPIOffline(  # a FastAPI whose /docs needs no CDN: closed networks are normal
        title="EvalVault stage events",
        version=__version__,
        description="Receives the stages of RAG programs as they run, and says what was slow, failed or missing.",
        lifespan=lifespan,
    )
    app.state.evalvault = services
    app.include_router(create_routes(services))
    _add_operation(app, services)

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        answer = as_answer(error)
        return error_response(attrs.evolve(answer, details=f"{request.method} {request.url.path}; see /docs"))

    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST", "DELETE"],
            allow_headers=["Authorization", "Content-Type", "Content-Encoding", "Last-Event-ID", "X-EvalVault-Run-Id"],
        )
    app.add_middleware(
        RequestTelemetry,
        telemetry=services.telemetry,
        log_requests=settings.log_requests,
        https=settings.tls_cert is not None,
    )
    return app


@contextlib.asynccontextmanager
async def running(services: Services, owned: Store | None) -> AsyncIterator[None]:
    """Work as long as the context lasts; then store what was accepted, and close the store if it is `owned`."""
    services.start()
    # Live streams end first: servers wait for requests to end, and these never would.
    restore = _on_signals(services.live.close)
    try:
        yield
    finally:
        restore()
        services.live.close()
        await asyncio.to_thread(services.close)  # what was accepted is stored first
        if owned is not None:
            owned.close()


def _on_signals(then: Callable[[], None]) -> Callable[[], None]:
    """Have `then` called before whatever SIGINT and SIGTERM do; return what undoes that."""
    if threading.current_thread() is not threading.main_thread():
        return lambda: None  # nobody else may; the app is somebody's test, perhaps
    now = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    before = {number: handler for number, handler in now.items() if handler not in (signal.SIG_IGN, None)}

    def handle(number: int, frame: FrameType | None) -> None:
        then()
        earlier = before[signal.Signals(number)]
        if callable(earlier):
            earlier(number, frame)
        elif earlier == signal.SIG_DFL:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    for number in before:
        signal.signal(number, handle)

    def restore() -> None:
        for number, earlier in before.items():
            if signal.getsignal(number) is handle:
                signal.signal(number, earlier)

    return restore


def _add_operation(app: FastAPI, services: Services) -> None:
    """Add what operators and orchestrators ask."""

    @app.get("/health", tags=["operation"])
    async def health() -> Response:
        """Say that the server runs."""
        return json_response({"status": "ok", "version": __version__})

    @app.get("/ready", tags=["operation"], responses=openapi.READY_RESPONSES)
    async def ready() -> Response:
        """Say whether events can be stored now: the database is reached, and the server is not ending."""
        try:
            if services.live.closing:
                raise come_again("Ending", "the server is ending", reason="ending")
            await services.check_store()
        except StoreError as error:
            logger.warning("evalvault: not ready: %s", error)
            return error_response(come_again("Database unavailable", "see the server's log", reason="database"))
        except Exception as error:  # noqa: BLE001 - an answer, whatever it is
            return error_response(as_answer(error))
        return json_response({"status": "ready"})

    router = create_router(services, prefix="", tags=("operation",))

    @router.get("/metrics", responses=openapi.PROMETHEUS_RESPONSES)
    async def metrics() -> Response:
        """Return the server's own metrics, for Prometheus."""
        text = await asyncio.to_thread(services.telemetry.exposition)
        return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")

    app.include_router(router)

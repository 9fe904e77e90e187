"""
The server as a program of its own: a FastAPI app over one store.

In:   where the database is, and who may talk to it.
Out:  an ASGI app, for uvicorn or any other server; `evalvault-sdk serve` runs it.
"""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Callable, Collection, Mapping

import attrs
from fastapi import FastAPI, Request, Response
from fastapi_offline import FastAPIOffline
from starlette.exceptions import HTTPException

from evalvault_sdk import __version__
from evalvault_sdk.errors import ConfigurationError, MissingDependencyError
from evalvault_sdk.server.ingest import IngestLimits
from evalvault_sdk.server.metrics import DEFAULT_THRESHOLDS
from evalvault_sdk.server.reader import RunReader
from evalvault_sdk.server.routes import as_api_error, create_router, error_response, json_response
from evalvault_sdk.server.security import check_token_setting
from evalvault_sdk.server.store import open_store
from evalvault_sdk.server.store.base import Store


def create_app(
    db: str = "evalvault.db",
    *,
    store: Store | None = None,
    token: str | None = None,
    limits: IngestLimits | None = None,
    thresholds: Mapping[str, float] = DEFAULT_THRESHOLDS,
    relevance: Mapping[str, Collection[str]] | None = None,
) -> FastAPI:
    """
    Return an app that receives, keeps and analyses stage events.

    `db` is the path of an SQLite file, made if it is not there; an existing EvalVault database is used as it
    is. A `store` given instead stays its maker's to close. With `token` every request must bear it.
    Raises `StoreError` when the database cannot be opened, `ConfigurationError` for a blank token.
    """
    token = check_token_setting(token)  # before anything is opened
    kept = store or open_store(db)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        try:
            yield
        finally:
            if store is None:
                kept.close()

    app = FastAPIOffline(  # a FastAPI whose /docs needs no CDN: closed networks are normal
        title="EvalVault stage events",
        version=__version__,
        description="Receives the stages of RAG programs as they run, and says what was slow, failed or missing.",
        lifespan=lifespan,
    )
    reader = RunReader(kept, thresholds=thresholds, relevance=relevance)
    app.include_router(create_router(kept, token=token, limits=limits, reader=reader))

    @app.get("/health", tags=["operation"])
    async def health() -> Response:
        """Say that the server runs."""
        return json_response({"status": "ok", "version": __version__})

    @app.exception_handler(HTTPException)
    async def no_such_route(request: Request, error: HTTPException) -> Response:
        answer = as_api_error(error)
        return error_response(attrs.evolve(answer, details=f"{request.method} {request.url.path}; see /docs"))

    return app


def run(app: FastAPI, *, host: str, port: int, on_ready: Callable[[str], None] = lambda url: None) -> None:
    """
    Serve `app` with uvicorn until SIGINT or SIGTERM; requests under way are finished first.

    `on_ready` is told the address once it is ours. Raises `ConfigurationError` when it cannot be had.
    """
    try:
        import uvicorn
    except ImportError as error:
        raise MissingDependencyError.for_extra("serving", "server", error) from error
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as listening:
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except (OSError, UnicodeError) as error:
            raise ConfigurationError(
                f"cannot listen on {host} port {port} ({error.strerror or error}): give another --host or --port"
                if isinstance(error, OSError)
                else f"{host!r} is no address to listen on"
            ) from None
        on_ready(f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}")
        # No access log: a line per batch tells nobody anything.
        uvicorn.Server(uvicorn.Config(app, access_log=False)).run(sockets=[listening])

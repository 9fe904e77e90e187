"""
The endpoints in somebody else's app: EvalVault's own, or any other of FastAPI's.

In:   that app, and what says which database it is and who may ask.
Out:  the app with our endpoints, which begin and end with it.
"""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from fastapi import Depends, FastAPI

from evalvault_sdk.errors import ConfigurationError
from evalvault_sdk.server.app import running
from evalvault_sdk.server.routes import create_routes
from evalvault_sdk.server.services import Services
from evalvault_sdk.server.settings import ServerSettings
from evalvault_sdk.server.store import open_store
from evalvault_sdk.server.store.base import Store


def mount(
    app: FastAPI,
    db: str | None = None,
    *,
    store: Store | None = None,
    dependencies: Sequence[Callable[..., Any]] | None = None,
    prefix: str = "",
    **options: Any,
) -> Services:
    """
    Add the endpoints to another FastAPI app: EvalVault's own, or yours.

    Without `db` and `store`, EvalVault's settings say which database it is. `dependencies` are asked before
    every request, as FastAPI's; by default, where EvalVault is installed, its own token check. With a `token`
    ours is asked as well. `prefix` goes before all paths. Everything else is as in `create_app`. What is
    opened here is closed when the app ends.

    Over a WebSocket only checks can be asked that take FastAPI's `HTTPConnection`; where one takes a `Request`,
    as EvalVault's does, live events come as server-sent events. Raises `ConfigurationError` where nothing would
    check access, unless `insecure=True`.
    """
    if store is None and db is None:
        db = _evalvault_database()
    settings = ServerSettings.resolve(db=db, **options)
    if dependencies is None:
        dependencies = _evalvault_token_check()
    kept = store or open_store(settings.db)
    try:
        services = Services(kept, settings)
        if not dependencies and services.guard.is_open and not settings.insecure:
            raise ConfigurationError(
                "nothing would check who asks: give token=, dependencies=[your check], or insecure=True"
            )
    except BaseException:
        if store is None:
            kept.close()
        raise
    checks = [Depends(check) for check in dependencies]
    app.include_router(create_routes(services), prefix=prefix, dependencies=checks)
    theirs = app.router.lifespan_context

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[Any]:
        async with running(services, kept if store is None else None), theirs(app) as state:
            yield state

    app.router.lifespan_context = lifespan
    return services


def _evalvault_database() -> str:
    """Return the address of the database that EvalVault's settings name."""
    try:
        from evalvault.config.settings import get_settings
    except ImportError:
        raise ConfigurationError(
            "give db=, or store=: EvalVault, whose settings would say it, is not installed"
        ) from None
    settings = get_settings()
    if getattr(settings, "db_backend", "postgres") == "sqlite":
        return str(settings.evalvault_db_path)
    if settings.postgres_connection_string:
        return str(settings.postgres_connection_string)
    from urllib.parse import quote

    user = quote(settings.postgres_user or "postgres", safe="")
    password = f":{quote(settings.postgres_password, safe='')}" if settings.postgres_password else ""
    host, port = settings.postgres_host or "localhost", settings.postgres_port
    return f"postgresql://{user}{password}@{host}:{port}/{settings.postgres_database}"


def _evalvault_token_check() -> list[Callable[..., Any]]:
    try:
        from evalvault.adapters.inbound.api.main import require_api_token
    except ImportError:
        return []
    check: Callable[..., str | Awaitable[str | None] | None] = require_api_token
    return [check]

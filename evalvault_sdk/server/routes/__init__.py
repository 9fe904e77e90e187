"""
ROUTES: the endpoints, a module for each of their kinds.

The router carries all it needs, so that it works the same in our own app and in another FastAPI program.
"""

from __future__ import annotations

from fastapi import APIRouter

from evalvault_sdk.server.routes import drafted, live, otlp, read, write
from evalvault_sdk.server.services import Services


def create_routes(services: Services) -> APIRouter:
    """Return every endpoint that takes or gives events, over `services`."""
    router = APIRouter()
    for part in (write, read, live, otlp, drafted):
        router.include_router(part.create_routes(services))
    return router

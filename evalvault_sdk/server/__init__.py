"""
SERVER > STORE > METRICS > REPORT: the receiving end, as the extra `[server]`.

    from evalvault_sdk.server import create_app
    app = create_app(db="eval.db")

The names below need FastAPI and are imported when they are asked for; the store and the reports need none.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from evalvault_sdk.errors import MissingDependencyError

if TYPE_CHECKING:
    from evalvault_sdk.server.app import create_app, run
    from evalvault_sdk.server.routes import create_router

__all__ = ["create_app", "create_router", "run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from evalvault_sdk.server import app, routes
    except ImportError as error:
        raise MissingDependencyError.for_extra("the EvalVault server", "server", error) from error
    return getattr(routes if name == "create_router" else app, name)

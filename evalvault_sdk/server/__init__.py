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
    from evalvault_sdk.server.app import create_app
    from evalvault_sdk.server.mounting import mount
    from evalvault_sdk.server.program import run
    from evalvault_sdk.server.settings import ServerSettings

__all__ = ["ServerSettings", "create_app", "mount", "run"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from evalvault_sdk.server import app, mounting, program, settings
    except MissingDependencyError:
        raise
    except ImportError as error:
        raise MissingDependencyError.for_extra("the EvalVault server", "server", error) from error
    places = {"mount": mounting, "run": program, "ServerSettings": settings}
    return getattr(places.get(name, app), name)

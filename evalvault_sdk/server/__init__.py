"""
SERVER > STORE > METRICS > REPORT: the receiving end, as the extra `[server]`.

    from evalvault_sdk.server import create_app, run
    app = create_app(db="eval.db")
"""

from __future__ import annotations

from evalvault_sdk.errors import MissingDependencyError

try:
    from evalvault_sdk.server.app import create_app, run
    from evalvault_sdk.server.routes import create_router
except ImportError as error:
    raise MissingDependencyError.for_extra("the EvalVault server", "server", error) from error

__all__ = ["create_app", "create_router", "run"]

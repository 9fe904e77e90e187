"""
EvalVault's API with our endpoints in it, as a program: `python -m tests.interop.api WAY PORT`.

The database and the tokens are those of EvalVault's settings.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import uvicorn

from evalvault_sdk.server import mount
from evalvault_sdk.server.store.evalvault import EvalVaultStore
from tests.interop.real import create_app, require_api_token


def plain_mount(app: Any) -> None:
    """Add our endpoints over the database that EvalVault's settings name, under its token check."""
    mount(app)


def mount_over_its_port(app: Any) -> None:
    """Add our endpoints over EvalVault's own storage adapter."""
    mount(app, store=EvalVaultStore(), dependencies=[require_api_token])


#: Every way to bring our endpoints into EvalVault's app.
WAYS: dict[str, Callable[[Any], None]] = {"mount": plain_mount, "port": mount_over_its_port}

if __name__ == "__main__":
    application = create_app()
    WAYS[sys.argv[1]](application)
    uvicorn.run(application, port=int(sys.argv[2]))

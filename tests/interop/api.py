"""
EvalVault's API with our endpoints in it, as a program: `python -m tests.interop.api WAY PORT`.

The database and the tokens are those of EvalVault's settings.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import uvicorn
from fastapi import Depends

from evalvault_sdk.server import create_router
from evalvault_sdk.server.store import open_store
from tests.interop.real import create_app, get_settings, require_api_token


def include_router(app: Any) -> None:
    """Add our endpoints as EvalVault adds its own routers: under its token check."""
    store = open_store(get_settings().evalvault_db_path)
    app.include_router(create_router(store), dependencies=[Depends(require_api_token)])


#: Every way to bring our endpoints into EvalVault's app.
WAYS: dict[str, Callable[[Any], None]] = {"include_router": include_router}

if __name__ == "__main__":
    application = create_app()
    WAYS[sys.argv[1]](application)
    uvicorn.run(application, port=int(sys.argv[2]))

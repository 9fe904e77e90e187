"""
Ask LangChain which run the code runs in.

In:   LangChain's context variable.
Out:  the id of the run, for stages of the program's own to find the one around them.
In the program's threads and tasks.
"""

from __future__ import annotations

from uuid import UUID

from evalvault_sdk.errors import MissingDependencyError

try:
    from langchain_core.runnables.config import var_child_runnable_config
except ImportError as error:
    raise MissingDependencyError.for_extra("the integration of LangChain", "langchain", error) from error


def current_run_id() -> UUID | None:
    """Return the id of the run that this code runs in; None outside."""
    config = var_child_runnable_config.get()
    return None if config is None else getattr(config.get("callbacks"), "parent_run_id", None)

"""
Which stage is the code running in?

In:   stages as they are entered and left, in the caller's thread or task.
Out:  the innermost open stage, so that a new one finds its parent and its trace.

A contextvar, so that nested calls, asyncio tasks and `contextvars.copy_context()` see the right one.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from evalvault_sdk.capture.stage import StageContext

open_stage: ContextVar[StageContext | None] = ContextVar("evalvault_open_stage", default=None)

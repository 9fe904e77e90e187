"""
Take the current stage along into a pool of threads.

In:   functions that are submitted.
Out:  their futures; the stages inside find the one that was open where they were submitted as their parent.
The pool's threads.
"""

from __future__ import annotations

import contextvars
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


class ContextThreadPoolExecutor(ThreadPoolExecutor):
    """A `ThreadPoolExecutor` whose functions run in the context they were submitted in: `submit` as well as `map`."""

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        """Schedule a call in a copy of the current context (`contextvars`)."""
        call: Callable[..., T] = contextvars.copy_context().run
        return super().submit(call, fn, *args, **kwargs)

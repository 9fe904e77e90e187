"""
Take the current stage along into other threads and into the background.

In:   a function that will be called elsewhere.
Out:  the same function, whose stages find their parent as if it were called here.
In whatever thread calls it, as often and as many at once as it likes.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, TypeVar, cast

from evalvault_sdk.capture.context import here
from evalvault_sdk.capture.decorate import called
from evalvault_sdk.capture.stream import UNFINISHED, Body, carried_on

F = TypeVar("F", bound=Callable[..., Any])


def bind(function: F) -> F:
    """
    Return `function` such that, wherever it is called, it runs in the stage that is open now.

    For threads, callbacks and background tasks: `Thread(target=bind(work))`. Other context variables stay those of
    the caller.
    """
    inside = here()

    @functools.wraps(function)
    def bound(*args: Any, **kwargs: Any) -> Any:
        body = Body(inside)
        outside = body.resume()
        try:
            result = function(*args, **kwargs)
        finally:
            body.pause(outside)
        return carried_on(body, result) if type(result) in UNFINISHED else result

    if inspect.iscoroutinefunction(called(function)):

        @functools.wraps(function)
        async def awaited(*args: Any, **kwargs: Any) -> Any:
            return await bound(*args, **kwargs)

        return cast(F, awaited)
    return cast(F, bound)

"""
Make every call of a function a stage: `@tracer.stage(...)`.

In:   a function of any kind, or another object that is called.
Out:  the same to its callers, which records.
Caller's thread or task; no other thread or task, and nothing per item of a stream but a step of the context.

A function or coroutine function becomes a function of the same kind. A generator function has to know where it
was called (that is the stage's parent, though the body runs later) and still be one to `inspect`: so it, and whatever
else is called, gets a `capture.proxy`.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from types import FunctionType, MethodType
from typing import Any

from evalvault_sdk.capture.call import Call
from evalvault_sdk.capture.context import leave, open_scope
from evalvault_sdk.capture.proxy import Proxy, proxy
from evalvault_sdk.capture.stage import StageContext
from evalvault_sdk.capture.stream import UNFINISHED, StageBody, carried_on

_STREAM = inspect.CO_GENERATOR | inspect.CO_ASYNC_GENERATOR


def decorated(template: StageContext, function: Any) -> Any:
    """Return `function` such that every call of it is a stage like `template`. `TypeError`: nothing calls it."""
    if isinstance(function, (classmethod, staticmethod)):
        return type(function)(decorated(template, function.__func__))
    if isinstance(function, property):
        getter = decorated(template, function.fget)
        return type(function)(getter, function.fset, function.fdel, function.__doc__)
    if isinstance(function, functools.cached_property):
        return type(function)(decorated(template, function.func))
    if isinstance(function, type):
        return _class_of_callables(template, function)
    if not callable(function):
        raise TypeError(f"a {type(function).__qualname__} is not called: decorate a function, a method or a class")
    retrying = getattr(function, "retry", None)
    if hasattr(function, "retry_with") and hasattr(function, "__wrapped__"):
        # tenacity's: below it, so that each attempt is a stage.
        return retrying.wraps(decorated(template, function.__wrapped__))  # type: ignore[union-attr]
    named: Any = function
    while isinstance(named, functools.partial):
        named = named.func
    kind = type(named)
    name, qualname = getattr(named, "__name__", kind.__name__), getattr(named, "__qualname__", kind.__qualname__)
    return _measured(template, function, name, qualname)


def _class_of_callables(template: StageContext, cls: type) -> type:
    """Make every call of an instance a stage."""
    call = inspect.getattr_static(cls, "__call__", None)
    if not isinstance(call, (FunctionType, Proxy)):
        raise TypeError(f"instances of {cls.__qualname__} are not called: decorate its methods")
    setattr(cls, "__call__", _measured(template, call, cls.__name__, cls.__qualname__))  # noqa: B010 - as data
    return cls


def _measured(template: StageContext, function: Callable[..., Any], name: str, qualname: str) -> Any:
    flags = _code_flags(function)
    begin = functools.partial(template._again, qualname, name)
    if flags & _STREAM:
        return proxy(function, _measured_stream(begin, template, function))
    measured = _measured_coroutine if flags & inspect.CO_COROUTINE else _measured_function
    call = measured(begin, template, function)
    return functools.wraps(function)(call) if type(function) is FunctionType else proxy(function, call)


def _code_flags(function: Any) -> int:
    """Return the flags of the code that is called in the end: below partials and methods; of an object, its method."""
    while isinstance(function, (functools.partial, MethodType)):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    if not inspect.isroutine(function):
        function = getattr(type(function), "__call__", function)  # noqa: B004
    flags: int = getattr(getattr(function, "__code__", None), "co_flags", 0)
    return flags


def _attempt(stage: StageContext) -> None:
    """Number the stage as the attempt that it is, if tenacity is what called the function."""
    caller = sys._getframe(1).f_back
    if caller is not None and caller.f_code.co_name == "__call__" and "retry_state" in caller.f_code.co_varnames:
        number = getattr(caller.f_locals.get("retry_state"), "attempt_number", None)
        if isinstance(number, int) and stage.attempt == 1:
            stage.attempt = number


def _measured_function(
    begin: Callable[[], StageContext], template: StageContext, function: Callable[..., Any]
) -> Callable[..., Any]:
    capture, recorder = template._call, template._recorder

    def measured(*args: Any, **kwargs: Any) -> Any:
        if not recorder.enabled:
            return function(*args, **kwargs)
        stage = begin()
        _attempt(stage)
        if capture is not None:
            capture.before(stage, Call(function, args, kwargs))
        stage.__enter__()
        try:
            result = function(*args, **kwargs)
        except BaseException as error:
            stage.__exit__(type(error), error, error.__traceback__)
            raise
        if type(result) in UNFINISHED:
            leave(stage)
            return carried_on(StageBody(stage, stage), result)
        if capture is not None:
            capture.after(stage, result)
        stage.__exit__(None, None, None)
        return result

    return measured


def _measured_coroutine(
    begin: Callable[[], StageContext], template: StageContext, function: Callable[..., Any]
) -> Callable[..., Any]:
    capture, recorder = template._call, template._recorder

    async def measured(*args: Any, **kwargs: Any) -> Any:
        if not recorder.enabled:
            return await function(*args, **kwargs)
        stage = begin()
        _attempt(stage)
        if capture is not None:
            capture.before(stage, Call(function, args, kwargs))
        with stage:
            result = await function(*args, **kwargs)
            if capture is not None:
                capture.after(stage, result)
            return result

    return measured


def _measured_stream(
    begin: Callable[[], StageContext], template: StageContext, function: Callable[..., Any]
) -> Callable[..., Any]:
    capture, recorder = template._call, template._recorder

    def measured(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        if not recorder.enabled:
            return result
        stage = begin()
        if capture is not None:
            capture.before(stage, Call(function, args, kwargs))
        return carried_on(StageBody(stage, open_scope.get()), result)

    return measured

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
from evalvault_sdk.capture.context import here, leave
from evalvault_sdk.capture.proxy import Proxy, proxy
from evalvault_sdk.capture.stage import StageContext
from evalvault_sdk.capture.stream import UNFINISHED, BegunBody, StageBody, begun_with, carried_on, run_as

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
    if _is_retrying(function):
        inner = function
        while _is_retrying(inner):
            inner = inner.__wrapped__
        return function.retry.wraps(decorated(template, inner))  # below it, so that each attempt is a stage
    named: Any = function
    while isinstance(named, functools.partial):
        named = named.func
    kind = type(named)
    name, qualname = getattr(named, "__name__", kind.__name__), getattr(named, "__qualname__", kind.__qualname__)
    return _measured(template, name, qualname, function)


def _class_of_callables(template: StageContext, cls: type) -> type:
    """Make every call of an instance a stage."""
    call = next((vars(base)["__call__"] for base in cls.__mro__ if "__call__" in vars(base)), None)
    if not isinstance(call, (FunctionType, Proxy)):
        raise TypeError(f"instances of {cls.__qualname__} are not called: decorate its methods")
    setattr(cls, "__call__", _measured(template, cls.__name__, cls.__qualname__, call))  # noqa: B010 - as data
    return cls


def _measured(template: StageContext, name: str, qualname: str, function: Callable[..., Any]) -> Any:
    innermost = called(function)
    flags: int = getattr(getattr(innermost, "__code__", None), "co_flags", 0)
    given = template._given
    given = given._replace(stage_name=given.stage_name or qualname)
    begin = functools.partial(template._entry, template._given_type or name, given)
    if flags & _STREAM:
        call = _measured_stream(begin, template, function, flags)
    elif flags & inspect.CO_COROUTINE:
        call = _measured_coroutine(begin, template, function)
    else:
        call = _measured_function(begin, template, function)
    if type(function) is FunctionType and not flags & _STREAM:
        # Neither is used in a call, since all arguments are passed on; but they may be looked at.
        call.__defaults__, call.__kwdefaults__ = function.__defaults__, function.__kwdefaults__
        return functools.wraps(function)(call)
    # What a coroutine is called, in a warning perhaps, it has from its function.
    call.__name__, call.__qualname__ = (
        getattr(innermost, "__name__", name),
        getattr(innermost, "__qualname__", qualname),
    )
    return proxy(function, call, functools.partial(_measured, template, name, qualname))


def _is_retrying(function: Any) -> bool:
    """Whether tenacity made this function: its attributes alone do not tell, since `functools.wraps` copies them."""
    return (
        type(function) is FunctionType
        and str(function.__globals__.get("__name__")).partition(".")[0] == "tenacity"
        and hasattr(function, "retry")
        and hasattr(function, "__wrapped__")
    )


def called(function: Any) -> Any:
    """Return what is called in the end: below partials and methods; of an object its method."""
    while isinstance(function, (functools.partial, MethodType)):
        function = function.func if isinstance(function, functools.partial) else function.__func__
    return function if inspect.isroutine(function) else getattr(type(function), "__call__", function)  # noqa: B004


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
    signature = capture.signature_of(function) if capture is not None else None

    def measured(*args: Any, **kwargs: Any) -> Any:
        if not recorder.enabled:
            return function(*args, **kwargs)
        stage = begin()
        _attempt(stage)
        if capture is not None:
            capture.before(stage, Call(function, args, kwargs, signature))
        stage.__enter__()
        try:
            result = function(*args, **kwargs)
            if type(result) in UNFINISHED and sys.getrefcount(result) <= 2:  # nobody else has it: it is for us to run
                leave(stage)
                return carried_on(BegunBody(stage, stage), result)
            if capture is not None:
                capture.after(stage, result)
        except BaseException as error:
            stage.__exit__(type(error), error, error.__traceback__)
            raise
        stage.__exit__(None, None, None)
        return result

    return measured


def _measured_coroutine(
    begin: Callable[[], StageContext], template: StageContext, function: Callable[..., Any]
) -> Callable[..., Any]:
    capture, recorder = template._call, template._recorder
    signature = capture.signature_of(function) if capture is not None else None

    async def measured(*args: Any, **kwargs: Any) -> Any:
        if not recorder.enabled:
            return await function(*args, **kwargs)
        stage = begin()
        _attempt(stage)
        if capture is not None:
            capture.before(stage, Call(function, args, kwargs, signature))
        with stage:
            result = await function(*args, **kwargs)
            if capture is not None:
                capture.after(stage, result)
            return result

    return measured


def _measured_stream(
    begin: Callable[[], StageContext], template: StageContext, function: Callable[..., Any], flags: int
) -> Callable[..., Any]:
    capture, recorder = template._call, template._recorder
    signature = capture.signature_of(function) if capture is not None else None

    def measured(*args: Any, **kwargs: Any) -> Any:
        if not recorder.enabled:
            return function(*args, **kwargs)
        stage = begin()
        body = StageBody(stage, here())
        made = run_as(body, flags)
        unfinished = function(*args, **kwargs)
        if capture is not None:
            capture.before(stage, Call(function, args, kwargs, signature))
        return begun_with(body, unfinished, made)

    return measured

"""
Every form of function with every way to end: decorated it does what it does undecorated, and the event is right.

A program is a form (a method, a partial, ...) around a body. It is made twice, plain and decorated, and one
script drives both. What the body and the script see is written down, and must be the same to the letter.
"""

from __future__ import annotations

import abc
import asyncio
import contextlib
import contextvars
import copy
import functools
import gc
import inspect
import pickle
import re
import sys
import threading
import time
import types
import typing
import warnings
import weakref
from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

import evalvault_sdk
from evalvault_sdk import current_stage
from evalvault_sdk.capture.given import Given
from evalvault_sdk.capture.recorder import Recorder
from evalvault_sdk.capture.stage import StageContext
from tests.support import ListSink

PACKAGE = str(Path(evalvault_sdk.__file__).parent)
VARIABLE: contextvars.ContextVar[str] = contextvars.ContextVar("variable", default="unset")
END = "end"

Stage = Callable[[Any], Any]


# What is written down


class Run:
    """One run of a program: what it told, in order."""

    def __init__(self, frames: bool = True) -> None:
        self.frames = frames
        self.lines: list[Any] = []
        self.made: list[BaseException] = []
        self.stages: list[tuple[str, str]] = []
        self.call: Any = None
        self.stream: Any = None
        self.kept: list[Any] = []
        self.depth = 0

    def tell(self, side: str, *what: Any) -> None:
        self.lines.append((side, *what, "handling", type(sys.exc_info()[1]).__name__))
        self.stages.append((side, current_stage().stage_type))


here = Run()


def inside(*what: Any) -> None:
    """Tell something from the body: there the stage is the current one."""
    here.tell("inside", *what)


def outside(*what: Any) -> None:
    """Tell something from the script: there no stage is open."""
    here.tell("outside", *what)


def made(error: BaseException) -> BaseException:
    """Remember an exception, to know it again when it comes by."""
    here.made.append(error)
    return error


def without_addresses(value: Any) -> str:
    return re.sub("0x[0-9a-f]+", "0x", repr(value))


def told(error: BaseException | None, depth: int = 4) -> Any:
    if error is None or depth == 0:
        return None
    frames, traceback = [], error.__traceback__
    while traceback is not None:
        if not traceback.tb_frame.f_code.co_filename.startswith(PACKAGE):
            frames.append(traceback.tb_frame.f_code.co_name)
        traceback = traceback.tb_next
    known = next((number for number, one in enumerate(here.made) if one is error), None)
    around = (told(error.__context__, depth - 1), told(error.__cause__, depth - 1), error.__suppress_context__)
    shown_frames = frames if here.frames else []
    return (type(error).__name__, without_addresses(error.args), known, shown_frames, *around)


def shown(got: Any) -> Any:
    return got if got is None or isinstance(got, (str, int, list, tuple)) else type(got).__name__


def attempt(step: Callable[..., Any], *args: Any, side: str = "outside") -> Any:
    """Take a step and tell what comes of it."""
    try:
        got = step(*args)
    except BaseException as error:
        here.tell(side, "raised", told(error))
        return None
    here.tell(side, "got", shown(got))
    return got


#: The same in the middle of an await, driven by hand: the code around it is then what an event loop is.
poke = functools.partial(attempt, side="loop")


async def await_(step: Callable[..., Any], *args: Any) -> Any:
    try:
        got = step(*args)
        if inspect.isawaitable(got):
            got = await got
    except BaseException as error:
        outside("raised", told(error))
        return None
    outside("got", shown(got))
    return got


def advance(stream: Any) -> Any:
    """Take the next item of any stream; of an asynchronous one without a loop, and so in this very context."""
    if inspect.isgenerator(stream):
        return next(stream, END)
    step = stream.__anext__()
    try:
        while True:
            step.send(None)
    except StopIteration as got:
        return got.value
    except StopAsyncIteration:
        return END


def run(form: Callable[[Stage, Any], Any], body: Any, script: Callable[[Any], Any], stage: Stage) -> Run:
    global here
    # A body that never ran is in a traceback only as long as nothing stands in front of it.
    here = mine = Run(frames="before" not in script.__name__ and "awaited_with_wrong" not in script.__name__)
    mine.call = form(stage, body)

    async def main() -> None:
        asyncio.get_running_loop().set_exception_handler(
            lambda _, context: mine.lines.append(
                ("loop", without_addresses(context["message"]), told(context.get("exception")))
            )
        )
        await script(mine.call)

    def ignored(what: Any) -> None:
        mine.lines.append(("ignored", getattr(what.object, "__qualname__", None), told(what.exc_value)))

    hook, sys.unraisablehook = sys.unraisablehook, ignored
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            if inspect.iscoroutinefunction(script):
                asyncio.run(main())
            else:
                script(mine.call)
            mine.call = mine.stream = None
            mine.kept.clear()
            gc.collect()
            here.tell("end")
            while caught:  # a warning holds what it is about, which may have another to give
                mine.lines.append(("warned", caught[0].category.__name__, str(caught[0].message)))
                del caught[0]
                gc.collect()
    finally:
        sys.unraisablehook = hook
    return mine


@pytest.fixture(autouse=True)
def quick_collections() -> Iterator[None]:
    gc.freeze()
    yield
    gc.unfreeze()


# The forms

FORMS: dict[str, Callable[[Stage, Any], Any]] = {}
#: Where the stage is not named as the body is.
NAMES = {"callable instance": "Service", "class": "Service", "subclass": "Service", "returns it": "form.<locals>.work"}
#: Not seen to make a generator before they are called: whether a call that is never started counts is left open.
ONLY_SEEN_WHEN_CALLED = {"returns it", "wrapped below"}


def form(name: str) -> Callable[[Any], Any]:
    return lambda make: FORMS.setdefault(name, make)


def service(**members: Any) -> Any:
    return type("Service", (), {"__qualname__": "Service", **members})


def passing(function: Any) -> Any:
    @functools.wraps(function)
    def passed(*args: Any, **options: Any) -> Any:
        return function(*args, **options)

    return passed


form("function")(lambda stage, body: stage(body))
form("method")(lambda stage, body: service(work=stage(body))().work)
form("method from the class")(
    lambda stage, body: functools.partial((made_class := service(work=stage(body))).work, made_class())
)
form("bound method")(lambda stage, body: stage(service(work=body)().work))
form("stage below classmethod")(lambda stage, body: service(work=classmethod(stage(body))).work)
form("stage above classmethod")(lambda stage, body: service(work=stage(classmethod(body)))().work)
form("stage below staticmethod")(lambda stage, body: service(work=staticmethod(stage(body)))().work)
form("stage above staticmethod")(lambda stage, body: service(work=stage(staticmethod(body))).work)
form("partial")(lambda stage, body: stage(functools.partial(body, 1, 2)))
form("partial of a partial")(lambda stage, body: stage(functools.partial(functools.partial(body, 1), 2)))
form("partial above")(lambda stage, body: functools.partial(stage(body), 1))
form("partialmethod above")(lambda stage, body: service(work=functools.partialmethod(stage(body), 1))().work)
form("callable instance")(lambda stage, body: stage(service(__call__=body)()))
form("class")(lambda stage, body: stage(service(__call__=body))())
form("subclass")(lambda stage, body: type("Sub", (stage(service(__call__=body)),), {})())
form("decorated __call__")(lambda stage, body: service(__call__=stage(body))())
form("wrapped above")(lambda stage, body: passing(stage(body)))
form("wrapped below")(lambda stage, body: stage(passing(body)))
form("twice")(lambda stage, body: stage(stage(body)))


@form("property, stage below")
def property_below(stage: Stage, body: Any) -> Any:
    instance = service(work=property(stage(body)))()
    return lambda: instance.work


@form("property, stage above")
def property_above(stage: Stage, body: Any) -> Any:
    instance = service(work=stage(property(body)))()
    return lambda: instance.work


@form("abstract method")
def abstract_method(stage: Stage, body: Any) -> Any:
    base = abc.ABCMeta("Base", (), {"work": stage(abc.abstractmethod(body))})
    assert base.__abstractmethods__ == {"work"}
    sub: Any = type("Sub", (base,), {"work": lambda self, *args, **options: base.work(self, *args, **options)})  # type: ignore[attr-defined]
    return sub().work


@form("returns it")
def returns_it(stage: Stage, body: Any) -> Any:
    def work(*args: Any, **options: Any) -> Any:
        return body(*args, **options)

    work.__qualname__ = "form.<locals>.work"
    return stage(work)


# The outcomes: scripts, the bodies that they drive, and the events these end in: status, items, type of the error

BODIES: dict[str, dict[str, Any]] = defaultdict(dict)
TWINS: dict[Any, Any] = {}
OUTCOMES: list[tuple[str, str, Any, str, str]] = []
STREAMS = "generator", "async generator"


class Stop(BaseException):
    """An exception that `except Exception` lets pass."""


def body(function: Any) -> Any:
    """Put a body among those of its kind, under its name without `async_`, and its twin as well."""
    flags = function.__code__.co_flags
    kinds = {inspect.CO_GENERATOR: "generator", inspect.CO_ASYNC_GENERATOR: "async generator"}
    kind = next((kind for flag, kind in kinds.items() if flags & flag), "")
    kind = kind or ("coroutine" if flags & inspect.CO_COROUTINE else "function")
    BODIES[kind][function.__name__.removeprefix("async_")] = function
    if function in TWINS:
        body(TWINS[function])
    return function


def twin(function: Any) -> Any:
    """Make of a generator function an asynchronous one as well, which waits where a comment says so."""
    source = inspect.getsource(function).replace("# await", "await")
    source = re.sub(
        r"return \"\w+\"", "return", source.partition("def ")[2].replace("    with Stage", "    async with Stage")
    )
    made_here: dict[str, Any] = {}
    exec(compile(f"async def {source}", __file__, "exec"), globals(), made_here)
    (TWINS[function],) = made_here.values()
    return function


def outcome(kind: str, *rows: str) -> Callable[[Any], Any]:
    """
    Put a script among the outcomes, with rows of "bodies: event + event".

    "any" is an event with any end, "?" any number of events.
    """

    def add(script: Any) -> Any:
        for row in rows:
            bodies, _, ends = row.partition(":")
            OUTCOMES.extend((kind, script.__name__.replace("_", " "), script, name, ends) for name in bodies.split())
        return script

    return add


# Bodies that just end, in each of the four kinds


@body
def returns(*_: Any) -> Any:
    inside("runs")
    return here.kept


def raising(name: str, make: Callable[[], BaseException]) -> None:
    def end(*_: Any) -> Any:
        inside("runs")
        raise made(make())

    end.__name__ = f"raises{name}"
    body(end)


raising("", lambda: ValueError("no"))
raising("_base", lambda: Stop("base"))
raising("_stop", lambda: StopIteration("value"))
raising("_async_stop", lambda: StopAsyncIteration("value"))
raising("_interrupt", lambda: KeyboardInterrupt("key"))
raising("_cancelled", lambda: asyncio.CancelledError("task"))
raising("_exit", lambda: GeneratorExit("closed"))


@body
def raises_from(*_: Any) -> Any:
    try:
        raise made(KeyError("first"))
    except KeyError as error:
        raise made(ValueError("second")) from error


def as_other_kinds(end: Any) -> None:
    async def coroutine(*_: Any) -> Any:
        await asyncio.sleep(0)
        return end()

    def generator(*_: Any) -> Any:
        yield 1
        return end()

    async def async_generator(*_: Any) -> Any:
        yield 1
        await asyncio.sleep(0)
        end()

    for function in (coroutine, generator, async_generator):
        function.__name__ = end.__name__
        body(function)


for one in list(BODIES["function"].values()):
    as_other_kinds(one)

FAILS = "raises raises_from: error ValueError", "raises_base: error Stop", "raises_async_stop: error StopAsyncIteration"
CANCELLED = "raises_interrupt raises_cancelled raises_exit: cancelled"
STREAM_FAILS = "raises raises_from: error 1 ValueError", "raises_base: error 1 Stop", f"{CANCELLED} 1"


# Functions


@body
def recurses(*_: Any) -> Any:
    here.depth += 1
    inside(here.depth)
    result = here.call() + 1 if here.depth < 3 else 0
    inside("back")
    return result


@body
def takes(*_: Any, needed: int) -> Any:
    return needed


@outcome(
    "function",
    *("returns: success", "recurses: success + success + success", *FAILS, CANCELLED),
    *("raises_stop: error StopIteration",),
)
def is_called(call: Any) -> None:
    outside("the same", attempt(call) is here.kept)


@outcome("function", "returns: success", *FAILS, CANCELLED)
def is_called_while_handling_an_error(call: Any) -> None:
    try:
        raise made(LookupError("handled"))
    except LookupError:
        attempt(call)


@outcome("function", "takes: ?")
@outcome("generator", "takes: ?")
@outcome("async generator", "takes: ?")
def is_called_with_wrong_arguments(call: Any) -> None:
    attempt(call)
    attempt(functools.partial(call, unknown=1))
    attempt(functools.partial(call, needed=1, unknown=1))


# Coroutines


@body
async def waits(*_: Any) -> Any:
    try:
        inside("before")
        await asyncio.sleep(0)
        inside("after", VARIABLE.get())
        VARIABLE.set("by the body")
    finally:
        inside("finally")
    return "returned"


@body
async def waits_long(*_: Any) -> Any:
    inside("before")
    try:
        await asyncio.sleep(60)
    finally:
        inside("finally")
        await asyncio.sleep(0)
        inside("finally awaited")


@body
async def refuses_to_stop(*_: Any) -> Any:
    try:
        await asyncio.sleep(60)
    except BaseException as error:
        inside(told(error))
        await asyncio.sleep(0)
    return "survived"


@body
async def refuses_then_fails(*_: Any) -> Any:
    try:
        await asyncio.sleep(60)
    except BaseException as error:
        inside(told(error))
    raise made(KeyError("after all"))


@body
async def async_recurses(*_: Any) -> Any:
    here.depth += 1
    inside(here.depth)
    await asyncio.sleep(0)
    result = await here.call() + 1 if here.depth < 3 else 0
    inside("back")
    return result


@body
async def async_takes(*_: Any, needed: int) -> Any:
    return needed


@outcome(
    "coroutine",
    *("waits returns: success", "recurses: success + success + success", *FAILS, CANCELLED),
    *("raises_stop: error RuntimeError",),
)
async def is_awaited(call: Any) -> None:
    VARIABLE.set("by the script")
    await await_(call)
    outside(VARIABLE.get())


@outcome("coroutine", "waits: success", *FAILS, CANCELLED)
async def is_awaited_while_handling_an_error(call: Any) -> None:
    try:
        raise made(LookupError("handled"))
    except LookupError:
        await await_(call)


@outcome("coroutine", "waits: success + success", "raises: error ValueError + error ValueError")
async def is_gathered(call: Any) -> None:
    outside(repr(await asyncio.gather(call(), call(), return_exceptions=True)))


@outcome("coroutine", "waits waits_long: cancelled", "refuses_to_stop: success", "refuses_then_fails: error KeyError")
async def is_cancelled(call: Any) -> None:
    task = asyncio.create_task(call())
    await asyncio.sleep(0)
    task.cancel("message")
    await await_(lambda: task)


@outcome("coroutine", "waits:")
async def is_cancelled_before_it_starts(call: Any) -> None:
    task = asyncio.create_task(call())
    task.cancel("message")
    await await_(lambda: task)


@outcome("coroutine", "waits_long: cancelled", "refuses_to_stop: success")
async def is_timed_out(call: Any) -> None:
    await await_(lambda: asyncio.wait_for(call(), 0.001))


@outcome("coroutine", "takes: ?")
async def is_awaited_with_wrong_arguments(call: Any) -> None:
    await await_(call)
    await await_(functools.partial(call, needed=1, unknown=1))


@outcome("coroutine", "waits:")
def is_never_awaited(call: Any) -> None:
    outside(inspect.iscoroutine(call()))
    outside("dropped")


@outcome("coroutine", "waits:")
def is_closed_before_it_starts(call: Any) -> None:
    coroutine = call()
    attempt(coroutine.close)
    attempt(coroutine.send, None)


@outcome("coroutine", "waits: success", "raises: error ValueError")
def is_driven_by_hand(call: Any) -> None:
    coroutine = attempt(call)
    outside(coroutine.__name__, coroutine.__qualname__, inspect.getcoroutinestate(coroutine))
    attempt(coroutine.send, "too early")
    poke(coroutine.send, None)
    here.tell("loop", inspect.getcoroutinestate(coroutine))
    attempt(coroutine.send, None)
    outside(inspect.getcoroutinestate(coroutine))
    attempt(coroutine.send, None)
    attempt(coroutine.throw, made(KeyError("late")))
    attempt(coroutine.close)


@outcome("coroutine", "waits returns: error KeyError", "refuses_to_stop: any")
def is_thrown_into(call: Any) -> None:
    coroutine = call()
    poke(coroutine.send, None)
    attempt(coroutine.throw, made(KeyError("thrown")), side="loop")


@outcome("coroutine", "waits: cancelled", "waits_long: any")
def is_closed_in_the_middle(call: Any) -> None:
    coroutine = call()
    poke(coroutine.send, None)
    attempt(coroutine.close, side="loop")
    attempt(coroutine.close, side="loop")


@outcome("coroutine", "waits: cancelled", "waits_long: any")
def is_dropped_in_the_middle(call: Any) -> None:
    coroutine = call()
    poke(coroutine.send, None)
    del coroutine
    here.tell("loop", "dropped")


@outcome("coroutine", "waits: cancelled")
def is_dropped_in_a_cycle(call: Any) -> None:
    cycle = [call()]
    cycle.append(cycle)
    poke(cycle[0].send, None)
    del cycle
    here.tell("loop", "dropped")
    gc.collect()
    here.tell("loop", "later")


# Streams: of each body one that waits and one that does not


@body
@twin
def three(*_: Any) -> Any:
    inside("starts")
    try:
        for number in range(3):
            # await asyncio.sleep(0)
            inside("received", (yield number))
    finally:
        inside("finally")
        # await asyncio.sleep(0)
        inside("finally, later")
    return "returned"


@body
@twin
def empty(*_: Any) -> Any:
    inside("starts")
    return "nothing"
    yield


@body
def recurses_in_steps(*_: Any) -> Any:
    here.depth += 1
    inside(here.depth)
    yield here.depth
    if here.depth < 3:
        yield from here.call()
    inside("back")


@body
async def async_recurses_in_steps(*_: Any) -> Any:
    here.depth += 1
    inside(here.depth)
    yield here.depth
    if here.depth < 3:
        async for item in here.call():
            yield item
    inside("back")


@body
@twin
def ignores_close(*_: Any) -> Any:
    try:
        yield 0
    except GeneratorExit:
        inside("ignores")
        yield "ignored"
    inside("goes on")
    yield "later"


@body
@twin
def returns_on_close(*_: Any) -> Any:
    try:
        yield 0
    except GeneratorExit as error:
        inside(told(error))
    return "late"


@body
@twin
def fails_on_close(*_: Any) -> Any:
    try:
        yield 0
    except GeneratorExit as error:
        inside(told(error))
    raise made(ValueError("in closing"))


@body
@twin
def catches(*_: Any) -> Any:
    for number in range(4):
        try:
            inside("received", (yield number))
        except (ValueError, StopIteration, StopAsyncIteration) as error:
            # await asyncio.sleep(0)
            inside("caught", told(error))
    return "returned"


@body
@twin
def catches_then_fails(*_: Any) -> Any:
    try:
        yield 0
    except Exception as error:
        inside("caught", told(error))
    raise made(KeyError("afterwards"))


@body
@twin
def replaces(*_: Any) -> Any:
    try:
        yield 0
    except Exception as error:
        raise made(KeyError("instead")) from error


@body
@twin
def sets_a_variable(*_: Any) -> Any:
    for number in range(3):
        inside(VARIABLE.get())
        token = VARIABLE.set("by the body")
        yield number
        inside(VARIABLE.get())
        if number == 1:
            VARIABLE.reset(token)


@twin
def takes_streaming(*_: Any, needed: int) -> Any:
    yield needed


BODIES["generator"]["takes"], BODIES["async generator"]["takes"] = takes_streaming, TWINS[takes_streaming]


@body
def delegates(*_: Any) -> Any:
    inside("value", (yield from three()))
    yield 3


@body
def enters_itself(*_: Any) -> Any:
    yield 1
    try:
        next(here.stream)
    except ValueError as error:
        inside(told(error))
    yield 2


@body
async def async_waits_long(*_: Any) -> Any:
    yield 0
    try:
        await asyncio.sleep(60)
    finally:
        inside("finally")


@body
async def async_survives(*_: Any) -> Any:
    yield 0
    try:
        await asyncio.sleep(60)
    except asyncio.CancelledError as error:
        inside(told(error))
    yield "survived"


# What is done to both kinds of streams, step by step

THROWN = {one.__name__: one for one in (ValueError, GeneratorExit, StopIteration, StopAsyncIteration, RuntimeError)}


def done(stream: Any, step: str) -> list[Any]:
    """Return what to call for a step like "next", "send a", "throw ValueError" or "throw class ValueError"."""
    verb, *of = step.split()
    verb = {"next": "__next__"}.get(verb, verb)
    if inspect.isasyncgen(stream):
        verb = {"__next__": "__anext__"}.get(verb, f"a{verb}")
    error = THROWN.get(of[-1]) if of else None
    return [getattr(stream, verb), *((error if len(of) == 2 else made(error("thrown")),) if error else of)]


def steps(script: str, *rows: str, kinds: tuple[str, ...] = STREAMS) -> None:
    """Add an outcome of streams: steps like those of `done`; "handle" an error during the next; "drop" the stream."""
    name, _, listed = script.partition(": ")

    async def drive(call: Any) -> None:
        stream = attempt(call)
        for step in listed.split(", "):
            if step == "drop":
                stream = None
                outside("dropped")
                for _ in range(10):
                    await asyncio.sleep(0)
                outside("later")
            elif step == "drop in a cycle":
                cycle = [stream]
                cycle.append(cycle)
                del stream, cycle
                outside("dropped")
                gc.collect()
                for _ in range(10):
                    await asyncio.sleep(0)
                outside("later")
            elif step.startswith("handling "):
                try:
                    raise made(LookupError("handled"))
                except LookupError:
                    await await_(*done(stream, step[9:]))
            else:
                await await_(*done(stream, step))

    drive.__name__ = name
    for kind in kinds:
        outcome(kind, *rows)(drive)


ALL_OF_IT = (
    *("three: success 3", "empty: success 0", "returns: success 1", *STREAM_FAILS),
    *("raises_stop: error 1 RuntimeError", "recurses_in_steps: success 1 + success 2 + success 3"),
)
NEXT = ", next"
steps(f"is stepped through: next{NEXT * 6}", *ALL_OF_IT)
steps(
    "is stepped past a StopAsyncIteration: next, next, next",
    "raises_async_stop: error 1 RuntimeError",
    kinds=STREAMS[1:],
)
steps("is dropped before its start: drop", "three:")
steps(
    "is dropped in between: next, drop",
    "three returns_on_close returns: cancelled 1",
    "fails_on_close: error 1 ValueError",
)
steps("is dropped before its start, in a cycle: drop in a cycle", "three:")
steps("is dropped in between, in a cycle: next, drop in a cycle", "three returns_on_close: cancelled 1")
steps("is closed before its start: close, next, close", "three ignores_close:")
steps(
    "is closed in between: next, close, next, close, close, next",
    *("three returns_on_close catches returns: cancelled 1", "fails_on_close: error 1 ValueError"),
    *("ignores_close: any",),
)
steps(f"is closed after its end: next{NEXT * 4}, close, close", "three: success 3", "raises: error 1 ValueError")
steps(
    f"is sent values: send too_early, next, send a, send b, next, send d{NEXT}",
    *("three: success 3", "catches: success 4"),
)
steps(
    f"is thrown at: next, throw ValueError, throw class ValueError{NEXT * 4}",
    *("three: error 1 ValueError", "catches: success 4", "catches_then_fails replaces: error 1 KeyError"),
)
steps("is thrown at before its start: throw ValueError, next", "three:")
steps(
    f"is thrown at after its end: next{NEXT * 3}, throw ValueError, throw class ValueError, throw class GeneratorExit",
    *("three: success 3", "raises: error 1 ValueError"),
)
steps(
    f"is thrown stops: next, throw StopIteration, throw StopAsyncIteration{NEXT * 3}",
    *("three: error 1 RuntimeError", "catches: success 4"),
)
steps(
    f"is thrown an async stop: next, throw StopAsyncIteration{NEXT * 3}",
    *("three: error 1 RuntimeError", "catches: success 4"),
    kinds=STREAMS[1:],
)
steps(
    "is thrown an exit: next, throw GeneratorExit, next, next, next",
    *("three: cancelled 1", "returns_on_close ignores_close: any"),
)
steps("is thrown no exception: next, throw nothing, next, close", "three: any")


steps(
    "is stepped while handling an error: next, handling next, handling throw ValueError, next, close",
    *("three: error 2 ValueError", "catches: cancelled 4", "catches_then_fails: error 1 KeyError"),
)
steps(
    "is closed while handling an error: next, handling close",
    "three: cancelled 1",
    "fails_on_close: error 1 ValueError",
)


# Generators alone


@outcome("generator", *ALL_OF_IT[:-1], "delegates: success 4", "raises_async_stop: error 1 StopAsyncIteration")
def is_iterated(call: Any) -> None:
    try:
        for item in call():
            outside(item)
    except BaseException as error:
        outside(told(error))


@outcome("generator", *ALL_OF_IT[:-1], "delegates: success 4")
def is_yielded_from(call: Any) -> None:
    def consumer() -> Any:
        outside("value", shown((yield from call())))

    attempt(list, consumer())


@outcome("generator", "three: success 3 + success 3")
def takes_turns_with_another(call: Any) -> None:
    first, second = call(), call()
    for _ in range(4):
        attempt(next, first)
        attempt(next, second)


@outcome("generator", "three delegates returns_on_close: cancelled 1", "fails_on_close: error 1 ValueError")
def is_left_by_break(call: Any) -> None:
    def loop() -> None:
        for item in call():
            outside(item)
            break
        outside("after")

    attempt(loop)


@outcome("generator", "three: cancelled 3")
def is_unpacked_into_too_few(call: Any) -> None:
    def unpack() -> None:
        _a, _b = call()

    attempt(unpack)
    outside("after")


@outcome("generator", "three: error 1 ValueError", "catches: success 4")
def is_thrown_at_in_the_old_way(call: Any) -> None:
    stream = call()
    attempt(next, stream)
    attempt(stream.throw, ValueError, "a value")
    attempt(stream.throw, ValueError, made(ValueError("an instance")))
    attempt(stream.throw, ValueError("not this"), "value")
    attempt(list, stream)


@outcome("generator", "ignores_close: any")
def is_dropped_although_it_ignores_that(call: Any) -> None:
    stream = call()
    attempt(next, stream)
    del stream
    outside("after")


@outcome("generator", "enters_itself: success 2")
def is_entered_by_itself(call: Any) -> None:
    here.stream = call()
    attempt(list, here.stream)


@outcome("generator", "sets_a_variable: success 3")
def shares_variables(call: Any) -> None:
    VARIABLE.set("by the script")
    for item in call():
        outside(item, VARIABLE.get())
        VARIABLE.set(f"by the script, {item}")
    outside(VARIABLE.get())


@outcome("generator", "three: success 3", "sets_a_variable: error 2 ValueError", "raises: error 1 ValueError")
def is_stepped_in_contexts_of_their_own(call: Any) -> None:
    stream = call()
    for _ in range(5):
        contextvars.copy_context().run(attempt, next, stream)


@outcome("generator", "three: success 3", "raises: error 1 ValueError")
def is_stepped_in_threads_of_their_own(call: Any) -> None:
    stream = call()
    for _ in range(5):
        thread = threading.Thread(target=attempt, args=(next, stream))
        thread.start()
        thread.join()


@outcome("generator", "three: success 3")
def is_asked_for_its_state(call: Any) -> None:
    stream = call()
    for _ in range(5):
        outside(stream.__name__, stream.__qualname__, inspect.isgenerator(stream), stream.gi_frame is None)
        outside(inspect.getgeneratorstate(stream), iter(stream) is stream, hasattr(stream, "__dict__"))
        attempt(next, stream)


def manages_a_context_with(kind: type[BaseException] | None, *rows: str) -> None:
    def script(call: Any) -> None:
        def block() -> None:
            with contextlib.contextmanager(call)() as resource:
                outside(resource)
                if kind:
                    raise made(kind("in the block"))

        attempt(block)
        outside("after")

    async def script_awaiting(call: Any) -> None:
        async def block() -> None:
            async with contextlib.asynccontextmanager(call)() as resource:
                outside(resource)
                if kind:
                    raise made(kind("in the block"))

        await await_(block)
        outside("after")

    script.__name__ = script_awaiting.__name__ = f"manages_a_context_with_{kind.__name__ if kind else 'no error'}"
    outcome("generator", *rows)(script)
    outcome("async generator", *rows)(script_awaiting)


CAUGHT = "catches: cancelled 2", "catches_then_fails replaces: error 1 KeyError"
manages_a_context_with(
    None, "three: cancelled 2", "returns: success 1", "raises: error 1 ValueError", "empty: success 0"
)
manages_a_context_with(ValueError, "three: error 1 ValueError", *CAUGHT)
manages_a_context_with(KeyboardInterrupt, "three: cancelled 1")
manages_a_context_with(StopIteration, "three: error 1 RuntimeError", *CAUGHT)
manages_a_context_with(StopAsyncIteration, "catches_then_fails: error 1 KeyError")
manages_a_context_with(RuntimeError, "three: error 1 RuntimeError", "replaces: error 1 KeyError")


# Asynchronous generators alone


@outcome("async generator", *ALL_OF_IT[:-1], "raises_async_stop: error 1 RuntimeError")
async def is_iterated_awaiting(call: Any) -> None:
    try:
        async for item in call():
            outside(item)
    except BaseException as error:
        outside(told(error))


@outcome("async generator", "three raises returns_on_close: cancelled 1")
async def is_left_by_break_and_closed(call: Any) -> None:
    async with contextlib.aclosing(call()) as stream:
        async for item in stream:
            outside(item)
            break
    outside("after")


@outcome("async generator", "three raises: cancelled 1", "fails_on_close: error 1 ValueError")
async def is_left_by_break_and_dropped(call: Any) -> None:
    async for item in call():
        outside(item)
        break
    outside("dropped")
    for _ in range(10):
        await asyncio.sleep(0)
    outside("later")


@outcome("async generator", "three raises: cancelled 1", "fails_on_close: error 1 ValueError", "ignores_close: any")
async def is_left_to_the_end_of_the_loop(call: Any) -> None:
    stream = call()
    here.kept.append(stream)
    await await_(stream.__anext__)


@outcome("async generator", "three:")
async def is_never_awaited_in_its_first_step(call: Any) -> None:
    stream = call()
    stream.__anext__()
    stream.asend(None)
    stream.aclose()
    outside("after")


@outcome("async generator", "waits_long: cancelled 1", "survives: success 2")
async def is_cancelled_in_a_step(call: Any) -> None:
    stream = call()

    async def consumer() -> None:
        for _ in range(4):
            await await_(stream.__anext__)

    task = asyncio.create_task(consumer())
    for _ in range(3):
        await asyncio.sleep(0)
    task.cancel("message")
    await await_(lambda: task)


@outcome("async generator", "waits_long: cancelled 1", "survives: any")
async def is_timed_out_in_a_step(call: Any) -> None:
    stream = call()
    for _ in range(4):
        await await_(lambda: asyncio.wait_for(stream.__anext__(), 0.01))


@outcome("async generator", "three: success 3", "raises: error 1 ValueError", "sets_a_variable: error 2 ValueError")
async def is_stepped_in_tasks_of_their_own(call: Any) -> None:
    stream = call()
    for _ in range(5):
        await asyncio.create_task(await_(stream.__anext__))


@outcome("async generator", "three returns_on_close: cancelled 1")
async def is_closed_by_another_task(call: Any) -> None:
    stream = call()
    await asyncio.create_task(await_(stream.__anext__))
    await asyncio.create_task(await_(stream.aclose))
    await asyncio.create_task(await_(stream.__anext__))


@outcome("async generator", "three: cancelled 2")
async def is_stepped_by_two_tasks_at_once(call: Any) -> None:
    stream = call()
    await asyncio.gather(await_(stream.__anext__), await_(stream.__anext__))
    await await_(stream.__anext__)
    await await_(stream.aclose)


@outcome("async generator", "three: success 3")
async def is_closed_while_it_runs(call: Any) -> None:
    stream = call()
    for step in (stream.aclose, stream.__anext__, functools.partial(stream.athrow, ValueError)):
        task = asyncio.create_task(await_(stream.__anext__))
        await asyncio.sleep(0)
        await await_(step)
        await task
    await await_(stream.__anext__)


@outcome("async generator", "sets_a_variable: success 3")
async def shares_variables_awaiting(call: Any) -> None:
    VARIABLE.set("by the script")
    async for item in call():
        outside(item, VARIABLE.get())
        VARIABLE.set(f"by the script, {item}")
    outside(VARIABLE.get())


@outcome("async generator", "three: success 3")
async def is_asked_for_its_state_awaiting(call: Any) -> None:
    stream = call()
    for _ in range(5):
        outside(stream.__name__, stream.__qualname__, inspect.isasyncgen(stream), stream.ag_frame is None)
        outside(stream.ag_running, stream.__aiter__() is stream, hasattr(stream, "__dict__"))
        await await_(anext, stream, END)


@outcome("async generator", "three: cancelled 1")
def is_stepped_by_hand(call: Any) -> None:
    stream = call()
    attempt(stream.__anext__().send, "too early")
    step = stream.__anext__()
    poke(step.send, None)
    attempt(step.send, None)
    attempt(step.send, None)
    step = stream.asend("a")
    poke(step.send, None)
    poke(stream.__anext__().send, None)
    poke(step.throw, made(KeyboardInterrupt("in the await")))
    attempt(step.send, None)
    attempt(stream.__anext__().send, None)


@outcome("async generator", "waits_long returns_on_close: cancelled 1", "three: any")
def is_dropped_without_a_loop(call: Any) -> None:
    stream = call()
    advance(stream)
    del stream
    outside("after")


@outcome("async generator", "three returns_on_close: any")
def outlives_its_loop(call: Any) -> None:
    loop, stream = asyncio.new_event_loop(), call()
    loop.run_until_complete(await_(stream.__anext__))
    loop.close()
    del stream
    outside("after")


@outcome("async generator", "catches: cancelled 2")
def is_known_to_the_hooks(call: Any) -> None:
    def first(stream: Any) -> None:
        outside("first step", stream is here.stream)

    def last(stream: Any) -> None:
        outside("dropped", type(stream).__name__)
        attempt(stream.aclose().send, None)

    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(first, last)
    try:
        here.stream = call()
        attempt(here.stream.__anext__().send, None)
        attempt(here.stream.__anext__().send, None)
        here.stream = None
    finally:
        sys.set_asyncgen_hooks(*hooks)
    outside("after")


# The one test of all of these

CYCLE = "is dropped in between, in a cycle"


@pytest.mark.parametrize(
    ("kind", "script", "body", "ends"),
    [
        pytest.param(kind, script, body, ends, id=f"{kind}: {body} {name}".replace("_", " "))
        for kind, name, script, body, ends in OUTCOMES
    ],
)
def test_it_behaves_as_undecorated(kind: str, script: Any, body: str, ends: str) -> None:
    for form in FORMS:
        try:
            behaves_as_undecorated(kind, form, script, body, ends)
        except AssertionError as error:
            raise AssertionError(f"as {form}: {error}") from error


def behaves_as_undecorated(kind: str, form: str, script: Any, body: str, ends: str) -> None:
    sink = ListSink()
    recorder = Recorder("run", sink)
    make, function = FORMS[form], BODIES[kind][body]
    plain = contextvars.copy_context().run(run, make, function, script, lambda function: function)
    staged = contextvars.copy_context().run(
        run, make, function, script, lambda function: StageContext(recorder, "work")(function)
    )
    assert staged.lines == plain.lines
    ends, recorded = ends.strip(), sorted(summary(event) for event in sink.events)
    wanted = [end.strip() for end in ends.split("+") if end] * (2 if form == "twice" else 1)
    if ends != "?" and (ends or form not in ONLY_SEEN_WHEN_CALLED):
        assert recorded == (recorded[: len(wanted)] if "any" in wanted else sorted(wanted))
        assert len(recorded) == len(wanted)
    expected = {"inside": "work", "outside": "none", "end": "none"}
    if kind == "coroutine" and "any" in ends:
        del expected["end"]  # left in the middle of an await, and so in the midst of the stage
    if form in ONLY_SEEN_WHEN_CALLED and script.__name__ == CYCLE:
        del expected["inside"]  # made before what was put around it, and so ended before it by the collector
    assert [one for one in staged.stages if one[1] != expected.get(one[0], one[1])] == []
    for event in sink.events:
        check(event, NAMES.get(form, function.__qualname__), staged.lines)


def summary(event: dict[str, Any]) -> str:
    attributes = event["attributes"]
    kind = attributes.get("error", {}).get("type", "").rpartition(".")[2]
    return " ".join(str(part) for part in (event["status"], attributes.get("item_count", ""), kind) if part != "")


def check(event: dict[str, Any], name: str, lines: list[Any]) -> None:
    attributes = event["attributes"]
    assert (event["stage_type"], event["stage_name"], event["run_id"]) == ("work", name, "run")
    assert ("error" in attributes) == (event["status"] == "error")
    if "error" in attributes and attributes["error"]["type"] != "RuntimeError":
        assert without_addresses(attributes["error"]["message"])[1:-1].strip("'") in repr(lines).replace("\\", "")
    assert ("time_to_first_item_ms" in attributes) == (attributes.get("item_count", 0) > 0)
    assert 0 <= attributes.get("time_to_first_item_ms", 0) <= event["duration_ms"]


# What only a stage has: parents, current_stage(), durations


@pytest.fixture
def sink() -> ListSink:
    return ListSink()


@pytest.fixture
def recorder(sink: ListSink) -> Recorder:
    return Recorder("run", sink)


def shut(stream: Any) -> None:
    if inspect.isgenerator(stream):
        stream.close()
        return
    closing = stream.aclose()
    with contextlib.suppress(StopIteration):
        while True:
            closing.send(None)


def pair(one: Any) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("body", [one, TWINS[one]], ids=["generator", "async generator"])


@twin
def speaks(*_: Any) -> Any:
    while True:
        yield current_stage()


both = pair(speaks)


@both
def test_the_parent_is_the_stage_open_where_it_was_called_even_if_that_ended(recorder: Recorder, body: Any) -> None:
    work = StageContext(recorder, "work")(body)
    with StageContext(recorder, "caller") as caller:
        stream = work()
    with StageContext(recorder, "consumer"):
        stage = advance(stream)
        assert current_stage().stage_type == "consumer"
    assert (stage.parent_stage_id, stage.trace_id) == (caller.stage_id, caller.trace_id)
    assert (advance(stream), current_stage().stage_type) == (stage, "none")
    shut(stream)


@both
def test_without_a_stage_at_the_call_the_parent_is_the_one_at_the_first_step(recorder: Recorder, body: Any) -> None:
    stream = StageContext(recorder, "work")(body)()
    with StageContext(recorder, "consumer") as consumer:
        stage = advance(stream)
    with StageContext(recorder, "other"):
        advance(stream)
    shut(stream)
    assert (stage.parent_stage_id, stage.trace_id) == (consumer.stage_id, consumer.trace_id)


@both
def test_between_items_the_consumer_is_in_its_own_stages(recorder: Recorder, body: Any) -> None:
    stream = StageContext(recorder, "work")(body)()
    with StageContext(recorder, "outer") as outer:
        stage = advance(stream)
        assert current_stage() is outer
        inner = StageContext(recorder, "inner").__enter__()
        assert inner.parent_stage_id == outer.stage_id
        assert advance(stream) is stage
        assert current_stage() is inner
        inner.__exit__(None, None, None)
        assert current_stage() is outer
        assert advance(stream) is stage
        shut(stream)
        assert current_stage() is outer
    assert current_stage().stage_type == "none"


@both
def test_streams_that_take_turns_do_not_mix(recorder: Recorder, sink: ListSink, body: Any) -> None:
    work = StageContext(recorder, "work")(body)
    with StageContext(recorder, "consumer") as consumer:
        first, second = work(), work()
        seen = [[advance(stream) for stream in (first, second)] for _ in range(3)]
        shut(first)
        assert current_stage() is consumer
        advance(second)
        shut(second)
        assert current_stage() is consumer
    assert [len({id(stage) for stage in column}) for column in zip(*seen, strict=True)] == [1, 1]
    assert seen[0][0].stage_id != seen[0][1].stage_id
    assert {stage.parent_stage_id for stage in seen[0]} == {consumer.stage_id}
    assert [event["attributes"]["item_count"] for event in sink.events[:2]] == [3, 4]


@twin
def with_child(recorder: Recorder) -> Any:
    yield current_stage()
    with StageContext(recorder, "child") as child:
        yield child
        assert current_stage() is child
        yield child
    yield current_stage()


@pair(with_child)
@pytest.mark.parametrize("taken", range(1, 6))
def test_a_child_around_a_yield_stays_within(recorder: Recorder, sink: ListSink, body: Any, taken: int) -> None:
    stream = StageContext(recorder, "work")(body)(recorder)
    seen = []
    with StageContext(recorder, "consumer") as consumer:
        for _ in range(taken):
            seen.append(advance(stream))
            assert current_stage() is consumer
        with StageContext(recorder, "between") as between:
            assert between.parent_stage_id == consumer.stage_id
        shut(stream)
        assert current_stage() is consumer
    assert {stage.parent_stage_id for stage in seen[1:3]} <= {seen[0].stage_id}
    assert seen[3:4] == seen[:1][: len(seen[3:4])]
    kinds = [event["stage_type"] for event in sink.events]
    assert sorted(kinds) == sorted(["between", "consumer", "work"] + ["child"] * (taken > 1))
    by_type = {event["stage_type"]: event for event in sink.events}
    if taken > 1:
        assert kinds.index("child") < kinds.index("work")
        assert by_type["child"]["status"] == ("success" if taken > 3 else "cancelled")
    assert by_type["work"]["status"] == ("success" if taken == 5 else "cancelled")


@twin
def slow(*_: Any) -> Any:
    time.sleep(0.02)
    yield 1
    yield 2


@pair(slow)
def test_the_time_runs_from_the_first_step_to_the_end(recorder: Recorder, sink: ListSink, body: Any) -> None:
    stream = StageContext(recorder, "work")(body)()
    time.sleep(0.1)
    before = time.perf_counter()
    advance(stream)
    time.sleep(0.03)
    while advance(stream) is not END:
        pass
    elapsed_ms = (time.perf_counter() - before) * 1000
    (event,) = sink.events
    assert 50 <= event["duration_ms"] <= elapsed_ms
    assert 20 <= event["attributes"]["time_to_first_item_ms"] <= event["duration_ms"] - 30


def test_a_recursion_of_streams_nests(recorder: Recorder, sink: ListSink) -> None:
    @StageContext(recorder, "work")
    def tree(depth: int) -> Any:
        yield depth
        if depth:
            yield from tree(depth - 1)

    assert list(tree(3)) == [3, 2, 1, 0]
    ids = [event["stage_id"] for event in sink.events]
    assert [event.get("parent_stage_id") for event in sink.events] == [*ids[1:], None]
    assert [event["attributes"]["item_count"] for event in sink.events] == [1, 2, 3, 4]


def endless(depth: int) -> Any:
    return 1 + here.call(depth + 1)


async def async_endless(depth: int) -> Any:
    return 1 + await here.call(depth + 1)


def yields_endless(depth: int) -> Any:
    yield from here.call(depth + 1)


async def streams_endless(depth: int) -> Any:
    async for item in here.call(depth + 1):
        yield item


@pytest.mark.parametrize("body", [endless, async_endless, yields_endless, streams_endless])
def test_a_recursion_that_is_too_deep_is_told_and_leaves_nothing_open(
    recorder: Recorder, sink: ListSink, body: Any
) -> None:
    here.call = StageContext(recorder, "work")(body)
    start: Any = {endless: lambda one: one, async_endless: lambda one: one.send(None)}.get(body, advance)
    with pytest.raises(RecursionError):
        start(here.call(0))
    here.call = None
    assert current_stage().stage_type == "none"
    with StageContext(recorder, "after") as after:
        assert after.parent_stage_id is None
    assert len(sink.events) > 20
    assert {event["status"] for event in sink.events[:-1]} == {"error"}
    assert {event["run_id"] for event in sink.events} == {"run"}


def test_many_streams_left_to_the_end_of_the_loop_end_quietly(recorder: Recorder, sink: ListSink) -> None:
    work = StageContext(recorder, "work")(TWINS[three])

    async def script(_: Any) -> None:
        here.kept += [work() for _ in range(20)]
        for stream in here.kept:
            await stream.__anext__()

    lines = run(lambda *_: None, None, script, lambda function: function).lines
    assert not [line for line in lines if line[0] in ("loop", "ignored", "warned")]
    assert [summary(event) for event in sink.events] == ["cancelled 1"] * 20


@twin
def says(*_: Any) -> Any:
    current_stage().set(query="q")
    yield 1
    current_stage().stage_name = "said"
    current_stage().set(found=2)
    yield 2


@pair(says)
def test_the_body_says_what_it_learns_between_its_items(recorder: Recorder, sink: ListSink, body: Any) -> None:
    stream = StageContext(recorder, "work", Given(attributes={"given": []}, metadata={"m": 1}))(body)()
    while advance(stream) is not END:
        pass
    (event,) = sink.events
    attributes = event["attributes"]
    assert attributes.pop("time_to_first_item_ms") >= 0
    assert attributes == {"given": [], "query": "q", "found": 2, "item_count": 2}
    assert (event["stage_name"], event["metadata"]) == ("said", {"m": 1})


# Nothing is kept


class Item:
    pass


@twin
def makes_items(*given: Any) -> Any:
    del given
    while True:
        here.kept.append(weakref.ref((yield Item()) or Item()))


@pair(makes_items)
def test_a_suspended_stream_holds_neither_items_nor_arguments_nor_sent_values(recorder: Recorder, body: Any) -> None:
    here.kept.clear()
    argument = Item()
    references = [weakref.ref(argument)]
    stream = StageContext(recorder, "work")(body)(argument)
    del argument
    item = advance(stream)
    references.append(weakref.ref(item))
    del item
    with contextlib.suppress(StopIteration):
        stream.send(Item()) if body is makes_items else stream.asend(Item()).send(None)
    gc.collect()
    assert [reference() for reference in references + here.kept] == [None] * 3
    here.kept.clear()
    shut(stream)


@pytest.mark.parametrize("ends", ["at its end", "closed", "dropped", "failed", "never started"])
@pair(three)
def test_nothing_is_left_of_a_stream(recorder: Recorder, body: Any, ends: str) -> None:
    def program() -> list[weakref.ref[Any]]:
        with StageContext(recorder, "consumer"):
            stream = StageContext(recorder, "work")(body)()
            error = Stop("fails")
            if ends != "never started":
                advance(stream)
            if ends == "at its end":
                while advance(stream) is not END:
                    pass
            elif ends == "closed":
                shut(stream)
            elif ends == "failed":
                with contextlib.suppress(Stop):
                    if inspect.isgenerator(stream):
                        stream.throw(error)
                    else:
                        step = stream.athrow(error)
                        step.send(None)
                        step.send(None)
            return [weakref.ref(stream), weakref.ref(error)]

    def stages() -> int:
        gc.collect()
        return sum(isinstance(one, StageContext) for one in gc.get_objects())

    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None  # an await while it is collected without a loop
    try:
        before = stages()
        references = contextvars.copy_context().run(program)
        assert stages() == before
    finally:
        sys.unraisablehook = hook
    assert [reference() for reference in references] == [None, None]


# What it looks like


def noted(function: Any) -> Any:
    function.note = "kept"
    return function


@noted
def looked_at(a: int, b: str = "x", *, c: float = 1.0) -> Any:
    """Look."""


@noted
async def async_looked_at(a: int, b: str = "x", *, c: float = 1.0) -> Any:
    """Look."""


@noted
def stream_looked_at(a: int, b: str = "x", *, c: float = 1.0) -> Iterator[int]:
    """Look."""
    yield a


@noted
async def async_stream_looked_at(a: int, b: str = "x", *, c: float = 1.0) -> AsyncIterator[int]:
    """Look."""
    yield a


LOOKED_AT = [looked_at, async_looked_at, stream_looked_at, async_stream_looked_at]
KINDS = ["isgeneratorfunction", "iscoroutinefunction", "isasyncgenfunction", "isfunction", "ismethod", "isroutine"]
NAMED = ["__name__", "__qualname__", "__doc__", "__module__", "__annotations__", "__defaults__", "__kwdefaults__"]
LOOKS = ["function", "method", "bound method", "wrapped above", "wrapped below", "twice"]
LOOKS += [f"stage {where} {method}" for where in ("below", "above") for method in ("classmethod", "staticmethod")]


def look(one: Any) -> dict[str, Any]:
    """Return what is seen of a function from outside."""
    return {
        **{name: getattr(inspect, name)(one) for name in KINDS},
        **{name: getattr(one, name, None) for name in [*NAMED, "__isabstractmethod__", "note"]},
        "asyncio.iscoroutinefunction": asyncio.iscoroutinefunction(one),
        "signature": inspect.signature(one),
        "type hints": typing.get_type_hints(one) if hasattr(one, "__annotations__") else None,
        "callable": callable(one),
        "weakly referred to": weakref.ref(one) is not None,
        "hashable": isinstance(hash(one), int),
    }


def below(one: Any) -> Any:
    return inspect.unwrap(getattr(inspect.unwrap(one), "__func__", one))


@pytest.mark.parametrize("name", LOOKS)
@pytest.mark.parametrize("body", LOOKED_AT)
def test_it_looks_as_undecorated(recorder: Recorder, name: str, body: Any) -> None:
    stage = StageContext(recorder, "work")
    plain, staged = FORMS[name](lambda function: function, body), FORMS[name](stage, body)
    seen = {what: both for what, *both in zip(look(plain), look(plain).values(), look(staged).values(), strict=True)}
    if name == "bound method":
        del seen["ismethod"], seen["isfunction"]
    assert {what: both for what, both in seen.items() if both[0] != both[1]} == {}
    assert below(staged) is below(plain) is body


@pytest.mark.parametrize("body", LOOKED_AT)
@pytest.mark.parametrize(
    "make", [functools.partial, lambda body, _: service(__call__=body)()], ids=["partial", "instance"]
)
def test_what_is_called_without_being_a_function_looks_as_undecorated(recorder: Recorder, make: Any, body: Any) -> None:
    plain = make(body, 1)
    staged = StageContext(recorder, "work")(make(body, 1))
    for what in [*KINDS[:3], "signature", "callable", "__doc__"]:
        assert (what, look(staged)[what]) == (what, look(plain)[what])


@pytest.mark.parametrize("above", [True, False])
@pytest.mark.parametrize("body", LOOKED_AT)
def test_an_abstract_method_stays_one(recorder: Recorder, body: Any, above: bool) -> None:
    stage = StageContext(recorder, "work")

    def again(*args: Any, **options: Any) -> Any:
        return body(*args, **options)

    work = stage(abc.abstractmethod(again)) if above else abc.abstractmethod(stage(again))
    base: Any = abc.ABCMeta("Base", (), {"work": work})
    with pytest.raises(TypeError, match="abstract"):
        base()


def test_a_property_keeps_its_setter_deleter_and_docs(recorder: Recorder, sink: ListSink) -> None:
    class Box:
        value = 1

        def get(self) -> int:
            """Get."""
            return self.value

        def put(self, value: int) -> None:
            self.value = value

        def drop(self) -> None:
            del self.value

        work = StageContext(recorder, "work")(property(get, put, drop))

    box: Any = Box()
    box.work = 5
    assert (box.work, len(sink.events)) == (5, 1)
    del box.work
    assert (box.work, Box.work.__doc__) == (1, "Get.")
    assert isinstance(Box.__dict__["work"], property)


def test_a_cached_function_keeps_its_cache(recorder: Recorder, sink: ListSink) -> None:
    below = StageContext(recorder, "below")(functools.lru_cache(maxsize=7)(lambda number: number + 1))
    above = functools.lru_cache(StageContext(recorder, "above")(lambda number: number + 1))
    assert [below(1), below(1), above(1), above(1)] == [2] * 4
    assert [event["stage_type"] for event in sink.events] == ["below", "below", "above"]
    for cached in (below, above):
        info: Any = cached.cache_info()
        assert (info.hits, info.misses) == (1, 1)
        cached.cache_clear()
        assert cached.cache_info().currsize == 0
    assert below.cache_parameters()["maxsize"] == 7


class Chain:
    """A callable object as frameworks have them."""

    def __init__(self, *parts: str) -> None:
        self.parts = list(parts)
        self.suffix = "!"

    def __call__(self, question: str = "") -> str:
        return question + " ".join(self.parts) + self.suffix

    def __len__(self) -> int:
        return len(self.parts)

    def __iter__(self) -> Iterator[str]:
        return iter(self.parts)

    def __getitem__(self, index: int) -> str:
        return self.parts[index]

    def __contains__(self, part: str) -> bool:
        return part in self.parts

    @property
    def first(self) -> str:
        return self.parts[0]


def test_a_decorated_object_is_still_used_as_itself(recorder: Recorder, sink: ListSink) -> None:
    plain: Any = Chain("a", "b")
    chain: Any = StageContext(recorder, "work")(plain)
    assert [isinstance(chain, Chain)] == [True]
    assert (len(chain), list(chain), chain[1], "a" in chain, bool(chain)) == (2, ["a", "b"], "b", True, True)
    assert (chain.first, chain.parts is plain.parts, chain.__doc__) == ("a", True, Chain.__doc__)
    chain.suffix = "?"
    chain.extra = 1
    assert (chain.suffix, plain.suffix, plain.extra) == ("?", "?", 1)
    assert chain("q ") == "q a b?"
    del chain.extra
    assert not hasattr(chain, "extra")
    with pytest.raises(AttributeError, match="missing"):
        _ = chain.missing
    assert not StageContext(recorder, "work")(Chain())
    assert plain() == "a b?"  # the object itself is left alone
    assert [event["stage_name"] for event in sink.events] == ["Chain"]


def test_a_decorated_class_stays_the_same_class(recorder: Recorder, sink: ListSink) -> None:
    class Base:
        def __call__(self, number: int) -> int:
            return number + 1

    before = Base
    decorated: Any = StageContext(recorder, "work")(Base)
    assert decorated is before
    assert (decorated.__name__, inspect.isclass(decorated)) == ("Base", True)

    class Same(decorated):  # type: ignore[misc]
        pass

    class Other(decorated):  # type: ignore[misc]
        def __call__(self, number: int) -> int:
            return 10 * int(super().__call__(number))

    assert isinstance(decorated(), Base)
    assert not sink.events
    assert (decorated()(1), Same()(1), Other()(1)) == (2, 2, 20)
    assert [event["status"] for event in sink.events] == ["success"] * 3
    one: Any = Same()
    with pytest.raises(TypeError, match="positional"):
        one(1, 2)


# What a function returns need not be its own


@twin
def shared_stream() -> Any:
    for number in "0123":
        yield int(number)


@pair(shared_stream)
def test_a_stream_that_others_read_too_survives_being_returned_and_dropped(recorder: Recorder, body: Any) -> None:
    shared = body()
    returning: Any = StageContext(recorder, "work")(lambda: shared)
    assert advance(returning()) == 0
    assert advance(returning()) == 1
    assert advance(shared) == 2


def test_a_coroutine_of_the_old_kind_can_still_be_awaited(recorder: Recorder, sink: ListSink) -> None:
    @StageContext(recorder, "work")
    @types.coroutine
    def pause() -> Any:
        yield
        return "returned"

    async def program() -> Any:
        return await pause()

    assert asyncio.run(program()) == "returned"
    assert [event["status"] for event in sink.events] == ["success"]


def test_an_object_that_has_every_attribute_is_decorated_like_others(recorder: Recorder, sink: ListSink) -> None:
    class Client:
        def __call__(self) -> int:
            return 7

        def __getattr__(self, name: str) -> Any:
            return lambda: name

    client: Any = StageContext(recorder, "work")(Client())
    assert (client(), client.anything()) == (7, "anything")
    assert len(sink.events) == 1


def test_the_class_of_a_decorated_object_is_freed(recorder: Recorder) -> None:
    kind = service(__call__=lambda self: None)
    StageContext(recorder, "work")(kind())()
    reference = weakref.ref(kind)
    del kind
    gc.collect()
    assert reference() is None


# Copies and pickles

SINK = ListSink()
STAGE = StageContext(Recorder("run", SINK), "work")


@STAGE
def module_function(number: int = 1) -> int:
    return number


@STAGE
async def module_coroutine(number: int = 1) -> int:
    return number


@STAGE
def module_generator(number: int = 1) -> Iterator[int]:
    yield number


@STAGE
async def module_async_generator(number: int = 1) -> AsyncIterator[int]:
    yield number


class ModuleService:
    @STAGE
    def method(self) -> Iterator[int]:
        yield 1

    @classmethod
    @STAGE
    def below(cls) -> Iterator[int]:
        yield 1

    @STAGE
    @classmethod
    def above(cls) -> Iterator[int]:
        yield 1

    @STAGE
    @staticmethod
    def static() -> Iterator[int]:
        yield 1


@STAGE
class ModuleClass:
    def __call__(self) -> Iterator[int]:
        yield 1


@pytest.mark.parametrize(
    "one",
    [
        module_function,
        module_coroutine,
        module_generator,
        module_async_generator,
        ModuleService.method,
        ModuleService().method,
        ModuleService.below,
        ModuleService.above,
        ModuleService.static,
        ModuleClass,
    ],
    ids=lambda one: str(one.__qualname__),
)
@pytest.mark.parametrize("protocol", range(2, pickle.HIGHEST_PROTOCOL + 1))
def test_what_a_module_has_is_pickled_by_its_name(one: Any, protocol: int) -> None:
    again = pickle.loads(pickle.dumps(one, protocol))
    assert getattr(again, "__func__", again) == getattr(one, "__func__", one)
    if inspect.isfunction(one) or inspect.isclass(one):
        assert pickle.loads(pickle.dumps(one, protocol)) is one
        assert copy.deepcopy({"one": [one]})["one"][0] is one


@pytest.mark.parametrize("copied", [copy.copy, copy.deepcopy])
def test_a_copy_of_a_decorated_object_is_a_stage_too(recorder: Recorder, sink: ListSink, copied: Any) -> None:
    chain: Any = StageContext(recorder, "work")(Chain("a"))
    holder = copied({"chain": chain})["chain"] if copied is copy.deepcopy else copied(chain)
    holder.suffix = "?"
    assert (holder("q "), chain("q ")) == ("q a?", "q a!")
    assert isinstance(holder, Chain)
    assert (holder.parts is chain.parts) == (copied is copy.copy)
    assert len(sink.events) == 2

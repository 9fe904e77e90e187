"""
Run the body of a stream, step by step, as a stage.

In:   a generator, an async generator or a coroutine that has not done its work yet, and the stage that it is.
Out:  one of the same kind for the consumer, through which everything passes: items, `send`, `throw`, `close`, the
      return value, exceptions.
In the thread or task that asks for the next item. Each step runs in the stage's context; between the steps the
consumer's own is back. Closing is a `throw` of GeneratorExit: Python sees to it that the stream obeys.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from types import AsyncGeneratorType, CoroutineType, FunctionType, GeneratorType
from typing import Any

from evalvault_sdk.capture.call import KeptItems
from evalvault_sdk.capture.clock import clock
from evalvault_sdk.capture.context import Scope, here, open_scope
from evalvault_sdk.capture.stage import StageContext

#: What a call may return that has not done its work yet.
UNFINISHED = frozenset((GeneratorType, CoroutineType, AsyncGeneratorType))


def run_as(body: Body, flags: int) -> Any:
    """
    Return an object of the kind that code with these flags makes, which runs `body.unfinished` as `body`.

    It is to be made before `body.unfinished` is: if both are garbage in one cycle, the collector ends them in that
    order, and only the outer one knows how to.
    """
    return _RUN[flags & _KIND](body)


def carried_on(body: Body, unfinished: Any) -> Any:
    """Return `unfinished` such that it runs as `body`."""
    code = getattr(unfinished, _CODE[type(unfinished)])
    return begun_with(body, unfinished, run_as(body, code.co_flags))


def begun_with(body: Body, unfinished: Any, made: Any) -> Any:
    """Give `body` what it runs, and `made` its name; return `made`."""
    body.unfinished = unfinished
    made.__name__, made.__qualname__ = unfinished.__name__, unfinished.__qualname__
    return made


class Body:
    """What runs step by step, in the context of some scope."""

    #: The generator, async generator or coroutine.
    unfinished: Any

    def __init__(self, inside: Scope | None) -> None:
        #: The innermost scope that is open in the body.
        self._inside = inside

    def resume(self) -> Scope | None:
        """Enter the context of the body; return that of the consumer."""
        outside = open_scope.get()
        open_scope.set(self._inside)
        return outside

    def pause(self, outside: Scope | None) -> None:
        """Leave the context of the body."""
        self._inside = open_scope.get()
        open_scope.set(outside)

    def made(self, item: Any) -> None:
        """See an item on its way to the consumer."""

    def thrown(self, error: BaseException) -> None:
        """See an exception on its way to the body."""

    def end(self, error: BaseException | None, result: Any = None) -> None:
        """See the end: the body returned, or raised `error`."""


class StageBody(Body):
    """The body of a stage. It begins with its first step, in the scope that it was called in, if not begun already."""

    def __init__(self, stage: StageContext, inside: Scope | None) -> None:
        super().__init__(inside)
        self._stage = stage
        # Made later than what runs the body, so that the collector comes to it later, too.
        self._account: _Account | None = None

    def resume(self) -> Scope | None:
        """Enter the context of the body; return that of the consumer."""
        account = self._account or self._begin()
        outside = open_scope.get()
        open_scope.set(self._inside)
        account.running, account.outside = True, outside
        return outside

    def _begin(self) -> _Account:
        if not self._stage._open:
            self._stage._start(self._inside or here())
            self._inside = self._stage
        self._account = _Account(self._stage, is_stream=type(self.unfinished) is not CoroutineType)
        return self._account

    def pause(self, outside: Scope | None) -> None:
        """Leave the context of the body."""
        self._inside = open_scope.get()
        open_scope.set(outside)
        account = self._account
        if account is not None:
            account.running, account.outside = False, None

    def made(self, item: Any) -> None:
        """See an item on its way to the consumer."""
        account = self._account
        if account is None:
            return
        account.count += 1
        if account.count == 1:
            account.first_item_ns = clock.perf_counter_ns()
        if account.items is not None:
            account.items.add(item)

    def thrown(self, error: BaseException) -> None:
        """See an exception on its way to the body."""
        if self._account is not None:
            self._account.closing = isinstance(error, GeneratorExit)

    def end(self, error: BaseException | None, result: Any = None) -> None:
        """Record the stage: the body returned, or raised `error`."""
        if self._account is not None:
            self._account.settle(error, result)


class BegunBody(StageBody):
    """The body of a stage that was begun by the function that returned it."""

    def __del__(self) -> None:
        if self._account is None:  # nobody ever asked for anything
            if type(self.unfinished) is CoroutineType:
                self.unfinished.close()  # Python warns of the one around it, if that is to be warned of
            _Account(self._stage, is_stream=False).settle(GeneratorExit())


class _Account:
    """What is known of a body that has begun. Whatever becomes of the body, its stage is recorded, and once."""

    def __init__(self, stage: StageContext, *, is_stream: bool) -> None:
        self._stage = stage
        self._is_stream = is_stream
        self._capture = stage._template._call
        #: Items that went to the consumer, when the first one did, and those that are wanted.
        self.count = 0
        self.first_item_ns = 0
        self.items = KeptItems() if self._capture is not None and self._capture.wants_result else None
        #: Whether the last thing that the body saw was that it is closed.
        self.closing = False
        #: Whether it is in the middle of a step, and then the scope of the consumer.
        self.running = False
        self.outside: Scope | None = None

    def settle(self, error: BaseException | None, result: Any = None) -> None:
        """Record the stage, if it is not recorded yet."""
        stage = self._stage
        if not stage._open:
            return
        ended_ns = clock.perf_counter_ns()
        try:
            if self._is_stream:
                self._tell_of_the_stream(stage)
            elif self._capture is not None and error is None:
                self._capture.after(stage, result)
        except Exception as fault:  # noqa: BLE001 - what a user assigned to `attributes`
            stage._recorder.hook_failed("attributes", fault)
        if error is None and self.closing:
            error = GeneratorExit()  # the body made an orderly end, but not its own
        stage._end(error, ended_ns)

    def _tell_of_the_stream(self, stage: StageContext) -> None:
        stage.set(**{"item_count": self.count, **stage.attributes})
        if self.count:
            waited_ms = (self.first_item_ns - stage._started_perf_ns) / 1_000_000
            stage.attributes.setdefault("time_to_first_item_ms", waited_ms)
        if self._capture is not None and self.items is not None:
            self._capture.after_stream(stage, self.items)

    def __del__(self) -> None:
        # Its body went without an end: it outlived its event loop, or did not let itself be closed.
        if self.running and self._stage.is_around(open_scope.get()):
            open_scope.set(self.outside)
        self.settle(GeneratorExit())


async def _coroutine(body: Body) -> Any:
    coroutine: Coroutine[Any, Any, Any] = body.unfinished
    outside = body.resume()
    try:
        result = await coroutine
    except BaseException as error:
        body.pause(outside)
        body.end(error)
        raise
    body.pause(outside)
    body.end(None, result)
    return result


def _generator(body: Body) -> Generator[Any, Any, Any]:
    generator: Generator[Any, Any, Any] = body.unfinished
    step: Callable[[Any], Any] = generator.send
    value: Any = None
    item: list[Any] = []  # emptied before the consumer has it: a suspended stream must not keep it alive
    while True:
        outside = body.resume()
        try:
            item.append(step(value))
        except BaseException as error:
            value = None
            body.pause(outside)
            if isinstance(error, StopIteration):
                body.end(None)
                return error.value
            body.end(error)
            raise
        value = None
        body.pause(outside)
        body.made(item[0])
        try:
            value = yield item.pop()
            step = generator.send
        except BaseException as error:  # noqa: BLE001 - it is for the body to say what becomes of it
            body.thrown(_as_thrown(error))
            step, value = generator.throw, error


async def _async_generator(body: Body) -> AsyncGenerator[Any, Any]:
    generator: AsyncGenerator[Any, Any] = body.unfinished
    step: Callable[[Any], Any] = functools.partial(_first_step, generator)
    value: Any = None
    item: list[Any] = []
    while True:
        outside = body.resume()
        try:
            item.append(await step(value))
        except BaseException as error:
            value = None
            body.pause(outside)
            if isinstance(error, StopAsyncIteration):
                body.end(None)
                return
            body.end(error)
            raise
        value = None
        body.pause(outside)
        body.made(item[0])
        try:
            value = yield item.pop()
            step = generator.asend
        except BaseException as error:  # noqa: BLE001 - it is for the body to say what becomes of it
            body.thrown(_as_thrown(error))
            step, value = generator.athrow, error


def _as_thrown(error: BaseException) -> BaseException:
    """Return an exception as it was thrown: without our own frame, which is none of its business."""
    if error.__traceback__ is not None:
        error.__traceback__ = error.__traceback__.tb_next
    return error


def _first_step(generator: AsyncGenerator[Any, Any], value: Any) -> Any:
    """Begin an async generator unknown to the event loop: it is for the one around it to end it, and in time."""
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, _leave_alone)
    try:
        return generator.asend(value)
    finally:
        sys.set_asyncgen_hooks(*hooks)


def _leave_alone(_: object) -> None:
    """Keep the collector from closing what it finds together with the one around it."""


#: A generator that may be awaited: a coroutine of the old kind.
_awaitable_generator = types.coroutine(FunctionType(_generator.__code__, globals()))
_AWAITABLE = inspect.CO_GENERATOR | inspect.CO_ITERABLE_COROUTINE
_KIND = _AWAITABLE | inspect.CO_ASYNC_GENERATOR | inspect.CO_COROUTINE
_RUN: dict[int, Callable[[Body], Any]] = {
    inspect.CO_GENERATOR: _generator,
    _AWAITABLE: _awaitable_generator,
    inspect.CO_ASYNC_GENERATOR: _async_generator,
    inspect.CO_COROUTINE: _coroutine,
}
_CODE: dict[type, str] = {GeneratorType: "gi_code", AsyncGeneratorType: "ag_code", CoroutineType: "cr_code"}

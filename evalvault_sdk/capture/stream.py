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
import sys
from collections.abc import AsyncGenerator, Callable, Coroutine, Generator
from types import AsyncGeneratorType, CoroutineType, GeneratorType
from typing import Any

from evalvault_sdk.capture import clock
from evalvault_sdk.capture.call import KeptItems
from evalvault_sdk.capture.context import Scope, open_scope
from evalvault_sdk.capture.stage import StageContext

#: What a call may return that has not done its work yet.
UNFINISHED = frozenset((GeneratorType, CoroutineType, AsyncGeneratorType))


def carried_on(body: Body, unfinished: Any) -> Any:
    """Return `unfinished`, an object of one of those types, such that it runs as `body`."""
    run: dict[type, Callable[[Body, Any], Any]] = {
        GeneratorType: _generator,
        AsyncGeneratorType: _async_generator,
        CoroutineType: _coroutine,
    }
    made = run[type(unfinished)](body, unfinished)
    made.__name__, made.__qualname__ = unfinished.__name__, unfinished.__qualname__
    return made


class Body:
    """Where the steps of a stream run: in the context of some scope."""

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
        self._count = 0
        self._first_item_ns: int | None = None
        self._items: KeptItems | None = None
        self._closing = False

    def resume(self) -> Scope | None:
        """Enter the context of the body; return that of the consumer."""
        stage = self._stage
        if not stage._open:
            stage._start(self._inside or open_scope.get())
            self._inside = stage
        return super().resume()

    def made(self, item: Any) -> None:
        """See an item on its way to the consumer."""
        self._count += 1
        if self._first_item_ns is None:
            self._first_item_ns = clock.perf_counter_ns()
        capture = self._stage._template._call
        if capture is not None and capture.wants_result:
            if self._items is None:
                self._items = KeptItems()
            self._items.add(item)

    def thrown(self, error: BaseException) -> None:
        """See an exception on its way to the body."""
        self._closing = isinstance(error, GeneratorExit)

    def end(self, error: BaseException | None, result: Any = None) -> None:
        """Record the stage: the body returned, or raised `error`."""
        stage = self._stage
        if not stage._open:
            return
        ended_ns = clock.perf_counter_ns()
        try:
            capture = stage._template._call
            if self._first_item_ns is not None:
                told = stage.attributes
                told.setdefault("item_count", self._count)
                waited_ms = (self._first_item_ns - stage._started_perf_ns) / 1_000_000
                told.setdefault("time_to_first_item_ms", waited_ms)
                if capture is not None and self._items is not None:
                    capture.after_stream(stage, self._items)
            elif capture is not None and error is None and result is not None:
                capture.after(stage, result)
        except Exception as fault:  # noqa: BLE001 - what a user assigned to `attributes`
            stage._recorder.hook_failed("attributes", fault)
        if error is None and self._closing:
            error = GeneratorExit()  # the body made an orderly end, but not its own
        stage._end(error, ended_ns)

    def __del__(self) -> None:
        # Of a stream that was begun by the function that returned it, and then never asked for anything.
        if self._stage._open:
            self.end(GeneratorExit())


async def _coroutine(body: Body, coroutine: Coroutine[Any, Any, Any]) -> Any:
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


def _generator(body: Body, generator: Generator[Any, Any, Any]) -> Generator[Any, Any, Any]:
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
            body.thrown(error)
            step, value = generator.throw, error


async def _async_generator(body: Body, generator: AsyncGenerator[Any, Any]) -> AsyncGenerator[Any, Any]:
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
            body.thrown(error)
            step, value = generator.athrow, error


def _first_step(generator: AsyncGenerator[Any, Any], value: Any) -> Any:
    """Begin an async generator unknown to the event loop, which at its end would close it before the one around it."""
    hooks = sys.get_asyncgen_hooks()
    sys.set_asyncgen_hooks(None, None)
    try:
        return generator.asend(value)
    finally:
        sys.set_asyncgen_hooks(*hooks)

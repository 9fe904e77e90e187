"""
Follow the streams that spans return: LlamaIndex's spans end before their streams are read.

In:   the results of spans.
Out:  whose stream the running code is inside; word when one was read to its end, failed, or was given up.
In the thread or task that reads. A stream is never read ahead; its items, errors and end pass through unchanged.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections.abc import AsyncGenerator, Callable, Generator
from types import AsyncGeneratorType, FrameType, GeneratorType
from typing import Any, Generic, TypeAlias, TypeVar

T = TypeVar("T")

Stream: TypeAlias = "GeneratorType[Any, Any, Any] | AsyncGeneratorType[Any, Any]"
#: So far up the stack a stream is looked for that runs the code.
_MAX_FRAMES = 64
#: The field of a query's response that holds its stream, and those of a chat's.
_QUERY = "response_gen"
_CHAT = ("chat_stream", "achat_stream")


class _Followed(Generic[T]):
    """A stream that is not at its end. Its owners: the spans that returned it, the innermost first."""

    __slots__ = ("owners", "stream")

    def __init__(self, owner: T) -> None:
        self.owners = [owner]
        self.stream: weakref.ref[Stream] | None = None


class Streams(Generic[T]):
    """
    The streams that are not at their end.

    `ended` is called for each owner: with None or the error, when a query's stream was read; with `GeneratorExit`,
    when a stream was collected, of whatever kind and however far it was read.
    """

    def __init__(self, ended: Callable[[T, BaseException | None], None]) -> None:
        self._ended = ended
        # By the id of the generator's frame, which the code that runs in it has among its callers.
        self._open: dict[int, _Followed[T]] = {}

    def __len__(self) -> int:
        return len(self._open)

    def follow(self, result: Any, owner: T) -> bool:
        """Return whether `result` is a stream, or a response that holds one, that is not at its end."""
        stream, response = result, None
        if not isinstance(result, (GeneratorType, AsyncGeneratorType)):
            fields = getattr(result, "__dict__", None)
            if not fields:
                return False
            response = fields.get(_QUERY)
            stream = next((held for name in _CHAT if (held := fields.get(name)) is not None), response)
            if not isinstance(stream, (GeneratorType, AsyncGeneratorType)):
                return False
        followed = self._known(_frame_of(stream))
        if followed is not None:
            followed.owners.append(owner)
            return True
        followed = _Followed(owner)
        if stream is response:
            # Nothing tells of the end of such a stream: it becomes one that does, and is the same to its reader.
            tell: Any = self._told if isinstance(stream, GeneratorType) else self._atold
            stream = tell(stream, followed)
            setattr(result, _QUERY, stream)
        return self._add(stream, followed)

    def reading(self) -> T | None:
        """Return the owner of the innermost stream that the calling code runs in."""
        frame: FrameType | None = sys._getframe(1) if self._open else None
        for _ in range(_MAX_FRAMES):
            if frame is None:
                break
            if (known := self._known(frame)) is not None and known.owners:
                return known.owners[0]
            frame = frame.f_back
        return None

    def _known(self, frame: FrameType | None) -> _Followed[T] | None:
        followed = self._open.get(id(frame))
        # Another frame may have got the place in memory of one that is gone.
        if followed is None or followed.stream is None or (stream := followed.stream()) is None:
            return None
        return followed if frame is not None and _frame_of(stream) is frame else None

    def _add(self, stream: Stream, followed: _Followed[T]) -> bool:
        frame = _frame_of(stream)
        if frame is None:
            return False
        place = id(frame)

        def collected(_: object) -> None:
            if self._open.get(place) is followed:
                self._open.pop(place, None)
            self._end(followed, GeneratorExit())

        followed.stream = weakref.ref(stream, collected)
        self._open[place] = followed
        return True

    def _told(self, stream: Generator[Any, Any, Any], followed: _Followed[T]) -> Generator[Any, Any, Any]:
        try:
            value = yield from stream
        except BaseException as error:
            self._end(followed, error)
            raise
        self._end(followed, None)
        return value

    async def _atold(self, stream: AsyncGeneratorType[Any, Any], followed: _Followed[T]) -> AsyncGenerator[Any, None]:
        try:
            async with contextlib.aclosing(stream):
                async for item in stream:
                    yield item
        except BaseException as error:
            self._end(followed, error)
            raise
        self._end(followed, None)

    def _end(self, followed: _Followed[T], error: BaseException | None) -> None:
        owners, followed.owners = followed.owners, []
        for owner in owners:
            self._ended(owner, error)


def _frame_of(stream: Stream) -> FrameType | None:
    """Return the frame of a generator; None at its end."""
    frame: FrameType | None = stream.gi_frame if isinstance(stream, GeneratorType) else stream.ag_frame
    return frame

"""
Follow what is stored, as it is stored.

In:   a place to go on from; a word from whoever stores that there is something new.
Out:  pages of events, without end.

A stream holds nothing but its place: it reads from the store when its reader is ready for more. So a slow
reader costs no memory, and storing never waits for it; and a stream that broke goes on where it was. Other
processes' events are found by looking: about every second.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from anyio import CapacityLimiter, to_thread

from evalvault_sdk.server.answers import come_again
from evalvault_sdk.server.security import Access
from evalvault_sdk.server.store.base import Store, StoredEvent

#: Events that are read at a time.
_PAGE = 500
#: Seconds between looks when nobody says that there is something new.
_LOOK_EVERY_S = 1.0
#: Seconds between looks at least: many commits are one page.
_BREATH_S = 0.05
#: Threads that read for streams; what else is asked has threads of its own.
_THREADS = 4


class LiveFeed:
    """All live streams of one process. Used on the event loop, but for `stored`."""

    def __init__(self, store: Store, *, max_streams: int) -> None:
        self._store = store
        self._max_streams = max_streams
        self._news = asyncio.Event()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._threads: CapacityLimiter | None = None
        self.streams = 0
        self.closing = False

    def stored(self) -> None:
        """Say that there is something new. In any thread."""
        if self.streams and self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop has ended
                self._loop.call_soon_threadsafe(self._tell)

    def close(self) -> None:
        """End all streams: their readers come again, and find another process. On the event loop's thread."""
        self.closing = True
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()

    def check_room(self) -> None:
        """Raise `ApiError` when there are too many streams."""
        if self.closing:
            raise come_again("Ending", "the server is ending", reason="ending")
        if self.streams >= self._max_streams:
            raise come_again("Overloaded", f"there are {self.streams} live streams already", reason="overloaded")

    @contextlib.asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """Count a stream for as long as the context lasts. Raises `ApiError` when there are too many."""
        self.check_room()
        self._loop = asyncio.get_running_loop()
        self.streams += 1
        try:
            yield
        finally:
            self.streams -= 1

    async def follow(
        self, access: Access, *, run_id: str | None, place: int | None
    ) -> AsyncIterator[tuple[list[StoredEvent], int]]:
        """
        Yield what is stored beyond `place` (None: from now on) and the place to go on from.

        The first page is empty, and says where it begins: at the end if `place` is beyond it, since that is of
        another database, a restored one perhaps. Empty ones follow about every second. Ends when the server
        does. Raises `StoreError`.
        """
        _, end = await self._look(None, run_id)
        place = end if place is None else min(place, end)
        yield [], place
        while not self.closing:
            news = self._news  # before the look: what is stored during it is news
            found, place = await self._look(place, run_id)
            yield [stored for stored in found if access.covers(stored.event.run_id)], place
            if not found:
                with contextlib.suppress(asyncio.TimeoutError):
                    await asyncio.wait_for(news.wait(), _LOOK_EVERY_S)
            await asyncio.sleep(_BREATH_S)

    async def _look(self, place: int | None, run_id: str | None) -> tuple[list[StoredEvent], int]:
        if self._threads is None:
            self._threads = CapacityLimiter(_THREADS)

        def look() -> tuple[list[StoredEvent], int]:
            return self._store.tail(place, run_id=run_id, limit=_PAGE)

        return await to_thread.run_sync(look, limiter=self._threads)

"""
Take in the bodies of requests, within bounds.

In:   a request, as it comes over the wire.
Out:  its bytes, unpacked; or an `ApiError` at the first byte too many. What a body claims to be is not trusted.

A body is read on the event loop and unpacked in a thread. What all of them together hold in memory is
bounded: the one that would be too much is told to come again, and those that are in are finished.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import zlib
from collections.abc import AsyncIterator, Callable, Iterator
from typing import Any

import anyio
import attrs
import zstandard
from starlette.requests import ClientDisconnect, Request

from evalvault_sdk.server.answers import ApiError, come_again, too_large
from evalvault_sdk.server.settings import ServerSettings

#: Members of a gzip body, frames of a zstd body; senders write one.
_MAX_PARTS = 16
#: Memory that a zstd frame may ask of its reader (RFC 8878, 3.1.1.1.2, recommends 8 MiB); the same in gzip is 32 KiB.
_MAX_ZSTD_WINDOW = 8 << 20
#: Bodies on their way for each that may be worked on.
_ARRIVING_FACTOR = 16
#: Of a body that is refused, so many bytes more are listened to, for so long.
_MAX_THROWN_AWAY = 64 << 20
_HEAR_OUT_S = 5.0
#: Bytes that come out of gzip at a time.
_STEP = 1 << 20
#: Bytes that go into zstd at a time: four of them can be a block of 128 KiB (RFC 8878, 3.1.1.2.2, RLE_Block).
_ZSTD_STEP = 128


class BodyBudget:
    """What the bodies that are being worked on may hold together."""

    def __init__(self, settings: ServerSettings, on_change: Callable[[int], None] = lambda size: None) -> None:
        """Bound by `settings`; `on_change` is told of the bytes that are held, in any thread."""
        self._settings = settings
        self._on_change = on_change
        self._lock = threading.Lock()
        #: Bodies that are on their way: they hold little, and come as slowly as their senders like.
        self._arriving = 0
        self.requests = 0
        self.bytes = 0

    @contextlib.asynccontextmanager
    async def receive(self, request: Request) -> AsyncIterator[Body]:
        """Read a body and yield it; it counts until the context ends. Raises `ApiError`."""
        encoding = (request.headers.get("content-encoding") or "identity").strip().lower()
        if encoding not in _UNPACKERS and encoding != "identity":
            raise ApiError(415, "Unsupported content encoding", "Content-Encoding must be gzip, zstd, or absent")
        if self._arriving >= _ARRIVING_FACTOR * self._settings.max_waiting_requests:
            raise _overloaded()
        body = Body(encoding=encoding, budget=self, limit=self._settings.max_unpacked_bytes)
        try:
            self._arriving += 1
            try:
                await self._read(request, body)
            finally:
                self._arriving -= 1
            if self.requests >= self._settings.max_waiting_requests:
                raise _overloaded()
            self.requests += 1
            try:
                yield body
            finally:
                self.requests -= 1
        finally:
            body.done()

    async def _read(self, request: Request, body: Body) -> None:
        limit = self._settings.max_body_bytes
        stream = request.stream()
        try:
            with anyio.fail_after(self._settings.body_timeout_s):
                async for chunk in stream:
                    if body.held + len(chunk) > limit:
                        refusal = too_large(f"a body may have {limit} bytes", limit_bytes=limit)
                        raise await _heard_out(stream, refusal)
                    body.hold(len(chunk))
                    body.chunks.append(chunk)
        except TimeoutError:
            raise ApiError(
                408, "Request timeout", f"the body did not arrive within {self._settings.body_timeout_s:g} s",
                headers={"Connection": "close"}, reason="slow",
            ) from None  # fmt: skip
        except ClientDisconnect:
            raise ApiError(
                400, "Incomplete request", "the connection was closed before the body was complete", reason="incomplete"
            ) from None

    def take(self, size: int, held: int = 0) -> None:
        """
        Count `size` more bytes (or fewer) for a body that counts for `held` already. In any thread.

        Raises `ApiError` when that would be too many.
        """
        limit = self._settings.max_waiting_bytes
        if held + size > limit:
            raise too_large(f"a body may have {limit} bytes", limit_bytes=limit)
        with self._lock:
            if size > 0 and self.bytes + size > limit:
                raise _overloaded()
            self.bytes += size
        self._on_change(self.bytes)


@attrs.define(kw_only=True)
class Body:
    """One body, while it is being worked on."""

    encoding: str
    budget: BodyBudget
    #: Bytes that it may unpack to.
    limit: int
    chunks: list[bytes] = attrs.field(factory=list)
    #: Bytes that it counts for.
    held: int = 0
    #: What has to end before it counts no longer: the request, and what goes on without it.
    waited_for: int = 1

    def hold(self, size: int) -> None:
        """Count `size` more bytes for this body. Raises `ApiError`."""
        self.budget.take(size, self.held)
        self.held += size

    def count_until(self, future: asyncio.Future[Any]) -> None:
        """Let it count until `future` is done, also when the request is answered before."""
        self.waited_for += 1
        future.add_done_callback(lambda _: self.done())

    def done(self) -> None:
        """Take back what it counted for, if nothing is left that holds it."""
        self.waited_for -= 1
        if not self.waited_for:
            self.budget.take(-self.held)

    def unpack(self) -> bytes:
        """Return the body without its encoding. Raises `ApiError`. Blocking: in a thread."""
        packed, self.chunks = b"".join(self.chunks), []
        if self.encoding == "identity":
            return packed
        unpacked, size = [], 0
        for piece in _UNPACKERS[self.encoding](packed):
            size += len(piece)
            if size > self.limit:
                raise too_large(f"the body unpacks to more than {self.limit} bytes", limit_bytes=self.limit)
            self.hold(len(piece))
            unpacked.append(piece)
        return b"".join(unpacked)


async def _heard_out(stream: AsyncIterator[bytes], refusal: ApiError) -> ApiError:
    """
    Return a refusal once its sender has said the rest, which is thrown away.

    Whoever is still sending when the connection is closed may never read the answer. One that goes on for long is
    closed all the same.
    """
    left = _MAX_THROWN_AWAY
    with anyio.move_on_after(_HEAR_OUT_S):
        async for chunk in stream:
            left -= len(chunk)
            if left < 0:
                break
        else:
            return refusal
    return attrs.evolve(refusal, headers={**refusal.headers, "Connection": "close"})


def _overloaded() -> ApiError:
    return come_again("Overloaded", "too many requests are waiting; try again later", reason="overloaded")


def _malformed(what: str, details: str) -> ApiError:
    return ApiError(400, f"Malformed {what}", details, reason="malformed")


def _gunzip(packed: bytes) -> Iterator[bytes]:
    for _ in range(_MAX_PARTS):  # RFC 1952, 2.2: a gzip file may have several members; each costs a copy of the rest
        unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        rest = packed
        try:
            while not unpacker.eof:
                piece = unpacker.decompress(rest, _STEP)
                rest = unpacker.unconsumed_tail
                if piece:
                    yield piece
                elif not rest and not unpacker.eof:
                    raise _malformed("gzip", "the body ends before its gzip stream does")
        except zlib.error:
            raise _malformed("gzip", "the body is not what Content-Encoding: gzip says") from None
        packed = unpacker.unused_data
        if not packed:
            return
    raise _malformed("gzip", f"the body has more than {_MAX_PARTS} gzip members")


def _unzstd(packed: bytes) -> Iterator[bytes]:
    for _ in range(_MAX_PARTS):
        unpacker = zstandard.ZstdDecompressor(max_window_size=_MAX_ZSTD_WINDOW).decompressobj()
        try:
            for start in range(0, len(packed), _ZSTD_STEP):
                if piece := unpacker.decompress(packed[start : start + _ZSTD_STEP]):
                    yield piece
                if unpacker.eof:
                    packed = unpacker.unused_data + packed[start + _ZSTD_STEP :]
                    break
            else:
                raise _malformed("zstd", "the body ends before its zstd frame does")
        except zstandard.ZstdError:
            raise _malformed("zstd", "the body is not what Content-Encoding: zstd says") from None
        if not packed:
            return
    raise _malformed("zstd", f"the body has more than {_MAX_PARTS} zstd frames")


_UNPACKERS: dict[str, Callable[[bytes], Iterator[bytes]]] = {"gzip": _gunzip, "x-gzip": _gunzip, "zstd": _unzstd}

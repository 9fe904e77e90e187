"""
One file of the spool: events as lines of JSON.

In:   lines, appended as they are; later an offset to read on from.
Out:  the lines from there, each judged: an event, or damaged.
Whoever holds the segment; it has no lock of its own.

What is appended is there whole or not at all, as far as this process can say: a write that fails half-way is cut
off again. A process that is killed, or a disk that fails, may leave a torn last line: it is no event, and no
loss either, since the write of it never came to its end.
"""

from __future__ import annotations

import contextlib
import errno
import os

import attrs
import orjson

from evalvault_sdk.delivery.account import Share

#: A line longer than this is damage, not an event.
_MAX_LINE_BYTES = 256 << 20
_OPEN_FLAGS = getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0)


@attrs.frozen
class Line:
    """One line of a segment, without its end."""

    text: bytes
    #: Where the next line begins.
    end: int
    #: Whether it is a JSON object. If not, something has damaged it.
    sound: bool


@attrs.define(eq=False)
class Segment:
    """A file of events. A new one is open for appending until it is closed; any can be read."""

    path: str
    #: When it was begun, in Unix milliseconds.
    created_ms: int
    #: Who began it; see `delivery.spool`.
    owner: str
    size: int = 0
    #: Whose its lines are from `offset` on. Lines beyond are of a process that has ended.
    shares: tuple[Share, ...] = ()
    #: So far its events have met their fate.
    offset: int = 0
    #: Whether a thread is writing to it, without a lock: then no other may close or delete it.
    busy: bool = False
    #: Unix time before which it is not to be sent.
    resume_at: float = 0.0
    #: Whether it holds a single event that may itself be the reason why requests fail.
    suspect: bool = False
    #: How many requests had gone well, in all, when that event last failed; and how often it did while others passed.
    failed_after: int = 0
    failures: int = 0
    #: How often it was tried in all.
    tries: int = 0
    _file: int | None = None

    @classmethod
    def create(cls, path: str, created_ms: int, owner: str) -> Segment:
        """Make a new file, for its owner only. Raises `OSError`."""
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_EXCL | _OPEN_FLAGS, 0o600)
        return cls(path, created_ms, owner, file=file)

    def append(self, lines: bytes) -> None:
        """Write `lines`, which end with a line's end: all of them or, with an `OSError`, none."""
        count = len(lines)
        if self._file is None:
            raise OSError(errno.EBADF, "it is closed")
        try:
            written = os.write(self._file, lines)
            while written < count:
                written += os.write(self._file, memoryview(lines)[written:])
        except OSError:
            with contextlib.suppress(OSError):
                os.ftruncate(self._file, self.size)
            raise
        self.size += count  # in one step, should a signal handler come that appends, too

    @property
    def is_there(self) -> bool:
        """Whether the file still has its name. While it is open it can be read even if somebody removed it."""
        try:
            named = os.stat(self.path, follow_symlinks=False)
        except OSError:
            return False
        return self._file is None or named.st_ino == os.fstat(self._file).st_ino

    def read(self, max_lines: int, max_bytes: int) -> list[Line]:
        """
        Return lines from `offset` on: at most so many, of at most so many bytes in all, but at least one.

        None are left when the list is empty. Raises `OSError`.
        """
        file = self._file
        if file is None:
            file = os.open(self.path, os.O_RDONLY | _OPEN_FLAGS)
        try:
            size = os.fstat(file).st_size
            want = max_bytes
            while True:
                data = _read(file, want, self.offset)
                at_end = self.offset + len(data) >= size
                lines = self._lines(data if at_end else data[: data.rfind(b"\n") + 1], max_lines, at_end=at_end)
                if lines or at_end:
                    return lines
                if want >= _MAX_LINE_BYTES:
                    return [Line(data, self.offset + len(data), sound=False)]
                want *= 4  # a single line is longer
        finally:
            if file != self._file:
                os.close(file)

    def _lines(self, data: bytes, max_lines: int, *, at_end: bool) -> list[Line]:
        lines: list[Line] = []
        begin = 0
        while begin < len(data) and len(lines) < max_lines:
            end = data.find(b"\n", begin)
            torn = end < 0
            text = data[begin:] if torn else data[begin:end]
            begin = len(data) if torn else end + 1
            if text.strip():
                sound = _is_object(text)
                if sound or not torn:
                    lines.append(Line(text, self.offset + begin, sound))
        return lines

    def close(self) -> None:
        """Append no more."""
        file, self._file = self._file, None
        if file is not None:
            os.close(file)

    def delete(self) -> bool:
        """Remove the file, or if it cannot be, empty it; say whether it is gone."""
        with contextlib.suppress(OSError):
            self.close()
        try:
            os.unlink(self.path)
        except FileNotFoundError:
            pass
        except OSError:
            with contextlib.suppress(OSError):
                os.truncate(self.path, 0)
            return False
        return True


def _read(file: int, count: int, offset: int) -> bytes:
    data = os.pread(file, count, offset)
    while 0 < len(data) < count:
        more = os.pread(file, count - len(data), offset + len(data))
        if not more:
            break
        data += more
    return data


def _is_object(text: bytes) -> bool:
    try:
        return isinstance(orjson.loads(text), dict)
    except orjson.JSONDecodeError:
        return False

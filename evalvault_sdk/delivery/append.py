"""
Append lines to a file that other processes append to as well.

In:   lines, each with its end.
Out:  all of them at the end of the file, on the disk, or none: the file never ends in half a line.

Each process holds a lock on the file while it writes. What does not fit on the disk is taken back whole.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

try:
    import fcntl
except ImportError:  # no POSIX: one process a file
    fcntl = None  # type: ignore[assignment]

#: Whoever waits for another process looks again after so many seconds.
_LOOK_AGAIN_S = 0.01


def append_lines(
    path: str | Path,
    lines: bytes,
    *,
    wait_s: float = 10.0,
    max_bytes: int | None = None,
    older: Path | None = None,
) -> None:
    """
    Append `lines` to a file that other processes append to as well: all of them, on the disk, or none.

    A file that is not there is made for its owner only. One that would exceed `max_bytes` becomes `older` first.
    Raises `OSError`, also if another process has the file locked for `wait_s` seconds.
    """
    until = time.monotonic() + wait_s
    while True:
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | getattr(os, "O_CLOEXEC", 0), 0o600)
        try:
            _lock(file, until)
            size = os.fstat(file).st_size
            if max_bytes is not None and older is not None and size and size + len(lines) > max_bytes:
                with contextlib.suppress(FileNotFoundError):  # another process has just set it aside
                    if os.stat(path).st_ino == os.fstat(file).st_ino:
                        os.replace(path, older)
                continue
            _append(file, size, lines)
            return
        finally:
            os.close(file)  # lets go of the lock, too


@contextlib.contextmanager
def hold(path: Path, *, wait_s: float = 10.0) -> Iterator[BinaryIO]:
    """
    Open a file that others append to, and let them wait while it is read, or emptied (but never removed).

    Raises `OSError`, also if another process has the file locked for `wait_s` seconds.
    """
    with path.open("r+b") as file:
        _lock(file.fileno(), time.monotonic() + wait_s)
        yield file


def _lock(file: int, until: float) -> None:
    while fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= until:
                raise
            time.sleep(_LOOK_AGAIN_S)
        else:
            return


def _append(file: int, size: int, lines: bytes) -> None:
    try:
        rest = memoryview(lines)
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.ftruncate(file, size)
        raise

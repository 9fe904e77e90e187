"""
Hold the lock file of an owner of segments, as the spool's specification has it.

In:   the path of a lock file.
Out:  the file, opened and locked, as long as this process lives or until it is closed.

A lock counts only if the file it is on still has its name, since whoever is done with an owner removes the file.
"""

from __future__ import annotations

import contextlib
import os

try:
    import fcntl
except ImportError:  # no POSIX
    fcntl = None  # type: ignore[assignment]


def take_lock(path: str, *, make: bool) -> tuple[int | None, bool]:
    """
    Return the lock file, opened, if nobody else holds it; and whether it is truly locked.

    It is not where the file system has no locks. With `make` a file that is not there is made. Raises `OSError`.
    """
    flags = os.O_RDWR | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_NOFOLLOW", 0) | (os.O_CREAT if make else 0)
    try:
        file = os.open(path, flags, 0o600)
    except FileNotFoundError:
        if make:
            raise
        return None, False
    if fcntl is None:
        return file, False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None, False
    except OSError:
        return file, False
    if not is_named(file, path):
        os.close(file)
        return None, False
    return file, True


def is_named(file: int, path: str) -> bool:
    """Whether an open file still has its name."""
    try:
        return os.fstat(file).st_ino == os.stat(path, follow_symlinks=False).st_ino
    except OSError:
        return False


def unlock(file: int, path: str) -> None:
    """Remove a lock file that we hold, then let go of it."""
    with contextlib.suppress(OSError):
        os.unlink(path)
    with contextlib.suppress(OSError):
        os.close(file)

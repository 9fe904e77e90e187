"""
Own segments by a lock file, as the spool's specification has it.

In:   a folder; the wish to own segments in it, or to adopt those of another owner.
Out:  lock files, opened and locked, as long as this process lives or until they are let go.

A lock counts only if the file it is on still has its name, since whoever is done with an owner removes the file.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Iterable

try:
    import fcntl
except ImportError:  # no POSIX
    fcntl = None  # type: ignore[assignment]


#: Another process that looks around may take a lock file in the instant before it is locked.
_BEGINNINGS = 8


class Owners:
    """The owners in one folder that this worker is: one of its own, and those that it has adopted."""

    def __init__(self, folder: str, *, without_locks: bool = False) -> None:
        self._folder = folder
        #: Whether to adopt where the file system has no locks: somebody has seen to it that no owner lives.
        self._without_locks = without_locks
        self._start_over()

    def _start_over(self) -> None:
        #: Our own, once there is something to own.
        self.own: str | None = None
        self._lock: int | None = None
        self._adopted: dict[str, int] = {}
        #: Whether the folder's file system has locks.
        self.locks_work = True

    def path(self, owner: str) -> str:
        """Return the path of an owner's lock file."""
        return f"{self._folder}/{owner}.lock"

    def begin(self) -> str:
        """Return our own owner; become one if we are none. The folder is there. Raises `OSError`."""
        for _ in range(_BEGINNINGS if self.own is None else 0):
            owner = os.urandom(8).hex()
            lock, _locked = self._take(owner, make=True)
            if lock is not None:
                self.own, self._lock = owner, lock
                break
        if self.own is None:
            raise BlockingIOError(errno.EWOULDBLOCK, "the lock file could not be locked")
        return self.own

    def check(self) -> None:
        """Begin anew with the next segment if somebody has removed our lock file, and with it our ownership."""
        if self._lock is not None and not is_named(self._lock, self.path(self.own or "")):
            self.let_go()

    def let_go(self) -> None:
        """Leave what we own to whoever adopts it."""
        lock, self.own, self._lock = self._lock, None, None
        if lock is not None:
            with contextlib.suppress(OSError):
                os.close(lock)

    def adopt(self, owner: str, *, make: bool) -> bool:
        """Take over from an owner whose lock nobody holds; say whether that worked. With `make` it has no lock file."""
        try:
            lock, locked = self._take(owner, make=make)
        except OSError:  # not now: too many open files, say
            return False
        if lock is None:
            return False
        if not locked:
            os.close(lock)
            return False
        self._adopted[owner] = lock
        return True

    def has_adopted(self, owner: str) -> bool:
        """Whether an owner's segments are ours to deliver, since it has ended."""
        return owner in self._adopted

    @property
    def adopted(self) -> int:
        """How many owners we have adopted and not yet let go."""
        return len(self._adopted)

    def keep_adopted(self, owners: Iterable[str]) -> None:
        """Let go of all adopted owners but these, and remove their lock files: nothing of theirs is left."""
        for owner in self._adopted.keys() - set(owners):
            unlock(self._adopted.pop(owner), self.path(owner))

    def close(self, *, left: bool) -> None:
        """Let go of all; of our own lock file, too, if nothing of ours is `left` for an adopter."""
        if self._lock is not None and self.own is not None and not left:
            unlock(self._lock, self.path(self.own))
            self._lock = None
        self.after_fork_in_child()

    def after_fork_in_child(self) -> None:
        """Close our copies of the locks, which frees none of the parent's."""
        self.let_go()
        for lock in self._adopted.values():
            with contextlib.suppress(OSError):
                os.close(lock)
        self._start_over()

    def _take(self, owner: str, *, make: bool) -> tuple[int | None, bool]:
        file, locked = take_lock(self.path(owner), make=make)
        if file is not None and not locked:  # no locks here: we write, but adopt nothing unless we are told to
            self.locks_work = locked = self._without_locks
        return file, locked


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

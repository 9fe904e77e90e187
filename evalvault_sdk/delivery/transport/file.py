"""
Append batches to a JSONL file, for a network that no server can be reached from.

In:   a `Batch`, in the worker's thread.
Out:  its events as lines of the file, on the disk: what `evalvault stage ingest` and `evalvault-sdk ingest`
      take as it is, on the other side.

Several processes may append to one file: each holds a lock on it while it writes. A batch that does not
fit on the disk is taken back whole, so that the file never ends in half a line, and is tried again later.
"""

from __future__ import annotations

import contextlib
import os

from evalvault_sdk.delivery.batch import Batch
from evalvault_sdk.delivery.transport.base import Delivered, Outcome, RetryLater

try:
    import fcntl
except ImportError:  # no POSIX: one process a file
    fcntl = None  # type: ignore[assignment]


class FileTransport:
    """A file that grows. It is made for its owner only (0600) where it is not there yet."""

    def __init__(self, path: str) -> None:
        self.destination = path
        self._path = os.path.abspath(path)  # noqa: PTH100 - the program may change its folder later

    def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
        """Append the batch and wait until it is on the disk."""
        try:
            file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
            try:
                if fcntl is not None:
                    fcntl.flock(file, fcntl.LOCK_EX)
                _append(file, b"\n".join(batch.events) + b"\n")
            finally:
                os.close(file)  # lets go of the lock, too
        except OSError as error:
            return RetryLater(
                f"{type(error).__name__}: {error.strerror}", advice="check the file's folder, its rights and its room"
            )
        return Delivered()

    def close(self) -> None:
        """Nothing is open between batches."""

    def after_fork_in_child(self) -> None:
        """Nothing is open between batches."""


def _append(file: int, lines: bytes) -> None:
    """Write all of `lines` at the end of the file, or none of it."""
    size = os.fstat(file).st_size
    try:
        rest = memoryview(lines)
        while rest:
            rest = rest[os.write(file, rest) :]
        os.fsync(file)
    except BaseException:
        with contextlib.suppress(OSError):
            os.ftruncate(file, size)
        raise

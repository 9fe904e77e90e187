"""
Append batches to a JSONL file, for a network that no server can be reached from.

In:   a `Batch`, in the worker's thread.
Out:  its events as lines of the file, on the disk: what `evalvault stage ingest` and `evalvault-sdk ingest`
      take as it is, on the other side.
"""

from __future__ import annotations

import os

from evalvault_sdk.delivery.append import append_lines
from evalvault_sdk.delivery.batch import Batch
from evalvault_sdk.delivery.transport.base import Delivered, Outcome, RetryLater

#: So long another process may write before it counts as a failure, and is tried again.
_WAIT_S = 10.0


class FileTransport:
    """A file that grows. It is made for its owner only (0600) where it is not there yet."""

    def __init__(self, path: str) -> None:
        self.destination = os.path.abspath(path)  # noqa: PTH100 - the program may change its folder later

    def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
        """Append the batch and wait until it is on the disk."""
        try:
            wait_s = _WAIT_S if timeout_s is None else min(timeout_s, _WAIT_S)
            append_lines(self.destination, b"\n".join(batch.events) + b"\n", wait_s=wait_s)
        except OSError as error:
            return RetryLater(
                f"{type(error).__name__}: {error.strerror}", advice="check the file's folder, its rights and its room"
            )
        return Delivered()

    def close(self) -> None:
        """Nothing is open between batches."""

    def after_fork_in_child(self) -> None:
        """Nothing is open between batches."""

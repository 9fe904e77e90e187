"""
Store batches in a database file, without a server.

In:   a `Batch`, in the worker's thread.
Out:  its events in EvalVault's tables, judged as the server judges them.

This is the one place where the client uses the server's code, and only when it is asked to: the store
needs no package beyond Python's own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import orjson

from evalvault_sdk.delivery.batch import Batch
from evalvault_sdk.delivery.transport.base import Delivered, Outcome, RejectedEvent, RetryLater
from evalvault_sdk.errors import StoreError
from evalvault_sdk.late import load

if TYPE_CHECKING:
    from evalvault_sdk.server.store import Store


class StoreTransport:
    """An SQLite file, made if it is not there."""

    def __init__(self, path: str) -> None:
        self.destination = path
        self._store: Store | None = None

    def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
        """Store the batch in one transaction."""
        load("evalvault_sdk.server.store", "evalvault_sdk.server.ingest")
        from evalvault_sdk.server.ingest import judge
        from evalvault_sdk.server.store import open_store

        submission = judge([orjson.loads(event) for event in batch.events])
        try:
            if self._store is None:
                self._store = open_store(self.destination)
            if submission.events:
                submission = submission.without(self._store.save(submission.events))
        except StoreError as error:
            return RetryLater(str(error), advice="check the file's folder, its rights, and who else writes to it")
        return Delivered(tuple(RejectedEvent(entry["index"], entry["details"]) for entry in submission.rejected))

    def close(self) -> None:
        """Close the file; the next `send` opens it."""
        store, self._store = self._store, None
        if store is not None:
            store.close()

    def after_fork_in_child(self) -> None:
        """Leave the parent's connection alone: closing it here would let go of the parent's locks on the file."""
        if self._store is not None:
            _inherited.append(self._store)
            self._store = None


#: Stores of a parent process, kept from being collected, which would close them.
_inherited: list[Store] = []

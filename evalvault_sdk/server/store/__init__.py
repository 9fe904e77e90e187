"""STORE: where events are kept, behind one small interface, chosen by an address."""

from __future__ import annotations

from evalvault_sdk.errors import ConfigurationError
from evalvault_sdk.server.store.base import RunTotals, Snapshot, StageTypeTotals, Store
from evalvault_sdk.server.store.sqlite import SQLiteStore

__all__ = ["RunTotals", "SQLiteStore", "Snapshot", "StageTypeTotals", "Store", "open_store"]


def open_store(address: str, *, read_only: bool = False) -> Store:
    """
    Return the store at `address`: the path of an SQLite file, which is made if it is not there.

    With `read_only` nothing is made or changed, not even the file's journal mode. Raises
    `ConfigurationError` for an address of a kind that is not known, `StoreError` when it cannot be opened.
    """
    scheme, separator, rest = address.partition("://")
    path = rest if separator else address
    if (separator and scheme != "sqlite") or not path or ":memory:" in path:
        raise ConfigurationError(f"{address!r} is no database that can be used: give the path of a file, eval.db say")
    return SQLiteStore(path, read_only=read_only)

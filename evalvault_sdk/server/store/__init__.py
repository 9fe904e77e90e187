"""STORE: where events are kept, behind one small interface, chosen by an address."""

from __future__ import annotations

from evalvault_sdk.errors import ConfigurationError
from evalvault_sdk.server.store.base import RunTotals, StageTypeTotals, Store
from evalvault_sdk.server.store.sqlite import SQLiteStore

__all__ = ["RunTotals", "SQLiteStore", "StageTypeTotals", "Store", "open_store"]


def open_store(address: str) -> Store:
    """
    Return the store at `address`: the path of an SQLite file, which is made if it is not there.

    Raises `ConfigurationError` for an address of a kind that is not known.
    """
    scheme, separator, rest = address.partition("://")
    if not separator:
        return SQLiteStore(address)
    if scheme == "sqlite":
        return SQLiteStore(rest)
    raise ConfigurationError(f"a database address of the kind {scheme}:// is not known: give a file, eval.db say")

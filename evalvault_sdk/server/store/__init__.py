"""STORE: where events are kept, behind one small interface, chosen by an address."""

from __future__ import annotations

import re

from evalvault_sdk.errors import ConfigurationError
from evalvault_sdk.server.store.base import (
    EVERYTHING,
    EventFilter,
    RunEntry,
    RunTotals,
    Snapshot,
    StageTypeTotals,
    Store,
    StoredEvent,
)
from evalvault_sdk.server.store.memory import MemoryStore
from evalvault_sdk.server.store.sqlite import SQLiteStore

__all__ = [
    "EVERYTHING",
    "EventFilter",
    "MemoryStore",
    "RunEntry",
    "RunTotals",
    "SQLiteStore",
    "Snapshot",
    "StageTypeTotals",
    "Store",
    "StoredEvent",
    "open_store",
]


_PASSWORD = re.compile(r"([?&](?:ssl)?password=)[^&]*")


def open_store(address: str, *, read_only: bool = False) -> Store:
    """
    Return the store at `address`; what is not there yet is made.

    | address | store |
    | --- | --- |
    | `eval.db`, `sqlite:///srv/eval.db` | an SQLite file |
    | `postgresql://user:password@host:5432/name` | PostgreSQL (the extra `[postgres]`) |
    | `evalvault:` | the storage that an installed EvalVault is configured for |
    | `memory:` | this process |

    With `read_only` nothing is made or changed, not even an SQLite file's journal mode. Raises
    `ConfigurationError` for an address of a kind that is not known, `StoreError` when it cannot be opened.
    """
    scheme, separator, rest = address.partition("://")
    if separator and scheme in ("postgresql", "postgres"):
        from evalvault_sdk.server.store.postgres import PostgresStore

        return PostgresStore(address, read_only=read_only)
    if address == "evalvault:":
        from evalvault_sdk.server.store.evalvault import EvalVaultStore

        return EvalVaultStore()
    if address == "memory:":
        return MemoryStore()
    path = rest if separator else address
    if (separator and scheme != "sqlite") or not path or ":memory:" in path:
        raise ConfigurationError(
            f"{without_password(address)!r} is no database that can be used: "
            "give the path of a file (eval.db, say), postgresql://..., or memory:"
        )
    return SQLiteStore(path, read_only=read_only)


def without_password(address: str) -> str:
    """Return an address as people may see it."""
    scheme, separator, rest = address.partition("://")
    credentials, at, host = rest.rpartition("@")
    user, colon, _ = credentials.partition(":")
    shown = f"{scheme}://{user}:***@{host}" if separator and at and colon else address
    return _PASSWORD.sub(r"\1***", shown)

"""The suite of all stores, over EvalVault's own adapter: what that can do of it."""

from __future__ import annotations

from pathlib import Path

import pytest

from evalvault_sdk.errors import UnsupportedError
from evalvault_sdk.server.store import Store
from evalvault_sdk.server.store.evalvault import EvalVaultStore
from tests.interop.real import SQLiteStorageAdapter
from tests.server import test_store as suite
from tests.server.stores import NOON, event, now

__all__ = [name for name in dir(suite) if name.startswith("test_") and name in globals()]


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return EvalVaultStore(SQLiteStorageAdapter(db_path=tmp_path / "theirs.db"))


def test_what_the_port_cannot_do_is_said(store: Store) -> None:
    store.save([event(1)])
    for impossible in (
        lambda: store.delete_run("r"),
        lambda: store.trim_run("r", 1),
        lambda: store.sweep(0, older_than=NOON, limit=1),
        lambda: store.tail(None, run_id=None, limit=1),
        lambda: now(store).runs(prefixes=[""], before=None, limit=1),
    ):
        with pytest.raises(UnsupportedError, match="by its own address"):
            impossible()


def test_a_run_can_be_followed_through_the_port(store: Store) -> None:
    _, start = store.tail(None, run_id="r", limit=10)
    store.save([event(1), event(2)])
    page, place = store.tail(start, run_id="r", limit=1)
    rest, _ = store.tail(place, run_id="r", limit=10)
    assert [stored.event.stage_id for stored in [*page, *rest]] == ["s1", "s2"]

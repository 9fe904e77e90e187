"""The suite of all stores, over EvalVault's own adapter: what that can do of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from evalvault_sdk.errors import UnsupportedError
from evalvault_sdk.server.store import Store
from evalvault_sdk.server.store.evalvault import EvalVaultStore
from tests.interop.real import SQLiteStorageAdapter
from tests.server import test_store as suite
from tests.server.stores import NOON, event, now

#: The promises of the suite that an adapter without places, list of runs and deletion can keep.
KEPT = (
    suite.test_a_check_passes_while_the_store_can_be_reached,
    suite.test_a_percentile_of_one_is_that_one,
    suite.test_events_are_found_by_type_and_trace_and_limited,
    suite.test_one_stage_is_found_by_its_id,
    suite.test_since_compares_instants_whatever_the_offsets,
    suite.test_the_run_spans_first_start_to_last_finish_whatever_the_offsets,
    suite.test_the_same_stage_id_in_two_runs_is_two_events,
    suite.test_totals_are_those_worked_out_by_hand,
    suite.test_traces_are_listed_the_newest_first_each_once,
    suite.test_what_is_stored_comes_back_field_by_field,
)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return EvalVaultStore(SQLiteStorageAdapter(db_path=tmp_path / "theirs.db"))


@pytest.mark.parametrize("promise", KEPT, ids=lambda promise: promise.__name__)
def test_the_suite_of_all_stores(promise: Callable[[Store], None], store: Store) -> None:
    promise(store)


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

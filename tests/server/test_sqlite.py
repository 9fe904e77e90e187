"""What is SQLite's own about its store: files, locks, other programs' rows."""

from __future__ import annotations

import sqlite3
import stat
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime, timezone
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest

from evalvault_sdk import ConfigurationError, StagePayloadRef
from evalvault_sdk.errors import StoreError
from evalvault_sdk.server.store import EventFilter, SQLiteStore, Store, open_store
from evalvault_sdk.server.store.sql_snapshot import SqlSnapshot
from tests.server.stores import NOON, event, now


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "events.db"


@pytest.fixture
def store(path: Path) -> Iterator[Store]:
    opened = open_store(str(path))
    yield opened
    opened.close()


def test_a_batch_is_stored_whole_or_not_at_all(store: Store) -> None:
    unstorable = event(2)
    object.__setattr__(unstorable, "attempt", 2**70)
    with pytest.raises((StoreError, OverflowError)):
        store.save([event(1), unstorable])
    assert now(store).count("r") == 0
    store.save([event(1)])
    assert now(store).count("r") == 1


def test_the_file_is_for_its_owner_only(store: Store, path: Path) -> None:
    store.save([event()])
    for file in path.parent.iterdir():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file


def test_what_is_answered_for_is_on_the_disk(store: SQLiteStore) -> None:
    assert store._writer is not None
    assert store._writer.execute("PRAGMA synchronous").fetchone() == (2,), "FULL: a power cut costs nothing"
    assert store._writer.execute("PRAGMA journal_mode").fetchone() == ("wal",)


def test_the_tables_are_evalvaults(store: Store, path: Path) -> None:
    store.save([event(started_at=NOON, attributes={"한": 1}, input_ref=StagePayloadRef("s", "i"))])
    with sqlite3.connect(path) as db:
        columns = [row[1] for row in db.execute("PRAGMA table_info(stage_events)")]
        row = db.execute("SELECT started_at, attributes, metadata, input_ref, attempt FROM stage_events").fetchone()
        indexes = {name for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type = 'index'")}
        metrics = [row[1] for row in db.execute("PRAGMA table_info(stage_metrics)")]
    db.close()
    assert columns == [
        "id",
        "run_id",
        "stage_id",
        "parent_stage_id",
        "stage_type",
        "stage_name",
        "status",
        "attempt",
        "started_at",
        "finished_at",
        "duration_ms",
        "input_ref",
        "output_ref",
        "attributes",
        "metadata",
        "trace_id",
        "span_id",
    ]
    assert row == ("2026-01-07T12:00:00+00:00", '{"한":1}', "{}", '{"store":"s","id":"i","type":"json"}', 1)
    assert {"idx_stage_events_run_stage_id", "idx_stage_events_run_id", "idx_stage_events_stage_type"} <= indexes
    assert metrics == ["id", "run_id", "stage_id", "metric_name", "score", "threshold", "evidence"]


def plans(path: Path, ask: Callable[[SqlSnapshot], object]) -> list[str]:
    """Return how SQLite goes about each query of a question."""
    with sqlite3.connect(path) as db:
        found: list[str] = []

        def explain(query: str, values: Mapping[str, Any]) -> Iterable[tuple[Any, ...]]:
            found.extend(row[3] for row in db.execute(f"EXPLAIN QUERY PLAN {query}", values))
            return db.execute(query, values)

        ask(SqlSnapshot(explain, SQLiteStore.dialect, stream=explain))
    return found


def test_totals_come_from_an_index_and_not_from_the_events(store: Store, path: Path) -> None:
    store.save([event(duration_ms=1)])
    used = [step for step in plans(path, lambda view: view.stage_type_totals("r")) if "stage_events" in step]
    assert len(used) == 2
    assert all("USING COVERING INDEX idx_evalvault_sdk_totals (run_id=?" in step for step in used), used


def test_metrics_see_rows_of_laxer_programs_as_every_reader_does(store: Store, path: Path) -> None:
    names = ("stage_type", "duration_ms", "started_at", "finished_at", "attributes", "metadata")
    rows = [
        ("Mixed ", 5.0, None, None, "{}", "{}"),
        ("x", 7, None, None, "{}", None),
        ("x", -1.0, None, None, "[1]", "{}"),
        ("x", "soon", None, None, "no JSON", '"text"'),
        ("x", float("inf"), None, None, '{"a": NaN}', '{"a": "\\ud800"}'),
        ("x", None, "2026-01-07T12:00:00", "2026-01-07T12:00:01", "{}", "{}"),
        ("x", None, "2026-01-07T12:00:01", "2026-01-07T12:00:00", "{}", "{}"),
        ("x", 1.0, "no time", None, '{"a":' + "[" * 253 + "]" * 253 + "}", '{"n": 1e400, "m": 123456789012345678901}'),
    ]
    with sqlite3.connect(path) as db:
        for number, row in enumerate(rows):
            db.execute(
                f"INSERT INTO stage_events (run_id, stage_id, {', '.join(names)}) VALUES ('r', ?, ?, ?, ?, ?, ?, ?)",
                (f"s{number}", *row),
            )
    kept = ("run_id", "stage_id", "stage_type", "duration_ms", "attributes", "metadata")
    whole = [[getattr(stored.event, name) for name in kept] for stored in now(store).events("r")]
    measured = [[getattr(stage, name) for name in kept] for stage in now(store).measured("r")]
    assert len(measured) == len(rows)
    assert str(measured) == str(whole)  # as texts: NaN is not equal to itself


def test_a_type_of_a_run_is_found_without_going_through_that_type_in_all_runs(store: Store, path: Path) -> None:
    def ask(view: SqlSnapshot) -> object:
        return list(view.events("r", EventFilter(stage_type="x")))

    (used,) = plans(path, ask)
    assert "USING INDEX idx_evalvault_sdk_totals (run_id=? AND stage_type=? AND id>?)" in used
    with sqlite3.connect(path) as db:
        db.execute("DROP INDEX idx_evalvault_sdk_totals")  # as in a file that only EvalVault ever wrote to
    (used,) = plans(path, ask)
    assert "USING INDEX idx_stage_events_run_id (run_id=? AND rowid>?)" in used


def test_a_file_that_evalvault_wrote_is_served_row_by_row_even_where_it_is_laxer(path: Path) -> None:
    SQLiteStore(path).close()
    rows = [
        # Naive times, as EvalVault writes them; NaN, as Python's json does; an order of times nobody checked.
        ("s1", "2026-01-04T16:15:49.330303", "2026-01-04T16:16:22.376524", '{"n": NaN}', "success", 1),
        ("s2", "2026-01-04T16:16:22", "2026-01-04T16:15:49", "{}", None, None),
        ("s3", "not a time", None, "not json", "", 0),
    ]
    with sqlite3.connect(path) as db:
        db.execute("DROP TABLE evalvault_sdk_schema")
        db.executemany(
            "INSERT INTO stage_events (run_id, stage_type, stage_id, started_at, finished_at, attributes, status, "
            "attempt) VALUES ('r', 'x', ?, ?, ?, ?, ?, ?)",
            rows,
        )
    db.close()
    store = open_store(str(path))
    first, second, third = (stored.event for stored in now(store).events("r"))
    assert first.started_at == datetime(2026, 1, 4, 16, 15, 49, 330303, tzinfo=timezone.utc)
    assert (second.stage_id, second.finished_at, second.status) == ("s2", None, "success")
    assert (third.stage_id, third.started_at, third.attempt) == ("s3", None, 1)
    assert third.attributes == {"unreadable": "not json"}
    assert now(store).run_totals("r").events == 3
    store.close()


def test_a_file_can_be_opened_again_and_by_two_at_once(path: Path) -> None:
    first = open_store(str(path))
    first.save([event(1)])
    second = open_store(f"sqlite://{path}")
    second.save([event(2)])
    assert now(first).count("r") == now(second).count("r") == 2
    first.close()
    second.close()


def test_what_cannot_be_opened_is_a_clear_error(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match="no/such/folder"):
        open_store(str(tmp_path / "no/such/folder/x.db"))
    text = tmp_path / "text.db"
    text.write_text("this is no database, but it is long enough to be taken for one" * 20)
    with pytest.raises(StoreError, match="not a database"):
        open_store(str(text))
    for address in ("redis://localhost", ":memory:", "sqlite://", ""):
        with pytest.raises(ConfigurationError, match="give the path of a file"):
            open_store(address)


def test_a_locked_file_is_an_error_after_a_while_and_works_again_later(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evalvault_sdk.server.store.sqlite._BUSY_TIMEOUT_S", 0.1)
    store = open_store(str(path))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="locked"):
        store.save([event()])
    other.execute("ROLLBACK")
    other.close()
    store.save([event()])
    assert now(store).count("r") == 1
    store.close()


def test_writing_waits_for_a_lock_no_longer_than_reading_can_bear(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("evalvault_sdk.server.store.sqlite._BUSY_TIMEOUT_S", 1.0)
    store = open_store(str(path))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    errors: list[StoreError] = []

    def save() -> None:
        try:
            store.save([event()])
        except StoreError as error:
            errors.append(error)

    threads = [threading.Thread(target=save) for _ in range(10)]
    started = time.monotonic()
    for thread in threads:
        thread.start()
    assert now(store).count("r") == 0, "reading does not wait for writing"
    assert time.monotonic() - started < 0.9
    for thread in threads:
        thread.join()
    assert time.monotonic() - started < 5, "they do not queue up one timeout behind the other"
    assert len(errors) == 10
    other.close()
    store.close()


def test_a_file_that_is_taken_away_is_an_error_and_does_not_come_back(store: Store, path: Path) -> None:
    store.save([event()])
    for file in list(path.parent.iterdir()):
        file.unlink()
    with pytest.raises(StoreError):
        store.save([event()])
    with pytest.raises(StoreError):
        now(store).count("r")
    assert not path.exists()
    path.write_bytes(b"")
    with pytest.raises(StoreError, match="replaced"):
        store.save([event()])


def test_looking_at_a_file_changes_nothing(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute((files("evalvault_sdk.server.store") / "sql/sqlite_0001_stage_tables.sql").read_text().split(";")[0])
        db.execute("INSERT INTO stage_events (run_id, stage_type, stage_id) VALUES ('r', 'x', 's')")
    db.close()
    before = path.read_bytes()
    store = open_store(str(path), read_only=True)
    assert now(store).count("r") == 1
    with pytest.raises(StoreError, match="reading only"):
        store.save([event()])
    store.close()
    assert path.read_bytes() == before
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_looking_at_another_programs_file_is_an_error(path: Path) -> None:
    with sqlite3.connect(path) as db:
        db.execute("CREATE TABLE t (x)")
    db.close()
    with pytest.raises(StoreError, match="no database of EvalVault's"):
        open_store(str(path), read_only=True)


def test_values_that_cannot_be_answered_are_served_as_text(path: Path) -> None:
    open_store(str(path)).close()
    texts = ['{"s": "\\ud800"}', '{"d": ' + "[" * 300 + "]" * 300 + "}"]
    with sqlite3.connect(path) as db:
        for number, text in enumerate(texts):
            db.execute(
                "INSERT INTO stage_events (run_id, stage_type, stage_id, attributes) VALUES ('r', 'x', ?, ?)",
                (number, text),
            )
    db.close()
    store = open_store(str(path))
    assert [stored.event.attributes for stored in now(store).events("r")] == [{"unreadable": text} for text in texts]
    store.close()

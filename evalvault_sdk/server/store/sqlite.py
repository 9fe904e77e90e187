"""
Keep events in one SQLite file, in EvalVault's own tables.

In:   batches from any thread; they are written one after the other, each in a transaction of its own.
Out:  rows as `StageEvent`s, read through a connection of the reader's own, so that reading never waits for
      writing (WAL).

A batch is on the disk when `save` returns (`synchronous=FULL`): an answer to a client is a promise. The
file is made for its owner only (0600), and SQLite gives its side files the same mode.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import threading
from collections.abc import Iterator, Sequence
from datetime import datetime, timezone
from importlib import resources
from pathlib import Path
from typing import Any

import orjson

from evalvault_sdk.errors import InvalidStageEventError, StoreError
from evalvault_sdk.events import StageEvent, parse_time
from evalvault_sdk.server.store.base import RunTotals, StageTypeTotals

_COLUMNS = (
    "run_id, stage_id, parent_stage_id, stage_type, stage_name, status, attempt, started_at, finished_at, "
    "duration_ms, input_ref, output_ref, attributes, metadata, trace_id, span_id"
)
_NAMES = _COLUMNS.split(", ")
#: Another process (EvalVault's CLI, say) may hold the file this long before we answer "try again".
_BUSY_TIMEOUT_S = 5.0
#: Numbered files of schema changes, applied in order, each once.
_SCHEMA = ("sqlite_0001_stage_tables.sql",)


def _sql(name: str) -> str:
    return (resources.files("evalvault_sdk.server.store") / "sql" / name).read_text(encoding="utf-8")


_STAGE_TYPE_TOTALS = _sql("sqlite_stage_type_totals.sql")
_RUN_TOTALS = _sql("sqlite_run_totals.sql")
_UPSERT = _sql("sqlite_upsert.sql")


class SQLiteStore:
    """
    Events in the SQLite file at `path`, which is made if it is not there.

    With `read_only` nothing is made or changed: a file on a read-only medium, or one that belongs to
    somebody else, can be looked at.
    """

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        self.address = str(path)
        self._path = Path(path).absolute()
        self._mode = "ro" if read_only else "rw"
        self._writing = threading.Lock()
        self._writer: sqlite3.Connection | None = None
        with _store_errors(self.address):
            if read_only:
                self._check_readable()
                return
            with contextlib.suppress(FileExistsError):
                os.close(os.open(self._path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600))
            self._file = self._path.stat()
            self._writer = self._connect()
            try:
                self._writer.execute("PRAGMA journal_mode=WAL")
                self._writer.execute("PRAGMA synchronous=FULL")
                self._apply_schema(self._writer)
            except BaseException:
                self._writer.close()
                raise

    def save(self, events: Sequence[StageEvent]) -> None:
        """Store all `events` in one transaction; see `Store.save`."""
        rows = [_row_of(event) for event in events]
        if not self._writing.acquire(timeout=_BUSY_TIMEOUT_S):
            raise StoreError(f"the database {self.address} failed: others have been writing for too long")
        try:
            with _store_errors(self.address):
                writer = self._writer
                if writer is None:
                    raise sqlite3.ProgrammingError("it is open for reading only")
                if not os.path.samestat(self._path.stat(), self._file):
                    raise sqlite3.OperationalError("the file was replaced by another one: start the server again")
                writer.execute("BEGIN IMMEDIATE")
                try:
                    writer.executemany(_UPSERT, rows)
                    writer.execute("COMMIT")
                except BaseException:
                    if writer.in_transaction:
                        writer.execute("ROLLBACK")
                    raise
        finally:
            self._writing.release()

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[SQLiteSnapshot]:
        """Return what is stored now; see `Store.snapshot`."""
        with _store_errors(self.address), contextlib.closing(self._connect()) as reader:
            reader.execute("BEGIN")
            yield SQLiteSnapshot(reader)

    def close(self) -> None:
        """Wait for the batch being written, then close the file."""
        with self._writing:
            if self._writer is not None:
                self._writer.close()

    def _connect(self) -> sqlite3.Connection:
        # Never "create": a file that was removed must not come back empty, and readable for everybody.
        # Autocommit: transactions are begun where they are meant. Threads take turns by our own lock.
        return sqlite3.connect(
            f"{self._path.as_uri()}?mode={self._mode}",
            uri=True,
            timeout=_BUSY_TIMEOUT_S,
            isolation_level=None,
            check_same_thread=False,
        )

    def _check_readable(self) -> None:
        self._path.stat()
        try:
            self._has_table()
        except sqlite3.OperationalError:
            # On a read-only medium SQLite cannot make its side files; nothing can change there, either.
            self._mode = "ro&immutable=1"
            self._has_table()

    def _has_table(self) -> None:
        with contextlib.closing(self._connect()) as reader:
            if not reader.execute("SELECT 1 FROM sqlite_master WHERE name = 'stage_events'").fetchone():
                raise sqlite3.DatabaseError("it has no table stage_events: this is no database of EvalVault's")

    @staticmethod
    def _apply_schema(writer: sqlite3.Connection) -> None:
        writer.execute("BEGIN IMMEDIATE")  # two servers may start on one new file at once
        writer.execute(
            "CREATE TABLE IF NOT EXISTS evalvault_sdk_schema (name TEXT PRIMARY KEY, applied_at TEXT NOT NULL)"
        )
        applied = {name for (name,) in writer.execute("SELECT name FROM evalvault_sdk_schema")}
        for name in _SCHEMA:
            if name not in applied:
                for statement in _sql(name).split(";"):
                    writer.execute(statement)
                now = datetime.now(timezone.utc).isoformat()
                writer.execute("INSERT INTO evalvault_sdk_schema VALUES (?, ?)", (name, now))
        writer.execute("COMMIT")


class SQLiteSnapshot:
    """What one read transaction sees; see `Snapshot`."""

    def __init__(self, reader: sqlite3.Connection) -> None:
        self._reader = reader

    def events(
        self,
        run_id: str,
        *,
        stage_type: str | None = None,
        trace_id: str | None = None,
        stage_id: str | None = None,
        limit: int | None = None,
    ) -> Iterator[StageEvent]:
        """Yield a run's events; see `Snapshot.events`."""
        where, values = _where(run_id=run_id, stage_type=stage_type, trace_id=trace_id, stage_id=stage_id)
        query = f"SELECT {_COLUMNS} FROM stage_events WHERE {where} ORDER BY id LIMIT ?"  # noqa: S608 - our words
        for row in self._reader.execute(query, (*values, -1 if limit is None else limit)):
            yield _event_of(row)

    def count(self, run_id: str, *, stage_type: str | None = None, trace_id: str | None = None) -> int:
        """Count a run's events; see `Snapshot.count`."""
        where, values = _where(run_id=run_id, stage_type=stage_type, trace_id=trace_id)
        query = f"SELECT COUNT(*) FROM stage_events WHERE {where}"  # noqa: S608 - our words
        return int(self._reader.execute(query, values).fetchone()[0])

    def stage_type_totals(self, run_id: str) -> list[StageTypeTotals]:
        """Return the totals of each stage type; see `Snapshot.stage_type_totals`."""
        rows = self._reader.execute(_STAGE_TYPE_TOTALS, {"run_id": run_id})
        names = ("stage_type", "events", "errors", "mean_ms", "p50_ms", "p95_ms", "p99_ms")
        return [StageTypeTotals(**dict(zip(names, row, strict=True))) for row in rows]

    def run_totals(self, run_id: str) -> RunTotals:
        """Return the totals of a run; see `Snapshot.run_totals`."""
        row = self._reader.execute(_RUN_TOTALS, {"run_id": run_id}).fetchone()
        events, errors, traces, started_at, finished_at, slowest_trace_id = row
        return RunTotals(
            events=events,
            errors=errors,
            traces=traces,
            started_at=_readable_time(started_at),
            finished_at=_readable_time(finished_at),
            slowest_trace_id=slowest_trace_id,
        )


@contextlib.contextmanager
def _store_errors(address: str) -> Iterator[None]:
    """Raise what SQLite and the file system raise as `StoreError`."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"the database {address} failed: {error}") from error


def _where(**conditions: str | None) -> tuple[str, list[str]]:
    given = {name: value for name, value in conditions.items() if value is not None}
    return " AND ".join(f"{name} = ?" for name in given), list(given.values())


def _json(value: Any) -> str:
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS).decode()


def _row_of(event: StageEvent) -> tuple[Any, ...]:
    return (
        event.run_id,
        event.stage_id,
        event.parent_stage_id,
        event.stage_type,
        event.stage_name,
        event.status,
        event.attempt,
        event.started_at.isoformat() if event.started_at else None,
        event.finished_at.isoformat() if event.finished_at else None,
        event.duration_ms,
        _json(event.input_ref.to_dict()) if event.input_ref else None,
        _json(event.output_ref.to_dict()) if event.output_ref else None,
        _json(event.attributes),
        _json(event.metadata),
        event.trace_id,
        event.span_id,
    )


def _event_of(row: tuple[Any, ...]) -> StageEvent:
    fields = dict(zip(_NAMES, row, strict=True))
    for name in ("input_ref", "output_ref", "attributes", "metadata"):
        fields[name] = _readable_json(fields[name])
    while True:
        try:
            return StageEvent(**fields)
        except InvalidStageEventError as error:
            # Another program wrote the row, by laxer rules. Leave out the field, not the event.
            name = error.field.partition(".")[0]
            if fields.get(name) is None:
                raise
            fields[name] = "unknown" if name in ("run_id", "stage_type") else None


def _readable_json(text: str | None) -> Any:
    if text is None:
        return None
    try:
        value = json.loads(text)  # not orjson: EvalVault writes NaN as Python does
        orjson.dumps([[[value]]])  # as deep as our answers wrap it
    except (ValueError, TypeError, RecursionError):  # orjson's error is a TypeError
        return {"unreadable": text}
    return value


def _readable_time(text: str | None) -> datetime | None:
    try:
        return parse_time("time", text)
    except InvalidStageEventError:
        return None

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
import os
import sqlite3
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime, timezone
from itertools import chain
from pathlib import Path
from typing import Any

from evalvault_sdk.errors import StoreError
from evalvault_sdk.events import StageEvent
from evalvault_sdk.server.store.base import Incoming
from evalvault_sdk.server.store.rows import COLUMNS, EventRow, row_of
from evalvault_sdk.server.store.sql_snapshot import Dialect, SqlSnapshot, load_sql
from evalvault_sdk.server.store.sql_store import SqlStore, Writing

#: Another process (EvalVault's CLI, say) may hold the file this long before we answer "try again".
_BUSY_TIMEOUT_S = 5.0
#: Numbered files of schema changes, applied in order, each once.
_SCHEMA = (
    "sqlite_0001_stage_tables.sql",
    "sqlite_0002_reading_indexes.sql",
    "sqlite_0003_totals_index.sql",
)
#: Pages of 4 KiB in the side file, after which they are written into the file itself: a page that many batches
#: change is written once. SQLite's own 1,000 cost a tenth of the rate.
_CHECKPOINT_PAGES = 8_000
_UPSERT = load_sql("sqlite_upsert.sql")
_ROW_OF_VALUES = f"({', '.join('?' * len(COLUMNS))})"
#: How many rows go into one statement, and the statement: SQLite before 3.32 takes no more than 999 values.
_UPSERTS = tuple(
    (size, _UPSERT.replace(_ROW_OF_VALUES, ", ".join([_ROW_OF_VALUES] * size)))
    for size in ((512, 32, 1) if sqlite3.sqlite_version_info >= (3, 32) else (32, 1))
)
_DIALECT = Dialect(
    event_columns={},
    metric_columns="run_id, stage_id, metric_name, score, threshold, evidence",
    instant=lambda time: f"julianday({time})",  # knows offsets; the text may have any
    since="julianday(:since)",
    # Where our index is not there, by the run's: SQLite would rather go through all events of the type, of all runs.
    stage_type="likely(stage_type = :stage_type)",
    run_totals=load_sql("sqlite_run_totals.sql"),
    run_ids=load_sql("sqlite_run_ids.sql"),
    lock_run="SELECT :run",  # one transaction writes at a time
)


class SQLiteStore(SqlStore):
    """
    Events in the SQLite file at `path`, which is made if it is not there.

    With `read_only` nothing is made or changed: a file on a read-only medium, or one that belongs to
    somebody else, can be looked at.
    """

    dialect = _DIALECT
    writers = 1

    def __init__(self, path: str | Path, *, read_only: bool = False) -> None:
        self.address = str(path)
        self._path = Path(path).absolute()
        self._mode = "ro" if read_only else "rw"
        self._lock = threading.Lock()
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
                self._writer.execute(f"PRAGMA wal_autocheckpoint={_CHECKPOINT_PAGES}")
                self._apply_schema(self._writer)
            except BaseException:
                self._writer.close()
                raise

    def prepared(self, event: StageEvent) -> EventRow:
        """Return the row of `event`; see `Store.prepared`."""
        return row_of(event)

    def save(self, events: Sequence[Incoming]) -> Mapping[int, str]:
        """Store all `events` in one transaction; see `Store.save`."""
        rows = [event if isinstance(event, EventRow) else row_of(event) for event in events]
        start = 0
        with self._transaction() as writer:
            # Each statement lets go of the interpreter, and has to wait for it again: so few of them, of many rows.
            for size, query in _UPSERTS:
                end = start + (len(rows) - start) // size * size
                parts = (rows[place : place + size] for place in range(start, end, size))
                writer.executemany(query, ([*chain.from_iterable(part)] for part in parts))
                start = end
        return {}

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[SqlSnapshot]:
        """Return what is stored now; see `Store.snapshot`."""
        with _store_errors(self.address), contextlib.closing(self._connect()) as reader:
            reader.execute("BEGIN")
            yield SqlSnapshot(reader.execute, _DIALECT, stream=reader.execute)  # SQLite always gives row by row

    def check(self) -> None:
        """Raise `StoreError` unless the file is there and can be read; see `Store.check`."""
        with _store_errors(self.address):
            if self._writer is not None:
                self._check_file()
            self._has_table()

    def close(self) -> None:
        """Wait for the batch being written, then close the file."""
        with self._lock:
            if self._writer is not None:
                self._writer.close()

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        if not self._lock.acquire(timeout=_BUSY_TIMEOUT_S):
            raise StoreError(f"the database {self.address} failed: others have been writing for too long")
        try:
            with _store_errors(self.address):
                writer = self._writer
                if writer is None:
                    raise sqlite3.ProgrammingError("it is open for reading only")
                self._check_file()
                writer.execute("BEGIN IMMEDIATE")
                try:
                    yield writer
                    writer.execute("COMMIT")
                except BaseException:
                    if writer.in_transaction:
                        writer.execute("ROLLBACK")
                    raise
        finally:
            self._lock.release()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Writing]:
        with self._transaction() as writer:

            def each(query: str, rows: Iterable[Mapping[str, Any]]) -> None:
                writer.executemany(query, rows)

            yield Writing(writer.execute, each)

    def _settled_place(self) -> int:
        # One transaction writes at a time, whichever process it is in: numbers appear in their order.
        with self.snapshot() as view:
            ((last,),) = view.ask("SELECT MAX(id) FROM stage_events", {})
        return last or 0

    def _check_file(self) -> None:
        if not os.path.samestat(self._path.stat(), self._file):
            raise sqlite3.OperationalError("the file was replaced by another one: start the server again")

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
                for statement in load_sql(name).split(";"):
                    writer.execute(statement)
                now = datetime.now(timezone.utc).isoformat()
                writer.execute("INSERT INTO evalvault_sdk_schema VALUES (?, ?)", (name, now))
        writer.execute("COMMIT")


@contextlib.contextmanager
def _store_errors(address: str) -> Iterator[None]:
    """Raise what SQLite and the file system raise as `StoreError`."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise StoreError(f"the database {address} failed: {error}") from error

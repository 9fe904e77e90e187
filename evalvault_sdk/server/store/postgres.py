"""
Keep events in PostgreSQL, for more than one server process or machine.

In:   batches from any thread of any number of identical processes.
Out:  rows as `StageEvent`s, read in transactions that see one instant.

A batch is copied into a temporary table and merged from there: the fastest way in that can also replace.
`save` returns after the commit, and sees to it that a commit waits for the disk. Works behind a pooler that
gives a connection per transaction: nothing is prepared, nothing is kept in a session but that table, which
is made where it is missing.

On a database that EvalVault made, runs are UUIDs and must be in its table `evaluation_runs`: events of
others are refused one by one.
"""

from __future__ import annotations

import contextlib
import logging
import random
import re
import threading
import time
import uuid
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import timezone
from typing import Any

import attrs

from evalvault_sdk.errors import ConfigurationError, MissingDependencyError, StoreError
from evalvault_sdk.events import StageEvent
from evalvault_sdk.server.store.base import Incoming
from evalvault_sdk.server.store.rows import COLUMNS, EventRow, row_of
from evalvault_sdk.server.store.sql_snapshot import Dialect, SqlSnapshot, load_sql
from evalvault_sdk.server.store.sql_store import SqlStore, Writing

try:
    import psycopg
    from psycopg.conninfo import conninfo_to_dict
    from psycopg_pool import ConnectionPool
except ImportError as missing:
    raise MissingDependencyError.for_extra("a PostgreSQL database", "postgres", missing) from missing

logger = logging.getLogger("evalvault_sdk.server")

_Connection = psycopg.Connection[tuple[Any, ...]]
#: The rows of one event, as often as a batch has it, each with the index of where it stood.
_Numbered = list[tuple[int, tuple[Any, ...]]]

#: Numbered files of schema changes, applied in order, each once.
_SCHEMA = (
    "postgres_0001_stage_tables.sql",
    "postgres_0002_reading_indexes.sql",
    "postgres_0003_totals_index.sql",
    "postgres_0004_run_counts.sql",
)
#: Held while they are applied: many processes may start on one new database. The number is only ours.
_SCHEMA_LOCK = 7_308_325_127_064_912
_COPY = f"COPY evalvault_sdk_staging (ordinal, {', '.join(COLUMNS)}) FROM STDIN"
#: Connections of one process: threads that save; those that read, for requests and live streams; and two more.
_WRITERS = 4
_CONNECTIONS = _WRITERS + 8 + 4 + 2
#: Seconds to wait for a connection.
_CONNECT_TIMEOUT_S = 5
#: Seconds after which the pool gives up an attempt to connect: the next request makes a new one at once, where a
#: longer attempt would wait longer and longer.
_RECONNECT_S = 2
#: Seconds to wait for an answer, and for somebody else's lock.
_STATEMENT_TIMEOUT_S = 60
_LOCK_TIMEOUT_S = 10
# How a transaction begins. In the transaction, not in the session: behind a pooler that is somebody else's. What a
# client is told is stored must be on the disk, whatever the database's default is.
_READING = """SET TRANSACTION ISOLATION LEVEL REPEATABLE READ READ ONLY; SET LOCAL timezone = 'UTC';
SET LOCAL datestyle = 'ISO';"""
_WRITING = "SELECT set_config('synchronous_commit', 'on', true) WHERE current_setting('synchronous_commit') = 'off';"
_STORING = f"{_WRITING} {load_sql('postgres_staging.sql')}"
_READ_ONLY = "-c default_transaction_read_only=on"
#: Changes of the schema may take as long as they do.
_BEGIN_CHANGING = "SET LOCAL statement_timeout = 0; SET LOCAL lock_timeout = 0"
#: Batches that hold each other up, other programs' among them, are tried again.
_DEADLOCK_TRIES = 6
#: The transactions that have written, or are about to.
_WRITERS_NOW = """SELECT DISTINCT virtualtransaction FROM pg_locks WHERE relation = 'stage_events'::regclass
AND mode IN ('RowExclusiveLock', 'ShareRowExclusiveLock', 'ExclusiveLock', 'AccessExclusiveLock')
AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"""
#: Whether all triggers that keep the counts of runs are there, and at work, and what they keep may be read.
_IS_COUNTED = """SELECT COUNT(*) = 4 AND has_table_privilege(to_regclass('evalvault_sdk_run_counts'), 'SELECT')
FROM pg_trigger WHERE tgrelid = 'stage_events'::regclass AND tgenabled IN ('O', 'A')
AND tgname IN ('evalvault_sdk_stored', 'evalvault_sdk_deleted', 'evalvault_sdk_moved', 'evalvault_sdk_emptied')"""
_RUN_COUNT = "SELECT COALESCE(SUM(events), 0) FROM evalvault_sdk_run_counts WHERE run_id = :run_id"
#: Rows that come over at a time: each may have a million characters.
_FETCH = 100
_NO_RUN = str(uuid.UUID(int=0))
_TEXT_COLUMNS = {"run_id", "started_at", "finished_at", "input_ref", "output_ref", "attributes", "metadata"}
_PARAMETER = re.compile(r"(?<![:\w]):([a-z_]\w*)")
#: What stands before a host in a URL, if every character that means something there is escaped.
_URL = re.compile(r"postgres(?:ql)?://(?:[^:@/?#\s]*(?::[^:@/?#\s]*)?@)?[^@\s]*")
#: A NUL character in JSON: an escape, not the text of one (an even number of backslashes stands before it).
_NUL = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")

_DIALECT = Dialect(
    event_columns={name: f"{name}::text" for name in _TEXT_COLUMNS},
    metric_columns="run_id::text, stage_id, metric_name, score, threshold, evidence::text",
    instant=lambda time: time,
    since=":since::timestamptz",
    run_totals=load_sql("postgres_run_totals.sql"),
    run_ids=load_sql("postgres_run_ids.sql"),
    lock_run="SELECT pg_advisory_xact_lock(hashtextextended(:run, 0))",
)


class PostgresStore(SqlStore):
    """
    Events in the PostgreSQL database at `url`: `postgresql://user:password@host:5432/name`, options as in libpq.

    The tables are made where they are missing; with `read_only` nothing is made or changed.
    """

    writers = _WRITERS

    def __init__(self, url: str, *, read_only: bool = False) -> None:
        try:
            parts = conninfo_to_dict(url) if _URL.fullmatch(url) else None
        except psycopg.Error:
            parts = None
        if parts is None:  # what is wrong with it is not said: it may be the password
            raise ConfigurationError(
                "this is no PostgreSQL URL: it is postgresql://user:password@host:5432/name, and a password's "
                "characters @ : / ? # % and blanks are written as %40 %3A %2F %3F %23 %25 %20"
            )
        self.address = _without_password(parts)
        #: Places that wait for transactions to end, and these; the oldest first.
        self._settling: deque[tuple[int, set[str]]] = deque(maxlen=10_000)
        self._settled = 0
        self._settling_lock = threading.Lock()
        kwargs: dict[str, Any] = {
            "autocommit": True,
            "prepare_threshold": None,
            "connect_timeout": parts.get("connect_timeout", _CONNECT_TIMEOUT_S),
            "application_name": parts.get("application_name", "evalvault-sdk"),
            # A database that vanished without a word is noticed within half a minute.
            "keepalives_idle": 10,
            "keepalives_interval": 5,
            "keepalives_count": 3,
            "tcp_user_timeout": 30_000,
        }
        with self._errors():
            with psycopg.connect(url, **kwargs) as connection:  # says what is wrong; a pool only says "timeout"
                if not read_only:
                    self._prepare(connection)
                self._look_around(connection)
            self._pool = ConnectionPool(
                url,
                kwargs={**kwargs, "options": f"{parts.get('options', '')} {_READ_ONLY}"} if read_only else kwargs,
                min_size=1,
                max_size=_CONNECTIONS,
                timeout=_CONNECT_TIMEOUT_S,
                max_idle=300,
                reconnect_timeout=_RECONNECT_S,
                check=ConnectionPool.check_connection,
                open=True,
                name="evalvault-sdk",
            )

    def prepared(self, event: StageEvent) -> StageEvent | EventRow:
        """Return the row of `event`, if it can be one; see `Store.prepared`."""
        try:
            return _row_of(event, self._run(event.run_id))
        except OverflowError:
            return event  # which `save` refuses

    def save(self, events: Sequence[Incoming]) -> Mapping[int, str]:
        """Store `events` in one transaction; see `Store.save`."""
        refused: dict[int, str] = {}
        rows: dict[tuple[str, str], _Numbered] = {}
        for index, event in enumerate(events):
            row = event if isinstance(event, EventRow) else self.prepared(event)
            if not isinstance(row, EventRow):
                refused[index] = "started_at and finished_at must be in the years 1 to 9999, in UTC"
                continue
            if self._json_type == "jsonb" and _holds_nul(row):
                refused[index] = "attributes and metadata must hold no NUL character: EvalVault's database takes none"
                continue
            # One statement cannot replace a row twice: the last of equals wins, in the place of the first.
            rows.setdefault((row.run_id, row.stage_id), []).append((index, row))
        numbered = list(rows.values())
        with self._errors(), self._pool.connection() as connection:
            if self._runs_are_uuids:
                numbered = self._known_runs_only(connection, numbered, refused)
            self._merge(connection, numbered, refused)
        return refused

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[SqlSnapshot]:
        """Return what is stored now; see `Store.snapshot`."""
        with self._errors(), self._pool.connection() as connection, connection.transaction():
            _begin(connection, _READING)

            def ask(query: str, values: Mapping[str, Any]) -> Iterable[tuple[Any, ...]]:
                return connection.execute(*self._said(query, values))

            def stream(query: str, values: Mapping[str, Any]) -> Iterator[tuple[Any, ...]]:
                # A cursor on the server's side: rows come as they are wanted, not all at once.
                with connection.cursor(f"c{uuid.uuid4().hex}") as cursor:
                    cursor.itersize = _FETCH
                    cursor.execute(*self._said(query, values))
                    yield from cursor

            yield SqlSnapshot(ask, self.dialect, stream=stream)

    def check(self) -> None:
        """Raise `StoreError` unless the database answers; see `Store.check`."""
        with self._errors(), self._pool.connection() as connection:
            connection.execute("SELECT 1 FROM stage_events LIMIT 1").fetchall()

    def close(self) -> None:
        """Close the connections."""
        self._pool.close()

    @contextlib.contextmanager
    def _writing(self) -> Iterator[Writing]:
        with self._errors(), self._pool.connection() as connection, connection.transaction():
            _begin(connection, _WRITING)

            def ask(query: str, values: Mapping[str, Any]) -> Iterable[tuple[Any, ...]]:
                return connection.execute(*self._said(query, values))

            def each(query: str, rows: Iterable[Mapping[str, Any]]) -> None:
                said = [self._said(query, row) for row in rows]
                if said:
                    connection.cursor().executemany(said[0][0], [values for _, values in said])

            yield Writing(ask, each)

    def _settled_place(self) -> int:
        """
        Return the place up to which every event that will ever be is visible from now on.

        Transactions take numbers from one sequence and commit in any order. Whoever takes one holds a lock on
        the table already, and lets go of it after the commit is visible. So a number that was given before
        some instant is settled once all that held such a lock at that instant have ended.
        """
        # One look at a time: what was seen before a number was given must not settle it.
        with self._settling_lock:
            with self._errors(), self._pool.connection() as connection, connection.transaction():
                _begin(connection, _READING)
                # In this order: the number first, then who may have taken one up to it.
                query = "SELECT pg_sequence_last_value(%s::regclass)"
                ((given,),) = connection.execute(query, (self._sequence,)).fetchall()
                writing = {transaction for (transaction,) in connection.execute(_WRITERS_NOW)}
            self._settling.append((given or 0, writing))
            while self._settling and not self._settling[0][1] & writing:
                self._settled = max(self._settled, self._settling.popleft()[0])
            return self._settled

    def _merge(self, connection: _Connection, numbered: Sequence[_Numbered], refused: dict[int, str]) -> None:
        """Store rows; where the database refuses some, halve until it is clear which."""
        if not numbered:
            return
        try:
            self._merge_at_once(connection, [equals[-1][1] for equals in numbered])
        except (psycopg.DataError, psycopg.IntegrityError) as error:
            if len(numbered) > 1:
                middle = len(numbered) // 2
                self._merge(connection, numbered[:middle], refused)
                self._merge(connection, numbered[middle:], refused)
                return
            *others, (index, _) = numbered[0]
            refused[index] = f"the database refuses it: {_reason(error)}"
            self._merge(connection, [others] if others else [], refused)  # another of its id may be better

    def _merge_at_once(self, connection: _Connection, rows: Sequence[tuple[Any, ...]]) -> None:
        for attempt in range(_DEADLOCK_TRIES):
            try:
                with connection.transaction():
                    _begin(connection, _STORING)
                    with connection.cursor().copy(_COPY) as copy:
                        for ordinal, row in enumerate(rows):
                            copy.write_row((ordinal, *row))
                    connection.execute(self._merge_query)
            except (psycopg.errors.DeadlockDetected, psycopg.errors.SerializationFailure):
                if attempt == _DEADLOCK_TRIES - 1:
                    raise
                time.sleep(random.uniform(0, 0.02 * 2**attempt))  # noqa: S311 - no secret
            except psycopg.errors.ReadOnlySqlTransaction:
                connection.close()  # the session stays what it was when it began; a new one may be better
                raise
            else:
                return

    def _known_runs_only(
        self, connection: _Connection, numbered: Sequence[_Numbered], refused: dict[int, str]
    ) -> list[_Numbered]:
        ids = {run_id: _as_uuid(run_id) for run_id in {equals[0][1][0] for equals in numbered}}
        asked = [str(found) for found in ids.values() if found is not None]
        known = {
            found
            for (found,) in connection.execute(
                "SELECT run_id FROM evaluation_runs WHERE run_id = ANY(%s::uuid[])", (asked,)
            )
        }
        kept = []
        for equals in numbered:
            if ids[equals[0][1][0]] in known:
                kept.append(equals)
            else:
                why = "run_id is no run of EvalVault's, and its database takes no others"
                refused.update((index, why) for index, _ in equals)
        return kept

    def _run(self, run_id: str) -> str:
        """Return a run's id as the database has it."""
        return str(_as_uuid(run_id) or run_id) if self._runs_are_uuids else run_id

    def _said(self, query: str, values: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
        """Return a query and its values in psycopg's form."""
        # No text in the database holds a NUL: a question about one finds nothing.
        given = {name: None if isinstance(value, str) and "\x00" in value else value for name, value in values.items()}
        if self._runs_are_uuids and "run_id" in given:
            given["run_id"] = str(_as_uuid(str(given["run_id"])) or _NO_RUN)
        return _PARAMETER.sub(r"%(\1)s", query), given

    def _prepare(self, connection: _Connection) -> None:
        """Make what is missing of the schema; tables that are there are served also where nothing may be made."""
        try:
            self._apply_schema(connection)
        except psycopg.errors.InsufficientPrivilege as error:
            if connection.execute("SELECT to_regclass('stage_events')").fetchone() == (None,):
                raise
            logger.warning(
                "evalvault: %s may not change the schema (%s); without our indexes large runs are read slowly",
                self.address,
                _reason(error),
            )

    @staticmethod
    def _apply_schema(connection: _Connection) -> None:
        with connection.transaction():
            connection.execute(_BEGIN_CHANGING)
            connection.execute("SELECT pg_advisory_xact_lock(%s)", (_SCHEMA_LOCK,))
            if connection.execute("SELECT to_regclass('evalvault_sdk_schema')").fetchone() == (None,):
                connection.execute(
                    "CREATE TABLE evalvault_sdk_schema "
                    "(name TEXT PRIMARY KEY, applied_at TIMESTAMP WITH TIME ZONE NOT NULL DEFAULT now())"
                )
            applied = {name for (name,) in connection.execute("SELECT name FROM evalvault_sdk_schema")}
            for name in _SCHEMA:
                if name not in applied:
                    connection.execute(load_sql(name))
                    connection.execute("INSERT INTO evalvault_sdk_schema (name) VALUES (%s)", (name,))

    def _look_around(self, connection: _Connection) -> None:
        """Find out whose tables these are."""
        types: dict[str, str] = dict(
            connection.execute(
                "SELECT attname, format_type(atttypid, atttypmod) FROM pg_attribute "
                "WHERE attrelid = 'stage_events'::regclass AND attnum > 0 AND NOT attisdropped"
            ).fetchall()
        )
        self._runs_are_uuids = types["run_id"] == "uuid"
        self._json_type = types["attributes"]
        ((counted,),) = connection.execute(_IS_COUNTED).fetchall()
        self.dialect = attrs.evolve(_DIALECT, run_count=_RUN_COUNT) if counted else _DIALECT
        ((self._sequence,),) = connection.execute("SELECT pg_get_serial_sequence('stage_events', 'id')").fetchall()
        self._merge_query = load_sql("postgres_merge.sql").format(
            run_type=types["run_id"], json_type=self._json_type, sequence=self._sequence
        )

    @contextlib.contextmanager
    def _errors(self) -> Iterator[None]:
        """Raise what psycopg raises as `StoreError`."""
        try:
            yield
        except (psycopg.Error, OSError) as error:
            raise StoreError(f"the database {self.address} failed: {_reason(error)}") from error


def _begin(connection: _Connection, words: str) -> None:
    timeouts = f"SET LOCAL statement_timeout = '{_STATEMENT_TIMEOUT_S}s'; SET LOCAL lock_timeout = '{_LOCK_TIMEOUT_S}s'"
    connection.execute(f"{words} {timeouts}")


def _row_of(event: StageEvent, run_id: str) -> EventRow:
    """Return an event's columns, its times in UTC: PostgreSQL knows no offset of a day, Python does."""
    row = row_of(event)
    if run_id != row.run_id:
        row = row._replace(run_id=run_id)
    # At the ends of the calendar: OverflowError.
    if event.started_at is not None and event.started_at.tzinfo is not timezone.utc:
        row = row._replace(started_at=event.started_at.astimezone(timezone.utc).isoformat())
    if event.finished_at is not None and event.finished_at.tzinfo is not timezone.utc:
        row = row._replace(finished_at=event.finished_at.astimezone(timezone.utc).isoformat())
    return row


def _holds_nul(row: EventRow) -> bool:
    texts = (row.input_ref, row.output_ref, row.attributes, row.metadata)
    return any(_NUL.search(text) for text in texts if text)


def _as_uuid(text: str) -> uuid.UUID | None:
    try:
        return uuid.UUID(text)
    except ValueError:
        return None


def _reason(error: BaseException) -> str:
    """Return what is wrong without what was in the row: only the first line says nothing of it."""
    if isinstance(error, psycopg.Error) and error.diag.message_primary:
        return error.diag.message_primary
    return str(error).partition("\n")[0] or type(error).__name__


def _without_password(parts: Mapping[str, Any]) -> str:
    user = f"{parts['user']}@" if parts.get("user") else ""
    port = f":{parts['port']}" if parts.get("port") else ""
    return f"postgresql://{user}{parts.get('host', '')}{port}/{parts.get('dbname', '')}"

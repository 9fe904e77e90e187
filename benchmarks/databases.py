"""
The two databases of `benchmarks.server`, and their own rates with nothing of ours around them.

In:   rows of `stage_events`, made beforehand.
Out:  events per second of each raw way to store them: in the server's own table, with its indexes, and on the disk
      (`synchronous=FULL`, `synchronous_commit=on`) after each transaction.
"""

from __future__ import annotations

import random
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Protocol

import attrs
import orjson
import psycopg

from benchmarks.fleet import recorded
from benchmarks.workload import STAGES_PER_REQUEST
from evalvault_sdk.events import StageEvent
from evalvault_sdk.ids import new_stage_id
from evalvault_sdk.server.store import open_store
from evalvault_sdk.server.store.rows import COLUMNS, row_of
from evalvault_sdk.server.store.sql_snapshot import load_sql
from tests.postgres import Postgres

Row = tuple[Any, ...]
#: The run that has every other event of a filled database, and one of those that have 10,000 each.
LARGE_RUN, SMALL_RUN = "bench-large", "bench-small-0"
_SMALL_RUN_EVENTS = 10_000
_FILL_STEP = 10_000


class Database(Protocol):
    """An empty database of its own."""

    name: str
    #: What `--db` takes.
    address: str

    def raw(self, rows: Sequence[Row], batch: int) -> dict[str, float]:
        """Store a third or more of `rows` in each raw way, `batch` in a transaction; return events per second."""


class SQLite:
    """An SQLite file."""

    name = "SQLite"

    def __init__(self, folder: Path) -> None:
        self.address = str(folder / f"{new_stage_id()}.db")
        open_store(self.address).close()

    def raw(self, rows: Sequence[Row], batch: int) -> dict[str, float]:
        """Store by `executemany`; see `Database.raw`."""
        query = f"INSERT INTO stage_events ({', '.join(COLUMNS)}) VALUES ({', '.join('?' * len(COLUMNS))})"
        connection = sqlite3.connect(self.address, isolation_level=None)
        connection.execute("PRAGMA synchronous=FULL")

        def store(part: Sequence[Row]) -> None:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(query, part)
            connection.execute("COMMIT")

        rate = _rate(store, rows, batch)
        connection.close()
        return {"executemany": rate}


class PostgreSQL:
    """A database of a PostgreSQL server."""

    name = "PostgreSQL"

    def __init__(self, server: Postgres) -> None:
        self.address = server.new_database()
        open_store(self.address).close()

    def raw(self, rows: Sequence[Row], batch: int) -> dict[str, float]:
        """Store by COPY into the table, and by COPY and a merge that replaces; see `Database.raw`."""
        merge = load_sql("postgres_merge.sql").format(run_type="text", json_type="json", sequence="stage_events_id_seq")
        columns = ", ".join(COLUMNS)
        half = len(rows) // 2
        with psycopg.connect(self.address, autocommit=True) as connection:
            connection.execute(load_sql("postgres_staging.sql"))

            def copy(part: Sequence[Row]) -> None:
                with connection.cursor().copy(f"COPY stage_events ({columns}) FROM STDIN") as copying:
                    for row in part:
                        copying.write_row(row)

            def copy_and_merge(part: Sequence[Row]) -> None:
                with connection.transaction():
                    into = f"COPY evalvault_sdk_staging (ordinal, {columns}) FROM STDIN"
                    with connection.cursor().copy(into) as copying:
                        for ordinal, row in enumerate(part):
                            copying.write_row((ordinal, *row))
                    connection.execute(merge)

            return {
                "COPY and merge": _rate(copy_and_merge, rows[:half], batch),
                "COPY": _rate(copy, rows[half:], batch),
            }


def _rate(store: Callable[[Sequence[Row]], None], rows: Sequence[Row], batch: int) -> float:
    started = time.perf_counter()
    for start in range(0, len(rows), batch):
        store(rows[start : start + batch])
    return len(rows) / (time.perf_counter() - started)


def rows(count: int, run_id: str) -> list[Row]:
    """Return the rows of new events."""
    return [tuple(row_of(StageEvent.from_dict(orjson.loads(event)))) for event in recorded(count, run_id)]


def fill(address: str, count: int) -> float:
    """
    Store `count` events without a server: half of them in one run, the others in runs of 10,000.

    Returns events per second of the last tenth, or the last transaction, of what `save` took: how fast it still is.
    """
    store = open_store(address)
    made = _events(count)
    took: list[float] = []
    while step := [event for event, _ in zip(made, range(_FILL_STEP), strict=False)]:
        started = time.perf_counter()
        store.save(step)
        took.append((time.perf_counter() - started) / len(step))
    store.close()
    last = took[-max(1, len(took) // 10) :]
    return len(last) / sum(last)


def _events(count: int) -> Iterator[StageEvent]:
    templates = [StageEvent.from_dict(orjson.loads(event)) for event in recorded(STAGES_PER_REQUEST, "bench")]
    some = random.Random(7)
    for number in range(0, count, STAGES_PER_REQUEST):
        request = number // STAGES_PER_REQUEST
        run_id = LARGE_RUN if request % 2 else f"bench-small-{number // (2 * _SMALL_RUN_EVENTS)}"
        root = new_stage_id()
        for place, template in enumerate(templates[: count - number]):
            yield attrs.evolve(
                template,
                run_id=run_id,
                stage_id=new_stage_id(),
                parent_stage_id=root if place else None,
                trace_id=root.replace("-", ""),
                status="error" if some.random() < 0.01 else "success",
                duration_ms=some.lognormvariate(3, 1),
            )

"""
Change an SQL database beyond storing events: what is the same in SQLite and PostgreSQL.

In:   metrics to keep, runs to delete, what is too old.
Out:  rows that are there or gone. Deleting goes in steps, each a transaction of its own: a run may have a
      million events, and whoever stores meanwhile must not wait for all of them.
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any

import attrs

from evalvault_sdk.server.metrics import StageMetric
from evalvault_sdk.server.store.base import StoredEvent, take_page
from evalvault_sdk.server.store.rows import metric_row_of
from evalvault_sdk.server.store.sql_snapshot import Ask, Dialect, SqlSnapshot

#: Events deleted in one transaction.
_STEP = 5_000
_METRIC_COLUMNS = ("run_id", "stage_id", "metric_name", "score", "threshold", "evidence")


@attrs.frozen
class Writing:
    """One write transaction."""

    ask: Ask
    #: Runs a query once for each of the rows' values.
    each: Callable[[str, Iterable[Mapping[str, Any]]], None]


class SqlStore(abc.ABC):
    """The part of a `Store` that needs nothing but SQL."""

    dialect: Dialect

    @abc.abstractmethod
    def snapshot(self) -> AbstractContextManager[SqlSnapshot]:
        """Return what is stored now; see `Store.snapshot`."""

    @abc.abstractmethod
    def _writing(self) -> AbstractContextManager[Writing]:
        """Return a transaction that is committed where the context ends, or rolled back if it raises."""

    @abc.abstractmethod
    def _settled_place(self) -> int:
        """Return the place up to which all events that there will ever be can be seen by a snapshot from now on."""

    def tail(self, after: int | None, *, run_id: str | None, limit: int) -> tuple[list[StoredEvent], int]:
        """Return the events beyond a place; see `Store.tail`."""
        end = self._settled_place()
        if after is None:
            return [], end
        run = "" if run_id is None else "run_id = :run_id AND"
        with self.snapshot() as view:
            events = view.read_events(
                f"WHERE {run} id > :after AND id <= :end ORDER BY id LIMIT :limit",
                {"after": after, "end": end, "limit": limit, **({} if run_id is None else {"run_id": run_id})},
            )
            page, more = take_page(events, limit)
        return page, page[-1].place if more else max(after, end)

    def save_metrics(self, metrics: Sequence[StageMetric]) -> None:
        """Store metrics; see `Store.save_metrics`."""
        rows = [dict(zip(_METRIC_COLUMNS, metric_row_of(metric), strict=True)) for metric in metrics]
        names = [{name: row[name] for name in _METRIC_COLUMNS[:3]} for row in rows]
        with self._writing() as writing:
            for run in sorted({metric.run_id for metric in metrics}):
                list(writing.ask(self.dialect.lock_run, {"run": run}))
            writing.each(
                "DELETE FROM stage_metrics "
                "WHERE run_id = :run_id AND stage_id = :stage_id AND metric_name = :metric_name",
                names,
            )
            writing.each(
                "INSERT INTO stage_metrics (run_id, stage_id, metric_name, score, threshold, evidence) "
                "VALUES (:run_id, :stage_id, :metric_name, :score, :threshold, :evidence)",
                rows,
            )

    def delete_run(self, run_id: str) -> int:
        """Delete a run; see `Store.delete_run`."""
        deleted = self._delete_up_to(run_id, None)
        with self._writing() as writing:
            writing.each("DELETE FROM stage_metrics WHERE run_id = :run_id", [{"run_id": run_id}])
        return deleted

    def trim_run(self, run_id: str, keep: int) -> int:
        """Delete a run's oldest events; see `Store.trim_run`."""
        with self.snapshot() as view:
            last = list(
                view.ask(
                    "SELECT id FROM stage_events WHERE run_id = :run_id ORDER BY id DESC LIMIT 1 OFFSET :keep",
                    {"run_id": run_id, "keep": keep},
                )
            )
        return self._delete_up_to(run_id, last[0][0]) if last else 0

    def sweep(self, after: int, *, older_than: datetime, limit: int) -> tuple[int | None, int]:
        """Delete what is old among the next events; see `Store.sweep`."""
        ended = self.dialect.instant("COALESCE(finished_at, started_at)")
        with self.snapshot() as view:
            rows = list(
                view.ask(
                    f"SELECT id, run_id, stage_id, {ended} < {self.dialect.since} FROM stage_events "
                    "WHERE id > :after ORDER BY id LIMIT :limit",
                    {"after": after, "limit": limit, "since": older_than.isoformat(timespec="milliseconds")},
                )
            )
        last_old = max((place for place, _, _, old in rows if old), default=0)
        doomed = [row[:3] for row in rows if row[3] or (row[3] is None and row[0] < last_old)]
        for start in range(0, len(doomed), _STEP):
            self._delete(doomed[start : start + _STEP])
        return (rows[-1][0] if len(rows) == limit else None), len(doomed)

    def _delete_up_to(self, run_id: str, last: int | None) -> int:
        deleted = 0
        query = (
            "SELECT id, run_id, stage_id FROM stage_events WHERE run_id = :run_id"
            + ("" if last is None else " AND id <= :last")
            + " ORDER BY id LIMIT :limit"
        )
        values = {"run_id": run_id, "limit": _STEP, **({} if last is None else {"last": last})}
        while True:
            with self.snapshot() as view:
                rows = list(view.ask(query, values))
            if not rows:
                return deleted
            self._delete(rows)
            deleted += len(rows)

    def _delete(self, rows: Sequence[tuple[Any, ...]]) -> None:
        rows = sorted(rows, key=lambda row: (str(row[1]), row[2]))  # as they are locked when they are stored
        with self._writing() as writing:
            writing.each("DELETE FROM stage_events WHERE id = :id", [{"id": row[0]} for row in rows])
            if list(writing.ask("SELECT 1 FROM stage_metrics LIMIT 1", {})):
                writing.each(
                    "DELETE FROM stage_metrics WHERE run_id = :run_id AND stage_id = :stage_id",
                    [{"run_id": row[1], "stage_id": row[2]} for row in rows],
                )

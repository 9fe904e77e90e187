"""
Ask an SQL database about runs: what is the same in SQLite and PostgreSQL.

In:   a function that runs a query with named values (`:name`), and the words in which the two differ.
Out:  the answers of `Snapshot`.
Rows come one by one: a run may have a million events.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from datetime import timezone
from importlib import resources
from typing import Any

import attrs

from evalvault_sdk.server.metrics import Measured, StageMetric
from evalvault_sdk.server.store.base import (
    EVERYTHING,
    PERCENTILES,
    EventFilter,
    RunEntry,
    RunTotals,
    StageTypeTotals,
    StoredEvent,
    percentile_place,
)
from evalvault_sdk.server.store.rows import COLUMNS, MEASURED_COLUMNS, event_of, measured_of, metric_of, readable_time

#: Runs a query with its values, and returns its rows.
Ask = Callable[[str, Mapping[str, Any]], Iterable[tuple[Any, ...]]]


def load_sql(name: str) -> str:
    """Return one of the package's SQL files."""
    return (resources.files("evalvault_sdk.server.store") / "sql" / name).read_text(encoding="utf-8")


_STAGE_TYPE_TOTALS = load_sql("stage_type_totals.sql")
_DURATIONS_AT = load_sql("durations_at.sql")


@attrs.frozen(kw_only=True)
class Dialect:
    """In what the databases differ."""

    #: The columns of an event (those that differ from their names) and of a metric, all as texts and numbers.
    event_columns: Mapping[str, str]
    metric_columns: str
    #: An expression for the instant of a time column, and of the value `:since`.
    instant: Callable[[str], str]
    since: str
    #: The condition that an event is of the type `:stage_type`.
    stage_type: str = "stage_type = :stage_type"
    run_totals: str
    #: Yields how many events a run has.
    run_count: str = "SELECT COUNT(*) FROM stage_events WHERE run_id = :run_id"
    #: Yields each run's id and last place.
    run_ids: str
    #: Keeps others from replacing the metrics of `:run` until the transaction ends.
    lock_run: str


class SqlSnapshot:
    """What one read transaction sees; see `Snapshot`."""

    def __init__(self, ask: Ask, dialect: Dialect, *, stream: Ask) -> None:
        """Ask by `ask` what has few rows, by `stream` what may have a million."""
        self.ask = ask
        self._dialect = dialect
        self._stream = stream

    def events(
        self, run_id: str, which: EventFilter = EVERYTHING, *, after: int = 0, limit: int | None = None
    ) -> Iterator[StoredEvent]:
        """Yield a run's events; see `Snapshot.events`."""
        where, values = self._where(run_id, which)
        bound = "" if limit is None else "LIMIT :limit"
        yield from self.read_events(
            f"WHERE {where} AND id > :after ORDER BY id {bound}", {**values, "after": after, "limit": limit}
        )

    def read_events(self, tail: str, values: Mapping[str, Any]) -> Iterator[StoredEvent]:
        """Yield the events that the end of a query names."""
        query = f"SELECT id, {self._columns(COLUMNS)} FROM stage_events {tail}"
        for place, *row in self._stream(query, values):
            size = sum(len(value) for value in row if isinstance(value, str))
            yield StoredEvent(place, event_of(row), size)

    def measured(self, run_id: str, *, stage_id: str | None = None) -> Iterator[Measured]:
        """Yield what metrics are computed from; see `Snapshot.measured`."""
        where, values = self._where(run_id, EventFilter(stage_id=stage_id))
        columns = self._columns(MEASURED_COLUMNS)
        yield from map(
            measured_of, self._stream(f"SELECT {columns} FROM stage_events WHERE {where} ORDER BY id", values)
        )

    def count(self, run_id: str, which: EventFilter = EVERYTHING) -> int:
        """Count a run's events; see `Snapshot.count`."""
        where, values = self._where(run_id, which)
        everything = which == EVERYTHING
        query = self._dialect.run_count if everything else f"SELECT COUNT(*) FROM stage_events WHERE {where}"
        ((found,),) = self.ask(query, values)
        return int(found)

    def stage_type_totals(self, run_id: str, *, percentiles: bool = True) -> list[StageTypeTotals]:
        """Return the totals of each stage type; see `Snapshot.stage_type_totals`."""
        found = []
        for stage_type, events, errors, mean_ms, timed in list(self.ask(_STAGE_TYPE_TOTALS, {"run_id": run_id})):
            places = {name: percentile_place(share, timed) for name, share in PERCENTILES.items()}
            at: dict[int, float] = {}
            if percentiles and timed:
                query = _DURATIONS_AT.format(stage_type=self._dialect.stage_type)
                at = dict(self.ask(query, {"run_id": run_id, "stage_type": stage_type, **places}))
            found.append(
                StageTypeTotals(
                    stage_type=stage_type,
                    events=events,
                    errors=errors,
                    mean_ms=mean_ms,
                    **{f"{name}_ms": at.get(place) for name, place in places.items()},
                )
            )
        return found

    def run_totals(self, run_id: str) -> RunTotals:
        """Return the totals of a run; see `Snapshot.run_totals`."""
        (row,) = self.ask(self._dialect.run_totals, {"run_id": run_id})
        events, errors, traces, started_at, finished_at, slowest_trace_id = row
        return RunTotals(
            events=events,
            errors=errors,
            traces=traces,
            started_at=readable_time(started_at),
            finished_at=readable_time(finished_at),
            slowest_trace_id=slowest_trace_id,
        )

    def runs(self, *, prefixes: Collection[str], before: int | None, limit: int) -> list[RunEntry]:
        """Return runs, the newest first; see `Snapshot.runs`."""
        starts = tuple(prefixes)
        found = []
        for run_id, last_place in self._stream(self._dialect.run_ids, {}):
            if str(run_id).startswith(starts) and (before is None or last_place < before):
                found.append((str(run_id), last_place))
                if len(found) == limit:
                    break
        return [self._run_entry(run_id, last_place) for run_id, last_place in found]

    def _run_entry(self, run_id: str, last_place: int) -> RunEntry:
        first = next(self.events(run_id, limit=1), None)
        last = next(self.events(run_id, after=last_place - 1, limit=1), None)
        return RunEntry(
            run_id=run_id,
            last_place=last_place,
            events=self.count(run_id),
            errors=self.count(run_id, EventFilter(status="error")),
            first_event_at=(first.event.started_at or first.event.finished_at) if first else None,
            last_event_at=(last.event.finished_at or last.event.started_at) if last else None,
        )

    def traces(self, run_id: str, *, status: str | None, before: int | None, limit: int) -> list[tuple[int, str]]:
        """Return a run's traces, the newest first; see `Snapshot.traces`."""
        # Backwards through the run; a trace is met first at its last event, and skipped at all others.
        query = (
            "SELECT id, trace_id FROM stage_events AS here WHERE run_id = :run_id AND trace_id <> ''"
            + (" AND id < :before" if before is not None else "")
            + " AND NOT EXISTS (SELECT 1 FROM stage_events AS later WHERE later.run_id = :run_id"
            " AND later.trace_id = here.trace_id AND later.id > here.id)"
            + (
                " AND EXISTS (SELECT 1 FROM stage_events AS such WHERE such.run_id = :run_id"
                " AND such.trace_id = here.trace_id AND such.status = :status)"
                if status is not None
                else ""
            )
            + " ORDER BY id DESC LIMIT :limit"
        )
        values = {"run_id": run_id, "before": before, "status": status, "limit": limit}
        return [(place, trace_id) for place, trace_id in self.ask(query, values)]

    def metrics(
        self, run_id: str, *, stage_id: str | None = None, metric_name: str | None = None
    ) -> Iterator[StageMetric]:
        """Yield stored metrics; see `Snapshot.metrics`."""
        given = {"run_id": run_id, "stage_id": stage_id, "metric_name": metric_name}
        values = {name: value for name, value in given.items() if value is not None}
        where = " AND ".join(f"{name} = :{name}" for name in values)
        query = f"SELECT {self._dialect.metric_columns} FROM stage_metrics WHERE {where} ORDER BY id"
        yield from map(metric_of, self._stream(query, values))

    def _columns(self, names: Iterable[str]) -> str:
        return ", ".join(self._dialect.event_columns.get(name, name) for name in names)

    def _where(self, run_id: str, which: EventFilter) -> tuple[str, dict[str, Any]]:
        values = {"run_id": run_id}
        for name in ("stage_type", "status", "trace_id", "stage_id"):
            if (value := getattr(which, name)) is not None:
                values[name] = value
        own = {"stage_type": self._dialect.stage_type}
        conditions = [own.get(name, f"{name} = :{name}") for name in values]
        if which.since is not None:
            try:
                since = which.since.astimezone(timezone.utc)
            except OverflowError:  # at the ends of the calendar there is no UTC, and no event
                since = which.since.replace(tzinfo=timezone.utc)
            values["since"] = since.isoformat(timespec="milliseconds")
            conditions.append(f"{self._dialect.instant('COALESCE(started_at, finished_at)')} >= {self._dialect.since}")
        return " AND ".join(conditions), values

"""
Keep events in memory: the twin of the databases, for tests and for trying things out.

In:   batches from any thread.
Out:  the same answers as from a database, worked out in Python. Gone when the process ends.
"""

from __future__ import annotations

import contextlib
import math
import threading
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime, timezone

from evalvault_sdk.events import StageEvent
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

_MetricKey = tuple[str, str, str]


class MemorySnapshot:
    """Events and metrics as they were when it was made; see `Snapshot`."""

    def __init__(self, events: Mapping[str, Sequence[StoredEvent]], metrics: Sequence[StageMetric]) -> None:
        self._runs = events
        self._metrics = metrics

    def events(
        self, run_id: str, which: EventFilter = EVERYTHING, *, after: int = 0, limit: int | None = None
    ) -> Iterator[StoredEvent]:
        """Yield a run's events; see `Snapshot.events`."""
        found = 0
        for stored in self._runs.get(run_id, ()):
            if stored.place > after and _is_meant(stored.event, which):
                if found == limit:
                    return
                found += 1
                yield stored

    def measured(self, run_id: str, *, stage_id: str | None = None) -> Iterator[Measured]:
        """Yield what metrics are computed from; see `Snapshot.measured`."""
        for _, event, _ in self.events(run_id, EventFilter(stage_id=stage_id)):
            yield event

    def count(self, run_id: str, which: EventFilter = EVERYTHING) -> int:
        """Count a run's events; see `Snapshot.count`."""
        return sum(1 for _ in self.events(run_id, which))

    def stage_type_totals(self, run_id: str, *, percentiles: bool = True) -> list[StageTypeTotals]:
        """Return the totals of each stage type; see `Snapshot.stage_type_totals`."""
        by_type: dict[str, list[StageEvent]] = {}
        for _, event, _ in self.events(run_id):
            by_type.setdefault(event.stage_type, []).append(event)
        return [_totals_of(stage_type, events, percentiles) for stage_type, events in by_type.items()]

    def run_totals(self, run_id: str) -> RunTotals:
        """Return the totals of a run; see `Snapshot.run_totals`."""
        events = [event for _, event, _ in self.events(run_id)]
        traced = [event for event in events if event.trace_id]
        slowest = max(traced, key=lambda e: -1.0 if e.duration_ms is None else e.duration_ms, default=None)
        return RunTotals(
            events=len(events),
            errors=sum(event.status == "error" for event in events),
            traces=len({event.trace_id for event in traced}),
            started_at=min((e.started_at for e in events if e.started_at), default=None),
            finished_at=max((e.finished_at for e in events if e.finished_at), default=None),
            slowest_trace_id=slowest.trace_id if slowest else None,
        )

    def runs(self, *, prefixes: Collection[str], before: int | None, limit: int) -> list[RunEntry]:
        """Return runs, the newest first; see `Snapshot.runs`."""
        found = [
            _entry_of(run_id, stored)
            for run_id, stored in self._runs.items()
            if stored and run_id.startswith(tuple(prefixes)) and (before is None or stored[-1].place < before)
        ]
        return sorted(found, key=lambda entry: -entry.last_place)[:limit]

    def traces(self, run_id: str, *, status: str | None, before: int | None, limit: int) -> list[tuple[int, str]]:
        """Return a run's traces, the newest first; see `Snapshot.traces`."""
        last: dict[str, int] = {}
        such = set()
        for place, event, _ in self.events(run_id):
            if event.trace_id:
                last[event.trace_id] = place
                if status in (None, event.status):
                    such.add(event.trace_id)
        found = [
            (place, trace) for trace, place in last.items() if trace in such and (before is None or place < before)
        ]
        return sorted(found, reverse=True)[:limit]

    def metrics(
        self, run_id: str, *, stage_id: str | None = None, metric_name: str | None = None
    ) -> Iterator[StageMetric]:
        """Yield stored metrics; see `Snapshot.metrics`."""
        for metric in self._metrics:
            if (
                metric.run_id == run_id
                and stage_id in (None, metric.stage_id)
                and metric_name in (None, metric.metric_name)
            ):
                yield metric


class MemoryStore:
    """Events in this process."""

    address = "memory:"
    writers = 1

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._events: dict[tuple[str, str], StoredEvent] = {}
        self._metrics: dict[_MetricKey, StageMetric] = {}
        self._last_place = 0

    def prepared(self, event: StageEvent) -> StageEvent:
        """Return `event`, which is kept as it is; see `Store.prepared`."""
        return event

    def save(self, events: Sequence[StageEvent]) -> Mapping[int, str]:
        """Keep `events`; see `Store.save`."""
        with self._lock:
            for event in events:
                key = (event.run_id, event.stage_id)
                known = self._events.get(key)
                if known is None:
                    self._last_place += 1
                self._events[key] = StoredEvent(known.place if known else self._last_place, event)
        return {}

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[MemorySnapshot]:
        """Return what is kept now; see `Store.snapshot`."""
        runs: dict[str, list[StoredEvent]] = {}
        with self._lock:
            for stored in self._events.values():
                runs.setdefault(stored.event.run_id, []).append(stored)
            metrics = list(self._metrics.values())
        yield MemorySnapshot(runs, metrics)

    def tail(self, after: int | None, *, run_id: str | None, limit: int) -> tuple[list[StoredEvent], int]:
        """Return the events beyond a place; see `Store.tail`."""
        with self._lock:
            if after is None:
                return [], self._last_place
            found = [
                stored
                for stored in self._events.values()
                if stored.place > after and run_id in (None, stored.event.run_id)
            ]
            page = found[:limit]
            return page, page[-1].place if len(page) == limit else max(after, self._last_place)

    def save_metrics(self, metrics: Sequence[StageMetric]) -> None:
        """Keep `metrics`; see `Store.save_metrics`."""
        with self._lock:
            for metric in metrics:
                key = (metric.run_id, metric.stage_id, metric.metric_name)
                self._metrics.pop(key, None)
                self._metrics[key] = metric

    def delete_run(self, run_id: str) -> int:
        """Forget a run; see `Store.delete_run`."""
        with self._lock:
            for key in [key for key in self._metrics if key[0] == run_id]:
                del self._metrics[key]
            return self._forget([key for key in self._events if key[0] == run_id])

    def trim_run(self, run_id: str, keep: int) -> int:
        """Forget a run's oldest events; see `Store.trim_run`."""
        with self._lock:
            of_run = [key for key in self._events if key[0] == run_id]
            return self._forget(of_run[: max(len(of_run) - keep, 0)])

    def sweep(self, after: int, *, older_than: datetime, limit: int) -> tuple[int | None, int]:
        """Forget what is old; see `Store.sweep`."""
        with self._lock:
            page = [stored for stored in self._events.values() if stored.place > after][:limit]
            ended = {stored.place: stored.event.finished_at or stored.event.started_at for stored in page}
            last_old = max((place for place, time in ended.items() if time and time < older_than), default=0)
            deleted = self._forget(
                [
                    (event.run_id, event.stage_id)
                    for place, event, _ in page
                    if ((time := ended[place]) and time < older_than) or (time is None and place < last_old)
                ]
            )
            return (page[-1].place if len(page) == limit else None), deleted

    def _forget(self, keys: Sequence[tuple[str, str]]) -> int:
        for key in keys:
            del self._events[key]
        gone = set(keys)
        for metric_key in [key for key in self._metrics if key[:2] in gone]:
            del self._metrics[metric_key]
        return len(keys)

    def check(self) -> None:
        """Memory can always be reached."""

    def close(self) -> None:
        """Keep what is there: nobody else can."""


def _is_meant(event: StageEvent, which: EventFilter) -> bool:
    moment = event.started_at or event.finished_at
    return (
        which.stage_type in (None, event.stage_type)
        and which.status in (None, event.status)
        and which.trace_id in (None, event.trace_id)
        and which.stage_id in (None, event.stage_id)
        and (which.since is None or (moment is not None and _milliseconds(moment) >= _milliseconds(which.since)))
    )


def _milliseconds(moment: datetime) -> datetime:
    return moment.astimezone(timezone.utc).replace(microsecond=moment.microsecond // 1000 * 1000)


def _totals_of(stage_type: str, events: Sequence[StageEvent], percentiles: bool) -> StageTypeTotals:
    timed = sorted(event.duration_ms for event in events if event.duration_ms is not None)
    shown = percentiles and bool(timed)
    return StageTypeTotals(
        stage_type=stage_type,
        events=len(events),
        errors=sum(event.status == "error" for event in events),
        mean_ms=math.fsum(timed) / len(timed) if timed else None,
        **{
            f"{name}_ms": timed[percentile_place(share, len(timed)) - 1] if shown else None
            for name, share in PERCENTILES.items()
        },
    )


def _entry_of(run_id: str, stored: Sequence[StoredEvent]) -> RunEntry:
    first, last = stored[0].event, stored[-1].event
    return RunEntry(
        run_id=run_id,
        last_place=stored[-1].place,
        events=len(stored),
        errors=sum(entry.event.status == "error" for entry in stored),
        first_event_at=first.started_at or first.finished_at,
        last_event_at=last.finished_at or last.started_at,
    )

"""
Answer questions about runs: joins the store to summary, metrics and report.

In:   a run's id and what is asked of it, from the routes or the command line.
Out:  JSON objects of the contract.
Blocking: the routes call it in a thread. Memory is bounded: events pass one by one, lists come in pages.
A cursor is text that the next page is asked for with; None: that was the last.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from datetime import datetime
from typing import Any

from evalvault_sdk.errors import RunNotFoundError
from evalvault_sdk.server import report, summary
from evalvault_sdk.server.criteria import Criteria
from evalvault_sdk.server.metrics import Measured, StageMetric
from evalvault_sdk.server.store.base import EVERYTHING, EventFilter, Snapshot, Store, StoredEvent, take_page

#: Events read, or metrics stored, at a time where a run is gone through in pages.
_PAGE = 1_000
#: Stages of one trace that are listed; of a larger one the totals are those of the first so many.
_MAX_TRACE_STAGES = 10_000


class RunReader:
    """Everything that is asked of the runs in one store."""

    def __init__(self, store: Store, criteria: Criteria | None = None) -> None:
        self._store = store
        self._criteria = criteria or Criteria()

    def runs(self, *, prefixes: Collection[str] = ("",), cursor: int | None, limit: int) -> dict[str, Any]:
        """Return `{"runs", "returned", "next_cursor"}`: the run that was stored to last first."""
        with self._store.snapshot() as view:
            found = view.runs(prefixes=prefixes, before=cursor, limit=limit)
        runs = [
            {
                "run_id": entry.run_id,
                "total_events": entry.events,
                "error_count": entry.errors,
                "first_event_at": _iso(entry.first_event_at),
                "last_event_at": _iso(entry.last_event_at),
            }
            for entry in found
        ]
        return {
            "runs": runs,
            "returned": len(runs),
            "next_cursor": str(found[-1].last_place) if len(found) == limit else None,
        }

    def events(
        self, run_id: str, which: EventFilter = EVERYTHING, *, cursor: int | None = None, limit: int
    ) -> dict[str, Any]:
        """
        Return `{"run_id", "events", "total", "returned", "next_cursor"}`. Raises `RunNotFoundError`.

        `total` counts all that the filter lets pass; only on the first page, None on those after it. A page of
        large events has fewer than `limit`.
        """
        with self._store.snapshot() as view:
            total = view.count(run_id, which) if cursor is None else None
            if not total:
                _check_run(view, run_id)
            found, more = take_page(view.events(run_id, which, after=cursor or 0, limit=limit), limit)
        return {
            "run_id": run_id,
            "events": [stored.event.to_dict() for stored in found],
            "total": total,
            "returned": len(found),
            "next_cursor": str(found[-1].place) if more else None,
        }

    def traces(self, run_id: str, *, status: str | None, cursor: int | None, limit: int) -> dict[str, Any]:
        """
        Return `{"run_id", "traces", "returned", "next_cursor"}`: the trace that was stored to last first.

        Raises `RunNotFoundError`.
        """
        with self._store.snapshot() as view:
            _check_run(view, run_id)
            found = view.traces(run_id, status=status, before=cursor, limit=limit)
            traces = [
                _trace(trace_id, view.events(run_id, EventFilter(trace_id=trace_id), limit=_MAX_TRACE_STAGES + 1))
                for _, trace_id in found
            ]
        return {
            "run_id": run_id,
            "traces": traces,
            "returned": len(traces),
            "next_cursor": str(found[-1][0]) if len(found) == limit else None,
        }

    def metrics(
        self, run_id: str, *, stage_id: str | None, metric_name: str | None, limit: int, stored: bool = False
    ) -> dict[str, Any]:
        """
        Return `{"run_id", "metrics", "total", "returned"}`, computed now or as they were `stored`.

        Raises `RunNotFoundError`.
        """
        listed, total = [], 0
        with self._store.snapshot() as view:
            _check_run(view, run_id)
            metrics = (
                view.metrics(run_id, stage_id=stage_id, metric_name=metric_name)
                if stored
                else self._metrics(view.measured(run_id, stage_id=stage_id))
            )
            for metric in metrics:
                if metric_name in (None, metric.metric_name):
                    total += 1
                    if total <= limit:
                        listed.append(metric.to_dict())
        return {"run_id": run_id, "metrics": listed, "total": total, "returned": len(listed)}

    def store_metrics(self, run_id: str) -> dict[str, Any]:
        """
        Compute a run's metrics and store them in `stage_metrics`, for EvalVault's tools.

        Returns `{"run_id", "stored"}`. Raises `RunNotFoundError`.
        """
        total = 0
        for page in self.pages(run_id):
            metrics = list(self._metrics(stored.event for stored in page))
            self._store.save_metrics(metrics)
            total += len(metrics)
        return {"run_id": run_id, "stored": total}

    def summary(self, run_id: str, *, detail: bool = False) -> dict[str, Any]:
        """Return the summary; with `detail` also `stage_types`. Raises `RunNotFoundError`."""
        with self._store.snapshot() as view:
            totals = view.stage_type_totals(run_id, percentiles=detail)
        if not totals:
            raise RunNotFoundError(run_id)
        result = summary.summarize(run_id, totals)
        if detail:
            result["stage_types"] = summary.stage_types(totals)
        return result

    def debug(self, run_id: str, *, limit: int) -> dict[str, Any]:
        """Return the debug report, listing at most `limit` metrics. Raises `RunNotFoundError`."""
        with self._store.snapshot() as view:
            totals = view.stage_type_totals(run_id)
            if not totals:
                raise RunNotFoundError(run_id)
            return report.debug_report(
                summary.run_summary(run_id, view.run_totals(run_id)),
                summary.summarize(run_id, totals),
                self._metrics(view.measured(run_id)),
                max_metrics=limit,
                stage_types=summary.stage_types(totals),
            )

    def pages(self, run_id: str, which: EventFilter = EVERYTHING) -> Iterator[list[StoredEvent]]:
        """
        Yield a run's events page by page, each read on its own: whoever is slow to take them holds up nobody.

        Raises `RunNotFoundError` with the first.
        """
        after = 0
        while True:
            with self._store.snapshot() as view:
                page, more = take_page(view.events(run_id, which, after=after, limit=_PAGE), _PAGE)
                if after == 0 and not page:
                    _check_run(view, run_id)
            if page:
                yield page
            if not more:
                return
            after = page[-1].place

    def _metrics(self, events: Iterable[Measured]) -> Iterator[StageMetric]:
        for event in events:
            yield from self._criteria.metrics_of(event)


def _check_run(view: Snapshot, run_id: str) -> None:
    if next(iter(view.events(run_id, limit=1)), None) is None:
        raise RunNotFoundError(run_id)


def _trace(trace_id: str, events: Iterable[StoredEvent]) -> dict[str, Any]:
    """Return a trace by its events, of which each is forgotten as soon as it was looked at."""
    stages: list[dict[str, Any]] = []
    started_at: datetime | None = None
    finished_at: datetime | None = None
    complete = True
    for stored in events:
        event = stored.event
        if len(stages) == _MAX_TRACE_STAGES:
            complete = False
            break
        started_at = min(filter(None, (started_at, event.started_at)), default=None)
        finished_at = max(filter(None, (finished_at, event.finished_at)), default=None)
        stages.append(
            {
                "stage_id": event.stage_id,
                "parent_stage_id": event.parent_stage_id,
                "stage_type": event.stage_type,
                "stage_name": event.stage_name,
                "status": event.status,
                "started_at": _iso(event.started_at),
                "duration_ms": event.duration_ms,
            }
        )
    ids = {stage["stage_id"] for stage in stages}
    roots = [stage for stage in stages if stage["parent_stage_id"] not in ids]
    root = roots[0] if len(roots) == 1 else None
    duration_ms = root["duration_ms"] if root else None
    if duration_ms is None and started_at and finished_at:
        duration_ms = (finished_at - started_at).total_seconds() * 1000
    errors = sum(stage["status"] == "error" for stage in stages)
    return {
        "trace_id": trace_id,
        "name": (root["stage_name"] or root["stage_type"]) if root else None,
        "status": "error" if errors else root["status"] if root else "success",
        "started_at": _iso(started_at),
        "finished_at": _iso(finished_at),
        "duration_ms": duration_ms,
        "stage_count": len(stages),
        "error_count": errors,
        "complete": complete,
        "stages": stages,
    }


def _iso(moment: datetime | None) -> str | None:
    return moment.isoformat() if moment else None

"""
Answer questions about a run: joins the store to summary, metrics and report.

In:   a run's id and what is asked of it, from the routes or the command line.
Out:  JSON objects of the contract.
Blocking: the routes call it in a thread. Memory is bounded: events pass one by one.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from typing import Any

from evalvault_sdk.errors import RunNotFoundError
from evalvault_sdk.server import report, summary
from evalvault_sdk.server.metrics import DEFAULT_THRESHOLDS, StageMetric, metrics_of
from evalvault_sdk.server.store.base import EventFilter, Store, StoredEvent


class RunReader:
    """Everything that is asked of the runs in one store."""

    def __init__(
        self,
        store: Store,
        *,
        thresholds: Mapping[str, float] = DEFAULT_THRESHOLDS,
        relevance: Mapping[str, Collection[str]] | None = None,
    ) -> None:
        self._store = store
        self._thresholds = thresholds
        self._relevance = relevance

    def events(self, run_id: str, *, stage_type: str | None, trace_id: str | None, limit: int) -> dict[str, Any]:
        """Return `{"run_id", "events", "total", "returned"}`. Raises `RunNotFoundError`."""
        which = EventFilter(stage_type=stage_type, trace_id=trace_id)
        with self._store.snapshot() as view:
            total = view.count(run_id, which)
            if not total and not view.count(run_id):
                raise RunNotFoundError(run_id)
            events = [stored.event.to_dict() for stored in view.events(run_id, which, limit=limit)]
        return {"run_id": run_id, "events": events, "total": total, "returned": len(events)}

    def metrics(self, run_id: str, *, stage_id: str | None, metric_name: str | None, limit: int) -> dict[str, Any]:
        """Return `{"run_id", "metrics", "total", "returned"}`. Raises `RunNotFoundError`."""
        listed, total = [], 0
        with self._store.snapshot() as view:
            if not view.count(run_id):
                raise RunNotFoundError(run_id)
            for metric in self._metrics(view.events(run_id, EventFilter(stage_id=stage_id))):
                if metric_name in (None, metric.metric_name):
                    total += 1
                    if total <= limit:
                        listed.append(metric.to_dict())
        return {"run_id": run_id, "metrics": listed, "total": total, "returned": len(listed)}

    def summary(self, run_id: str, *, detail: bool = False) -> dict[str, Any]:
        """Return the summary; with `detail` also `stage_types`. Raises `RunNotFoundError`."""
        with self._store.snapshot() as view:
            totals = view.stage_type_totals(run_id)
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
                self._metrics(view.events(run_id)),
                max_metrics=limit,
            )

    def _metrics(self, events: Iterable[StoredEvent]) -> Iterator[StageMetric]:
        for stored in events:
            yield from metrics_of(stored.event, thresholds=self._thresholds, relevance=self._relevance)

"""
Keep events through EvalVault's own storage adapter, where that package is installed.

In:   batches, handed to its `StageStoragePort`.
Out:  the events that the port lists, and what can be worked out from them.

For a storage of EvalVault's that is neither an SQLite file nor a PostgreSQL database: those two are opened
directly, by their own address, which is faster and knows pages. The port lists a run whole, has no list of
runs and deletes nothing; what it cannot do raises `UnsupportedError`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, Protocol

from evalvault_sdk.errors import MissingDependencyError, StoreError, UnsupportedError
from evalvault_sdk.events import StageEvent
from evalvault_sdk.server.metrics import Measured, StageMetric
from evalvault_sdk.server.store.base import EVERYTHING, EventFilter, RunEntry, RunTotals, StageTypeTotals, StoredEvent
from evalvault_sdk.server.store.memory import MemorySnapshot
from evalvault_sdk.server.store.rows import COLUMNS, lenient_event

try:
    from evalvault.domain.entities import stage as their
except ImportError as missing:
    raise MissingDependencyError(
        f"EvalVault's own storage needs the package {missing.name!r}: pip install evalvault (Python 3.12 or newer)"
    ) from missing


class StageStoragePort(Protocol):
    """What is asked of EvalVault (`evalvault.ports.outbound.stage_storage_port`)."""

    def save_stage_events(self, events: list[Any]) -> int:
        """Store events."""

    def list_stage_events(self, run_id: str, *, stage_type: str | None = None) -> list[Any]:
        """List a run's events."""

    def save_stage_metrics(self, metrics: list[Any]) -> int:
        """Store metrics."""

    def list_stage_metrics(
        self, run_id: str, *, stage_id: str | None = None, metric_name: str | None = None
    ) -> list[Any]:
        """List a run's metrics."""


class EvalVaultStore:
    """Events behind a `StageStoragePort`; by default the one that EvalVault's settings choose."""

    address = "evalvault:"
    writers = 1

    def __init__(self, port: StageStoragePort | None = None) -> None:
        with _store_errors():
            self._port = port or _configured_storage()

    def prepared(self, event: StageEvent) -> StageEvent:
        """Return `event`, which the port takes as it is; see `Store.prepared`."""
        return event

    def save(self, events: Sequence[StageEvent]) -> Mapping[int, str]:
        """Hand `events` over; see `Store.save`."""
        with _store_errors():
            theirs = [their.StageEvent.from_dict(event.to_dict()) for event in events]
        refused: dict[int, str] = {}
        self._save(list(enumerate(theirs)), refused)
        return refused

    def _save(self, numbered: Sequence[tuple[int, Any]], refused: dict[int, str]) -> None:
        try:
            with _store_errors():
                self._port.save_stage_events([event for _, event in numbered])
        except StoreError as error:
            # On its PostgreSQL a run must be one of EvalVault's: find out whose event it is.
            if not _is_refusal(error.__cause__):
                raise
            if len(numbered) == 1:
                refused[numbered[0][0]] = "EvalVault's storage refuses it: is its run_id a run of EvalVault's?"
                return
            middle = len(numbered) // 2
            self._save(numbered[:middle], refused)
            self._save(numbered[middle:], refused)

    @contextlib.contextmanager
    def snapshot(self) -> Iterator[EvalVaultSnapshot]:
        """Return what the port lists when it is asked; see `Store.snapshot`."""
        yield EvalVaultSnapshot(self._port)

    def tail(self, after: int | None, *, run_id: str | None, limit: int) -> tuple[list[StoredEvent], int]:
        """Return a run's events beyond a place; see `Store.tail`."""
        if run_id is None:
            _unsupported("a live stream of all runs (ask for one run)")
        with self.snapshot() as view:
            events = list(view.events(run_id))
        if after is None:
            return [], len(events)
        page = events[after : after + limit]
        return page, after + len(page)

    def save_metrics(self, metrics: Sequence[StageMetric]) -> None:
        """Store metrics that are not stored yet: the port replaces none."""
        with self.snapshot() as view:
            known = {
                (known.stage_id, known.metric_name)
                for run_id in {metric.run_id for metric in metrics}
                for known in view.metrics(run_id)
            }
        new = [metric for metric in metrics if (metric.stage_id, metric.metric_name) not in known]
        with _store_errors():
            self._port.save_stage_metrics([their.StageMetric.from_dict(metric.to_dict()) for metric in new])

    def delete_run(self, run_id: str) -> int:
        """Raise `UnsupportedError`."""
        _unsupported("deleting a run")

    def trim_run(self, run_id: str, keep: int) -> int:
        """Raise `UnsupportedError`."""
        _unsupported("retention")

    def sweep(self, after: int, *, older_than: datetime, limit: int) -> tuple[int | None, int]:
        """Raise `UnsupportedError`."""
        _unsupported("retention")

    def check(self) -> None:
        """Raise `StoreError` unless the port answers; see `Store.check`."""
        with _store_errors():
            self._port.list_stage_metrics("evalvault-sdk-check", metric_name="none")

    def close(self) -> None:
        """Leave the port to whoever made it: it opens a connection for each call."""


class EvalVaultSnapshot:
    """What the port lists; see `Snapshot`. A run's events are listed once, however much is asked of them."""

    def __init__(self, port: StageStoragePort) -> None:
        self._port = port
        self._listed: dict[str, MemorySnapshot] = {}

    def _run(self, run_id: str) -> MemorySnapshot:
        if run_id not in self._listed:
            with _store_errors():
                listed = self._port.list_stage_events(run_id)
            events = [_event_of(event.to_dict()) for event in listed]
            stored = [StoredEvent(place, event) for place, event in enumerate(events, start=1)]
            self._listed[run_id] = MemorySnapshot({run_id: stored}, [])
        return self._listed[run_id]

    def events(
        self, run_id: str, which: EventFilter = EVERYTHING, *, after: int = 0, limit: int | None = None
    ) -> Iterator[StoredEvent]:
        """Yield a run's events; see `Snapshot.events`."""
        return self._run(run_id).events(run_id, which, after=after, limit=limit)

    def measured(self, run_id: str, *, stage_id: str | None = None) -> Iterator[Measured]:
        """Yield what metrics are computed from; see `Snapshot.measured`."""
        return self._run(run_id).measured(run_id, stage_id=stage_id)

    def count(self, run_id: str, which: EventFilter = EVERYTHING) -> int:
        """Count a run's events; see `Snapshot.count`."""
        return self._run(run_id).count(run_id, which)

    def stage_type_totals(self, run_id: str, *, percentiles: bool = True) -> list[StageTypeTotals]:
        """Return the totals of each stage type; see `Snapshot.stage_type_totals`."""
        return self._run(run_id).stage_type_totals(run_id, percentiles=percentiles)

    def run_totals(self, run_id: str) -> RunTotals:
        """Return the totals of a run; see `Snapshot.run_totals`."""
        return self._run(run_id).run_totals(run_id)

    def runs(self, *, prefixes: Collection[str], before: int | None, limit: int) -> list[RunEntry]:
        """Raise `UnsupportedError`."""
        _unsupported("a list of runs")

    def traces(self, run_id: str, *, status: str | None, before: int | None, limit: int) -> list[tuple[int, str]]:
        """Return a run's traces; see `Snapshot.traces`."""
        return self._run(run_id).traces(run_id, status=status, before=before, limit=limit)

    def metrics(
        self, run_id: str, *, stage_id: str | None = None, metric_name: str | None = None
    ) -> Iterator[StageMetric]:
        """Yield stored metrics; see `Snapshot.metrics`."""
        with _store_errors():
            listed = self._port.list_stage_metrics(run_id, stage_id=stage_id, metric_name=metric_name)
        for metric in listed:
            yield StageMetric(
                metric.run_id, metric.stage_id, metric.metric_name, metric.score, metric.threshold, metric.evidence
            )


def _event_of(theirs: dict[str, Any]) -> StageEvent:
    trace = theirs.get("trace") or {}
    fields = {name: theirs.get(name) for name in COLUMNS}
    return lenient_event({**fields, "trace_id": trace.get("trace_id"), "span_id": trace.get("span_id")})


def _configured_storage() -> Any:
    from evalvault.adapters.outbound.storage.factory import build_storage_adapter

    return build_storage_adapter(fallback_to_sqlite=False)


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    """Raise whatever a storage of EvalVault's raises as `StoreError`."""
    try:
        yield
    except (StoreError, UnsupportedError):
        raise
    except Exception as error:
        raise StoreError(f"EvalVault's storage failed: {type(error).__name__}") from error


def _is_refusal(error: BaseException | None) -> bool:
    """Whether a database refused what it was given (PEP 249's names), rather than failed."""
    return any(kind.__name__ in ("IntegrityError", "DataError") for kind in type(error).__mro__)


def _unsupported(what: str) -> NoReturn:
    raise UnsupportedError(f"EvalVault's storage has no way for {what}: open its database by its own address instead")

"""
What the server asks of a store.

In:   valid events, in batches, from the server's worker threads.
Out:  events in the order in which they were first stored, and totals that the database computes, so that
      a summary of a million events costs no million objects.
Every method may be called from any thread. All raise `StoreError` when the database fails.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Protocol

import attrs

from evalvault_sdk.events import StageEvent


@attrs.frozen(kw_only=True)
class StageTypeTotals:
    """What one stage type amounts to in one run. Times are milliseconds; None where no stage was timed."""

    stage_type: str
    events: int
    errors: int
    mean_ms: float | None
    p50_ms: float | None
    p95_ms: float | None
    p99_ms: float | None


@attrs.frozen(kw_only=True)
class RunTotals:
    """What one run amounts to."""

    events: int
    errors: int
    traces: int
    #: The first start and the last finish of any stage.
    started_at: datetime | None
    finished_at: datetime | None
    #: The trace with the stage that took longest.
    slowest_trace_id: str | None


class Snapshot(Protocol):
    """What a store held at one instant: everything asked of it fits together."""

    def events(
        self,
        run_id: str,
        *,
        stage_type: str | None = None,
        trace_id: str | None = None,
        stage_id: str | None = None,
        limit: int | None = None,
    ) -> Iterator[StageEvent]:
        """Yield a run's events, those of one type, trace or stage if given, in the order first stored."""

    def count(self, run_id: str, *, stage_type: str | None = None, trace_id: str | None = None) -> int:
        """Return how many events `events` would yield without a limit."""

    def stage_type_totals(self, run_id: str) -> list[StageTypeTotals]:
        """Return the totals of each stage type, in the order in which the types first appeared."""

    def run_totals(self, run_id: str) -> RunTotals:
        """Return the totals of a run; all zero for one without events."""


class Store(Protocol):
    """Where events are kept."""

    #: Where that is, for people.
    address: str

    def save(self, events: Sequence[StageEvent]) -> None:
        """Store all `events`, each replacing what has its run and stage id. When it returns, they are durable."""

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        """Return what is stored now, to be read as long as the context lasts."""

    def close(self) -> None:
        """Finish what was begun and let go of files and connections."""

"""
What the server asks of a store.

In:   valid events, in batches, from the server's worker threads.
Out:  events in the order in which they were first stored, and totals that the database computes, so that
      a summary of a million events costs no million objects.
Every method may be called from any thread. All raise `StoreError` when the database fails, and
`UnsupportedError` for what this kind of store cannot do.

A *place* is a number that an event gets when it is first stored, and keeps: higher than that of every event
stored before. Pages and live streams go on from one.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from datetime import datetime
from typing import Any, NamedTuple, Protocol, TypeAlias

import attrs

from evalvault_sdk.events import StageEvent
from evalvault_sdk.server.metrics import Measured, StageMetric


class StoredEvent(NamedTuple):
    """An event, and its place."""

    place: int
    event: StageEvent
    #: Characters of its JSON, roughly: what bounds a page. 0 where the store does not know.
    size: int = 0


@attrs.frozen(kw_only=True)
class EventFilter:
    """Which events of a run are meant: those to which all that is given applies."""

    stage_type: str | None = None
    status: str | None = None
    trace_id: str | None = None
    stage_id: str | None = None
    #: Started (or, where that is not known, finished) at this instant or later; to the millisecond.
    since: datetime | None = None


@attrs.frozen(kw_only=True)
class StageTypeTotals:
    """What one stage type amounts to in one run. Times in milliseconds; None where none was timed or asked for."""

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


@attrs.frozen(kw_only=True)
class RunEntry:
    """One run in a list of them."""

    run_id: str
    #: The place of the event that was stored last.
    last_place: int
    events: int
    errors: int
    #: When the event that was stored first started, and when the one that was stored last finished.
    first_event_at: datetime | None
    last_event_at: datetime | None


#: The filter that lets everything pass.
EVERYTHING = EventFilter()
#: Characters of events that are read into one page: one event may have a million.
PAGE_SIZE = 4 << 20


#: The percentiles of totals, by their names.
PERCENTILES = {"p50": 0.50, "p95": 0.95, "p99": 0.99}


def percentile_place(share: float, count: int) -> int:
    """Return the place, from 1, of the smallest of `count` values that `share` of them do not exceed (nearest rank)."""
    return math.ceil(share * count)


def take_page(events: Iterator[StoredEvent], limit: int) -> tuple[list[StoredEvent], bool]:
    """Return the next events, at most `limit` and about `PAGE_SIZE` of them, and whether there may be more."""
    page: list[StoredEvent] = []
    size = 0
    for stored in events:
        page.append(stored)
        size += stored.size
        if len(page) == limit or size >= PAGE_SIZE:
            return page, True
    return page, False


class Snapshot(Protocol):
    """What a store held at one instant: everything asked of it fits together."""

    def events(
        self, run_id: str, which: EventFilter = EVERYTHING, *, after: int = 0, limit: int | None = None
    ) -> Iterator[StoredEvent]:
        """Yield a run's events whose place is beyond `after`, in the order first stored."""

    def measured(self, run_id: str, *, stage_id: str | None = None) -> Iterator[Measured]:
        """Yield what metrics are computed from, of a run's events or one of them, in the order first stored."""

    def count(self, run_id: str, which: EventFilter = EVERYTHING) -> int:
        """Return how many events `events` would yield without a limit."""

    def stage_type_totals(self, run_id: str, *, percentiles: bool = True) -> list[StageTypeTotals]:
        """
        Return the totals of each stage type, in the order in which the types first appeared.

        Without `percentiles` these are None: all durations need not be sorted then.
        """

    def run_totals(self, run_id: str) -> RunTotals:
        """Return the totals of a run; all zero for one without events."""

    def runs(self, *, prefixes: Collection[str], before: int | None, limit: int) -> list[RunEntry]:
        """
        Return runs whose id begins with one of `prefixes`, the one stored to last first.

        Only runs whose last event has a place before `before`, if that is given.
        """

    def traces(self, run_id: str, *, status: str | None, before: int | None, limit: int) -> list[tuple[int, str]]:
        """
        Return the last place and the id of a run's traces, the one stored to last first.

        With `status` only traces with such a stage; only those with a last place before `before`, if given.
        """

    def metrics(
        self, run_id: str, *, stage_id: str | None = None, metric_name: str | None = None
    ) -> Iterator[StageMetric]:
        """Yield the metrics that are stored for a run, in the order in which they were stored."""


#: An event on its way into a store: a `StageEvent`, or what the store has made of it; with its ids in either case.
Incoming: TypeAlias = Any


class Store(Protocol):
    """Where events are kept."""

    #: Where that is, for people: without password.
    address: str
    #: How many threads may usefully `save` at once.
    writers: int

    def prepared(self, event: StageEvent) -> Incoming:
        """
        Return `event` as `save` takes it with least work: what needs no database is done by the caller.

        Few threads save, and what they can do is what a server can take in.
        """

    def save(self, events: Sequence[Incoming]) -> Mapping[int, str]:
        """
        Store `events`, prepared or not, each replacing what has its run and stage id. When it returns, all is durable.

        Returns, by index, why single events were refused, if the database itself has rules that they break;
        all others are stored. When it raises, not all are: storing them again is right, and does no harm.
        """

    def snapshot(self) -> AbstractContextManager[Snapshot]:
        """Return what is stored now, to be read as long as the context lasts."""

    def tail(self, after: int | None, *, run_id: str | None, limit: int) -> tuple[list[StoredEvent], int]:
        """
        Return the next events (of a run, or all) beyond a place, and the place to go on from.

        No event is ever skipped: one whose transaction is still open is waited for, with all after it. With
        `after` None: no events, and the place where everything that is stored ends.
        """

    def save_metrics(self, metrics: Sequence[StageMetric]) -> None:
        """Store `metrics`, each replacing what has its run, stage and name."""

    def delete_run(self, run_id: str) -> int:
        """Delete a run's events and metrics, in steps that let writers in between; return how many events."""

    def trim_run(self, run_id: str, keep: int) -> int:
        """Delete a run's oldest events beyond the `keep` newest; return how many."""

    def sweep(self, after: int, *, older_than: datetime, limit: int) -> tuple[int | None, int]:
        """
        Look at `limit` events beyond a place, and delete those that ended before `older_than`.

        Returns the place to go on from (None: that was all) and how many were deleted. An event without any
        time goes with its neighbours: if one with a later place goes.
        """

    def check(self) -> None:
        """Raise `StoreError` unless the database can be reached."""

    def close(self) -> None:
        """Finish what was begun and let go of files and connections."""

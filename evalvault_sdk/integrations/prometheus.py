"""
Show a tracer's account to Prometheus, as the extra `[prometheus]`.

In:   tracers.
Out:  a collector for a registry of `prometheus_client`, which asks `stats()` whenever it is scraped::

    from prometheus_client import REGISTRY

    REGISTRY.register(StatsCollector(tracer))

Counters `evalvault_sdk_events_..._total`: `recorded`, `delivered`, `rejected`, `dropped` (by `reason`; each is there
from the start, so that an alert can wait for its first increase), `sampled_out`, and of ended processes' events
`recovered` and `recovered_lost`; beside them `evalvault_sdk_fields_truncated_total` and
`evalvault_sdk_hook_errors_total`. Gauges `evalvault_sdk_events_...`: `queued`, `in_flight`, `spooled`. They balance
as `Stats` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeVar, get_args

from evalvault_sdk.delivery.account import DropReason
from evalvault_sdk.errors import MissingDependencyError
from evalvault_sdk.tracer import StageTracer

try:
    from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
    from prometheus_client.registry import Collector
except ImportError as error:
    raise MissingDependencyError.for_extra("the collector for Prometheus", "prometheus", error) from error

_PREFIX = "evalvault_sdk_events_"
_COUNTERS = {
    "recorded": "Events handed to the SDK.",
    "delivered": "Events that the server has stored.",
    "rejected": "Events that the server refused for what they are.",
}
#: What is counted besides the account, with the names that these have here.
_NOTES = {
    "sampled_out": (_PREFIX + "sampled_out", "Stages of traces that were not drawn, and so not recorded."),
    "truncated": ("evalvault_sdk_fields_truncated", "Fields of events that were cut to the limits."),
    "hook_errors": (
        "evalvault_sdk_hook_errors",
        "Functions of the program, or payload stores, that raised; what a framework told and could not be read.",
    ),
}
_GAUGES = {
    "queued": "Events in memory that wait to be sent.",
    "in_flight": "Events that are being sent.",
    "spooled": "Events on disk that wait to be sent.",
}
#: Of all tracers that share a worker together.
_SHARED_COUNTERS = {
    "recovered": "Events of ended processes that were found on disk and delivered.",
    "recovered_lost": "Events of ended processes that were found on disk and could not be delivered.",
}


class StatsCollector(Collector):
    """
    The accounts of tracers, for a registry. Tracers with the same labels are added up.

    The label `destination` says where events go. With `by_run` there is a label `run_id` as well: only for runs that
    are few and long, since each makes series of its own. A registry takes one such collector, for all tracers.
    """

    def __init__(self, *tracers: StageTracer, by_run: bool = False) -> None:
        self._tracers = tracers
        self._by_run = by_run
        self._labels = ("destination", "run_id") if by_run else ("destination",)

    def collect(self) -> Iterator[Metric]:
        """Return the account at this instant."""
        accounts = [(tracer, tracer.stats()) for tracer in self._tracers]
        mine = [(self._values(tracer), stats) for tracer, stats in accounts]
        for name, text in _COUNTERS.items():
            yield _filled(
                CounterMetricFamily(_PREFIX + name, text, labels=self._labels),
                ((values, getattr(stats, name)) for values, stats in mine),
            )
        yield _filled(
            CounterMetricFamily(_PREFIX + "dropped", "Events lost, by reason.", labels=(*self._labels, "reason")),
            (
                ((*values, reason), stats.dropped.get(reason, 0))
                for values, stats in mine
                for reason in get_args(DropReason)
            ),
        )
        for note, (name, text) in _NOTES.items():
            yield _filled(
                CounterMetricFamily(name, text, labels=self._labels),
                ((values, getattr(stats, note)) for values, stats in mine),
            )
        for name, text in _GAUGES.items():
            yield _filled(
                GaugeMetricFamily(_PREFIX + name, text, labels=self._labels),
                ((values, getattr(stats, name)) for values, stats in mine),
            )
        shared = {id(tracer._outbox.worker): ((tracer.destination,), stats) for tracer, stats in accounts}
        for name, text in _SHARED_COUNTERS.items():
            yield _filled(
                CounterMetricFamily(_PREFIX + name, text, labels=("destination",)),
                ((values, getattr(stats, name)) for values, stats in shared.values()),
            )

    def _values(self, tracer: StageTracer) -> tuple[str, ...]:
        return (tracer.destination, tracer.run_id) if self._by_run else (tracer.destination,)


_Family = TypeVar("_Family", CounterMetricFamily, GaugeMetricFamily)


def _filled(family: _Family, counts: Iterable[tuple[tuple[str, ...], int]]) -> _Family:
    """Return the family with a series for each tuple of label values: a registry takes none twice."""
    sums: dict[tuple[str, ...], int] = {}
    for values, count in counts:
        sums[values] = sums.get(values, 0) + count
    for values, count in sums.items():
        family.add_metric(values, count)
    return family

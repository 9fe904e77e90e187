"""
What each option of capture costs per stage, next to the defaults, in one run.

    make bench

One RAG request of five stages (`benchmarks.workload`) is recorded again and again, with a transport that throws
away: what is measured is the caller's side alone. Rounds are interleaved; a figure is the median of its rounds.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
from collections.abc import Callable, Iterator
from time import perf_counter_ns
from typing import Any

from benchmarks.workload import STAGE_TYPES, STAGES_PER_REQUEST, attributes_of
from evalvault_sdk import StageTracer, current_stage
from evalvault_sdk.delivery.batch import Batch
from evalvault_sdk.delivery.transport.base import Delivered, Outcome

Request = Callable[[], None]


class Nowhere:
    """Takes everything."""

    destination = "nowhere"

    def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
        """Say that it is stored."""
        return Delivered()

    def close(self) -> None:
        """Do nothing."""

    def after_fork_in_child(self) -> None:
        """Do nothing."""


ROOT, *_INNER = attributes_of(1)
ATTRIBUTES = tuple(zip(STAGE_TYPES, _INNER, strict=True))
_QUERY: str = ROOT["query"]
_DOC_IDS: list[str] = _INNER[1]["doc_ids"]


def tracer(**settings: Any) -> StageTracer:
    """Return a tracer that delivers to nowhere."""
    return StageTracer("bench", transport=Nowhere(), max_queue_events=10**6, **settings)


def with_blocks(of: StageTracer) -> Request:
    """Return a request in with-blocks."""

    def request() -> None:
        with of.stage("request") as root:
            root.set(**ROOT)
            for stage_type, attributes in ATTRIBUTES:
                with of.stage(stage_type) as stage:
                    stage.set(**attributes)

    return request


def in_a_trace(of: StageTracer) -> Request:
    """Return a request inside `tracer.trace()`."""
    inner = with_blocks(of)

    def request() -> None:
        with of.trace(session_id="s-88121", user_id="u-1029"):
            inner()

    return request


def decorated(of: StageTracer, **options: Any) -> Request:
    """Return a request in decorated functions."""

    def part(stage_type: str, attributes: dict[str, Any]) -> Callable[[str, int], list[str]]:
        @of.stage(stage_type, **options)
        def function(query: str, top_k: int) -> list[str]:
            current_stage().set(**attributes)
            return _DOC_IDS

        return function

    parts = [part(*one) for one in ATTRIBUTES]

    @of.stage("request", **options)
    def request(query: str, top_k: int) -> None:
        current_stage().set(**ROOT)
        for function in parts:
            function(_QUERY, 10)

    return lambda: request(_QUERY, 10)


def recorded(of: StageTracer) -> Request:
    """Return a request by `record_stage`."""

    def request() -> None:
        parent = of.record_stage("request", attributes=ROOT, duration_ms=1.0)
        for stage_type, attributes in ATTRIBUTES:
            of.record_stage(stage_type, parent_stage_id=parent, attributes=attributes, duration_ms=1.0)

    return request


def streams(of: StageTracer | None) -> Request:
    """Return a request that is one stream of a thousand items for each stage; plain without a tracer."""

    def stream() -> Iterator[int]:
        yield from range(1000)

    run = of.stage("output")(stream) if of is not None else stream

    def request() -> None:
        for _ in range(STAGES_PER_REQUEST):
            for _item in run():
                pass

    return request


def variants() -> dict[str, Request]:
    """Return a request for each option."""
    folder = tempfile.mkdtemp()
    return {
        "with-blocks, all defaults": with_blocks(tracer()),
        "switched off": with_blocks(tracer(enabled=False)),
        "in tracer.trace()": in_a_trace(tracer()),
        "decorators": decorated(tracer()),
        "decorators, capture_args": decorated(tracer(), capture_args=True),
        "decorators, capture_result": decorated(tracer(), capture_result=True),
        "record_stage": recorded(tracer()),
        "scrub_secrets=False": with_blocks(tracer(scrub_secrets=False)),
        'personal_data="all"': with_blocks(tracer(personal_data="all")),
        'content="none"': with_blocks(tracer(content="none")),
        "mask": with_blocks(tracer(mask=lambda content: content)),
        "sample_rate=0.1": with_blocks(tracer(sample_rate=0.1)),
        "sample_rate=0.1, no errors kept": with_blocks(tracer(sample_rate=0.1, sample_keep_errors=False)),
        'durability="journal"': with_blocks(tracer(durability="journal", spool_dir=folder)),
    }


def measure(requests: dict[str, Request], rounds: int, count: int) -> dict[str, float]:
    """Return the median over the rounds of the median request, in microseconds per stage."""
    results: dict[str, list[float]] = {name: [] for name in requests}
    for _ in range(rounds):
        for name, request in requests.items():
            took = []
            for _ in range(count):
                started = perf_counter_ns()
                request()
                took.append(perf_counter_ns() - started)
            results[name].append(statistics.median(took) / 1000 / STAGES_PER_REQUEST)
    return {name: statistics.median(values) for name, values in results.items()}


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[1])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--requests", type=int, default=500)
    options = parser.parse_args()
    costs = measure(variants(), options.rounds, options.requests)
    base = next(iter(costs.values()))
    print(f"µs per stage on the caller's side: median of {options.rounds} rounds of {options.requests} requests")
    for name, cost in costs.items():
        print(f"  {name:34} {cost:7.2f}  {cost / base:5.2f} times the first")
    items = measure({"stream": streams(tracer()), "plain": streams(None)}, options.rounds, 20)
    print(f"  a stream adds {items['stream'] - items['plain']:.2f} ns per item")  # µs per thousand items


if __name__ == "__main__":
    main()

"""
What recording costs, counted, or against what it cannot do without, so that it says the same on every machine.

Counted are calls (of Python and C functions) and lines of Python that the caller's thread does for one stage, and the
bytes that one waiting event holds. `COUNTED` is what Python 3.11 counts, which is the most of all versions by a little;
`MARGIN` leaves room. A failure tells what is counted now: if that is meant, write it there; if it is much less, too.
What is compiled cannot be counted so: there the times say more.
"""

from __future__ import annotations

import gc
import sys
import time
import tracemalloc
from collections import deque
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from types import FrameType
from typing import Any

import opentelemetry.trace  # noqa: F401 - where it is loaded, each stage asks it for its span
import orjson
import pytest

from evalvault_sdk import StageTracer, current_stage
from tests.support import MemoryTransport, is_compiled

#: For one stage with attributes: calls, lines.
COUNTED = {
    "with block": (59, 211),
    "child in a with block": (56, 201),
    "decorated function": (75, 240),
    "record_stage": (84, 281),
    "switched off": (6, 10),
}
#: Bytes of memory for one event that waits in the queue: of 430 bytes of JSON, of 540.
COUNTED_QUEUED_BYTES = {"with block": 545, "record_stage": 590}
MARGIN = 1.2
#: How many times what it cannot do without a stage takes, as it is and compiled (seen: 4.6, 2.2), with room.
MOST_TIMES = 3.5 if is_compiled() else 7.0
ATTRIBUTES: dict[str, Any] = {
    "doc_ids": [f"doc-{number}" for number in range(10)],
    "scores": [0.91, 0.88, 0.83, 0.79, 0.71, 0.64, 0.55, 0.48, 0.41, 0.33],
    "query": "사망보험금은 언제 나오나요?",
}


def calls_of(work: Callable[[], object]) -> int:
    """Count the calls that `work` makes in this thread, itself included."""
    count = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal count
        count += event in ("call", "c_call")

    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        work()
    finally:
        sys.setprofile(before)
    return count


def lines_of(work: Callable[[], object]) -> int:
    """Count the lines that `work` runs through in this thread."""
    count = 0

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        nonlocal count
        count += event == "line"
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return count


def typical(count: Callable[[Callable[[], object]], int], work: Callable[[], object]) -> int:
    """Return the least of many counts: one in many wakes the worker, or does the first time's work."""
    return min(count(work) for _ in range(10))


@pytest.fixture
def tracer() -> Iterator[StageTracer]:
    made = StageTracer("cost", transport=MemoryTransport(), durability="memory", flush_interval_s=60)
    yield made
    made.shutdown(5)


def works(tracer: StageTracer, off: StageTracer) -> dict[str, Callable[[], object]]:
    def block() -> None:
        with tracer.stage("retrieval") as stage:
            stage.set(**ATTRIBUTES)

    @tracer.stage("retrieval")
    def function() -> None:
        current_stage().set(**ATTRIBUTES)

    def record() -> None:
        tracer.record_stage("retrieval", attributes=ATTRIBUTES, duration_ms=1.0)

    def nothing() -> None:
        with off.stage("retrieval") as stage:
            stage.set(**ATTRIBUTES)

    return {
        "with block": block,
        "child in a with block": block,
        "decorated function": function,
        "record_stage": record,
        "switched off": nothing,
    }


@pytest.mark.parametrize("way", COUNTED)
def test_recording_a_stage_does_no_more_than_it_did(tracer: StageTracer, way: str) -> None:
    with StageTracer("cost", enabled=False) as off:
        work = works(tracer, off)[way]
        if way.startswith("child"):
            with tracer.stage("request"):
                counted = typical(calls_of, work), typical(lines_of, work)
        else:
            counted = typical(calls_of, work), typical(lines_of, work)
    limits = tuple(int(count * MARGIN) for count in COUNTED[way])
    assert counted[0] <= limits[0], f"now {counted} calls and lines: more calls than {limits}"
    assert counted[1] <= limits[1], f"now {counted} calls and lines: more lines than {limits}"


@pytest.mark.parametrize("way", COUNTED_QUEUED_BYTES)
def test_a_waiting_event_holds_no_more_memory_than_it_did(tracer: StageTracer, way: str) -> None:
    events = 300  # too few to be sent at once
    work = works(tracer, tracer)[way]
    for _ in range(50):
        work()
    assert tracer.flush(10).complete  # what the worker's thread begins with counts, too
    gc.collect()
    tracemalloc.start()
    try:
        for _ in range(events):
            work()
        gc.collect()
        held = tracemalloc.get_traced_memory()[0] / events
    finally:
        tracemalloc.stop()
    assert tracer.stats().queued == events
    assert held <= COUNTED_QUEUED_BYTES[way] * MARGIN, f"now {held:.0f} bytes"


def test_a_stage_takes_a_few_times_what_it_cannot_do_without(tracer: StageTracer) -> None:
    """Two clocks, a context variable, JSON, a queue: that much Python itself takes for it."""
    scope: ContextVar[object] = ContextVar("scope")
    waiting: deque[object] = deque()
    account = tracer._recorder.setup.put_draft.__self__.account  # type: ignore[union-attr]

    def least() -> None:
        before = scope.set(object())
        began, began_perf = time.time_ns(), time.perf_counter_ns()
        attributes = dict(**ATTRIBUTES)
        content = orjson.dumps({"stage_type": "retrieval", "status": "success", "attributes": attributes})[1:]
        waiting.append((began, time.perf_counter_ns() - began_perf, content))
        scope.reset(before)

    def stage() -> None:
        with tracer.stage("retrieval") as stage:
            stage.set(**ATTRIBUTES)

    def took_ns(work: Callable[[], None]) -> int:
        began = time.thread_time_ns()
        for _ in range(100):
            work()
        took = time.thread_time_ns() - began
        waiting.clear()
        account.waiting.clear()
        account.waiting_bytes = 0
        return took

    rounds = [(took_ns(stage), took_ns(least)) for _ in range(200)]
    ours, theirs = map(min, zip(*rounds, strict=True))
    assert ours <= MOST_TIMES * theirs, f"now {ours / theirs:.1f} times"


def test_one_more_call_and_one_more_line_are_counted() -> None:
    def less() -> None:
        len("")

    def more() -> None:
        len("")
        len("")

    assert calls_of(more) == calls_of(less) + 1
    assert lines_of(more) == lines_of(less) + 1

from __future__ import annotations

import contextvars
import gc
import math
import os
import subprocess
import sys
import threading
import tracemalloc
import uuid
import weakref
from collections.abc import Callable
from typing import Any

import orjson
import pytest

from evalvault_sdk import StageTracer
from evalvault_sdk.capture import sample
from evalvault_sdk.capture.encode import Encoder
from evalvault_sdk.capture.plain import Limits
from evalvault_sdk.capture.recorder import Recorder
from evalvault_sdk.capture.sample import Sampling
from evalvault_sdk.capture.stages import Stages
from evalvault_sdk.testing import CapturingTransport, FakeClock
from tests.support import ListSink, balances, clean_environment

IDS = [f"{number:032x}" for number in range(0, 1 << 56, (1 << 56) // 2000)] + [f"request-{n}" for n in range(2000)]


def sampled(rate: float = 0.0, sink: ListSink | None = None, **options: Any) -> tuple[Stages, ListSink]:
    sink = sink or ListSink()
    return Stages(Recorder("r", sink, sampling=Sampling(rate=rate, **options))), sink


def types(sink: ListSink) -> list[str]:
    return [event["stage_type"] for event in sink.events]


def kept(sink: ListSink) -> set[str | None]:
    return {event["metadata"].get("sample_kept") for event in sink.events}


def failing(stages: Stages, stage_type: str = "fails", **options: Any) -> None:
    with pytest.raises(ValueError, match="no"), stages.stage(stage_type, **options):
        raise ValueError("no")


def test_every_process_draws_the_same_traces() -> None:
    script = (
        "import sys; from evalvault_sdk.capture.sample import Sampling; s = Sampling(rate=0.3);"
        "print(''.join('01'[s.draws(line.strip())] for line in sys.stdin))"
    )
    here = "".join("01"[Sampling(rate=0.3, keep_errors=False).draws(trace_id)] for trace_id in IDS)
    for seed in "12":
        done = subprocess.run(
            [sys.executable, "-c", script],
            input="\n".join(IDS),
            env={**clean_environment(), "PYTHONHASHSEED": seed},
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert done.stdout.strip() == here, done.stderr


def test_a_higher_rate_draws_all_that_a_lower_one_does() -> None:
    drawn: set[str] = set()
    for rate in (0.0, 1e-9, 0.01, 0.1, 0.5, 0.9, 0.999, 1.0):
        now = {trace_id for trace_id in IDS if Sampling(rate=rate).draws(trace_id)}
        assert drawn <= now
        drawn = now
    assert len(drawn) == len(IDS)
    assert not any(Sampling(rate=0).draws(trace_id) for trace_id in IDS)


@pytest.mark.parametrize("make", [lambda number: uuid.uuid4().hex, "request-{}".format, "한국어 {}".format])
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_drawn_part_is_the_rate(rate: float, make: Callable[[int], str]) -> None:
    total = 20_000
    drawn = sum(Sampling(rate=rate).draws(make(number)) for number in range(total))
    assert abs(drawn - total * rate) < 6 * math.sqrt(total * rate * (1 - rate))


def test_the_ids_that_stages_make_are_random_enough() -> None:
    stages, sink = sampled(0.5, keep_errors=False)
    for _ in range(2000):
        with stages.stage("x"):
            pass
    assert abs(len(sink.put_events) - 1000) < 150
    assert len(sink.put_events) + sink.notes["sampled_out"] == 2000


def test_a_trace_is_recorded_as_a_whole_or_not_at_all() -> None:
    stages, sink = sampled(0.5)
    for _ in range(200):
        with stages.stage("root"), stages.stage("child"):
            stages.record_stage("ready")
    counts: dict[str, int] = {}
    for event in sink.events:
        counts[event["trace_id"]] = counts.get(event["trace_id"], 0) + 1
        assert event["metadata"] == {"sample_rate": 0.5}
    assert set(counts.values()) == {3}
    assert len(sink.put_events) + sink.notes["sampled_out"] == 600


def test_a_failure_keeps_what_was_before_and_what_comes_after() -> None:
    stages, sink = sampled()
    other, others_sink = sampled(0.0)
    with stages.stage("root", metadata={"m": 1}):
        with stages.stage("before"):
            pass
        with other.stage("other's"):
            pass
        assert sink.put_events == []
        failing(stages)
        assert types(sink) == ["before", "fails"]
        with stages.stage("after"):
            stages.record_stage("ready")
    assert types(sink) == ["before", "fails", "ready", "after", "root"]
    assert types(others_sink) == ["other's"]
    assert kept(sink) == kept(others_sink) == {"error"}
    assert sink.events[-1]["metadata"] == {"m": 1, "sample_rate": 0.0, "sample_kept": "error"}
    assert sink.notes == others_sink.notes == {}
    with stages.stage("next trace"):
        pass
    assert sink.notes == {"sampled_out": 1}


def failed_by_hand(stages: Stages) -> None:
    with stages.stage("fails") as stage:
        stage.fail("no")


@pytest.mark.parametrize("fail", [failing, failed_by_hand, lambda stages: stages.record_stage("fails", status="error")])
def test_every_way_to_fail_keeps_a_trace(fail: Callable[[Stages], None]) -> None:
    stages, sink = sampled()
    with stages.stage("root"):
        with stages.stage("before"):
            pass
        fail(stages)
    assert (types(sink), kept(sink)) == (["before", "fails", "root"], {"error"})


@pytest.mark.parametrize("where", ["stage", "root", "trace", "recorded"])
def test_what_is_slow_keeps_its_trace(where: str) -> None:
    for slow in (True, False):
        stages, sink = sampled(keep_slow_ms=100)
        with FakeClock() as clock, stages.trace():
            with stages.stage("root"):
                with stages.stage("child"):
                    clock.advance(0.15 if slow and where == "stage" else 0.04)
                clock.advance(0.15 if slow and where == "root" else 0.04)
            if where == "recorded":
                stages.record_stage("ready", duration_ms=100.0 if slow else 99.9)
            elif where == "trace" and slow:
                clock.advance(0.04)
        count = 3 if where == "recorded" else 2
        assert (len(sink.put_events), kept(sink)) == ((count, {"slow"}) if slow else (0, set()))
        assert sink.notes == ({} if slow else {"sampled_out": count})


def test_nothing_is_kept_when_that_is_not_wanted() -> None:
    stages, sink = sampled(keep_errors=False)
    with stages.stage("root"):
        failing(stages)
    assert (sink.put_events, sink.notes) == ([], {"sampled_out": 2})


@pytest.mark.parametrize("fails", [True, False])
def test_what_a_trace_may_hold_is_bounded_and_the_rest_is_counted(fails: bool) -> None:
    for stages_in_it, text in ((600, ""), (300, "x" * 100_000)):
        stages, sink = sampled()
        with stages.stage("root"):
            for _ in range(stages_in_it):
                stages.record_stage("child", attributes={"text": text})
            if fails:
                failing(stages)
        put, out = len(sink.put_events), sink.notes["sampled_out"]
        assert put + out == stages_in_it + 1 + fails
        assert put <= 502 if fails else put == 0
        assert sum(map(len, sink.put_events)) < 3 << 20


def test_a_tracer_counts_every_stage_once() -> None:
    transport = CapturingTransport()
    with StageTracer("r", transport=transport, sample_rate=0.3, sample_keep_slow_ms=10_000) as tracer:
        for number in range(300):
            with tracer.stage("root"):
                tracer.record_stage("child", duration_ms=20_000 if number % 50 == 7 else 1)
                if number % 50 == 9:
                    failing(tracer)
        stats = tracer.shutdown()
    assert stats.recorded + stats.sampled_out == 606
    assert balances(stats)
    assert len(transport.events) == stats.recorded
    assert {event.metadata["sample_rate"] for event in transport.events} == {0.3}


@pytest.mark.parametrize(("rate", "count"), [(0.0, 0), (1.0, 10)])
def test_none_and_all_are_rates_too(rate: float, count: int) -> None:
    transport = CapturingTransport()
    with StageTracer("r", transport=transport, sample_rate=rate) as tracer:
        for _ in range(10):
            tracer.record_stage("x")
    assert (len(transport.events), tracer.stats().sampled_out) == (count, 10 - count)


def test_ready_made_events_are_drawn_by_their_trace() -> None:
    stages, sink = sampled(0.4)
    stages.record_batch({"stage_type": "x", "trace_id": trace_id, "attributes": {"id": trace_id}} for trace_id in IDS)
    drawn = [trace_id for trace_id in IDS if Sampling(rate=0.4).draws(trace_id)]
    assert [event["attributes"]["id"] for event in sink.events] == drawn
    assert sink.notes == {"sampled_out": len(IDS) - len(drawn)}
    stages, sink = sampled()
    stages.record_batch([{"stage_type": "x", "status": "error"}, {"stage_type": "y"}])
    assert (types(sink), kept(sink)) == (["x"], {"error"})


def test_a_stage_that_ends_after_its_trace_shares_its_fate() -> None:
    for fails in (True, False):
        stages, sink = sampled()
        with stages.stage("root") as root:
            late = stages.stage("late", parent=root)
            elsewhere = contextvars.copy_context()
            elsewhere.run(late.__enter__)
            if fails:
                failing(stages)
        elsewhere.run(late.__exit__, None, None, None)
        stages.record_stage("later", parent=root)
        assert types(sink) == (["fails", "root", "late", "later"] if fails else [])
        assert sink.notes == ({} if fails else {"sampled_out": 3})


@pytest.mark.parametrize("fails", [True, False])
def test_threads_in_one_trace_lose_nothing(fails: bool) -> None:
    stages, sink = sampled()

    def work(number: int, root: Any) -> None:
        for _ in range(50):
            with stages.stage("child", parent=root):
                pass
        if fails and number == 3:
            failing(stages, parent=root)

    with stages.stage("root") as root:
        threads = [threading.Thread(target=work, args=(number, root)) for number in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    total = 8 * 50 + 1 + fails
    assert len(sink.put_events) + sink.notes.get("sampled_out", 0) == total
    assert len(sink.put_events) == (total if fails else 0)
    assert len({event["stage_id"] for event in sink.events}) == len(sink.put_events)


def test_nothing_is_left_of_a_trace_that_ended() -> None:
    stages, _ = sampled()
    with stages.stage("root") as root:
        with stages.stage("child", attributes={"text": "x" * 10_000}):
            pass
        held = root._trace.held
        assert held is not None
        assert held.events
    assert not held.events
    gone = weakref.ref(stages._recorder)
    tracemalloc.start()
    try:
        for number in range(400):
            if number == 200:
                gc.collect()
                before = tracemalloc.get_traced_memory()[0]
            with stages.stage("root"):
                stages.record_stage("child", attributes={"text": "x" * 10_000})
        gc.collect()
        assert tracemalloc.get_traced_memory()[0] - before < 100_000
    finally:
        tracemalloc.stop()
    del root, stages
    gc.collect()
    assert gone() is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_child_draws_as_its_parent_does() -> None:
    stages, _ = sampled(0.5)
    read, write = os.pipe()
    draws = stages._recorder.draws
    pid = os.fork()
    if pid == 0:
        os.write(write, "".join("01"[draws(trace_id)] for trace_id in IDS).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read) as pipe:
        assert pipe.read() == "".join("01"[draws(trace_id)] for trace_id in IDS)
    os.waitpid(pid, 0)


def test_a_tracer_that_records_everything_decides_over_a_trace_that_others_sample() -> None:
    everything = Stages(Recorder("b", ListSink()))
    for around in (lambda: everything.stage("root"), everything.trace):
        sampling, sink = sampled()
        with around():
            for _ in range(3):
                with sampling.stage("child"):
                    pass
        assert sink.notes == {"sampled_out": 3}
        with around():
            with sampling.stage("before"):
                pass
            failing(everything)
            with sampling.stage("after"):
                pass
        assert types(sink) == ["before", "after"]
        assert kept(sink) == {"error"}


def test_a_trace_that_is_slow_as_a_whole_is_kept_whoever_opened_it() -> None:
    everything = Stages(Recorder("b", ListSink()))
    sampling, sink = sampled(keep_slow_ms=100, keep_errors=False)
    with FakeClock() as clock, everything.stage("root"):
        with sampling.stage("quick"):
            pass
        clock.advance(1)
    assert (types(sink), kept(sink)) == (["quick"], {"slow"})


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_what_was_held_before_a_fork_is_put_once(tmp_path: Any) -> None:
    script = f"""
import os
from evalvault_sdk import StageTracer
from evalvault_sdk.capture import sample
tracer = StageTracer("r", file={str(tmp_path / "events.jsonl")!r}, sample_rate=0.0)
with tracer.stage("root") as root:
    with tracer.stage("held"):
        pass
    child = os.fork()
    tracer.record_stage("child" if child == 0 else "parent", status="error")
    tracer.flush()
    if child == 0:
        os._exit(0)
    os.waitpid(child, 0)
tracer.shutdown()
"""
    done = subprocess.run(
        [sys.executable, "-c", script], env=clean_environment(), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(orjson.loads(line)["stage_type"] for line in lines) == ["child", "held", "parent", "root"]


def test_a_kept_event_is_within_the_limit_too() -> None:
    sink = ListSink()
    encoder = Encoder(Limits(max_event_bytes=4096))
    stages = Stages(Recorder("r", sink, encoder=encoder, sampling=Sampling(rate=0)))
    with stages.stage("root"):
        with stages.stage("large") as stage:
            stage.set(text="x" * 100_000)
        failing(stages)
    assert types(sink) == ["large", "fails", "root"]
    assert max(map(len, sink.put_events)) <= 4096


def test_all_traces_of_a_process_together_hold_a_bounded_number_of_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample, "_MAX_ALL_BYTES", 100_000)
    gc.collect()
    before = sample._all.bytes
    tracer, sink = sampled(rate=0.0)
    open_traces = [tracer.trace() for _ in range(100)]
    for trace in open_traces:
        trace.__enter__()
        tracer.record_stage("work", attributes={"text": "x" * 5_000})
    assert 100_000 <= sample._all.bytes < 110_000
    assert sink.notes["sampled_out"] > 70
    for trace in reversed(open_traces):
        trace.__exit__(None, None, None)
    assert sample._all.bytes == before
    assert sink.notes["sampled_out"] == 100


def test_a_trace_that_is_forgotten_holds_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    gc.collect()
    before = sample._all.bytes
    tracer, _ = sampled(rate=0.0)
    contextvars.copy_context().run(lambda: [tracer.trace().__enter__(), tracer.record_stage("work")])
    gc.collect()
    assert sample._all.bytes == before

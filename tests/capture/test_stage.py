from __future__ import annotations

import asyncio
import contextvars
import functools
import inspect
import threading
import time
import traceback
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest

from evalvault_sdk import StageEvent, StagePayloadRef, current_stage
from evalvault_sdk.capture.given import Given
from evalvault_sdk.capture.nostage import NO_STAGE
from evalvault_sdk.capture.recorder import Recorder
from evalvault_sdk.capture.stage import StageContext
from evalvault_sdk.capture.stages import Stages
from evalvault_sdk.log import Rarely
from evalvault_sdk.testing import FakeClock
from tests.support import ListSink, run_script


@pytest.fixture
def sink() -> ListSink:
    return ListSink()


@pytest.fixture
def recorder(sink: ListSink) -> Recorder:
    return Recorder("run", sink)


def test_a_block_is_recorded_with_its_times_ids_and_what_it_said(recorder: Recorder, sink: ListSink) -> None:
    with StageContext(recorder, "retrieval", Given(stage_name="bm25", metadata={"model": "m"})) as stage:
        stage.attributes = {"doc_ids": ["d1"]}
        stage.set(top_k=5)
        stage.output_ref = StagePayloadRef("s3", "k")
    (fields,) = sink.events
    event = StageEvent.from_dict(fields)
    assert (event.run_id, event.stage_type, event.stage_name) == ("run", "retrieval", "bm25")
    assert (event.status, event.attempt) == ("success", 1)
    assert event.attributes == {"doc_ids": ["d1"], "top_k": 5}
    assert event.metadata == {"model": "m"}
    assert event.output_ref == StagePayloadRef("s3", "k")
    assert event.started_at is not None
    assert event.finished_at is not None
    assert event.duration_ms is not None
    elapsed_ms = (event.finished_at - event.started_at).total_seconds() * 1000
    assert elapsed_ms == pytest.approx(event.duration_ms, abs=0.002)
    assert (event.stage_id, event.trace_id, event.span_id) == (stage.stage_id, stage.trace_id, stage.span_id)
    assert event.parent_stage_id is None


def test_nested_blocks_find_their_parent_and_share_one_trace(recorder: Recorder, sink: ListSink) -> None:
    with StageContext(recorder, "a") as a:
        with StageContext(recorder, "b") as b, StageContext(recorder, "c") as c:
            pass
        with StageContext(recorder, "d") as d:
            pass
    assert (a.parent_stage_id, b.parent_stage_id) == (None, a.stage_id)
    assert (c.parent_stage_id, d.parent_stage_id) == (b.stage_id, a.stage_id)
    assert {event["trace_id"] for event in sink.events} == {a.trace_id}
    with StageContext(recorder, "e") as e:
        pass
    assert e.trace_id != a.trace_id


def test_a_given_parent_wins_and_its_trace_is_told_by_its_id(recorder: Recorder) -> None:
    with StageContext(recorder, "a") as a:
        pass
    with StageContext(recorder, "b", Given(parent_stage_id=a.stage_id)) as b:
        assert (b.parent_stage_id, b.trace_id) == (a.stage_id, a.trace_id)
    with StageContext(recorder, "c", Given(parent_stage_id="input-123", trace_id="t" * 32)) as c:
        assert (c.parent_stage_id, c.trace_id) == ("input-123", "t" * 32)


def test_a_stage_of_another_run_shares_the_trace_but_is_no_parent(recorder: Recorder) -> None:
    other = Recorder("other run", ListSink())
    with StageContext(recorder, "a") as a, StageContext(other, "b") as b:
        assert (b.parent_stage_id, b.trace_id) == (None, a.trace_id)


def test_an_exception_is_recorded_and_passes_through_unchanged(recorder: Recorder, sink: ListSink) -> None:
    error = ValueError("empty query")

    def fails() -> None:
        raise error

    @StageContext(recorder, "a", Given(attributes={"query": ""}))
    def stage() -> None:
        fails()

    with pytest.raises(ValueError, match="empty query") as caught:
        stage()
    assert caught.value is error
    assert error.__context__ is None
    assert [frame.name for frame in traceback.extract_tb(error.__traceback__)][-1] == "fails"
    (event,) = sink.events
    assert event["status"] == "error"
    assert event["attributes"] == {"query": "", "error": {"type": "ValueError", "message": "empty query"}}


def test_a_stage_can_fail_without_raising(recorder: Recorder, sink: ListSink) -> None:
    with StageContext(recorder, "a") as stage:
        stage.fail("nothing found", kind="EmptyResult")
    assert sink.events[0]["status"] == "error"
    assert sink.events[0]["attributes"]["error"] == {"type": "EmptyResult", "message": "nothing found"}


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), GeneratorExit()])
def test_no_kind_of_exception_is_swallowed(recorder: Recorder, sink: ListSink, error: BaseException) -> None:
    with pytest.raises(type(error)) as caught, StageContext(recorder, "a"):
        raise error
    assert caught.value is error
    assert len(sink.events) == 1


def test_async_with_measures_too(recorder: Recorder, sink: ListSink) -> None:
    async def program() -> None:
        async with StageContext(recorder, "a") as a:
            await asyncio.sleep(0.01)
            async with StageContext(recorder, "b") as b:
                assert b.parent_stage_id == a.stage_id

    asyncio.run(program())
    assert sink.events[1]["duration_ms"] >= 10


def test_tasks_find_the_stage_they_were_started_in(recorder: Recorder, sink: ListSink) -> None:
    async def one(number: int) -> None:
        with StageContext(recorder, "child", Given(attributes={"number": number})) as child:
            await asyncio.sleep(0)
            assert current_stage() is child

    async def program() -> str | None:
        with StageContext(recorder, "parent") as parent:
            await asyncio.gather(*(one(number) for number in range(100)))
            return parent.stage_id

    parent_id = asyncio.run(program())
    children = [event for event in sink.events if event["stage_type"] == "child"]
    assert {event["parent_stage_id"] for event in children} == {parent_id}
    assert sorted(event["attributes"]["number"] for event in children) == list(range(100))


def test_a_thread_sees_the_stage_only_through_a_copied_context(recorder: Recorder) -> None:
    seen: list[str | None] = []

    def work() -> None:
        with StageContext(recorder, "child") as child:
            seen.append(child.parent_stage_id)

    with StageContext(recorder, "parent") as parent:
        context = contextvars.copy_context()
        for target in (work, lambda: context.run(work)):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
    assert seen == [None, parent.stage_id]


def test_a_decorated_function_is_the_same_function_to_its_callers(recorder: Recorder, sink: ListSink) -> None:
    def add(a: int, b: int = 2, *, c: int = 3) -> int:
        """Add."""
        current_stage().set(sum=a + b + c)
        return a + b + c

    decorated = StageContext(recorder, "adding", Given(metadata={"m": 1}))(add)
    assert decorated(1, c=4) == 7
    assert decorated(5) == 10
    assert decorated.__wrapped__ is add  # type: ignore[attr-defined]
    assert decorated.__doc__ == "Add."
    assert inspect.signature(decorated) == inspect.signature(add)
    first, second = sink.events
    assert first["stage_id"] != second["stage_id"]
    assert (first["stage_name"], first["metadata"]) == (add.__qualname__, {"m": 1})
    assert [event["attributes"] for event in sink.events] == [{"sum": 7}, {"sum": 10}]


def test_a_decorated_coroutine_function_stays_one(recorder: Recorder, sink: ListSink) -> None:
    @StageContext(recorder, "work", Given(stage_name="named"))
    async def work(number: int) -> int:
        await asyncio.sleep(0)
        if number < 0:
            raise ValueError(number)
        return number * 2

    assert inspect.iscoroutinefunction(work)

    async def program() -> Any:
        return await asyncio.gather(work(1), work(2), work(-1), return_exceptions=True)

    results = asyncio.run(program())
    assert results[:2] == [2, 4]
    assert isinstance(results[2], ValueError)
    assert sorted(event["status"] for event in sink.events) == ["error", "success", "success"]
    assert {event["stage_name"] for event in sink.events} == {"named"}


def test_recursion_of_a_decorated_function_nests(recorder: Recorder, sink: ListSink) -> None:
    @StageContext(recorder, "countdown")
    def countdown(number: int) -> int:
        return number if number == 0 else countdown(number - 1)

    countdown(3)
    ids = [event["stage_id"] for event in sink.events]
    assert [event.get("parent_stage_id") for event in sink.events] == [*ids[1:], None]


def test_what_nobody_calls_is_refused_at_once(recorder: Recorder) -> None:
    class Document:
        pass

    for given in (Document(), Document, "retrieval"):
        with pytest.raises(TypeError, match="not called"):
            StageContext(recorder, "x")(given)


def test_one_object_entered_twice_records_two_stages(recorder: Recorder, sink: ListSink) -> None:
    stage = StageContext(recorder, "a", Given(attributes={"given": 1}))
    for number in range(2):
        with stage:
            stage.set(**{f"number_{number}": number})
    assert [event["attributes"] for event in sink.events] == [
        {"given": 1, "number_0": 0},
        {"given": 1, "number_1": 1},
    ]
    assert sink.events[0]["stage_id"] != sink.events[1]["stage_id"]


def test_one_object_entered_while_open_nests(recorder: Recorder, sink: ListSink) -> None:
    stage = StageContext(recorder, "a")
    with stage as outer, stage as inner:
        assert inner is not outer
    assert sink.events[0]["parent_stage_id"] == sink.events[1]["stage_id"]


def test_what_is_given_is_not_changed(recorder: Recorder) -> None:
    attributes, metadata = {"a": 1}, {"m": 1}
    with StageContext(recorder, "a", Given(attributes=attributes, metadata=metadata)) as stage:
        stage.set(b=2)
        stage.metadata["n"] = 2
    assert (attributes, metadata) == ({"a": 1}, {"m": 1})


def test_the_record_is_a_snapshot(recorder: Recorder, sink: ListSink) -> None:
    documents = ["d1"]
    with StageContext(recorder, "a") as stage:
        stage.set(doc_ids=documents)
    documents.append("d2")
    assert sink.events[0]["attributes"] == {"doc_ids": ["d1"]}


@pytest.mark.parametrize(
    ("assigned", "recorded"), [(None, {}), ([1, 2], {"value": [1, 2]}), ("text", {"value": "text"})]
)
def test_attributes_that_are_no_dict_are_kept_as_a_value(
    recorder: Recorder, sink: ListSink, assigned: Any, recorded: Any
) -> None:
    with StageContext(recorder, "a") as stage:
        stage.attributes = assigned
    assert sink.events[0]["attributes"] == recorded


def test_a_failing_sink_is_not_felt(caplog: pytest.LogCaptureFixture) -> None:
    class Broken(ListSink):
        def put(self, event: bytes) -> bool:
            raise RuntimeError("the sink's secret")

    sink = Broken()
    now = [0.0]
    recorder = Recorder("run", sink, Rarely(clock=lambda: now[0]))
    for _ in range(5):
        with StageContext(recorder, "a"):
            pass
    assert sink.refused == ["internal_error"] * 5
    assert len(caplog.records) == 1
    assert "secret" not in caplog.text
    now[0] = 61
    with StageContext(recorder, "a"):
        pass
    assert len(caplog.records) == 2


def test_leaving_in_another_context_than_entering_is_not_felt(recorder: Recorder, sink: ListSink) -> None:
    stage = StageContext(recorder, "a")
    contextvars.copy_context().run(stage.__enter__)
    stage.__exit__(None, None, None)
    assert len(sink.events) == 1


def test_current_stage_outside_of_any_takes_everything_and_records_nothing(sink: ListSink) -> None:
    current_stage().set(a=1)
    current_stage().fail("x")
    assert sink.events == []


def test_a_step_of_the_wall_clock_makes_no_negative_duration(
    recorder: Recorder, sink: ListSink, monkeypatch: pytest.MonkeyPatch
) -> None:
    times = iter([2_000_000_000_000_000_000, 1_000_000_000_000_000_000])
    monkeypatch.setattr("evalvault_sdk.capture.clock.clock.time_ns", lambda: next(times))
    with StageContext(recorder, "a"):
        pass
    event = StageEvent.from_dict(sink.events[0])
    assert event.duration_ms is not None
    assert 0 <= event.duration_ms < 1000


@pytest.mark.parametrize("now_s", [-1e12, 0, 9.3e9, 253_402_214_400.0])
@pytest.mark.parametrize("took_s", [0.5, -1e10, 1e12])
def test_whatever_the_clock_says_the_program_does_not_feel_it(
    recorder: Recorder, sink: ListSink, now_s: float, took_s: float
) -> None:
    with FakeClock(now_s) as clock, StageContext(recorder, "a"):
        clock.advance(took_s)
    assert current_stage() is NO_STAGE
    assert len(sink.put_events) + len(sink.refused) == 1


def test_a_hundred_thousand_stages_that_were_never_left_are_freed_on_a_small_stack() -> None:
    script = """
import contextvars, threading
from evalvault_sdk import StageTracer
tracer = StageTracer("r", file="events.jsonl")
def enter():
    for _ in range(100_000):
        tracer.stage("x").__enter__()
def work():
    context = contextvars.copy_context()
    context.run(enter)
threading.stack_size(256 << 10)
thread = threading.Thread(target=work)
thread.start()
thread.join()
print("survived")
"""
    done = run_script(f"import os, tempfile\nos.chdir(tempfile.mkdtemp())\n{script}")
    assert (done.returncode, done.stdout) == (0, "survived\n"), done.stderr


def test_one_object_used_by_two_threads_keeps_their_stages_apart(recorder: Recorder, sink: ListSink) -> None:
    shared = StageContext(recorder, "shared")
    inside, leave = threading.Barrier(2), threading.Event()
    after: list[str | None] = []

    def work(number: int) -> None:
        with shared as stage:
            stage.set(number=number)
            inside.wait(10)
            if number == 0:
                leave.wait(10)
            time.sleep(0.02)
        leave.set()
        with StageContext(recorder, "after") as next_one:
            after.append(next_one.parent_stage_id)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    durations = {
        event["attributes"]["number"]: event["duration_ms"] for event in sink.events if event["stage_type"] == "shared"
    }
    assert durations[0] > durations[1] >= 20
    assert after == [None, None]


def test_stages_left_out_of_order_leave_no_ended_parent_behind(recorder: Recorder) -> None:
    with StageContext(recorder, "root") as root:
        first, second = StageContext(recorder, "first"), StageContext(recorder, "second")
        first.__enter__()
        second.__enter__()
        first.__exit__(None, None, None)
        assert current_stage() is second
        second.__exit__(None, None, None)
        assert current_stage() is root
    with StageContext(recorder, "next") as next_one:
        assert next_one.parent_stage_id is None


def test_leaving_twice_records_once(recorder: Recorder, sink: ListSink) -> None:
    stage = StageContext(recorder, "a")
    stage.__enter__()
    stage.__exit__(None, None, None)
    stage.__exit__(None, None, None)
    assert len(sink.events) == 1


class HostileMapping(Mapping[str, Any]):
    def __getitem__(self, key: str) -> Any:
        raise RuntimeError("no")

    def __iter__(self) -> Any:
        raise RuntimeError("no")

    def __len__(self) -> int:
        raise RuntimeError("no")


@pytest.mark.parametrize("given", [5, [1, 2], "abc", np.array([1, 2]), HostileMapping()])
def test_odd_attributes_given_or_assigned_are_not_felt(recorder: Recorder, sink: ListSink, given: Any) -> None:
    with StageContext(recorder, "a", Given(attributes=given, metadata=given)):
        pass
    with StageContext(recorder, "b") as stage:
        stage.attributes = given
        stage.set(more=1)
        stage.metadata = given
    StageContext(recorder, "c", Given(attributes=given))(lambda: None)()
    assert [event["stage_type"] for event in sink.events] == ["a", "b", "c"]
    assert sink.events[1]["attributes"]["more"] == 1


def test_set_and_fail_work_after_attributes_were_taken_away(recorder: Recorder, sink: ListSink) -> None:
    with StageContext(recorder, "a") as stage:
        stage.attributes = None  # type: ignore[assignment]
        stage.set(x=1)
        stage.fail("no")
    assert sink.events[0]["attributes"] == {"x": 1, "error": {"type": "Error", "message": "no"}}


def test_a_reference_may_be_a_dict(recorder: Recorder, sink: ListSink) -> None:
    with StageContext(recorder, "a", Given(input_ref={"store": "s3", "id": "1"})):
        pass
    assert sink.events[0]["input_ref"] == {"store": "s3", "id": "1"}


def test_calls_do_not_see_each_others_changes(recorder: Recorder, sink: ListSink) -> None:
    @StageContext(recorder, "a", Given(attributes={"tags": []}))
    def work(tag: str) -> None:
        stage = current_stage()
        stage.attributes["tags"].append(tag)
        stage.stage_name = tag
        stage.output_ref = StagePayloadRef("s3", tag)

    work("x")
    work("y")
    assert [event["attributes"]["tags"] for event in sink.events] == [["x"], ["y"]]

    again = StageContext(recorder, "b")
    with again:
        again.output_ref, again.attempt, again.status = StagePayloadRef("s3", "k"), 3, "odd"
    with again:
        pass
    assert {"output_ref", "attempt"} & set(sink.events[-1]) == set()
    assert sink.events[-1]["status"] == "success"


def test_methods_and_callable_objects_are_measured(recorder: Recorder, sink: ListSink) -> None:
    class Tools:
        @StageContext(recorder, "method")
        def method(self, number: int) -> int:
            return number + 1

        @classmethod
        @StageContext(recorder, "class method")
        def of_class(cls, number: int) -> int:
            return number + 2

        @staticmethod
        @StageContext(recorder, "static method")
        def of_nothing(number: int) -> int:
            return number + 3

    class Sleepy:
        async def __call__(self) -> int:
            await asyncio.sleep(0.01)
            return 7

    class Prompt:
        def __call__(self) -> int:
            return 8

    bound = StageContext(recorder, "bound method")(Tools().method)
    assert (Tools().method(1), Tools.of_class(1), Tools.of_nothing(1), bound(1)) == (2, 3, 4, 2)

    async def sleepy(number: int) -> int:
        await asyncio.sleep(0.01)
        return number

    assert asyncio.run(StageContext(recorder, "async partial")(functools.partial(sleepy, 5))()) == 5
    assert sink.events[-1]["duration_ms"] >= 10
    assert asyncio.run(StageContext(recorder, "async object")(Sleepy())()) == 7
    assert StageContext(recorder, "object")(Prompt())() == 8
    assert [event["stage_type"] for event in sink.events][-2:] == ["async object", "object"]
    assert sink.events[-2]["duration_ms"] >= 10


def test_times_given_as_text_leave_with_an_offset_and_others_as_they_are(recorder: Recorder, sink: ListSink) -> None:
    stages = Stages(recorder)
    stages.record_stage("x", started_at="2026-01-07T10:00:00", finished_at="2026-01-07 10:00:01.5 +00:00")
    stages.record_stage("x", started_at="yesterday", finished_at="2026-01-07T10:00:00Z")
    mended, refused = sink.events
    assert mended["started_at"] == "2026-01-07T10:00:00+00:00"
    assert mended["finished_at"] == "2026-01-07T10:00:01.500000+00:00"
    assert refused["started_at"] == "yesterday", "the server names it"


def test_a_status_or_attempt_that_was_taken_away_is_the_default(recorder: Recorder, sink: ListSink) -> None:
    with Stages(recorder).stage("x") as stage:
        stage.status = None  # type: ignore[assignment]
        stage.attempt = None  # type: ignore[assignment]
    (event,) = sink.events
    assert event["status"] == "success"
    assert "attempt" not in event

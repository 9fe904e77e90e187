"""Parents and traces wherever code runs; what other services, OpenTelemetry and tenacity say; nothing is kept."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import inspect
import io
import json
import logging
import os
import queue
import re
import subprocess
import sys
import threading
import types
import weakref
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import anyio
import pytest
import tenacity

import evalvault_sdk
from evalvault_sdk import (
    Call,
    ContextThreadPoolExecutor,
    StageContext,
    StageTracer,
    TraceContext,
    current_stage,
    trace_headers,
)
from evalvault_sdk.capture.context import open_scope
from evalvault_sdk.capture.propagate import run_hash
from evalvault_sdk.capture.recorder import Recorder
from evalvault_sdk.capture.stages import Stages
from tests.support import ListSink, clean_environment

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN_ID = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE_ID}-{SPAN_ID}-01"


@pytest.fixture
def sink() -> ListSink:
    return ListSink()


@pytest.fixture
def tracer(sink: ListSink) -> Stages:
    return Stages(Recorder("run", sink))


@pytest.fixture(autouse=True)
def the_context_is_left_as_it_was() -> Iterator[None]:
    assert open_scope.get() is None
    yield
    left = open_scope.get()
    open_scope.set(None)
    assert left is None


def a_tracer(run_id: str = "run") -> tuple[Stages, ListSink]:
    sink = ListSink()
    return Stages(Recorder(run_id, sink)), sink


def of_type(sink: ListSink, stage_type: str) -> list[dict[str, Any]]:
    return [event for event in sink.events if event["stage_type"] == stage_type]


def only(sink: ListSink, stage_type: str) -> dict[str, Any]:
    (event,) = of_type(sink, stage_type)
    return event


def parents(sink: ListSink, stage_type: str) -> set[str | None]:
    return {event.get("parent_stage_id") for event in of_type(sink, stage_type)}


def at_once(work: Callable[[], object], threads: int = 16) -> None:
    """Call `work` in many threads at the same time; raise what it raised."""
    ready, errors = threading.Barrier(threads), []

    def run() -> None:
        ready.wait()
        try:
            work()
        except BaseException as error:
            errors.append(error)

    running = [threading.Thread(target=run) for _ in range(threads)]
    for thread in running:
        thread.start()
    for thread in running:
        thread.join()
    if errors:
        raise errors[0]


# -- tasks and threads ------------------------------------------------------------------------------------


async def gathered(one: Callable[[int], Any], count: int) -> None:
    await asyncio.gather(*(one(number) for number in range(count)))


async def grouped(one: Callable[[int], Any], count: int) -> None:
    async with asyncio.TaskGroup() as group:  # type: ignore[attr-defined,unused-ignore]
        for number in range(count):
            group.create_task(one(number))


async def anyio_grouped(one: Callable[[int], Any], count: int) -> None:
    async with anyio.create_task_group() as group:
        for number in range(count):
            group.start_soon(one, number)


@pytest.mark.parametrize(
    "run_all",
    [
        gathered,
        pytest.param(grouped, marks=pytest.mark.skipif(sys.version_info < (3, 11), reason="Python 3.11 has it")),
        anyio_grouped,
    ],
)
def test_a_thousand_tasks_each_have_their_own_parent(
    tracer: Stages, sink: ListSink, run_all: Callable[[Callable[[int], Any], int], Any]
) -> None:
    async def one(number: int) -> None:
        with tracer.stage("task", attributes={"number": number}) as task:
            await asyncio.sleep(0)
            async with tracer.stage("inner", attributes={"number": number}) as inner:
                await asyncio.sleep(0)
                assert current_stage() is inner
            assert current_stage() is task
        assert current_stage() is root

    async def program() -> None:
        with root:
            await run_all(one, 1000)
            assert current_stage() is root

    root = tracer.stage("root")
    asyncio.run(program())
    assert parents(sink, "task") == {root.stage_id}
    number_of = {event["stage_id"]: event["attributes"]["number"] for event in of_type(sink, "task")}
    assert sorted(number_of.values()) == list(range(1000))
    inners = of_type(sink, "inner")
    assert len(inners) == 1000
    assert all(number_of[event["parent_stage_id"]] == event["attributes"]["number"] for event in inners)
    assert {event["trace_id"] for event in sink.events} == {root.trace_id}


def test_decorated_coroutines_that_run_at_once_do_not_see_each_other(tracer: Stages, sink: ListSink) -> None:
    @tracer.stage("inner")
    async def inner(number: int) -> None:
        await asyncio.sleep(0)
        current_stage().set(number=number)

    @tracer.stage("outer")
    async def outer(number: int) -> None:
        current_stage().set(number=number)
        await asyncio.gather(inner(number), inner(number))

    asyncio.run(gathered(outer, 200))
    number_of = {event["stage_id"]: event["attributes"]["number"] for event in of_type(sink, "outer")}
    assert len({event["trace_id"] for event in sink.events}) == 200
    assert [number_of[event["parent_stage_id"]] for event in of_type(sink, "inner")] == [
        event["attributes"]["number"] for event in of_type(sink, "inner")
    ]


def test_a_task_that_outlives_its_stage_is_still_below_it(tracer: Stages, sink: ListSink) -> None:
    async def later(ended: asyncio.Event) -> None:
        await ended.wait()
        with tracer.stage("later"):
            pass

    async def program() -> str | None:
        ended = asyncio.Event()
        with tracer.stage("root"), tracer.stage("request") as request:
            task = asyncio.create_task(later(ended))
        assert current_stage().stage_id is None
        ended.set()
        await task
        return request.stage_id

    assert parents(sink, "later") == set()
    request_id = asyncio.run(program())
    assert parents(sink, "later") == {request_id}
    assert only(sink, "later")["trace_id"] == only(sink, "root")["trace_id"]


def test_to_thread_and_copied_contexts_take_the_stage_along_and_plain_threads_do_not(
    tracer: Stages, sink: ListSink
) -> None:
    def work(stage_type: str) -> None:
        with tracer.stage(stage_type):
            pass

    async def program() -> None:
        await asyncio.to_thread(work, "to_thread")
        await anyio.to_thread.run_sync(work, "anyio")

    with tracer.stage("root") as root:
        asyncio.run(program())
        copied = contextvars.copy_context()
        for target in (lambda: copied.run(work, "copied"), lambda: work("plain")):
            thread = threading.Thread(target=target)
            thread.start()
            thread.join()
    for stage_type in ("to_thread", "anyio", "copied"):
        assert parents(sink, stage_type) == {root.stage_id}
    assert parents(sink, "plain") == {None}
    assert only(sink, "plain")["trace_id"] != root.trace_id


def test_the_executor_takes_the_stage_of_each_submit_along(tracer: Stages, sink: ListSink) -> None:
    def work(number: int, *, factor: int = 1) -> int:
        with tracer.stage("work"):
            return number * factor

    with ContextThreadPoolExecutor(4) as executor:
        for name in "ab":
            with tracer.stage(name) as stage:
                assert executor.submit(work, 2, factor=3).result() == 6
                assert list(executor.map(work, range(50))) == list(range(50))
            assert parents(sink, "work") == {stage.stage_id}
            assert len(of_type(sink, "work")) == 51
            sink.put_events.clear()
        executor.submit(work, 1).result()
    assert parents(sink, "work") == {None}
    with ContextThreadPoolExecutor(1) as executor, pytest.raises(ZeroDivisionError):
        executor.submit(lambda: 1 // 0).result()


def test_a_bound_function_runs_in_the_stage_that_was_open_in_any_thread_at_any_time(
    tracer: Stages, sink: ListSink
) -> None:
    def work(number: int) -> int:
        """Work."""
        with tracer.stage("work"):
            return number + 1

    with tracer.stage("root"), tracer.stage("request") as request:
        bound = tracer.bind(work)
    assert (bound.__name__, bound.__doc__) == ("work", "Work.")

    def many_times() -> None:
        with tracer.stage("of the thread") as own:
            for number in range(20):
                assert bound(number) == number + 1
                assert current_stage() is own

    at_once(many_times)
    assert len(of_type(sink, "work")) == 320
    assert parents(sink, "work") == {request.stage_id}
    assert {event["trace_id"] for event in of_type(sink, "work")} == {request.trace_id}


def test_a_bound_function_that_raises_leaves_the_context_as_it_was(tracer: Stages, sink: ListSink) -> None:
    def fails() -> None:
        with tracer.stage("work"):
            raise LookupError

    with tracer.stage("a") as a:
        bound = tracer.bind(fails)
    with tracer.stage("b") as b:
        with pytest.raises(LookupError):
            bound()
        assert current_stage() is b
    assert parents(sink, "work") == {a.stage_id}


def test_bound_outside_of_any_stage_it_runs_outside_of_any(tracer: Stages, sink: ListSink) -> None:
    def work() -> None:
        with tracer.stage("work"):
            pass

    bound = tracer.bind(work)
    with tracer.stage("root"):
        bound()
    assert parents(sink, "work") == {None}


def test_bind_leaves_other_context_variables_to_the_caller(tracer: Stages) -> None:
    variable: contextvars.ContextVar[int] = contextvars.ContextVar("variable", default=0)

    def change() -> list[int]:
        before = variable.get()
        variable.set(2)
        return [before]

    with tracer.stage("root"):
        bound = tracer.bind(change)
    variable.set(1)
    assert bound() == [1]
    assert variable.get() == 2


def test_a_bound_coroutine_function_runs_in_its_stage_in_any_loop(tracer: Stages, sink: ListSink) -> None:
    async def work(number: int) -> int:
        await asyncio.sleep(0)
        with tracer.stage("work"):
            await asyncio.sleep(0)
            return number

    with tracer.stage("root") as root:
        bound = tracer.bind(work)
    assert inspect.iscoroutinefunction(bound)

    async def program() -> None:
        with tracer.stage("of the loop") as own:
            assert await asyncio.gather(*(bound(number) for number in range(50))) == list(range(50))
            assert await bound(7) == 7
            assert current_stage() is own

    at_once(lambda: asyncio.run(program()), threads=8)
    assert len(of_type(sink, "work")) == 8 * 51
    assert parents(sink, "work") == {root.stage_id}


def test_between_the_steps_of_a_bound_generator_the_consumer_has_its_own_context(
    tracer: Stages, sink: ListSink
) -> None:
    def numbers(count: int) -> Iterator[int]:
        with tracer.stage("body") as body:
            for number in range(count):
                assert current_stage() is body
                yield number

    async def async_numbers(count: int) -> AsyncIterator[int]:
        with tracer.stage("body") as body:
            for number in range(count):
                assert current_stage() is body
                yield number
                await asyncio.sleep(0)

    with tracer.stage("root") as root:
        bound, async_bound = tracer.bind(numbers), tracer.bind(async_numbers)

    def consume() -> None:
        with tracer.stage("consumer") as consumer:
            seen = []
            for number in bound(20):
                assert current_stage() is consumer
                seen.append(number)
            assert seen == list(range(20))

    async def async_consume() -> None:
        with tracer.stage("consumer") as consumer:
            async for _ in async_bound(5):
                assert current_stage() is consumer

    at_once(consume)
    asyncio.run(async_consume())
    assert len(of_type(sink, "body")) == 17
    assert parents(sink, "body") == {root.stage_id}
    abandoned = bound(3)
    next(abandoned)
    del abandoned
    gc.collect()
    assert of_type(sink, "body")[-1]["status"] == "cancelled"


# -- parents that are given -------------------------------------------------------------------------------


def test_a_given_parent_wins_whether_it_is_open_or_ended_or_of_another_thread(tracer: Stages, sink: ListSink) -> None:
    with tracer.stage("ended") as ended:
        pass
    with tracer.stage("open") as opened, tracer.stage("around"):
        for parent in (ended, opened):
            with tracer.stage("child", parent=parent) as child, tracer.stage("grandchild") as grandchild:
                assert (child.parent_stage_id, child.trace_id) == (parent.stage_id, parent.trace_id)
                assert (grandchild.parent_stage_id, grandchild.trace_id) == (child.stage_id, parent.trace_id)
            recorded = tracer.record_stage("ready", parent=parent)
            event = only(sink, "ready")
            assert (event["stage_id"], event["parent_stage_id"]) == (recorded, parent.stage_id)
            assert event["trace_id"] == parent.trace_id
            sink.put_events.clear()

        def elsewhere() -> None:
            with tracer.stage("thread", parent=opened):
                pass
            assert open_scope.get() is None

        at_once(elsewhere, threads=8)
    assert parents(sink, "thread") == {opened.stage_id}


def test_a_given_parent_of_another_run_gives_its_trace_only(tracer: Stages) -> None:
    other, _ = a_tracer("other run")
    same, _ = a_tracer("run")
    with other.stage("a") as a:
        pass
    with tracer.stage("b", parent=a) as b:
        assert (b.parent_stage_id, b.trace_id) == (None, a.trace_id)
    with same.stage("c", parent=b) as c:
        assert (c.parent_stage_id, c.trace_id) == (b.stage_id, b.trace_id)


def test_a_parent_that_never_began_or_is_of_a_disabled_tracer_counts_as_not_given(
    tracer: Stages, sink: ListSink
) -> None:
    disabled = StageTracer("run", enabled=False)
    with disabled.stage("nothing") as nothing:
        assert open_scope.get() is None
    with tracer.stage("root") as root:
        for parent in (tracer.stage("never began"), nothing, None):
            with tracer.stage("child", parent=parent) as child:
                assert (child.parent_stage_id, child.trace_id) == (root.stage_id, root.trace_id)
            tracer.record_stage("child", parent=parent)
    assert parents(sink, "child") == {root.stage_id}
    with tracer.stage("lonely", parent=nothing) as lonely:
        assert lonely.parent_stage_id is None


def test_a_trace_can_be_the_parent(tracer: Stages) -> None:
    with tracer.trace(session_id="s") as trace:
        pass
    with tracer.stage("root"), tracer.stage("child", parent=trace) as child:
        assert (child.parent_stage_id, child.trace_id) == (None, trace.trace_id)


def test_a_parent_id_goes_with_the_trace_that_is_given_or_open_or_that_it_tells(tracer: Stages, sink: ListSink) -> None:
    with tracer.stage("root") as root:
        pass
    with tracer.stage("a", parent_stage_id=root.stage_id) as a:
        assert (a.parent_stage_id, a.trace_id) == (root.stage_id, root.trace_id)
    with tracer.stage("b", parent_stage_id="of-elsewhere") as b:
        assert b.parent_stage_id == "of-elsewhere"
        assert re.fullmatch("[0-9a-f]{32}", b.trace_id or "")
    with tracer.stage("c", parent_stage_id="of-elsewhere", trace_id=TRACE_ID) as c, tracer.stage("d") as d:
        assert (c.parent_stage_id, c.trace_id) == ("of-elsewhere", TRACE_ID)
        assert (d.parent_stage_id, d.trace_id) == (c.stage_id, TRACE_ID)
    with tracer.stage("around") as around, tracer.stage("e", parent_stage_id="x") as e:
        assert (e.parent_stage_id, e.trace_id) == ("x", around.trace_id)
    tracer.record_stage("f", parent_stage_id="x", trace_id=TRACE_ID)
    tracer.record_stage("f", parent_stage_id=root.stage_id)
    assert [(event["parent_stage_id"], event["trace_id"]) for event in of_type(sink, "f")] == [
        ("x", TRACE_ID),
        (root.stage_id, root.trace_id),
    ]


# -- traces -----------------------------------------------------------------------------------------------


def test_a_trace_gives_its_id_and_metadata_to_every_stage_inside(tracer: Stages, sink: ListSink) -> None:
    other, other_sink = a_tracer("other run")
    given = {"user_tier": "gold", "session_id": "given twice"}
    with tracer.trace(session_id="s", user_id="u", test_case_id="t", metadata=given) as trace:
        with tracer.stage("a") as a, tracer.stage("b", metadata={"user_id": "own"}) as b:
            b.metadata["seen"] = 1
        with other.stage("c") as c:
            pass
        tracer.record_stage("d", metadata={"test_case_id": "own"})
        trace.metadata["late"] = True
        tracer.record_stage("e", trace_id="another")
    common = {"user_tier": "gold", "session_id": "s", "user_id": "u", "test_case_id": "t"}
    assert only(sink, "a")["metadata"] == common
    assert only(sink, "b")["metadata"] == {**common, "user_id": "own", "seen": 1}
    assert only(other_sink, "c")["metadata"] == common
    assert only(sink, "d")["metadata"] == {**common, "test_case_id": "own"}
    assert only(sink, "e")["metadata"] == {**common, "late": True}
    assert {event["trace_id"] for event in sink.events[:3] + other_sink.events} == {trace.trace_id}
    assert only(sink, "e")["trace_id"] == "another"
    assert (a.parent_stage_id, b.parent_stage_id, c.parent_stage_id) == (None, a.stage_id, None)
    assert given == {"user_tier": "gold", "session_id": "given twice"}
    with tracer.stage("after") as after:
        assert after.trace_id != trace.trace_id
    assert "metadata" not in only(sink, "after")


def test_a_trace_within_a_stage_is_a_new_one_without_parent(tracer: Stages, sink: ListSink) -> None:
    with tracer.stage("root") as root, tracer.trace(session_id="outer") as outer:
        with tracer.stage("a") as a, tracer.trace(user_id="inner") as inner:
            with tracer.stage("b") as b:
                pass
            assert open_scope.get()._trace is inner._trace  # type: ignore[union-attr]
        with tracer.stage("c") as c:
            pass
    assert len({root.trace_id, outer.trace_id, inner.trace_id}) == 3
    assert (a.parent_stage_id, b.parent_stage_id, c.parent_stage_id) == (None, None, None)
    assert (a.trace_id, b.trace_id, c.trace_id) == (outer.trace_id, inner.trace_id, outer.trace_id)
    assert only(sink, "b")["metadata"] == {"user_id": "inner"}
    assert only(sink, "c")["metadata"] == {"session_id": "outer"}
    assert "metadata" not in only(sink, "root")


def test_a_trace_is_entered_by_async_with_too_and_lets_exceptions_through(tracer: Stages) -> None:
    error = ValueError("whatever")

    async def program() -> None:
        async with tracer.trace(trace_id="own id") as trace:
            assert trace.trace_id == "own id"
            async with tracer.stage("a") as a:
                assert a.trace_id == "own id"
            raise error

    with pytest.raises(ValueError, match="whatever") as caught:
        asyncio.run(program())
    assert caught.value is error
    with pytest.raises(KeyboardInterrupt), tracer.trace():
        raise KeyboardInterrupt


def test_what_ends_or_begins_after_the_trace_was_left_belongs_to_it(tracer: Stages, sink: ListSink) -> None:
    async def later(left: asyncio.Event) -> None:
        with tracer.stage("ends later"):
            await left.wait()
        with tracer.stage("begins later"):
            pass

    async def program() -> TraceContext:
        left = asyncio.Event()
        with tracer.trace(session_id="s") as trace:
            task = asyncio.create_task(later(left))
            await asyncio.sleep(0)
        assert open_scope.get() is None
        left.set()
        await task
        return trace

    trace = asyncio.run(program())
    for stage_type in ("ends later", "begins later"):
        event = only(sink, stage_type)
        assert (event["trace_id"], event["metadata"]) == (trace.trace_id, {"session_id": "s"})


def test_traces_at_once_keep_their_metadata_apart(tracer: Stages, sink: ListSink) -> None:
    async def request(number: int) -> None:
        async with tracer.trace(user_id=str(number)) as trace:
            await asyncio.sleep(0)
            with tracer.stage("a", attributes={"number": number, "trace": trace.trace_id}):
                await asyncio.sleep(0)

    asyncio.run(gathered(request, 300))
    assert len({event["trace_id"] for event in sink.events}) == 300
    for event in sink.events:
        assert event["metadata"] == {"user_id": str(event["attributes"]["number"])}
        assert event["trace_id"] == event["attributes"]["trace"]


@pytest.mark.parametrize("metadata", ["text", 5, ["a"], {1: object()}, {"a": float("nan")}])
def test_odd_metadata_of_a_trace_costs_no_stage(tracer: Stages, sink: ListSink, metadata: Any) -> None:
    with tracer.trace(metadata=metadata), tracer.stage("a"):
        pass
    assert len(sink.events) == 1
    assert sink.events[0]["metadata"]


# -- W3C Trace Context ------------------------------------------------------------------------------------


def test_the_headers_name_the_current_stage(tracer: Stages) -> None:
    assert trace_headers() == {}
    with tracer.stage("a"), tracer.stage("b") as b:
        headers = trace_headers()
        assert headers["traceparent"] == f"00-{b.trace_id}-{b.span_id}-01"
        assert headers["tracestate"] == f"evalvault={b.stage_id};{run_hash('run')}"
    with tracer.trace() as trace:
        headers = trace_headers()
        assert re.fullmatch(f"00-{trace.trace_id}-[0-9a-f]{{16}}-01", headers["traceparent"])
        assert "tracestate" not in headers
    assert trace_headers() == {}


@pytest.mark.parametrize(
    "trace_id", ["mine", "", "0" * 32, TRACE_ID.upper(), TRACE_ID + "0", TRACE_ID + "\n", "가" * 32]
)
def test_a_trace_whose_id_is_not_of_the_standard_has_no_headers(tracer: Stages, trace_id: str) -> None:
    with tracer.trace(trace_id=trace_id):
        assert trace_headers() == {}
        with tracer.stage("a") as a:
            assert a.trace_id == trace_id
            assert trace_headers() == {}


@pytest.mark.parametrize("run_id", ["run", "보험 검색 2026", "a;b,c=d%;\n\t", "x" * 200, "../../etc", "🙂"])
def test_a_service_of_the_same_run_finds_the_stage_that_called_it(run_id: str) -> None:
    (caller, _), (callee, sink) = a_tracer(run_id), a_tracer(run_id)
    with caller.stage("caller") as stage:
        headers = trace_headers()
    assert all(re.fullmatch("[ -~]+", value) for value in headers.values())
    with callee.trace(**headers, metadata={"a": 1}) as trace, callee.stage("a"), callee.stage("b"):
        pass
    assert trace.trace_id == stage.trace_id
    assert parents(sink, "a") == {stage.stage_id}
    assert only(sink, "b")["parent_stage_id"] == only(sink, "a")["stage_id"]
    assert {event["trace_id"] for event in sink.events} == {stage.trace_id}
    assert only(sink, "a")["metadata"] == {"a": 1}


def test_a_service_of_another_run_gets_the_trace_and_the_span_that_called_it() -> None:
    (caller, _), (callee, sink) = a_tracer("one run"), a_tracer("another run")
    with caller.stage("caller") as stage:
        headers = trace_headers()
    with callee.trace(**headers, metadata={"a": 1}), callee.stage("a"):
        pass
    (event,) = sink.events
    assert "parent_stage_id" not in event
    assert event["trace_id"] == stage.trace_id
    assert event["metadata"] == {"a": 1, "parent_span_id": stage.span_id}


def test_the_trace_goes_through_processes(tracer: Stages) -> None:
    program = """
import json, sys
from evalvault_sdk import trace_headers
from evalvault_sdk.capture.recorder import Recorder
from evalvault_sdk.capture.stages import Stages
from tests.support import ListSink
sink = ListSink()
tracer = Stages(Recorder("run", sink))
with tracer.trace(**json.loads(sys.argv[1])):
    handed_on = trace_headers()
    with tracer.stage("remote"):
        pass
print(json.dumps([sink.events[0], handed_on]))
"""
    with tracer.stage("caller") as stage:
        done = subprocess.run(
            [sys.executable, "-c", program, json.dumps(trace_headers())],
            env=clean_environment(),
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        event, handed_on = json.loads(done.stdout)
        assert (event["parent_stage_id"], event["trace_id"]) == (stage.stage_id, stage.trace_id)
        assert handed_on == trace_headers()  # in no stage of its own it stands for the one that called


def test_a_foreign_traceparent_is_gone_on_with(tracer: Stages, sink: ListSink) -> None:
    with tracer.trace(traceparent=TRACEPARENT) as trace:
        assert trace_headers() == {"traceparent": TRACEPARENT}
        with tracer.stage("a") as a:
            assert trace_headers()["traceparent"] == f"00-{TRACE_ID}-{a.span_id}-01"
    assert trace.trace_id == TRACE_ID
    (event,) = sink.events
    assert event["trace_id"] == TRACE_ID
    assert event["metadata"] == {"parent_span_id": SPAN_ID}
    assert "parent_stage_id" not in event


@pytest.mark.parametrize(
    "traceparent",
    [
        f"  {TRACEPARENT}\t",
        TRACEPARENT[:-2] + "ff",
        "01" + TRACEPARENT[2:],
        "cc" + TRACEPARENT[2:] + "-what-the-future-will-be-like",
        "cc" + TRACEPARENT[2:] + "-" + "x" * 10_000_000,
    ],
    ids=range(5),
)
def test_valid_headers_of_later_versions_are_understood(tracer: Stages, traceparent: str) -> None:
    with tracer.trace(traceparent=traceparent) as trace:
        assert trace.trace_id == TRACE_ID


MALFORMED: list[Any] = [
    "",
    "-",
    "00",
    "garbage",
    "ff" + TRACEPARENT[2:],
    "fF" + TRACEPARENT[2:],
    "0" + TRACEPARENT[2:],
    "000" + TRACEPARENT[2:],
    "0g" + TRACEPARENT[2:],
    TRACEPARENT + "-extra",
    TRACEPARENT + "-",
    TRACEPARENT + "0",
    TRACEPARENT[:-1],
    TRACEPARENT[:-3],
    TRACEPARENT[:-2] + "0G",
    TRACEPARENT[:-2] + "0A",
    "cc" + TRACEPARENT[2:] + "extra",
    "cc" + TRACEPARENT[2:] + ".extra",
    f"00-{'0' * 32}-{SPAN_ID}-01",
    f"00-{TRACE_ID}-{'0' * 16}-01",
    f"00-{TRACE_ID.upper()}-{SPAN_ID}-01",
    f"00-{TRACE_ID}-{SPAN_ID.upper()}-01",
    f"00-{TRACE_ID[:-1]}-{SPAN_ID}-01",
    f"00-{TRACE_ID}0-{SPAN_ID}-01",
    f"00-{TRACE_ID}-{SPAN_ID}0-01",
    f"00-{TRACE_ID[:-1]}g-{SPAN_ID}-01",
    f"00-{TRACE_ID[:-1]}\N{ARABIC-INDIC DIGIT ONE}-{SPAN_ID}-01",
    f"00_{TRACE_ID}_{SPAN_ID}_01",
    f"00-{TRACE_ID} -{SPAN_ID}-01",
    f"{TRACEPARENT},{TRACEPARENT}",
    f"{TRACEPARENT}\r\nX: 1",
    "보험",
    "\ud800",
    "-" * 10_000_000,
    TRACEPARENT * 200_000,
    TRACEPARENT.encode(),
    5,
    [TRACEPARENT],
    {"traceparent": TRACEPARENT},
]


@pytest.mark.parametrize("traceparent", MALFORMED, ids=range(len(MALFORMED)))
def test_a_malformed_traceparent_counts_as_not_given(tracer: Stages, sink: ListSink, traceparent: Any) -> None:
    with (
        tracer.trace(traceparent=traceparent, tracestate="a=1,evalvault=x;0123456789abcdef") as trace,
        tracer.stage("a"),
    ):
        assert "a=1" not in trace_headers()["tracestate"]
    assert re.fullmatch("(?!0{32})[0-9a-f]{32}", trace.trace_id)
    assert trace.trace_id != TRACE_ID
    (event,) = sink.events
    assert "parent_stage_id" not in event
    assert "metadata" not in event


ODD_STATES: list[Any] = [
    "",
    ",,,",
    "evalvault=",
    "evalvault=;",
    "evalvault=;0123456789abcdef",
    b"a=1",
    5,
    ["a=1"],
    "\ud800",
    "=" * 10**7,
]


@pytest.mark.parametrize("tracestate", ODD_STATES, ids=range(len(ODD_STATES)))
def test_an_odd_tracestate_costs_nothing_but_itself(tracer: Stages, sink: ListSink, tracestate: Any) -> None:
    with tracer.trace(traceparent=TRACEPARENT, tracestate=tracestate), tracer.stage("a") as a:
        assert a.trace_id == TRACE_ID
        assert len(trace_headers()["tracestate"]) < 1000
    assert "parent_stage_id" not in sink.events[0]


def test_what_other_systems_say_is_handed_on_in_order_and_in_bounds(tracer: Stages) -> None:
    state = "rojo=00f067aa0ba902b7 , congo=t61rcWkgMzE,,\tevalvault=other;other run,a@b=1"
    with tracer.trace(traceparent=TRACEPARENT, tracestate=state) as trace:
        assert trace_headers()["tracestate"] == "rojo=00f067aa0ba902b7,congo=t61rcWkgMzE,a@b=1"
        with tracer.stage("a") as a, tracer.stage("b", parent=trace) as b:
            own = f"evalvault={b.stage_id};{run_hash('run')}"
            assert trace_headers()["tracestate"] == f"{own},rojo=00f067aa0ba902b7,congo=t61rcWkgMzE,a@b=1"
        assert a.stage_id != b.stage_id
    with (
        tracer.trace(traceparent=TRACEPARENT, tracestate=",".join(f"v{n}={n}" for n in range(1_000_000))),
        tracer.stage("a"),
    ):
        others = trace_headers()["tracestate"].split(",")[1:]
        assert others == [f"v{n}={n}" for n in range(len(others))]
        assert len(others) <= 32
    with tracer.trace(traceparent=TRACEPARENT, tracestate="a=1," + "b=" + "2" * 10_000_000), tracer.stage("a"):
        assert len(trace_headers()["tracestate"]) < 1000


# -- OpenTelemetry ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def otel() -> Any:
    trace = pytest.importorskip("opentelemetry.sdk.trace")
    return trace.TracerProvider().get_tracer("test")


def otel_ids(span: Any) -> tuple[str, str]:
    context = span.get_span_context()
    return f"{context.trace_id:032x}", f"{context.span_id:016x}"


def test_a_root_stage_is_part_of_the_trace_that_opentelemetry_is_in(tracer: Stages, otel: Any) -> None:
    with otel.start_as_current_span("request") as span:
        with tracer.stage("root") as root:
            assert (root.trace_id, root.span_id) == otel_ids(span)
            assert trace_headers()["traceparent"] == "00-{}-{}-01".format(*otel_ids(span))
            with otel.start_as_current_span("inner") as inner, tracer.stage("child") as child:
                assert child.parent_stage_id == root.stage_id
                assert (child.trace_id, child.span_id) == otel_ids(inner)
        with tracer.trace() as trace, tracer.stage("in a trace") as stage:
            assert trace.trace_id == stage.trace_id == otel_ids(span)[0]
    with tracer.stage("after") as after:
        assert after.trace_id != otel_ids(span)[0]


def test_a_trace_or_parent_of_ours_wins_over_opentelemetry(tracer: Stages, otel: Any) -> None:
    with tracer.stage("root") as root, otel.start_as_current_span("unrelated") as span:
        with tracer.stage("child") as child:
            assert (child.trace_id, child.parent_stage_id) == (root.trace_id, root.stage_id)
            assert child.span_id != otel_ids(span)[1]
        with tracer.stage("given", trace_id=TRACE_ID) as given:
            assert given.trace_id == TRACE_ID
        with tracer.trace(traceparent=TRACEPARENT) as trace:
            assert trace.trace_id == TRACE_ID
    with otel.start_as_current_span("unrelated"), tracer.stage("ofit", parent=root) as below:
        assert below.trace_id == root.trace_id


def test_tasks_and_generators_take_the_span_that_is_current_for_them(tracer: Stages, otel: Any) -> None:
    async def one(_: int) -> None:
        with otel.start_as_current_span("task") as span:
            await asyncio.sleep(0)
            with tracer.stage("a") as a:
                assert (a.trace_id, a.span_id) == otel_ids(span)

    asyncio.run(gathered(one, 100))


def test_without_opentelemetry_nothing_of_it_is_imported() -> None:
    program = """
import sys
from evalvault_sdk import StageTracer, trace_headers
with StageTracer("run", enabled=True, file=sys.argv[1]) as tracer:
    with tracer.trace(), tracer.stage("a"):
        trace_headers()
print([name for name in sys.modules if name.startswith("opentelemetry")])
"""
    done = subprocess.run(
        [sys.executable, "-c", program, os.devnull], env=clean_environment(), capture_output=True, text=True, timeout=60
    )
    assert done.stdout.strip() == "[]", done.stderr


class _Raises(types.ModuleType):
    def __getattr__(self, name: str) -> Any:
        raise RuntimeError(name)


BROKEN: list[Any] = [
    None,
    types.ModuleType("opentelemetry.trace"),
    _Raises("opentelemetry.trace"),
    types.SimpleNamespace(get_current_span=None),
    types.SimpleNamespace(get_current_span=lambda: None),
    types.SimpleNamespace(get_current_span=lambda: types.SimpleNamespace(get_span_context=lambda: None)),
    types.SimpleNamespace(
        get_current_span=lambda: types.SimpleNamespace(
            get_span_context=lambda: types.SimpleNamespace(is_valid=True, trace_id="text", span_id=None)
        )
    ),
    types.SimpleNamespace(
        get_current_span=lambda: types.SimpleNamespace(
            get_span_context=lambda: types.SimpleNamespace(is_valid=False, trace_id=1, span_id=1)
        )
    ),
]


@pytest.mark.parametrize("broken", BROKEN, ids=range(len(BROKEN)))
def test_a_broken_opentelemetry_does_no_harm(
    tracer: Stages, sink: ListSink, monkeypatch: pytest.MonkeyPatch, broken: Any
) -> None:
    monkeypatch.setitem(sys.modules, "opentelemetry.trace", broken)
    with tracer.stage("a") as a, tracer.trace() as trace:
        pass
    assert re.fullmatch("[0-9a-f]{32}", trace.trace_id)
    assert a.stage_id is not None
    assert a.trace_id == a.stage_id.replace("-", "")
    assert len(sink.events) == 1


# -- tenacity ---------------------------------------------------------------------------------------------


def attempts(events: list[dict[str, Any]]) -> list[tuple[int, str]]:
    return [(event.get("attempt", 1), event["status"]) for event in events]


EXPECTED_ATTEMPTS = [(1, "error"), (2, "error"), (3, "success")]


@pytest.mark.parametrize("retry_outside", [True, False])
def test_every_attempt_is_a_stage_of_its_own_with_its_number(
    tracer: Stages, sink: ListSink, retry_outside: bool
) -> None:
    failing = [2]

    def flaky(value: int) -> int:
        if failing[0]:
            failing[0] -= 1
            raise ConnectionError
        return value

    async def async_flaky(value: int) -> int:
        await asyncio.sleep(0)
        return flaky(value)

    retry = tenacity.retry(stop=tenacity.stop_after_attempt(4))
    stage = tracer.stage("work")
    for function in (flaky, async_flaky):
        decorated: Any = retry(stage(function)) if retry_outside else stage(retry(function))
        assert decorated.__name__ == function.__name__
        assert inspect.iscoroutinefunction(decorated) == inspect.iscoroutinefunction(function)
        for _ in range(2):
            failing[0] = 2
            sink.put_events.clear()
            result = asyncio.run(decorated(5)) if function is async_flaky else decorated(5)
            assert result == 5
            assert attempts(sink.events) == EXPECTED_ATTEMPTS
            assert [event["attributes"].get("error", {}).get("type") for event in sink.events] == [
                "ConnectionError",
                "ConnectionError",
                None,
            ]
        assert decorated.retry.stop.max_attempt_number == 4
        assert hasattr(decorated, "statistics") or hasattr(decorated.retry, "statistics")
        failing[0] = 9
        sink.put_events.clear()
        again = decorated.retry_with(stop=tenacity.stop_after_attempt(2))
        with pytest.raises(tenacity.RetryError):
            asyncio.run(again(5)) if function is async_flaky else again(5)
        assert attempts(sink.events) == [(1, "error"), (2, "error")]


def test_methods_are_retried_too_and_a_given_attempt_wins(tracer: Stages, sink: ListSink) -> None:
    class Service:
        failing = 2

        @tracer.stage("work", capture_args=True)
        @tenacity.retry(stop=tenacity.stop_after_attempt(3))
        def work(self, value: int) -> int:
            if self.failing:
                self.failing -= 1
                raise ConnectionError
            return value

    assert Service().work(4) == 4
    assert attempts(sink.events) == EXPECTED_ATTEMPTS
    assert {event["attributes"]["value"] for event in sink.events} == {4}
    sink.put_events.clear()
    tenacity.Retrying(stop=tenacity.stop_after_attempt(3))(tracer.stage("given", attempt=7)(lambda: None))
    assert attempts(sink.events) == [(7, "success")]


def test_calls_at_once_do_not_mix_their_attempts(tracer: Stages, sink: ListSink) -> None:
    @tracer.stage("inner")
    def inner() -> None:
        pass

    @tenacity.retry(stop=tenacity.stop_after_attempt(5))
    @tracer.stage("work", capture_args=True)
    async def work(number: int, seen: list[int]) -> None:
        seen.append(1)
        inner()
        await asyncio.sleep(0)
        if len(seen) <= number % 4:
            raise ConnectionError

    @tracer.stage("threaded", capture_args=True)
    @tenacity.retry(stop=tenacity.stop_after_attempt(3))
    def threaded(thread: int, seen: list[int]) -> None:
        seen.append(1)
        if len(seen) < 3:
            raise ConnectionError

    async def program() -> None:
        await asyncio.gather(*(work(number, []) for number in range(100)))

    asyncio.run(program())
    of_number: dict[int, list[int]] = {}
    for event in of_type(sink, "work"):
        of_number.setdefault(event["attributes"]["number"], []).append(event.get("attempt", 1))
    assert of_number == {number: list(range(1, number % 4 + 2)) for number in range(100)}
    assert {event.get("attempt", 1) for event in of_type(sink, "inner")} == {1}
    at_once(lambda: threaded(threading.get_ident(), []))
    of_thread: dict[int, list[int]] = {}
    for event in of_type(sink, "threaded"):
        of_thread.setdefault(event["attributes"]["thread"], []).append(event.get("attempt", 1))
    assert list(of_thread.values()) == [[1, 2, 3]] * 16


# -- nothing is kept --------------------------------------------------------------------------------------


class Thing:
    pass


def all_gone(references: list[weakref.ref[Any]]) -> bool:
    gc.collect()
    return not any(reference() is not None for reference in references)


class Weak:
    """Weak references to things, and to stages and traces through what only they refer to."""

    def __init__(self) -> None:
        self.references: list[weakref.ref[Any]] = []

    def __call__(self, thing: Any) -> Any:
        self.references.append(weakref.ref(thing))
        return thing

    def new(self) -> Thing:
        thing: Thing = self(Thing())
        return thing


def live_scopes() -> int:
    gc.collect()
    return sum(type(thing) in (StageContext, TraceContext) for thing in gc.get_objects())


def test_nothing_of_a_thousand_tasks_is_kept(tracer: Stages) -> None:
    weak = Weak()
    before = live_scopes()

    async def one(_: int) -> Thing:
        with tracer.trace(metadata={"thing": weak.new()}), tracer.stage("task", attributes={"thing": weak.new()}):
            await asyncio.sleep(0)
            with tracer.stage("inner") as inner:
                inner.set(thing=weak.new())
        return weak.new()

    async def program() -> None:
        with tracer.stage("root"):
            await gathered(one, 1000)
        assert open_scope.get() is None

    asyncio.run(program())
    assert len(weak.references) == 4000
    assert all_gone(weak.references)
    assert live_scopes() == before


def test_nothing_of_a_thousand_streams_is_kept_whether_they_end_fail_or_are_dropped(
    tracer: Stages, sink: ListSink
) -> None:
    weak = Weak()

    @tracer.stage("stream", capture_result=True)
    def stream(count: int) -> Generator[Thing, None, None]:
        current_stage().set(thing=weak.new())
        for _ in range(count):
            yield weak.new()
        raise LookupError

    @tracer.stage("async stream", capture_result=True)
    async def async_stream(count: int) -> AsyncIterator[Thing]:
        current_stage().set(thing=weak.new())
        for _ in range(count):
            yield weak.new()
            await asyncio.sleep(0)

    kept = live_scopes()
    for number in range(1000):
        made: Any = weak(stream(2))
        if number % 3 == 0:
            with pytest.raises(LookupError):
                list(made)
        elif number % 3 == 1:
            next(made)
        else:
            next(made)
            made.close()
        del made

    async def program() -> None:
        for number in range(300):
            made: Any = weak(async_stream(2))
            async for _ in made:
                if number % 2:
                    break
            await made.aclose()
            del made

    asyncio.run(program())
    assert all_gone(weak.references)
    assert live_scopes() == kept
    statuses = {event["status"] for event in of_type(sink, "stream")}
    assert statuses == {"error", "cancelled"}
    assert len(sink.events) == 1300


def test_a_suspended_stream_does_not_keep_the_item_it_gave(tracer: Stages) -> None:
    weak = Weak()

    @tracer.stage("stream")
    def stream() -> Iterator[Thing]:
        yield weak.new()

    @tracer.stage("stream")
    async def async_stream() -> AsyncIterator[Thing]:
        yield weak.new()

    made: Any = stream()
    next(made)
    assert all_gone(weak.references)
    made.close()

    async def program() -> None:
        async_made: Any = async_stream()
        await async_made.__anext__()
        assert all_gone(weak.references)
        await async_made.aclose()

    asyncio.run(program())


def test_nothing_of_bound_and_decorated_functions_and_their_calls_is_kept(tracer: Stages) -> None:
    weak = Weak()
    before = live_scopes()

    def calls(number: int) -> None:
        held = weak.new()

        def work(argument: Thing) -> Thing:
            with tracer.stage("work"):
                assert held
                return weak.new()

        with tracer.trace(metadata={"thing": weak.new()}), tracer.stage("root", attributes={"thing": weak.new()}):
            bound = weak(tracer.bind(work))
        decorated = weak(tracer.stage("decorated", capture_result=True)(work))
        for function in (bound, decorated):
            function(weak.new())

    with ContextThreadPoolExecutor(2) as executor:
        for number in range(1000):
            calls(number)
        with tracer.stage("root", attributes={"thing": weak.new()}):
            list(executor.map(lambda _: weak.new(), range(100)))
    assert all_gone(weak.references)
    assert live_scopes() == before


def test_an_error_keeps_no_more_alive_than_it_would(tracer: Stages) -> None:
    weak = Weak()

    @tracer.stage("fails", capture_args=True)
    def fails(argument: Thing) -> None:
        weak.new()
        raise LookupError

    for _ in range(100):
        with pytest.raises(LookupError):
            fails(weak.new())
    assert all_gone(weak.references)


# -- the functions of the package -------------------------------------------------------------------------


def run_program(program: str, tmp_path: Path, **variables: str) -> tuple[Any, str]:
    """Run a program that prints JSON; return that, and what it wrote to standard error."""
    path = tmp_path / "program.py"
    path.write_text("import json, sys\nimport evalvault_sdk\n" + program, encoding="utf-8")
    done = subprocess.run(
        [sys.executable, str(path)],
        env={**clean_environment(), **variables},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout), done.stderr


def in_file(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


DECORATED = """
@evalvault_sdk.stage("function", capture_args=True)
def function(value):
    return value

@evalvault_sdk.stage
def stream():
    yield 1

class Service:
    @evalvault_sdk.stage("method")
    async def method(self):
        return 3

def use_all():
    import asyncio
    with evalvault_sdk.trace(session_id="s"), evalvault_sdk.stage("block") as block:
        block.set(a=1)
        assert function(1) == 1
        assert list(stream()) == [1]
        assert asyncio.run(Service().method()) == 3
        evalvault_sdk.record_stage("ready")
        assert evalvault_sdk.record_batch([{"stage_type": "batch"}])[0]
        assert set(evalvault_sdk.trace_headers()) <= {"traceparent", "tracestate"}
"""
ALL_TYPES = ["function", "stream", "method", "ready", "batch", "block"]


def test_what_was_decorated_before_configure_is_recorded_and_goes_with_later_configurations(tmp_path: Path) -> None:
    program = """
evalvault_sdk.configure(run_id="one", file="one.jsonl")
use_all()
evalvault_sdk.configure(run_id="two", file="two.jsonl")
use_all()
report = evalvault_sdk.flush()
stats = evalvault_sdk.stats()
print(json.dumps([report.recorded, report.delivered, stats.recorded]))
"""
    counts, error = run_program(DECORATED + program, tmp_path)
    assert counts == [6, 6, 6]
    assert error == ""
    for run_id in ("one", "two"):
        events = in_file(tmp_path / f"{run_id}.jsonl")
        assert [event["stage_type"] for event in events] == ALL_TYPES
        assert {event["run_id"] for event in events} == {run_id}
        block = events[-1]
        assert [event.get("parent_stage_id") for event in events[:4]] == [block["stage_id"]] * 4
        assert {event["metadata"]["session_id"] for event in events[:4]} == {"s"}


def test_without_a_configuration_nothing_is_recorded_and_one_warning_says_so(tmp_path: Path) -> None:
    program = """
use_all()
use_all()
counts = [evalvault_sdk.flush().recorded, evalvault_sdk.stats().recorded, evalvault_sdk.shutdown().recorded]
import threading
print(json.dumps([counts, threading.active_count()]))
"""
    printed, error = run_program(DECORATED + program, tmp_path)
    assert printed == [[0, 0, 0], 1]
    assert len(error.splitlines()) == 1
    assert "evalvault_sdk.configure(run_id=...)" in error


def test_what_was_decorated_first_is_recorded_once_it_is_configured_after_all(tmp_path: Path) -> None:
    program = """
use_all()
evalvault_sdk.configure(run_id="late", file="late.jsonl")
use_all()
print(evalvault_sdk.flush().delivered)
"""
    assert run_program(DECORATED + program, tmp_path)[0] == 6
    assert [event["stage_type"] for event in in_file(tmp_path / "late.jsonl")] == ALL_TYPES


def test_the_run_in_the_environment_is_enough(tmp_path: Path) -> None:
    program = """
use_all()
report = evalvault_sdk.flush()
print(json.dumps([report.recorded, report.delivered]))
"""
    counts, error = run_program(DECORATED + program, tmp_path, EVALVAULT_RUN_ID="보험", EVALVAULT_FILE="out.jsonl")
    assert (counts, error) == ([6, 6], "")
    events = in_file(tmp_path / "out.jsonl")
    assert [event["stage_type"] for event in events] == ALL_TYPES
    assert {event["run_id"] for event in events} == {"보험"}


def test_configure_wins_over_the_environment(tmp_path: Path) -> None:
    program = """
evalvault_sdk.configure(run_id="given", file="given.jsonl")
use_all()
print(evalvault_sdk.flush().delivered)
"""
    run_program(DECORATED + program, tmp_path, EVALVAULT_RUN_ID="environment", EVALVAULT_FILE="environment.jsonl")
    assert {event["run_id"] for event in in_file(tmp_path / "given.jsonl")} == {"given"}
    assert not (tmp_path / "environment.jsonl").exists()


def test_switched_off_nothing_is_recorded_and_nothing_said(tmp_path: Path) -> None:
    program = """
use_all()
use_all()
evalvault_sdk.configure(run_id="one", file="one.jsonl")
use_all()
import threading
print(json.dumps([evalvault_sdk.flush().recorded, evalvault_sdk.stats().recorded, threading.active_count()]))
"""
    printed, error = run_program(DECORATED + program, tmp_path, EVALVAULT_SDK_DISABLED="1", EVALVAULT_RUN_ID="x")
    assert (printed, error) == ([0, 0, 1], "")
    assert not (tmp_path / "one.jsonl").exists()


def test_a_wrong_setting_in_the_environment_is_said_once_and_harms_nobody(tmp_path: Path) -> None:
    program = "use_all()\nuse_all()\nprint(evalvault_sdk.stats().recorded)\n"
    printed, error = run_program(DECORATED + program, tmp_path, EVALVAULT_RUN_ID="x", EVALVAULT_SAMPLE_RATE="7")
    assert printed == 0
    assert len(error.splitlines()) == 1
    assert "EVALVAULT_SAMPLE_RATE" in error


# -- what is recorded of a call ---------------------------------------------------------------------------


def test_arguments_are_recorded_by_name_without_self_as_they_were_before_the_call(
    tracer: Stages, sink: ListSink
) -> None:
    class Service:
        @tracer.stage("method", capture_args=True, capture_result=True)
        def method(self, query: list[str], *rest: int, top_k: int = 5, **options: Any) -> list[str]:
            query.append("changed")
            options.get("nested", [[]])[0].append("changed")
            return query

        @tracer.stage("class method", capture_args=True)
        @classmethod
        def make(cls, value: int) -> int:
            return value

        @tracer.stage("coroutine", capture_args=["query"], capture_result=True)
        async def coroutine(self, query: dict[str, Any], secret: str) -> int:
            query["changed"] = True
            return 4

        @tracer.stage("stream", capture_args=True, capture_result=True)
        def stream(self, query: dict[str, Any]) -> Iterator[str]:
            query["changed"] = True
            yield "보험"
            yield " 보장"

        @tracer.stage("async stream", capture_args="query", capture_result=True)
        async def async_stream(self, query: dict[str, Any]) -> AsyncIterator[int]:
            query["changed"] = True
            yield 1
            yield 2

    async def program() -> None:
        assert await service.coroutine({"a": 1}, secret="x") == 4
        assert [number async for number in service.async_stream({"a": 1})] == [1, 2]

    service = Service()
    assert service.method(["q"], 1, 2, nested=[["n"]]) == ["q", "changed"]
    assert Service.make(3) == 3
    query = {"a": 1}
    made = service.stream(query)
    query["changed between"] = 1
    assert "".join(made) == "보험 보장"
    asyncio.run(program())
    assert only(sink, "method")["attributes"] == {
        "query": ["q"],
        "rest": [1, 2],
        "top_k": 5,
        "nested": [["n"]],
        "result": ["q", "changed"],
    }
    assert only(sink, "class method")["attributes"] == {"value": 3}
    assert only(sink, "coroutine")["attributes"] == {"query": {"a": 1}, "result": 4}
    for stage_type, result in (("stream", "보험 보장"), ("async stream", [1, 2])):
        attributes = only(sink, stage_type)["attributes"]
        assert attributes.pop("time_to_first_item_ms") >= 0
        assert attributes == {"query": {"a": 1}, "item_count": 2, "result": result}


def test_functions_of_the_call_and_of_the_result_give_attributes(tracer: Stages, sink: ListSink) -> None:
    def of_call(call: Call) -> dict[str, Any]:
        return {"asked": call["query"], "arguments": sorted(call.arguments)}

    @tracer.stage("work", attributes=of_call, on_result=lambda result: {"length": len(result)})
    def work(query: str, top_k: int = 5) -> list[int]:
        return [1] * top_k

    @tracer.stage("stream", attributes=lambda call: None, on_result=lambda items: {"joined": "".join(items)})
    def stream() -> Iterator[str]:
        yield from "abc"

    work("q")
    list(stream())
    assert only(sink, "work")["attributes"] == {"asked": "q", "arguments": ["query", "top_k"], "length": 5}
    assert only(sink, "stream")["attributes"]["joined"] == "abc"
    assert sink.notes == {}


class Endless:
    """An iterator that must not be consumed, whatever it looks like."""

    def __iter__(self) -> Iterator[int]:
        return self

    def __next__(self) -> int:
        raise AssertionError("consumed")

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> int:
        raise AssertionError("consumed")


def test_no_iterator_is_consumed_that_is_given_or_returned(tracer: Stages, sink: ListSink) -> None:
    def numbers() -> Iterator[int]:
        yield from range(3)

    async def async_numbers() -> AsyncIterator[int]:
        yield 1

    waiting: queue.Queue[int] = queue.Queue()
    waiting.put(1)
    made: list[Any] = [
        numbers(),
        iter([0, 1, 2]),
        map(int, "012"),
        filter(lambda n: n < 3, [0, 1, 2]),
        (n for n in range(3)),
    ]
    text = io.StringIO("text")
    odd: list[Any] = [Endless(), async_numbers(), waiting, text, reversed("a"), enumerate("a")]

    @tracer.stage("work", capture_args=True, capture_result=True)
    def work(*args: Any, **options: Any) -> Any:
        return options["result"]

    @tracer.stage("work", capture_result=True)
    async def async_work(result: Any) -> Any:
        return result

    for iterator in made[:2]:
        assert work(*made, *odd, nested=[{"a": iterator}], result=map(int, "012")) is not None
    returned = iter("abc")
    assert work(result=returned) is returned
    assert asyncio.run(async_work(returned)) is returned
    assert list(returned) == ["a", "b", "c"]
    for iterator in made:
        assert list(iterator) == [0, 1, 2]
    assert (waiting.qsize(), text.read(), next(odd[-2]), next(odd[-1])) == (1, "text", "a", (0, "a"))
    assert len(sink.events) == 4
    assert sink.notes == {}


def test_a_stream_of_any_kind_that_is_returned_is_the_stage(tracer: Stages, sink: ListSink) -> None:
    @tracer.stage("work", capture_result=True)
    def work() -> Iterator[int]:
        return (number for number in range(3))

    made = work()
    assert sink.events == []
    assert list(made) == [0, 1, 2]
    assert only(sink, "work")["attributes"]["result"] == [0, 1, 2]


def test_functions_of_the_users_that_raise_are_counted_logged_once_and_change_nothing(
    tracer: Stages, sink: ListSink, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(_: Any) -> dict[str, Any]:
        raise RuntimeError("a secret")

    def decorate(function: Any) -> Any:
        return tracer.stage(
            function.__name__, attributes=fails, on_result=fails, capture_args=True, capture_result=True
        )(function)

    @decorate
    def work(value: int) -> int:
        return value

    @decorate
    async def coroutine(value: int) -> int:
        return value

    @decorate
    def stream(value: int) -> Iterator[int]:
        yield value

    @decorate
    async def async_stream(value: int) -> AsyncIterator[int]:
        yield value

    async def program() -> list[int]:
        return [await coroutine(1), *[value async for value in async_stream(2)]]

    with caplog.at_level(logging.WARNING, "evalvault_sdk"):
        assert [work(1), *stream(2), *asyncio.run(program())] == [1, 2, 1, 2]
    assert sink.notes == {"hook_errors": 8}
    assert sink.refused == []
    assert [event["status"] for event in sink.events] == ["success"] * 4
    assert [(event["attributes"]["value"], event["attributes"]["result"]) for event in sink.events] == [
        (1, 1),
        (2, [2]),
        (1, 1),
        (2, [2]),
    ]
    assert len(caplog.messages) == 2
    assert sorted(re.findall(r"given as (\w+)=", caplog.text)) == ["attributes", "on_result"]
    assert "a secret" not in caplog.text


@pytest.mark.parametrize("made", ["text", 5, [1], object()])
def test_what_is_no_mapping_is_counted_and_changes_nothing(tracer: Stages, sink: ListSink, made: Any) -> None:
    decorated = tracer.stage("work", attributes=lambda call: made, on_result=lambda result: made)(abs)
    assert decorated(-3) == 3
    assert (sink.events[0]["attributes"], sink.notes) == ({}, {"hook_errors": 2})


def test_a_call_that_does_not_fit_raises_what_it_always_raised(tracer: Stages, sink: ListSink) -> None:
    def work(value: int) -> int:
        return value

    decorated: Any = tracer.stage("work", capture_args=True)(work)
    with pytest.raises(TypeError, match=r"work\(\) missing 1 required positional argument: 'value'"):
        decorated()
    assert (only(sink, "work")["status"], sink.notes) == ("error", {})


def test_an_error_of_the_function_leaves_its_arguments_recorded_and_no_result(tracer: Stages, sink: ListSink) -> None:
    called: list[Any] = []

    @tracer.stage("work", capture_args=True, capture_result=True, on_result=lambda result: called.append(result))
    def work(value: int) -> int:
        raise LookupError

    with pytest.raises(LookupError):
        work(3)
    attributes = only(sink, "work")["attributes"]
    assert attributes["value"] == 3
    assert "result" not in attributes
    assert called == []


def test_partials_and_callable_objects_are_looked_at_too(tracer: Stages, sink: ListSink) -> None:
    class Model:
        def __call__(self, prompt: str) -> str:
            return prompt

    tracer.stage("object", capture_args=True)(Model())("hi")
    tracer.stage("partial", capture_args=True)(functools.partial(Model().__call__, prompt="hi"))()
    tracer.stage("builtin", capture_args=True)(len)([1, 2])
    assert only(sink, "object")["attributes"] == {"prompt": "hi"}
    assert only(sink, "partial")["attributes"] == {"prompt": "hi"}
    assert list(only(sink, "builtin")["attributes"].values()) == [[1, 2]]


def test_the_package_itself_has_what_a_tracer_has() -> None:
    for name in ("stage", "trace", "record_stage", "record_batch", "flush", "shutdown", "stats"):
        own = inspect.signature(getattr(evalvault_sdk, name))
        assert str(own) == str(inspect.signature(getattr(StageTracer, name))).replace("(self, ", "(").replace(
            "(self)", "()"
        )


def test_a_stream_that_is_closed_is_cancelled_though_its_body_ends_in_order(tracer: Stages, sink: ListSink) -> None:
    @tracer.stage("stream")
    def stream() -> Generator[int, None, None]:
        try:
            yield 1
        except GeneratorExit:
            return

    made = stream()
    next(made)
    made.close()
    assert only(sink, "stream")["status"] == "cancelled"

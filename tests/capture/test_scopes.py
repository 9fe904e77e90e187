"""Scopes that are entered again, left out of order, or outlived: none may hang, leak or mix traces."""

from __future__ import annotations

import asyncio
import contextvars
import functools
import gc
import uuid
import weakref
from typing import Any

import pytest
import tenacity

from evalvault_sdk import bind, current_stage, trace_headers
from evalvault_sdk.capture.context import open_scope
from evalvault_sdk.capture.propagate import run_hash
from evalvault_sdk.capture.recorder import Recorder
from evalvault_sdk.capture.stages import Stages
from tests.support import ListSink, run_script

TRACE_ID = "4bf92f3577b34da6a3ce929d0e0e4736"


@pytest.fixture
def sink() -> ListSink:
    return ListSink()


@pytest.fixture
def tracer(sink: ListSink) -> Stages:
    return Stages(Recorder("run", sink))


def test_a_trace_entered_again_goes_on_and_is_left_again(tracer: Stages, sink: ListSink) -> None:
    trace = tracer.trace(session_id="s")
    with trace, trace, tracer.stage("a") as a, trace, tracer.stage("b") as b:
        pass
    with tracer.stage("after") as after:
        pass
    assert open_scope.get() is None
    assert (a.trace_id, b.trace_id) == (trace.trace_id, trace.trace_id)
    assert (a.parent_stage_id, b.parent_stage_id, after.parent_stage_id) == (None, None, None)
    assert after.trace_id != trace.trace_id
    with contextvars.copy_context().run(tracer.trace().__enter__):  # left in another context than entered
        pass
    assert [event.get("metadata") for event in sink.events] == [{"session_id": "s"}, {"session_id": "s"}, None]


def test_a_stage_used_again_in_what_began_inside_it_is_not_its_own_parent(tracer: Stages, sink: ListSink) -> None:
    async def program() -> None:
        stage, ended = tracer.stage("x"), asyncio.Event()

        async def background() -> None:
            await ended.wait()
            with stage:
                pass
            with tracer.stage("inner"), stage:
                pass
            with tracer.stage("y"):
                pass

        with stage:
            task = asyncio.create_task(background())
        ended.set()
        await task

    asyncio.run(program())
    assert [event["stage_type"] for event in sink.events] == ["x", "x", "x", "inner", "y"]
    assert all(event.get("parent_stage_id") != event["stage_id"] for event in sink.events)


def test_stages_of_a_task_that_outlives_its_stage_have_the_same_parent(tracer: Stages, sink: ListSink) -> None:
    async def program() -> None:
        ended = asyncio.Event()

        async def background() -> None:
            await ended.wait()
            for name in ("first", "second"):
                with tracer.stage(name):
                    pass

        with tracer.stage("request"), tracer.stage("a"):
            task = asyncio.create_task(background())
        ended.set()
        await task

    asyncio.run(program())
    by_type = {event["stage_type"]: event for event in sink.events}
    assert by_type["first"]["parent_stage_id"] == by_type["second"]["parent_stage_id"] == by_type["a"]["stage_id"]


def test_scopes_left_out_of_order_leave_nothing_behind(tracer: Stages) -> None:
    first, second, third = tracer.stage("first"), tracer.stage("second"), tracer.stage("third")
    trace = tracer.trace()
    for scope in (first, trace, second, third):
        scope.__enter__()
    for left in (first, second, trace):
        left.__exit__(None, None, None)
        assert current_stage() is third
    third.__exit__(None, None, None)
    assert open_scope.get() is None


def test_a_job_that_goes_on_in_itself_keeps_none_of_the_stages_before(tracer: Stages) -> None:
    class Document:
        """What a stage holds; stages themselves take no weak references."""

    documents: list[weakref.ref[Document]] = []

    async def program() -> None:
        done = asyncio.Event()

        def tick(left: int) -> None:
            with tracer.stage("tick") as stage:
                document = Document()
                stage.set(document=document)
                documents.append(weakref.ref(document))
                if left:
                    asyncio.get_running_loop().call_soon(tick, left - 1)
                else:
                    done.set()

        tick(1000)
        await done.wait()

    asyncio.run(program())
    gc.collect()
    assert len(documents) == 1001
    assert sum(document() is not None for document in documents) <= 2


@pytest.mark.parametrize("between", ["logged", "cached", "none"])
def test_what_is_around_a_retried_function_stays_around_it(tracer: Stages, sink: ListSink, between: str) -> None:
    calls: list[str] = []

    @tenacity.retry(stop=tenacity.stop_after_attempt(3), reraise=True)
    def fails(number: int) -> None:
        calls.append("fails")
        raise ValueError("no")

    @functools.wraps(fails)
    def logged(number: int) -> None:
        calls.append("logged")
        fails(number)

    function: Any = {"logged": logged, "cached": functools.lru_cache(fails), "none": fails}[between]
    decorated = tracer.stage("x")(function)
    with pytest.raises(ValueError, match="no"):
        decorated(1)
    assert calls.count("fails") == 3
    assert calls.count("logged") == (between == "logged")
    attempts = [(event.get("attempt", 1), event["status"]) for event in sink.events]
    assert attempts == ([(1, "error"), (2, "error"), (3, "error")] if between == "none" else [(1, "error")])
    assert (between == "cached") == hasattr(decorated, "cache_info")


def test_an_object_that_has_every_attribute_is_no_retried_function(tracer: Stages) -> None:
    class Everything:
        def __getattr__(self, name: str) -> Any:
            return lambda *_: name

        def __call__(self) -> int:
            return 1

    assert tracer.stage("x")(Everything())() == 1


def test_a_bound_object_whose_call_is_awaited_is_awaited() -> None:
    class Job:
        async def __call__(self) -> int:
            return 1

    bound = bind(Job())
    assert asyncio.iscoroutinefunction(bound)
    assert asyncio.run(bound()) == 1


@pytest.mark.parametrize("trace_id", [uuid.UUID(TRACE_ID), 5])
def test_ids_that_are_no_text_are_made_one(tracer: Stages, sink: ListSink, trace_id: Any) -> None:
    with tracer.trace(trace_id=trace_id), tracer.stage("a"):
        trace_headers()
    with tracer.stage("b", trace_id=trace_id):
        trace_headers()
    tracer.record_stage("c", trace_id=trace_id)
    expected = TRACE_ID if isinstance(trace_id, uuid.UUID) else "5"
    assert [event["trace_id"] for event in sink.events] == [expected] * 3
    Stages(Recorder("\ud800", sink)).trace().__enter__().__exit__(None, None, None)
    assert run_hash("\ud800") != run_hash("run")


def test_a_stage_of_another_trace_is_no_parent(tracer: Stages) -> None:
    with tracer.stage("a"), tracer.stage("b", trace_id=TRACE_ID) as b, tracer.stage("c") as c:
        assert (b.parent_stage_id, b.trace_id) == (None, TRACE_ID)
        assert (c.parent_stage_id, c.trace_id) == (b.stage_id, TRACE_ID)


@pytest.mark.parametrize("hostile", ["a=1\r\nX-Evil: 1", "a=보험", "c", "=d", "A=1", "a=1,b=\x7f", "a=" + "x" * 300])
def test_a_member_that_is_malformed_is_not_handed_on(tracer: Stages, hostile: str) -> None:
    parent = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
    with tracer.trace(traceparent=parent, tracestate=f"first=1,{hostile},last=2"), tracer.stage("a"):
        members = trace_headers()["tracestate"].split(",")
    assert members[0].startswith("evalvault=")
    assert members[1] == "first=1"
    assert members[-1] == "last=2"
    assert hostile not in members


def test_as_many_members_are_handed_on_as_are_allowed(tracer: Stages) -> None:
    parent = f"00-{TRACE_ID}-00f067aa0ba902b7-01"
    many = ",".join(f"m{number}=1" for number in range(60))
    with tracer.trace(traceparent=parent, tracestate=many), tracer.stage("a"):
        assert len(trace_headers()["tracestate"].split(",")) == 32
    large = ",".join(f"m{number}={'x' * 200}" for number in range(5))
    with tracer.trace(traceparent=parent, tracestate=large), tracer.stage("a"):
        kept = [member.partition("=")[0] for member in trace_headers()["tracestate"].split(",")]
    assert kept == ["evalvault", "m0", "m1"]


@pytest.mark.parametrize("option", ["on_result", "attributes"])
def test_an_interrupt_in_a_users_function_leaves_no_stage_open(tracer: Stages, sink: ListSink, option: str) -> None:
    def interrupted(_: Any) -> Any:
        raise KeyboardInterrupt

    options: dict[str, Any] = {option: interrupted}

    @tracer.stage("a", **options)
    def function() -> int:
        return 1

    with pytest.raises(KeyboardInterrupt):
        function()
    assert open_scope.get() is None
    if option == "on_result":
        assert sink.events[0]["status"] == "cancelled"


def test_arguments_of_what_cannot_be_hashed_are_captured(tracer: Stages, sink: ListSink) -> None:
    class Retriever:
        __hash__ = None  # type: ignore[assignment]

        def __call__(self, query: str) -> str:
            return query

    tracer.stage("a", capture_args=True)(Retriever())("q")
    assert sink.events[0]["attributes"] == {"query": "q"}


def test_a_stream_without_items_has_a_count_and_a_result(tracer: Stages, sink: ListSink) -> None:
    @tracer.stage("a", capture_result=True, on_result=lambda items: {"last": items[-1:]})
    def stream() -> Any:
        yield from ()

    assert list(stream()) == []
    assert sink.events[0]["attributes"] == {"item_count": 0, "result": [], "last": []}


def test_what_was_decorated_while_nothing_was_recorded_is_recorded_later(caplog: pytest.LogCaptureFixture) -> None:
    script = """
import evalvault_sdk
from evalvault_sdk.testing import record_stages
evalvault_sdk.record_stage("early")

@evalvault_sdk.stage("x")
def function():
    with evalvault_sdk.stage("inner") as stage:
        stage.set(a=1)
    return 1

assert function() == 1
evalvault_sdk.configure("run", enabled=False)

@evalvault_sdk.stage
def later():
    pass

with record_stages() as recorded:
    function(), later()
print(recorded.outline().split())
assert evalvault_sdk.flush().recorded == 0
"""
    done = run_script(script)
    assert done.stdout == "['x', 'inner', 'later']\n", done.stderr
    assert done.stderr.count("stages are not recorded: call evalvault_sdk.configure(run_id=...)") == 1


def test_the_run_of_the_environment_is_known_from_the_first_request_on(tmp_path: Any) -> None:
    script = f"""
import threading
import evalvault_sdk
from evalvault_sdk.capture.propagate import run_hash
caller = dict(traceparent="00-{TRACE_ID}-00f067aa0ba902b7-01", tracestate="evalvault=parent;" + run_hash("run-1"))
with evalvault_sdk.trace(**caller), evalvault_sdk.stage("a") as stage:
    assert stage.parent_stage_id == "parent"
    assert evalvault_sdk.trace_headers()["tracestate"].endswith(";" + run_hash("run-1"))
threads = [threading.Thread(target=evalvault_sdk.record_stage, args=("t",)) for _ in range(20)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
print(evalvault_sdk.flush())
"""
    done = run_script(script, EVALVAULT_RUN_ID="run-1", EVALVAULT_FILE=str(tmp_path / "events.jsonl"))
    assert done.stdout == "recorded 21 = delivered 21\n", done.stderr


def test_threads_that_record_while_it_is_configured_lose_nothing(tmp_path: Any) -> None:
    script = """
import threading, time
import evalvault_sdk
from evalvault_sdk import default

class SlowTracer(default.StageTracer):
    def __init__(self):
        time.sleep(0.1)
        super().__init__()

default.StageTracer = SlowTracer
threads = [threading.Thread(target=evalvault_sdk.record_stage, args=("t",)) for _ in range(20)]
[thread.start() for thread in threads], [thread.join() for thread in threads]
print(evalvault_sdk.flush())
"""
    done = run_script(script, EVALVAULT_RUN_ID="run-1", EVALVAULT_FILE=str(tmp_path / "events.jsonl"))
    assert done.stdout == "recorded 20 = delivered 20\n", done.stderr


def test_a_wrong_setting_in_the_environment_is_said_once_and_not_felt() -> None:
    script = """
import evalvault_sdk
for _ in range(3):
    evalvault_sdk.record_stage("a")
"""
    done = run_script(script, EVALVAULT_RUN_ID="run-1", EVALVAULT_API_URL="nowhere")
    assert done.returncode == 0
    assert done.stderr.count("api_url must be") == 1

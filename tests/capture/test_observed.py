"""Stages of what a framework tells of: begun and ended by its ids, in whatever thread it tells them."""

from __future__ import annotations

import contextvars
import os
import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from evalvault_sdk import StageTracer, current_stage, trace_headers
from evalvault_sdk.capture import context
from evalvault_sdk.capture import observed as observed_module
from evalvault_sdk.capture.clock import clock
from evalvault_sdk.capture.observed import EVICTED, ObservedStages
from evalvault_sdk.testing import FakeClock, RecordedStages, record_stages

running: contextvars.ContextVar[str | None] = contextvars.ContextVar("running", default=None)


@pytest.fixture
def tracer() -> Iterator[StageTracer]:
    with StageTracer("r", "http://127.0.0.1:1", durability="memory", shutdown_timeout_s=0.1) as made:
        yield made


@pytest.fixture
def recorded(tracer: StageTracer) -> Iterator[RecordedStages]:
    with record_stages(tracer) as stages:
        yield stages


@pytest.fixture
def observed(tracer: StageTracer) -> Iterator[ObservedStages]:
    made = ObservedStages(tracer, running.get)
    made.attach()
    yield made
    made.detach()
    assert context.finders == ()


def run(observed: ObservedStages, key: str, parent: str | None, body: Callable[[], Any] = lambda: None) -> None:
    """Do as a framework does: tell of the beginning, run the body in a context of its own, tell of the end."""

    def inside() -> None:
        running.set(key)
        body()

    observed.begin(key, parent, key)
    contextvars.copy_context().run(inside)
    observed.end(key)


def test_parents_are_those_that_the_framework_names(observed: ObservedStages, recorded: RecordedStages) -> None:
    def body() -> None:
        run(observed, "retriever", "chain")
        run(observed, "llm", "chain")

    run(observed, "chain", None, body)
    assert recorded.outline() == "chain\n  retriever\n  llm"
    assert len({event.trace_id for event in recorded.events}) == 1
    assert len(observed) == 0


def test_a_stage_of_the_program_is_below_the_observed_one_it_runs_in_and_around_those_it_runs(
    tracer: StageTracer, observed: ObservedStages, recorded: RecordedStages
) -> None:
    def own() -> None:
        with tracer.stage("own"):
            tracer.record_stage("note")
            run(observed, "inner", "chain")
        tracer.record_stage("later")

    with tracer.stage("request"):
        run(observed, "chain", None, own)
        tracer.record_stage("after")
    assert recorded.outline() == "request\n  chain\n    own\n      note\n      inner\n    later\n  after"


def test_what_runs_in_the_context_of_a_sibling_is_below_the_parent_that_was_named(
    observed: ObservedStages, recorded: RecordedStages
) -> None:
    # LangChain's streams: the last step's context is where the first one is begun.
    def pulled() -> None:
        run(observed, "first", "sequence")

    run(observed, "sequence", None, lambda: run(observed, "last", "sequence", pulled))
    assert recorded.outline() == "sequence\n  last\n  first"


def test_the_program_finds_its_context_as_it_was(
    tracer: StageTracer, observed: ObservedStages, recorded: RecordedStages
) -> None:
    # A framework that sets its variable in the caller's own context, and takes it back.
    def own() -> None:
        with tracer.stage("own"):
            pass
        with tracer.trace():
            tracer.record_stage("apart")

    with tracer.stage("request") as request:
        observed.begin("tool", None, "tool")
        token = running.set("tool")
        own()
        running.reset(token)
        observed.end("tool")
        assert current_stage() is request
        tracer.record_stage("after")
    assert current_stage() is not request
    assert recorded.outline() == "request\n  tool\n    own\n  after\napart"


def test_a_stage_left_out_of_order_leaves_the_context_clean(
    tracer: StageTracer, observed: ObservedStages, recorded: RecordedStages
) -> None:
    outer = tracer.stage("outer").__enter__()
    observed.begin("tool", None, "tool")
    token = running.set("tool")
    inner = tracer.stage("inner").__enter__()
    outer.__exit__(None, None, None)
    running.reset(token)
    observed.end("tool")
    inner.__exit__(None, None, None)
    assert context.open_scope.get() is None
    assert recorded.outline() == "outer\n  tool\n    inner"


def test_code_below_can_say_what_it_learnt_and_call_another_service(
    observed: ObservedStages, recorded: RecordedStages
) -> None:
    headers: dict[str, str] = {}

    def body() -> None:
        current_stage().set(found=3)
        headers.update(trace_headers())

    run(observed, "tool", None, body)
    (event,) = recorded.events
    assert event.attributes == {"found": 3}
    assert headers["traceparent"].split("-")[1:3] == [event.trace_id, event.span_id]


def test_what_begins_after_its_parent_ended_is_below_it_all_the_same(
    observed: ObservedStages, recorded: RecordedStages
) -> None:
    run(observed, "chat", None)
    thread = threading.Thread(target=run, args=(observed, "stream", "chat"))
    thread.start()
    thread.join()
    assert recorded.outline() == "chat\n  stream"


def test_what_is_left_out_hands_its_children_to_its_parent(observed: ObservedStages, recorded: RecordedStages) -> None:
    observed.begin("chain", None, "chain")
    observed.leave_out("plumbing", "chain")
    run(observed, "llm", "plumbing")
    observed.end("plumbing")
    observed.end("chain")
    assert recorded.outline() == "chain\n  llm"


def test_a_stage_of_the_program_in_what_is_left_out_is_below_the_parent_of_that(
    tracer: StageTracer, observed: ObservedStages, recorded: RecordedStages
) -> None:
    observed.begin("chain", None, "chain")
    observed.leave_out("lambda", "chain")
    token = running.set("lambda")
    tracer.record_stage("own")
    observed.end("chain")
    tracer.record_stage("afterwards")
    running.reset(token)
    assert recorded.outline() == "chain\n  own\nafterwards"


def test_nothing_of_a_parents_content_is_kept_for_what_was_left_out_and_has_ended(
    observed: ObservedStages, recorded: RecordedStages
) -> None:
    observed.begin("chain", None, "chain", attributes={"query": "secret"})
    observed.leave_out("plumbing", "chain")
    observed.end("plumbing")
    run(observed, "late", "plumbing")
    observed.end("chain")
    assert recorded.outline() == "chain\n  late"
    assert not any(hasattr(scope, "attributes") for scope in observed._known.values())


def test_what_is_taken_is_recorded_by_whoever_took_it_and_never_given_up(
    tracer: StageTracer, recorded: RecordedStages
) -> None:
    observed = ObservedStages(tracer, max_open=1)
    observed.begin("llm", None, "output")
    stage = observed.take("llm")
    assert stage is not None
    assert observed.take("llm") is None
    run(observed, "late", "llm")
    observed.end("llm")
    observed.close()
    assert recorded.outline() == "late"
    stage._end(None, clock.perf_counter_ns())
    assert recorded.outline() == "output\n  late"
    assert observed.knows("llm")
    assert not observed.knows("other")


def test_an_error_is_recorded_and_an_end_that_is_told_twice_counts_once(
    observed: ObservedStages, recorded: RecordedStages
) -> None:
    observed.begin("llm", "unknown", "output")
    observed.end("llm", TimeoutError("too slow"))
    observed.end("llm")
    (event,) = recorded.events
    assert (event.status, event.attributes["error"]["type"]) == ("error", "TimeoutError")
    assert event.parent_stage_id is None


def test_what_never_ends_is_given_up_the_oldest_first(tracer: StageTracer, recorded: RecordedStages) -> None:
    observed = ObservedStages(tracer, max_open=3)
    for number in range(10):
        observed.begin(number, None, f"run-{number}")
    assert len(observed) == 3
    assert [(event.stage_type, event.status) for event in recorded.events] == [
        (f"run-{number}", "cancelled") for number in range(7)
    ]
    assert {event.attributes["cancelled_by"] for event in recorded.events} == {EVICTED}


def test_what_is_open_for_too_long_is_given_up(tracer: StageTracer, recorded: RecordedStages) -> None:
    with FakeClock() as clock:
        observed = ObservedStages(tracer, max_open_s=60)
        observed.begin("old", None, "old")
        clock.advance(59)
        observed.begin("new", None, "new")
        assert len(observed) == 2
        clock.advance(2)
        observed.begin("newest", None, "newest")
        assert [event.stage_type for event in recorded.events] == ["old"]


def test_what_is_remembered_of_the_ended_is_bounded_and_holds_no_content(
    tracer: StageTracer, recorded: RecordedStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evalvault_sdk.capture.observed._MAX_ENDED", 10)
    observed = ObservedStages(tracer)
    for number in range(100):
        observed.begin(number, number - 1, "run", attributes={"query": "secret"})
        observed.end(number)
    assert len(observed._known) == 10
    assert not any(hasattr(scope, "attributes") for scope in observed._known.values())


def test_threads_that_begin_and_end_at_once_lose_nothing(tracer: StageTracer, recorded: RecordedStages) -> None:
    observed = ObservedStages(tracer, max_open=50)

    def work(name: int) -> None:
        for number in range(300):
            run(observed, f"{name}-{number}", None)

    threads = [threading.Thread(target=work, args=(name,)) for name in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(recorded.events) == 2_400
    assert len(observed) == 0


def test_a_forked_child_leaves_to_its_parent_what_the_parent_began(
    tracer: StageTracer, recorded: RecordedStages
) -> None:
    observed = ObservedStages(tracer, max_open=1)
    observed.begin("parents", None, "parents")
    pid = os.fork()
    if pid == 0:
        observed.begin("childs", None, "childs")
        os._exit(0 if len(observed) == 1 and not recorded.events else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    observed.end("parents")
    assert [event.stage_type for event in recorded.events] == ["parents"]


def test_where_nothing_is_recorded_nothing_is_kept() -> None:
    with StageTracer("r", "http://127.0.0.1:1", enabled=False) as tracer:
        observed = ObservedStages(tracer)
        assert observed.begin("a", None, "a") is None
        observed.leave_out("b", "a")
        observed.end("a")
        assert (len(observed), len(observed._known)) == (0, 0)


def test_a_finder_that_fails_finds_nothing(tracer: StageTracer, recorded: RecordedStages) -> None:
    def broken() -> str:
        raise RuntimeError("of another version")

    observed = ObservedStages(tracer, broken)
    observed.attach()
    with tracer.stage("own"):
        pass
    observed.detach()
    assert recorded.outline() == "own"


def test_closing_ends_what_is_open(tracer: StageTracer, recorded: RecordedStages) -> None:
    observed = ObservedStages(tracer)
    observed.begin("a", None, "a")
    observed.close("uninstrumented")
    assert recorded.find("a").attributes == {"cancelled_by": "uninstrumented"}
    assert len(observed) == 0


def test_what_is_entered_is_around_what_goes_on_until_it_ends(
    tracer: StageTracer, observed: ObservedStages, recorded: RecordedStages
) -> None:
    def enter(key: str) -> None:
        stage = observed.begin(key, None, key)
        assert stage is not None
        observed.enter(stage)

    with tracer.stage("request"):
        enter("retriever")
        with tracer.stage("search"):
            enter("embedding")
            tracer.record_stage("call")
            observed.end("embedding")
            tracer.record_stage("found")
        run(observed, "chain", None, lambda: tracer.record_stage("in the chain"))
        observed.end("retriever")
        tracer.record_stage("after")
    outline = (
        "request\n  retriever\n    search\n      embedding\n        call\n      found\n    chain\n      in the chain"
    )
    assert recorded.outline() == outline + "\n  after"


def test_the_end_of_what_was_entered_may_be_told_in_another_context(
    tracer: StageTracer, observed: ObservedStages, recorded: RecordedStages
) -> None:
    for number in range(1_000):
        stage = observed.begin(number, None, "retriever")
        assert stage is not None
        observed.enter(stage)
        contextvars.copy_context().run(observed.end, number)
    tracer.record_stage("after")
    assert [event.parent_stage_id for event in recorded.events] == [None] * 1_001
    entered = observed_module._entered.get()
    assert entered is not None
    assert entered[1] is None, "ended ones are not kept in a chain"
    del stage
    assert entered[0]() is None


def test_a_tracer_does_not_find_what_was_entered_for_another(
    tracer: StageTracer, observed: ObservedStages, recorded: RecordedStages
) -> None:
    stage = observed.begin("retriever", None, "retriever")
    assert stage is not None
    observed.enter(stage)
    with StageTracer("another", "http://127.0.0.1:1", durability="memory", shutdown_timeout_s=0.1) as other:
        others = ObservedStages(other)
        others.attach()
        observed.detach()
        assert current_stage() is not stage
        others.detach()
    observed.attach()
    assert current_stage() is stage


def test_what_is_open_when_recording_ends_is_recorded(recorded: RecordedStages, tracer: StageTracer) -> None:
    class Source:
        def __init__(self) -> None:
            self.observed = ObservedStages(tracer)

        def close(self, why: str) -> None:
            self.observed.close(why)

    source, broken = Source(), Source()
    broken.observed = None  # type: ignore[assignment]
    tracer._recorder.add_source(broken)
    tracer._recorder.add_source(source)
    source.observed.begin("a", None, "a")
    tracer.shutdown(0.1)
    assert recorded.find("a").attributes == {"cancelled_by": "shutdown"}
    assert recorded.refused == {"internal_error": 1}

"""What the package offers to the tests of its users."""

from __future__ import annotations

import asyncio

import pytest

import evalvault_sdk
from evalvault_sdk import StageTracer, current_stage
from evalvault_sdk.capture.clock import clock
from evalvault_sdk.testing import CapturingTransport, FakeClock, RecordedStages, record_stages

pytest_plugins = ["pytester"]


@evalvault_sdk.stage("retrieval")
def retrieve(query: str) -> list[str]:
    current_stage().set(query=query, top_k=5)
    return ["doc-1"]


@evalvault_sdk.stage("request")
async def answer(query: str) -> str:
    documents = retrieve(query)
    with evalvault_sdk.stage("output") as stage:
        stage.skip("nothing to say")
    await asyncio.sleep(0)
    return documents[0]


def test_the_fixture_gives_what_was_recorded_as_a_tree(evalvault_stages: RecordedStages) -> None:
    assert asyncio.run(answer("보험")) == "doc-1"
    assert evalvault_stages.outline().splitlines() == ["request", "  retrieval", "  output (skipped)"]
    assert evalvault_stages.find("retrieval").attributes == {"query": "보험", "top_k": 5}
    (root,) = evalvault_stages.roots
    assert [child.stage_type for child in root.children] == ["retrieval", "output"]
    assert root.find("output").status == "skipped"
    assert len(evalvault_stages) == len(evalvault_stages.events) == 3
    with pytest.raises(LookupError, match="0 stages of the type 'rerank'; recorded were: request, retrieval, output"):
        evalvault_stages.find("rerank")
    retrieve("again")
    with pytest.raises(LookupError, match="2 stages"):
        evalvault_stages.find("retrieval")
    evalvault_stages.clear()
    assert evalvault_stages.outline() == ""


def test_a_tracer_of_the_program_is_watched_and_afterwards_as_before() -> None:
    transport = CapturingTransport()
    with StageTracer("run", transport=transport, sample_rate=0.0) as tracer:
        with record_stages(tracer) as recorded, tracer.stage("seen"):
            pass
        assert [event.stage_type for event in recorded.events] == ["seen"]
        assert recorded.events[0].run_id == "run"
        with tracer.stage("not drawn"):
            pass
        tracer.record_stage("failed", status="error")
    assert [event.stage_type for event in transport.events] == ["failed"]
    assert tracer.stats().sampled_out == 1


def test_the_clock_stands_still_until_it_is_advanced() -> None:
    real = (clock.time_ns, clock.perf_counter_ns)
    with record_stages() as recorded, FakeClock(1_767_780_000) as fake, evalvault_sdk.stage("outer"):
        for name in ("first", "second"):
            with evalvault_sdk.stage(name):
                fake.advance(1.5)
        fake.advance(2)
    assert (clock.time_ns, clock.perf_counter_ns) == real
    assert recorded.outline().splitlines() == ["outer", "  first", "  second"]
    assert recorded.find("first").event.duration_ms == 1500
    assert recorded.find("outer").event.duration_ms == 5000
    started = recorded.find("second").event.started_at
    assert started is not None
    assert started.isoformat(timespec="milliseconds") == "2026-01-07T10:00:01.500+00:00"


def test_a_transport_for_tests_keeps_what_is_delivered() -> None:
    transport = CapturingTransport()
    tracer = StageTracer("run", transport=transport)
    tracer.record_stage("a")
    assert tracer.flush().complete
    assert [(event.run_id, event.stage_type) for event in transport.events] == [("run", "a")]
    tracer.shutdown()


def test_the_fixture_is_there_in_any_project(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(
        """
        import evalvault_sdk

        @evalvault_sdk.stage
        def rerank():
            pass

        def test_it(evalvault_stages):
            rerank()
            assert evalvault_stages.outline() == "rerank"

        def test_the_next_one_begins_empty(evalvault_stages):
            assert evalvault_stages.events == []
        """
    )
    pytester.runpytest_subprocess("-p", "no:cacheprovider").assert_outcomes(passed=2)

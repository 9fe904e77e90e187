"""The functions of the package, and the tools that watch them: never half the old way and half the new one."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

import evalvault_sdk
from evalvault_sdk import FolderPayloadStore, StageTracer
from evalvault_sdk.capture.clock import clock
from evalvault_sdk.capture.observed import ObservedStages
from evalvault_sdk.default import DefaultTracer
from evalvault_sdk.testing import CapturingTransport, FakeClock, RecordedStages, record_stages
from tests.support import run_script

SLOW = """
import os, signal, sys, threading, time
import evalvault_sdk
from evalvault_sdk import default

class SlowTracer(default.StageTracer):
    def __init__(self, *args, **settings):
        if not args and not settings:
            time.sleep(0.3)
        super().__init__(*args, **settings)

default.StageTracer = SlowTracer
first = threading.Thread(target=evalvault_sdk.record_stage, args=("first",))
first.start()
time.sleep(0.1)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_child_forked_while_it_is_configured_records(tmp_path: Path) -> None:
    script = """
child = os.fork()
if child == 0:
    signal.alarm(10)
    with evalvault_sdk.stage("child"):
        pass
    evalvault_sdk.flush()
    os._exit(0)
_, status = os.waitpid(child, 0)
assert status == 0, status
first.join()
evalvault_sdk.flush()
"""
    done = run_script(SLOW + script, EVALVAULT_RUN_ID="r", EVALVAULT_FILE=str(tmp_path / "events.jsonl"))
    assert done.returncode == 0, done.stderr
    lines = (tmp_path / "events.jsonl").read_text(encoding="utf-8").splitlines()
    assert sorted(orjson.loads(line)["stage_type"] for line in lines) == ["child", "first"]


def test_what_the_code_configures_wins_over_the_environment_at_any_moment(tmp_path: Path) -> None:
    script = f"""
tracer = evalvault_sdk.configure("explicit", file={str(tmp_path / "explicit.jsonl")!r}, content="none")
first.join()
evalvault_sdk.record_stage("later", attributes={{"query": "text"}})
assert tracer.flush().recorded >= 1
"""
    done = run_script(SLOW + script, EVALVAULT_RUN_ID="env", EVALVAULT_FILE=str(tmp_path / "env.jsonl"))
    assert done.returncode == 0, done.stderr
    events = [orjson.loads(line) for line in (tmp_path / "explicit.jsonl").read_bytes().splitlines()]
    assert events[-1]["run_id"] == "explicit"
    assert events[-1]["attributes"] == {"query_length": 4}


def test_settings_are_replaced_as_one(tmp_path: Path) -> None:
    default = DefaultTracer()
    transports = CapturingTransport(), CapturingTransport()
    open_one = StageTracer("open", transport=transports[0])
    closed_one = StageTracer("closed", transport=transports[1], content="none")
    default._recorder.use(open_one)
    stop = threading.Event()

    def record() -> None:
        while not stop.is_set():
            default.record_stage("x", attributes={"query": "a text"})

    threads = [threading.Thread(target=record) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(200):
        for tracer in (closed_one, open_one):
            default._recorder.use(tracer)
            time.sleep(0.001)
    stop.set()
    for thread in threads:
        thread.join()
    open_one.shutdown()
    closed_one.shutdown()
    assert transports[1].events
    assert all("query" not in event.attributes for event in transports[1].events)


def test_an_event_with_a_run_of_its_own_keeps_it() -> None:
    with record_stages() as recorded:
        evalvault_sdk.record_batch([{"run_id": "other", "stage_type": "x"}, {"stage_type": "y"}])
    assert [event.run_id for event in recorded.events] == ["other", "test"]


def test_what_is_switched_off_costs_little_as_a_function_of_the_package_too() -> None:
    script = """
import timeit
import evalvault_sdk
def run():
    with evalvault_sdk.stage("x") as stage:
        stage.set(a=1)
        stage.attributes["b"] = 2
        stage.status = "odd"
run()
off = min(timeit.repeat(run, number=2000, repeat=5))
assert evalvault_sdk.trace_headers() == {}
with evalvault_sdk.trace():
    assert evalvault_sdk.trace_headers() == {}
evalvault_sdk.configure("r", file="events.jsonl")
on = min(timeit.repeat(run, number=2000, repeat=5))
print(off / on)
"""
    done = run_script(f"import os, tempfile\nos.chdir(tempfile.mkdtemp())\n{script}", EVALVAULT_SDK_DISABLED="")
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.5


def test_a_program_that_configures_itself_during_a_test_delivers_nothing(evalvault_stages: RecordedStages) -> None:
    tracer = evalvault_sdk.configure("prod", api_url="http://127.0.0.1:1")
    with evalvault_sdk.stage("request"):
        pass
    assert evalvault_stages.outline() == "request"
    assert evalvault_stages.events[0].run_id == "prod"
    assert tracer.stats().recorded == 0


def test_after_a_test_a_program_records_as_it_was_configured_last() -> None:
    transport = CapturingTransport()
    with record_stages():
        tracer = StageTracer("later", transport=transport)
        evalvault_sdk.stage.__self__._recorder.use(tracer)  # type: ignore[attr-defined]
    evalvault_sdk.record_stage("x")
    assert tracer.flush().delivered == 1
    tracer.shutdown()


def test_recordings_may_end_in_any_order(tmp_path: Path) -> None:
    transport = CapturingTransport()
    tracer = StageTracer("r", transport=transport, payload_store=FolderPayloadStore(tmp_path / "payloads"))
    outer, inner = record_stages(tracer), record_stages(tracer)
    first, second = outer.__enter__(), inner.__enter__()
    with tracer.stage("a") as stage:
        stage.save_output({"large": 1})
    outer.__exit__(None, None, None)
    tracer.record_stage("b")
    inner.__exit__(None, None, None)
    tracer.record_stage("c")
    assert tracer.shutdown().delivered == 1
    assert (first.outline(), second.outline().split()) == ("", ["a", "b"])
    assert second.payloads.get(second.find("a").event.output_ref.to_dict()) == b'{"large":1}'  # type: ignore[union-attr]
    assert not (tmp_path / "payloads").exists()


def test_a_clock_may_be_entered_again() -> None:
    real = clock.time_ns
    fake = FakeClock()
    with fake, fake:
        pass
    assert clock.time_ns is real


class Unbound:
    """Raises when it is looked at, as a proxy of a request does where there is none."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("outside of a request")


def test_odd_arguments_are_not_felt(evalvault_stages: RecordedStages) -> None:
    parent: Any = Unbound()
    with evalvault_sdk.stage("a", parent=parent) as stage:
        stage.set(**{"self": 1})
    evalvault_sdk.record_stage("b", parent=parent)
    assert evalvault_stages.find("a").attributes == {"self": 1}


def test_a_dict_that_is_assigned_is_not_changed(evalvault_stages: RecordedStages) -> None:
    row = {"a": 1}
    with evalvault_sdk.stage("x") as stage:
        stage.attributes = row
        stage.set(b=2)
        stage.attributes["c"] = 3
        stage.fail("no")
    assert row == {"a": 1}
    assert set(evalvault_stages.find("x").attributes) == {"a", "b", "c", "error"}


def test_what_is_given_to_a_decorator_is_not_copied_deeply(evalvault_stages: RecordedStages) -> None:
    class Index:
        def __deepcopy__(self, memo: Any) -> Any:
            raise AssertionError("copied")

    cycle: list[Any] = []
    cycle.extend([cycle] * 1000)

    @evalvault_sdk.stage("x", attributes={"index": Index(), "tags": [], "cycle": cycle})
    def function() -> None:
        evalvault_sdk.current_stage().attributes["tags"].append(1)

    function()
    function()
    assert [event.attributes["tags"] for event in evalvault_stages.events] == [[1], [1]]


def test_a_misspelt_argument_is_said_when_it_is_decorated(caplog: pytest.LogCaptureFixture) -> None:
    with record_stages() as recorded:

        @evalvault_sdk.stage("x", capture_args=["qeury", "top_k"])
        def function(query: str, **options: int) -> None:
            pass

        assert caplog.records == []  # it may be among the options

        @evalvault_sdk.stage("x", capture_args=["qeury"])
        def other(query: str) -> None:
            pass

        function("q", top_k=5)
    assert "capture_args names 'qeury'" in caplog.text
    assert recorded.events[0].attributes == {"top_k": 5}


def test_captured_arguments_keep_no_text_either() -> None:
    transport = CapturingTransport()
    tracer = StageTracer("r", transport=transport, content="none")

    @tracer.stage("f", capture_args=True)
    def function(query: str, doc_id: str, doc_ids: list[str], texts: list[str]) -> None:
        pass

    function("hello", "d1", ["d1", "d2"], ["a", "b", "c"])
    tracer.shutdown()
    attributes = transport.events[0].attributes
    assert attributes == {"query_length": 5, "doc_id": "d1", "doc_ids": ["d1", "d2"], "texts_count": 3}


def test_secrets_under_long_keys_and_in_references_are_found(evalvault_stages: RecordedStages) -> None:
    secret = "hunter" + "22"
    reference: Any = {"store": "s3", "id": "i", "type": "json", "password": secret}
    key = "x" * 300 + "_password"
    with evalvault_sdk.stage("a", attributes={key: secret}, input_ref=reference):
        pass
    with evalvault_sdk.stage("b", attributes={"점수": 0.9, "nested": {key: secret}}):
        pass
    assert secret.encode() not in b"".join(evalvault_stages._encoded)
    assert evalvault_stages.find("b").attributes["점수"] == 0.9


def test_a_trace_that_is_entered_again_is_sampled_as_one() -> None:
    transport = CapturingTransport()
    tracer = StageTracer("r", transport=transport, sample_rate=0.0)
    trace = tracer.trace()
    with trace:
        pass
    with trace:
        with tracer.stage("ok"):
            pass
        with tracer.stage("failed") as stage:
            stage.fail("no")
    assert tracer.shutdown().delivered == 2


def test_what_a_framework_has_open_is_recorded_before_the_end() -> None:
    tracer = DefaultTracer()
    observed = ObservedStages(tracer)
    tracer._recorder.add_source(observed)
    with record_stages(tracer) as recorded:
        observed.begin("query-1", None, "chain")
        tracer.shutdown(0.1)
        assert recorded.find("chain").attributes == {"cancelled_by": "shutdown"}

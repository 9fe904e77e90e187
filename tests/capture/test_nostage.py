"""What stands in for a stage where nothing is recorded: it takes everything, keeps nothing and never fails."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest

import evalvault_sdk
from evalvault_sdk import StageTracer, current_stage
from evalvault_sdk.capture.nostage import NO_STAGE, dormant
from evalvault_sdk.capture.stage import StageContext
from tests.support import run_script


@pytest.fixture(params=["of a tracer that is off", "current", "of the package"])
def nothing(request: pytest.FixtureRequest) -> Iterator[StageContext]:
    with StageTracer("run", enabled=False) as off:
        ways: dict[str, Callable[[], StageContext]] = {
            "of a tracer that is off": lambda: off.stage("x"),
            "current": current_stage,
            "of the package": lambda: dormant(lambda: NO_STAGE),
        }
        yield ways[request.param]()


def test_it_has_all_that_a_stage_has(nothing: StageContext) -> None:
    for name in dir(StageContext):
        if not name.startswith("_"):
            getattr(nothing, name)
    assert (nothing.stage_id, nothing.span_id, nothing.trace_id, nothing.parent_stage_id) == (None, None, None, None)
    assert (nothing.stage_type, nothing.status, nothing.attempt) == ("none", "success", 1)


def test_it_keeps_nothing_of_what_it_is_told(nothing: StageContext) -> None:
    with nothing as entered:
        entered.set(a=1)
        entered.attributes["b"] = 2
        entered.attributes = {"c": 3}
        entered.metadata["d"] = 4
        entered.fail("for a reason")
        entered.skip("for another")
        entered.save_input("large")
        entered.save_output("large")
        entered.stage_name, entered.status, entered.attempt = "name", "error", 7
        entered.input_ref = {"store": "s", "id": "i"}
    assert (nothing.attributes, nothing.metadata) == ({}, {})
    assert (nothing.stage_name, nothing.status, nothing.attempt, nothing.input_ref) == (None, "success", 1, None)


def test_it_is_its_own_copy(nothing: StageContext) -> None:
    @dataclasses.dataclass
    class State:
        stage: Any

    assert copy.copy(nothing) is nothing
    assert copy.deepcopy(nothing) is nothing
    assert dataclasses.asdict(State(nothing)) == {"stage": nothing}


def test_the_package_s_stage_is_one_where_recording_is_switched_off() -> None:
    script = """
import evalvault_sdk
evalvault_sdk.configure("r", enabled=False)
with evalvault_sdk.stage("x") as stage:
    assert stage.stage_id is stage.span_id is stage.parent_stage_id is None
    stage.save_output("large")
    stage.fail("no")
assert stage.status == "success"
"""
    done = run_script(script)
    assert done.returncode == 0, done.stderr
    assert evalvault_sdk.current_stage().status == "success"

from __future__ import annotations

import collections
import dataclasses
import datetime as dt
import decimal
import enum
import pathlib
import re
import subprocess
import sys
import textwrap
import threading
import uuid
import weakref
from typing import Any

import attrs
import numpy as np
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from evalvault_sdk.capture.draft import iso_time
from evalvault_sdk.capture.encode import Encoder
from evalvault_sdk.capture.recorder import Recorder
from evalvault_sdk.errors import describe_error
from evalvault_sdk.events import StageEvent
from tests.support import ListSink, clean_environment


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Point:
    x: int
    hidden: object


@attrs.define
class Size:
    width: int


class Model:
    def model_dump(self) -> dict[str, Any]:
        return {"name": "gpt"}


class Hostile:
    """Every way to look at it raises."""

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("no")

    def __repr__(self) -> str:
        raise RuntimeError("no")


class HostileMapping(dict[str, Any]):
    def copy(self) -> Any:
        raise RuntimeError("no")

    def items(self) -> Any:
        raise RuntimeError("no")


def encode(fields: dict[str, Any]) -> bytes:
    event = Encoder().encode(
        {"stage_type": "x", "status": "success", "attributes": {}, **fields}, Recorder("r", ListSink())
    )
    assert event is not None
    return event


def encoded(value: Any) -> Any:
    return orjson.loads(encode({"attributes": {"value": value}}))["attributes"]["value"]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"한국어": "보험"}, {"한국어": "보험"}),
        (float("nan"), None),
        ([1.5, float("inf")], [1.5, None]),
        (10**30, str(10**30)),
        (-(2**63), -(2**63)),
        ({1: "a", None: "b", ("t",): "c"}, {"1": "a", "None": "b", "('t',)": "c"}),
        ({Colour.RED: Colour.RED}, {"red": "red"}),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7),
        (np.array([[1, 2], [3, 4]]), [[1, 2], [3, 4]]),
        (np.array([1, 2, 3, 4])[::2], [1, 3]),
        (np.float16(0.5), 0.5),
        (dt.datetime(2026, 1, 7), "2026-01-07T00:00:00+00:00"),
        (dt.date(2026, 1, 7), "2026-01-07"),
        (dt.timedelta(seconds=1), "datetime.timedelta(seconds=1)"),
        (uuid.UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (decimal.Decimal("1.5"), 1.5),
        (b"abc", "<3 bytes>"),
        (pathlib.PurePosixPath("/a/b"), "/a/b"),
        (collections.deque([1, 2]), [1, 2]),
        ((1, 2), [1, 2]),
        (Point(1, {2}), {"x": 1, "hidden": [2]}),
        (Size(3), {"width": 3}),
        (Model(), {"name": "gpt"}),
        (ValueError("boo"), {"type": "ValueError", "message": "boo"}),
        (int, "int"),
        ("a\ud800b", "a?b"),
        ({"bad\udfff": 1}, {"bad?": 1}),
    ],
)
def test_a_python_object_becomes_json(value: Any, expected: Any) -> None:
    assert encoded(value) == expected


def test_an_object_that_raises_however_it_is_looked_at_is_named() -> None:
    assert encoded([Hostile(), 1]) == ["<Hostile that cannot be shown>", 1]


def test_an_object_that_cannot_even_be_asked_for_its_class_costs_its_own_place() -> None:
    class Document:
        pass

    gone = weakref.proxy(Document())
    assert encoded({"query": "q", "document": gone, "list": [1, gone]}) == {
        "query": "q",
        "document": "<ProxyType that cannot be shown>",
        "list": [1, "<ProxyType that cannot be shown>"],
    }


def test_sets_become_lists() -> None:
    assert sorted(encoded({3, 1, 2})) == [1, 2, 3]


def test_an_odd_value_costs_its_own_place_only() -> None:
    assert encoded({"good": 1, "big": 10**30, "also good": "x"}) == {"good": 1, "big": str(10**30), "also good": "x"}


def test_a_cycle_ends() -> None:
    cycle: dict[str, Any] = {"a": 1}
    cycle["self"] = cycle
    assert encoded(cycle) == {"a": 1, "self": "<dict: contains itself>"}


def test_a_repeated_object_is_no_cycle() -> None:
    shared = {10**30}
    assert encoded([shared, shared]) == [[str(10**30)], [str(10**30)]]


def test_depth_is_bounded() -> None:
    deep: Any = 1
    for _ in range(10_000):
        deep = [deep]
    assert "nested too deeply" in encode({"value": deep}).decode()


def test_the_number_of_values_looked_at_is_bounded() -> None:
    wide = orjson.loads(encode({"attributes": {"wide": [10**30] * 100_000}, "metadata": {1: "m"}, "trace_id": "t"}))
    values = wide["attributes"]["wide"]
    left_out = re.fullmatch(r"\.\.\. \(truncated: ([\d,]+) of 100,000 left out\)", values.pop())
    assert left_out is not None
    assert 1000 < len(values) <= 10_000
    assert len(values) + int(left_out[1].replace(",", "")) == 100_000
    assert (wide["trace_id"], wide["metadata"]) == ("t", {"1": "m"}), "other fields do not pay for it"
    keys = encoded({number: number for number in range(50_000)})
    assert keys["..."] == f"(truncated: {50_000 - len(keys) + 1:,} more left out)"


def test_a_hostile_container_is_named_not_fatal() -> None:
    assert encoded({"x": HostileMapping(a=10**30), "y": 1}) == {"x": "<HostileMapping that cannot be shown>", "y": 1}


def test_an_iterator_is_not_consumed() -> None:
    numbers = iter([1, 2, 3])
    encoded(numbers)
    assert next(numbers) == 1


def test_a_dict_that_another_thread_fills_does_no_harm() -> None:
    shared: dict[Any, Any] = {0: {1}}
    stop = threading.Event()

    def fill() -> None:
        number = 0
        while not stop.is_set():
            number += 1
            shared[number % 500] = number
            shared.pop((number * 7) % 500, None)

    filler = threading.Thread(target=fill)
    filler.start()
    try:
        for _ in range(500):
            orjson.loads(encode({"value": shared}))
    finally:
        stop.set()
        filler.join()


def test_keyboard_interrupt_is_not_swallowed() -> None:
    class Interrupted:
        def __repr__(self) -> str:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        encode({"value": Interrupted()})


def test_an_error_is_described_by_its_qualified_type_even_if_its_message_fails() -> None:
    class SilentError(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no")

    described = describe_error(SilentError())
    assert described["type"].endswith("SilentError")
    assert "cannot be shown" in described["message"]
    assert describe_error(KeyError("k")) == {"type": "KeyError", "message": "'k'"}
    assert describe_error(orjson.JSONDecodeError("m", "", 0))["type"] == "orjson.JSONDecodeError"


def test_times_have_microseconds_and_an_offset() -> None:
    assert iso_time(1_767_780_000_000_001_999) == "2026-01-07T10:00:00.000001+00:00"
    assert iso_time(1_767_780_000_999_999_999) == "2026-01-07T10:00:00.999999+00:00"
    assert iso_time(0) == "1970-01-01T00:00:00.000000+00:00"
    assert iso_time(-1) == "1969-12-31T23:59:59.999999+00:00"


json_like = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary() | st.characters(),
    lambda children: (
        st.lists(children)
        | st.dictionaries(st.text() | st.integers() | st.none() | st.floats(), children)
        | st.tuples(children, children)
        | st.frozensets(st.integers() | st.text())
    ),
    max_leaves=30,
)


@given(json_like)
def test_whatever_is_recorded_arrives_as_json_that_the_rules_accept(value: Any) -> None:
    event = orjson.loads(encode({"run_id": "r", "stage_type": "x", "attributes": {"value": value}}))
    assert "value" in StageEvent.from_dict(event).attributes


def test_another_thread_that_fills_a_dict_does_not_crash_the_interpreter() -> None:
    # In a process of its own: what it guards against is a segmentation fault.
    script = textwrap.dedent(
        """
        import datetime, sys, threading, time
        from evalvault_sdk.capture.encode import Encoder
        from evalvault_sdk.capture.nostage import NOWHERE

        class PythonZone(datetime.tzinfo):
            def utcoffset(self, when):
                return datetime.timedelta(0)

        sys.setswitchinterval(1e-6)
        shared, stop = {}, False

        def fill():
            number = 0
            while not stop:
                number += 1
                shared[f"token {number % 5000}"] = {number}
                shared[f"time {number % 50}"] = datetime.datetime(2026, 1, 7, tzinfo=PythonZone())
                if number % 5000 == 0:
                    shared.clear()

        filler = threading.Thread(target=fill)
        filler.start()
        until = time.monotonic() + 3
        while time.monotonic() < until:
            Encoder().encode({"stage_type": "x", "status": "x", "attributes": shared}, NOWHERE)
        stop = True
        filler.join()
        """
    )
    done = subprocess.run([sys.executable, "-c", script], env=clean_environment(), capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()

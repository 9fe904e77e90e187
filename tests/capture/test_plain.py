from __future__ import annotations

import array
import collections
import dataclasses
import decimal
import enum
import io
import itertools
import json
import subprocess
import sys
import textwrap
import threading
import time
import tracemalloc
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import attrs
import numpy as np
import orjson
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalvault_sdk.capture.encode import Encoder
from evalvault_sdk.capture.plain import Limits
from evalvault_sdk.capture.recorder import Recorder
from evalvault_sdk.capture.stage import StageContext
from evalvault_sdk.capture.stages import Stages
from evalvault_sdk.events import StageEvent
from tests.support import ListSink, clean_environment

CANNOT = "that cannot be shown>"


def recorded(attributes: Any, encoder: Encoder | None = None, sink: ListSink | None = None) -> dict[str, Any]:
    """Record one stage, hold its event against the rules, return its attributes."""
    sink = sink or ListSink()
    with StageContext(Recorder("r", sink, encoder=encoder), "x") as stage:
        stage.attributes = attributes
    assert sink.refused == []
    (event,) = sink.put_events
    json.loads(event, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    return StageEvent.from_dict(orjson.loads(event)).attributes


def shown(value: Any, encoder: Encoder | None = None) -> Any:
    attributes = recorded({"value": value, "neighbour": 1}, encoder)
    assert attributes["neighbour"] == 1
    return attributes["value"]


# --- Any object ---


class Colour(enum.Enum):
    RED = ("r", 1)


class Level(enum.IntEnum):
    HIGH = 3


class Access(enum.Flag):
    READ = 1
    WRITE = 2


class Name(str, enum.Enum):
    KIM = "kim"


@dataclasses.dataclass
class Node:
    __slots__ = ("label", "next")
    label: str
    next: Any


@attrs.define
class Pair:
    left: Any
    right: Any = None


class Inner(pydantic.BaseModel):
    name: str = "n"
    pin: pydantic.SecretStr = pydantic.SecretStr("1234")
    left_out: str = pydantic.Field(default="never shown", exclude=True)


class Outer(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    inner: Inner = Inner()
    several: list[Inner] = [Inner(name="m")]


INNER = {"name": "n", "pin": "SecretStr('**********')"}


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        *((np.dtype(kind).type(1), 1) for kind in "bhilqBHILQefdg"),
        *((np.array(1, dtype=kind), 1) for kind in "bhilqBHILQefdg"),
        (np.bool_(False), False),
        (np.float16("nan"), None),
        (np.longdouble("inf"), None),
        (np.complex128(1 + 2j), "(1+2j)"),
        (np.datetime64("2026-01-07T10:00:00"), "2026-01-07T10:00:00+00:00"),
        (np.datetime64("NaT", "s"), None),
        (np.str_("x"), "x"),
        (np.array([(1, 2.5)], dtype=[("a", "i4"), ("b", "f8")]), [{"a": 1, "b": 2.5}]),
        (np.array([{"a": {1}}, None], dtype=object), [{"a": [1]}, None]),
        (np.arange(4).reshape(2, 2).T, [[0, 2], [1, 3]]),
        (np.array([np.nan, 1.0]), [None, 1.0]),
        (Colour.RED, ["r", 1]),
        (Level.HIGH, 3),
        (Access.READ | Access.WRITE, 3),
        (Name.KIM, "kim"),
        ({Name.KIM: 1, Level.HIGH: 2}, {"kim": 1, "3": 2}),
        (decimal.Decimal("NaN"), "NaN"),
        (decimal.Decimal("-Infinity"), "-Infinity"),
        (decimal.Decimal("1E+400"), "1E+400"),
        (10**400, "<integer of 1,329 bits>"),
        (-(10**20), str(-(10**20))),
        (float("-inf"), None),
        (1 + 2j, "(1+2j)"),
        (bytearray(5), "<5 bytes>"),
        (memoryview(b"abc"), "<3 bytes>"),
        (KeyError("k"), {"type": "KeyError", "message": "'k'"}),
        (Node("a", Node("b", None)), {"label": "a", "next": {"label": "b", "next": None}}),
        (Pair(Pair(1)), {"left": {"left": 1, "right": None}, "right": None}),
        (Outer(more=1), {"inner": INNER, "several": [{**INNER, "name": "m"}], "more": 1}),  # type: ignore[call-arg]
        (types.MappingProxyType({"a": 1}), {"a": 1}),
        (collections.ChainMap({"a": 1}, {"b": 2}), {"a": 1, "b": 2}),
        (collections.Counter("aab"), {"a": 2, "b": 1}),
        (range(10**12), "range(0, 1000000000000)"),
        ({10**5000: 1}, {"<integer of 16,610 bits>": 1}),
        ({float("nan"): 1, b"k": 2, (1, None): 3}, {"nan": 1, "b'k'": 2, "(1, None)": 3}),
        ("\udc80\ud800", "??"),
        (["\x00\x1f\u2028"], ["\x00\x1f\u2028"]),
    ],
)
def test_an_object_has_its_plain_form(value: Any, expected: Any) -> None:
    assert shown(value) == expected
    assert shown([value]) == [expected]


def test_a_group_of_errors_says_what_it_is() -> None:
    if sys.version_info >= (3, 11):
        assert shown(ExceptionGroup("two", [ValueError("a")]))["type"] == "ExceptionGroup"  # noqa: F821


def test_cycles_end_through_objects_too() -> None:
    node = Node("a", None)
    node.next = node
    pair = Pair(node)
    pair.right = [pair]
    proxy: dict[str, Any] = {}
    proxy["self"] = types.MappingProxyType(proxy)
    looped = np.empty(2, dtype=object)
    looped[:] = [looped, 1]
    assert "contains itself" in orjson.dumps(shown(node)).decode()
    inner: list[Any] = [{1}]
    inner.append(inner)
    assert shown(inner) == [[1], "<list: contains itself>"]
    for value in (pair, proxy, looped):
        sink = ListSink()
        recorded({"value": value}, sink=sink)
        assert len(sink.put_events[0]) < 140_000


def raises(*_: Any, **__: Any) -> Any:
    raise RuntimeError("no")


def made(base: type = object, **methods: Any) -> type:
    return type("Odd", (base,), methods)


class Anything:
    """Has every attribute, each of them this object, which can be called."""

    def __getattr__(self, name: str) -> Any:
        return self

    def __call__(self, *_: Any) -> Any:
        return self


def released(view: memoryview) -> memoryview:
    view.release()
    return view


ODD: dict[str, Callable[[], Any]] = {
    "repr raises": made(__repr__=raises),
    "repr returns no text": made(__repr__=lambda self: 5),
    "repr has surrogates": made(__repr__=lambda self: "\ud800" * 2000),
    "getattribute raises": made(__getattribute__=raises),
    "getattr raises": made(__getattr__=raises),
    "its class raises": made(__class__=property(raises)),
    "says it is a dict": made(__class__=property(lambda self: dict)),
    "says it is text": made(__class__=property(lambda self: str)),
    "says it is a number": made(__class__=property(lambda self: int)),
    "says it is an enum": made(__class__=property(lambda self: enum.Enum)),
    "has everything": Anything,
    "its shape is nonsense": made(shape=(-1, 5)),
    "its table has no rows": made(shape=(2, 2), columns=5),
    "its elements raise": made(shape=(), tolist=raises),
    "it dumps itself": made(model_dump=lambda self: self),
    "its fields raise": made(model_fields={"a": 1}),
    "it has no length": made(list, __len__=raises),
    "its length is negative": made(list, __len__=lambda self: -5),
    "its items raise": made(dict, items=raises),
    "its items are no pairs": made(dict, items=lambda self: [1, 2, 3]),
    "its items never end": made(dict, items=lambda self: zip(itertools.count(), itertools.count(), strict=False)),
    "it iterates for ever": made(list, __iter__=lambda self: itertools.count()),
    "iterating raises": made(tuple, __iter__=raises),
    "its key raises": lambda: {made(__str__=raises)(): 1},
    "its key has no hash twice": lambda: {made(__str__=lambda self: "\ud800" * 1000)(): 1},
    "text without length": lambda: made(str, __len__=raises)("abc"),
    "text that lies": lambda: made(str, __getitem__=lambda self, key: 5)("abc"),
    "float that lies": lambda: made(float, __float__=lambda self: float("nan"))(1.5),
    "bool-like": made(__bool__=raises, __eq__=raises, __hash__=lambda self: 1),
    "signalling": lambda: decimal.Decimal("sNaN"),
    "released": lambda: released(memoryview(b"abc")),
}


@pytest.mark.parametrize("make", ODD.values(), ids=ODD.keys())
@pytest.mark.parametrize("wrap", [lambda odd: odd, lambda odd: [odd, 1], lambda odd: {"k": (odd,)}, Pair])
def test_an_odd_object_costs_its_own_place_only(make: Callable[[], Any], wrap: Callable[[Any], Any]) -> None:
    sink = ListSink()
    started = time.perf_counter()
    attributes = recorded({"odd": wrap(make()), "good": [1, "보험"]}, sink=sink)
    assert time.perf_counter() - started < 2
    assert attributes["good"] == [1, "보험"]
    assert len(sink.put_events[0]) < 200_000


class Cursor:
    """Rows that can be fetched once."""

    def __init__(self) -> None:
        self.fetched = 0

    def __iter__(self) -> Iterator[int]:
        self.fetched += 1
        return iter([1, 2, 3])


def test_nothing_that_can_be_read_once_is_read() -> None:
    source = io.StringIO("first\nsecond")
    cursor = Cursor()
    streams: list[Iterator[Any]] = [
        *(map(str, [1, 2]), zip([1], [2], strict=True), filter(None, [1]), itertools.count(), reversed([1, 2])),
        *((number for number in [1]), iter({1: 2}), itertools.chain([1], [2]), enumerate("ab"), iter(b"ab")),
    ]
    for encoder in (None, Encoder(content="none"), Encoder(mask=lambda content: content)):
        recorded({"file": source, "cursor": cursor, "streams": streams}, encoder)
    assert source.read() == "first\nsecond"
    assert cursor.fetched == 0
    assert [next(stream) for stream in streams] == ["1", (1, 2), 1, 0, 2, 1, 1, 1, (0, "a"), 97]


def test_a_lazy_mapping_is_loaded_within_the_limits() -> None:
    loaded = []

    class Lazy(Mapping[int, int]):
        def __getitem__(self, key: int) -> int:
            loaded.append(key)
            return key

        def __iter__(self) -> Iterator[int]:
            return itertools.count()

        def __len__(self) -> int:
            return 10**15

    value = shown(Lazy(), Encoder(Limits(max_items=100)))
    assert value["..."].startswith("(truncated: 999,999,999,999,9")
    assert len(loaded) <= 110


# --- At a cost that is bounded ---

HUGE: dict[str, Callable[[], Any]] = {
    "a text": lambda: "x" * 300_000_000,
    "a Korean text": lambda: "가" * 50_000_000,
    "a secret in a text": lambda: "password=" + "x" * 50_000_000,
    "bytes": lambda: bytes(300_000_000),
    "a list": lambda: [1] * 10_000_000,
    "a list of texts": lambda: ["보험"] * 10_000_000,
    "a dict": lambda: dict.fromkeys(range(5_000_000)),
    "a dict of texts": lambda: {f"key {number}": 1 for number in range(1_000_000)},
    "a set": lambda: set(range(1_000_000)),
    "a deque": lambda: collections.deque(range(1_000_000)),
    "an array": lambda: np.zeros(100_000_000, dtype=np.int8),
    "an array of objects": lambda: np.full(5_000_000, "보험", dtype=object),
    "an integer": lambda: 1 << 3_400_000,
    "a key": lambda: {"k" * 100_000_000: 1},
    "a model": lambda: Pair([1] * 1_000_000, "x" * 100_000_000),
}


def nested(depth: int, make: Callable[[Any], Any]) -> Any:
    value: Any = 1
    for _ in range(depth):
        value = make(value)
    return value


HUGE["depth"] = lambda: nested(10_000, lambda inner: [inner])
HUGE["depth of dicts"] = lambda: nested(10_000, lambda inner: {"k": inner})
HUGE["depth of models"] = lambda: nested(10_000, Pair)


@pytest.mark.parametrize("make", HUGE.values(), ids=HUGE.keys())
@pytest.mark.parametrize("thorough", [False, True])
def test_what_is_huge_costs_little_time_and_memory_and_says_what_was_cut(make: Any, thorough: bool) -> None:
    value = make()
    sink = ListSink()
    encoder = Encoder(mask=lambda content: content) if thorough else None
    started = time.perf_counter()
    recorded({"value": value}, encoder, sink)
    assert time.perf_counter() - started < 0.5
    sink.put_events.clear()
    tracemalloc.start()
    try:
        recorded({"value": value}, encoder, sink)
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
    finally:
        tracemalloc.stop()
    assert len(sink.put_events[0]) < 140_000


@pytest.mark.parametrize(
    ("value", "cut"),
    [
        ("가" * 1_000_000, " of 1,000,000 characters left out)"),
        ([1] * 1_000_000, " of 1,000,000 left out)"),
        (dict.fromkeys(range(100000), 1), " more left out)"),
        (np.zeros((300, 400)), '"shape":[300,400]'),
        (nested(100, lambda inner: [inner]), "<list: nested too deeply>"),
    ],
)
def test_what_is_cut_says_so_in_its_place_and_is_counted(value: Any, cut: str) -> None:
    sink = ListSink()
    attributes = recorded({"before": "b", "value": value, "after": ["a"]}, sink=sink)
    assert cut in orjson.dumps(attributes["value"]).decode()
    assert (attributes["before"], attributes["after"]) == ("b", ["a"])
    assert sink.notes == {"truncated": 1}


def test_a_number_of_things_left_out_is_the_right_one() -> None:
    items = shown(list(range(30)), Encoder(Limits(max_items=10), mask=None))
    kept = items[:-1]
    assert kept == list(range(len(kept)))
    assert items[-1] == f"... (truncated: {30 - len(kept)} of 30 left out)"
    text = shown("x" * 5000, Encoder(Limits(max_attribute_bytes=1024)))
    kept_text, _, rest = text.partition("... (truncated: ")
    assert rest == f"{5000 - len(kept_text):,} of 5,000 characters left out)"


def test_small_events_take_no_notice() -> None:
    for encoder in (None, Encoder(mask=lambda content: content), Encoder(content="none")):
        sink = ListSink()
        recorded({"query": "보험" * 1000, "scores": [0.5] * 1000, "deep": nested(30, lambda x: [x])}, encoder, sink)
        assert sink.notes == {}


BIG: dict[str, Any] = {
    "Korean": "가나다" * 3000,
    "control characters": "\x01" * 9000,
    "emoji": "\U0001f600" * 5000,
    "quotes": '\\"' * 5000,
    "keys": {f"key {number}": number for number in range(2000)},
    "floats": [1e-300] * 5000,
    "texts": ["보험 약관"] * 2000,
    "text in a list in a dict": {"a": [{"b": "가" * 9000}]},
    "mixed": [{"content": "가\x01\U0001f600" * 100, "score": 0.123456789} for _ in range(200)],
}


@pytest.mark.parametrize("value", BIG.values(), ids=BIG.keys())
@pytest.mark.parametrize("limit", [1024, 4096])
@pytest.mark.parametrize("content", ["all", "none"])
def test_an_attribute_stays_within_its_bytes(value: Any, limit: int, content: Any) -> None:
    sink = ListSink()
    attributes = recorded({"value": value, "n": 1}, Encoder(Limits(max_attribute_bytes=limit), content=content), sink)
    assert attributes.pop("n") == 1
    assert all(len(orjson.dumps(kept)) <= limit for kept in attributes.values())
    assert content == "none" or sink.notes["truncated"] >= 1


@pytest.mark.parametrize("value", ["가" * 700, "\x01" * 350, "\U0001f600" * 500, "x" * 2000])
@pytest.mark.parametrize("limit", [4096, 10_000])
def test_an_event_stays_within_its_bytes_and_names_what_was_cut(value: str, limit: int) -> None:
    sink = ListSink()
    attributes = recorded(
        {**{f"text {number}": value for number in range(20)}, "n": 1}, Encoder(Limits(max_event_bytes=limit)), sink
    )
    (event,) = sink.events
    assert len(sink.put_events[0]) <= limit
    assert attributes["n"] == 1
    cut = event["metadata"]["truncated"]
    assert cut
    for name in cut:
        size = len(orjson.dumps(value))
        assert attributes[name.removeprefix("attributes.")].endswith(f"... (truncated: it was {size} bytes)")
    kept = {f"attributes.{name}" for name, text in attributes.items() if text == value}
    assert len(kept) + len(cut) == 20
    assert sink.notes["truncated"] == 1


def test_an_event_that_cannot_be_made_small_is_counted_as_lost() -> None:
    sink = ListSink()
    with StageContext(Recorder("r", sink, encoder=Encoder(Limits(max_event_bytes=4096))), "x") as stage:
        stage.attributes = {f"{'k' * 200}{number}": number for number in range(100)}
    assert (sink.put_events, sink.refused) == ([], ["too_large"])


# --- Whatever it is ---

scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.characters()
odd = scalars | st.one_of(
    st.binary(),
    st.decimals(),
    st.datetimes(timezones=st.none() | st.timezones()),
    st.timedeltas(),
    st.uuids(),
    st.complex_numbers(),
    st.fractions(),
    st.sampled_from(
        [name for name in ODD if "says" not in name and not {"class", "getattribute", "text"} & {*name.split()}]
    ).map(lambda name: ODD[name]()),
    st.sampled_from([Colour.RED, Access.WRITE, np.float32("nan"), np.arange(3), Inner(), ValueError("\ud800"), int]),
)
keys = st.text() | st.integers() | st.none() | st.floats() | st.binary() | st.sampled_from([Name.KIM, (1,)])
trees = st.recursive(
    odd,
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(keys, inner, max_size=4)
        | st.tuples(inner, inner)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=8,
)


@settings(deadline=None)
@given(trees, trees, st.sampled_from(["all", "none"]), st.booleans())
def test_whatever_it_is_arrives_as_json_that_the_rules_accept(one: Any, other: Any, content: Any, masked: bool) -> None:
    sink = ListSink()
    encoder = Encoder(content=content, mask=(lambda content: content) if masked else None)
    stages = Stages(Recorder("r", sink, encoder=encoder))

    @stages.stage("call", capture_args=True, capture_result=True, on_result=lambda result: {"again": [result]})
    def function(first: Any, *rest: Any, **named: Any) -> Any:
        return other

    function(one, one, named=other)
    with stages.stage("block", metadata={"meta": one}) as stage:
        stage.attributes = other
    stages.record_stage("ready", attributes={"value": one}, metadata={"value": other})
    assert (sink.refused, len(sink.put_events)) == ([], 3)
    for event in sink.put_events:
        StageEvent.from_dict(orjson.loads(event))
        json.loads(event, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))


plain_trees = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=20), inner, max_size=5),
    max_leaves=30,
)


@settings(deadline=None)
@given(st.dictionaries(st.text(max_size=20), plain_trees, max_size=5))
def test_the_fast_way_and_the_thorough_way_come_to_the_same(attributes: dict[str, Any]) -> None:
    assert recorded(attributes) == recorded(attributes, Encoder(mask=lambda content: content))


def test_a_table_is_summarised() -> None:
    pandas = pytest.importorskip("pandas")
    frame = pandas.DataFrame({"id": range(100_000), "text": ["보험"] * 100_000})
    summary = shown(frame)
    assert (summary["shape"], summary["columns"], len(summary["head"])) == ([100_000, 2], ["id", "text"], 10)
    assert summary["head"][3] == {"id": 3, "text": "보험"}
    assert shown(pandas.Series(range(1_000_000)))["head"] == list(range(10))
    assert shown(pandas.Series([1, 2])) == [1, 2]
    assert shown(pandas.Timestamp("2026-01-07", tz="Asia/Seoul")) == "2026-01-07T00:00:00+09:00"
    assert shown([pandas.NaT, pandas.NA]) == ["NaT", "<NA>"]
    assert shown(pandas.Categorical(["a", "b", "a"])) == ["a", "b", "a"]


def test_a_table_of_polars_is_summarised() -> None:
    polars = pytest.importorskip("polars")
    summary = shown(polars.DataFrame({"id": range(100_000)}))
    assert (summary["shape"], summary["columns"]) == ([100_000, 1], ["id"])
    assert summary["head"] == [{"id": number} for number in range(10)]


@pytest.mark.parametrize("mask", ["None", "lambda content: content"])
def test_threads_that_change_what_is_encoded_do_not_crash_the_interpreter(mask: str) -> None:
    script = textwrap.dedent(
        f"""
        import collections, random, sys, threading, time
        from evalvault_sdk.capture.encode import Encoder
        from evalvault_sdk.capture.nostage import NOWHERE

        sys.setswitchinterval(1e-6)
        shared = {{"list": [], "dict": {{}}, "set": set(), "deque": collections.deque(), "deep": {{"a": [{{}}]}}}}
        stop = False

        def change():
            number = 0
            while not stop:
                number += 1
                shared["list"].append(str(number)); shared["set"].add(number); shared["deque"].append({{number}})
                shared["dict"][f"k{{number % 3000}}"] = [number] * 3
                shared["deep"]["a"][0][number % 100] = shared["list"][:3]
                shared[f"k{{number % 50}}"] = 1
                shared.pop(f"k{{random.randrange(50)}}", None)
                if number % 3000 == 0:
                    for name in ("list", "dict", "set", "deque"):
                        shared[name].clear()

        changers = [threading.Thread(target=change) for _ in range(2)]
        [changer.start() for changer in changers]
        encoder, until, encoded = Encoder(mask={mask}), time.monotonic() + 2, 0
        while time.monotonic() < until:
            event = encoder.encode({{"stage_type": "x", "status": "x", "attributes": shared}}, NOWHERE)
            encoded += event is not None
        stop = True
        [changer.join() for changer in changers]
        assert encoded > 0
        """
    )
    done = subprocess.run([sys.executable, "-c", script], env=clean_environment(), capture_output=True, timeout=60)
    assert done.returncode == 0, done.stderr.decode()


def test_threads_share_one_encoder() -> None:
    sink = ListSink()
    recorder = Recorder("r", sink)

    def record(number: int) -> None:
        for _ in range(200):
            with StageContext(recorder, "x") as stage:
                stage.set(number=number, odd={number}, array=array.array("i", [number]))

    threads = [threading.Thread(target=record, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(sink.put_events) == 1600
    assert all(event["attributes"]["odd"] == [event["attributes"]["number"]] for event in sink.events)


# --- What costs much although it looks small ---


class BigInt(int):
    def __int__(self) -> int:
        return 10**30

    def __ge__(self, other: object) -> bool:
        return True


class Named(collections.namedtuple("Named", ["user", "password"])):
    """A tuple whose fields have names."""


class Caller:
    """Answers to any name, as clients of remote services do."""

    def __init__(self) -> None:
        self.called: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_: self.called.append(name)


class NotItsClass:
    @property
    def __class__(self) -> Any:
        raise RuntimeError("no")

    @__class__.setter
    def __class__(self, value: Any) -> None:
        raise RuntimeError("no")


def shared(levels: int) -> list[Any]:
    value: list[Any] = [1]
    for _ in range(levels):
        value = [value, value]
    return value


def endless() -> list[Any]:
    value: list[Any] = []
    value.extend([value] * 5000)
    return value


COSTLY: dict[str, Callable[[], Any]] = {
    "a list that holds itself twice at every level": lambda: shared(40),
    "a list that holds itself often": endless,
    "the same long text often": lambda: ["x" * 10_000_000] * 1000,
    "an array that is not contiguous": lambda: np.zeros((4000, 4000))[:, ::2],
    "an array of the standard library": lambda: array.array("i", bytes(4 * 5_000_000)),
    "a view of a dict": lambda: dict.fromkeys(range(1_000_000)).keys(),
    "a namespace": lambda: types.SimpleNamespace(**{f"a{number}": number for number in range(200_000)}),
    "an error with a long list": lambda: ValueError(list(range(1_000_000))),
    "a long tuple as a key": lambda: {tuple(range(1_000_000)): 1},
    "long bytes as a key": lambda: {b"x" * 100_000_000: 1},
    "ten thousand large fields": lambda: {f"k{number}": "x" * 20_000 for number in range(10_000)},
}


@pytest.mark.parametrize("make", COSTLY.values(), ids=COSTLY.keys())
def test_what_looks_small_costs_little(make: Callable[[], Any]) -> None:
    value = make()
    tracemalloc.start()
    started = time.perf_counter()
    try:
        shown(value)
        took, (_, peak) = time.perf_counter() - started, tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert took < 2  # of some milliseconds, on a machine that may be busy, under a tracer that makes them many
    assert peak < 60 << 20


@pytest.mark.parametrize("count", [4000, 300_000])
def test_many_attributes_take_time_in_proportion(count: int) -> None:
    sink = ListSink()
    started = time.perf_counter()
    recorded({f"k{number}": "x" * 1000 for number in range(count)}, None, sink)
    assert time.perf_counter() - started < 2
    assert len(sink.put_events[0]) <= 1 << 20
    assert sink.notes["truncated"] >= 1


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (BigInt(7), 7),
        (np.array([]), []),
        (Named("kim", "x"), {"user": "kim", "password": "[secret]"}),
        (types.SimpleNamespace(password=1234, n=1), {"password": "[secret]", "n": 1}),
        (np.array([(1, "x")], dtype=[("a", "i4"), ("token", "U9")]), [{"a": 1, "token": "[secret]"}]),
        (np.clongdouble(1 + 2j), "(1+2j)"),
        (np.datetime64("2026-01-07T10:00:00.000000001"), "2026-01-07T10:00:00+00:00"),
        (decimal.Decimal("sNaN"), "sNaN"),
    ],
)
def test_odd_values_have_their_plain_form_too(value: Any, expected: Any) -> None:
    assert shown(value) == expected


def test_what_raises_as_a_key_or_at_the_top_costs_its_own_place() -> None:
    class Bad(enum.Enum):
        A = 1

        @property
        def value(self) -> Any:
            raise RuntimeError("no")

    attributes = recorded({Bad.A: 1, "object": NotItsClass(), "bad\ud800": 2, "good": 3})
    assert attributes["good"] == 3
    assert len(attributes) == 4


def test_nothing_is_called_on_objects_that_answer_to_any_name() -> None:
    caller = Caller()
    shown(caller)
    assert caller.called == []


def test_the_number_of_items_holds_for_small_values_as_well() -> None:
    few = Encoder(Limits(max_items=10))
    sink = ListSink()
    attributes = recorded({"nested": [[1] * 9] * 9, "texts": [""] * 30, "small": [1, 2, 3]}, few, sink)
    assert attributes["texts"][-1] == "... (truncated: 22 of 30 left out)"
    assert "truncated" in orjson.dumps(attributes["nested"]).decode()
    assert attributes["small"] == [1, 2, 3]
    assert sink.notes["truncated"] >= 2


def test_what_was_cut_once_is_not_cut_again() -> None:
    sink = ListSink()
    stages = Stages(Recorder("r", sink, encoder=Encoder(mask=lambda content: content)))

    @stages.stage("a", capture_args=True)
    def function(text: str, items: list[int]) -> None:
        pass

    function("x" * 1_000_000, list(range(20_000)))
    attributes = sink.events[0]["attributes"]
    assert attributes["text"].endswith(" of 1,000,000 characters left out)")
    assert attributes["items"][-1].endswith(" of 20,000 left out)")
    assert sink.notes["truncated"] == 2

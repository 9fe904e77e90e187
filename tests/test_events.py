from __future__ import annotations

import pickle
from datetime import datetime, timedelta, timezone
from typing import Any

import attrs
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalvault_sdk import InvalidStageEventError, StageEvent, StageEventBuilder, StagePayloadRef

MINIMAL = {"run_id": "r", "stage_type": "retrieval"}
UTC = timezone.utc


def test_a_minimal_event_gets_the_defaults_of_the_contract() -> None:
    event = StageEvent.from_dict(MINIMAL)
    assert event.status == "success"
    assert event.attempt == 1
    assert event.attributes == {}
    assert event.metadata == {}
    assert len(event.stage_id) == 36
    assert (event.duration_ms, event.started_at, event.trace_id) == (None, None, None)


def test_the_stage_type_is_stripped_and_lower_cased() -> None:
    assert StageEvent(run_id=" r ", stage_type="  ReTrieval ").stage_type == "retrieval"
    assert StageEvent(run_id=" r ", stage_type="x").run_id == "r"


@pytest.mark.parametrize(
    ("change", "field", "words"),
    [
        ({"run_id": None}, "run_id", "is required"),
        ({"run_id": "  "}, "run_id", "is required and must not be empty"),
        ({"run_id": 7}, "run_id", "must be a string"),
        ({"stage_type": ""}, "stage_type", "must not be empty"),
        ({"stage_type": None}, "stage_type", "is required"),
        ({"stage_id": 7}, "stage_id", "must be a string or null"),
        ({"status": ""}, "status", "must not be empty"),
        ({"attempt": 0}, "attempt", "at least 1"),
        ({"attempt": True}, "attempt", "must be an integer"),
        ({"attempt": 1.5}, "attempt", "must be an integer"),
        ({"attempt": "2"}, "attempt", "must be an integer"),
        ({"attempt": 2**40}, "attempt", "below"),
        ({"duration_ms": -0.1}, "duration_ms", "must not be negative"),
        ({"duration_ms": float("nan")}, "duration_ms", "finite"),
        ({"duration_ms": float("inf")}, "duration_ms", "finite"),
        ({"duration_ms": 10**400}, "duration_ms", "finite"),
        ({"duration_ms": "5"}, "duration_ms", "must be a number"),
        ({"duration_ms": True}, "duration_ms", "must be a number"),
        ({"started_at": "2026-02-30T00:00:00Z"}, "started_at", "day is out of range"),
        ({"started_at": "yesterday"}, "started_at", "ISO 8601"),
        ({"finished_at": 1767776400}, "finished_at", "ISO 8601"),
        ({"finished_at": "2026-01-07T25:00:00Z"}, "finished_at", "hour must be in"),
        (
            {"started_at": "2026-01-07T10:00:01Z", "finished_at": "2026-01-07T10:00:00Z"},
            "finished_at",
            "must not be before started_at",
        ),
        ({"attributes": []}, "attributes", "must be an object"),
        ({"metadata": "x"}, "metadata", "must be an object"),
        ({"trace": "x"}, "trace", "must be an object"),
        ({"input_ref": []}, "input_ref", "must be an object"),
        ({"input_ref": {"id": "1"}}, "input_ref.store", "is required"),
        ({"output_ref": {"store": "s", "id": ""}}, "output_ref.id", "must not be empty"),
        ({"stage_name": "\ud800"}, "stage_name", "lone surrogate"),
        ({"stage_id": "a\x00b"}, "stage_id", "NUL"),
    ],
)
def test_a_broken_rule_is_refused_by_the_name_of_its_field(change: dict[str, Any], field: str, words: str) -> None:
    with pytest.raises(InvalidStageEventError) as caught:
        StageEvent.from_dict({**MINIMAL, **change})
    assert caught.value.field == field
    assert words in str(caught.value)
    assert str(caught.value).startswith(field)


@pytest.mark.parametrize("payload", [None, [], "x", 7])
def test_what_is_no_object_is_refused(payload: Any) -> None:
    with pytest.raises(InvalidStageEventError, match="event must be an object"):
        StageEvent.from_dict(payload)


@pytest.mark.parametrize(
    ("text", "time"),
    [
        ("2026-01-07T10:00:00Z", datetime(2026, 1, 7, 10, tzinfo=UTC)),
        ("2026-01-07T10:00:00.045Z", datetime(2026, 1, 7, 10, 0, 0, 45_000, tzinfo=UTC)),
        ("2026-01-07T10:00:00", datetime(2026, 1, 7, 10, tzinfo=UTC)),
        ("2026-01-07 10:00:00.123456", datetime(2026, 1, 7, 10, 0, 0, 123_456, tzinfo=UTC)),
        ("2026-01-07T10:00:00.1234567890+09:00", datetime(2026, 1, 7, 1, 0, 0, 123_456, tzinfo=UTC)),
        ("2026-01-07T19:00:00+0900", datetime(2026, 1, 7, 10, tzinfo=UTC)),
        ("2026-01-07T19:00+09", datetime(2026, 1, 7, 10, tzinfo=UTC)),
        (" 2026-01-07T10:00:00.5Z ", datetime(2026, 1, 7, 10, 0, 0, 500_000, tzinfo=UTC)),
    ],
)
def test_every_common_form_of_iso_8601_is_read_on_every_python(text: str, time: datetime) -> None:
    assert StageEvent.from_dict({**MINIMAL, "started_at": text}).started_at == time


def test_the_offset_of_the_sender_is_kept() -> None:
    event = StageEvent.from_dict({**MINIMAL, "started_at": "2026-01-07T19:00:00+09:00"})
    assert event.to_dict()["started_at"] == "2026-01-07T19:00:00+09:00"


def test_a_missing_duration_is_the_difference_of_the_times_and_a_given_one_is_kept() -> None:
    times = {"started_at": "2026-01-07T10:00:00Z", "finished_at": "2026-01-07T10:00:01.5Z"}
    assert StageEvent.from_dict({**MINIMAL, **times}).duration_ms == 1500
    assert StageEvent.from_dict({**MINIMAL, **times, "duration_ms": 7}).duration_ms == 7


def test_the_trace_is_read_flat_and_nested_and_flat_wins() -> None:
    nested = StageEvent.from_dict({**MINIMAL, "trace": {"trace_id": "t", "span_id": "s"}})
    assert (nested.trace_id, nested.span_id) == ("t", "s")
    both = StageEvent.from_dict({**MINIMAL, "trace_id": "flat", "trace": {"trace_id": "t", "span_id": None}})
    assert (both.trace_id, both.span_id) == ("flat", None)


def test_null_is_taken_as_absent() -> None:
    event = StageEvent.from_dict(dict.fromkeys(StageEvent.from_dict(MINIMAL).to_dict()) | MINIMAL)
    assert (event.status, event.attempt, event.attributes) == ("success", 1, {})


def test_to_dict_and_from_dict_are_inverse() -> None:
    event = StageEvent(
        run_id="r",
        stage_type="output",
        stage_name="이름",
        parent_stage_id="p",
        status="error",
        attempt=3,
        started_at=datetime(2026, 1, 7, tzinfo=timezone(timedelta(hours=9))),
        finished_at=datetime(2026, 1, 8, tzinfo=UTC),
        duration_ms=1.5,
        input_ref=StagePayloadRef("s3", "key"),
        output_ref=StagePayloadRef("s3", "key2", "text"),
        attributes={"answer": "보험금은 1억원입니다."},
        metadata={"model": "m"},
        trace_id="t",
        span_id="s",
    )
    assert StageEvent.from_dict(event.to_dict()) == event


def test_an_event_is_frozen_and_does_not_share_its_dicts() -> None:
    attributes = {"a": 1}
    event = StageEvent(run_id="r", stage_type="x", attributes=attributes)
    attributes["a"] = 2
    assert event.attributes == {"a": 1}
    with pytest.raises(AttributeError):
        event.run_id = "other"  # type: ignore[misc]


def test_the_error_survives_pickling_and_holds_no_value() -> None:
    error = pickle.loads(pickle.dumps(InvalidStageEventError("attempt", "must be an integer")))
    assert (error.field, str(error)) == ("attempt", "attempt must be an integer")
    with pytest.raises(InvalidStageEventError) as caught:
        StageEvent.from_dict({**MINIMAL, "started_at": "my secret question"})
    assert "secret" not in str(caught.value)


def test_the_builder_speaks_rag_and_yields_valid_events() -> None:
    retrieval = (
        StageEventBuilder("retrieval", run_id="r")
        .named("bm25")
        .query("보험 보장금액은?")
        .documents(["d1", "d2"], scores=[0.9, 0.4], top_k=5)
        .relevant(["d1"])
        .took(12.5)
        .trace("0" * 31 + "1", "0" * 15 + "1")
        .metadata(test_case_id="t1")
        .build()
    )
    assert retrieval.attributes == {
        "query": "보험 보장금액은?",
        "doc_ids": ["d1", "d2"],
        "scores": [0.9, 0.4],
        "top_k": 5,
        "relevant_doc_ids": ["d1"],
    }
    assert (retrieval.stage_name, retrieval.duration_ms, retrieval.metadata) == ("bm25", 12.5, {"test_case_id": "t1"})

    rerank = StageEventBuilder("rerank", run_id="r").parent(retrieval.stage_id).reranked(10, 3, scores=[1.0]).build()
    assert rerank.parent_stage_id == retrieval.stage_id
    assert rerank.attributes == {"input_count": 10, "output_count": 3, "scores": [1.0]}

    output = (
        StageEventBuilder("output", run_id="r")
        .answer("1억원", citations=["d1"], tokens_in=900, tokens_out=210)
        .model("gpt-4", temperature=0.2)
        .attempt(2)
        .output_ref("s3", "answers/1")
        .build()
    )
    assert output.attributes == {"answer": "1억원", "citations": ["d1"], "tokens_in": 900, "tokens_out": 210}
    assert output.metadata == {"model": "gpt-4", "temperature": 0.2}
    assert (output.attempt, output.output_ref) == (2, StagePayloadRef("s3", "answers/1"))

    failed = StageEventBuilder("output", run_id="r").error(TimeoutError("too slow")).build()
    assert failed.status == "error"
    assert failed.attributes["error"] == {"type": "TimeoutError", "message": "too slow"}

    rewrite = StageEventBuilder("query_rewrite", run_id="r").query("q", rewritten="better q").build()
    assert rewrite.attributes["rewritten"] == "better q"


def test_a_builder_with_a_broken_rule_says_so_when_it_builds() -> None:
    builder = StageEventBuilder("retrieval", run_id="r").took(-1)
    with pytest.raises(InvalidStageEventError, match="duration_ms must not be negative"):
        builder.build()


_TEXTS: st.SearchStrategy[Any] = st.sampled_from(
    ["r", "rag-prod", "Upper", " padded", "", " ", "한글", "a\x00b", "\ud800", None, 7, 0, [], {}]
)
_TIMES = st.sampled_from(
    [
        "2026-01-07T10:00:00.000000+00:00", "2026-01-07T10:00:00.500000+09:00", "2026-02-30T10:00:00.000000+00:00",
        "2026-01-07T10:00:00Z", "2026-01-07", "9999-12-31T23:59:59.999999-09:00", "", "soon", None, 7,
    ]
)  # fmt: skip
_NUMBERS = st.sampled_from([1, 3, 0, 1.0, 0.25, -0.5, 2**31, float("nan"), float("inf"), True, "1", None])
_OBJECTS: st.SearchStrategy[Any] = st.sampled_from(
    [{}, {"query": "q"}, None, [], "x", {"store": "s", "id": "i"}, {"trace_id": "t"}]
)
_FIELDS = {
    **dict.fromkeys(("attempt", "duration_ms"), _NUMBERS),
    **dict.fromkeys(("started_at", "finished_at"), _TIMES),
    **dict.fromkeys(("attributes", "metadata", "input_ref", "output_ref"), _OBJECTS),
}
_OWN_FORM = {
    "run_id": "r",
    "stage_id": "s",
    "started_at": "2026-01-07T10:00:00.000000+00:00",
    "finished_at": "2026-01-07T10:00:00.500000+00:00",
    "duration_ms": 500.0,
    "trace_id": "t",
    "stage_type": "retrieval",
    "status": "success",
    "attributes": {"query": "q"},
}


@settings(max_examples=1000)
@given(
    changes=st.lists(
        st.sampled_from([field.name for field in attrs.fields(StageEvent)]).flatmap(
            lambda name: st.tuples(st.just(name), _FIELDS.get(name, _TEXTS))
        ),
        max_size=3,
    )
)
def test_the_short_way_from_json_and_the_constructor_agree(changes: list[tuple[str, Any]]) -> None:
    payload: dict[str, Any] = {**_OWN_FORM, **dict(changes)}

    def outcome(make: Any) -> Any:
        try:
            event = make()
        except InvalidStageEventError as error:
            return str(error)
        made = attrs.asdict(event, recurse=False)
        kinds = [(name, type(value)) for name, value in made.items()]
        return type(event), {**made, "stage_id": made["stage_id"] if payload["stage_id"] else "new"}, kinds

    # The constructor takes no `trace` object, and from_dict() takes "" and 0 for no id.
    given = {**payload, **{name: payload.get(name) or None for name in ("trace_id", "span_id")}}
    assert outcome(lambda: StageEvent.from_dict(payload)) == outcome(lambda: StageEvent(**given))


def test_an_event_read_from_json_is_frozen_and_shares_nothing_with_it() -> None:
    payload = {**_OWN_FORM, "attributes": {"query": "q"}, "metadata": {}}
    event = StageEvent.from_dict(payload)
    payload["attributes"].clear()  # type: ignore[attr-defined]
    assert event.attributes == {"query": "q"}
    assert type(event) is StageEvent
    assert pickle.loads(pickle.dumps(event)) == event
    with pytest.raises(attrs.exceptions.FrozenInstanceError):
        event.run_id = "other"  # type: ignore[misc]

from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import orjson
import pytest

from evalvault_sdk import StageTracer
from evalvault_sdk.capture.draft import Draft, fields_of
from evalvault_sdk.capture.encode import Encoder
from evalvault_sdk.capture.nostage import NOWHERE
from evalvault_sdk.capture.redact import Redactor
from evalvault_sdk.delivery.transport.base import RetryLater
from evalvault_sdk.ids import NO_ID, Id, digits_of, new_random_bits, stage_id_of
from tests.support import MemoryTransport, balances

MADE_OF, PARENT, TRACE = ((1_767_780_000_999_999_999 - before, new_random_bits()) for before in (0, 10**6, 10**10))
KEY = "sk-abcdefghij0123456789ABCDEFGHIJ"


def content_of(**attributes: Any) -> dict[str, Any]:
    return {"stage_type": "retrieval", "status": "success", "attributes": attributes}


def draft_of(elapsed_ns: int = 1_500_000, made_of: Id = MADE_OF, span: int = 0, **attributes: Any) -> Draft:
    content = Encoder().content("retrieval", "success", attributes)
    assert content is not None
    return made_of, elapsed_ns, span, PARENT, TRACE, content


def finished(*drafts: Draft) -> list[Any]:
    return [orjson.loads(event or b"") for event in Encoder(run_id="r").finish(drafts, NOWHERE)]


def encoded(draft: Draft, **attributes: Any) -> Any:
    """Return the event that the encoder makes of the same stage without a draft."""
    made_of, elapsed_ns, span, *_ = draft
    ids = {"run_id": "r", "trace_id": digits_of(*TRACE), "parent_stage_id": stage_id_of(digits_of(*PARENT))}
    event = Encoder().encode({**ids, **fields_of(made_of, elapsed_ns, span), **content_of(**attributes)}, NOWHERE)
    assert event is not None
    return orjson.loads(event)


@pytest.mark.parametrize("attributes", [{}, {"doc_ids": ["a"], "scores": [0.5, None]}, {"query": f"key {KEY}"}])
def test_a_finished_draft_is_the_event_that_would_have_been_encoded_at_once(attributes: dict[str, Any]) -> None:
    draft = draft_of(**attributes)
    event = encoded(draft, **attributes)
    assert finished(draft) == [event]
    assert KEY not in str(event)


@pytest.mark.parametrize(
    "time_ns", [0, 1, 10**18 - 1, 10**18, 1_767_780_000_123_456_789, 10**19 - 1, 10**19, 1 << 64, 1 << 66, -1]
)
@pytest.mark.parametrize("elapsed_ns", [0, 1, 999, 1_234_567_890, 10**18, -5])
def test_whatever_the_clock_says_many_drafts_become_what_each_would_alone(time_ns: int, elapsed_ns: int) -> None:
    odd = draft_of(elapsed_ns, (time_ns, 5), 0xAB, top_k=1)
    usual = draft_of(top_k=2)
    if not 0 <= time_ns + elapsed_ns < 1 << 65:  # no calendar has it
        return
    assert finished(usual, odd, usual) == [encoded(usual, top_k=2), encoded(odd, top_k=1), encoded(usual, top_k=2)]


def test_what_is_remembered_is_bounded_and_forgetting_it_changes_nothing() -> None:
    encoder, content = Encoder(run_id="r"), draft_of(top_k=1)[-1]
    finisher = encoder._finisher
    for number in range(3 * 2048):
        root = MADE_OF[0] + number * 1_000_000, number + 1
        drafts: list[Draft] = [((root[0] + 1000, 7), 5, 0, root, root, content), (root, 9, 0, NO_ID, root, content)]
        child, parent = (orjson.loads(event or b"") for event in encoder.finish(drafts, NOWHERE))
        assert child["parent_stage_id"] == parent["stage_id"] == stage_id_of(digits_of(*root))
        assert child["trace_id"] == parent["trace_id"] == digits_of(*root)
        assert "parent_stage_id" not in parent
    assert len(finisher._places) <= 2050
    assert len(finisher._milliseconds) <= 2050
    finisher._places.clear()  # as another thread may, just before it is looked up
    (alone,) = encoder.finish([(MADE_OF, 9, 0, NO_ID, NO_ID, content)], NOWHERE)
    assert {"trace_id", "parent_stage_id"}.isdisjoint(orjson.loads(alone or b""))


def test_of_many_drafts_those_with_a_secret_are_found_wherever_they_are() -> None:
    for places in ([], [0], [599], [16, 17], [5, 100, 300], list(range(600))):
        drafts = [draft_of(query=KEY if number in places else f"page {number}") for number in range(600)]
        queries = [event["attributes"]["query"] for event in finished(*drafts)]
        assert [number for number, query in enumerate(queries) if query == "[secret]"] == places
        assert sum(query == f"page {number}" for number, query in enumerate(queries)) == 600 - len(places)


def test_a_draft_is_a_snapshot() -> None:
    scores = [0.5]
    draft = draft_of(scores=scores)
    scores.append(0.4)
    assert finished(draft)[0]["attributes"] == {"scores": [0.5]}


def test_the_ids_and_times_of_a_draft_are_those_of_the_stage() -> None:
    (told,) = finished(draft_of())
    assert told["started_at"] == "2026-01-07T10:00:00.999999+00:00"
    assert told["finished_at"] == "2026-01-07T10:00:01.001499+00:00"
    assert told["duration_ms"] == 1.5
    assert told["span_id"] == told["stage_id"].replace("-", "")[16:]
    assert finished(draft_of(span=0xAB))[0]["span_id"] == "00000000000000ab"


@pytest.mark.parametrize(
    "attributes",
    [
        {"password": "x"},
        {"text": "x" * 200_000},
        {"text": "\x01" * 30_000},
        {"a": {1}},
        {"n": [1, object()]},
        {"k" * 200: 1},
        {"d": [["x"] * 20_000]},
        {"r": range(10**18)},
        {"r": [range(10**18)]},
        {"d": {"r": [{"s": range(10**18)}]}},
    ],
)
def test_what_has_to_be_looked_at_closely_is_no_draft(attributes: dict[str, Any]) -> None:
    assert Encoder().content("retrieval", "success", attributes) is None


def test_stages_of_one_type_have_each_its_own_status() -> None:
    for statuses in (("success", "error", "success"), ("skipped", "success", "error")):
        encoder = Encoder()
        contents = [encoder.content("retrieval", status, {"top_k": 1}) for status in statuses]
        told = [orjson.loads(b"{%b" % content) for content in contents if content is not None]
        assert told == [{**content_of(top_k=1), "status": status} for status in statuses]


def test_types_that_a_program_makes_up_cost_no_memory() -> None:
    encoder = Encoder()
    for number in range(3_000):
        assert encoder.content(f"type {number}", "success", {}) is not None
    assert len(encoder._begins) <= 1_000


@pytest.mark.parametrize(
    "rest",
    [
        {"stage_name": 5},
        {"stage_name": "x" * 2_000},
        {"metadata": {"password": "x"}},
        {"input_ref": {"store": "s", "id": "i"}},
        {"output_ref": {"store": "s", "id": "i"}},
    ],
)
def test_what_has_to_be_looked_at_closely_is_no_draft_wherever_it_is(rest: dict[str, Any]) -> None:
    assert Encoder().content("retrieval", "success", {"top_k": 1}, rest) is None
    content = Encoder().content("retrieval", "success", {"top_k": 1}, {"stage_name": "a", "metadata": {"b": 1}})
    assert orjson.loads(b"{%b" % (content or b"")) == {**content_of(top_k=1), "stage_name": "a", "metadata": {"b": 1}}


def test_nothing_is_drafted_where_all_content_has_to_be_looked_at() -> None:
    for encoder in (Encoder(content="none"), Encoder(mask=dict), Encoder(redactor=Redactor(personal=["email"]))):
        assert encoder.content("retrieval", "success", {"top_k": 1}) is None


@pytest.mark.parametrize("settings", [{"durability": "spool", "max_queue_events": 2}, {"durability": "journal"}])
def test_no_secret_reaches_the_disk_though_drafts_hold_them(tmp_path: Path, settings: dict[str, Any]) -> None:
    tracer = StageTracer("r", transport=MemoryTransport(), spool_dir=str(tmp_path), flush_interval_s=60, **settings)
    tracer._outbox.queue.on_first_put = None  # nothing is delivered
    for _ in range(5):
        with tracer.stage("retrieval") as stage:
            stage.set(query=f"my key is {KEY}")
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*.jsonl"))
    assert written.count(b"[secret]") == (3 if "max_queue_events" in settings else 5)
    assert KEY.encode() not in written
    assert balances(tracer.shutdown(10))


def test_no_secret_reaches_the_disk_at_the_end_of_a_process_whose_server_is_away(tmp_path: Path) -> None:
    away = MemoryTransport(*[RetryLater("away")] * 1_000)
    tracer = StageTracer("r", transport=away, spool_dir=str(tmp_path), flush_interval_s=60)
    for _ in range(5):
        with tracer.stage("retrieval") as stage:
            stage.set(query=f"my key is {KEY}")
    assert tracer.shutdown(0.3).spooled == 5
    written = b"".join(path.read_bytes() for path in tmp_path.rglob("*.jsonl"))
    assert (written.count(b"[secret]"), KEY.encode() in written, b"\0" in written) == (5, False, False)


def test_no_secret_reaches_the_wire_though_drafts_hold_them() -> None:
    transport = MemoryTransport()
    with StageTracer("r", transport=transport, durability="memory") as tracer, tracer.stage("retrieval") as stage:
        stage.set(query=f"my key is {KEY}")
    (event,) = transport.events
    assert event["attributes"] == {"query": "my key is [secret]"}


def test_an_id_is_the_same_whether_it_was_asked_for_or_not() -> None:
    transport = MemoryTransport()
    with StageTracer("r", transport=transport, durability="memory") as tracer:
        with tracer.stage("asked") as asked:
            ids = asked.stage_id, asked.span_id, asked.trace_id
        with tracer.stage("not asked") as not_asked:
            pass
        later = not_asked.stage_id, not_asked.span_id, not_asked.trace_id
    told = [(event["stage_id"], event["span_id"], event["trace_id"]) for event in transport.events]
    assert told == [ids, later]


def test_a_stage_that_has_ended_is_freed_without_the_garbage_collector() -> None:
    class Document:
        pass

    with StageTracer("r", transport=MemoryTransport(), durability="memory") as tracer:
        document = Document()
        gone = weakref.ref(document)
        gc.disable()
        try:
            with tracer.stage("root"), tracer.stage("retrieval") as stage:
                stage.set(document=document)
            del document, stage
            assert gone() is None
        finally:
            gc.enable()


@pytest.mark.parametrize("value", [1, {1, 2}, "x" * 40_000])  # a draft, and no draft
def test_where_a_stage_belongs_does_not_depend_on_what_it_holds(value: Any) -> None:
    transport = MemoryTransport()
    with StageTracer("r", transport=transport, durability="memory") as tracer:
        with tracer.stage("request") as request:
            pass
        with tracer.trace(trace_id=request.trace_id):
            with tracer.stage("given", parent=request) as stage:
                stage.set(value=value)
            with tracer.stage("given by id", parent_stage_id=request.stage_id) as stage:
                stage.set(value=value)
        with tracer.trace() as trace, tracer.stage("root of a trace") as root:
            root.set(value=value)
            with tracer.stage("child") as child:
                child.set(value=value)
    told = {event["stage_type"]: (event.get("parent_stage_id"), event["trace_id"]) for event in transport.events}
    assert told == {
        "request": (None, request.trace_id),
        "given": (request.stage_id, request.trace_id),
        "given by id": (request.stage_id, request.trace_id),
        "root of a trace": (None, trace.trace_id),
        "child": (root.stage_id, trace.trace_id),
    }


def test_a_wrong_keyword_is_said_to_be_one_of_stage() -> None:
    with (
        StageTracer("r", transport=MemoryTransport(), durability="memory") as tracer,
        pytest.raises(TypeError, match=r"stage\(\) got an unexpected keyword argument 'attribute'"),
    ):
        tracer.stage("retrieval", attribute={})  # type: ignore[call-overload]

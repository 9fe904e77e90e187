from __future__ import annotations

import gc
import weakref
from pathlib import Path
from typing import Any

import orjson
import pytest

from evalvault_sdk import StageTracer
from evalvault_sdk.capture.draft import fields_of, pack, unpack
from evalvault_sdk.capture.encode import Encoder
from evalvault_sdk.capture.nostage import NOWHERE
from evalvault_sdk.capture.redact import Redactor
from evalvault_sdk.delivery.transport.base import RetryLater
from evalvault_sdk.ids import new_random_bits
from tests.support import MemoryTransport, balances

NUMBERS = (1_767_780_000_999_999_999, 1_500_000, new_random_bits(), 0)
KEY = "sk-abcdefghij0123456789ABCDEFGHIJ"


def fields(**attributes: Any) -> dict[str, Any]:
    ids = {"run_id": "r", "trace_id": "t", "parent_stage_id": "p"}
    return {**ids, "stage_type": "retrieval", "status": "success", "attributes": attributes}


def finished(drafted: bytes | None) -> Any:
    assert drafted is not None
    return orjson.loads(Encoder().finish(drafted, NOWHERE) or b"")


def test_a_draft_holds_what_was_packed() -> None:
    assert unpack(pack(NUMBERS, b"{}")) == (NUMBERS, b"{}")
    assert pack(NUMBERS, b"{}")[0] == 0, "which is how it is told from JSON"


@pytest.mark.parametrize("attributes", [{}, {"doc_ids": ["a"], "scores": [0.5, None]}, {"query": f"key {KEY}"}])
def test_a_finished_draft_is_the_event_that_would_have_been_encoded_at_once(attributes: dict[str, Any]) -> None:
    encoder, whole = Encoder(), {**fields_of(NUMBERS), **fields(**attributes)}
    at_once = encoder.encode(whole, NOWHERE)
    assert at_once is not None
    assert finished(encoder.draft(NUMBERS, fields(**attributes))) == orjson.loads(at_once)
    assert KEY.encode() not in at_once


def test_a_draft_is_a_snapshot() -> None:
    scores = [0.5]
    drafted = Encoder().draft(NUMBERS, fields(scores=scores))
    scores.append(0.4)
    assert finished(drafted)["attributes"] == {"scores": [0.5]}


def test_the_ids_and_times_of_a_draft_are_those_of_the_stage() -> None:
    told = fields_of(NUMBERS)
    assert told["started_at"] == "2026-01-07T10:00:00.999999+00:00"
    assert told["finished_at"] == "2026-01-07T10:00:01.001499+00:00"
    assert told["duration_ms"] == 1.5
    assert told["span_id"] == told["stage_id"].replace("-", "")[16:]
    assert fields_of((*NUMBERS[:3], 0xAB))["span_id"] == "00000000000000ab"


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
    ],
)
def test_what_has_to_be_looked_at_closely_is_no_draft(attributes: dict[str, Any]) -> None:
    assert Encoder().draft(NUMBERS, fields(**attributes)) is None


def test_nothing_is_drafted_where_all_content_has_to_be_looked_at() -> None:
    for encoder in (Encoder(content="none"), Encoder(mask=dict), Encoder(redactor=Redactor(personal=["email"]))):
        assert encoder.draft(NUMBERS, fields(top_k=1)) is None


def test_a_clock_that_no_number_holds_makes_no_draft() -> None:
    assert Encoder().draft((1 << 70, 0, 1, 0), fields()) is None


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

"""Whatever our client sends, EvalVault reads, field by field; and what EvalVault writes, we read."""

from __future__ import annotations

import asyncio
import contextlib
import json
import math
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import date, datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from uuid import UUID

import attrs
import numpy as np
import pytest

from evalvault_sdk import FolderPayloadStore, StageEvent, StageEventBuilder, StagePayloadRef, StageTracer
from tests.interop.real import TheirEvent
from tests.support import MemoryTransport

KOREA = timezone(timedelta(hours=9))
KOREAN = '면책 기간이 지나면 지급됩니다 🙂 "따옴표" \\ \n\t\u2028\x1f끝'


def blocks(tracer: StageTracer) -> None:
    with (
        tracer.trace(session_id="s-1", user_id="u-1", test_case_id="tc-1", metadata={"채널": "앱"}),
        tracer.stage("  Request ", stage_name="보험 상담", metadata={"model": "exaone"}) as request,
    ):
        request.set(query=KOREAN)
        with tracer.stage("retrieval", attempt=3, input_ref={"store": "s3", "id": "입력.json"}) as stage:
            stage.attributes = {"doc_ids": ["약관-1"], "scores": [0.91], "top_k": 5}
            stage.output_ref = StagePayloadRef("minio", "out/1", "parquet")
        tracer.record_stage("output", parent=request, duration_ms=12)


def errors(tracer: StageTracer) -> None:
    with contextlib.suppress(ValueError), tracer.stage("raises"):
        raise ValueError(KOREAN) from KeyError("원인")
    with tracer.stage("fails") as stage:
        stage.fail("답이 비어 있음", kind="EmptyAnswer")
    with tracer.stage("skips") as stage:
        stage.skip("캐시에 있음")
    with contextlib.suppress(asyncio.CancelledError), tracer.stage("is cancelled"):
        raise asyncio.CancelledError
    with tracer.stage("말한 대로") as stage:
        stage.status = "degraded"
    with tracer.stage("unsaid") as stage:
        stage.status = None  # type: ignore[assignment]
        stage.attempt = None  # type: ignore[assignment]


def functions(tracer: StageTracer) -> None:
    @tracer.stage
    def retrieve(query: str, top_k: int = 3) -> list[str]:
        return [query] * top_k

    @tracer.stage("rerank", capture_args=True, capture_result=True)
    def rerank(docs: list[str], *, keep: int) -> list[str]:
        return docs[:keep]

    @tracer.stage("validate", on_result=lambda result: {"passed": result})
    async def validate(answer: str) -> bool:
        return bool(answer)

    rerank(retrieve("한글 질문"), keep=2)
    asyncio.run(validate("답"))


def streams(tracer: StageTracer) -> None:
    @tracer.stage("output", capture_result=True)
    def answer(*, breaks: bool) -> Iterator[str]:
        yield "보험금은 "
        if breaks:
            raise ConnectionError("끊김")
        yield "지급됩니다"

    @tracer.stage("output")
    async def answer_slowly() -> AsyncIterator[str]:
        for text in ("보험금은 ", "지급됩니다"):
            yield text

    async def read() -> list[str]:
        return [text async for text in answer_slowly()]

    assert len(list(answer(breaks=False))) == len(asyncio.run(read())) == 2
    next(abandoned := answer(breaks=False))
    abandoned.close()  # type: ignore[attr-defined]
    with contextlib.suppress(ConnectionError):
        list(answer(breaks=True))


def times(tracer: StageTracer) -> None:
    moment = datetime(2026, 1, 7, 10, 0, 0, 1, tzinfo=KOREA)
    for started_at, finished_at in [
        (moment, moment + timedelta(seconds=1)),
        (moment, moment.astimezone(timezone.utc)),
        (moment.replace(tzinfo=None), moment.replace(tzinfo=None)),
        (moment.replace(microsecond=0), None),
        (None, moment),
        ("2026-01-07T10:00:00+09:00", "2026-01-07T01:00:00.5Z"),
        ("2026-01-07T10:00:00+09:00", "2026-01-07T01:00:00.5+00:00"),
        ("2026-01-07T01:00:00", "2026-01-07T01:00:00.123456"),
        ("2026-01-07T01:00:00", "2026-01-07T10:00:00.5+09:00"),
        ("2026-01-07 10:00:00 +09:00", "2026-01-07T01:00:00.123456789z"),
        (moment.replace(tzinfo=None), "2026-01-07T10:00:01Z"),
    ]:
        tracer.record_stage("timed", started_at=started_at, finished_at=finished_at)
    for duration_ms in (0, 7, 1e-6, 86_400_000.5):
        tracer.record_stage("timed", duration_ms=duration_ms)


def odd_values(tracer: StageTracer) -> None:
    @attrs.define
    class Document:
        id: str
        score: float

    values: dict[Any, Any] = {
        "numpy": {"score": np.float32(0.5), "ids": np.arange(3), "yes": np.bool_(True)},
        "no number": [math.nan, math.inf, -math.inf],
        "huge": [2**53 + 1, 2**63, 2**70, -(2**64), 1e308, 5e-324],
        "times": [datetime(2026, 1, 7, tzinfo=KOREA), date(2026, 1, 7), timedelta(seconds=1)],
        "objects": [Document("약관-1", 0.5), UUID(int=1), Path("/tmp"), b"\xff\x00", {1, 2}, (1, 2), object()],
        "text": [KOREAN, "\ud800", "a\x00b", "가" * 100_000],
        "deep": json.loads("[" * 200 + "]" * 200),
        1: "a number for a key",
        None: "none for a key",
        "키": {"중첩": {"값": None}},
    }
    values["itself"] = values
    tracer.record_stage("odd", attributes=values, metadata=values)
    tracer.record_stage("wide", attributes={f"key {number}": number for number in range(5000)})


def ready_made(tracer: StageTracer) -> None:
    built = (
        StageEventBuilder("rerank", run_id="rag-7")
        .between("2026-01-07T10:00:00+09:00", "2026-01-07T10:00:01+09:00")
        .reranked(8, 3, scores=[0.9, 0.5, 0.1])
        .input_ref("s3", "in")
        .error(TimeoutError("느림"))
        .trace("any text", "한글")
    )
    from_evalvault: dict[str, Any] = {
        "run_id": "rag-8",
        "stage_type": "OUTPUT",
        "stage_id": "stg-1",
        "attributes": None,
        "status": None,
        "attempt": None,
        "started_at": "2026-01-07T10:00:00",
        "trace": {"trace_id": "t-1", "span_id": None},
    }
    assert None not in tracer.record_batch([built.build(), from_evalvault, {"stage_type": "bare"}])


#: What our client can be told, in every way in which it can be told.
FORMS: list[Callable[[StageTracer], object]] = [blocks, errors, functions, streams, times, odd_values, ready_made]


def sent_by(form: Callable[[StageTracer], object], **options: Any) -> list[dict[str, Any]]:
    """Return what goes over the wire, read as EvalVault reads it: by `json`."""
    transport = MemoryTransport()
    with StageTracer("상담-1", transport=transport, **options) as tracer:
        form(tracer)
        assert tracer.shutdown(10).complete, tracer.stats()
    assert not tracer.stats().dropped
    return [json.loads(event) for batch in transport.batches for event in batch.events]


def assert_equal_in_evalvault(sent: dict[str, Any]) -> None:
    """Check that EvalVault reads what was sent, and writes it equal."""
    came = TheirEvent.from_dict(sent).to_dict()
    trace = came.pop("trace")
    came = {**came, **trace}
    # An absent field is null there, but for these.
    whole = {**dict.fromkeys(came), "status": "success", "attempt": 1, "attributes": {}, "metadata": {}, **sent}
    whole["stage_type"] = whole["stage_type"].strip().lower()
    for name in ("input_ref", "output_ref"):
        if whole[name] is not None:
            whole[name] = {"type": "json", **whole[name]}
    for name in ("started_at", "finished_at"):
        if whole[name] is not None:
            moment = datetime.fromisoformat(whole[name])
            assert moment.utcoffset() is not None
            whole[name] = moment.isoformat()
    if whole["duration_ms"] is None and whole["started_at"] and whole["finished_at"]:
        elapsed = datetime.fromisoformat(whole["finished_at"]) - datetime.fromisoformat(whole["started_at"])
        whole["duration_ms"] = elapsed.total_seconds() * 1000
    assert came == whole


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
@pytest.mark.parametrize(
    "options", [{}, {"content": "none"}, {"personal_data": ("email", "phone")}, {"mask": lambda event: event}], ids=str
)
def test_what_our_client_sends_comes_back_from_evalvault_field_by_field(
    form: Callable[[StageTracer], object], options: dict[str, Any], tmp_path: Path
) -> None:
    events = sent_by(form, payload_store=FolderPayloadStore(tmp_path / "payloads"), **options)
    assert events
    for sent in events:
        assert_equal_in_evalvault(sent)
        # And by way of EvalVault to us: as if it had come directly.
        assert StageEvent.from_dict(TheirEvent.from_dict(sent).to_dict()) == StageEvent.from_dict(sent)


@pytest.mark.parametrize("form", FORMS, ids=lambda form: form.__name__)
def test_what_our_server_answers_is_read_by_evalvault_field_by_field(form: Callable[[StageTracer], object]) -> None:
    for sent in sent_by(form):
        served = json.loads(json.dumps(StageEvent.from_dict(sent).to_dict()))
        assert_equal_in_evalvault(served)
        assert served["status"], "null would be read as the text None"
        assert served["attempt"], "null would be a TypeError"


def test_times_that_evalvault_could_not_compare_leave_us_with_an_offset() -> None:
    """One time with and one without an offset: EvalVault's ingest breaks on that, the whole file with it."""
    times = {"started_at": "2026-01-07T10:00:00", "finished_at": "2026-01-07T10:00:01Z"}
    mixed = {"run_id": "r", "stage_type": "x", **times}
    with pytest.raises(TypeError, match="offset-naive"):
        TheirEvent.from_dict(mixed)
    assert_equal_in_evalvault(StageEvent.from_dict(mixed).to_dict())
    (sent,) = sent_by(lambda tracer: tracer.record_batch([mixed]))
    assert_equal_in_evalvault(sent)

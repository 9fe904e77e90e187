from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import attrs
import numpy as np
import orjson
import pydantic
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evalvault_sdk import FolderPayloadStore, StageEvent, StageTracer
from evalvault_sdk.capture.encode import Encoder
from evalvault_sdk.capture.plain import Limits
from evalvault_sdk.capture.recorder import Recorder
from evalvault_sdk.capture.redact import Redactor
from evalvault_sdk.capture.sample import Sampling
from evalvault_sdk.capture.stage import StageContext
from evalvault_sdk.capture.stages import Stages
from evalvault_sdk.config import PERSONAL_DATA
from evalvault_sdk.server.metrics import metrics_of
from evalvault_sdk.testing import CapturingTransport
from tests.support import ListSink, balances

# Put together at run time, so that whoever searches the repository for secrets finds none.
BODY = "a1B2" * 9
SHAPED = ["sk" + "-" + BODY, "gh" + "p_" + BODY, ".".join(["ey" + "J" + BODY, "ey" + "J" + BODY, BODY])]
PLAIN = "hunter" + "22"  # a secret only by its key
PERSONS: dict[Any, str] = {
    "email": "kim@example.com",
    "phone": "010-1234-5678",
    "card": "4111-1111-1111-1111",
    "resident_number": "000101-3000008",
    "passport": "M12345678",
    "account": "110-123-456789",
}


def put(record: Callable[[Stages], object], encoder: Encoder | None = None) -> ListSink:
    sink = ListSink()
    record(Stages(Recorder("r", sink, encoder=encoder)))
    assert sink.refused == []
    return sink


def sent(attributes: dict[Any, Any], encoder: Encoder | None = None, **options: Any) -> str:
    """Record a stage; return the bytes that left, as text."""
    (event,) = put(lambda stages: stages.record_stage("x", attributes=attributes, **options), encoder).put_events
    StageEvent.from_dict(orjson.loads(event))
    return event.decode()


@dataclasses.dataclass
class Login:
    user: str
    password: Any


@attrs.define
class Client:
    name: str
    api_key: Any


class Config(pydantic.BaseModel):
    url: str
    access_token: Any


def deep(value: Any) -> Any:
    for _ in range(10):
        value = {"a": [(value,)]}
    return value


WRAPPED: dict[str, Callable[[Any], Any]] = {
    "dict": lambda secret: {"password": secret},
    "list": lambda secret: {"api_keys": [secret, {"x": secret}]},
    "deep": lambda secret: deep({"clientSecret": secret}),
    "dataclass": lambda secret: Login("kim", secret),
    "attrs": lambda secret: [Client("kim", secret)],
    "pydantic": lambda secret: Config(url="http://h", access_token=secret),
    "nested": lambda secret: Login("kim", Client("kim", Config(url="", access_token=secret))),
    "array": lambda secret: np.array([{"password": secret}, Login("kim", secret)], dtype=object),
    "header": lambda secret: {"headers": {"Authorization": secret, "Set-Cookie": secret}},
    "Korean": lambda secret: {"비밀번호": secret},
}


@pytest.mark.parametrize("wrap", WRAPPED.values(), ids=WRAPPED.keys())
@pytest.mark.parametrize("secret", [PLAIN, {"value": PLAIN}, [PLAIN], f"{PLAIN}".encode(), 20260107_22])
def test_what_a_secret_key_holds_does_not_leave(wrap: Callable[[Any], Any], secret: Any) -> None:
    out = sent({"value": wrap(secret), "question": "보험"}, metadata={"value": wrap(secret)})
    assert PLAIN not in out
    assert "2026010722" not in out
    assert out.count("[secret]") >= 2
    assert '"question":"보험"' in out


def record_in_all_places(stages: Stages, secret: str) -> None:
    @stages.stage("call", capture_args=True, capture_result=True, on_result=lambda result: {"seen": [result]})
    def call(question: str, *rest: str, **named: str) -> dict[str, str]:
        return {"answer": f"it is {secret}."}

    @stages.stage("stream", capture_result=True)
    def stream() -> Any:
        yield from (f"{secret[:9]}", secret[9:], " and more")

    @stages.stage("error")
    def fails() -> None:
        raise ValueError(f"cannot use {secret}") from KeyError(secret)

    call(f"({secret})", secret, named=secret)
    list(stream())
    with contextlib.suppress(ValueError):
        fails()
    with stages.stage("block", metadata={"m": [secret]}) as stage:
        stage.set(**{"text": f"a\n{secret}\nb", f"key {secret}": 1, "odd": ValueError(secret), "inner": {secret: {1}}})
    with stages.stage("failed") as stage:
        stage.fail(f"because of {secret}")
    with stages.stage("skipped") as stage:
        stage.skip(f"because of {secret}")
    with stages.trace(session_id=secret, metadata={"who": secret}):
        stages.record_stage("ready", attributes={"q": secret})
    stages.record_batch([{"stage_type": "batch", "attributes": {"q": f"x {secret}"}, "metadata": {"q": secret}}])


@pytest.mark.parametrize("secret", SHAPED)
@pytest.mark.parametrize("thorough", [False, True])
def test_a_secret_does_not_leave_wherever_it_is_put(secret: str, thorough: bool) -> None:
    encoder = Encoder(mask=lambda content: content) if thorough else None
    sink = put(lambda stages: record_in_all_places(stages, secret), encoder)
    assert len(sink.put_events) == 8
    assert all(BODY[:12].encode() not in event for event in sink.put_events)
    assert all(b"[secret]" in event for event in sink.put_events)


@pytest.mark.parametrize("kind", PERSONAL_DATA)
def test_personal_data_leaves_only_if_its_kind_is_not_asked_for(kind: Any) -> None:
    everyone = " / ".join(PERSONS.values())
    for text in (everyone, f"x{chr(10)}{everyone}"):
        out = sent({"q": text, "deep": deep(text), text: [text]}, Encoder(redactor=Redactor(personal=[kind])))
        assert PERSONS[kind] not in out
        assert f"[{kind}]" in out
        assert all(out.count(other) == 4 for name, other in PERSONS.items() if name != kind)
    out = sent({"q": everyone})
    assert all(value in out for value in PERSONS.values())


@pytest.mark.parametrize("kind", PERSONAL_DATA)
def test_personal_data_does_not_leave_wherever_it_is_put(kind: Any) -> None:
    sink = put(
        lambda stages: record_in_all_places(stages, PERSONS[kind]), Encoder(redactor=Redactor(personal=PERSONAL_DATA))
    )
    assert all(PERSONS[kind].encode() not in event for event in sink.put_events)
    assert all(f"[{kind}]".encode() in event for event in sink.put_events)


def test_numbers_and_keys_can_be_personal_data() -> None:
    encoder = Encoder(redactor=Redactor(personal=PERSONAL_DATA))
    card = 4111_1111_1111_1111
    out = sent({"n": card, "a": np.array([card]), "k": {card: 1, "kim@example.com": 2}, "top_k": 5}, encoder)
    assert str(card) not in out
    assert "kim@" not in out
    assert '"top_k":5' in out


@pytest.mark.parametrize("secret", [*SHAPED, PERSONS["phone"], PERSONS["email"]])
@pytest.mark.parametrize("filler", ["x ", "가 ", "\x01 ", "\U0001f600 "])
def test_a_cut_does_not_let_half_a_secret_out(secret: str, filler: str) -> None:
    encoder = Encoder(Limits(max_attribute_bytes=1024, max_event_bytes=4096), Redactor(personal=PERSONAL_DATA))
    for before in range(60, 520, 3):
        out = sent({"q": (filler * before)[: before * 2] + secret + " " + filler * 2000}, encoder)
        assert secret[:8] not in out
        assert secret[-8:] not in out


# --- Where it goes ---


def test_neither_disk_nor_console_nor_log_has_a_secret(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    secret = SHAPED[0]
    store = FolderPayloadStore(tmp_path / "payloads")

    def mask(content: dict[str, Any]) -> dict[str, Any]:
        if content["stage_type"] == "masked":
            raise ValueError(str(content) + secret)
        return content

    tracer = StageTracer(
        "r",
        "http://127.0.0.1:9",
        durability="journal",
        spool_dir=str(tmp_path / "journal"),
        console=True,
        traceback_frames=5,
        payload_store=store,
        personal_data="all",
        mask=mask,
        shutdown_timeout_s=0.1,
    )
    with caplog.at_level(logging.DEBUG, "evalvault_sdk"):
        record_in_all_places(tracer, f"{secret} {PERSONS['phone']}")
        tracer.record_stage("masked", attributes={"q": "only here"})
        with tracer.stage("payload") as stage:
            stage.save_input({"password": PLAIN, "text": f"a {secret} {PERSONS['phone']}"})
            stage.save_output(Login("kim", PLAIN))
        written = b"".join(path.read_bytes() for path in tmp_path.rglob("*") if path.is_file())
        tracer.shutdown()
    terminal = capsys.readouterr()
    everything = written.decode("utf-8", "replace") + terminal.out + terminal.err + caplog.text
    assert b'"stage_type":"batch"' in written
    assert "payload" in terminal.err
    for private in (BODY[:12], PLAIN, PERSONS["phone"], "only here"):
        assert private not in everything
    assert tracer.stats().hook_errors == 1
    assert balances(tracer.stats())


# --- The user's own mask ---


def masked(mask: Callable[[dict[str, Any]], Any], **attributes: Any) -> tuple[dict[str, Any], ListSink]:
    sink = put(
        lambda stages: stages.record_stage("x", stage_name="n", attributes=attributes, metadata={"m": {1}}),
        Encoder(mask=mask),
    )
    return sink.events[0], sink


def test_a_mask_is_given_plain_data_without_secrets_and_the_programs_own_is_not_changed() -> None:
    seen: list[dict[str, Any]] = []
    own = {"list": [1]}

    def mask(content: dict[str, Any]) -> dict[str, Any]:
        seen.append(orjson.loads(orjson.dumps(content)))
        content["attributes"]["own"]["list"].append(2)
        content["attributes"]["new"] = {3}
        del content["attributes"]["q"]
        return content

    event, sink = masked(mask, q="x", own=own, odd=Login("kim", PLAIN), big=10**30)
    assert seen == [
        {
            "attributes": {
                "q": "x", "own": {"list": [1]}, "odd": {"user": "kim", "password": "[secret]"}, "big": str(10**30),
            },
            "metadata": {"m": [1]}, "stage_type": "x", "stage_name": "n", "status": "success",
        }
    ]  # fmt: skip
    assert own == {"list": [1]}
    left = {**seen[0]["attributes"], "own": {"list": [1, 2]}, "new": [3]}
    del left["q"]
    assert event["attributes"] == left
    assert sink.notes == {}


def test_what_a_mask_returns_is_made_plain_and_redacted_again() -> None:
    event, _ = masked(lambda content: {"attributes": {"a": float("nan"), "b": object, "c": SHAPED[0]}, "metadata": {}})
    assert event["attributes"] == {"a": None, "b": "object", "c": "[secret]"}
    assert event["metadata"] == {}


def fail(error: BaseException) -> Any:
    raise error


@pytest.mark.parametrize(
    "mask",
    [
        lambda content: fail(ValueError(str(content))),
        lambda content: fail(RecursionError()),
        lambda content: None,
        lambda content: [],
        lambda content: {},
        lambda content: {"attributes": {}},
        lambda content: {"attributes": None, "metadata": {}},
        lambda content: {"attributes": [content["attributes"]["q"]], "metadata": {}},
        lambda content: {"attributes": content["attributes"], "metadata": 5},
        lambda: {},
        lambda content: content["attributes"]["q"],
    ],
)
def test_of_what_a_mask_fails_at_nothing_leaves(mask: Any, caplog: pytest.LogCaptureFixture) -> None:
    event, sink = masked(mask, q="질문의 내용", n=1)
    assert event["attributes"] == {"redacted": "the function given as mask= failed"}
    assert event["metadata"] == {}
    assert (event["stage_type"], sink.notes) == ("x", {"hook_errors": 1})
    assert "질문" not in caplog.text
    assert len(caplog.records) == 1


def test_a_failing_mask_is_counted_each_time_and_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    transport = CapturingTransport()
    with StageTracer("r", transport=transport, mask=lambda content: fail(ValueError("내용"))) as tracer:
        for _ in range(5):
            tracer.record_stage("x", attributes={"q": "내용"})
    assert tracer.stats().hook_errors == 5
    assert [event.attributes for event in transport.events] == [{"redacted": "the function given as mask= failed"}] * 5
    assert len(caplog.records) == 1
    assert "내용" not in caplog.text


def test_who_interrupts_a_mask_interrupts_the_program_and_nothing_leaves() -> None:
    sink = ListSink()
    encoder = Encoder(mask=lambda content: fail(KeyboardInterrupt()))
    with pytest.raises(KeyboardInterrupt), StageContext(Recorder("r", sink, encoder=encoder), "x") as stage:
        stage.set(q="내용")
    assert sink.put_events == []


# --- content="none" ---

#: No word of these may leave, wherever it is put (the keys here are names of the program's).
texts = st.text(st.characters(min_codepoint=0xAC00, max_codepoint=0xD7A3) | st.just(" "), min_size=6, max_size=30)
names = st.sampled_from(["query", "answer", "rows", "documents", "error", "message", "note", "content", "text"])
values = st.recursive(
    texts | st.integers(0, 1000) | st.booleans() | st.none() | texts.map(ValueError) | texts.map(str.encode),
    lambda inner: st.dictionaries(names, inner, max_size=4) | st.builds(Login, texts, inner) | st.lists(texts),
    max_leaves=10,
)


def strings(value: Any) -> list[str]:
    if isinstance(value, str):
        return [value]
    if isinstance(value, dict):
        return [text for item in value.items() for part in item for text in strings(part)]
    return [text for item in value for text in strings(item)] if isinstance(value, list) else []


@settings(deadline=None)
@given(st.dictionaries(names, values, max_size=4), values, texts)
def test_without_content_no_text_leaves(attributes: dict[str, Any], value: Any, reason: str) -> None:
    def record(stages: Stages) -> None:
        @stages.stage("call", capture_args=True, capture_result=True, on_result=lambda result: {"documents": result})
        def call(query: Any, *rows: Any) -> Any:
            return value

        call(value, reason)
        with contextlib.suppress(ValueError), stages.stage("fails"):
            raise ValueError(reason)
        with stages.stage("block", metadata={"note": value}) as stage:
            stage.attributes = dict(attributes)
            stage.skip(reason)

    sink = put(record, Encoder(content="none"))
    left = [text for event in sink.events for text in strings(event)]
    assert not [text for text in left if any("가" <= letter <= "힣" for letter in text)]


def test_without_content_ids_counts_scores_lengths_and_timings_stay() -> None:
    attributes = {
        "doc_ids": ["doc-1", "doc-2"], "scores": [0.9, 0.5], "top_k": 5, "query": "보험 보장금액은?", "blocked": True,
        "rows": ["한 문장", "두 문장"], "model": "gpt-4", "session_id": "s-1", "ratio": None,
    }  # fmt: skip
    event = orjson.loads(sent(attributes, Encoder(content="none"), duration_ms=5.5, stage_name="bm25"))
    assert event["attributes"] == {
        "doc_ids": ["doc-1", "doc-2"], "scores": [0.9, 0.5], "top_k": 5, "query_length": 9, "blocked": True,
        "rows_count": 2, "model": "gpt-4", "session_id": "s-1", "ratio": None,
    }  # fmt: skip
    assert (event["duration_ms"], event["stage_name"], event["stage_type"]) == (5.5, "bm25", "x")


@pytest.mark.parametrize(
    ("stage_type", "attributes"),
    [
        (
            "retrieval",
            {"doc_ids": ["d1", "d2"], "scores": [0.9, 0.5], "relevant_doc_ids": ["d1"], "query": "보험 약관"},
        ),
        ("retrieval", {"doc_ids": [1, 2, 3], "scores": [0.9, None, 0.5], "top_k": 2}),
        ("rerank", {"input_count": 10, "output_count": 5, "scores": [0.9, 0.1], "texts": ["한 문장"]}),
        ("output", {"tokens_in": 900, "tokens_out": 210, "citations": ["d1"], "answer": "1억원 입니다."}),
        ("intent", {"predicted_label": "claim", "label": "claim", "confidence": 0.5, "text": "내 보험"}),
        ("safety_check", {"violation_count": 2, "blocked": True, "reason": "욕설 이다"}),
        ("answer_validation", {"passed": False, "note": "틀린 답"}),
        ("custom", {"ratio": 0.5, "text": "내용 이다"}),
    ],
)
def test_without_content_the_same_metrics_are_computed(stage_type: str, attributes: dict[str, Any]) -> None:
    def metrics(encoder: Encoder) -> dict[str, float]:
        sink = put(lambda stages: stages.record_stage(stage_type, attributes=attributes, duration_ms=5.0), encoder)
        found = metrics_of(StageEvent.from_dict(sink.events[0]))
        return {metric.metric_name: metric.score for metric in found if not metric.metric_name.endswith("_length")}

    assert metrics(Encoder(content="none")) == metrics(Encoder())


def test_without_content_nothing_is_stored_apart(tmp_path: Path) -> None:
    store = FolderPayloadStore(tmp_path / "payloads")
    transport = CapturingTransport()
    tracer = StageTracer("r", transport=transport, payload_store=store, content="none")
    with tracer, tracer.stage("x") as stage:
        stage.save_input("질문의 내용")
    assert transport.events[0].input_ref is None
    assert not (tmp_path / "payloads").exists()


TEXTLESS = Encoder(content="none")


def test_no_text_leaves_in_lists_of_lists_tracebacks_or_keys() -> None:
    text = "보험 약관의 내용"
    attributes = {
        "results": [(text, 0.9), (text, 0.8)],
        "deep": [[text]],
        "array": np.array([[text, 1]], dtype=object),
        "traceback": f"Traceback: {text}",
        "counts": {"kim@example.com": 3, text: 4},
        "contexts": [text, text],
        "query": text,
    }
    (event,) = put(lambda stages: stages.record_stage("x", attributes=attributes), TEXTLESS).events
    assert text not in orjson.dumps(event).decode()
    assert "kim" not in orjson.dumps(event).decode()
    kept = event["attributes"]
    assert kept["results"] == [[None, 0.9], [None, 0.8]]
    assert (kept["contexts_count"], kept["query_length"], kept["deep_count"]) == (2, len(text), 1)


def test_an_id_with_blanks_becomes_a_hash_so_that_counts_stay_right() -> None:
    attributes = {"doc_ids": ["보험 약관.pdf#page=3", "b"], "citations": ["보험 약관.pdf#page=3"], "model": "gpt-4"}
    (event,) = put(lambda stages: stages.record_stage("retrieval", attributes=attributes), TEXTLESS).events
    first, second = event["attributes"]["doc_ids"]
    assert second == "b"
    assert len(first) == 16
    assert event["attributes"]["citations"] == [first]
    metrics = {metric.metric_name: metric.score for metric in metrics_of(StageEvent.from_dict(event))}
    assert metrics["retrieval.result_count"] == 2


def test_violations_are_still_counted_without_their_text() -> None:
    attributes = {"violations": ["hate speech", "insult of a person"], "blocked": True}
    (event,) = put(lambda stages: stages.record_stage("safety_check", attributes=attributes), TEXTLESS).events
    metrics = {metric.metric_name: metric.score for metric in metrics_of(StageEvent.from_dict(event))}
    assert metrics["safety_check.violation_rate"] == 1


@pytest.mark.parametrize("shape", SHAPED)
def test_names_and_references_hold_no_secrets_either(shape: str) -> None:
    event = sent({}, stage_name=f"call {shape}", status=f"bad {shape}", input_ref={"store": "s", "id": f"key {shape}"})
    assert shape not in event
    assert "https://[secret]@h/x" in sent({}, output_ref={"store": "s", "id": "https://user:pw123@h/x"})


@pytest.mark.parametrize(
    "text",
    [
        """{"password": "ab'cdefghijk"}""",
        """{'password': 'ab"cdefghijk'}""",
        r"""{"password": "ab\"cdefghijk"}""",
        r"""{\"password\": \"ab'cdefghijk\"}""",
    ],
)
def test_a_quote_within_a_secret_does_not_end_it(text: str) -> None:
    assert "cdefghijk" not in Redactor().text(text)


def test_what_is_cut_is_redacted_first() -> None:
    class Client:
        def __repr__(self) -> str:
            return "x " * 492 + SHAPED[0]

    assert SHAPED[0][:12] not in sent({"client": Client(), f"{'k ' * 124}{SHAPED[0]}": 1})


def test_a_mask_sees_the_name_of_a_stage_and_cannot_lose_the_rate_of_sampling() -> None:
    def mask(content: dict[str, Any]) -> dict[str, Any]:
        return {"attributes": {}, "metadata": {}, "stage_name": content["stage_name"].replace("kim", "someone")}

    sink = ListSink()
    recorder = Recorder("r", sink, encoder=Encoder(mask=mask), sampling=Sampling(rate=0.999999))
    while not sink.events:
        Stages(recorder).record_stage("x", stage_name="mail of kim", attributes={"a": 1}, metadata={"b": 1})
    event = sink.events[0]
    assert (event["stage_name"], event["attributes"]) == ("mail of someone", {})
    assert event["metadata"] == {"sample_rate": 0.999999}

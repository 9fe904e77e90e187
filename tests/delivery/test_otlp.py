"""Stages as spans: nothing is lost on the way back, and OTLP's outcomes are ours."""

from __future__ import annotations

import contextlib
import gzip
import subprocess
import sys
import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import attrs
import orjson
import pytest
import responses
from hypothesis import given
from hypothesis import strategies as st
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
    ExportTraceServiceRequest,
    ExportTraceServiceResponse,
)

from evalvault_sdk import ConfigurationError, Settings, StageEvent, StageTracer
from evalvault_sdk.delivery.batch import Batch
from evalvault_sdk.delivery.transport import Delivered, Refused, RejectedEvent, RetryLater, TooLarge
from evalvault_sdk.delivery.transport.otlp import OtlpTransport, request_of
from evalvault_sdk.ids import new_stage_id, span_id_of, trace_id_of
from evalvault_sdk.server.otlp import read_spans, stage_event_of
from tests.support import DATA, LiveServer, balances, clean_environment, live_server, said_without, wait_for

URL = "http://collector.test:4318/v1/traces"
PROTOBUF = "application/x-protobuf"
EVENTS = tuple(orjson.dumps({"run_id": "r", "stage_type": "x", "stage_id": str(number)}) for number in range(4))
REAL = [
    StageEvent.from_dict(orjson.loads(line))
    for path in sorted(DATA.glob("*.jsonl"))
    for line in path.read_bytes().splitlines()
]


@pytest.fixture
def http() -> Iterator[responses.RequestsMock]:
    with responses.RequestsMock() as mock:
        yield mock


def settings(**given: Any) -> Settings:
    return Settings(**{"run_id": "r", "otlp_endpoint": "http://collector.test:4318", **given})


def send(*events: bytes, **given: Any) -> Any:
    sender = OtlpTransport(settings(**given))
    with contextlib.closing(sender):
        return sender.send(Batch(events or EVENTS))


def there_and_back(events: list[StageEvent]) -> list[StageEvent]:
    """Return what the server makes of the spans that events become."""
    batch = read_spans(request_of(events), protobuf=True)
    assert not batch.rejected
    return [stage_event_of(span) for span in batch.spans]


def spans_of(body: bytes) -> list[Any]:
    request = ExportTraceServiceRequest.FromString(body)
    return [span for resource in request.resource_spans for scope in resource.scope_spans for span in scope.spans]


def attributes_of(span: Any) -> dict[str, Any]:
    """Return the attributes of a span as OpenTelemetry's own classes have them; lists as lists."""

    def value_of(value: Any) -> Any:
        kind = value.WhichOneof("value")
        return [value_of(item) for item in value.array_value.values] if kind == "array_value" else getattr(value, kind)

    return {pair.key: value_of(pair.value) for pair in span.attributes}


# -- the way back -------------------------------------------------------------------------------------

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20)
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXTS
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXTS, inner, max_size=4), max_leaves=12
)
NAMES = TEXTS | st.sampled_from(
    [
        *("query", "doc_ids", "scores", "tokens_in", "model", "error", "answer", "documents", "rag.module", "metadata"),
        *(
            "openinference.span.kind",
            "input.value",
            "retrieval.documents.0.document.id",
            "session.id",
            "evalvault.event",
        ),
    ]
)
OBJECTS = st.dictionaries(
    NAMES, VALUES | st.lists(TEXTS, max_size=3) | st.lists(st.floats(0, 1), max_size=3), max_size=6
)
IDS = (
    st.uuids().map(lambda _: new_stage_id())
    | st.text("0123456789abcdef", min_size=16, max_size=16)
    | TEXTS.filter(str.strip)
)
TIMES = st.none() | st.datetimes(
    datetime(1900, 1, 1), datetime(2600, 1, 1), timezones=st.sampled_from([timezone.utc, timezone(timedelta(hours=9))])
)


@st.composite
def stage_events(draw: Any) -> StageEvent:
    started, finished = draw(TIMES), draw(TIMES)
    if started is not None and finished is not None and finished < started:
        started, finished = finished, started
    return StageEvent(
        run_id=draw(st.sampled_from(["r", "보험 1"])),
        stage_type=draw(st.sampled_from(["retrieval", "rerank", "output", "request", "system_prompt", "나의 것"])),
        stage_id=draw(IDS),
        stage_name=draw(st.none() | TEXTS),
        parent_stage_id=draw(st.none() | IDS),
        status=draw(st.sampled_from(["success", "error", "cancelled", "mine"])),
        attempt=draw(st.integers(1, 5)),
        started_at=started,
        finished_at=finished,
        duration_ms=draw(st.none() | st.floats(0, 1e18)),
        input_ref=draw(st.none() | st.just({"store": "s", "id": "1", "type": "json"})),
        attributes=draw(OBJECTS),
        metadata=draw(OBJECTS),
        trace_id=draw(st.none() | st.just("4bf92f3577b34da6a3ce929d0e0e4736") | TEXTS),
        span_id=draw(st.none() | st.just("00f067aa0ba902b7") | TEXTS),
    )


@given(stage_events())
def test_any_stage_comes_back_from_being_a_span_as_it_was(event: StageEvent) -> None:
    assert there_and_back([event]) == [event]


def test_the_real_files_come_back_as_they_were() -> None:
    assert sorted(there_and_back(REAL), key=lambda event: event.stage_id) == sorted(
        REAL, key=lambda event: event.stage_id
    )
    assert len(REAL) > 5


def test_a_span_that_was_changed_on_the_way_is_a_span_like_any_other() -> None:
    request = ExportTraceServiceRequest.FromString(request_of([REAL[0]]))
    (span,) = request.resource_spans[0].scope_spans[0].spans
    for pair in span.attributes:
        if pair.key == "evalvault.event":
            pair.value.string_value = pair.value.string_value.replace('"attempt":1', '"attempt":0')
    (read,) = read_spans(request.SerializeToString(), protobuf=True).spans
    event = stage_event_of(read)
    assert (event.run_id, event.stage_type) == (REAL[0].run_id, REAL[0].stage_type)
    assert event.stage_id == span.span_id.hex()


# -- what others see ----------------------------------------------------------------------------------


def test_parents_and_traces_are_those_of_the_stages() -> None:
    root, child, foreign = new_stage_id(), new_stage_id(), "00f067aa0ba902b7"
    made: list[dict[str, Any]] = [
        {"stage_id": root, "trace_id": trace_id_of(root), "span_id": span_id_of(root)},
        {"stage_id": child, "trace_id": trace_id_of(root), "parent_stage_id": root, "span_id": span_id_of(child)},
        # Within a span of OpenTelemetry that is no stage; called by one; with ids that are none of W3C's.
        {"stage_id": new_stage_id(), "span_id": foreign},
        {"stage_id": new_stage_id(), "metadata": {"parent_span_id": foreign}},
        {"stage_id": "one", "trace_id": "t"},
        {"stage_id": "two", "trace_id": "t", "parent_stage_id": "one"},
    ]
    spans = spans_of(request_of([StageEvent(run_id="r", stage_type="x", **fields) for fields in made]))
    assert spans[0].trace_id.hex() == trace_id_of(root)
    assert (spans[0].span_id.hex(), spans[0].parent_span_id) == (span_id_of(root), b"")
    assert (spans[1].span_id.hex(), spans[1].parent_span_id) == (span_id_of(child), spans[0].span_id)
    assert [span.parent_span_id.hex() for span in spans[2:4]] == [foreign, foreign]
    assert spans[5].parent_span_id == spans[4].span_id
    assert spans[5].trace_id == spans[4].trace_id
    assert all(len(span.span_id) == 8 and len(span.trace_id) == 16 for span in spans)


def test_who_knows_the_conventions_only_sees_documents_tokens_texts_and_errors() -> None:
    retrieval = StageEvent(
        run_id="r",
        stage_type="retrieval",
        attributes={"query": "보험?", "doc_ids": ["a", "b"], "scores": [0.9, None], "top_k": 5},
        metadata={"session_id": "s-1"},
    )
    output = StageEvent(
        run_id="r",
        stage_type="output",
        status="error",
        attributes={
            **{"tokens_in": 10, "tokens_out": 2, "model": "m", "answer": "1억", "usage": {"cost": 0.1}},
            "error": {"type": "TimeoutError", "message": "the model did not answer"},
        },
    )
    first, second = spans_of(request_of([retrieval, output]))
    found, answered = attributes_of(first), attributes_of(second)
    expected = {
        "evalvault.run_id": "r",
        "evalvault.stage_type": "retrieval",
        "openinference.span.kind": "RETRIEVER",
        "input.value": "보험?",
        "retrieval.documents.0.document.id": "a",
        "retrieval.documents.0.document.score": 0.9,
        "retrieval.documents.1.document.id": "b",
        "session.id": "s-1",
        "doc_ids": ["a", "b"],
        "scores": "[0.9,null]",
    }
    assert {name: found.get(name) for name in expected} == expected
    expected = {
        "openinference.span.kind": "LLM",
        "gen_ai.operation.name": "chat",
        "gen_ai.usage.input_tokens": 10,
        "llm.token_count.completion": 2,
        "gen_ai.request.model": "m",
        "llm.model_name": "m",
        "output.value": "1억",
        "usage": '{"cost":0.1}',
        "error.type": "TimeoutError",
    }
    assert {name: answered.get(name) for name in expected} == expected
    assert (first.status.code, second.status.code) == (1, 2)
    assert second.status.message == "the model did not answer"
    assert [event.name for event in second.events] == ["exception"]


def test_a_request_is_that_of_a_server_in_the_words_of_http() -> None:
    said = {"method": "POST", "route": "/ask", "status_code": 200}
    (span,) = spans_of(request_of([StageEvent(run_id="r", stage_type="request", attributes=said)]))
    told = attributes_of(span)
    assert span.kind == 2
    assert (told["http.request.method"], told["http.route"], told["http.response.status_code"]) == ("POST", "/ask", 200)


def test_runs_are_services_and_projects_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    events = [StageEvent(run_id=run_id, stage_type="x") for run_id in ("a", "b", "a")]
    request = ExportTraceServiceRequest.FromString(request_of(events))
    told = [attributes_of(resource.resource) for resource in request.resource_spans]
    assert [(one["service.name"], one["openinference.project.name"]) for one in told] == [("a", "a"), ("b", "b")]
    monkeypatch.setenv("OTEL_SERVICE_NAME", "rag")
    request = ExportTraceServiceRequest.FromString(request_of(events))
    assert {attributes_of(resource.resource)["service.name"] for resource in request.resource_spans} == {"rag"}


# -- outcomes -----------------------------------------------------------------------------------------


def test_a_batch_is_posted_as_protobuf_with_what_the_settings_say(http: responses.RequestsMock) -> None:
    http.post(URL, body=b"", content_type=PROTOBUF)
    events = [orjson.dumps({"run_id": "r", "stage_type": "x", "attributes": {"text": "a" * 2000}})]
    assert send(*events, token="s3cret", headers={"X-Gateway": "a"}) == Delivered()
    request = http.calls[0].request
    assert request.headers["Content-Type"] == request.headers["Accept"] == PROTOBUF
    assert request.headers["Content-Encoding"] == "gzip"
    assert (request.headers["Authorization"], request.headers["X-Gateway"]) == ("Bearer s3cret", "a")
    assert isinstance(request.body, bytes)
    (span,) = spans_of(gzip.decompress(request.body))
    assert attributes_of(span)["text"] == "a" * 2000


@pytest.mark.parametrize("endpoint", ["http://collector.test:4318", "http://collector.test:4318/", URL])
def test_the_path_is_added_to_the_endpoint_unless_it_is_there(endpoint: str) -> None:
    assert OtlpTransport(settings(otlp_endpoint=endpoint)).destination == URL


def partial(count: int, message: str = "") -> bytes:
    response = ExportTraceServiceResponse()
    response.partial_success.rejected_spans = count
    response.partial_success.error_message = message
    body: bytes = response.SerializeToString()
    return body


@pytest.mark.parametrize(
    ("body", "content_type", "outcome"),
    [
        (b"", PROTOBUF, Delivered()),
        (b"{}", "application/json; charset=utf-8", Delivered()),
        (partial(0, "a warning"), PROTOBUF, Delivered()),
        (partial(1, "too old"), PROTOBUF, Delivered((), 1, "too old")),
        (
            b'{"partialSuccess":{"rejectedSpans":"2"}}',
            "application/json",
            Delivered((), 2, "the endpoint does not say why"),
        ),
        (partial(4, "no room"), PROTOBUF, Delivered(tuple(RejectedEvent(index, "no room") for index in range(4)))),
    ],
)
def test_an_answer_200_says_how_many_spans_were_refused(
    http: responses.RequestsMock, body: bytes, content_type: str, outcome: Delivered
) -> None:
    http.post(URL, body=body, content_type=content_type)
    assert send() == outcome


@pytest.mark.parametrize(
    ("status", "body", "content_type"),
    [
        (200, b"<html>login</html>", "text/html"),
        (200, b"\xff\xff", PROTOBUF),
        (200, b"[]", "application/json"),
        (200, b'{"partialSuccess": {"rejectedSpans": "many"}}', "application/json"),
        (400, b"<html>gateway</html>", "text/html"),
    ],
)
def test_what_is_no_answer_of_otlp_is_no_delivery(
    http: responses.RequestsMock, status: int, body: bytes, content_type: str
) -> None:
    http.post(URL, body=body, content_type=content_type, status=status)
    outcome = send()
    assert isinstance(outcome, RetryLater)
    assert "EVALVAULT_OTLP_ENDPOINT" in (outcome.advice or "")


@pytest.mark.parametrize("status", [429, 502, 503, 504])
def test_what_may_pass_is_tried_again_when_the_endpoint_says(http: responses.RequestsMock, status: int) -> None:
    http.post(URL, status=status, headers={"Retry-After": "7"})
    assert send() == RetryLater(f"HTTP {status}", wait_s=7.0)


def test_other_answers_mean_what_they_mean_for_any_transport(http: responses.RequestsMock) -> None:
    expected: dict[int, type] = {
        400: Refused,
        413: TooLarge,
        401: RetryLater,
        404: RetryLater,
        500: RetryLater,
        302: RetryLater,
    }
    for status, kind in expected.items():
        http.post(URL, body=b"", content_type=PROTOBUF, status=status)
        assert isinstance(send(), kind), status


def test_what_breaks_evalvaults_rules_is_judged_here_and_costs_no_neighbour(http: responses.RequestsMock) -> None:
    http.post(URL, body=b"", content_type=PROTOBUF)
    outcome = send(EVENTS[0], orjson.dumps({"run_id": "r", "stage_type": ""}), EVENTS[1])
    assert outcome == Delivered((RejectedEvent(1, "stage_type is required and must not be empty"),))
    assert isinstance(http.calls[0].request.body, bytes)
    assert len(spans_of(http.calls[0].request.body)) == 2


def test_where_all_events_are_invalid_nothing_is_sent() -> None:
    outcome = send(orjson.dumps({"run_id": "r"}))
    assert isinstance(outcome, Delivered)
    assert len(outcome.rejected) == 1


# -- delivery -----------------------------------------------------------------------------------------


def test_spans_that_were_refused_without_a_name_are_counted_and_not_said_to_be_kept(
    http: responses.RequestsMock, caplog: pytest.LogCaptureFixture
) -> None:
    http.post(URL, body=partial(2, "too old"), content_type=PROTOBUF)
    with StageTracer("r", otlp_endpoint="http://collector.test:4318") as tracer:
        tracer.record_batch([{"stage_type": "x"} for _ in range(5)])
        report = tracer.flush()
        assert (report.recorded, report.delivered, report.rejected) == (5, 3, 2)
        assert balances(report)
    assert len(http.calls) == 1  # what was accepted is not sent again
    assert "rejected 2 events, the first because: too old; they could not be kept" in caplog.text


def test_what_goes_to_our_server_as_spans_is_there_as_it_was(server: LiveServer) -> None:
    def sent_by(**destination: Any) -> list[dict[str, Any]]:
        run = f"otlp-{uuid.uuid4()}"
        with StageTracer(run, **destination) as tracer:
            tracer.record_batch([attrs.evolve(event, run_id=run) for event in REAL])
            assert tracer.flush().complete
        events: list[dict[str, Any]] = server.get(f"events/{run}")["events"]
        return [{**event, "run_id": "r"} for event in sorted(events, key=lambda event: event["stage_id"])]

    assert sent_by(otlp_endpoint=server.url) == sent_by(api_url=server.url)


def test_the_tree_of_a_request_is_the_same_by_spans(server: LiveServer, monkeypatch: pytest.MonkeyPatch) -> None:
    run = f"otlp-{uuid.uuid4()}"
    monkeypatch.setenv("EVALVAULT_OTLP_ENDPOINT", server.url)
    with StageTracer(run) as tracer:  # by settings alone

        @tracer.stage("output")
        def answer() -> None:
            raise TimeoutError("no answer")

        with contextlib.suppress(TimeoutError), tracer.stage("request"):
            with tracer.stage("retrieval") as stage:
                stage.set(doc_ids=["a"], scores=[0.5])
            answer()
        assert tracer.flush().complete
    (trace,) = server.get(f"traces/{run}")["traces"]
    assert (trace["stage_count"], trace["error_count"], trace["status"]) == (3, 2, "error")
    events = {event["stage_type"]: event for event in server.get(f"events/{run}")["events"]}
    assert events["retrieval"]["parent_stage_id"] == events["request"]["stage_id"]
    assert events["output"]["attributes"]["error"] == {"type": "TimeoutError", "message": "no answer"}


def test_spans_wait_on_disk_while_nothing_listens_and_the_next_process_sends_them(tmp_path: Path) -> None:
    with live_server(tmp_path / "x.db") as server:
        port = server.port
    program = (
        "from evalvault_sdk import StageTracer\n"
        f"tracer = StageTracer('run', otlp_endpoint='http://127.0.0.1:{port}')\n"
        "for number in range(50): tracer.record_stage('x', attributes={'number': number})\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**clean_environment(), "EVALVAULT_SHUTDOWN_TIMEOUT_S": "0.2"},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0
    again = LiveServer(tmp_path / "x.db", port=port)
    try:
        with StageTracer("other", otlp_endpoint=again.url) as tracer:
            wait_for(lambda: tracer.stats().recovered == 50)
        assert again.get("events/run")["total"] == 50
    finally:
        again.stop()


def test_events_go_to_one_place() -> None:
    with pytest.raises(ConfigurationError, match="one place"):
        StageTracer("r", "http://127.0.0.1:1", otlp_endpoint="http://127.0.0.1:2")
    with pytest.raises(ConfigurationError, match="otlp_endpoint must be an http"):
        StageTracer("r", otlp_endpoint="collector:4317")


def test_a_missing_package_is_named_with_its_extra(tmp_path: Path) -> None:
    statements = "from evalvault_sdk import StageTracer; StageTracer('r', otlp_endpoint='http://x')"
    assert "pip install 'evalvault-sdk[otel]'" in said_without("opentelemetry", statements, tmp_path)

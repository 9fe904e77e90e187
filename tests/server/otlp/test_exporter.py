"""What the real OpenTelemetry SDK sends, and what it makes of our answers."""

from __future__ import annotations

import gzip
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http import Compression
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor

from evalvault_sdk import StageEvent
from evalvault_sdk.server.otlp import is_protobuf, read_spans, response_body, stage_event_of


class Receiver(BaseHTTPRequestHandler):
    """Reads what it is sent as the routes do, and keeps the events on its server."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Content-Encoding"] == "gzip"
        protobuf = is_protobuf(self.headers["Content-Type"])
        batch = read_spans(gzip.decompress(body), protobuf=protobuf)
        answer = response_body(batch.rejected, protobuf=protobuf)
        self.server.events += [stage_event_of(span) for span in batch.spans]  # type: ignore[attr-defined]
        self.send_response(200)
        self.send_header("Content-Type", self.headers["Content-Type"])
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[HTTPServer]:
    server = HTTPServer(("127.0.0.1", 0), Receiver)
    server.events = []  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def provider(receiver: HTTPServer) -> TracerProvider:
    exporter = OTLPSpanExporter(
        endpoint=f"http://127.0.0.1:{receiver.server_port}/v1/traces", compression=Compression.Gzip
    )
    provider = TracerProvider(resource=Resource.create({"service.name": "휴가-안내"}), shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return provider


def sent_to(receiver: HTTPServer, provider: TracerProvider) -> dict[str | None, StageEvent]:
    provider.shutdown()  # which sends what is waiting
    events: list[StageEvent] = receiver.events  # type: ignore[attr-defined]
    return {event.stage_name: event for event in events}


def answer_in(tracer: trace.Tracer) -> None:
    with tracer.start_as_current_span("answer") as span:
        span.set_attributes({"gen_ai.operation.name": "chat", "gen_ai.request.model": "m"})
        raise TimeoutError("모델이 답하지 않는다")


def search_in(span: trace.Span) -> None:
    # As EvalVault's adapter for Open RAG Trace does it: the span has ended before use_span() would set its status.
    with trace.use_span(span, end_on_exit=False):
        span.set_attribute("rag.module", "retrieve")
        try:
            raise LookupError("no index")
        except LookupError as error:
            span.record_exception(error)
            raise
        finally:
            span.end()


def test_nested_spans_arrive_with_their_parents_and_a_failure_with_its_exception(
    receiver: HTTPServer, provider: TracerProvider, caplog: pytest.LogCaptureFixture
) -> None:
    tracer = provider.get_tracer("my-rag", "1.0")
    with caplog.at_level(logging.WARNING), tracer.start_as_current_span("ask", kind=trace.SpanKind.SERVER):
        with tracer.start_as_current_span("search") as span:
            span.set_attributes({"rag.module": "retrieve", "retrieval.query": "연차", "retrieval.top_k": 5})
            span.set_attribute("retrieval.documents_json", '[{"doc_id": "leave-01", "score": 0.83}]')
            span.add_event("log", {"log.level": "info", "log.message": "found"})
        with pytest.raises(TimeoutError):
            answer_in(tracer)
    events = sent_to(receiver, provider)
    assert not caplog.records
    ask, search, answer = (events[name] for name in ("ask", "search", "answer"))
    assert (ask.stage_type, search.stage_type, answer.stage_type) == ("server", "retrieval", "output")
    assert (ask.parent_stage_id, search.parent_stage_id, answer.parent_stage_id) == (None, ask.stage_id, ask.stage_id)
    assert {event.trace_id for event in events.values()} == {ask.trace_id}
    assert {event.run_id for event in events.values()} == {"휴가-안내"}
    assert ask.started_at is not None
    assert answer.finished_at is not None
    assert ask.started_at <= answer.finished_at
    assert search.attributes["doc_ids"] == ["leave-01"]
    assert search.metadata["events"][0]["attributes"]["log.message"] == "found"
    assert (search.metadata["scope"]["name"], search.metadata["resource"]["service.name"]) == ("my-rag", "휴가-안내")
    assert (search.status, answer.status) == ("success", "error")
    error = answer.attributes["error"]
    assert (error["type"], error["message"]) == ("TimeoutError", "모델이 답하지 않는다")
    assert "Traceback" in error["stacktrace"]


def test_a_stage_that_failed_within_evalvaults_own_adapter_is_a_failure(
    receiver: HTTPServer, provider: TracerProvider
) -> None:
    with pytest.raises(LookupError):
        search_in(provider.get_tracer("open-rag-trace").start_span("search"))
    event = sent_to(receiver, provider)["search"]
    assert event.status == "error"
    assert event.attributes["error"]["message"] == "no index"

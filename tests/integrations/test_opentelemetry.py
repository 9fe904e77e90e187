"""Spans of OpenTelemetry as stages: the same as by way of the server, and in one tree with the program's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from typing import Any

import orjson
import pytest
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.common.trace_encoder import encode_spans
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import SpanLimits, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ParentBased, TraceIdRatioBased
from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags

from evalvault_sdk import StageEvent, StageTracer, current_stage, trace_headers
from evalvault_sdk.capture import context
from evalvault_sdk.integrations.opentelemetry import EvalVaultSpanProcessor
from evalvault_sdk.server.otlp import read_spans, stage_event_of
from evalvault_sdk.testing import CapturingTransport, RecordedStages


@pytest.fixture
def exported() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def spans(tracer: StageTracer, exported: InMemorySpanExporter) -> Iterator[trace.Tracer]:
    provider = TracerProvider(resource=Resource({"service.name": "rag", "pid": 7}), shutdown_on_exit=False)
    provider.add_span_processor(EvalVaultSpanProcessor(tracer))
    provider.add_span_processor(SimpleSpanProcessor(exported))
    yield provider.get_tracer("my-rag", "1.0")
    provider.shutdown()
    assert context.finders == ()


def by_the_server(spans: Any, run_id: str = "r") -> list[dict[str, Any]]:
    """Return what the server makes of spans that come by OTLP."""
    batch = read_spans(encode_spans(spans).SerializeToString(), protobuf=True)
    assert not batch.rejected
    return [orjson.loads(orjson.dumps(stage_event_of(span, run_id=run_id).to_dict())) for span in batch.spans]


def test_a_span_is_the_same_stage_whichever_way_it_comes(
    spans: trace.Tracer, recorded: RecordedStages, exported: InMemorySpanExporter
) -> None:
    with spans.start_as_current_span("ask", kind=trace.SpanKind.SERVER, attributes={"session.id": "s-1"}) as root:
        retrieval: dict[str, Any] = {
            "openinference.span.kind": "RETRIEVER",
            "input.value": "보험 보장금액은?",
            "retrieval.documents.0.document.id": "policy-1",
            "retrieval.documents.0.document.score": 0.91,
            "retrieval.documents.1.document.id": "policy-7",
            "flags": [True, False],
            "numbers": [1, 2],
            "raw": b"\xff",
            "nan": float("nan"),
        }
        links = [trace.Link(root.get_span_context())]
        with spans.start_as_current_span("retrieve", attributes=retrieval, links=links):
            pass
        with (
            pytest.raises(TimeoutError),
            spans.start_as_current_span(
                "chat", attributes={"gen_ai.operation.name": "chat", "gen_ai.usage.input_tokens": 9}
            ),
        ):
            raise TimeoutError("the model did not answer")
    sent = [event.to_dict() for event in recorded.events]
    received = by_the_server(exported.get_finished_spans())
    assert orjson.loads(orjson.dumps(sent)) == received
    assert [(event.stage_type, event.status) for event in recorded.events] == [
        ("retrieval", "success"),
        ("output", "error"),
        ("server", "success"),
    ]
    assert recorded.find("retrieval").attributes["doc_ids"] == ["policy-1", "policy-7"]


def test_a_text_that_no_store_takes_is_made_good(spans: trace.Tracer, recorded: RecordedStages) -> None:
    with spans.start_as_current_span("a\x00b", attributes={"text\x00": "\ud800"}):
        pass
    (event,) = recorded.events
    assert (event.stage_name, event.attributes) == ("a\ufffdb", {"text\ufffd": "?"})


def test_what_the_sdk_left_out_of_a_span_is_told_as_by_the_server(
    tracer: StageTracer, recorded: RecordedStages, exported: InMemorySpanExporter
) -> None:
    provider = TracerProvider(span_limits=SpanLimits(max_attributes=1, max_events=1), shutdown_on_exit=False)
    provider.add_span_processor(EvalVaultSpanProcessor(tracer))
    provider.add_span_processor(SimpleSpanProcessor(exported))
    with provider.get_tracer("t").start_as_current_span("x", attributes={"a": 1, "b": 2, "c": 3}) as span:
        span.add_event("one", {"a": 1})
        span.add_event("two")
    provider.shutdown()
    (event,) = recorded.events
    assert event.metadata["dropped"] == {"attributes": 2, "events": 1}
    assert [orjson.loads(orjson.dumps(event.to_dict()))] == by_the_server(exported.get_finished_spans())


def test_stages_and_spans_are_one_tree_in_whichever_order_they_are_nested(
    tracer: StageTracer, spans: trace.Tracer, recorded: RecordedStages
) -> None:
    with tracer.stage("request"):
        with spans.start_as_current_span("chain", attributes={"evalvault.stage_type": "chain"}):
            with tracer.stage("own"):
                tracer.record_stage("note")
                with spans.start_as_current_span("llm", attributes={"evalvault.stage_type": "output"}):
                    current_stage().set(never="lost in the wrong stage")
                    tracer.record_stage("inside")
            tracer.record_stage("after")
        tracer.record_stage("last")
    assert recorded.outline() == (
        "request\n  chain\n    own\n      note\n      output\n        inside\n    after\n  last"
    )
    assert len({event.trace_id for event in recorded.events}) == 1
    assert len({event.span_id for event in recorded.events}) == len(recorded)
    assert all("never" not in event.attributes for event in recorded.events)


def test_a_span_that_began_in_a_sibling_is_below_the_parent_that_it_names(
    spans: trace.Tracer, recorded: RecordedStages
) -> None:
    def span(name: str, **options: Any) -> Any:
        return spans.start_as_current_span(name, attributes={"evalvault.stage_type": name}, **options)

    with span("sequence") as parent, span("last"):
        with span("first", context=trace.set_span_in_context(parent)):
            pass
        with span("apart", context=Context()):
            pass
    assert recorded.outline() == "sequence\n  last\n  first\napart"
    assert recorded.find("apart").event.trace_id != recorded.find("sequence").event.trace_id


def test_a_service_that_is_called_from_within_a_span_is_below_the_span(
    tracer: StageTracer, spans: trace.Tracer, recorded: RecordedStages
) -> None:
    with spans.start_as_current_span("call") as span:
        headers = trace_headers()
    with tracer.trace(traceparent=headers["traceparent"], tracestate=headers["tracestate"]):
        tracer.record_stage("called")
    assert headers["traceparent"].split("-")[2] == f"{span.get_span_context().span_id:016x}"
    assert recorded.outline() == "internal\n  called"


def test_a_span_of_a_remote_caller_keeps_it_as_its_parent(spans: trace.Tracer, recorded: RecordedStages) -> None:
    remote = SpanContext(
        0x4BF92F3577B34DA6A3CE929D0E0E4736, 0x00F067AA0BA902B7, is_remote=True, trace_flags=TraceFlags(1)
    )
    with spans.start_as_current_span("called", context=trace.set_span_in_context(NonRecordingSpan(remote))):
        pass
    (event,) = recorded.events
    assert (event.trace_id, event.parent_stage_id) == ("4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7")


@pytest.mark.parametrize("sampler", [ALWAYS_OFF, ParentBased(TraceIdRatioBased(0.0))])
def test_a_span_that_is_not_sampled_is_not_recorded_and_is_no_parent(
    tracer: StageTracer, recorded: RecordedStages, sampler: Any
) -> None:
    provider = TracerProvider(sampler=sampler, shutdown_on_exit=False)
    processor = EvalVaultSpanProcessor(tracer)
    provider.add_span_processor(processor)
    with tracer.stage("request"), provider.get_tracer("t").start_as_current_span("x"), tracer.stage("own"):
        pass
    provider.shutdown()
    assert recorded.outline() == "request\n  own"
    assert not processor._known


def test_the_tracer_samples_spans_and_stages_of_a_trace_alike() -> None:
    # Nothing is drawn, but a trace with an error is kept whole.
    delivered = CapturingTransport()
    with StageTracer("r", transport=delivered, sample_rate=0.0) as tracer:
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(EvalVaultSpanProcessor(tracer))
        spans = provider.get_tracer("t")
        for fails in (False, True):
            with spans.start_as_current_span("ask"):
                with tracer.stage("own"):
                    pass
                with spans.start_as_current_span("chat") as span:
                    if fails:
                        span.set_status(trace.StatusCode.ERROR, "no answer")
        assert provider.force_flush()
        assert tracer.stats().sampled_out == 3
        provider.shutdown()
    assert [event.stage_name or event.stage_type for event in delivered.events] == ["own", "chat", "ask"]
    assert len({event.trace_id for event in delivered.events}) == 1


def test_shutting_down_the_provider_leaves_the_tracer_running() -> None:
    delivered = CapturingTransport()
    with StageTracer("r", transport=delivered) as tracer:
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(EvalVaultSpanProcessor(tracer))
        with provider.get_tracer("t").start_as_current_span("x"):
            pass
        assert provider.force_flush(5_000)
        assert len(delivered.events) == 1
        provider.shutdown()
        tracer.record_stage("later")
        assert tracer.flush().complete
    assert len(delivered.events) == 2
    assert context.finders == ()


def test_content_and_secrets_are_kept_back_as_in_any_stage() -> None:
    delivered = CapturingTransport()
    with StageTracer("r", transport=delivered, personal_data=["email"]) as tracer:
        provider = TracerProvider(shutdown_on_exit=False)
        provider.add_span_processor(EvalVaultSpanProcessor(tracer))
        attributes = {"api_key": "abc", "input.value": "write to kim@example.com"}
        with provider.get_tracer("t").start_as_current_span("x", attributes=attributes):
            pass
        tracer.flush()
        provider.shutdown()
    assert delivered.events[0].attributes == {"api_key": "[secret]", "input": "write to [email]"}


def test_spans_without_end_take_a_bounded_place(
    tracer: StageTracer, recorded: RecordedStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("evalvault_sdk.integrations.opentelemetry._MAX_KNOWN", 10)
    provider = TracerProvider(shutdown_on_exit=False)
    processor = EvalVaultSpanProcessor(tracer)
    provider.add_span_processor(processor)
    spans = provider.get_tracer("t")
    begun = [spans.start_span(f"span {number}") for number in range(100)]
    assert len(processor._known) == 10
    for span in begun:
        span.end()
    assert [event.stage_name for event in recorded.events] == [f"span {number}" for number in range(100)]
    provider.shutdown()


def test_a_fault_of_ours_costs_the_event_and_not_the_program(
    spans: trace.Tracer, recorded: RecordedStages, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any, **__: Any) -> StageEvent:
        raise RuntimeError("a fault")

    monkeypatch.setattr("evalvault_sdk.integrations.opentelemetry.stage_event_of", broken)
    with spans.start_as_current_span("x"):
        pass
    assert (len(recorded), recorded.refused) == (0, {"internal_error": 1})


def test_a_clock_that_was_set_back_costs_no_span(spans: trace.Tracer, recorded: RecordedStages) -> None:
    now_ns = time.time_ns()
    spans.start_span("x", start_time=now_ns).end(end_time=now_ns - 10**9)
    (event,) = recorded.events
    assert event.duration_ms == 0


def test_threads_at_once_lose_nothing(tracer: StageTracer, spans: trace.Tracer, recorded: RecordedStages) -> None:
    def work() -> None:
        for _ in range(100):
            with spans.start_as_current_span("span"), tracer.stage("own"):
                pass

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(recorded) == 1_600
    assert {root.outline() for root in recorded.roots} == {"internal\n  own"}


def test_where_nothing_is_recorded_nothing_is_kept() -> None:
    with StageTracer("r", "http://127.0.0.1:1", enabled=False) as tracer:
        provider = TracerProvider(shutdown_on_exit=False)
        processor = EvalVaultSpanProcessor(tracer)
        provider.add_span_processor(processor)
        with provider.get_tracer("t").start_as_current_span("x"):
            assert not processor._known
        provider.shutdown()


def test_the_packages_own_functions_record_if_no_tracer_is_given(recorded: RecordedStages) -> None:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(EvalVaultSpanProcessor())
    with provider.get_tracer("t").start_as_current_span("x"):
        pass
    provider.shutdown()
    assert recorded.events[0].stage_name == "x"


def test_times_that_are_no_plain_integers_hang_nothing(spans: trace.Tracer, recorded: RecordedStages) -> None:
    started_ns = 1_767_780_000 * 10**9
    span = spans.start_span("retrieve", start_time=float(started_ns))  # type: ignore[arg-type]
    span.end(end_time=started_ns + 5_000_000)
    (event,) = recorded.events
    assert event.duration_ms == 5


def test_a_span_of_another_make_is_no_error_of_the_programs(spans: trace.Tracer, tracer: StageTracer) -> None:
    class Gone(trace.NonRecordingSpan):
        def get_span_context(self) -> trace.SpanContext:
            raise RuntimeError("span is gone")

    with trace.use_span(Gone(trace.INVALID_SPAN_CONTEXT)):
        with tracer.stage("own"):
            tracer.record_stage("note")
        tracer.bind(print)

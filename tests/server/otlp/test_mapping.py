"""What of a span becomes what of a stage event."""

from __future__ import annotations

import json
from datetime import datetime, timezone
from typing import Any

import orjson
import pytest

from evalvault_sdk import StageEvent
from evalvault_sdk.capture.documents import documents
from evalvault_sdk.otel.span import InvalidSpanError
from evalvault_sdk.server.otlp import Span, stage_event_of
from tests.server.otlp.spans import (
    OTHER_SPAN_ID,
    SPAN_ID,
    START,
    TRACE_ID,
    event_with,
    json_attributes,
    least_seconds,
    metrics_with,
    one_span,
    read_json,
    recorded,
)

DRAFT = {
    "resourceSpans": [
        {
            "resource": {"attributes": [{"key": "service.name", "value": {"stringValue": "rag-service"}}]},
            "scopeSpans": [
                {
                    "spans": [
                        {
                            "traceId": TRACE_ID,
                            "spanId": SPAN_ID,
                            "parentSpanId": "",
                            "name": "retrieve",
                            "startTimeUnixNano": 1730000000000000000,
                            "endTimeUnixNano": 1730000000500000000,
                            "attributes": json_attributes(
                                {
                                    "rag.module": "retrieve",
                                    "spec.version": "0.1",
                                    "input.value": "연차는 며칠인가",
                                    "retrieval.documents_json": '[{"doc_id":"leave_01","score":0.91}]',
                                }
                            ),
                        },
                        {
                            "traceId": TRACE_ID,
                            "spanId": OTHER_SPAN_ID,
                            "parentSpanId": SPAN_ID,
                            "name": "llm",
                            "startTimeUnixNano": 1730000000600000000,
                            "endTimeUnixNano": 1730000002000000000,
                            "attributes": json_attributes(
                                {
                                    "rag.module": "llm",
                                    "spec.version": "0.1",
                                    "input.value": "연차를 설명해줘",
                                    "output.value": "연차는 15일입니다.",
                                    "llm.model_name": "gemma3:1b",
                                    "llm.temperature": 0.2,
                                }
                            ),
                        },
                    ]
                }
            ],
        }
    ]
}


def test_a_request_in_the_form_of_evalvaults_draft_becomes_its_stages() -> None:
    retrieve, llm = (stage_event_of(span) for span in read_json(DRAFT).spans)
    assert (retrieve.run_id, retrieve.stage_type, retrieve.stage_name) == ("rag-service", "retrieval", "retrieve")
    assert (retrieve.stage_id, retrieve.span_id, retrieve.trace_id) == (SPAN_ID, SPAN_ID, TRACE_ID)
    assert (retrieve.parent_stage_id, llm.parent_stage_id) == (None, SPAN_ID)
    assert (retrieve.status, retrieve.duration_ms, llm.duration_ms) == ("success", 500.0, 1400.0)
    assert retrieve.attributes == {
        "query": "연차는 며칠인가",
        "doc_ids": ["leave_01"],
        "scores": [0.91],
        "documents": [{"doc_id": "leave_01", "score": 0.91}],
        "spec.version": "0.1",
    }
    assert llm.stage_type == "output"
    assert llm.attributes == {
        "input": "연차를 설명해줘",
        "output": "연차는 15일입니다.",
        "model": "gemma3:1b",
        "temperature": 0.2,
        "spec.version": "0.1",
    }
    assert metrics_with(retrieve)["retrieval.avg_score"] == 0.91


def test_times_are_utc_in_microseconds_and_the_duration_is_exact() -> None:
    event = event_with(startTimeUnixNano=START + 1_999, endTimeUnixNano=START + 2_000)
    assert event.started_at == datetime(2024, 10, 27, 3, 33, 20, 1, tzinfo=timezone.utc)
    assert event.finished_at == datetime(2024, 10, 27, 3, 33, 20, 2, tzinfo=timezone.utc)
    assert event.duration_ms == 0.000001


def test_a_span_that_has_not_ended_has_no_end_and_no_duration() -> None:
    event = event_with(endTimeUnixNano=0)
    assert (event.finished_at, event.duration_ms) == (None, None)
    assert event.started_at is not None


def test_the_last_nanosecond_of_the_protocol_is_a_time() -> None:
    event = event_with(startTimeUnixNano=str(2**64 - 1), endTimeUnixNano=str(2**64 - 1))
    assert event.started_at is not None
    assert event.started_at.year == 2554


@pytest.mark.parametrize(
    ("attributes", "resource", "run_id"),
    [
        ({"evalvault.run_id": "a", "rag.run_id": "b"}, {"evalvault.run_id": "c"}, "a"),
        ({"rag.run_id": "b", "run_id": "d"}, {"evalvault.run_id": "c"}, "b"),
        ({"run_id": 7}, {"evalvault.run_id": "c"}, "7"),
        ({"evalvault.run_id": " "}, {"evalvault.run_id": " c ", "service.name": "s"}, "c"),
        ({}, {"rag.run_id": "e", "service.name": "s"}, "e"),
        ({}, {"service.name": "s"}, "s"),
        ({}, {"service.name": "unknown_service:python"}, "otel"),
        ({"evalvault.run_id": True}, {"service.name": ""}, "otel"),
        ({}, {}, "otel"),
    ],
)
def test_the_run_is_the_first_that_is_named(attributes: Any, resource: Any, run_id: str) -> None:
    span = one_span(attributes, resource)
    assert stage_event_of(span).run_id == run_id
    assert stage_event_of(span, run_id="of the request").run_id == "of the request"


def test_an_attribute_that_named_the_run_is_not_repeated_but_one_that_did_not_is_kept() -> None:
    span = one_span({"evalvault.run_id": "a"})
    assert "evalvault.run_id" not in stage_event_of(span).attributes
    assert stage_event_of(span, run_id="b").attributes["evalvault.run_id"] == "a"


@pytest.mark.parametrize(
    ("attributes", "stage_type"),
    [
        *(
            ({"rag.module": module}, stage_type)
            for module, stage_type in {
                "ingest": "ingest",
                "chunk": "chunk",
                "embed": "embedding",
                "retrieve": "retrieval",
                "rerank": "rerank",
                "prompt": "system_prompt",
                "llm": "output",
                "postprocess": "postprocess",
                "eval": "eval",
                "cache": "cache",
                "custom.pipeline": "pipeline",
                " Retrieve ": "retrieval",
                "answer_validation": "answer_validation",
            }.items()
        ),
        *(
            ({"openinference.span.kind": kind}, stage_type)
            for kind, stage_type in {
                "LLM": "output",
                "RETRIEVER": "retrieval",
                "RERANKER": "rerank",
                "EMBEDDING": "embedding",
                "TOOL": "tool",
                "CHAIN": "chain",
                "AGENT": "agent",
                "GUARDRAIL": "safety_check",
                "EVALUATOR": "eval",
                "PROMPT": "system_prompt",
                "DECISION": "decision",
                "UNKNOWN": "internal",
            }.items()
        ),
        *(
            ({"gen_ai.operation.name": operation}, stage_type)
            for operation, stage_type in {
                "chat": "output",
                "text_completion": "output",
                "generate_content": "output",
                "embeddings": "embedding",
                "retrieval": "retrieval",
                "execute_tool": "tool",
                "invoke_agent": "agent",
                "create_agent": "agent",
                "invoke_workflow": "chain",
            }.items()
        ),
        ({"traceloop.span.kind": "workflow"}, "chain"),
        ({"llm.request.type": "rerank"}, "rerank"),
        ({"evalvault.stage_type": "Intent", "rag.module": "llm"}, "intent"),
        ({"rag.module": "rerank", "openinference.span.kind": "LLM"}, "rerank"),
        ({"openinference.span.kind": "RETRIEVER", "gen_ai.operation.name": "chat"}, "retrieval"),
        ({"rag.module": "custom.", "openinference.span.kind": "LLM"}, "output"),
        ({"rag.module": 5, "openinference.span.kind": "  "}, "internal"),
        ({}, "internal"),
    ],
)
def test_the_stage_type_is_what_the_conventions_say(attributes: dict[str, Any], stage_type: str) -> None:
    assert event_with(attributes).stage_type == stage_type


@pytest.mark.parametrize("kind", ["internal", "server", "client", "producer", "consumer"])
def test_a_span_of_no_convention_is_of_its_kind(kind: str) -> None:
    event = event_with({"http.route": "/ask"}, kind=f"SPAN_KIND_{kind.upper()}")
    assert (event.stage_type, event.metadata["span_kind"]) == (kind, kind)
    assert event.attributes == {"http.route": "/ask"}


RETRIEVED = {
    "openinference.span.kind": "RETRIEVER",
    "input.value": "연차",
    "retrieval.documents.10.document.id": "third",
    "retrieval.documents.2.document.id": "second",
    "retrieval.documents.0.document.score": 0.5,
    "retrieval.documents.0.document.id": "first",
    "retrieval.documents.2.document.score": "0.25",
    "retrieval.documents.2.document.content": "반차는 나뉜다.",
    "retrieval.documents.2.document.metadata": '{"source": "a.pdf", "page": 3}',
}


def test_documents_are_put_together_in_the_order_of_their_indexes() -> None:
    attributes = event_with(RETRIEVED).attributes
    assert attributes == {
        "query": "연차",
        "doc_ids": ["first", "second", "third"],
        "scores": [0.5, 0.25, None],
        "documents": [
            {"score": 0.5, "id": "first"},
            {
                "id": "second",
                "score": "0.25",
                "content": "반차는 나뉜다.",
                "metadata": {"source": "a.pdf", "page": 3},
            },
            {"id": "third"},
        ],
    }


@pytest.mark.parametrize(
    ("attributes", "doc_ids", "scores"),
    [
        ({"retrieval.documents_json": '[{"doc_id": "a", "score": 1}, {"chunk_id": "c"}]'}, ["a", "c"], [1.0, None]),
        ({"retrieval.documents_json": '{"documents": ["a", "b"]}'}, ["a", "b"], None),
        ({"retrieval.documents_json": "[]"}, [], None),
        ({"retrieval.documents": '[{"id": 7, "score": NaN}]'}, ["7"], None),
        ({"gen_ai.retrieval.documents": [{"id": "a", "score": 0.5}]}, ["a"], [0.5]),
        ({"gen_ai.retrieval.documents": '[{"id": "a", "score": 0.5}]'}, ["a"], [0.5]),
        ({"output.value": ["policy_1", "policy_2"]}, ["policy_1", "policy_2"], None),
        ({"output.value": '{"documents": [{"id": "a", "metadata": {"score": 2}}]}'}, ["a"], [2.0]),
        ({"documents": '[{"id": "a"}]'}, ["a"], None),
        ({"doc_ids": ["own"], "retrieval.documents_json": '[{"id": "a", "score": 1}]'}, ["own"], [1.0]),
        ({"retrieval.doc_ids": ["a"], "retrieval.scores": [0.1]}, ["a"], [0.1]),
        ({"retrieval.documents_json": "not json"}, None, None),
        ({"output.value": "an answer"}, None, None),
    ],
)
def test_ids_and_scores_are_found_however_documents_are_told(
    attributes: dict[str, Any], doc_ids: Any, scores: Any
) -> None:
    event = event_with({"rag.module": "retrieve", **attributes})
    assert event.attributes.get("doc_ids") == doc_ids
    assert event.attributes.get("scores") == scores


def test_documents_that_are_told_twice_lend_each_other_their_ids() -> None:
    told = {
        "openinference.span.kind": "RETRIEVER",
        "output.value": '{"documents": [{"id": "a", "page_content": "가"}, {"id": null, "page_content": "나"}]}',
        "retrieval.documents.0.document.content": "가",
        "retrieval.documents.1.document.content": "나",
    }
    doc_ids = event_with(told).attributes["doc_ids"]
    assert doc_ids[0] == "a"
    assert doc_ids[1:] == documents([{"page_content": "나"}])["doc_ids"]


@pytest.mark.parametrize(
    "document",
    [
        {"id": "a"},
        {"id": 7},
        {"page_content": "본문"},
        {"content": "본문", "metadata": {"source": "a.pdf", "page": 3}},
        {"metadata": {"source": "a.pdf", "chunk_id": 4}},
        {"chunk_id": "c1", "source": "kb"},
        {"text": "x" * 70_000},
        {"text": "본문", "metadata": {"document_id": "d", "score": 0.5}},
        {"text": "본문", "score": 0.25, "rerank_score": 0.75},
    ],
)
def test_a_document_has_the_id_and_score_that_the_client_would_give_it(document: dict[str, Any]) -> None:
    event = event_with({"rag.module": "retrieve", "retrieval.documents_json": json.dumps([document])})
    found = documents([document])
    assert {name: event.attributes[name] for name in found} == found


def test_a_document_that_tells_nothing_has_the_hash_of_what_it_is_for_its_id() -> None:
    told = '[{"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": 2}, null]'
    first, second, third, _ = event_with({"rag.module": "retrieve", "retrieval.documents_json": told}).attributes[
        "doc_ids"
    ]
    assert first == second != third


def test_of_very_many_documents_the_first_are_read_and_all_are_counted() -> None:
    told = json.dumps([{"id": f"d{place}"} for place in range(1_001)])
    attributes = event_with({"rag.module": "retrieve", "retrieval.documents_json": told}).attributes
    assert (len(attributes["doc_ids"]), attributes["doc_count"], len(attributes["documents"])) == (1_000, 1_001, 1_001)


def test_json_in_a_very_long_text_stays_text() -> None:
    told = "[" + '"",' * 400_000 + '""]'
    attributes = event_with({"rag.module": "retrieve", "retrieval.documents_json": told}).attributes
    assert attributes == {"retrieval.documents_json": told}


def test_an_index_of_any_size_takes_no_room() -> None:
    attributes = {
        "openinference.span.kind": "RETRIEVER",
        "retrieval.documents.999999999.document.id": "last",
        "retrieval.documents.5.document.id": "first",
        "retrieval.documents.99999999999999999999.document.id": "no index",
        "retrieval.documents.x.document.id": "none either",
    }
    event = event_with(attributes)
    assert event.attributes["doc_ids"] == ["first", "last"]
    assert event.attributes["retrieval.documents.99999999999999999999.document.id"] == "no index"
    assert event.attributes["retrieval.documents.x.document.id"] == "none either"


def test_many_flattened_attributes_are_put_together_in_linear_time() -> None:
    def seconds(count: int) -> float:
        span = Span(
            trace_id=TRACE_ID,
            span_id=SPAN_ID,
            attributes={f"llm.input_messages.{i * 1000}.message.content": "x" for i in range(count)}
            | {"llm.input_messages.1" + ".a" * count: 1},
        )
        return least_seconds(lambda: stage_event_of(span))

    assert seconds(40_000) < 40 * max(seconds(4_000), 0.005)


def test_a_reranker_has_counts_scores_and_what_went_in_and_out() -> None:
    event = event_with(
        {
            "openinference.span.kind": "RERANKER",
            "reranker.query": "연차",
            "reranker.model_name": "cross-encoder",
            "reranker.top_k": 2,
            **{f"reranker.input_documents.{i}.document.id": f"d{i}" for i in range(4)},
            **{f"reranker.output_documents.{i}.document.id": f"d{3 - i}" for i in range(2)},
            **{f"reranker.output_documents.{i}.document.score": 0.75 - i / 2 for i in range(2)},
        }
    )
    assert event.attributes == {
        "query": "연차",
        "model": "cross-encoder",
        "top_k": 2,
        "input_count": 4,
        "output_count": 2,
        "doc_ids": ["d3", "d2"],
        "scores": [0.75, 0.25],
        "input_documents": [{"id": f"d{i}"} for i in range(4)],
        "documents": [{"id": "d3", "score": 0.75}, {"id": "d2", "score": 0.25}],
    }
    metrics = metrics_with(event)
    assert (metrics["rerank.keep_rate"], metrics["rerank.avg_score"]) == (0.5, 0.5)


def test_a_reranker_of_open_rag_trace_has_its_scores() -> None:
    event = event_with({"rag.module": "rerank", "rerank.model_name": "m", "rerank.scores": [0.9, 0.3]})
    assert event.attributes == {"model": "m", "scores": [0.9, 0.3]}


GENERATED = {"tokens_in": 820, "tokens_out": 230, "model": "m", "temperature": 0.2, "finish_reason": "stop"}


@pytest.mark.parametrize(
    "attributes",
    [
        {
            "rag.module": "llm",
            "llm.model_name": "m",
            "llm.temperature": 0.2,
            "llm.token_count.prompt": 820,
            "llm.token_count.completion": 230,
            "llm.finish_reason": "stop",
        },
        {
            "gen_ai.operation.name": "chat",
            "gen_ai.request.model": "m",
            "gen_ai.request.temperature": 0.2,
            "gen_ai.usage.input_tokens": 820,
            "gen_ai.usage.output_tokens": 230,
            "gen_ai.response.finish_reasons": ["stop"],
        },
        {
            "gen_ai.operation.name": "text_completion",
            "gen_ai.request.model": "m",
            "gen_ai.response.model": "m",
            "gen_ai.request.temperature": 0.2,
            "gen_ai.usage.prompt_tokens": 820,
            "gen_ai.usage.input_tokens": 820,
            "gen_ai.usage.completion_tokens": 230,
            "gen_ai.response.finish_reasons": ["stop"],
        },
    ],
)
def test_what_a_model_used_is_called_the_same_whoever_says_it(attributes: dict[str, Any]) -> None:
    event = event_with(attributes)
    operation = {name: value for name, value in attributes.items() if name == "gen_ai.operation.name"}
    assert event.attributes == GENERATED | operation
    assert metrics_with(event)["output.token_ratio"] == 230 / 820


def test_a_second_model_keeps_its_own_name() -> None:
    attributes = event_with({"gen_ai.request.model": "m", "gen_ai.response.model": "m-2024"}).attributes
    assert attributes == {"model": "m-2024", "gen_ai.request.model": "m"}


def test_the_temperature_is_found_among_the_parameters_of_the_call() -> None:
    parameters = '{"model": "m", "temperature": 0.7, "stop": null}'
    attributes = event_with({"openinference.span.kind": "LLM", "llm.invocation_parameters": parameters}).attributes
    assert attributes == {"model": "m", "temperature": 0.7, "llm.invocation_parameters": parameters}


def test_an_attribute_with_evalvaults_own_name_is_left_alone() -> None:
    attributes = {"query": "own", "retrieval.query": "other", "tokens_in": 1, "llm.token_count.prompt": 2}
    event = event_with({"rag.module": "retrieve", **attributes})
    assert event.attributes == attributes


def test_messages_are_put_together_with_their_tool_calls() -> None:
    event = event_with(
        {
            "openinference.span.kind": "LLM",
            "llm.input_messages.0.message.role": "user",
            "llm.input_messages.0.message.contents.0.message_content.type": "text",
            "llm.input_messages.0.message.contents.0.message_content.text": "며칠?",
            "llm.output_messages.0.message.role": "assistant",
            "llm.output_messages.0.message.tool_calls.0.tool_call.id": "call-1",
            "llm.output_messages.0.message.tool_calls.0.tool_call.function.name": "days",
            "llm.output_messages.0.message.tool_calls.0.tool_call.function.arguments": '{"year": 2026}',
            "llm.tools.0.tool.json_schema": '{"name": "days"}',
            "llm.tools": "kept as it is",
        }
    )
    call = {"id": "call-1", "function": {"name": "days", "arguments": '{"year": 2026}'}}
    assert event.attributes == {
        "input_messages": [{"role": "user", "contents": [{"type": "text", "text": "며칠?"}]}],
        "output_messages": [{"role": "assistant", "tool_calls": [call]}],
        "tools": [{"json_schema": '{"name": "days"}'}],
        "llm.tools": "kept as it is",
    }


def test_a_list_whose_names_are_taken_is_not_lost() -> None:
    event = event_with({"tools": "own", "llm.tools": "also own", "llm.tools.0.tool.name": "days"})
    assert event.attributes == {"tools": "own", "llm.tools": "also own", "llm.tools.list": [{"name": "days"}]}


def test_messages_of_the_semantic_conventions_are_read_from_their_json() -> None:
    message = {"role": "user", "parts": [{"type": "text", "content": "며칠?"}]}
    for written in (json.dumps([message]), [message]):
        event = event_with({"gen_ai.operation.name": "chat", "gen_ai.input.messages": written})
        assert event.attributes["input_messages"] == [message]
        assert "gen_ai.input.messages" not in event.attributes


def test_a_name_that_is_both_a_value_and_a_level_loses_neither() -> None:
    event = event_with(
        {
            "llm.input_messages.0": "bare",
            "llm.input_messages.0.message.role": "user",
            "llm.input_messages.0.message": "text",
        }
    )
    assert event.attributes == {"input_messages": [{"value": "bare", "message": {"role": "user", "value": "text"}}]}


def test_citations_written_as_json_are_counted() -> None:
    event = event_with({"rag.module": "llm", "rag.citations": '["a", {"id": "b"}]'})
    assert event.attributes["citations"] == ["a", {"id": "b"}]
    assert metrics_with(event)["output.citation_count"] == 2


def test_an_evaluation_has_its_score() -> None:
    event = event_with({"rag.module": "eval", "eval.metric_name": "faithfulness", "eval.score": 0.91})
    assert event.attributes == {"metric_name": "faithfulness", "score": 0.91}
    assert metrics_with(event)["eval.score"] == 0.91


def test_embeddings_and_tools_have_their_names() -> None:
    event = event_with(
        {
            "openinference.span.kind": "EMBEDDING",
            "embedding.model_name": "m",
            "embedding.embeddings.0.embedding.text": "가",
            "embedding.embeddings.0.embedding.vector": [0.5, 1.0],
        }
    )
    assert event.attributes == {"model": "m", "embeddings": [{"text": "가", "vector": [0.5, 1.0]}]}
    event = event_with({"gen_ai.operation.name": "execute_tool", "gen_ai.tool.name": "days"})
    assert event.attributes["tool_name"] == "days"


def test_what_is_known_elsewhere_becomes_metadata() -> None:
    span = one_span(
        {
            "session.id": "s-1",
            "user.id": "u-1",
            "evalvault.test_case_id": "tc-1",
            "tag.tags": ["demo"],
            "metadata": '{"tenant": "hr", "span_kind": "mine", "metadata": 1}',
        },
        {"service.name": "rag", "deployment.environment": "dev"},
        kind=2,
        traceState="vendor=1",
        events=[
            {"name": "log", "timeUnixNano": str(START), "attributes": json_attributes({"log.level": "info"})},
            {"name": "bare", "droppedAttributesCount": 2},
        ],
        links=[{"traceId": TRACE_ID, "spanId": OTHER_SPAN_ID, "attributes": json_attributes({"why": "retry"})}],
        droppedEventsCount=3,
        status={"code": 1, "message": "fine"},
    )
    event = stage_event_of(span)
    assert event.attributes == {}
    assert event.metadata == {
        "tenant": "hr",
        "metadata": {"span_kind": "mine", "metadata": 1},
        "span_kind": "server",
        "session_id": "s-1",
        "user_id": "u-1",
        "test_case_id": "tc-1",
        "tags": ["demo"],
        "resource": {"service.name": "rag", "deployment.environment": "dev"},
        "trace_state": "vendor=1",
        "status_message": "fine",
        "events": [
            {"name": "log", "time": "2024-10-27T03:33:20+00:00", "attributes": {"log.level": "info"}},
            {"name": "bare", "time": None, "dropped_attributes": 2},
        ],
        "links": [{"trace_id": TRACE_ID, "span_id": OTHER_SPAN_ID, "attributes": {"why": "retry"}}],
        "dropped": {"events": 3},
    }


def exception(kind: str, message: str) -> dict[str, Any]:
    told = {"exception.type": kind, "exception.message": message, "exception.stacktrace": f"Traceback: {kind}"}
    return {"name": "exception", "timeUnixNano": str(START), "attributes": json_attributes(told)}


def test_a_failed_span_says_what_its_last_exception_was() -> None:
    events = [exception("ValueError", "first"), exception("TimeoutError", "색인이 답하지 않는다")]
    event = event_with(
        {"error.type": "TimeoutError"},
        status={"code": 2, "message": "TimeoutError: 색인이 답하지 않는다"},
        events=events,
    )
    assert event.status == "error"
    assert event.attributes == {
        "error": {
            "type": "TimeoutError",
            "message": "색인이 답하지 않는다",
            "stacktrace": "Traceback: TimeoutError",
        }
    }
    assert [kept["attributes"]["exception.type"] for kept in event.metadata["events"]] == ["ValueError"]
    assert "status_message" not in event.metadata


@pytest.mark.parametrize(
    ("attributes", "message", "error"),
    [
        ({}, "no answer", {"type": "Error", "message": "no answer"}),
        ({"error.type": "503"}, "no answer", {"type": "503", "message": "no answer"}),
        ({"error": True}, "", {"type": "Error", "message": ""}),
        ({"error": "refused"}, "", {"type": "Error", "message": "refused"}),
        ({"error": "refused"}, "no answer", {"type": "Error", "message": "no answer", "value": "refused"}),
        ({"error": "no answer"}, "no answer", {"type": "Error", "message": "no answer"}),
    ],
)
def test_a_failed_span_without_an_exception_says_what_its_status_says(
    attributes: dict[str, Any], message: str, error: dict[str, str]
) -> None:
    event = event_with(attributes, status={"code": 2, "message": message})
    assert (event.status, event.attributes) == ("error", {"error": error})


@pytest.mark.parametrize("code", [0, 1])
def test_an_exception_that_was_handled_is_no_failure(code: int) -> None:
    event = event_with(status={"code": code}, events=[exception("ValueError", "handled")])
    assert event.status == "success"
    assert event.metadata["events"][0]["name"] == "exception"


def test_values_that_are_no_json_are_made_safe() -> None:
    event = event_with(
        {"nan": float("nan"), "list": [float("inf"), 1.5], "raw": b"\xff", "map": {"a": float("-inf")}},
    )
    assert event.attributes == {"nan": None, "list": [None, 1.5], "raw": "/w==", "map": {"a": None}}
    told = '[{"id": "a", "deep": ' + "[" * 200 + "]" * 200 + ', "score": Infinity, "text": "\\ud800"}]'
    event = event_with({"rag.module": "retrieve", "retrieval.documents_json": told})
    assert event.attributes["doc_ids"] == ["a"]
    assert event.attributes["documents"][0]["score"] is None
    assert b"[nested too deeply]" in orjson.dumps(event.to_dict())


def test_a_whole_event_survives_the_way_through_json() -> None:
    event = stage_event_of(read_json(DRAFT).spans[0])
    assert StageEvent.from_dict(orjson.loads(orjson.dumps(event.to_dict()))) == event


def test_langchain_traced_by_openinference_becomes_stages_with_metrics() -> None:
    events = recorded("openinference_langchain.json")
    root = events["RunnableSequence"]
    assert {name: event.stage_type for name, event in events.items()} == {
        "R": "retrieval",
        "ChatPromptTemplate": "system_prompt",
        "FakeMessagesListChatModel": "output",
        "StrOutputParser": "chain",
        "RunnableSequence": "chain",
        "days": "tool",
        "Bad": "retrieval",
    }
    found = events["R"]
    # The first document's id is told in output.value only; the second has none, but a source.
    assert found.attributes["doc_ids"] == ["leave-01", "휴가 규정.pdf#page=4"]
    assert found.attributes["scores"] == [None, 0.61]
    assert found.attributes["query"] == "연차는 며칠인가?"
    assert found.metadata["test_case_id"] == "tc-1"
    answered = events["FakeMessagesListChatModel"]
    assert answered.parent_stage_id == root.stage_id
    assert answered.attributes["output_messages"] == [{"role": "assistant", "content": "연차는 15일입니다."}]
    assert [message["role"] for message in answered.attributes["input_messages"]] == ["system", "user"]
    assert metrics_with(answered)["output.token_ratio"] == 18 / 120
    assert (answered.attributes["finish_reason"], answered.metadata["session_id"]) == ("stop", "s-1")
    assert events["days"].attributes["tool_name"] == "days"
    failed = events["Bad"]
    assert failed.status == "error"
    assert (failed.attributes["error"]["type"], failed.attributes["error"]["message"]) == (
        "TimeoutError",
        "색인이 답하지 않는다",
    )
    assert {event.run_id for event in events.values()} == {"guide-bot"}


def test_langchain_traced_by_openllmetry_becomes_stages_with_metrics() -> None:
    events = recorded("openllmetry_langchain.json")
    found = events["vector_db_retrieve R"]
    assert found.stage_type == "retrieval"
    assert found.attributes["query"] == "연차는 며칠인가?"
    assert found.attributes["doc_ids"] == ["휴가 규정.pdf#page=3", "휴가 규정.pdf#page=4"]
    answered = events["FakeMessagesListChatModel.chat"]
    assert answered.stage_type == "output"
    assert metrics_with(answered)["output.token_ratio"] == 18 / 120
    assert answered.attributes["output_messages"][0]["parts"] == [{"type": "text", "content": "연차는 15일입니다."}]
    assert events["RunnableSequence.workflow"].stage_type == "agent"
    assert events["execute_tool days"].attributes["tool_name"] == "days"
    assert events["vector_db_retrieve Bad"].attributes["error"]["type"] == "TimeoutError"
    # It writes the same text under two names.
    assert not [name for name in found.attributes if name.startswith(("gen_ai.task.input", "gen_ai.task.output"))]


@pytest.mark.parametrize("time_unix_nano", [2**64, -1, 1e30])
def test_a_time_beyond_64_bits_is_refused_at_once(time_unix_nano: Any) -> None:
    with pytest.raises(InvalidSpanError, match="beyond 64 bits"):
        Span(trace_id="0" * 31 + "1", span_id="0" * 15 + "1", name="x", start_time_unix_nano=time_unix_nano)

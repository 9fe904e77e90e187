"""Whatever is sent: an answer, and never another exception than the one that is one."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import orjson
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from evalvault_sdk.server.answers import ApiError
from evalvault_sdk.server.otlp import SpanBatch, read_spans, stage_event_of
from tests.server.otlp.spans import (
    DATA,
    OTHER_SPAN_ID,
    json_request,
    json_span,
    protobuf_request,
    protobuf_span,
    read_json,
)
from tests.server.otlp.test_decode import VALUES, full_json, full_protobuf

RECORDED = [path.read_bytes() for path in sorted(DATA.glob("*.json"))]
JSON_BODIES = [orjson.dumps(full_json()), *(orjson.dumps(orjson.loads(body)) for body in RECORDED)]
PROTOBUF_BODIES = [full_protobuf(), protobuf_request(protobuf_span(VALUES), protobuf_span(), resource=VALUES)]
#: Words that mean something to the mapping, so that a mutation meets the code behind them.
WORDS = [
    *("rag.module", "openinference.span.kind", "gen_ai.operation.name", "evalvault.run_id", "evalvault.stage_type"),
    *("retrieval.documents_json", "retrieval.documents.0.document.id", "retrieval.documents.0", "documents", "error"),
    *("reranker.input_documents.1.document.metadata", "reranker.output_documents.0.document.score", "doc_ids"),
    *("llm.input_messages.0.message.role", "llm.input_messages.0", "llm.invocation_parameters", "metadata"),
    *("output.value", "input.value", "query", "session.id", "exception.type", "gen_ai.response.finish_reasons"),
]
TEXTS = st.one_of(
    st.text(max_size=20),
    st.sampled_from(["retrieve", "rerank", "LLM", "RERANKER", "", " ", "custom.", "\x00", "[]", "{}", '[{"id": NaN}]']),
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=5),
        lambda inner: (
            st.lists(inner, max_size=4)
            | st.dictionaries(
                st.sampled_from(["id", "metadata", "documents", "score", "query", "text"]), inner, max_size=4
            )
        ),
        max_leaves=10,
    ).map(json.dumps),
)
ATTRIBUTES = st.dictionaries(
    st.sampled_from(WORDS) | st.text(max_size=8),
    st.recursive(
        TEXTS | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.floats() | st.binary(max_size=8) | st.none(),
        lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4),
        max_leaves=8,
    ),
    max_size=8,
)
LENIENT = settings(suppress_health_check=[HealthCheck.too_slow], deadline=None)


def judge(body: bytes, *, protobuf: bool) -> None:
    with contextlib.suppress(ApiError):
        judge_batch(read_spans(body, protobuf=protobuf))


def judge_batch(batch: SpanBatch) -> None:
    for span in batch.spans:
        orjson.dumps(stage_event_of(span).to_dict())
    for rejected in batch.rejected:
        assert rejected.reason


@given(st.binary(max_size=400), st.booleans())
def test_random_bytes_are_refused_or_read(body: bytes, protobuf: bool) -> None:
    judge(body, protobuf=protobuf)


@LENIENT
@given(st.data())
def test_a_valid_body_with_bytes_changed_is_refused_or_read(data: st.DataObject) -> None:
    protobuf = data.draw(st.booleans())
    body = bytearray(data.draw(st.sampled_from(PROTOBUF_BODIES if protobuf else JSON_BODIES)))
    for _ in range(data.draw(st.integers(1, 6))):
        place = data.draw(st.integers(0, len(body)))
        removed = data.draw(st.integers(0, 4))
        body[place : place + removed] = data.draw(st.binary(max_size=4))
    judge(bytes(body), protobuf=protobuf)


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=10),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


def paths(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(value, dict):
        return found + [p for key, item in value.items() for p in paths(item, (*path, key))]
    if isinstance(value, list):
        return found + [p for place, item in enumerate(value) for p in paths(item, (*path, place))]
    return found


@LENIENT
@given(st.data())
def test_a_valid_request_with_values_changed_is_refused_or_read(data: st.DataObject) -> None:
    request: Any = orjson.loads(JSON_BODIES[0])
    path = data.draw(st.sampled_from(paths(request)))
    parent = request
    for step in path[:-1]:
        parent = parent[step]
    parent[path[-1]] = data.draw(JSON_VALUES)
    judge(json.dumps(request).encode(), protobuf=False)


@LENIENT
@given(ATTRIBUTES, ATTRIBUTES, st.booleans())
def test_any_attributes_make_an_event_and_the_same_one_in_both_encodings(
    attributes: dict[str, Any], resource: dict[str, Any], failed: bool
) -> None:
    status = {"code": 2 if failed else 0}
    parent = bytes.fromhex(OTHER_SPAN_ID)
    exception = {"exception.type": "E", **attributes}
    body = protobuf_request(
        protobuf_span(
            attributes,
            status=status,
            parent_span_id=parent,
            events=[{"name": "exception", "attributes": protobuf_span(exception).attributes}],
        ),
        resource=resource,
    )
    event = {"name": "exception", "attributes": json_span(exception)["attributes"]}
    request = json_request(
        json_span(attributes, status=status, parentSpanId=OTHER_SPAN_ID, events=[event]), resource=resource
    )
    ways = [*read_spans(body, protobuf=True).spans, *read_json(request).spans]
    first, second = (orjson.dumps(stage_event_of(span).to_dict()) for span in ways)
    assert first == second

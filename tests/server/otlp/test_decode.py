"""What a body of OTLP may hold, and what is said of one that holds something else."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from typing import Any

import orjson
import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest
from opentelemetry.proto.trace.v1.trace_pb2 import Span as ProtobufSpan
from opentelemetry.proto.trace.v1.trace_pb2 import Status

from evalvault_sdk.server.answers import ApiError
from evalvault_sdk.server.otlp import Span, SpanBatch, is_protobuf, read_spans, stage_event_of
from evalvault_sdk.server.settings import ServerSettings
from tests.server.otlp.spans import (
    OTHER_SPAN_ID,
    SPAN_ID,
    START,
    TRACE_ID,
    json_request,
    json_span,
    least_seconds,
    one_span,
    protobuf_attributes,
    protobuf_request,
    protobuf_span,
    read_json,
)

VALUES: dict[str, Any] = {
    "text": "보험금 지급 조건",
    "yes": True,
    "count": -(2**63),
    "ratio": 0.25,
    "raw": b"\x00\xff",
    "list": ["a", 1, None, ["b"]],
    "map": {"inner": {"deep": 1.5}},
    "nothing": None,
    "": "a name may be empty",
}


def full_json() -> Any:
    span = json_span(
        VALUES,
        parentSpanId=OTHER_SPAN_ID.upper(),
        traceState="vendor=1",
        kind=3,
        status={"code": 2, "message": "no answer"},
        events=[
            {
                "name": "log",
                "timeUnixNano": str(START + 5),
                "attributes": [{"key": "log.level", "value": {"stringValue": "info"}}],
                "droppedAttributesCount": 4,
            }
        ],
        links=[
            {
                "traceId": TRACE_ID.upper(),
                "spanId": OTHER_SPAN_ID,
                "traceState": "vendor=2",
                "attributes": [{"key": "why", "value": {"stringValue": "retry"}}],
                "droppedAttributesCount": 5,
            }
        ],
        droppedAttributesCount=1,
        droppedEventsCount=2,
        droppedLinksCount=3,
    )
    scope = {"name": "lib", "version": "1.2", "attributes": [{"key": "x", "value": {"intValue": 1}}]}
    return json_request(span, json_span(name="second"), resource={"service.name": "rag-service"}, scope=scope)


def full_protobuf() -> bytes:
    span = protobuf_span(
        VALUES,
        parent_span_id=bytes.fromhex(OTHER_SPAN_ID),
        trace_state="vendor=1",
        kind=ProtobufSpan.SPAN_KIND_CLIENT,
        status=Status(code=Status.STATUS_CODE_ERROR, message="no answer"),
        events=[
            ProtobufSpan.Event(
                name="log",
                time_unix_nano=START + 5,
                attributes=protobuf_attributes({"log.level": "info"}),
                dropped_attributes_count=4,
            )
        ],
        links=[
            ProtobufSpan.Link(
                trace_id=bytes.fromhex(TRACE_ID),
                span_id=bytes.fromhex(OTHER_SPAN_ID),
                trace_state="vendor=2",
                attributes=protobuf_attributes({"why": "retry"}),
                dropped_attributes_count=5,
            )
        ],
        dropped_attributes_count=1,
        dropped_events_count=2,
        dropped_links_count=3,
    )
    request = ExportTraceServiceRequest()
    resource_spans = request.resource_spans.add()
    resource_spans.resource.attributes.extend(protobuf_attributes({"service.name": "rag-service"}))
    scope_spans = resource_spans.scope_spans.add()
    scope_spans.scope.name, scope_spans.scope.version = "lib", "1.2"
    scope_spans.scope.attributes.extend(protobuf_attributes({"x": 1}))
    scope_spans.spans.extend([span, protobuf_span(name="second")])
    body: bytes = request.SerializeToString()
    return body


def test_every_field_of_a_span_is_read() -> None:
    span: Span = read_json(full_json()).spans[0]
    assert (span.trace_id, span.span_id, span.parent_span_id) == (TRACE_ID, SPAN_ID, OTHER_SPAN_ID)
    assert (span.name, span.kind, span.trace_state) == ("step", "client", "vendor=1")
    assert (span.start_time_unix_nano, span.end_time_unix_nano) == (START, START + 1_500_000)
    assert (span.status_code, span.status_message) == ("error", "no answer")
    assert span.attributes == VALUES
    event, link = span.events[0], span.links[0]
    assert (event.name, event.time_unix_nano, event.attributes) == ("log", START + 5, {"log.level": "info"})
    assert (link.trace_id, link.span_id, link.attributes) == (TRACE_ID, OTHER_SPAN_ID, {"why": "retry"})
    assert (event.dropped_attributes_count, link.dropped_attributes_count, link.trace_state) == (4, 5, "vendor=2")
    assert (span.dropped_attributes_count, span.dropped_events_count, span.dropped_links_count) == (1, 2, 3)
    assert span.resource == {"service.name": "rag-service"}
    assert (span.scope.name, span.scope.version, span.scope.attributes) == ("lib", "1.2", {"x": 1})


def test_protobuf_and_json_of_one_request_are_the_same_spans() -> None:
    assert read_spans(full_protobuf(), protobuf=True) == read_json(full_json())


@pytest.mark.parametrize("protobuf", [True, False])
def test_a_request_without_spans_is_an_empty_batch(protobuf: bool) -> None:
    assert read_spans(b"" if protobuf else b"{}", protobuf=protobuf) == SpanBatch([], [])


def test_unknown_fields_are_ignored_wherever_they_are() -> None:
    request = full_json()
    resource_spans = request["resourceSpans"][0]
    for message in (
        *(request, resource_spans, resource_spans["resource"], resource_spans["scopeSpans"][0]),
        *resource_spans["scopeSpans"][0]["spans"],
    ):
        message["ofTheFuture"] = {"deep": [1, None]}
    assert read_json(request) == read_json(full_json())
    # A field 9999 of each wire type that protobuf still has, before and after the others.
    unknown = b"\xf8\xf0\x04\x01" + b"\xf9\xf0\x04" + b"8" * 8 + b"\xfa\xf0\x04\x02hi" + b"\xfd\xf0\x04" + b"4" * 4
    assert read_spans(unknown + full_protobuf() + unknown, protobuf=True) == read_json(full_json())


def test_null_is_as_good_as_absent() -> None:
    nulls = dict.fromkeys(("parentSpanId", "kind", "status", "events", "links", "droppedLinksCount", "traceState"))
    request = json_request({**json_span(), **nulls})
    assert read_json(request) == read_json(json_request(json_span()))
    assert read_json({"resourceSpans": None}) == SpanBatch([], [])


def test_names_in_snake_case_are_taken_too() -> None:
    request = {
        "resource_spans": [
            {
                "scope_spans": [
                    {
                        "spans": [
                            {
                                "trace_id": TRACE_ID,
                                "span_id": SPAN_ID,
                                "parent_span_id": OTHER_SPAN_ID,
                                "start_time_unix_nano": START,
                                "end_time_unix_nano": START + 1,
                                "attributes": [{"key": "a", "value": {"string_value": "b"}}],
                            }
                        ]
                    }
                ]
            }
        ]
    }
    span = read_json(request).spans[0]
    assert (span.parent_span_id, span.end_time_unix_nano, span.attributes) == (OTHER_SPAN_ID, START + 1, {"a": "b"})


@pytest.mark.parametrize("written", [START, str(START), float(START)])
def test_64_bit_numbers_may_be_text_or_numbers(written: Any) -> None:
    span = one_span(startTimeUnixNano=written, attributes=None)
    assert span.start_time_unix_nano == START


@pytest.mark.parametrize(
    ("written", "value"),
    [
        ({"intValue": "42"}, 42),
        ({"intValue": 42}, 42),
        ({"intValue": str(2**63 - 1)}, 2**63 - 1),
        ({"doubleValue": 1}, 1.0),
        ({"doubleValue": "0.5"}, 0.5),
        ({"doubleValue": "-Infinity"}, -math.inf),
        ({"boolValue": False}, False),
        ({"bytesValue": "_-8"}, b"\xff\xef"),
        ({"stringValue": ""}, ""),
        ({"arrayValue": {}}, []),
        ({"kvlistValue": {}}, {}),
        ({}, None),
        (None, None),
    ],
)
def test_a_value_is_read_as_protobuf_writes_it_in_json(written: Any, value: Any) -> None:
    span = read_json(json_request(json_span() | {"attributes": [{"key": "k", "value": written}]})).spans[0]
    assert span.attributes == {"k": value}
    assert type(span.attributes["k"]) is type(value)


def test_nan_is_read() -> None:
    written = [{"key": "k", "value": {"doubleValue": "NaN"}}]
    assert math.isnan(read_json(json_request(json_span() | {"attributes": written})).spans[0].attributes["k"])


@pytest.mark.parametrize(("written", "kind"), [(2, "server"), ("SPAN_KIND_SERVER", "server"), ("2", "server")])
def test_enums_may_be_numbers_or_names(written: Any, kind: str) -> None:
    assert one_span(kind=written).kind == kind
    assert one_span(status={"code": "STATUS_CODE_ERROR"}).status_code == "error"


def test_an_enum_that_is_not_known_yet_costs_nothing() -> None:
    span = one_span(kind=17, status={"code": "STATUS_CODE_NEW"})
    assert (span.kind, span.status_code) == ("unspecified", "unset")
    batch = read_spans(protobuf_request(protobuf_span(kind=17)), protobuf=True)
    assert batch.spans[0].kind == "unspecified"


@pytest.mark.parametrize("zeros", ["", "0000000000000000"])
def test_a_root_has_no_parent_or_zeros_for_one(zeros: str) -> None:
    assert one_span(parentSpanId=zeros).parent_span_id is None


def test_a_span_that_has_not_ended_is_taken() -> None:
    assert one_span(endTimeUnixNano=None).end_time_unix_nano == 0


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"traceId": TRACE_ID[1:]}, "trace id must be 32 hexadecimal digits"),
        ({"traceId": "0" * 32}, "trace id must not be all zeros"),
        ({"traceId": "S/kvNXezTaajzpKdDg5HNg=="}, "trace id must be 32 hexadecimal digits"),
        ({"traceId": None}, "trace id must be 32"),
        ({"spanId": SPAN_ID + "00"}, "span id must be 16"),
        ({"spanId": "0" * 16}, "span id must not be all zeros"),
        ({"spanId": 7}, "spanId must be a string"),
        ({"parentSpanId": "abc"}, "parent span id must be 16"),
        ({"parentSpanId": SPAN_ID}, "own id"),
        ({"endTimeUnixNano": str(START - 1)}, "end time is before the start time"),
        ({"endTimeUnixNano": str(2**64)}, "endTimeUnixNano must be an integer"),
        ({"startTimeUnixNano": -1}, "startTimeUnixNano must be an integer"),
        ({"startTimeUnixNano": "soon"}, "startTimeUnixNano must be an integer"),
        ({"startTimeUnixNano": True}, "startTimeUnixNano must be an integer"),
        ({"startTimeUnixNano": 1.5}, "startTimeUnixNano must be an integer"),
        ({"name": 5}, "name must be a string"),
        ({"attributes": {}}, "attributes must be a list"),
        ({"attributes": ["a"]}, "each of attributes must be an object"),
        ({"attributes": [{"key": "k", "value": "bare"}]}, "value of an attribute must be an object"),
        ({"attributes": [{"key": "k", "value": {"intValue": str(2**63)}}]}, "intValue must be an integer"),
        ({"attributes": [{"key": "k", "value": {"intValue": "9" * 5000}}]}, "intValue must be an integer"),
        ({"attributes": [{"key": "k", "value": {"boolValue": "yes"}}]}, "malformed boolValue"),
        ({"attributes": [{"key": "k", "value": {"stringValue": 1}}]}, "malformed stringValue"),
        ({"attributes": [{"key": "k", "value": {"doubleValue": "much"}}]}, "malformed doubleValue"),
        ({"attributes": [{"key": "k", "value": {"bytesValue": "~"}}]}, "malformed bytesValue"),
        ({"attributes": [{"key": "k", "value": {"arrayValue": []}}]}, "malformed arrayValue"),
        ({"events": [7]}, "each of events must be an object"),
        ({"links": "none"}, "links must be a list"),
        ({"status": "OK"}, "status must be an object"),
        ({"droppedEventsCount": 2**32}, "droppedEventsCount must be an integer"),
    ],
)
def test_a_malformed_span_costs_no_other_and_is_named_with_its_reason(fields: dict[str, Any], reason: str) -> None:
    batch = read_json(json_request(json_span(name="before"), json_span() | fields, "no span", json_span(name="after")))
    assert [span.name for span in batch.spans] == ["before", "after"]
    assert [rejected.index for rejected in batch.rejected] == [1, 2]
    assert reason in batch.rejected[0].reason
    assert batch.rejected[1].reason == "a span must be an object"


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"trace_id": b"short"}, "trace id must be 32 hexadecimal digits (16 bytes)"),
        ({"trace_id": bytes(16)}, "all zeros"),
        ({"span_id": b""}, "span id must be 16"),
        ({"parent_span_id": b"1"}, "parent span id must be 16"),
        ({"end_time_unix_nano": 1}, "end time is before"),
    ],
)
def test_a_malformed_span_in_protobuf_costs_no_other(fields: dict[str, Any], reason: str) -> None:
    body = protobuf_request(protobuf_span(name="before"), protobuf_span(**fields), protobuf_span(name="after"))
    batch = read_spans(body, protobuf=True)
    assert [span.name for span in batch.spans] == ["before", "after"]
    assert [rejected.index for rejected in batch.rejected] == [1]
    assert reason in batch.rejected[0].reason


def length_delimited(number: int, content: bytes) -> bytes:
    size, rest = len(content) & 0x7F, len(content) >> 7
    length = bytes([size]) if not rest else bytes([size | 0x80, rest & 0x7F | 0x80, rest >> 7])
    return bytes([number << 3 | 2]) + length + content


def test_bytes_that_are_no_span_cost_no_other_span() -> None:
    good: bytes = protobuf_span().SerializeToString()
    bad_text = good.replace(b"step", b"st\xffp")
    body = length_delimited(1, length_delimited(2, b"".join(length_delimited(2, s) for s in (good, bad_text, good))))
    batch = read_spans(body, protobuf=True)
    assert len(batch.spans) == 2
    assert [(rejected.index, "no valid protobuf" in rejected.reason) for rejected in batch.rejected] == [(1, True)]


def test_a_message_that_comes_in_pieces_is_put_together() -> None:
    first, second = (
        length_delimited(1, length_delimited(1, attribute.SerializeToString()))
        for attribute in protobuf_attributes({"service.name": "rag", "run_id": "r"})
    )
    scope_spans = length_delimited(2, length_delimited(2, protobuf_span().SerializeToString()))
    batch = read_spans(length_delimited(1, first + scope_spans + second), protobuf=True)
    assert batch.spans[0].resource == {"service.name": "rag", "run_id": "r"}


@pytest.mark.parametrize(
    "body",
    [
        b"{",
        b"[]",
        b"7",
        b'"resourceSpans"',
        b"\xff\xfe",
        b'{"resourceSpans": {}}',
        b'{"resourceSpans": [5]}',
        b'{"resourceSpans": [{"resource": []}]}',
        b'{"resourceSpans": [{"resource": {"attributes": [{"key": 5}]}}]}',
        b'{"resourceSpans": [{"scopeSpans": [{"scope": {"name": 5}}]}]}',
        b'{"resourceSpans": [{"scopeSpans": [{"spans": {}}]}]}',
        b'{"a":' * 100_000,
    ],
)
def test_a_body_that_is_no_request_in_json_is_refused_with_400(body: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        read_spans(body, protobuf=False)
    assert refused.value.status == 400


@pytest.mark.parametrize(
    "body",
    [
        b'{"resourceSpans": []}',
        b"\x0a",
        b"\x0a\x05ab",
        b"\x0a\xff\xff\xff\xff\xff\xff\xff\xff\xff\xff\x01",
        b"\x0a\x02\x0a\x7f",
        b"\x0a\x03\x0a\x01\xff",
        b"\x02\x00",
        b"\x0d\x00",
        b"\x09\x00",
        b"\x08",
    ],
)
def test_a_body_that_is_no_request_in_protobuf_is_refused_with_400(body: bytes) -> None:
    with pytest.raises(ApiError) as refused:
        read_spans(body, protobuf=True)
    assert refused.value.status == 400


@pytest.mark.parametrize("protobuf", [True, False])
def test_more_spans_than_the_limit_are_refused_with_413(protobuf: bool) -> None:
    body = protobuf_request(*[protobuf_span()] * 3) if protobuf else orjson.dumps(json_request(*[json_span()] * 3))
    settings = ServerSettings(max_events=2)
    with pytest.raises(ApiError) as refused:
        read_spans(body, protobuf=protobuf, settings=settings)
    assert (refused.value.status, refused.value.extra) == (413, {"limit_spans": 2})


@pytest.mark.parametrize(
    "body",
    [
        lambda: b"\x0a\x00" * 20_000,
        lambda: b"\x0a\xa0\x9c\x01" + b"\x12\x00" * 10_000,
        lambda: protobuf_request(*[protobuf_span({"a": [[]] * 4_000})] * 3),
        lambda: protobuf_request(*[protobuf_span({"a": [None] * 15_000})] * 3),
        lambda: protobuf_request(protobuf_span(events=[ProtobufSpan.Event()] * 11_000)),
        lambda: protobuf_request(protobuf_span({"a": "[" * 11_000})),
    ],
    ids=["resources", "scopes", "lists", "nulls", "events", "lists in a text"],
)
def test_small_bytes_that_would_become_much_memory_are_refused_with_413(body: Callable[[], bytes]) -> None:
    with pytest.raises(ApiError) as refused:
        read_spans(body(), protobuf=True, settings=ServerSettings(max_containers=5_000))
    assert refused.value.status == 413


@pytest.mark.parametrize("protobuf", [True, False])
def test_a_large_resource_is_cut_since_every_span_repeats_it(protobuf: bool) -> None:
    resource = {
        "process.environment": "가" * 20_000,
        "service.name": "rag",
        **{f"k{i}": "v" * 50 for i in range(2_000)},
    }
    body = (
        protobuf_request(protobuf_span(), resource=resource)
        if protobuf
        else orjson.dumps(json_request(json_span(), resource=resource))
    )
    kept = read_spans(body, protobuf=protobuf).spans[0].resource
    assert kept["service.name"] == "rag"
    assert kept["evalvault.attributes_left_out"] == len(resource) - len(kept) + 1
    assert 15_000 < len(orjson.dumps(kept)) <= 16 << 10


def test_the_spans_of_a_resource_share_it_even_as_events() -> None:
    spans = read_json(json_request(json_span(), json_span(), resource={"service.name": "rag"})).spans
    first, second = (stage_event_of(span).metadata["resource"] for span in spans)
    assert first is second


def test_a_huge_span_is_refused_by_itself() -> None:
    huge = protobuf_span({"a": "x" * (5 << 20)})
    batch = read_spans(protobuf_request(protobuf_span(), huge), protobuf=True)
    assert len(batch.spans) == 1
    assert "larger than" in batch.rejected[0].reason


def nested(levels: int) -> Any:
    value: Any = "core"
    for _ in range(levels):
        value = [value]
    return value


def test_nesting_is_cut_where_it_is_too_deep_in_both_encodings() -> None:
    attributes = {"fine": nested(16), "deep": nested(17)}
    for batch in (
        read_json(json_request(json_span(attributes))),
        read_spans(protobuf_request(protobuf_span(attributes)), protobuf=True),
    ):
        span = batch.spans[0]
        assert span.attributes["fine"] == nested(16)
        assert json.dumps(span.attributes["deep"]) == json.dumps(nested(16)).replace("core", "[nested too deeply]")


def test_nesting_without_end_costs_the_span_or_the_request_and_nothing_else() -> None:
    value = b""
    for _ in range(300):
        value = length_delimited(5, length_delimited(1, value))  # an AnyValue around an ArrayValue
    deep: bytes = protobuf_span().SerializeToString() + length_delimited(9, length_delimited(2, value))
    after: bytes = protobuf_span(name="after").SerializeToString()
    scope_spans = length_delimited(2, deep) + length_delimited(2, after)
    body = length_delimited(1, length_delimited(2, scope_spans))
    batch = read_spans(body, protobuf=True)
    assert [span.name for span in batch.spans] == ["after"]
    assert "nested too deeply" in batch.rejected[0].reason


def test_texts_that_no_store_takes_are_made_good() -> None:
    body = orjson.dumps(json_request(json_span({"a": "b"}, name="x"))).replace(b'"x"', b'"\\ud800\\u0000"')
    span = read_spans(body.replace(b'"b"', b'"\\udfff"'), protobuf=False).spans[0]
    assert (span.name, span.attributes) == ("?\ufffd", {"a": "?"})


def test_a_large_request_is_read_in_linear_time() -> None:
    def seconds(count: int) -> float:
        body = protobuf_request(*[protobuf_span({f"k{i}": i for i in range(10)})] * count)
        return least_seconds(lambda: read_spans(body, protobuf=True))

    assert seconds(4000) < 40 * max(seconds(500), 0.005)


@pytest.mark.parametrize(
    ("content_type", "protobuf"),
    [
        ("application/x-protobuf", True),
        ("application/protobuf", True),
        ("application/json", False),
        ("Application/JSON; charset=utf-8", False),
    ],
)
def test_the_content_type_says_which_encoding_it_is(content_type: str, protobuf: bool) -> None:
    assert is_protobuf(content_type) is protobuf


@pytest.mark.parametrize("content_type", [None, "", "text/plain", "application/jsonl"])
def test_another_content_type_is_refused_with_415(content_type: str | None) -> None:
    with pytest.raises(ApiError) as refused:
        is_protobuf(content_type)
    assert refused.value.status == 415


def test_protobuf_without_its_package_is_refused_with_how_to_install_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "evalvault_sdk.server.otlp.protobuf", None)
    monkeypatch.delattr("evalvault_sdk.server.otlp.protobuf", raising=False)
    with pytest.raises(ApiError) as refused:
        read_spans(b"", protobuf=True)
    assert refused.value.status == 415
    assert "pip install 'evalvault-sdk[server]'" in refused.value.details
    assert read_spans(b"{}", protobuf=False).spans == []

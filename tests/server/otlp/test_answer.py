"""The answers, read back by the packages that clients read them with."""

from __future__ import annotations

import json

import pytest
from google.protobuf.json_format import Parse
from google.rpc.error_details_pb2 import BadRequest
from google.rpc.status_pb2 import Status
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceResponse

from evalvault_sdk.server.answers import ApiError
from evalvault_sdk.server.otlp import RejectedSpan, error_body, response_body


def response_in(body: bytes, protobuf: bool) -> ExportTraceServiceResponse:
    response = ExportTraceServiceResponse()
    if protobuf:
        response.ParseFromString(body)
    else:
        Parse(body, response)
    return response


def status_in(body: bytes, protobuf: bool) -> Status:
    return Status.FromString(body) if protobuf else Parse(body, Status())


@pytest.mark.parametrize("protobuf", [True, False])
def test_full_success_leaves_partial_success_unset(protobuf: bool) -> None:
    response = response_in(response_body([], protobuf=protobuf), protobuf)
    assert not response.HasField("partial_success")


@pytest.mark.parametrize("protobuf", [True, False])
@pytest.mark.parametrize("count", [1, 5, 200, 70_000])
def test_partial_success_counts_the_refused_and_names_the_first(protobuf: bool, count: int) -> None:
    rejected = [RejectedSpan(index, "시간이 틀렸다") for index in range(count)]
    partial = response_in(response_body(rejected, protobuf=protobuf), protobuf).partial_success
    assert partial.rejected_spans == count
    assert partial.error_message.startswith("span 0: 시간이 틀렸다")
    assert ("and 190 more" in partial.error_message) == (count == 200)
    assert len(partial.error_message) < 4_001


def test_a_number_of_64_bits_is_text_in_json() -> None:
    body = json.loads(response_body([RejectedSpan(3, "why")], protobuf=False))
    assert body == {"partialSuccess": {"rejectedSpans": "1", "errorMessage": "span 3: why"}}


@pytest.mark.parametrize("protobuf", [True, False])
@pytest.mark.parametrize(("status", "code"), [(400, 3), (413, 8), (429, 8), (503, 14), (418, 2)])
def test_an_error_is_a_status_in_the_encoding_of_the_request(protobuf: bool, status: int, code: int) -> None:
    error = status_in(error_body(ApiError(status, "Malformed", "요청이 끝나지 않았다"), protobuf=protobuf), protobuf)
    assert (error.code, error.message) == (code, "Malformed: 요청이 끝나지 않았다")
    assert len(error.details) == (status == 400)


@pytest.mark.parametrize("protobuf", [True, False])
def test_bad_data_is_described_in_the_details(protobuf: bool) -> None:
    error = status_in(error_body(ApiError(400, "Malformed JSON", "at line 1"), protobuf=protobuf), protobuf)
    described = BadRequest()
    assert error.details[0].Unpack(described)
    assert described.field_violations[0].description == "Malformed JSON: at line 1"


def test_an_error_of_any_text_can_be_answered() -> None:
    for protobuf in (True, False):
        error = ApiError(500, "x" * 10_000, "\ud800")
        assert status_in(error_body(error, protobuf=protobuf), protobuf).message == "x" * 4_000

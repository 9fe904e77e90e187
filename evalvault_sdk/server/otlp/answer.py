"""
Write the answers of OTLP over HTTP, in the encoding of the request.

In:   how many spans were refused and why, or an `ApiError`.
Out:  an ExportTraceServiceResponse, or a google.rpc.Status (OTLP 1.x, "OTLP/HTTP Response").
Pure. The two messages are written by hand, field by field: that is less than the packages that could do it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import orjson

from evalvault_sdk.server.answers import ApiError
from evalvault_sdk.server.otlp.decode import RejectedSpan

#: So many refused spans are named; the others are counted.
_NAMED = 10
#: Characters of a message to a developer. The specification bounds an answer, by default at 4 MiB.
_MAX_MESSAGE = 4_000
#: google.rpc.Code by HTTP status, as google/rpc/code.proto maps them; clients may log it.
_RPC_CODES = {400: 3, 401: 16, 403: 7, 404: 5, 409: 10, 413: 8, 415: 3, 422: 3, 429: 8, 500: 13, 503: 14, 504: 4}
_UNKNOWN = 2
_BAD_REQUEST = "type.googleapis.com/google.rpc.BadRequest"


def response_body(rejected: Sequence[RejectedSpan], *, protobuf: bool) -> bytes:
    """
    Return the body of the answer 200: an ExportTraceServiceResponse.

    It is empty if every span was accepted, as the specification demands; else `partial_success` says how many were
    refused, and why the first of them. The client does not send them again.
    """
    if not rejected:
        return b"" if protobuf else b"{}"
    reasons = [f"span {refused.index}: {refused.reason}" for refused in rejected[:_NAMED]]
    if len(rejected) > _NAMED:
        reasons.append(f"and {len(rejected) - _NAMED} more")
    message = "; ".join(reasons)[:_MAX_MESSAGE]
    if protobuf:
        return _field(1, _field(1, len(rejected)) + _field(2, message))
    # rejectedSpans has 64 bits, which JSON of protobuf writes as text.
    return orjson.dumps({"partialSuccess": {"rejectedSpans": str(len(rejected)), "errorMessage": message}})


def error_body(error: ApiError, *, protobuf: bool) -> bytes:
    """Return the body of an answer 4xx or 5xx: a google.rpc.Status, for bad data with a BadRequest in its details."""
    code = _RPC_CODES.get(error.status, _UNKNOWN)
    message = f"{error.error}: {error.details}".encode("utf-8", "replace").decode()[:_MAX_MESSAGE]
    if protobuf:
        status = _field(1, code) + _field(2, message)
        if error.status == 400:
            violation = _field(1, "body") + _field(2, message)
            status += _field(3, _field(1, _BAD_REQUEST) + _field(2, _field(1, violation)))
        return status
    answer: dict[str, Any] = {"code": code, "message": message}
    if error.status == 400:
        answer["details"] = [{"@type": _BAD_REQUEST, "fieldViolations": [{"field": "body", "description": message}]}]
    return orjson.dumps(answer)


def _field(number: int, value: int | str | bytes) -> bytes:
    """Return a field of a protobuf message: an integer, a text, or a message."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    content = value.encode() if isinstance(value, str) else value
    return _varint(number << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    written = bytearray()
    while value > 0x7F:
        written.append(value & 0x7F | 0x80)
        value >>= 7
    written.append(value)
    return bytes(written)

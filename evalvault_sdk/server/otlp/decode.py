"""
Turn the body of an OTLP request into spans and verdicts.

In:   the bytes of a body, unpacked and bounded in size, and its encoding.
Out:  a `SpanBatch`: the spans that can be mapped, and for each refused one its index and the reason.
Pure, and blocking for the time of parsing: the routes call it in a thread. One bad span never costs its neighbours;
what is wrong around the spans (the request, a resource, a scope) costs the request.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import attrs

from evalvault_sdk.errors import MissingDependencyError
from evalvault_sdk.otel.span import InvalidSpanError, Span
from evalvault_sdk.server.answers import ApiError
from evalvault_sdk.server.otlp import jsonform
from evalvault_sdk.server.otlp.bounds import Bounds
from evalvault_sdk.server.settings import ServerSettings

JSON_TYPE = "application/json"
PROTOBUF_TYPE = "application/x-protobuf"


@attrs.frozen
class RejectedSpan:
    """A span that was refused."""

    #: Its place in the request: spans are counted from 0, through all resources and scopes.
    index: int
    reason: str


@attrs.frozen
class SpanBatch:
    """What a request holds, judged span by span."""

    spans: Sequence[Span]
    rejected: Sequence[RejectedSpan]


def is_protobuf(content_type: str | None) -> bool:
    """Return whether a request is in protobuf, or in JSON. Raises `ApiError` 415 for any other content type."""
    media_type = (content_type or "").partition(";")[0].strip().lower()
    if media_type in (PROTOBUF_TYPE, "application/protobuf"):
        return True
    if media_type == JSON_TYPE:
        return False
    raise ApiError(415, "Unsupported content type", f"Content-Type must be {PROTOBUF_TYPE} or {JSON_TYPE}")


def read_spans(body: bytes, *, protobuf: bool, settings: ServerSettings | None = None) -> SpanBatch:
    """
    Read an ExportTraceServiceRequest; one without spans gives an empty batch.

    Raises `ApiError`: 400 for a body that is none, 413 for more spans or values than `settings` allow, 415 for
    protobuf where the package for it is not installed.
    """
    bounds = Bounds(ServerSettings() if settings is None else settings)
    bounds.look_over(body)
    spans: list[Span] = []
    rejected: list[RejectedSpan] = []
    spans_in = _protobuf_reader() if protobuf else jsonform.spans_in
    for index, read in enumerate(spans_in(body, bounds)):
        try:
            spans.append(read())
        except InvalidSpanError as error:
            rejected.append(RejectedSpan(index, str(error)))
    return SpanBatch(spans, rejected)


def _protobuf_reader() -> Callable[[bytes, Bounds], Iterator[Callable[[], Span]]]:
    try:
        from evalvault_sdk.server.otlp import protobuf
    except ImportError as error:
        how = str(MissingDependencyError.for_extra("OTLP in protobuf", "server", error))
        raise ApiError(415, "Unsupported content type", f"{how}; or send {JSON_TYPE}") from None
    return protobuf.spans_in

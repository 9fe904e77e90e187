"""
Post batches as spans to an OTLP endpoint: an OpenTelemetry Collector, Phoenix, or what else takes OTLP over HTTP.

In:   a `Batch`, in the worker's thread.
Out:  its outcome, as OTLP has it (OTLP 1.x, "OTLP/HTTP Response"); an event that breaks EvalVault's rules is judged
      here, since nobody there would.

Of a 4xx that the specification takes for final, one that a person can do something about (a missing token, a wrong
address) is tried again all the same: events wait for that person. So is 500, which may be for one event only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import orjson

from evalvault_sdk.delivery.batch import Batch
from evalvault_sdk.delivery.transport.base import Delivered, Outcome, Refused, RejectedEvent, RetryLater, TooLarge
from evalvault_sdk.delivery.transport.http import TRACES_PATH, Answer, Poster, trouble_of
from evalvault_sdk.errors import InvalidStageEventError, MissingDependencyError
from evalvault_sdk.events import StageEvent
from evalvault_sdk.otel.span import KINDS, STATUS_CODES, Scope, Span, SpanEvent
from evalvault_sdk.otel.tospan import span_of

try:
    from google.protobuf.message import DecodeError
    from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import (
        ExportTraceServiceRequest,
        ExportTraceServiceResponse,
    )
    from opentelemetry.proto.common.v1.common_pb2 import AnyValue, ArrayValue, InstrumentationScope, KeyValue
    from opentelemetry.proto.resource.v1.resource_pb2 import Resource
    from opentelemetry.proto.trace.v1 import trace_pb2
except ImportError as error:
    raise MissingDependencyError.for_extra("sending to an OTLP endpoint", "otel", error) from error

if TYPE_CHECKING:
    from evalvault_sdk.config import Settings

_PROTOBUF, _JSON = "application/x-protobuf", "application/json"
_VARIABLE = "EVALVAULT_OTLP_ENDPOINT"


class OtlpTransport:
    """An OTLP endpoint. Spans are of the service `OTEL_SERVICE_NAME`, if that is set, else of one named as the run."""

    def __init__(self, settings: Settings) -> None:
        url = settings.otlp_endpoint or ""
        self.destination = url if url.endswith(TRACES_PATH) else url + TRACES_PATH
        self._poster = Poster(settings, self.destination, _PROTOBUF)

    def send(self, batch: Batch, *, timeout_s: float | None = None) -> Outcome:
        """Post the batch once."""
        events: list[StageEvent] = []
        rejected: dict[int, str] = {}
        places: list[int] = []
        for place, event in enumerate(batch.events):
            try:
                events.append(StageEvent.from_dict(orjson.loads(event)))
                places.append(place)
            except InvalidStageEventError as error:
                rejected[place] = str(error)
        outcome: Outcome = Delivered()
        if events:
            answer = self._poster.post(request_of(events), timeout_s=timeout_s)
            outcome = answer if isinstance(answer, RetryLater) else outcome_of(answer, len(events))
        if not isinstance(outcome, Delivered):
            # Refused as a whole: a part without these events will be told from one with them.
            return outcome
        rejected.update((places[refused.index], refused.reason) for refused in outcome.rejected)
        return Delivered(
            tuple(RejectedEvent(place, rejected[place]) for place in sorted(rejected)), outcome.unnamed, outcome.reason
        )

    def probe(self) -> Outcome:
        """Post no spans at all, which is allowed, to see what answers."""
        answer = self._poster.post(request_of([]))
        return answer if isinstance(answer, RetryLater) else outcome_of(answer, 0)

    def close(self) -> None:
        """Close the connection; the next `send` opens one."""
        self._poster.close()

    def after_fork_in_child(self) -> None:
        """Let go of the parent's connection."""
        self._poster.after_fork_in_child()


def outcome_of(answer: Answer, sent: int) -> Outcome:
    """Return what the endpoint's answer to `sent` spans means."""
    media_type = answer.headers.get("Content-Type", "").partition(";")[0].strip().lower()
    is_otlp = media_type in (_PROTOBUF, _JSON) or not (media_type or answer.body)
    if 200 <= answer.status < 300:
        partial = _partial_success(answer.body, media_type) if is_otlp else None
        if partial is None:
            return RetryLater(
                f"HTTP {answer.status} from something that is no OTLP endpoint",
                advice=f"check {_VARIABLE}, and whether a proxy or a login page answers instead",
            )
        count, reason = partial
        if count == 0:  # what it says then is a warning
            return Delivered()
        if count < sent:
            return Delivered((), count, reason)
        return Delivered(tuple(RejectedEvent(index, reason) for index in range(sent)))
    if answer.status == 413:
        return TooLarge()
    trouble = trouble_of(answer.status, answer.headers, "OTLP endpoint", _VARIABLE)
    if trouble is not None:
        return trouble
    if not is_otlp:
        return RetryLater(
            f"HTTP {answer.status} from something that is no OTLP endpoint",
            advice=f"check {_VARIABLE}, and whether a proxy answers instead",
            blame="request",
        )
    return Refused(f"HTTP {answer.status} from the OTLP endpoint")


def _partial_success(body: bytes, media_type: str) -> tuple[int, str] | None:
    """Return how many spans were refused, and why; None if this is no answer of OTLP."""
    try:
        if media_type == _JSON:
            partial = (orjson.loads(body) if body.strip() else {}).get("partialSuccess") or {}
            count, message = int(partial.get("rejectedSpans") or 0), str(partial.get("errorMessage") or "")
        else:
            answer = ExportTraceServiceResponse.FromString(body).partial_success
            count, message = answer.rejected_spans, answer.error_message
    except (DecodeError, ValueError, AttributeError, TypeError):
        return None
    return max(count, 0), message or "the endpoint does not say why"


# -- protobuf ---------------------------------------------------------------------------------------


def request_of(events: list[StageEvent]) -> bytes:
    """Return the body of a request with a span for each event, those of a run together."""
    from evalvault_sdk import __version__

    scope = Scope("evalvault_sdk", __version__)
    by_run: dict[str, list[Span]] = {}
    for event in events:
        by_run.setdefault(event.run_id, []).append(span_of(event, scope))
    body: bytes = ExportTraceServiceRequest(
        resource_spans=[
            trace_pb2.ResourceSpans(
                resource=Resource(attributes=_pairs(_resource(spans[0]))),
                scope_spans=[
                    trace_pb2.ScopeSpans(
                        scope=InstrumentationScope(name=scope.name, version=scope.version),
                        spans=list(map(_span, spans)),
                    )
                ],
            )
            for spans in by_run.values()
        ]
    ).SerializeToString()
    return body


def _resource(span: Span) -> Mapping[str, Any]:
    service = os.environ.get("OTEL_SERVICE_NAME")
    return {**span.resource, "service.name": service} if service else span.resource


def _span(span: Span) -> Any:
    kind: Any = KINDS.index(span.kind)  # plain numbers, whatever the stubs call them
    code: Any = STATUS_CODES.index(span.status_code)
    return trace_pb2.Span(
        trace_id=bytes.fromhex(span.trace_id),
        span_id=bytes.fromhex(span.span_id),
        parent_span_id=bytes.fromhex(span.parent_span_id or ""),
        name=span.name,
        kind=kind,
        start_time_unix_nano=span.start_time_unix_nano,
        end_time_unix_nano=span.end_time_unix_nano,
        attributes=_pairs(span.attributes),
        events=list(map(_event, span.events)),
        status=trace_pb2.Status(code=code, message=span.status_message),
    )


def _event(event: SpanEvent) -> Any:
    attributes = _pairs(event.attributes)
    return trace_pb2.Span.Event(name=event.name, time_unix_nano=event.time_unix_nano, attributes=attributes)


def _pairs(attributes: Mapping[str, Any]) -> Iterator[Any]:
    return (KeyValue(key=name, value=_value(value)) for name, value in attributes.items())


def _value(value: Any) -> Any:
    if isinstance(value, str):
        return AnyValue(string_value=value)
    if isinstance(value, bool):
        return AnyValue(bool_value=value)
    if isinstance(value, int):
        return AnyValue(int_value=value)
    if isinstance(value, float):
        return AnyValue(double_value=value)
    return AnyValue(array_value=ArrayValue(values=map(_value, value)))

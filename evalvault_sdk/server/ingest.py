"""
Turn a request body into valid events and verdicts.

In:   the bytes of a body, as they came over the wire, and its headers.
Out:  a `Submission`: the events to store, and for each refused one its index and the reason.
Pure, and blocking for the time of parsing: the routes call it in a thread. Sizes are bounded before
anything is parsed. One bad event never costs its neighbours.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import attrs
import orjson

from evalvault_sdk.errors import InvalidStageEventError
from evalvault_sdk.events import StageEvent


@attrs.frozen
class ApiError(Exception):
    """An answer other than success: `{"error", "details", ...}` with a status."""

    status: int
    error: str
    details: str
    extra: Mapping[str, Any] = attrs.field(factory=dict)
    headers: Mapping[str, str] = attrs.field(factory=dict)

    def body(self) -> dict[str, Any]:
        """Return the JSON object of the answer."""
        return {"error": self.error, "details": self.details, **self.extra}


@attrs.frozen(kw_only=True)
class IngestLimits:
    """What one request may ask of the server."""

    #: Bytes of a body on the wire.
    max_body_bytes: int = 16 << 20
    #: Bytes of a body after unpacking: a bomb of 16 MiB would unpack to 16 GiB.
    max_unpacked_bytes: int = 64 << 20
    #: Events in a body.
    max_events: int = 10_000


@attrs.frozen(kw_only=True)
class Submission:
    """What a body holds, judged event by event."""

    events: Sequence[StageEvent]
    rejected: Sequence[Mapping[str, Any]]

    def answer(self) -> tuple[int, dict[str, Any]]:
        """Return status and body of the answer, once `events` are stored."""
        rejected = list(self.rejected)
        if not self.events:
            return 422, {
                **{key: rejected[0][key] for key in ("error", "details", "index")},
                "rejected": rejected,
            }
        body: dict[str, Any] = {
            "stored": len(self.events),
            "run_id": self.events[0].run_id,
            "stage_ids": [event.stage_id for event in self.events],
        }
        if rejected:
            return 207, {**body, "rejected": rejected}
        return 200, body


def too_large(what: str, **limit: int) -> ApiError:
    """Return the answer 413, with the limit as text and as a number for the sender to go by."""
    return ApiError(413, "Request too large", what, extra=limit)


def read_submission(body: bytes, *, content_encoding: str | None, limits: IngestLimits) -> Submission:
    """Unpack, parse and judge a body. Raises `ApiError` when there is nothing in it to judge."""
    return _judge(_events_in(_parse(_unpack(body, content_encoding, limits)), limits))


def _unpack(body: bytes, content_encoding: str | None, limits: IngestLimits) -> bytes:
    encoding = (content_encoding or "identity").strip().lower()
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "x-gzip"):
        raise ApiError(415, "Unsupported content encoding", "Content-Encoding must be gzip or absent")
    unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
    try:
        unpacked = unpacker.decompress(body, limits.max_unpacked_bytes + 1)
    except zlib.error:
        raise ApiError(400, "Malformed gzip", "the body is not what Content-Encoding: gzip says") from None
    if len(unpacked) > limits.max_unpacked_bytes:
        raise too_large(
            f"the body unpacks to more than {limits.max_unpacked_bytes} bytes",
            limit_bytes=limits.max_unpacked_bytes,
        )
    if not unpacker.eof:
        raise ApiError(400, "Malformed gzip", "the body ends before its gzip stream does")
    return unpacked


def _parse(body: bytes) -> tuple[Any, bool]:
    """Return the body's JSON, and whether it may hold what JSON has no form for: NaN and infinities."""
    try:
        return orjson.loads(body), False
    except orjson.JSONDecodeError as error:
        strict_error = error
    # Python's own parser takes NaN, Infinity and lone surrogates, so that the one event which has them can
    # be named, and its neighbours stored.
    try:
        return json.loads(body), True
    except RecursionError:
        raise ApiError(400, "Malformed JSON", "the body is nested too deeply") from None
    except ValueError:
        place = f"line {strict_error.lineno} column {strict_error.colno}"
        raise ApiError(400, "Malformed JSON", f"{strict_error.msg.partition(':')[0]} at {place}") from None


def _events_in(parsed: tuple[Any, bool], limits: IngestLimits) -> tuple[list[Any], bool]:
    value, lax = parsed
    if not isinstance(value, dict):
        raise ApiError(422, "Invalid request", 'the body must be one event object, or {"events": [...]}')
    if "events" not in value:
        return [value], lax
    events = value["events"]
    if not isinstance(events, list):
        raise ApiError(422, "Invalid request", "events must be a list of event objects")
    if not events:
        raise ApiError(422, "Invalid request", "events must hold at least one event")
    if len(events) > limits.max_events:
        raise too_large(
            f"events holds {len(events)}; send at most {limits.max_events} in one request",
            limit_events=limits.max_events,
        )
    return events, lax


def _judge(found: tuple[list[Any], bool]) -> Submission:
    payloads, lax = found
    events: list[StageEvent] = []
    rejected: list[dict[str, Any]] = []
    for index, payload in enumerate(payloads):
        try:
            if lax:
                _check_storable(payload, "")
            events.append(StageEvent.from_dict(payload))
        except InvalidStageEventError as error:
            stage_id = payload.get("stage_id") if isinstance(payload, dict) else None
            rejected.append(
                {
                    "index": index,
                    "stage_id": stage_id if isinstance(stage_id, str) and not lax else None,
                    "error": "Invalid stage event",
                    "details": str(error),
                }
            )
    return Submission(events=events, rejected=rejected)


def _check_storable(value: Any, path: str) -> None:
    """Raise `InvalidStageEventError` for the first value that JSON or UTF-8 has no form for."""
    if isinstance(value, dict):
        for key, item in value.items():
            _check_text(key, path or "a field's name")
            _check_storable(item, f"{path}.{key}" if path else key)
    elif isinstance(value, list):
        for place, item in enumerate(value):
            _check_storable(item, f"{path}[{place}]")
    elif isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, float) and not math.isfinite(value):
        raise InvalidStageEventError(path, "must be a finite number")


def _check_text(text: str, path: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidStageEventError(path, "holds a lone surrogate, which is no text") from None

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

#: Members of a gzip body; senders write one.
_MAX_GZIP_MEMBERS = 16
#: Levels of nesting in an event; orjson writes 254, and our own client 32.
_MAX_DEPTH = 128


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
    max_unpacked_bytes: int = 32 << 20
    #: Objects and lists in a body: an empty one is two bytes on the wire, and some ninety once it is parsed.
    max_containers: int = 500_000
    #: Events in a body.
    max_events: int = 10_000
    #: Requests that wait to be parsed and stored; more are answered with 503 at once.
    max_waiting_requests: int = 64


@attrs.frozen(kw_only=True)
class Submission:
    """What a body holds, judged event by event."""

    events: Sequence[StageEvent]
    #: Where each of `events` stood in the body.
    places: Sequence[int]
    #: `{"index", "stage_id", "error", "details"}` of each event that is refused.
    rejected: Sequence[Mapping[str, Any]]

    def without(self, refused: Mapping[int, str]) -> Submission:
        """Return what is left after the store has refused some of `events`, by their index."""
        if not refused:
            return self
        kept = [index for index in range(len(self.events)) if index not in refused]
        rejected = [
            *self.rejected,
            *(_rejection(self.places[index], self.events[index].stage_id, why) for index, why in refused.items()),
        ]
        return Submission(
            events=[self.events[index] for index in kept],
            places=[self.places[index] for index in kept],
            rejected=sorted(rejected, key=lambda entry: entry["index"]),
        )

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
    unpacked = _unpack(body, content_encoding, limits)
    if unpacked.count(b"{") + unpacked.count(b"[") > limits.max_containers:
        raise too_large(
            f"a body may have {limits.max_containers} objects and lists", limit_containers=limits.max_containers
        )
    value, odd = parse_json(unpacked)
    return judge(_events_in(value, limits), odd=odd)


def _unpack(body: bytes, content_encoding: str | None, limits: IngestLimits) -> bytes:
    encoding = (content_encoding or "identity").strip().lower()
    if encoding == "identity":
        return body
    if encoding not in ("gzip", "x-gzip"):
        raise ApiError(415, "Unsupported content encoding", "Content-Encoding must be gzip or absent")
    unpacked = b""
    for _ in range(_MAX_GZIP_MEMBERS):  # RFC 1952, 2.2: a gzip file may have several; each costs a copy of the rest
        unpacker = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16)
        try:
            unpacked += unpacker.decompress(body, limits.max_unpacked_bytes + 1 - len(unpacked))
        except zlib.error:
            raise ApiError(400, "Malformed gzip", "the body is not what Content-Encoding: gzip says") from None
        if len(unpacked) > limits.max_unpacked_bytes:
            limit = limits.max_unpacked_bytes
            raise too_large(f"the body unpacks to more than {limit} bytes", limit_bytes=limit)
        if not unpacker.eof:
            raise ApiError(400, "Malformed gzip", "the body ends before its gzip stream does")
        body = unpacker.unused_data
        if not body:
            return unpacked
    raise ApiError(400, "Malformed gzip", f"the body has more than {_MAX_GZIP_MEMBERS} gzip members")


def parse_json(body: bytes) -> tuple[Any, bool]:
    """
    Return a body's JSON, and whether it holds something odd that `judge` has to look for, event by event.

    Odd is what cannot be stored and given back: NaN and infinities, lone surrogates, nesting without end.
    They are no JSON, or no JSON that everybody can read; but the one event that has them can be named, and
    its neighbours stored. Raises `ApiError` for what is no JSON even so.
    """
    try:
        value = orjson.loads(body)
        orjson.dumps([[[value]]])  # it writes less deep than it reads, and our answers wrap what they give back
    except orjson.JSONDecodeError as error:
        strict_error = error
    except TypeError:
        return value, True
    else:
        return value, False
    try:
        return json.loads(body.decode("utf-8"), parse_int=_integer), True
    except RecursionError:
        raise ApiError(400, "Malformed JSON", "the body is nested too deeply") from None
    except ValueError:
        place = f"line {strict_error.lineno} column {strict_error.colno}"
        raise ApiError(400, "Malformed JSON", f"{strict_error.msg.partition(':')[0]} at {place}") from None


def _integer(digits: str) -> int | float:
    """Return an integer as orjson does: beyond 64 bits as a float."""
    if len(digits) > len("-18446744073709551616"):
        return float(digits)
    number = int(digits)
    return number if -(2**63) <= number < 2**64 else float(digits)


def _events_in(value: Any, limits: IngestLimits) -> list[Any]:
    if not isinstance(value, dict):
        raise ApiError(422, "Invalid request", 'the body must be one event object, or {"events": [...]}')
    if "events" not in value:
        return [value]
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
    return events


def judge(payloads: Sequence[Any], *, odd: bool = False) -> Submission:
    """Return the verdict on each of `payloads`; `odd` is what `parse_json` said of them."""
    events: list[StageEvent] = []
    places: list[int] = []
    rejected: list[dict[str, Any]] = []
    for index, payload in enumerate(payloads):
        try:
            if odd:
                _check_storable(payload, "event")
            events.append(StageEvent.from_dict(payload))
            places.append(index)
        except InvalidStageEventError as error:
            rejected.append(_rejection(index, _readable_id(payload), str(error)))
    return Submission(events=events, places=places, rejected=rejected)


def _rejection(index: int, stage_id: str | None, details: str) -> dict[str, Any]:
    return {"index": index, "stage_id": stage_id, "error": "Invalid stage event", "details": details}


def _readable_id(payload: Any) -> str | None:
    stage_id = payload.get("stage_id") if isinstance(payload, dict) else None
    if not isinstance(stage_id, str):
        return None
    return stage_id.encode("utf-8", "replace").decode()


def _check_storable(value: Any, path: str, depth: int = 0) -> None:
    """Raise `InvalidStageEventError` for the first value that cannot be stored and given back."""
    if depth > _MAX_DEPTH:
        raise InvalidStageEventError(path.partition(".")[0].partition("[")[0], "is nested too deeply")
    if isinstance(value, dict):
        for key, item in value.items():
            _check_text(key, f"a name in {path}")
            _check_storable(item, key if path == "event" else f"{path}.{key}", depth + 1)
    elif isinstance(value, list):
        for place, item in enumerate(value):
            _check_storable(item, f"{path}[{place}]", depth + 1)
    elif isinstance(value, str):
        _check_text(value, path)
    elif isinstance(value, float) and not math.isfinite(value):
        raise InvalidStageEventError(path, "must be a finite number")


def _check_text(text: str, path: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise InvalidStageEventError(path, "holds a lone surrogate, which is no text") from None

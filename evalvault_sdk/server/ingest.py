"""
Turn a request body into valid events and verdicts.

In:   the bytes of a body, unpacked: JSON, or one event a line (NDJSON, JSONL).
Out:  a `Submission`, or several of a large body: events to store, and for each refused one its index and the reason.
Pure, and blocking for the time of parsing: the routes call it in a thread. Sizes are bounded before
anything is parsed. One bad event never costs its neighbours.
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any

import attrs

from evalvault_sdk.errors import InvalidStageEventError
from evalvault_sdk.events import StageEvent, run_id_problem
from evalvault_sdk.jsontext import read_json
from evalvault_sdk.server.answers import ApiError, too_large
from evalvault_sdk.server.settings import ServerSettings
from evalvault_sdk.server.store.base import Incoming, Store

#: Levels of nesting in an event; orjson writes 254, and our own client 32.
_MAX_DEPTH = 128
#: Values for each object or list that is allowed: a text of one letter is four bytes on the wire, and fifty parsed.
_VALUES_FACTOR = 4
#: Events that are judged at a time: to store so many takes about as long.
_PART = 2_048
#: Blank lines that may come with each event that is allowed.
_BLANK_FACTOR = 16
_LINE = re.compile(rb"[^\r\n]+")
#: Characters of the fields that databases keep in indexes, or that lists show.
_MAX_LENGTHS = {
    "stage_id": 256,
    "stage_type": 128,
    "parent_stage_id": 256,
    "status": 64,
    "stage_name": 1024,
    "trace_id": 128,
    "span_id": 128,
}
#: A text of so many characters is within each of these.
_SHORT = min(_MAX_LENGTHS.values())


@attrs.frozen(kw_only=True)
class Submission:
    """What a body, or a part of one, holds, judged event by event."""

    events: Sequence[Incoming]
    #: Where each of `events` stood in the body.
    places: Sequence[int]
    #: `{"index", "stage_id", "error", "details"}` of each event that is refused.
    rejected: Sequence[Mapping[str, Any]]

    @classmethod
    def joined(cls, parts: Iterable[Submission]) -> Submission:
        """Return the whole of some parts."""
        several = list(parts)
        if len(several) == 1:
            return several[0]
        return cls(
            events=[event for part in several for event in part.events],
            places=[place for part in several for place in part.places],
            rejected=[entry for part in several for entry in part.rejected],
        )

    def prepared(self, store: Store) -> Submission:
        """Return the same with its events as `store` takes them with least work."""
        return attrs.evolve(self, events=[store.prepared(event) for event in self.events])

    def without(self, refused: Mapping[int, str]) -> Submission:
        """Return what is left after the store has refused some of `events`, by their index."""
        if not refused:
            return self
        kept = [index for index in range(len(self.events)) if index not in refused]
        rejected = [
            *self.rejected,
            *(rejection(self.places[index], self.events[index].stage_id, why) for index, why in refused.items()),
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


def read_submissions(body: bytes, *, lines: bool, settings: ServerSettings) -> Iterator[Submission]:
    """
    Parse a body, one event a line or JSON, and judge it part by part: while one is judged, others can be stored.

    Raises `ApiError` with the first when there is nothing in it to judge.
    """
    check_containers(body, settings)
    if lines:
        yield _read_lines(body, settings)
        return
    value, odd = parse_json(body)
    events = _events_in(value, settings)
    for start in range(0, len(events), _PART):
        yield judge(events[start : start + _PART], first=start, odd=odd)


def check_containers(body: bytes, settings: ServerSettings) -> None:
    """Raise `ApiError` 413 for JSON that would be many times as large once it is parsed."""
    limit = settings.max_containers
    if len(body) <= limit:  # each is a byte at least; to count them takes longer than to look
        return
    if body.count(b"{") + body.count(b"[") > limit:
        raise too_large(f"a body may have {limit} objects and lists", limit_containers=limit)
    if body.count(b",") > limit * _VALUES_FACTOR:
        raise too_large(f"a body may have {limit * _VALUES_FACTOR} commas", limit_commas=limit * _VALUES_FACTOR)


def _read_lines(body: bytes, settings: ServerSettings) -> Submission:
    lines: list[bytes] = []
    # One by one: a body of nothing but line ends would be a very long list.
    for number, match in enumerate(_LINE.finditer(body.removeprefix(codecs.BOM_UTF8))):
        if line := match.group().strip():
            lines.append(line)
        if len(lines) > settings.max_events or number > settings.max_events * _BLANK_FACTOR:
            raise too_large(
                f"the body holds more than {settings.max_events} lines; send at most so many in one request",
                limit_events=settings.max_events,
            )
    if not lines:
        raise ApiError(422, "Invalid request", "the body must hold at least one event, each on a line of its own")
    parsed: list[Any] = []
    malformed: dict[int, ApiError] = {}
    any_odd = False
    for index, line in enumerate(lines):
        try:
            value, odd = parse_json(line)
            any_odd |= odd
        except ApiError as error:
            value, malformed[index] = None, error
        parsed.append(value)
    verdict = judge(parsed, odd=any_odd)
    rejected = [
        {**entry, "error": why.error, "details": why.details} if (why := malformed.get(entry["index"])) else entry
        for entry in verdict.rejected
    ]
    return attrs.evolve(verdict, rejected=rejected)


def parse_json(body: bytes) -> tuple[Any, bool]:
    """
    Return a body's JSON, and whether it holds something odd that `judge` has to look for, event by event.

    Odd is what cannot be stored and given back: NaN and infinities, lone surrogates, nesting without end.
    They are no JSON, or no JSON that everybody can read; but the one event that has them can be named, and
    its neighbours stored. Raises `ApiError` for what is no JSON even so.
    """
    try:
        return read_json(body)
    except ValueError as error:
        raise ApiError(400, "Malformed JSON", str(error)) from None


def _check_number(events: int, settings: ServerSettings) -> None:
    if events > settings.max_events:
        raise too_large(
            f"the body holds {events} events; send at most {settings.max_events} in one request",
            limit_events=settings.max_events,
        )


def _events_in(value: Any, settings: ServerSettings) -> list[Any]:
    if not isinstance(value, dict):
        raise ApiError(422, "Invalid request", 'the body must be one event object, or {"events": [...]}')
    if "events" not in value:
        return [value]
    events = value["events"]
    if not isinstance(events, list):
        raise ApiError(422, "Invalid request", "events must be a list of event objects")
    if not events:
        raise ApiError(422, "Invalid request", "events must hold at least one event")
    _check_number(len(events), settings)
    return events


def judge(payloads: Sequence[Any], *, first: int = 0, odd: bool = False) -> Submission:
    """Return the verdict on each of `payloads`, the `first` at this index; `odd` is what `parse_json` said of them."""
    events: list[StageEvent] = []
    places: list[int] = []
    rejected: list[dict[str, Any]] = []
    for index, payload in enumerate(payloads, start=first):
        try:
            if odd:
                _check_storable(payload, "event")
            event = StageEvent.from_dict(payload)
            check_event(event)
            events.append(event)
            places.append(index)
        except InvalidStageEventError as error:
            rejected.append(rejection(index, _readable_id(payload), str(error)))
    return Submission(events=events, places=places, rejected=rejected)


def rejection(index: int, stage_id: str | None, details: str) -> dict[str, Any]:
    """Return the verdict on an event that is refused."""
    return {"index": index, "stage_id": stage_id, "error": "Invalid stage event", "details": details}


def _readable_id(payload: Any) -> str | None:
    stage_id = payload.get("stage_id") if isinstance(payload, dict) else None
    if not isinstance(stage_id, str):
        return None
    return stage_id.encode("utf-8", "replace").decode()


def check_event(event: StageEvent) -> None:
    """Raise `InvalidStageEventError` for what the server takes from nobody, though EvalVault's rules allow it."""
    problem = run_id_problem(event.run_id)
    if problem is not None:
        raise InvalidStageEventError("run_id", problem)
    if not _all_short(event):
        for field, limit in _MAX_LENGTHS.items():
            value = getattr(event, field)
            if value is not None and len(value) > limit:
                raise InvalidStageEventError(field, f"must have at most {limit} characters")
    _check_calendar("started_at", event.started_at)
    _check_calendar("finished_at", event.finished_at)


def _all_short(event: StageEvent) -> bool:
    """Say whether no text comes near its limit: with each event, so it spells out what could be a loop."""
    return (
        len(event.stage_id) <= _SHORT
        and len(event.stage_type) <= _SHORT
        and len(event.status) <= _SHORT
        and (event.parent_stage_id is None or len(event.parent_stage_id) <= _SHORT)
        and (event.stage_name is None or len(event.stage_name) <= _SHORT)
        and (event.trace_id is None or len(event.trace_id) <= _SHORT)
        and (event.span_id is None or len(event.span_id) <= _SHORT)
    )


def _check_calendar(field: str, moment: datetime | None) -> None:
    if moment is not None and not 1 < moment.year < 9999:  # at the ends of the calendar there is no UTC
        raise InvalidStageEventError(field, "must be in the years 2 to 9998")


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

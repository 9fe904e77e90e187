"""
What a stage event is: its fields, EvalVault's rules for them, and its JSON.

In:   keyword arguments, or a JSON object as the contract of EvalVault 1.88 has it.
Out:  a `StageEvent` that obeys every rule, or an `InvalidStageEventError` that names the field.
Pure: no clock (but for a missing `stage_id`), thread, file or socket. Both ends use it: the server for
what it receives, the client for events handed to it ready-made. Stages measured by the client are
encoded straight from what was measured (`capture.stage`): the same JSON, without checks it cannot fail.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Mapping
from datetime import datetime, timezone
from typing import Any

import attrs

from evalvault_sdk.errors import InvalidStageEventError
from evalvault_sdk.ids import new_stage_id

#: Stage types without which EvalVault calls a run incomplete; a summary lists those that are missing.
REQUIRED_STAGE_TYPES = ("system_prompt", "input", "retrieval", "output")

# What fromisoformat() takes differs from one Python to the next: this is what we take on all of them.
_ISO_8601 = re.compile(
    r"(\d{4}-\d{2}-\d{2})(?:[T ](\d{2}:\d{2}(?::\d{2})?)(?:[.,](\d{1,9})\d*)?\s*(Z|z|[+-]\d{2}(?::?\d{2})?)?)?"
)
#: The form that our own client writes, which needs no regular expression.
_OWN_FORM_LENGTH = len("2026-01-07T10:00:00.000000+00:00")


#: The types of texts that need no second look.
_TEXTS_ONLY = {str}

#: Characters of a run id. With `stage_id` it is a key of the database's index, whose entries are bounded.
_MAX_RUN_ID = 256


def run_id_problem(run_id: str) -> str | None:
    """Return what keeps a run id from being read over HTTP, where it is a part of addresses; None if nothing."""
    if len(run_id) > _MAX_RUN_ID:
        return f"must have at most {_MAX_RUN_ID} characters"
    return _part_of_addresses_problem(run_id)


@functools.lru_cache(maxsize=1024)  # thousands of events are of one run
def _part_of_addresses_problem(run_id: str) -> str | None:
    if not run_id.isprintable():
        return "must hold nothing but printable characters"
    if any(part in ("", ".", "..") for part in run_id.split("/")):
        return "must not be '.' or '..', nor have these or nothing between its slashes: it is part of addresses"
    return None


def parse_time(field: str, value: object) -> datetime | None:
    """
    Return `value` (ISO 8601 text, a datetime, or None) as a datetime with an offset.

    A time without an offset is taken as UTC; digits beyond microseconds are cut. Raises
    `InvalidStageEventError` naming `field`.
    """
    if value is None:
        return None
    if isinstance(value, str):
        return _time_from_text(field, value)
    if not isinstance(value, datetime):
        raise InvalidStageEventError(field, "must be an ISO 8601 string such as 2026-01-07T10:00:00+09:00")
    return value.replace(tzinfo=timezone.utc) if value.tzinfo is None else value


def _time_from_text(field: str, text: str) -> datetime:
    if len(text) == _OWN_FORM_LENGTH and text[10] == "T" and text[26] in "+-":
        try:
            return datetime.fromisoformat(text)
        except ValueError:
            pass  # said better below
    match = _ISO_8601.fullmatch(text.strip())
    if match is None:
        raise InvalidStageEventError(field, "must be an ISO 8601 string such as 2026-01-07T10:00:00+09:00")
    day, clock, fraction, offset = match.groups()
    clock = clock or "00:00"
    if len(clock) == 5:
        clock += ":00"
    if offset in ("Z", "z"):
        offset = "+00:00"
    elif offset and ":" not in offset:
        offset = f"{offset[:3]}:{offset[3:] or '00'}"
    try:
        return datetime.fromisoformat(f"{day}T{clock}.{(fraction or '0')[:6].ljust(6, '0')}{offset or '+00:00'}")
    except ValueError as error:
        # The interpreter's words ("day is out of range for month") say more than ours could.
        raise InvalidStageEventError(field, f"is not a possible time: {error}") from None


def _required_text(field: str, value: object) -> str:
    if value is None:
        raise InvalidStageEventError(field, "is required")
    if not isinstance(value, str):
        raise InvalidStageEventError(field, "must be a string")
    value = value.strip()
    if not value:
        raise InvalidStageEventError(field, "is required and must not be empty")
    return _storable(field, value)


def _optional_text(field: str, value: object) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise InvalidStageEventError(field, "must be a string or null")
    return _storable(field, value)


def _id_text(field: str, value: object) -> str | None:
    return _optional_text(field, value) or None


def _storable(field: str, value: str) -> str:
    """Refuse what UTF-8 or a database cannot hold, here and by name, rather than as a failed transaction."""
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidStageEventError(field, "holds a lone surrogate, which is no text") from None
    if "\x00" in value:
        raise InvalidStageEventError(field, "must not hold a NUL character")
    return value


def _texts_are_normal(run_id: Any, stage_type: Any, status: Any, stage_id: Any, *others: Any) -> bool:
    """
    Say whether all texts of an event are as checking them one by one would leave them.

    True of what our own client sends; to look at them all at once takes a third of the time. Only `others` may
    be None.
    """
    texts = [run_id, stage_type, status, stage_id]
    for text in others:
        if text is not None:
            texts.append(text)
    if set(map(type, texts)) != _TEXTS_ONLY or "" in texts:
        return False
    together = "".join(texts)
    return bool(
        together.isascii()
        and "\x00" not in together
        and run_id.strip() == run_id
        and stage_type.strip().lower() == stage_type
        and status.strip() == status
    )


def _attempt(value: object) -> int:
    if value is None:
        return 1
    if type(value) is int and 1 <= value < 2**31:
        return value
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise InvalidStageEventError("attempt", "must be an integer")
    if not 1 <= value < 2**31:
        raise InvalidStageEventError("attempt", "must be at least 1 and below 2147483648")
    return value


def _duration_ms(value: object) -> float:
    if type(value) is float and 0.0 <= value < math.inf:
        return value
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidStageEventError("duration_ms", "must be a number or null")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an int too large for a float
        finite = False
    if not finite:
        raise InvalidStageEventError("duration_ms", "must be a finite number")
    if value < 0:
        raise InvalidStageEventError("duration_ms", "must not be negative")
    return float(value)


def _object(field: str, value: object) -> dict[str, Any]:
    if value is None:
        return {}
    if type(value) is dict:  # what it is after JSON; to ask whether it is a Mapping takes longer
        return value.copy()
    if not isinstance(value, Mapping):
        raise InvalidStageEventError(field, "must be an object")
    return dict(value)


def _payload_ref(field: str, value: object) -> StagePayloadRef:
    if isinstance(value, StagePayloadRef):
        return value
    if not isinstance(value, Mapping):
        raise InvalidStageEventError(field, "must be an object with store and id, or null")
    try:
        return StagePayloadRef.from_dict(value)
    except InvalidStageEventError as error:
        raise InvalidStageEventError(f"{field}.{error.field}", error.problem) from None


@attrs.frozen
class StagePayloadRef:
    """Where a stage's input or output is kept, when it is too large or too private to travel along."""

    #: Which store holds it, for example the name of a bucket.
    store: str
    #: Its key there.
    id: str
    #: Its format.
    type: str = "json"

    def __attrs_post_init__(self) -> None:
        for field in ("store", "id", "type"):
            object.__setattr__(self, field, _required_text(field, getattr(self, field)))

    @classmethod
    def from_dict(cls, payload: Mapping[str, Any]) -> StagePayloadRef:
        """Read `{"store", "id", "type"}`. Raises `InvalidStageEventError`."""
        kind = payload.get("type")
        return cls(payload.get("store"), payload.get("id"), "json" if kind is None else kind)  # type: ignore[arg-type]

    def to_dict(self) -> dict[str, str]:
        """Return `{"store", "id", "type"}`."""
        return {"store": self.store, "id": self.id, "type": self.type}


@attrs.frozen(kw_only=True)
class StageEvent:
    """
    One stage of one request of a RAG program, as EvalVault stores and analyses it.

    Construction checks and normalises: a `StageEvent` that exists is valid. Times without an offset are
    taken as UTC; a missing `duration_ms` is the difference of the times, where both are given.
    Raises `InvalidStageEventError`, which names the field.
    """

    #: What is evaluated together: a deployment, an experiment, a day. Stripped, never empty.
    run_id: str
    #: "retrieval", "rerank", "output" ... or any other name. Stripped and lower-cased.
    stage_type: str
    #: The event's identity within its run: sending it again stores it once. A new UUIDv7 by default.
    stage_id: str = ""
    stage_name: str | None = None
    parent_stage_id: str | None = None
    #: "success", "error", or what the sender chose.
    status: str = "success"
    #: 1 for the first try of a stage that is retried.
    attempt: int = 1
    started_at: datetime | None = None
    finished_at: datetime | None = None
    #: Milliseconds.
    duration_ms: float | None = None
    input_ref: StagePayloadRef | None = None
    output_ref: StagePayloadRef | None = None
    #: What the stage did: the query, document ids, scores, token counts. Metrics are computed from these.
    attributes: dict[str, Any] = attrs.field(factory=dict)
    #: What it ran under: model, dataset, session, test case.
    metadata: dict[str, Any] = attrs.field(factory=dict)
    trace_id: str | None = None
    span_id: str | None = None

    def __attrs_post_init__(self) -> None:
        normalised = object.__setattr__  # the one moment at which a frozen event changes
        if not _texts_are_normal(
            self.run_id, self.stage_type, self.status, self.stage_id,
            self.stage_name, self.parent_stage_id, self.trace_id, self.span_id,
        ):  # fmt: skip
            normalised(self, "run_id", _required_text("run_id", self.run_id))
            normalised(self, "stage_type", _required_text("stage_type", self.stage_type).lower())
            normalised(self, "stage_id", _optional_text("stage_id", self.stage_id) or new_stage_id())
            normalised(self, "status", "success" if self.status is None else _required_text("status", self.status))
            # None needs no check, and most of these are mostly None.
            if self.stage_name is not None:
                normalised(self, "stage_name", _optional_text("stage_name", self.stage_name))
            if self.parent_stage_id is not None:
                normalised(self, "parent_stage_id", _optional_text("parent_stage_id", self.parent_stage_id))
            if self.trace_id is not None:
                normalised(self, "trace_id", _optional_text("trace_id", self.trace_id) or None)
            if self.span_id is not None:
                normalised(self, "span_id", _optional_text("span_id", self.span_id) or None)
        normalised(self, "attempt", _attempt(self.attempt))
        normalised(self, "attributes", _object("attributes", self.attributes))
        normalised(self, "metadata", _object("metadata", self.metadata))
        if self.input_ref is not None:
            normalised(self, "input_ref", _payload_ref("input_ref", self.input_ref))
        if self.output_ref is not None:
            normalised(self, "output_ref", _payload_ref("output_ref", self.output_ref))
        if self.started_at is not None:
            normalised(self, "started_at", parse_time("started_at", self.started_at))
        if self.finished_at is not None:
            normalised(self, "finished_at", parse_time("finished_at", self.finished_at))
        if self.duration_ms is not None:
            normalised(self, "duration_ms", _duration_ms(self.duration_ms))
        if self.started_at is not None and self.finished_at is not None:
            if self.finished_at < self.started_at:
                raise InvalidStageEventError("finished_at", "must not be before started_at")
            if self.duration_ms is None:
                elapsed = self.finished_at - self.started_at
                normalised(self, "duration_ms", elapsed.total_seconds() * 1000)

    @classmethod
    def from_dict(cls, payload: Mapping[str, Any]) -> StageEvent:
        """
        Read one JSON object of the contract; `trace_id` and `span_id` may also stand in a `trace` object.

        Unknown fields are ignored, as EvalVault ignores them. Raises `InvalidStageEventError`.
        """
        if type(payload) is dict and cls is StageEvent and (event := _read_plain(payload)) is not None:
            return event
        if not isinstance(payload, Mapping):
            raise InvalidStageEventError("event", "must be an object")
        get: Callable[[str], Any] = payload.get  # what each value is, is found out by the constructor
        trace = get("trace") or {}
        if not isinstance(trace, Mapping):
            raise InvalidStageEventError("trace", "must be an object or null")
        return cls(
            run_id=get("run_id"),
            stage_type=get("stage_type"),
            stage_id=get("stage_id"),
            stage_name=get("stage_name"),
            parent_stage_id=get("parent_stage_id"),
            status=get("status"),
            attempt=get("attempt"),
            started_at=get("started_at"),
            finished_at=get("finished_at"),
            duration_ms=get("duration_ms"),
            input_ref=get("input_ref"),
            output_ref=get("output_ref"),
            attributes=get("attributes"),
            metadata=get("metadata"),
            trace_id=get("trace_id") or trace.get("trace_id"),
            span_id=get("span_id") or trace.get("span_id"),
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the JSON object of the contract, every field present, times with their offset."""
        return {
            "run_id": self.run_id,
            "stage_id": self.stage_id,
            "parent_stage_id": self.parent_stage_id,
            "stage_type": self.stage_type,
            "stage_name": self.stage_name,
            "status": self.status,
            "attempt": self.attempt,
            "started_at": self.started_at.isoformat() if self.started_at else None,
            "finished_at": self.finished_at.isoformat() if self.finished_at else None,
            "duration_ms": self.duration_ms,
            "input_ref": self.input_ref.to_dict() if self.input_ref else None,
            "output_ref": self.output_ref.to_dict() if self.output_ref else None,
            "attributes": self.attributes,
            "metadata": self.metadata,
            "trace_id": self.trace_id,
            "span_id": self.span_id,
        }


class _Draft(StageEvent):
    """A `StageEvent` while its fields are filled in: at a tenth of the cost, as it is not frozen yet."""

    __slots__ = ()
    __setattr__ = object.__setattr__
    __delattr__ = object.__delattr__  # both are one slot in C: with only one of them it is slow


def _read_plain(payload: dict[str, Any]) -> StageEvent | None:
    """
    Return what the constructor would make of an object in the form that our own client writes; None of any other.

    A server reads millions of these, and a frozen object of sixteen fields is slow to make. Whatever needs a
    closer look gets it from the constructor: a test holds the two against each other.
    """
    get = payload.get
    run_id, stage_type, status, stage_id = get("run_id"), get("stage_type"), get("status"), get("stage_id")
    stage_name, parent_stage_id = get("stage_name"), get("parent_stage_id")
    trace_id, span_id = get("trace_id"), get("span_id")
    attempt = get("attempt")
    started_at, finished_at, duration_ms = get("started_at"), get("finished_at"), get("duration_ms")
    attributes, metadata = get("attributes"), get("metadata")
    if (
        not _texts_are_normal(run_id, stage_type, status, stage_id, stage_name, parent_stage_id, trace_id, span_id)
        or type(started_at) is not str
        or type(finished_at) is not str
        or type(duration_ms) is not float
        or not 0.0 <= duration_ms < math.inf
        or type(attributes) is not dict
        or (metadata is not None and type(metadata) is not dict)
        or (attempt is not None and (type(attempt) is not int or not 1 <= attempt < 2**31))
        or get("input_ref") is not None
        or get("output_ref") is not None
        or get("trace") is not None
    ):
        return None
    draft: Any = object.__new__(_Draft)
    draft.run_id = run_id
    draft.stage_type = stage_type
    draft.stage_id = stage_id
    draft.stage_name = stage_name
    draft.parent_stage_id = parent_stage_id
    draft.status = status
    draft.attempt = 1 if attempt is None else attempt
    draft.started_at = started = _time_from_text("started_at", started_at)
    draft.finished_at = finished = _time_from_text("finished_at", finished_at)
    if finished < started:
        raise InvalidStageEventError("finished_at", "must not be before started_at")
    draft.duration_ms = duration_ms
    draft.input_ref = draft.output_ref = None
    draft.attributes = attributes.copy()
    draft.metadata = {} if metadata is None else metadata.copy()
    draft.trace_id = trace_id
    draft.span_id = span_id
    draft.__class__ = StageEvent
    event: StageEvent = draft
    return event

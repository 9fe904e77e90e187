"""
Turn a stage event into a span, such that nothing is lost on the way back.

In:   a `StageEvent`.
Out:  a `Span`; and of a `Span` that was made here, the event (`otel.mapping` asks for it first).
Pure.

A stage's attributes are the span's, by the same names: texts, booleans, numbers and lists of these as they are,
anything else as JSON. Beside them are standard ones, for those who know no others. What a span cannot say of a stage
is in one attribute, `evalvault.event`, as JSON: the other fields of the event, and the names of the attributes that
are JSON (`json`) and of those that were added (`added`; those of documents by what they have in common).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from datetime import datetime, timedelta, timezone
from typing import Any

import orjson

from evalvault_sdk.errors import InvalidStageEventError
from evalvault_sdk.events import StageEvent
from evalvault_sdk.ids import span_id_of
from evalvault_sdk.jsontext import read_json
from evalvault_sdk.otel.plain import plain, storable
from evalvault_sdk.otel.span import Scope, Span, SpanEvent
from evalvault_sdk.otel.standard import standard_attributes

#: The attributes that are ours; the metadata are where OpenInference has them, unless there is one of that name.
_EVENT, _RUN_ID, _STAGE_TYPE = "evalvault.event", "evalvault.run_id", "evalvault.stage_type"
_METADATA, _OTHER_METADATA = "metadata", "evalvault.metadata"
#: Attributes of a stage that have one of these names are among the fields of the event.
_TAKEN = (_EVENT, _RUN_ID, _STAGE_TYPE, _OTHER_METADATA)
#: Fields of the event that are said elsewhere.
_SAID = ("run_id", "stage_type", "attributes", "metadata")

_STAGE_ID = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-7[0-9a-f]{3}-[0-9a-f]{4}-[0-9a-f]{12}")
_SPAN_ID = re.compile(r"(?!0{16})[0-9a-f]{16}")
_TRACE_ID = re.compile(r"(?!0{32})[0-9a-f]{32}")
_ELEMENT = re.compile(r"(\w+\.(?:output_)?documents\.)\d+\.")
_INT64_END = 2**63
_EPOCH = datetime(1970, 1, 1, tzinfo=timezone.utc)
_MAX_NS = 2**64 - 1


def span_of(event: StageEvent, scope: Scope | None = None) -> Span:
    """Return the span of a stage. Ids that are none of W3C Trace Context are hashed, so that they stay the same."""
    attributes, in_json = _flat(event.attributes)
    taken = set(map(_root, attributes))
    added = {name: value for name, value in standard_attributes(event).items() if _root(name) not in taken}
    head = {name: value for name, value in event.to_dict().items() if value is not None and name not in _SAID}
    head = {**head, "json": in_json, "added": list(dict.fromkeys(map(_root, added)))}
    if not event.attributes.keys().isdisjoint(_TAKEN):
        head["attributes"] = {name: event.attributes[name] for name in _TAKEN if name in event.attributes}
    metadata = _OTHER_METADATA if _METADATA in event.attributes else _METADATA
    started, finished = _times(event)
    span_id = _span_id(event.stage_id)
    error = event.attributes.get("error") if event.status == "error" else None
    error = error if isinstance(error, Mapping) else {}
    return Span(
        trace_id=_trace_id(event.trace_id or event.stage_id),
        span_id=span_id,
        parent_span_id=_parent_span_id(event, span_id),
        name=event.stage_name or event.stage_type,
        kind="server" if event.stage_type == "request" else "internal",
        start_time_unix_nano=started,
        end_time_unix_nano=finished,
        status_code={"success": "ok", "error": "error"}.get(event.status, "unset"),
        status_message=storable(str(error.get("message") or "")),
        attributes={
            **added,
            **attributes,
            _RUN_ID: event.run_id,
            _STAGE_TYPE: event.stage_type,
            _EVENT: _dump(head),
            metadata: _dump(event.metadata),
        },
        events=[_exception(error, finished)] if error else (),
        resource={"service.name": event.run_id, _RUN_ID: event.run_id, "openinference.project.name": event.run_id},
        scope=scope or Scope("evalvault_sdk"),
    )


def event_of(span: Span, run_id: str) -> StageEvent | None:
    """Return the event that a span was made of, as of the run that it is to be of now; None if it is none of ours."""
    attributes = dict(span.attributes)
    head, stage_type = _load(attributes.pop(_EVENT, None)), attributes.pop(_STAGE_TYPE, None)
    if not isinstance(head, dict):
        return None
    attributes.pop(_RUN_ID, None)
    metadata = attributes.pop(_OTHER_METADATA if _OTHER_METADATA in attributes else _METADATA, None)
    added = _names(head, "added")
    attributes = {name: value for name, value in attributes.items() if _root(name) not in added}
    for name in _names(head, "json"):
        if name in attributes:
            attributes[name] = _load(attributes[name])
    fields = {
        **head,
        "run_id": run_id,
        "stage_type": stage_type,
        "attributes": plain(
            {**attributes, **taken} if isinstance(taken := head.get("attributes"), dict) else attributes
        ),
        "metadata": plain(_load(metadata)),
    }
    try:
        return StageEvent.from_dict(fields)
    except InvalidStageEventError:  # somebody has changed it on the way: then it is a span like any other
        return None


# -- attributes -------------------------------------------------------------------------------------


def _flat(attributes: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Return attributes as spans may have them, and the names of those that are JSON now."""
    flat: dict[str, Any] = {}
    in_json: list[str] = []
    for name, value in attributes.items():
        if name in _TAKEN:
            continue
        flat[name] = value
        if not (_is_scalar(value) or _is_list_of_scalars(value)):
            flat[name] = _dump(value)
            in_json.append(name)
    return flat, in_json


def _is_scalar(value: Any) -> bool:
    return isinstance(value, str | float) or (isinstance(value, int) and -_INT64_END <= value < _INT64_END)


def _is_list_of_scalars(value: Any) -> bool:
    """Whether this is a list of texts, of booleans, or of numbers: a list may hold one kind only."""
    if not isinstance(value, list) or not all(map(_is_scalar, value)):
        return False
    kinds = {float if type(item) is int else type(item) for item in value}
    return len(kinds) <= 1


def _dump(value: Any) -> str:
    return orjson.dumps(value).decode()


def _load(text: Any) -> Any:
    """Return what a text holds as JSON; what holds none is left as it is."""
    if not isinstance(text, str):
        return text
    try:
        return read_json(text.encode("utf-8", "replace"))[0]
    except ValueError:
        return text


def _names(head: Mapping[str, Any], which: str) -> set[str]:
    names = head.get(which)
    return {name for name in names if isinstance(name, str)} if isinstance(names, list) else set()


def _root(name: str) -> str:
    """Return what all attributes of a list of documents have in common; of any other attribute its name."""
    match = _ELEMENT.match(name) if "documents." in name else None  # most names need no regular expression
    return name if match is None else match[1]


def _exception(error: Mapping[str, Any], time_unix_nano: int) -> SpanEvent:
    said = {
        f"exception.{name}": storable(str(error[name])) for name in ("type", "message", "stacktrace") if name in error
    }
    return SpanEvent("exception", time_unix_nano, said)


# -- ids and times ----------------------------------------------------------------------------------


def _span_id(stage_id: str) -> str:
    """Return the id of the span that a stage is: by it alone, since a child knows no more of its parent."""
    if _STAGE_ID.fullmatch(stage_id):
        return span_id_of(stage_id)
    return stage_id if _SPAN_ID.fullmatch(stage_id) else _hash(stage_id, 8)


def _trace_id(trace_id: str) -> str:
    return trace_id if _TRACE_ID.fullmatch(trace_id) else _hash(trace_id, 16)


def _parent_span_id(event: StageEvent, span_id: str) -> str | None:
    """Return the parent's id; of a stage without one, that of the foreign span it is in, or was called by."""
    if event.parent_stage_id is not None:
        parent = _span_id(event.parent_stage_id)
        return parent if parent != span_id else None
    for foreign in (event.span_id, event.metadata.get("parent_span_id")):
        if isinstance(foreign, str) and foreign != span_id and _SPAN_ID.fullmatch(foreign):
            return foreign
    return None


def _hash(text: str, size_bytes: int) -> str:
    return hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=size_bytes).hexdigest()


def _times(event: StageEvent) -> tuple[int, int]:
    """Return beginning and end in nanoseconds of Unix time; of an unknown one, what follows from the other."""
    duration = timedelta(milliseconds=min(event.duration_ms or 0.0, 1e12))
    started, finished = event.started_at, event.finished_at
    try:
        if started is None and finished is not None:
            started = finished - duration
        elif finished is None and started is not None:
            finished = started + duration
    except OverflowError:
        started = finished = started or finished
    return _unix_nano(started), _unix_nano(finished)


def _unix_nano(time: datetime | None) -> int:
    if time is None:
        return 0
    return max(0, min((time - _EPOCH) // timedelta(microseconds=1) * 1000, _MAX_NS))

"""
Turn events into rows of EvalVault's table, and rows back into events.

In:   a valid `StageEvent`; or a row that any program may have written, by laxer rules than ours.
Out:  its columns; an event in which what cannot be kept is left out, never an error.
Pure. Both SQL stores read and write texts: JSON, and times in ISO 8601.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any, NamedTuple

import orjson

from evalvault_sdk.errors import InvalidStageEventError
from evalvault_sdk.events import StageEvent, parse_time
from evalvault_sdk.jsontext import as_integer
from evalvault_sdk.server.metrics import Measured, MeasuredStage, StageMetric


class EventRow(NamedTuple):
    """EvalVault's columns of `stage_events`, but for the number that the database gives."""

    run_id: str
    stage_id: str
    parent_stage_id: str | None
    stage_type: str
    stage_name: str | None
    status: str
    attempt: int
    started_at: str | None
    finished_at: str | None
    duration_ms: float | None
    input_ref: str | None
    output_ref: str | None
    attributes: str
    metadata: str
    trace_id: str | None
    span_id: str | None


COLUMNS = EventRow._fields
#: What metrics are computed from, and the times, which tell a duration that is missing.
MEASURED_COLUMNS = (
    "run_id",
    "stage_id",
    "stage_type",
    "duration_ms",
    "attributes",
    "metadata",
    "started_at",
    "finished_at",
)

#: So many lists and objects are not too deep for orjson, which writes 254 levels, however they are nested.
_SHALLOW = 200


def to_json(value: Any) -> str:
    """Return `value` as JSON text."""
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS).decode()


def _iso(moment: datetime) -> str:
    """Return what `isoformat` does; in UTC, where most are, at a third of its time."""
    if moment.tzinfo is timezone.utc:
        return orjson.dumps(moment)[1:-1].decode()
    return moment.isoformat()


def row_of(event: StageEvent) -> EventRow:
    """Return an event's columns."""
    columns = (
        event.run_id,
        event.stage_id,
        event.parent_stage_id,
        event.stage_type,
        event.stage_name,
        event.status,
        event.attempt,
        _iso(event.started_at) if event.started_at else None,
        _iso(event.finished_at) if event.finished_at else None,
        event.duration_ms,
        to_json(event.input_ref.to_dict()) if event.input_ref else None,
        to_json(event.output_ref.to_dict()) if event.output_ref else None,
        to_json(event.attributes),
        to_json(event.metadata) if event.metadata else "{}",
        event.trace_id,
        event.span_id,
    )
    return tuple.__new__(EventRow, columns)  # what `EventRow(...)` does, in a third of its time


def event_of(row: Sequence[Any]) -> StageEvent:
    """Return the event in a row."""
    fields = dict(zip(COLUMNS, row, strict=True))
    for name in ("input_ref", "output_ref", "attributes", "metadata"):
        fields[name] = _readable_json(fields[name])
    return lenient_event(fields)


def measured_of(row: Sequence[Any]) -> Measured:
    """Return what metrics are computed from, of the `MEASURED_COLUMNS` of a row: as `event_of` would have it."""
    run_id, stage_id, stage_type, duration_ms, attributes, metadata, started_at, finished_at = row
    attributes, metadata = _readable_json(attributes), _readable_json(metadata)
    if (
        type(duration_ms) is float
        and 0.0 <= duration_ms < math.inf
        and type(attributes) is dict
        and type(metadata) is dict
        and type(run_id) is type(stage_id) is type(stage_type) is str
        and stage_type == stage_type.strip().lower() != ""
        and run_id == run_id.strip() != ""
        and stage_id
        and "\x00" not in stage_type + run_id + stage_id
    ):
        return MeasuredStage(run_id, stage_id, stage_type, duration_ms, attributes, metadata)
    fields = (run_id, stage_id, stage_type, duration_ms, attributes, metadata, started_at, finished_at)
    return lenient_event(dict(zip(MEASURED_COLUMNS, fields, strict=True)))


def lenient_event(fields: dict[str, Any]) -> StageEvent:
    """Return the event with these fields, which another program may have written by laxer rules than ours."""
    while True:
        try:
            return StageEvent.from_dict(fields)
        except InvalidStageEventError as error:
            # Leave out the field, not the event.
            name = error.field.partition(".")[0]
            if fields.get(name) is None:
                raise
            fields[name] = "unknown" if name in ("run_id", "stage_type") else None


def metric_row_of(metric: StageMetric) -> tuple[Any, ...]:
    """Return a metric's columns."""
    evidence = None if metric.evidence is None else to_json(metric.evidence)
    return metric.run_id, metric.stage_id, metric.metric_name, metric.score, metric.threshold, evidence


def metric_of(row: Sequence[Any]) -> StageMetric:
    """Return the metric in a row."""
    run_id, stage_id, metric_name, score, threshold, evidence = row
    found = _readable_json(evidence)
    return StageMetric(run_id, stage_id, metric_name, score, threshold, found if isinstance(found, dict) else None)


def readable_time(text: str | None) -> datetime | None:
    """Return a time as it is in a row; None for what is none."""
    try:
        return parse_time("time", text)
    except InvalidStageEventError:
        return None


def _readable_json(text: str | None) -> Any:
    if text is None:
        return None
    if isinstance(text, str) and text.count("[") + text.count("{") <= _SHALLOW:
        try:
            return orjson.loads(text)
        except ValueError:
            return _odd_json(text)
    return _odd_json(text)


def _odd_json(text: str) -> Any:
    """Return JSON that is deep perhaps, or what others take for JSON."""
    try:
        value = json.loads(text, parse_int=as_integer)  # EvalVault writes NaN as Python does
        orjson.dumps([[[value]]])  # as deep as our answers wrap it
    except (ValueError, TypeError, RecursionError):  # orjson's error is a TypeError
        return {"unreadable": text}
    return value

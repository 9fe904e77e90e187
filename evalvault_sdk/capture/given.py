"""
Hold what a stage is made with, and give what programs assign the form that the contract asks for.

In:   the arguments of `StageTracer.stage()`; whatever was assigned as attributes, metadata or a reference.
Out:  a `Given`; JSON objects.
Pure. Never raises.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

from evalvault_sdk.late import load

if TYPE_CHECKING:
    from evalvault_sdk.capture.call import CallCapture
    from evalvault_sdk.capture.context import Scope
    from evalvault_sdk.events import StagePayloadRef


class Given(NamedTuple):
    """What a stage is made with, besides its type. See `StageTracer.stage`."""

    stage_name: str | None = None
    parent: Scope | None = None
    parent_stage_id: str | None = None
    trace_id: str | None = None
    attempt: int = 1
    attributes: Mapping[str, Any] | None = None
    metadata: Mapping[str, Any] | None = None
    input_ref: StagePayloadRef | Mapping[str, str] | None = None
    output_ref: StagePayloadRef | Mapping[str, str] | None = None
    call: CallCapture | None = None

    def again(self) -> Given:
        """Return the same for another stage: calls must not see each other's appends to a list that was given."""
        if self.attributes is None and self.metadata is None:
            return self
        return self._replace(attributes=_snapshot(self.attributes), metadata=_snapshot(self.metadata))


#: Most stages are made with their type alone.
NOTHING_GIVEN = Given()


def as_object(value: Any) -> dict[str, Any]:
    """Return attributes or metadata as the JSON object that the contract asks for, whatever was assigned."""
    if type(value) is dict:
        return value
    if value is None:
        return {}
    try:
        return dict(value) if isinstance(value, Mapping) else {"value": value}
    except Exception:  # noqa: BLE001 - a mapping of a user's own making
        return {"value": value}


def as_reference(value: StagePayloadRef | Mapping[str, str]) -> Any:
    """Return a payload reference as its JSON object; what is none is left for the server to refuse by name."""
    load("evalvault_sdk.events")  # nothing to do, where there is a tracer
    from evalvault_sdk.events import StagePayloadRef

    return value.to_dict() if isinstance(value, StagePayloadRef) else value


def _snapshot(given: Any) -> Any:
    """Return a copy whose lists and dicts are not those that were given: calls must not see each other's appends."""
    if type(given) is not dict:
        return given
    return {key: value.copy() if type(value) in (dict, list) else value for key, value in given.items()}

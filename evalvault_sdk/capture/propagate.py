"""
Carry a trace from one service to the next, and take it over from OpenTelemetry.

In:   the headers `traceparent` and `tracestate` of W3C Trace Context; the current span of OpenTelemetry.
Out:  the ids that a trace goes on with here; the headers for a service that is called from here.
Caller's thread. What is malformed counts as not given, as the standard wants it.

`traceparent` names a span. Which stage of which run that is, is told by our member of `tracestate`:
`evalvault=<stage id>;<run id, percent-encoded>`.
"""

from __future__ import annotations

import re
import sys
from typing import Any
from urllib.parse import quote, unquote

import attrs

from evalvault_sdk.capture.context import Scope, open_scope

#: Version, trace id, span id, flags; later versions may add more (W3C Trace Context, 3.2).
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
_TRACE_ID = re.compile(r"(?!0{32})[0-9a-f]{32}")
_OURS = "evalvault="
#: Members and characters of `tracestate` that are handed on (3.3.1.1, 3.3.1.5).
_MAX_MEMBERS = 32
_MAX_TRACESTATE = 512
#: Characters of one member's value.
_MAX_VALUE = 256


@attrs.frozen
class Remote:
    """What called this service."""

    trace_id: str
    span_id: str
    #: The stage that the span is, and its run, if it is one of ours.
    stage_id: str | None = None
    run_id: str | None = None
    #: The members of `tracestate` that are not ours.
    tracestate: str = ""


def read_headers(traceparent: object, tracestate: object = None) -> Remote | None:
    """Return what the headers say, or None without a valid `traceparent`."""
    match = _TRACEPARENT.fullmatch(traceparent.strip()) if isinstance(traceparent, str) else None
    if match is None or (match[0].startswith("00") and match[3]):
        return None
    members = [part.strip() for part in tracestate.split(",", 2 * _MAX_MEMBERS)] if isinstance(tracestate, str) else []
    others = ",".join(part for part in members[:_MAX_MEMBERS] if part and not part.startswith(_OURS))
    stage_id = run_id = None
    for member in members:
        if member.startswith(_OURS) and len(member) <= len(_OURS) + _MAX_VALUE:
            stage_id, _, quoted = member[len(_OURS) :].partition(";")
            run_id = unquote(quoted)
    others = others if len(others) <= _MAX_TRACESTATE else ""
    return Remote(match[1], match[2], stage_id or None, run_id or None, others)


def trace_headers() -> dict[str, str]:
    """
    Return `traceparent` and `tracestate` of the current stage, as headers for a service that is called from here.

    There, `tracer.trace(**headers)` takes them. Empty outside of a trace, and in one whose id was given and
    is not that of W3C Trace Context: 32 hexadecimal digits.
    """
    scope = open_scope.get()
    if scope is None or scope.span_id is None or not _TRACE_ID.fullmatch(scope._trace.trace_id):
        return {}
    trace_id = scope._trace.trace_id
    flags = "01" if scope._recorder.draws(trace_id) else "00"
    headers = {"traceparent": f"00-{trace_id}-{scope.span_id}-{flags}"}
    members = [_member(scope), scope._trace.tracestate]
    if state := ",".join(filter(None, members)):
        headers["tracestate"] = state
    return headers


def _member(scope: Scope) -> str:
    value = f"{scope.stage_id};{quote(scope._recorder.run_id, safe='')}"
    return _OURS + value if scope.stage_id and len(value) <= _MAX_VALUE else ""


def current_span() -> tuple[str, str] | None:
    """Return trace id and span id of the current span of OpenTelemetry, if the program has loaded that and has one."""
    api: Any = sys.modules.get("opentelemetry.trace")
    if api is None:
        return None
    try:
        context = api.get_current_span().get_span_context()
        return (f"{context.trace_id:032x}", f"{context.span_id:016x}") if context.is_valid else None
    except Exception:  # noqa: BLE001 - half imported, or a span of another make
        return None

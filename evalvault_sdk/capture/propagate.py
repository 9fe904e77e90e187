"""
Carry a trace from one service to the next, and take it over from OpenTelemetry.

In:   the headers `traceparent` and `tracestate` of W3C Trace Context; the current span of OpenTelemetry.
Out:  the ids that a trace goes on with here; the headers for a service that is called from here.
Caller's thread. What is malformed counts as not given, as the standard wants it.

`traceparent` names a span. Which stage of which run that is, is told by our member of `tracestate`:
`evalvault=<stage id>;<hash of the run id>`.
"""

from __future__ import annotations

import re
import sys
from typing import Any

import attrs

from evalvault_sdk.capture.context import here

#: Version, trace id, span id, flags; later versions may add more (W3C Trace Context, 3.2).
_TRACEPARENT = re.compile(r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
_TRACE_ID = re.compile(r"(?!0{32})[0-9a-f]{32}")
_OURS = re.compile(r"evalvault=([^;,=]{1,200});([0-9a-f]{16})")
#: A member of `tracestate` (3.3.1.3); their number, ours included; characters that are handed on (3.3.1.5).
_MEMBER = re.compile(r"[a-z0-9][a-z0-9_\-*/@]{0,255}=[ -+\--<>-~]{0,255}[!-+\--<>-~]")
_MAX_MEMBERS = 32
_MAX_TRACESTATE = 512


@attrs.frozen
class Remote:
    """What called this service."""

    trace_id: str
    span_id: str
    #: The stage that the span is, and the hash of its run, if it is one of ours.
    stage_id: str | None = None
    run: str | None = None
    #: The members of `tracestate` that are not ours.
    tracestate: str = ""


def read_headers(traceparent: object, tracestate: object = None) -> Remote | None:
    """Return what the headers say, or None without a valid `traceparent`."""
    match = _TRACEPARENT.fullmatch(traceparent.strip(" \t")) if isinstance(traceparent, str) else None
    if match is None or (match[0].startswith("00") and match[3]):
        return None
    stage_id = run = None
    others: list[str] = []
    members = tracestate.split(",", 2 * _MAX_MEMBERS)[: 2 * _MAX_MEMBERS] if isinstance(tracestate, str) else []
    for member in (part.strip(" \t") for part in members):
        if ours := _OURS.fullmatch(member):
            stage_id, run = ours[1], ours[2]
        elif not member.startswith("evalvault=") and len(others) < _MAX_MEMBERS - 1 and _MEMBER.fullmatch(member):
            if sum(map(len, others)) + len(others) + len(member) > _MAX_TRACESTATE:
                break
            others.append(member)
    return Remote(match[1], match[2], stage_id, run, ",".join(others))


def run_hash(run_id: str) -> str:
    """Return what tells a run from others, and says nothing of it to those it is shown to."""
    import hashlib  # loads a large library: not for every program that imports us

    return hashlib.blake2b(run_id.encode("utf-8", "replace"), digest_size=8).hexdigest()


def trace_headers() -> dict[str, str]:
    """
    Return `traceparent` and `tracestate` of the current stage, as headers for a service that is called from here.

    There, `tracer.trace(traceparent=..., tracestate=...)` takes them. Empty outside of a trace, and in one whose id
    was given and is not that of W3C Trace Context: 32 hexadecimal digits.
    """
    scope = here()
    if scope is None or scope.span_id is None or not _TRACE_ID.fullmatch(scope._trace.trace_id):
        return {}
    trace, recorder = scope._trace, scope._recorder
    if not recorder.enabled:
        return {}
    flags = "01" if recorder.draws(trace.trace_id) else "00"
    ours = f"evalvault={scope.stage_id};{run_hash(recorder.run_id)}" if scope.stage_id else ""
    headers = {"traceparent": f"00-{trace.trace_id}-{scope.span_id}-{flags}"}
    if state := ",".join(filter(None, [ours, trace.tracestate])):
        headers["tracestate"] = state
    return headers


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

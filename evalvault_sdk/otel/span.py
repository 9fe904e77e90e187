"""
What an OpenTelemetry span is, whichever encoding it came in.

In:   what a decoder read.
Out:  a `Span` that can be mapped, or an `InvalidSpanError` that says what is wrong with it.
Pure. Values of attributes are str, bool, int, float (NaN too), bytes, None, and lists and dicts of them; texts can be
written as UTF-8 and hold no NUL, and nesting is bounded: the decoders see to that.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import attrs

#: By number in the protocol (`Span.SpanKind`); a number that is not known yet counts as the first.
KINDS = ("unspecified", "internal", "server", "client", "producer", "consumer")
#: By number in the protocol (`Status.StatusCode`).
STATUS_CODES = ("unset", "ok", "error")

_TRACE_ID = re.compile(r"[0-9a-f]{32}")
_SPAN_ID = re.compile(r"[0-9a-f]{16}")
#: Characters: each span of a scope repeats them.
_MAX_SCOPE_NAME = 256
#: Nanoseconds are unsigned and have 64 bits: they end in the year 2554.
_TIMES_END = 2**64


class InvalidSpanError(ValueError):
    """A span breaks a rule of OpenTelemetry; the message names the field, and no value of it."""


@attrs.frozen
class SpanEvent:
    """Something that happened during a span: an exception, a line of a log."""

    name: str
    #: Unix time; 0 if it was not given.
    time_unix_nano: int = 0
    attributes: Mapping[str, Any] = attrs.field(factory=dict)
    dropped_attributes_count: int = 0


@attrs.frozen
class SpanLink:
    """Another span, often of another trace, that this one has to do with."""

    trace_id: str
    span_id: str
    trace_state: str = ""
    attributes: Mapping[str, Any] = attrs.field(factory=dict)
    dropped_attributes_count: int = 0


def _short(name: str) -> str:
    return name[:_MAX_SCOPE_NAME]


@attrs.frozen
class Scope:
    """Which library made a span."""

    name: str = attrs.field(default="", converter=_short)
    version: str = attrs.field(default="", converter=_short)
    #: As JSON, as a resource's are.
    attributes: Mapping[str, Any] = attrs.field(factory=dict)


@attrs.frozen(kw_only=True)
class Span:
    """
    One operation of a traced program.

    Construction checks what a span may not lack; it raises `InvalidSpanError`. A resource and a scope are shared by
    the spans they came with: nobody changes them.
    """

    #: 32 hexadecimal digits, in lower case as all ids here.
    trace_id: str
    #: 16 hexadecimal digits.
    span_id: str
    #: None for the root of a trace. Zeros, as some senders write them, are None as well.
    parent_span_id: str | None = None
    trace_state: str = ""
    name: str = ""
    #: One of `KINDS`.
    kind: str = "unspecified"
    #: Unix time in nanoseconds; 0 if it was not given, as protobuf has it.
    start_time_unix_nano: int = 0
    end_time_unix_nano: int = 0
    #: One of `STATUS_CODES`.
    status_code: str = "unset"
    status_message: str = ""
    attributes: Mapping[str, Any] = attrs.field(factory=dict)
    events: Sequence[SpanEvent] = ()
    links: Sequence[SpanLink] = ()
    #: As JSON already, and bounded in size, since every span of a resource has it.
    resource: Mapping[str, Any] = attrs.field(factory=dict)
    scope: Scope = attrs.field(factory=Scope)
    dropped_attributes_count: int = 0
    dropped_events_count: int = 0
    dropped_links_count: int = 0

    def __attrs_post_init__(self) -> None:
        _check_id("trace id", _TRACE_ID, self.trace_id)
        _check_id("span id", _SPAN_ID, self.span_id)
        if self.parent_span_id is not None:
            if not self.parent_span_id.strip("0"):
                object.__setattr__(self, "parent_span_id", None)
            else:
                _check_id("parent span id", _SPAN_ID, self.parent_span_id)
        if self.parent_span_id == self.span_id:
            raise InvalidSpanError("the parent span id is the span's own id")
        # Compared, not looked for in a range: for what is no plain int that would go through all of it.
        if not (0 <= self.start_time_unix_nano < _TIMES_END and 0 <= self.end_time_unix_nano < _TIMES_END):
            raise InvalidSpanError("a time is beyond 64 bits")
        if 0 < self.end_time_unix_nano < self.start_time_unix_nano:
            raise InvalidSpanError("the end time is before the start time")


def _check_id(what: str, form: re.Pattern[str], value: str) -> None:
    if not form.fullmatch(value):
        digits = 32 if form is _TRACE_ID else 16
        raise InvalidSpanError(f"the {what} must be {digits} hexadecimal digits ({digits // 2} bytes)")
    if not value.strip("0"):
        raise InvalidSpanError(f"the {what} must not be all zeros")

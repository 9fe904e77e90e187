"""
Make an event of a draft: format its ids and times, and put the content behind.

In:   drafts, in whatever thread takes them out of the memory: mostly the worker's.
Out:  the JSON of their events.

Of most events some of this is as in the one before: what a millisecond, a trace or a parent looks like is remembered.
"""

from __future__ import annotations

from typing import Any

import orjson

from evalvault_sdk.capture.draft import Draft, fields_of, iso_time
from evalvault_sdk.ids import NO_ID, VARIANT, Id, digits_of, stage_id_of

#: The times from 2001 to 2286.
_FIRST_NS, _LAST_NS = 10**18, 10**19 - 1
#: So many milliseconds, and so many stages, are remembered.
_MAX_KNOWN = 2048
_VARIANT = VARIANT  # a name of this module, which its types can be told of


class Finisher:
    """Finishes the drafts of one run. Any thread: what is remembered is changed in single steps."""

    def __init__(self, run_id: str) -> None:
        self._run = f'{{"run_id":{orjson.dumps(run_id).decode()},'
        self._run_id = run_id
        #: For milliseconds of Unix time: what ids begin with, and times. The second that the last of them was in.
        self._milliseconds: dict[int, tuple[str, str]] = {}
        self._second = 0, ""
        #: For a stage: the fields that name it as what opened the trace (and the run), and as the parent.
        self._places: dict[Id, tuple[str, str]] = {}

    def event_of(self, draft: Draft) -> bytes:
        """Return the event of a draft."""
        made_of, elapsed_ns, span, parent, trace, content = draft
        started_ns, random_bits = made_of
        finished_ns = started_ns + elapsed_ns
        if not _FIRST_NS <= started_ns <= finished_ns <= _LAST_NS:
            return b"%b,%b" % (orjson.dumps(self._head(draft))[:-1], content)
        begin, end, took = started_ns, finished_ns, elapsed_ns  # of 64 bits
        milliseconds, places = self._milliseconds, self._places
        begin_ms, end_ms = begin // 1_000_000, end // 1_000_000
        id_begins, started = milliseconds.get(begin_ms) or self._millisecond(begin_ms)
        _, finished = milliseconds.get(end_ms) or self._millisecond(end_ms)
        in_trace, _ = places.get(trace) or self._place(trace)
        _, in_parent = places.get(parent) or self._place(parent)
        begin_us, end_us = begin // 1000 % 1000, end // 1000 % 1000
        tail = f"{_VARIANT | random_bits:016x}"
        span_id = f"{span:016x}" if span else tail
        head = (
            f'{in_trace}{in_parent}"stage_id":"{id_begins}{begin_us:03d}-{tail[:4]}-{tail[4:]}","span_id":"{span_id}",'
            f'"started_at":"{started}{begin_us:03d}+00:00","finished_at":"{finished}{end_us:03d}+00:00",'
            f'"duration_ms":{took // 1_000_000}.{took % 1_000_000:06d},'
        )
        return head.encode() + content

    def _head(self, draft: Draft) -> dict[str, Any]:
        """Return the ids and times of an event, whatever its numbers are."""
        made_of, elapsed_ns, span, parent, trace, _ = draft
        head: dict[str, Any] = {"run_id": self._run_id}
        if trace is not NO_ID:
            head["trace_id"] = digits_of(*trace)
        if parent is not NO_ID:
            head["parent_stage_id"] = stage_id_of(digits_of(*parent))
        return {**head, **fields_of(made_of, elapsed_ns, span)}

    def _millisecond(self, millisecond: int) -> tuple[str, str]:
        known, text = self._second
        second = millisecond // 1000
        if known != second:
            text = iso_time(second * 1_000_000_000)[:20]
            self._second = second, text
        if len(self._milliseconds) > _MAX_KNOWN:
            self._milliseconds.clear()
        digits = f"{millisecond:012x}"
        made = self._milliseconds[millisecond] = f"{digits[:8]}-{digits[8:]}-7", f"{text}{millisecond % 1000:03d}"
        return made

    def _place(self, made_of: Id) -> tuple[str, str]:
        if len(self._places) > _MAX_KNOWN:
            self._places.clear()
        digits = digits_of(*made_of)
        made = self._run, ""
        if made_of != NO_ID:
            made = f'{self._run}"trace_id":"{digits}",', f'"parent_stage_id":"{stage_id_of(digits)}",'
        self._places[made_of] = made
        return made

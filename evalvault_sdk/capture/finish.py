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

#: Times of 19 digits, which are those from 2001 to 2286.
_FIRST_NS, _LAST_NS = 10**18, 10**19 - 1
#: So many milliseconds, and so many stages, are remembered.
_MAX_KNOWN = 2048


class Finisher:
    """Finishes the drafts of one run. Any thread: what is remembered is changed in single steps."""

    def __init__(self, run_id: str) -> None:
        self._run = b'{"run_id":%b,' % orjson.dumps(run_id)
        self._run_id = run_id
        self._milliseconds = _Milliseconds()
        self._places = _Places(self._run, self._milliseconds)

    def event_of(self, draft: Draft) -> bytes:
        """Return the event of a draft."""
        made_of, elapsed_ns, span, parent, trace, content = draft
        started_ns, random_bits = made_of
        finished_ns = started_ns + elapsed_ns
        if not (_FIRST_NS <= started_ns <= _LAST_NS and _FIRST_NS <= finished_ns <= _LAST_NS):
            return b"%b,%b" % (orjson.dumps(self._head(draft))[:-1], content)
        started, finished, tail = b"%d" % started_ns, b"%d" % finished_ns, b"%016x" % (VARIANT | random_bits)
        microseconds, milliseconds = started[13:16], self._milliseconds
        id_begins, time_begins = milliseconds[started[:13]]
        return b"".join(
            (
                self._places[trace][0],
                self._places[parent][1],
                b'"stage_id":"',
                id_begins,
                microseconds,
                b"-",
                tail[:4],
                b"-",
                tail[4:],
                b'","span_id":"',
                b"%016x" % span if span else tail,
                b'","started_at":"',
                time_begins,
                microseconds,
                b'+00:00","finished_at":"',
                milliseconds[finished[:13]][1],
                finished[13:16],
                b'+00:00","duration_ms":',
                orjson.dumps(elapsed_ns / 1_000_000),
                b",",
                content,
            )
        )

    def _head(self, draft: Draft) -> dict[str, Any]:
        """Return the ids and times of an event, whatever its numbers are."""
        made_of, elapsed_ns, span, parent, trace, _ = draft
        head: dict[str, Any] = {"run_id": self._run_id}
        if trace is not NO_ID:
            head["trace_id"] = digits_of(*trace)
        if parent is not NO_ID:
            head["parent_stage_id"] = stage_id_of(digits_of(*parent))
        return {**head, **fields_of(made_of, elapsed_ns, span)}


class _Milliseconds(dict[bytes, tuple[bytes, bytes]]):
    """For milliseconds of Unix time, in decimal: what ids begin with, and times."""

    def __init__(self) -> None:
        self._second = b"", b""

    def __missing__(self, millisecond: bytes) -> tuple[bytes, bytes]:
        known, text = self._second
        if known != millisecond[:10]:
            known, text = millisecond[:10], iso_time(int(millisecond[:10]) * 1_000_000_000)[:20].encode()
            self._second = known, text
        if len(self) > _MAX_KNOWN:
            self.clear()
        digits = b"%012x" % int(millisecond)
        made = self[millisecond] = b"%b-%b-7" % (digits[:8], digits[8:]), text + millisecond[10:]
        return made


class _Places(dict[Id, tuple[bytes, bytes]]):
    """For a stage: the fields that name it as what opened the trace (and the run), and as the parent."""

    def __init__(self, run: bytes, milliseconds: _Milliseconds) -> None:
        self._run = run
        self._milliseconds = milliseconds

    def __missing__(self, made_of: Id) -> tuple[bytes, bytes]:
        if len(self) > _MAX_KNOWN:
            self.clear()
        if made_of == NO_ID:
            nowhere = self[NO_ID] = self._run, b""
            return nowhere
        time_ns, random_bits = made_of
        if _FIRST_NS <= time_ns <= _LAST_NS:
            time, tail = b"%d" % time_ns, b"%016x" % (VARIANT | random_bits)
            stage_id = b"%b%b-%b-%b" % (self._milliseconds[time[:13]][0], time[13:16], tail[:4], tail[4:])
        else:
            stage_id = stage_id_of(digits_of(*made_of)).encode()
        made = self[made_of] = (
            b'%b"trace_id":"%b",' % (self._run, stage_id.replace(b"-", b"")),
            b'"parent_stage_id":"%b",' % stage_id,
        )
        return made

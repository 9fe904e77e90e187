"""
Hold an event whose content is encoded, and whose ids and times are still numbers.

In:   when a stage began, how long it took, what is random in its ids and in those of its parent and its trace; and its
      content, as JSON.
Out:  a draft; the JSON fields that its numbers are (of many at once: `capture.finish`).
Made in the caller's thread, which is not to pay for the formatting; that is done wherever drafts are to leave the
memory, mostly in the worker's.
"""

from __future__ import annotations

import datetime as dt
from typing import Any

from evalvault_sdk.ids import Id, digits_of, stage_id_of

#: What the stage's id is made of, how long it took (ns), its span's id (0: the one that goes with it), what the ids of
#: its parent and of its trace are made of (`NO_ID` where there is none, or it is among the content), and the content,
#: without the brace that it begins with. No class: one is made for every stage.
Draft = tuple[Id, int, int, Id, Id, bytes]

#: The last second that was asked for, in Unix microseconds and as text.
_second: tuple[int, str] = (1 << 62, "")


def fields_of(made_of: Id, elapsed_ns: int, span: int = 0) -> dict[str, Any]:
    """Return the fields of an event that tell which stage it is, and when it was."""
    started_ns, _ = made_of
    digits = digits_of(*made_of)
    return {
        "stage_id": stage_id_of(digits),
        "span_id": f"{span:016x}" if span else digits[16:],
        "started_at": iso_time(started_ns),
        # From the monotonic clock: a step of the wall clock cannot make a stage end before it began.
        "finished_at": iso_time(started_ns + elapsed_ns),
        "duration_ms": elapsed_ns / 1_000_000,
    }


def iso_time(time_ns: int) -> str:
    """Return Unix time in nanoseconds as ISO 8601 in UTC with microseconds and offset."""
    global _second
    second_us, text = _second
    fraction_us = time_ns // 1000 - second_us
    if not 0 <= fraction_us < 1_000_000:
        second, fraction_us = divmod(time_ns // 1000, 1_000_000)
        text = dt.datetime.fromtimestamp(second, dt.timezone.utc).strftime("%Y-%m-%dT%H:%M:%S.")
        _second = (second * 1_000_000, text)
    return "%s%06d+00:00" % (text, fraction_us)  # noqa: UP031 - faster than an f-string

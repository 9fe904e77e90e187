"""
Hold an event whose content is encoded, and whose own ids and times are still numbers.

In:   when a stage began, how long it took, what is random in its ids; and its content, as JSON.
Out:  a draft, which is bytes as well; from a draft, the numbers and the content again; from the numbers, JSON fields.
Packed in the caller's thread, which is not to pay for the formatting; unpacked wherever the draft is to leave the
memory, mostly the worker's.
"""

from __future__ import annotations

import datetime as dt
import struct
from typing import Any

from evalvault_sdk.ids import digits_of, stage_id_of

#: Started (Unix time, ns), took (ns), the random bits of the stage's id, the span's id (0: the one that goes with it).
Numbers = tuple[int, int, int, int]

# The first byte, a zero, tells a draft from JSON.
_NUMBERS = struct.Struct(">xqqQQ")
_SIZE = _NUMBERS.size
_pack, _unpack = _NUMBERS.pack, _NUMBERS.unpack_from

#: The last second that was asked for, in Unix microseconds and as text.
_second: tuple[int, str] = (1 << 62, "")


def pack(numbers: Numbers, content: bytes) -> bytes:
    """Return a draft. Raises `struct.error` for a clock that is set to the year 2262 or later."""
    return _pack(*numbers) + content


def unpack(draft: bytes) -> tuple[Numbers, bytes]:
    """Return what was packed."""
    return _unpack(draft), draft[_SIZE:]


def fields_of(numbers: Numbers) -> dict[str, Any]:
    """Return the fields of an event that tell which stage it is, and when it was."""
    started_ns, elapsed_ns, random_bits, span = numbers
    digits = digits_of(started_ns, random_bits)
    return {
        "stage_id": stage_id_of(digits),
        "started_at": iso_time(started_ns),
        # From the monotonic clock: a step of the wall clock cannot make a stage end before it began.
        "finished_at": iso_time(started_ns + elapsed_ns),
        "duration_ms": elapsed_ns / 1_000_000,
        "span_id": f"{span:016x}" if span else digits[16:],
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

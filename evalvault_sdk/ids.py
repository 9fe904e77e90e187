"""
Make the identities of stages, traces and spans.

One draw of randomness gives all three. A stage's id is a UUIDv7 (RFC 9562, 5.7) whose three digits after the
version are the microseconds of the millisecond, in decimal, so ids made by one process sort by time and the
server's index stays local. The span id is its last 64 bits, the trace id of a root stage all of its
128: both valid in W3C Trace Context, and the right-most 56 bits of a trace id are random, as its level 2
asks of ids that are sampled by.
"""

from __future__ import annotations

import functools
import os
import random
import time

# Our own generator: a program that calls random.seed(42) must not make two runs share their ids.
_random = random.Random()  # noqa: S311 - identities, not secrets
_random_bits = _random.getrandbits
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_random.seed)


#: A time (Unix, ns) and random bits: what an id is made of.
Id = tuple[int, int]
#: There is no id, or it is a text of its own.
NO_ID: Id = (0, 0)

#: Return the 62 random bits of the id of a new stage.
new_random_bits = functools.partial(_random_bits, 62)


#: The two bits before them, in RFC 9562.
VARIANT = 1 << 63


def digits_of(time_ns: int, random_bits: int) -> str:
    """Return the 32 hex digits of the UUIDv7 of a stage that started at `time_ns` (Unix time)."""
    # A clock may be set to any time, and nobody is to feel it: it is taken modulo the 48 bits that there are.
    milliseconds, microseconds = time_ns // 1_000_000 & 0xFFFF_FFFF_FFFF, time_ns // 1000 % 1000
    tail = VARIANT | random_bits
    return f"{milliseconds:012x}7{microseconds:03d}{tail:016x}"


def stage_id_of(digits: str) -> str:
    """Return 32 hex digits as a UUID is written."""
    return f"{digits[:8]}-{digits[8:12]}-{digits[12:16]}-{digits[16:20]}-{digits[20:]}"


def new_stage_id(time_ns: int | None = None) -> str:
    """Return a new UUIDv7 as text, for a stage that starts at `time_ns` (Unix time; now, if None)."""
    return stage_id_of(digits_of(time.time_ns() if time_ns is None else time_ns, new_random_bits()))


def new_id() -> Id:
    """Return what a new id is made of."""
    return time.time_ns(), new_random_bits()


def new_span_id() -> str:
    """Return a new span id, 16 hex digits, for what is no stage."""
    return f"{VARIANT | new_random_bits():016x}"


def span_id_of(stage_id: str) -> str:
    """Return the 16 hex digits of the span that a stage made by `new_stage_id` is."""
    return stage_id[19:23] + stage_id[24:]


def trace_id_of(stage_id: str) -> str:
    """Return the 32 hex digits of the trace that a root stage made by `new_stage_id` opens."""
    return stage_id.replace("-", "")

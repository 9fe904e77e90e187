"""
Make the identities of stages, traces and spans.

One draw of randomness gives all three. A stage's id is a UUIDv7 (RFC 9562, 5.7) whose 12 bits after the
version hold the fraction of the millisecond (6.2, method 3), so ids made by one process sort by time and
the server's index stays local. The span id is its last 64 bits, the trace id of a root stage all of its
128: both valid in W3C Trace Context, and the right-most 56 bits of a trace id are random, as its level 2
asks of ids that are sampled by.
"""

from __future__ import annotations

import os
import random
import time

# Our own generator: a program that calls random.seed(42) must not make two runs share their ids.
_random = random.Random()  # noqa: S311 - identities, not secrets
_random_bits = _random.getrandbits
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_random.seed)


def new_stage_id(time_ns: int | None = None) -> str:
    """Return a new UUIDv7 as text, for a stage that starts at `time_ns` (Unix time; now, if None)."""
    if time_ns is None:
        time_ns = time.time_ns()
    millisecond = time_ns // 1_000_000
    fraction = (time_ns - millisecond * 1_000_000) * 4096 // 1_000_000
    bits = _random_bits(62)
    return "%08x-%04x-7%03x-%04x-%012x" % (  # noqa: UP031 - the layout of RFC 9562 at one glance
        millisecond >> 16,
        millisecond & 0xFFFF,
        fraction,
        0x8000 | bits >> 48,
        bits & 0xFFFFFFFFFFFF,
    )


def span_id_of(stage_id: str) -> str:
    """Return the 16 hex digits of the span that a stage made by `new_stage_id` is."""
    return stage_id[19:23] + stage_id[24:]


def trace_id_of(stage_id: str) -> str:
    """Return the 32 hex digits of the trace that a root stage made by `new_stage_id` opens."""
    return stage_id.replace("-", "")

"""
Decide which traces are recorded.

In:   events on their way to the sink, with the trace that they belong to.
Out:  events put into the sink, held until their trace has shown whether it is worth keeping, or counted as
      sampled out.
Caller's thread.

A trace is drawn by its id alone, as OpenTelemetry's consistent sampling does it: every service that sees the id
comes to the same answer, and one with a higher rate records all that one with a lower rate does. Every event of a
drawn trace has `sample_rate` in its metadata: counts divided by it are estimates of the whole. A trace that was not
drawn is kept all the same if a stage of it fails or it is slow; its events have `sample_kept` too, and are no part of
such an estimate. Its events are held meanwhile, in bounds; they go with the trace.
"""

from __future__ import annotations

import hashlib
import os
import threading
from collections import deque
from typing import TYPE_CHECKING, Any, Literal

import attrs
import orjson

if TYPE_CHECKING:
    from evalvault_sdk.capture.context import Trace
    from evalvault_sdk.capture.recorder import Recorder

#: What a trace that was not drawn may hold until it ends.
_MAX_HELD_EVENTS = 500
_MAX_HELD_BYTES = 1 << 20
#: What all traces of the process may hold together: of what never ends there may be many.
_MAX_ALL_BYTES = 64 << 20
#: The digits of a trace id that are random, says W3C Trace Context, level 2: the last 56 bits.
_RANDOM_DIGITS = 14
_RANDOM_RANGE = 1 << 56


class Held:
    """The events of a trace that was not drawn, of all tracers that record in it."""

    __slots__ = ("bytes", "events", "pid")

    def __init__(self) -> None:
        self.events: deque[tuple[Recorder, bytes]] = deque()
        self.bytes = 0
        #: A forked child has a copy of what is its parent's to decide upon.
        self.pid = os.getpid()

    def has_room(self) -> bool:
        """Whether one more event may be held."""
        return len(self.events) < _MAX_HELD_EVENTS and self.bytes < _MAX_HELD_BYTES and _all.bytes < _MAX_ALL_BYTES

    def add(self, recorder: Recorder, event: bytes) -> None:
        """Hold an event."""
        self._count(len(event))
        self.events.append((recorder, event))

    def take(self) -> tuple[Recorder, bytes]:
        """Return the oldest event, which is held no longer. Raises `IndexError`."""
        recorder, event = self.events.popleft()
        self._count(-len(event))
        return recorder, event

    def _count(self, size: int) -> None:
        with _all.lock:
            self.bytes += size
            _all.bytes += size

    def __del__(self) -> None:
        self._count(-self.bytes)


class _All:
    """What the traces of this process hold."""

    def __init__(self) -> None:
        self.bytes = 0
        self.after_fork_in_child()

    def after_fork_in_child(self) -> None:
        """Begin with a lock of one's own: another thread of the parent may have held this one."""
        self.lock = threading.RLock()  # reentrant: the garbage collector may come in the middle of it


_all = _All()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_all.after_fork_in_child)


@attrs.frozen(kw_only=True)
class Sampling:
    """Which traces are recorded, for one tracer."""

    #: The part of all traces that is drawn, from 0 to 1.
    rate: float
    #: Keep traces in which a stage failed.
    keep_errors: bool = True
    #: Keep traces that took at least so many milliseconds.
    keep_slow_ms: float | None = None

    def draws(self, trace_id: object) -> bool:
        """Whether a trace is recorded from its beginning to its end."""
        return _randomness(trace_id) >= round((1 - self.rate) * _RANDOM_RANGE)

    def record(self, recorder: Recorder, fields: dict[str, Any], trace: Trace | None) -> bool:
        """Put an event, hold it or leave it out; say whether it was put."""
        metadata = fields["metadata"] = {**fields.get("metadata", {}), "sample_rate": self.rate}
        if self.draws(fields.get("trace_id")):
            return recorder.put(fields)
        duration_ms = fields.get("duration_ms")
        took_ms = duration_ms if isinstance(duration_ms, (int, float)) else 0.0
        failed = fields.get("status") == "error"
        if trace is not None:
            trace.longest_ms = took_ms = max(trace.longest_ms, took_ms)
            failed = failed or trace.failed
        why = self._why(failed=failed, took_ms=took_ms)
        if why is not None:
            if trace is not None:
                release(trace)
            metadata["sample_kept"] = why
            return recorder.put(fields)
        can_keep = self.keep_errors or self.keep_slow_ms is not None
        if trace is None or trace.ended or not can_keep or not self._hold(recorder, fields, trace):
            recorder.note("sampled_out")
        return False

    def keeps(self, trace: Trace) -> Literal["error", "slow"] | None:
        """Return why a trace is kept that was not drawn, or None if there is no reason yet."""
        return self._why(failed=trace.failed, took_ms=trace.longest_ms)

    def _why(self, *, failed: bool, took_ms: float) -> Literal["error", "slow"] | None:
        if failed and self.keep_errors:
            return "error"
        return "slow" if self.keep_slow_ms is not None and took_ms >= self.keep_slow_ms else None

    @staticmethod
    def _hold(recorder: Recorder, fields: dict[str, Any], trace: Trace) -> bool:
        """Keep an event with its trace, if there is room for it."""
        held = trace.held
        if held is None or held.pid != os.getpid():
            held = trace.hold()
        if not held.has_room():
            return False
        fields["metadata"]["sample_kept"] = "error"  # or as long a word: the event keeps its size
        event = recorder.encode(fields)
        if event is not None:
            held.add(recorder, event)
            if trace.ended or trace.failed:  # as another thread may have found out meanwhile
                release(trace)
        return True


def release(trace: Trace) -> None:
    """Put what is held into the sinks of those who keep the trace; if it has ended, count the rest as sampled out."""
    held = trace.held
    if held is None or held.pid != os.getpid():
        return
    for _ in range(len(held.events)):
        try:
            recorder, event = held.take()
        except IndexError:  # another thread was faster
            return
        why = sampling.keeps(trace) if (sampling := recorder.setup.sampling) is not None else None
        if why is not None:
            fields = orjson.loads(event)
            fields.setdefault("metadata", {})["sample_kept"] = why
            recorder.put_encoded(orjson.dumps(fields))
        elif trace.ended:
            recorder.note("sampled_out")
        else:
            held.add(recorder, event)


def _randomness(trace_id: object) -> int:
    """Return 56 random bits of a trace id: its last ones, or a hash of an id that is not of W3C's form."""
    text = trace_id if isinstance(trace_id, str) else ""
    if len(text) == 32:
        try:
            return int(text[-_RANDOM_DIGITS:], 16)
        except ValueError:
            pass
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=7).digest(), "big")

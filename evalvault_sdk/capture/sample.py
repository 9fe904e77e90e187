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
from collections import deque
from typing import TYPE_CHECKING, Any

import attrs
import orjson

if TYPE_CHECKING:
    from evalvault_sdk.capture.context import Trace
    from evalvault_sdk.capture.recorder import Recorder

#: What a trace that was not drawn may hold until it ends.
_MAX_HELD_EVENTS = 500
_MAX_HELD_BYTES = 1 << 20
#: The digits of a trace id that are random, says W3C Trace Context, level 2: the last 56 bits.
_RANDOM_DIGITS = 14
_RANDOM_RANGE = 1 << 56


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
        fields["metadata"] = {**fields.get("metadata", {}), "sample_rate": self.rate}
        if self.draws(fields.get("trace_id")):
            return recorder.put(fields)
        kept = trace.kept if trace is not None else None
        why = kept or self._worth_keeping(fields)
        if why is None and (trace is None or trace.ended or not self._can_keep):
            recorder.note("sampled_out")
            return False
        if why is not None:
            fields["metadata"]["sample_kept"] = why
        if why is None and trace is not None:
            self._hold(recorder, fields, trace)
            return False
        if trace is not None and kept is None:
            trace.kept = why
            _release(trace)
        return recorder.put(fields)

    def end(self, recorder: Recorder, trace: Trace, duration_ms: float | None) -> None:
        """Decide over what a trace holds: the scope that opened it was left, after `duration_ms`, if that is known."""
        slow = self.keep_slow_ms
        if trace.kept is None and duration_ms is not None and slow is not None and duration_ms >= slow:
            trace.kept = "slow"
        trace.ended = True
        _release(trace)

    @property
    def _can_keep(self) -> bool:
        return self.keep_errors or self.keep_slow_ms is not None

    def _worth_keeping(self, fields: dict[str, Any]) -> str | None:
        if self.keep_errors and fields.get("status") == "error":
            return "error"
        duration_ms = fields.get("duration_ms")
        slow = self.keep_slow_ms
        if slow is not None and isinstance(duration_ms, (int, float)) and duration_ms >= slow:
            return "slow"
        return None

    def _hold(self, recorder: Recorder, fields: dict[str, Any], trace: Trace) -> None:
        if trace.held is None:
            trace.held = deque()
        if len(trace.held) >= _MAX_HELD_EVENTS or trace.held_bytes >= _MAX_HELD_BYTES:
            recorder.note("sampled_out")
            return
        event = recorder.encode(fields)
        if event is not None:
            trace.held_bytes += len(event)
            trace.held.append((recorder, event))
            if trace.ended or trace.kept is not None:  # as another thread may have decided meanwhile
                _release(trace)


def _release(trace: Trace) -> None:
    """Put what is held into the sink if the trace is kept, count it as sampled out if it has ended and is not."""
    held = trace.held
    while held:
        try:
            recorder, event = held.popleft()
        except IndexError:  # another thread was faster
            return
        if trace.kept is None:
            recorder.note("sampled_out")
            continue
        fields = orjson.loads(event)
        fields.setdefault("metadata", {})["sample_kept"] = trace.kept
        recorder.put_encoded(orjson.dumps(fields))


def _randomness(trace_id: object) -> int:
    """Return 56 random bits of a trace id: its last ones, or a hash of an id that is not of W3C's form."""
    text = trace_id if isinstance(trace_id, str) else ""
    if len(text) == 32:
        try:
            return int(text[-_RANDOM_DIGITS:], 16)
        except ValueError:
            pass
    return int.from_bytes(hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=7).digest(), "big")

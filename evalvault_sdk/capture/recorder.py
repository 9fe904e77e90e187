"""
Hand what was recorded to delivery, as bytes.

In:   the fields of an event, from a stage that ended or from `record_stage`.
Out:  one encoded event in the sink, or one counted drop.
Caller's thread. Never raises: whatever goes wrong here is ours, and the host program must not feel it.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

from evalvault_sdk.capture.context import Trace
from evalvault_sdk.capture.encode import Encoder
from evalvault_sdk.capture.sample import Sampling, release
from evalvault_sdk.log import Rarely
from evalvault_sdk.payload import PayloadStore

#: Why an event was recorded and yet could not be put.
RefusalReason = Literal["invalid", "internal_error", "too_large"]
#: What is counted of events besides what becomes of them.
Note = Literal["truncated", "sampled_out", "hook_errors"]


class Sink(Protocol):
    """Where encoded events go: the queue, or in tests a list."""

    @property
    def closed(self) -> bool:
        """Whether it takes no more."""

    def put(self, event: bytes) -> bool:
        """Take an event, or count it as dropped and return False. Never raises, never blocks."""

    def refuse(self, reason: RefusalReason) -> None:
        """Count an event that was recorded and could not be put."""

    def note(self, what: Note, count: int = 1) -> None:
        """Count something else."""


_FOLLOWED = ("enabled", "encoder", "payload_store", "run_id", "sampling", "sink", "traceback_frames")


class Recorder:
    """One run's way from fields to the sink. As long as it is referred to, its worker goes on."""

    __slots__ = ("__weakref__", "_log", *_FOLLOWED)

    def __init__(
        self,
        run_id: str,
        sink: Sink,
        log: Rarely | None = None,
        *,
        encoder: Encoder | None = None,
        sampling: Sampling | None = None,
        payload_store: PayloadStore | None = None,
        traceback_frames: int = 0,
        enabled: bool = True,
    ) -> None:
        self.run_id = run_id
        self.sink = sink
        self.encoder = encoder or Encoder()
        #: None: everything is recorded.
        self.sampling = sampling
        self.payload_store = payload_store
        #: So many frames of an error's traceback are recorded.
        self.traceback_frames = traceback_frames
        #: False: stages need not even be measured.
        self.enabled = enabled
        self._log = log or Rarely()

    def make_ready(self) -> None:
        """See to it that `run_id` and the rest are those that will be recorded with."""

    def follow(self, other: Recorder) -> None:
        """From now on record as `other` does."""
        for name in _FOLLOWED:
            setattr(self, name, getattr(other, name))

    def record(self, fields: dict[str, Any], trace: Trace | None = None) -> bool:
        """Encode an event, put it into the sink unless its trace is not drawn; say whether it was taken."""
        try:
            if self.sampling is not None:
                return self.sampling.record(self, fields, trace)
            event = self.encoder.encode(fields, self)
            return (event is not None and self.sink.put(event)) or self._not_taken(event)
        except Exception as error:  # noqa: BLE001 - see the module's promise
            self.fault("recording a stage", error)
            return False

    def put(self, fields: dict[str, Any]) -> bool:
        """Encode an event and put it into the sink."""
        event = self.encode(fields)
        return event is not None and self.put_encoded(event)

    def encode(self, fields: dict[str, Any]) -> bytes | None:
        """Return an event as bytes; None if it is too large whatever is cut, and counted as dropped."""
        event = self.encoder.encode(fields, self)
        if event is None:
            self._not_taken(event)
        return event

    def put_encoded(self, event: bytes) -> bool:
        """Put an event into the sink."""
        return self.sink.put(event) or self._not_taken(event)

    def _not_taken(self, event: bytes | None) -> bool:
        """See to it that the loss of an event is counted, and said if it is one of ours to avoid. Returns False."""
        if event is None:
            self.sink.refuse("too_large")
        elif self.sink.closed:
            self._log.warn(
                "closed", "a stage was recorded after shutdown() and is lost; further ones are counted as 'closed'"
            )
        return False

    def draws(self, trace_id: str | None) -> bool:
        """Whether a trace is recorded from its beginning to its end."""
        return self.sampling is None or self.sampling.draws(trace_id)

    def end_trace(self, trace: Trace, duration_ms: float) -> None:
        """Decide over what is held of a trace that was not drawn: the scope that opened it was left."""
        trace.ended = True
        trace.longest_ms = max(trace.longest_ms, duration_ms)
        if trace.held is not None:
            self._release(trace)

    def fail_trace(self, trace: Trace) -> None:
        """Say that a stage failed: whoever samples may want to keep the trace."""
        trace.failed = True
        if trace.held is not None:
            self._release(trace)

    def _release(self, trace: Trace) -> None:
        try:
            release(trace)
        except Exception as error:  # noqa: BLE001 - see the module's promise
            self.fault("ending a trace", error)

    def note(self, what: Note, count: int = 1) -> None:
        """Count something that is no loss of an event."""
        self.sink.note(what, count)

    def hook_failed(self, hook: str, error: BaseException) -> None:
        """Count that a function of the user's raised, and say so; of the error only its kind."""
        try:
            self.sink.note("hook_errors", 1)
            self._log.warn(
                hook,
                "the function given as %s= raised %s; further errors are counted in stats() as 'hook_errors'",
                hook,
                type(error).__name__,
            )
        except Exception:  # noqa: BLE001,S110 - a sink that fails even at counting
            pass

    def fault(self, doing: str, error: Exception, reason: RefusalReason = "internal_error") -> None:
        """Count an event lost to `error`, and say so; of the error only its kind, since its text may quote content."""
        try:
            self.sink.refuse(reason)
            self._log.warn(
                reason,
                "an event was lost while %s (%s); further ones are counted in stats() as %r",
                doing,
                type(error).__name__,
                reason,
            )
        except Exception:  # noqa: BLE001,S110 - a sink that fails even at counting
            pass

"""
Hand what was recorded to delivery, as bytes.

In:   the fields of an event, from a stage that ended or from `record_stage`.
Out:  one encoded event in the sink, or one counted drop.
Caller's thread. Never raises: whatever goes wrong here is ours, and the host program must not feel it.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

from evalvault_sdk.capture.encode import encode
from evalvault_sdk.log import Rarely

#: Why an event was recorded and yet could not be put.
RefusalReason = Literal["invalid", "internal_error"]


class Sink(Protocol):
    """Where encoded events go: the queue, or in tests a list."""

    #: Whether it takes no more.
    closed: bool

    def put(self, event: bytes) -> bool:
        """Take an event, or count it as dropped and return False. Never raises, never blocks."""

    def refuse(self, reason: RefusalReason) -> None:
        """Count an event that was recorded and could not be put."""


class Recorder:
    """One run's way from fields to the sink. As long as it is referred to, its worker goes on."""

    __slots__ = ("__weakref__", "_log", "run_id", "sink")

    def __init__(self, run_id: str, sink: Sink, log: Rarely | None = None) -> None:
        self.run_id = run_id
        self.sink = sink
        self._log = log or Rarely()

    def record(self, fields: dict[str, Any]) -> bool:
        """Encode an event and put it into the sink; say whether it was taken."""
        try:
            taken = self.sink.put(encode(fields))
            if not taken and self.sink.closed:
                self._log.warn(
                    "closed", "a stage was recorded after shutdown() and is lost; further ones are counted as 'closed'"
                )
            return taken
        except Exception as error:  # noqa: BLE001 - see the module's promise
            self.fault("recording a stage", error)
            return False

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

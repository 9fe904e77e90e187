"""
Hand what was recorded to delivery, as bytes.

In:   the fields of an event, from a stage that ended or from `record_stage`.
Out:  one encoded event in the sink, or one counted drop.
Caller's thread. Never raises: whatever goes wrong here is ours, and the host program must not feel it.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any, Literal, Protocol

from evalvault_sdk.capture.encode import encode

logger = logging.getLogger("evalvault_sdk")

#: A fault of ours is logged at most once in so many seconds; all are counted.
_LOG_INTERVAL_S = 60.0


#: Why an event was recorded and yet could not be put.
RefusalReason = Literal["invalid", "internal_error"]


class Sink(Protocol):
    """Where encoded events go: the queue, or in tests a list."""

    def put(self, event: bytes) -> bool:
        """Take an event, or count it as dropped and return False. Never raises, never blocks."""

    def refuse(self, reason: RefusalReason) -> None:
        """Count an event that was recorded and could not be put."""


class Recorder:
    """One run's way from fields to the sink."""

    __slots__ = ("_clock", "_logged_at", "run_id", "sink")

    def __init__(self, run_id: str, sink: Sink, clock: Callable[[], float] = time.monotonic) -> None:
        self.run_id = run_id
        self.sink = sink
        self._clock = clock
        self._logged_at = float("-inf")

    def record(self, fields: dict[str, Any]) -> bool:
        """Encode an event and put it into the sink; say whether it was taken."""
        try:
            return self.sink.put(encode(fields))
        except Exception as error:  # noqa: BLE001 - see the module's promise
            self.fault("recording a stage", error)
            return False

    def fault(self, doing: str, error: Exception, reason: RefusalReason = "internal_error") -> None:
        """Count an event lost to `error`; log the kind of error, never its message, which may quote content."""
        try:
            self.sink.refuse(reason)
            now = self._clock()
            if now - self._logged_at >= _LOG_INTERVAL_S:
                self._logged_at = now
                logger.warning(
                    "evalvault: an event was lost while %s (%s); further ones are counted in stats() as %r",
                    doing,
                    type(error).__name__,
                    reason,
                )
        except Exception:  # noqa: BLE001,S110 - a logging handler of the host failed; the count stands
            pass

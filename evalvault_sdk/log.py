"""
Say something to the operator, rarely, and never at the host program's expense.

In:   a warning, from any thread.
Out:  a line of the logger `evalvault_sdk`, or nothing when the host's logging itself fails.

Lines name what happened and what to do, never what an event holds.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from evalvault_sdk.late import load

if TYPE_CHECKING:
    import logging

#: What may happen with every event is said at most once in so many seconds.
RARELY_S = 60.0


def logger() -> logging.Logger:
    """Return the logger of this package."""
    load("logging")  # not for every program that imports us; nothing to do, where there is a tracer
    import logging

    return logging.getLogger("evalvault_sdk")


def warn(message: str, *values: object) -> None:
    """Log a warning. Whatever a filter or handler of the host raises stays here."""
    with contextlib.suppress(Exception):
        logger().warning("evalvault: " + message, *values)


class Rarely:
    """Warns at most once a minute for each key; the counts in `stats()` have the rest."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._said_at: dict[str, float] = {}

    def warn(self, key: str, message: str, *values: object) -> bool:
        """Log a warning, unless one with the same key was logged within the last minute; say whether it was."""
        now = self._clock()
        if now - self._said_at.get(key, float("-inf")) < RARELY_S:
            return False
        self._said_at[key] = now
        warn(message, *values)
        return True

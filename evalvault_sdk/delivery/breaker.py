"""
Decide when the next request may be sent.

In:   the outcome of every request; whether somebody waits.
Out:  the seconds until the next try: 0 while all is well.
Pure: no thread or socket; a clock, and a source of randomness of its own.

After a failure the next request is a probe: it comes after a wait drawn at random below a ceiling that
doubles with every failure (full jitter), and not before the time that a server asked for (`Retry-After`). The
breaker counts as open, and an outage as begun, after failures in a row; a single one is no news.
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable

from evalvault_sdk.delivery.transport.base import RetryLater
from evalvault_sdk.late import load

#: Failures in a row, or seconds of nothing but failure, that make an outage.
_FAILURES = 3
_FAILING_S = 5.0


class Breaker:
    """One destination's state: `open` in an outage."""

    def __init__(
        self,
        *,
        initial_s: float,
        max_s: float,
        clock: Callable[[], float] = time.monotonic,
        uniform: Callable[[float, float], float] | None = None,
    ) -> None:
        self._initial_s = initial_s
        self._max_s = max_s
        self._clock = clock
        # A generator of our own: the host program's must neither be used up by us nor, seeded the same in a whole
        # fleet, make all its members come back at once.
        self._uniform = uniform or random.Random().uniform  # noqa: S311 - no secret
        self.start_over()

    def start_over(self) -> None:
        """Begin closed: at first, and in a forked child."""
        self._failures = 0
        self._failing_since = 0.0
        self._ours_until = 0.0
        self._asked_until = 0.0
        #: Whether there is an outage, and since when it has been one for the events.
        self.open = False

    @property
    def failing_since(self) -> float:
        """When the first of the failures in a row was, on the breaker's clock."""
        return self._failing_since

    @property
    def failing(self) -> bool:
        """Whether the last request failed: the next is a probe."""
        return self._failures > 0

    def failed(self, outcome: RetryLater, *, urgent: bool = False) -> None:
        """Take note of a failure. While it is `urgent`, since somebody waits, waits stay below their first ceiling."""
        now = self._clock()
        self._failures += 1
        if self._failures == 1:
            self._failing_since = now
        ours_s = self._uniform(0.0, self._initial_s if urgent else self._ceiling_s())
        asked_s = outcome.wait_s or 0.0
        self._ours_until = now + ours_s
        # Jitter on top of what the server asks for keeps a fleet from coming back as one.
        self._asked_until = now + asked_s + ours_s / 10 if asked_s else now
        if (
            self._failures >= _FAILURES
            or now - self._failing_since >= _FAILING_S
            or outcome.advice is not None  # it wants a person
        ):
            self.open = True

    def succeeded(self) -> None:
        """Take note that the destination took a request."""
        self._failures = 0
        self.open = False

    def hurry(self) -> None:
        """Let the next probe come at once, or when the server asked for it."""
        self._ours_until = 0.0

    def wait_s(self, *, ending: bool = False) -> float:
        """Return the seconds until the next request may go; when `ending`, what the server asked for is no matter."""
        if not self._failures:
            return 0.0
        until = self._ours_until if ending else max(self._ours_until, self._asked_until)
        return max(0.0, until - self._clock())

    def _ceiling_s(self) -> float:
        load("tenacity")
        import tenacity

        state = tenacity.RetryCallState(tenacity.Retrying(), None, (), {})
        state.attempt_number = self._failures
        return float(tenacity.wait_exponential(multiplier=self._initial_s, max=self._max_s)(state))

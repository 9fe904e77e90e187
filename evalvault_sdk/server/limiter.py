"""
Limit how often somebody may ask.

In:   a name (a token's, or an address) for each request.
Out:  nothing, or the `ApiError` 429 that says when to come again.
Used on the event loop only. Bounded: names that have not been heard of for long are forgotten.
"""

from __future__ import annotations

import math
import time
from collections import OrderedDict
from collections.abc import Callable

from evalvault_sdk.server.answers import come_again

#: Seconds' worth of requests that may come at once after a pause.
_BURST_S = 10.0
#: Names that are remembered; a name that is forgotten begins anew.
_MAX_NAMES = 10_000


class RateLimiter:
    """A token bucket for each name: filled at a steady rate, emptied by requests."""

    def __init__(self, requests_per_s: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = requests_per_s
        self._size = max(requests_per_s * _BURST_S, 1.0)
        self._clock = clock
        #: By name, what was left in its bucket, and when; the one heard of last at the end.
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    def check(self, name: str) -> None:
        """Let one request of `name` pass. Raises `ApiError` 429."""
        now = self._clock()
        left, when = self._buckets.pop(name, (self._size, now))
        left = min(left + (now - when) * self._rate, self._size)
        allowed = left >= 1
        self._buckets[name] = (left - 1 if allowed else left, now)
        if len(self._buckets) > _MAX_NAMES:
            self._buckets.popitem(last=False)
        if not allowed:
            raise come_again(
                "Too many requests",
                f"{self._rate:g} a second are allowed; try again later",
                status=429,
                after_s=max(1, math.ceil((1 - left) / self._rate)),
                reason="rate_limit",
            )

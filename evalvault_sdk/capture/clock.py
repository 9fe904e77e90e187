"""
What time is it?

Out:  Unix time in nanoseconds, and nanoseconds of a clock that no one sets.
Looked up in `clock` at every use, so that a test can put a clock of its own in place (`testing.FakeClock`).
"""

import time
from collections.abc import Callable


class Clock:
    """The two clocks that stages are timed by."""

    __slots__ = ("perf_counter_ns", "time_ns")

    def __init__(self) -> None:
        self.time_ns: Callable[[], int] = time.time_ns
        self.perf_counter_ns: Callable[[], int] = time.perf_counter_ns


clock = Clock()

"""
What time is it?

Out:  Unix time in nanoseconds, and nanoseconds of a clock that no one sets.
Looked up in this module at every use, so that a test can put a clock of its own in place (`testing.FakeClock`).
"""

from time import perf_counter_ns, time_ns

__all__ = ["perf_counter_ns", "time_ns"]

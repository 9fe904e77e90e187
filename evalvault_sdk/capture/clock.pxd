# What `clock.py` is when it is compiled.

cdef class Clock:
    cdef public object time_ns, perf_counter_ns

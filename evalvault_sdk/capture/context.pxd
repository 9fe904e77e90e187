# What `context.py` is when it is compiled. An attribute that is never set is None there.

cdef class Trace:
    cdef public object given_id, opened, metadata, tracestate, held
    cdef public bint ended, failed
    cdef public double longest_ms


cdef class Scope:
    cdef public object _made_of, _stage_id, _span_id, _recorder
    cdef public Trace _trace
    cdef public Scope _outer, _before
    cdef public bint _open

# What `context.py` is when it is compiled. An attribute that is never set is None there.

cimport cython


cdef class Trace:
    cdef public object given_id, opened, metadata, tracestate, held
    cdef public bint ended, failed
    cdef public double longest_ms


# A long chain of them is freed one by one, and not one inside the other.
@cython.trashcan(True)
cdef class Scope:
    cdef public object _made_of, _stage_id, _span_id, _recorder
    cdef public Trace _trace
    cdef public Scope _outer, _before
    cdef public bint _open

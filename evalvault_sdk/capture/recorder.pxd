# What `recorder.py` is when it is compiled.

from evalvault_sdk.capture.context cimport Trace


cdef class Recorder:
    cdef public object _log, _own, _sources, _watches, setup
    cdef object __weakref__

    cpdef bint not_taken(self, event) except -1
    cpdef end_trace(self, Trace trace, double duration_ms)
    cpdef fail_trace(self, Trace trace)

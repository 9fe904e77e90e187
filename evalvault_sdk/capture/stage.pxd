# What `stage.py` is when it is compiled.

cimport cython

from evalvault_sdk.capture.clock cimport Clock
from evalvault_sdk.capture.context cimport Scope, Trace
from evalvault_sdk.capture.recorder cimport Recorder

cdef Clock clock


@cython.trashcan(True)
cdef class StageContext(Scope):
    cdef public object stage_type, stage_name, status, attempt, input_ref, output_ref
    cdef public object _attributes, _metadata, _call, _given, _given_type, _made_from
    cdef public object _parent, _parent_stage_id, _started_perf_ns
    cdef public bint _is_own, _is_placed, _opened_trace

    cpdef _take(self, given)
    @cython.locals(made_of=tuple)
    cpdef _start(self, Scope outer)
    @cython.locals(recorder=Recorder)
    cpdef _end(self, error, ended_perf_ns)
    @cython.locals(trace=Trace, content=bytes)
    cpdef bint _draft(self, encoder, put, elapsed_ns) except -1
    cpdef _rest(self)

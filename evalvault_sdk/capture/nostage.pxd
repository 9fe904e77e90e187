# What `nostage.py` is when it is compiled.

from evalvault_sdk.capture.stage cimport StageContext


cdef class _NoStage(StageContext):
    pass


cdef class _Dormant(_NoStage):
    cdef public object _make

# What `stages.py` is when it is compiled.

from evalvault_sdk.capture.recorder cimport Recorder


cdef class Stages:
    cdef public Recorder _recorder
    cdef object __weakref__
    cdef dict __dict__

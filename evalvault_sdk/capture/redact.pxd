# What `redact.py` is when it is compiled.

cimport cython


cdef class Redactor:
    cdef public bint _secrets, active, personal
    cdef public object _kinds, _passes, _number
    cdef public dict verdicts
    cdef public set innocent

    cpdef bint may_hold_secret(self, bytes encoded, Py_ssize_t start=*) except -1

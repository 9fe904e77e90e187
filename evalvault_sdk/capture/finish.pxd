# What `finish.py` is when it is compiled.

cimport cython

cdef unsigned long long _VARIANT


cdef class Finisher:
    cdef public dict _milliseconds, _places
    cdef public object _run, _run_id, _second

    @cython.locals(
        random_bits=cython.ulonglong, span=cython.ulonglong, tail=str, span_id=str,
        begin=cython.ulonglong, end=cython.ulonglong, took=cython.ulonglong,
        begin_us=cython.ulonglong, end_us=cython.ulonglong,
    )
    cpdef bytes event_of(self, tuple draft)

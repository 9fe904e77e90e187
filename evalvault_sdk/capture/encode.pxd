# What `encode.py` is when it is compiled.

cimport cython


cdef class Encoder:
    cdef public object _finisher, _limits, _redactor, _content, _mask
    cdef public bint _look_at_all
    cdef public dict _begins
    cdef public Py_ssize_t _max_items, _max_bytes, _max_depth, _max_event, _max_small, _max_text, _value_bytes

    @cython.locals(begin=bytes, end=bytes, encoded=bytes)
    cpdef bytes content(self, stage_type, status, attributes, rest=*)
    @cython.locals(values=dict, innocent=set, max_text=Py_ssize_t, max_items=Py_ssize_t)
    cpdef bint _are_small(self, values) except -1
    cpdef bint _is_small(self, value, kind) except -1
    @cython.locals(size=Py_ssize_t)
    cpdef Py_ssize_t _size(self, value, kind, Py_ssize_t depth, Py_ssize_t room) except -1


cdef bint _are_names(stage_type, status) except -1
@cython.locals(values=list)
cdef bint _are_texts(values, Py_ssize_t room) except -1
@cython.locals(values=list)
cdef bint _are_floats(values) except -1

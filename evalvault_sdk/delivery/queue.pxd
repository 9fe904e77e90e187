# What `queue.py` is when it is compiled.

cimport cython

from evalvault_sdk.delivery.account cimport Account


cdef class EventQueue:
    cdef public Account account
    cdef public bint closed, _is_careful
    cdef public Py_ssize_t _max_events, _max_bytes, _wake_at_events, _wake_at_bytes
    cdef public object on_first_put, is_worker, wakeup
    cdef public object _ledger, _limits, _lock, _overflow, _journal, _finish
    cdef object __weakref__

    @cython.locals(account=Account, size=Py_ssize_t)
    cpdef bint put(self, event) except -1

# What `account.py` is when it is compiled.

cdef class Account:
    cdef public object _ledger, waiting
    cdef public dict dropped, notes, _open
    cdef public Py_ssize_t waiting_bytes, lent, lent_bytes, taken, retracted, sealed, refused
    cdef public Py_ssize_t delivered, spooled, in_flight, rejected
    cdef public Py_ssize_t _mark, _returns
    cdef object __weakref__

# What `ids.py` is when it is compiled.

cimport cython


@cython.locals(milliseconds=cython.ulonglong, microseconds=cython.ulonglong, tail=cython.ulonglong)
cpdef str digits_of(time_ns, random_bits)
cpdef str stage_id_of(str digits)

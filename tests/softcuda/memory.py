"""Device memory is host memory: how the stand-ins for CUDA's libraries reach it, and when."""

import ctypes
import math

import _softcuda
import numpy as np


def view(address, shape, dtype):
    """The memory at an address as a NumPy array of that shape (or number of elements)."""
    dtype = np.dtype(dtype)
    shape = (shape,) if isinstance(shape, int) else shape
    buffer = (ctypes.c_char * (math.prod(shape) * dtype.itemsize)).from_address(address)
    return np.frombuffer(buffer, dtype=dtype).reshape(shape)


def current_stream():
    """The handle of CuPy's current stream."""
    import cupy  # not at the top: the stand-ins are in place before cupy is imported

    return cupy.cuda.get_current_stream().ptr


def call(name, function):
    """Run a library's work on the current stream, after what is there, counted as one launch."""
    _softcuda.call(current_stream(), name, function)

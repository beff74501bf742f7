"""Memory that host and device both see."""

from __future__ import annotations

from typing import Any

import cupy as cp
import numpy as np

OUT_OF_MEMORY = 2  # cudaErrorMemoryAllocation, a name that CuPy has not


def page_locked(nbytes: int) -> Any:
    """CuPy's page-locked memory; raises MemoryError where there is none, as for the device's."""
    try:
        return cp.cuda.alloc_pinned_memory(nbytes)
    except cp.cuda.runtime.CUDARuntimeError as error:
        if error.status != OUT_OF_MEMORY:
            raise
        raise MemoryError(f"{nbytes} bytes of page-locked memory: {error}") from None


class Pinned:
    """Page-locked memory of the host, as an array of both: kernels read it where it is.

    Raises MemoryError as page_locked does.
    """

    def __init__(self, shape: tuple[int, ...], dtype: Any):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = page_locked(size)
        self.host = np.frombuffer(memory, np.uint8, size).view(dtype).reshape(shape)
        owned = cp.cuda.UnownedMemory(memory.ptr, size, memory, cp.cuda.Device().id)
        self.device = cp.ndarray(shape, dtype, cp.cuda.MemoryPointer(owned, 0))

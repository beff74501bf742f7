"""Memory that host and device both see."""

from __future__ import annotations

from typing import Any

import cupy as cp
import numpy as np


class Pinned:
    """Page-locked memory of the host, as an array of both: kernels read it where it is."""

    def __init__(self, shape: tuple[int, ...], dtype: Any):
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        memory = cp.cuda.alloc_pinned_memory(size)
        self.host = np.frombuffer(memory, np.uint8, size).view(dtype).reshape(shape)
        owned = cp.cuda.UnownedMemory(memory.ptr, size, memory, cp.cuda.Device().id)
        self.device = cp.ndarray(shape, dtype, cp.cuda.MemoryPointer(owned, 0))

"""Tensors that are produced while they are written, so that no model has to fit in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO, NamedTuple

import numpy as np


class Lazy(NamedTuple):
    """A tensor to be written that exists only chunk by chunk.

    chunks() begins anew at each call and yields arrays of `dtype`, of any shapes, whose numbers
    one after the other are the tensor's in C order. Writers hold one chunk at a time.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    chunks: Callable[[], Iterator[np.ndarray]]

    @property
    def ndim(self) -> int:
        """The number of dimensions, as an array's."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of numbers, as an array's."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of the whole tensor, as an array's."""
        return self.size * self.dtype.itemsize

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The whole tensor, for what cannot be done chunk by chunk."""
        whole = np.empty(self.size, self.dtype)
        start = 0
        for chunk in self.chunks():
            whole[start : start + chunk.size] = chunk.reshape(-1)
            start += chunk.size
        return whole.reshape(self.shape).astype(dtype or self.dtype, copy=False)


def write_tensor(file: BinaryIO, name: str, tensor: np.ndarray | Lazy) -> None:
    """Write a tensor's bytes in C order.

    Raises ValueError if chunks have another dtype or, in sum, another size than was promised:
    headers are written first, so a file of them would be wrong.
    """
    chunks = tensor.chunks() if isinstance(tensor, Lazy) else iter((tensor,))
    written = 0
    for chunk in chunks:
        if chunk.dtype != tensor.dtype:
            raise ValueError(f"tensor {name!r}: expected {tensor.dtype}, found {chunk.dtype}")
        written += chunk.nbytes
        # By way of bytes: bfloat16 arrays have no buffer of their own.
        file.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
    if written != tensor.nbytes:
        raise ValueError(f"tensor {name!r}: expected {tensor.nbytes} bytes, found {written}")

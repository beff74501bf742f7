"""Tensors that are produced while they are written, so that no model has to fit in memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from llama3np.kernels import Blocks

# progress(done_bytes, total_bytes, tensor_name)
Progress = Callable[[int, int, str], None]

CHUNK = 1 << 20  # numbers of an array that are written at a time


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


class Rows:
    """A matrix whose rows are made when they are asked for: w[start:stop] is an array.

    make(start, stop) gives those rows, of `dtype`. Nothing is kept, so asking twice is making
    twice.
    """

    ndim = 2

    def __init__(
        self, shape: tuple[int, ...], dtype: np.dtype, make: Callable[[int, int], np.ndarray]
    ):
        self.shape, self.dtype, self._make = shape, dtype, make
        self.size = math.prod(shape)
        self.nbytes = self.size * dtype.itemsize

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows of the matrix, by a slice without a step."""
        start, stop, _ = rows.indices(self.shape[0])
        return self._make(start, max(start, stop))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The whole matrix."""
        return self[:].astype(dtype or self.dtype, copy=False)


def decoded(w: Any) -> Any:
    """A weight as writers of plain numbers take it: blocks as Rows of float32."""
    if isinstance(w, Blocks):
        return Rows(w.shape, w.dtype, lambda start, stop: w[start:stop])
    return w


def chunks_of(tensor: Any) -> Iterator[np.ndarray]:
    """A tensor's numbers in C order, a few rows of a matrix at a time.

    tensor: an array, a Lazy, or what gives rows as arrays: Rows, kernels.Joined.
    """
    if isinstance(tensor, Lazy):
        return tensor.chunks()
    if tensor.ndim != 2:
        return iter((np.asarray(tensor),))
    step = max(1, CHUNK // max(1, tensor.shape[1]))
    return (tensor[start : start + step] for start in range(0, tensor.shape[0], step))


def told(files: Sequence[Mapping[str, Any]], progress: Progress | None) -> list[dict[str, Any]]:
    """The tensors of files to be written, each telling progress(done, total, name) of its bytes.

    done and total count all of the files. Without `progress` they are what they were.
    """
    total, done = sum(w.nbytes for tensors in files for w in tensors.values()), 0

    def telling(name: str, tensor: Any, progress: Progress) -> Iterator[np.ndarray]:
        nonlocal done
        for chunk in chunks_of(tensor):
            yield chunk
            done += chunk.nbytes
            progress(done, total, name)

    def wrapped(name: str, tensor: Any) -> Any:
        if progress is None:
            return tensor
        return Lazy(tensor.shape, tensor.dtype, lambda: telling(name, tensor, progress))

    return [{name: wrapped(name, w) for name, w in tensors.items()} for tensors in files]


def write_tensor(file: BinaryIO, name: str, tensor: Any) -> None:
    """Write the bytes of a tensor, of any kind that chunks_of takes, in C order.

    Raises ValueError if chunks have another dtype or, in sum, another size than was promised:
    headers are written first, so a file of them would be wrong.
    """
    written = 0
    for chunk in chunks_of(tensor):
        if chunk.dtype != tensor.dtype:
            raise ValueError(f"tensor {name!r}: expected {tensor.dtype}, found {chunk.dtype}")
        written += chunk.nbytes
        # By way of bytes: bfloat16 arrays have no buffer of their own.
        file.write(np.ascontiguousarray(chunk).reshape(-1).view(np.uint8).data)
    if written != tensor.nbytes:
        raise ValueError(f"tensor {name!r}: expected {tensor.nbytes} bytes, found {written}")

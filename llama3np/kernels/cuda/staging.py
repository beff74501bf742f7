"""From a mapped file to the device, while the next part of the file is read.

A copy from ordinary memory holds the host up, and goes at half the speed or less: the driver first
copies it into memory that cannot be paged out. Here that memory is ours: two buffers, one filled
from the file while the device takes the other. So a model of any size passes through 128 MiB.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import cupy
import numpy as np

from llama3np.kernels.cuda.pinned import page_locked
from llama3np.kernels.joined import Joined
from llama3np.load.lazy import Lazy

BUFFER = 64 << 20  # bytes of each of the two
ROWS = 1 << 22  # bytes of a matrix in parts that are gathered at a time, about


class Staging:
    """Puts host arrays on the current device, in order; a context that ends when all are there.

    put(source) returns the device array at once. Its numbers are there when the block has ended:
    before that no other stream may read them. The two buffers are freed with the context.
    """

    def __init__(self, nbytes: int = BUFFER):
        self._buffers = [_Buffer(nbytes) for _ in range(2)]
        self._stream = cupy.cuda.Stream(non_blocking=True)
        self._next = 0

    def __enter__(self) -> Staging:
        return self

    def __exit__(self, *_: object) -> None:
        self._stream.synchronize()

    def put(self, source: Any, tell: Any = None) -> Any:
        """The array on the device: same shape, dtype and bits.

        source: an array, Joined or load.lazy.Lazy. tell(nbytes) is called for every part that is
        under way, with its bytes.
        """
        array = cupy.empty(source.shape, source.dtype)
        # The pool may hand out what kernels in the current stream are still using for another.
        self._stream.wait_event(cupy.cuda.get_current_stream().record())
        at = array.data.ptr
        for piece_X in pieces(source):
            for part_X in self._cut(piece_X):
                self._send(part_X, at)
                at += part_X.nbytes
                if tell is not None:
                    tell(part_X.nbytes)
        if at - array.data.ptr != array.nbytes:
            raise ValueError(f"expected {array.nbytes} bytes, found {at - array.data.ptr}")
        return array

    def _cut(self, piece_X: np.ndarray) -> Iterator[np.ndarray]:
        """A flat array in parts of a buffer at most."""
        bytes_X, size = piece_X.view(np.uint8), self._buffers[0].bytes.nbytes
        for start in range(0, len(bytes_X), size):
            yield bytes_X[start : start + size]

    def _send(self, part_X: np.ndarray, at: int) -> None:
        """Copy bytes into the next buffer, when its last ones have left, and from there on."""
        buffer, self._next = self._buffers[self._next], 1 - self._next
        buffer.sent.synchronize()
        buffer.bytes[: len(part_X)] = part_X  # of a mapped file, this is what reads it
        cupy.cuda.runtime.memcpyAsync(
            at,
            buffer.memory.ptr,
            len(part_X),
            cupy.cuda.runtime.memcpyHostToDevice,
            self._stream.ptr,
        )
        buffer.sent.record(self._stream)


class _Buffer:
    """Page-locked memory, and when the device has taken what was last in it."""

    def __init__(self, nbytes: int):
        self.memory = page_locked(nbytes)
        self.bytes = np.frombuffer(self.memory, np.uint8, nbytes)
        self.sent = cupy.cuda.Event(disable_timing=True)


def pieces(source: Any) -> Iterator[np.ndarray]:
    """The numbers of a source in C order, as flat arrays: a mapped array in one piece, uncopied."""
    for chunk in _chunks(source):
        yield np.ascontiguousarray(chunk).reshape(-1)


def _chunks(source: Any) -> Iterator[np.ndarray]:
    if isinstance(source, Joined):
        rows = max(1, ROWS // (source.shape[1] * source.dtype.itemsize))
        for start in range(0, source.shape[0], rows):
            yield source[start : start + rows]
    elif isinstance(source, Lazy):
        yield from source.chunks()
    else:
        yield source

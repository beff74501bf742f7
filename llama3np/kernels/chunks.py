"""A stored weight, and the products with it: it is read, and widened, a few rows at a time."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np

# Weights widened at a time. Measured: a scratch of 2 to 4 MiB of float32 beats one that fits the
# L2 cache, because few large products cost less than many small ones.
CHUNK = 2**19


class Stored:
    """What stored matrices of any format have in common, beside rows by `w[ids]`."""

    ndim = 2
    __array_ufunc__ = None  # so that NumPy leaves y @ w to __rmatmul__
    shape: tuple[int, int]
    dtype: np.dtype

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """The bytes of what is stored."""
        return self.size * self.dtype.itemsize

    @property
    def T(self) -> Transposed:
        """The right operand of a product."""
        return Transposed(self)

    def __rmatmul__(self, y_MO: np.ndarray) -> np.ndarray:
        """Multiply by the weight itself, y_MO @ w, chunk by chunk: the backward pass does."""
        x_MI = np.zeros((len(y_MO), self.shape[1]), y_MO.dtype)
        for start, wide in self.chunks(y_MO.dtype):
            x_MI += y_MO[:, start : start + len(wide)] @ wide
        return x_MI

    def chunks(self, dtype: np.dtype) -> Iterator[tuple[int, np.ndarray]]:
        """The first row of each chunk, and the chunk widened to `dtype`, good until the next."""
        n_out, n_in = self.shape
        step = max(1, CHUNK // n_in)
        scratch = np.empty((min(step, n_out), n_in), dtype)
        for start in range(0, n_out, step):
            wide = scratch[: min(step, n_out - start)]
            self.widen(start, start + len(wide), wide)
            yield start, wide

    def widen(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill `out`, contiguous, with rows start to stop."""
        raise NotImplementedError

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The whole matrix, for a writer that holds one tensor at a time."""
        if copy is False:
            raise ValueError(f"a {type(self).__name__} is not an array: to make one is to copy it")
        whole = np.empty(self.shape, dtype or self.dtype)
        self.widen(0, self.shape[0], whole)
        return whole


class Transposed:
    """The right operand of `x_MD @ w.T`, for any stored format."""

    __array_ufunc__ = None  # so that NumPy leaves x @ w.T to __rmatmul__

    def __init__(self, w: Stored):
        self.w = w

    def __rmatmul__(self, x_MD: np.ndarray) -> np.ndarray:
        """Multiply chunk by chunk: at no time are more than CHUNK weights held widened.

        Chunks have the same rows, and the same layout, however w holds them: so equal weights
        give equal bits.
        """
        y_MO = np.empty((len(x_MD), self.w.shape[0]), x_MD.dtype)
        for start, wide in self.w.chunks(x_MD.dtype):
            y_MO[:, start : start + len(wide)] = x_MD @ wide.T
        return y_MO

"""16-bit weights, multiplied as they are stored."""

from __future__ import annotations

from typing import Any

import numpy as np

# Weights widened at a time. Measured: a scratch of 2 to 4 MiB of float32 beats one that fits the
# L2 cache, because few large products cost less than many small ones.
CHUNK = 2**19


class Half:
    """A float16 or bfloat16 matrix that stays as stored, in a mapped file for example.

    It multiplies as `x_MD @ w.T` and looks rows up as `w[ids]`; both widen the weights they touch
    to the type of the product, which is exact. The plain expression it must equal is
    `x_MD @ w.stored.astype(x_MD.dtype).T`.
    """

    def __init__(self, stored: np.ndarray):
        self.stored = stored
        self.shape, self.dtype, self.nbytes = stored.shape, stored.dtype, stored.nbytes

    @property
    def T(self) -> _Transposed:
        """The right operand of a product."""
        return _Transposed(self)

    def __getitem__(self, ids: Any) -> np.ndarray:
        """Rows of the matrix, in float32."""
        return self.stored[ids].astype(np.float32)


class _Transposed:
    __array_ufunc__ = None  # so that NumPy leaves x @ w.T to __rmatmul__

    def __init__(self, w: Half):
        self.w = w

    def __rmatmul__(self, x_MD: np.ndarray) -> np.ndarray:
        """Multiply chunk by chunk: at no time is more than CHUNK weights held widened."""
        n_out, n_in = self.w.shape
        step = max(1, CHUNK // n_in)
        scratch = np.empty((min(step, n_out), n_in), dtype=x_MD.dtype)
        y_MO = np.empty((len(x_MD), n_out), dtype=x_MD.dtype)
        for start in range(0, n_out, step):
            rows = self.w.stored[start : start + step]
            wide = scratch[: len(rows)]
            np.copyto(wide, rows, casting="unsafe")  # widening only; ml_dtypes types are "unsafe"
            y_MO[:, start : start + step] = x_MD @ wide.T
        return y_MO

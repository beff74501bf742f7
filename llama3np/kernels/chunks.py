"""The product with a weight that is read, and widened, a few rows at a time."""

from __future__ import annotations

from typing import Any

import numpy as np

# Weights widened at a time. Measured: a scratch of 2 to 4 MiB of float32 beats one that fits the
# L2 cache, because few large products cost less than many small ones.
CHUNK = 2**19


class Transposed:
    """The right operand of `x_MD @ w.T`, for any stored format: w.widen gives its rows."""

    __array_ufunc__ = None  # so that NumPy leaves x @ w.T to __rmatmul__

    def __init__(self, w: Any):
        self.w = w

    def __rmatmul__(self, x_MD: np.ndarray) -> np.ndarray:
        """Multiply chunk by chunk: at no time are more than CHUNK weights held widened.

        Chunks have the same rows, and the same layout, however w holds them: so equal weights
        give equal bits.
        """
        n_out, n_in = self.w.shape
        step = max(1, CHUNK // n_in)
        scratch = np.empty((min(step, n_out), n_in), dtype=x_MD.dtype)
        y_MO = np.empty((len(x_MD), n_out), dtype=x_MD.dtype)
        for start in range(0, n_out, step):
            stop = min(start + step, n_out)
            wide = scratch[: stop - start]
            self.w.widen(start, stop, wide)
            y_MO[:, start:stop] = x_MD @ wide.T
        return y_MO

"""16-bit weights, multiplied as they are stored."""

from __future__ import annotations

from typing import Any

import numpy as np

from llama3np.kernels.chunks import Stored
from llama3np.kernels.widening import widen


class Half(Stored):
    """A float16 or bfloat16 matrix that stays as stored, in a mapped file for example.

    It multiplies as `x_MD @ w.T` and looks rows up as `w[ids]`; both widen the weights they touch
    to the type of the product, which is exact. The plain expression it must equal is
    `x_MD @ w.stored.astype(x_MD.dtype).T`. `stored` is an array or a Joined.
    """

    def __init__(self, stored: Any):
        self.stored, self.shape, self.dtype = stored, stored.shape, stored.dtype

    def widen(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill `out`, contiguous, with rows start to stop."""
        if isinstance(self.stored, np.ndarray):
            widen(self.stored[start:stop], out)
        else:
            self.stored.widen(start, stop, out)

    def __getitem__(self, ids: Any) -> np.ndarray:
        """Rows of the matrix, in float32."""
        return self.stored[ids].astype(np.float32)

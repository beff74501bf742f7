"""A frozen matrix with a product of two thin ones added to it, that is never put together."""

from __future__ import annotations

from typing import Any

import numpy as np

from llama3np.kernels.chunks import Stored, Transposed
from llama3np.kernels.product import widen_rows


class Adapted(Stored):
    """W + scale B A: W of shape (O, I) in any format that is stored here, A (R, I), B (O, R).

    Hu et al. 2021. x_MI @ w.T and y_MO @ w add what B A does to what W does: R (O + I) more
    products a row, and nothing of W's size is made. Rows by `w[start:stop]`, np.asarray and
    `widen` are those of the sum, in the dtype of A and B, float32 or float64.
    W, A and B may be device arrays, for the two products alone.
    """

    def __init__(self, w: Any, a_RI: Any, b_OR: Any, scale: float):
        self.w, self.a_RI, self.b_OR, self.scale = w, a_RI, b_OR, scale
        self.shape, self.dtype = tuple(w.shape), a_RI.dtype

    @property
    def T(self) -> _Transposed:
        """The right operand of a product."""
        return _Transposed(self)

    def __rmatmul__(self, y_MO: Any) -> Any:
        """y_MO @ w: y W + scale (y B) A."""
        x_MI = y_MO @ self.w
        x_MI += (y_MO @ self.b_OR * self.scale) @ self.a_RI
        return x_MI

    def __getitem__(self, rows: slice) -> np.ndarray:
        """Rows of the sum, by a slice without a step."""
        start, stop, _ = rows.indices(self.shape[0])
        out = np.empty((max(0, stop - start), self.shape[1]), self.dtype)
        self.widen(start, stop, out)
        return out

    def widen(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill `out`, contiguous, with rows start to stop of the sum.

        It is computed in float64 and rounded once, so that rows are the same in whatever chunks
        they are asked for: the order of BLAS's sums depends on a chunk's size.
        """
        widen_rows(self.w, start, stop, out)
        wide_OR = self.b_OR[start:stop].astype(np.float64) * self.scale
        out[...] = out + wide_OR @ self.a_RI.astype(np.float64)


class _Transposed(Transposed):
    def __rmatmul__(self, x_MI: Any) -> Any:
        """x_MI @ w.T: x W^T + scale (x A^T) B^T."""
        w: Any = self.w
        y_MO = x_MI @ w.w.T
        y_MO += (x_MI @ w.a_RI.T * w.scale) @ w.b_OR.T
        return y_MO

"""A matrix in GGUF blocks, that is never decoded as a whole."""

from __future__ import annotations

from typing import Any

import numpy as np

from llama3np.kernels.chunks import Stored
from llama3np.kernels.ggml import FORMATS, decode, decode_rows


class Blocks(Stored):
    """A matrix that stays in ggml's blocks, in a mapped file for example.

    It multiplies as `x_MD @ w.T` and looks rows up as `w[ids]`, by the float32 that its blocks
    mean, decoded row by row. The plain expression it must equal is
    `x_MD @ ggml.decode(w.type, w.stored, w.shape).T`. `stored` has the rows' bytes, (rows, bytes
    of a row) uint8; rows may lie anywhere. Raises ValueError for parts of blocks.
    """

    dtype = np.dtype(np.float32)  # of the weights, not of what is stored

    def __init__(self, type_name: str, stored: np.ndarray):
        form = FORMATS[type_name]
        n_out, row_bytes = stored.shape
        if row_bytes % form.nbytes:
            raise ValueError(f"{type_name}: expected rows of whole blocks, found {row_bytes} bytes")
        self.type, self.stored = type_name, stored
        self.shape = (n_out, row_bytes // form.nbytes * form.weights)

    @property
    def nbytes(self) -> int:
        """The bytes of the blocks."""
        return self.stored.nbytes

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Rows of the matrix, decoded: by a slice, or by ids in an array of any shape."""
        stored = self.stored[rows]
        return decode(self.type, stored, (*stored.shape[:-1], self.shape[1]))

    def widen(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill `out`, contiguous, with rows start to stop."""
        if out.dtype == self.dtype:
            decode_rows(self.type, self.stored[start:stop], out)
        else:
            out[...] = self[start:stop]

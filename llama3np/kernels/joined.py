"""A matrix in parts, as model-parallel checkpoints store it, that is never put together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llama3np.kernels.chunks import Stored
from llama3np.kernels.widening import widen


class Joined(Stored):
    """Matrices of one shape and dtype, read as np.concatenate(parts, axis) would be.

    Rows are gathered when they are asked for: `w[start:stop]`, `w[ids]`, and chunk by chunk in
    `x_MD @ w.T`, which has the same bits however many parts there are. np.asarray makes the whole.
    """

    def __init__(self, parts: Sequence[np.ndarray], axis: int):
        first = parts[0]
        if any(part.shape != first.shape or part.dtype != first.dtype for part in parts):
            raise ValueError("Joined: expected parts of one shape and dtype")
        self.parts, self.axis, self.dtype = tuple(parts), axis, first.dtype
        n_out, n_in = first.shape
        n = len(parts)
        self.shape = (n * n_out, n_in) if axis == 0 else (n_out, n * n_in)

    def __getitem__(self, rows: Any) -> np.ndarray:
        """Rows of the whole, by a slice without a step, or by ids >= 0 in an array of any shape."""
        if self.axis == 1:
            return np.concatenate([part[rows] for part in self.parts], axis=-1)
        if isinstance(rows, slice):
            return self._stretch(*rows.indices(self.shape[0])[:2])
        return self._rows_of(np.asarray(rows))

    def widen(self, start: int, stop: int, out: np.ndarray) -> None:
        """Fill `out`, contiguous, with rows start to stop."""
        height, width = self.parts[0].shape
        for i, part in enumerate(self.parts):
            if self.axis == 1:
                widen(part[start:stop], out[:, i * width : (i + 1) * width])
                continue
            first, last = max(start, i * height), min(stop, (i + 1) * height)
            if first < last:
                widen(
                    part[first - i * height : last - i * height], out[first - start : last - start]
                )

    def _stretch(self, start: int, stop: int) -> np.ndarray:
        """Rows start to stop of parts below each other; a view if one part has them all."""
        height = len(self.parts[0])
        pieces = [
            part[max(start - i * height, 0) : max(stop - i * height, 0)]
            for i, part in enumerate(self.parts)
        ]
        some = [piece for piece in pieces if len(piece)] or pieces[:1]
        return some[0] if len(some) == 1 else np.concatenate(some)

    def _rows_of(self, ids: np.ndarray) -> np.ndarray:
        if ids.size and not 0 <= ids.min() <= ids.max() < self.shape[0]:
            raise IndexError(f"expected rows 0 to {self.shape[0] - 1}")
        rows = np.empty((*ids.shape, self.shape[1]), self.dtype)
        owner, local = np.divmod(ids, len(self.parts[0]))
        for i, part in enumerate(self.parts):
            rows[owner == i] = part[local[owner == i]]
        return rows

"""Products of many float32 rows by weights of any stored format, in float32.

    y_MO = x_MK @ w_OK.T        its oracle: kernels/product.py

How x is laid out and who computes what is in panels.py. A small piece of a stripe of w at a time is
widened into a scratch in a core's own cache and meets up to 512 rows of x there, so reading and
decoding cost little, whatever the format, and nothing is ever as large as a widened weight. BLAS
would have to be given wide tiles, and lays out those and x once more for itself.

Each sum is one chain of K fused multiply-adds (where the processor has them), in the order of k:
|error| <= K * 2^-24 * sum |x w|, to first order in 2^-24 (Higham, Accuracy and Stability of
Numerical Algorithms, 3.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from llama3np.kernels.cpu import ir
from llama3np.kernels.cpu.compiler import jit
from llama3np.kernels.cpu.dots import widen_rows
from llama3np.kernels.cpu.ir import Builder, Value, f32, vector
from llama3np.kernels.cpu.layout import parts_of
from llama3np.kernels.cpu.panels import (
    PANEL,
    PIECE,
    ROWS,
    STRIPE,
    Operand,
    make_add_tile,
    multiply,
    pack,
    transpose,
)
from llama3np.kernels.cpu.shared import address
from llama3np.kernels.ggml import FORMATS, NAMES
from llama3np.threads import Pool

# Rows of x from which on this is faster than others, though a panel has 32; see gemv.py for one.
FEWEST = 2


def supported() -> bool:
    """Whether numba compiles for a processor with the registers for all sums of a tile."""
    return ir.host_has("avx512f")


def takes(w: Any) -> bool:
    """Whether `products` can read a weight: stored in whole rows, in one of ggml's formats."""
    return _rows_of(w) is not None


def _rows_of(w: Any) -> tuple[int, Sequence[np.ndarray]] | None:
    """(ggml's number of the format, the parts that lie below each other)."""
    found = parts_of(w)
    if found is None:
        return None
    code, parts, axis = found
    return (code, parts) if len(parts) == 1 or axis == 0 else None


def products(x_MK: np.ndarray, weights: Sequence[Any], pool: Pool) -> list[np.ndarray]:
    """The product of x with each weight, float32: x is laid out once, no thread waits between.

    A weight is a plain array, Half, Blocks or Joined. Raises ValueError for one that `takes` does
    not, or of another width than x.
    """
    x_MK = np.require(x_MK, np.float32, ["C", "W"])  # one type of array, compiled once
    y = [np.empty((len(x_MK), w.shape[0]), np.float32) for w in weights]
    operands = [_operand(*part, x_MK.shape[1]) for part in parts_of_all(weights, x_MK.shape[1], y)]
    multiply(pack(x_MK, x_MK.shape[1], _pack_panel, pool), operands, pool)
    return y


class Part(NamedTuple):
    """Rows of a weight in one piece, and the columns of y that are their own."""

    code: int
    stored: np.ndarray
    y_MO: np.ndarray


def parts_of_all(weights: Sequence[Any], K: int, y: Sequence[np.ndarray]) -> list[Part]:
    """Each weight in its pieces. Raises ValueError for one that `takes` does not, or not K wide."""
    return [part for each in zip(weights, y, strict=True) for part in _parts(*each, K)]


def _parts(w: Any, y_MO: np.ndarray, K: int) -> list[Part]:
    found = _rows_of(w)
    if found is None or w.shape[1] != K:
        expected = f"expected a weight of {K} columns, in whole rows"
        raise ValueError(f"{expected}, found {type(w).__name__} {w.dtype} of shape {w.shape}")
    code, parts = found
    ends = np.cumsum([0, *map(len, parts)])
    columns = [y_MO[:, start:end] for start, end in pairwise(ends)]
    return [Part(code, part, y) for part, y in zip(parts, columns, strict=True)]


def _operand(code: int, stored: np.ndarray, y_MO: np.ndarray, K: int) -> Operand:
    form, row_bytes = FORMATS[NAMES[code]], stored.strides[0]

    def fill(sums: np.ndarray, o: int, rows: int, x: int, panels: int) -> None:
        w = address(stored) + o * row_bytes
        _stripe(sums, code, form.weights, form.nbytes, w, row_bytes, rows, x, panels, K)

    return Operand(y_MO, fill)


# ---- compiled ---------------------------------------------------------------------------------


@jit
def _pack_panel(x_MK, m, block, p, panels):
    """Lay rows m, m + 1, ... out as panel p of this block."""
    M, K = x_MK.shape
    rows = min(M - m, PANEL)
    padded = np.zeros((PANEL, PIECE), np.float32)
    for start in range(0, K, PIECE):
        columns = min(K - start, PIECE)
        source, stride = x_MK[m:, start:].ctypes.data, K * 4
        if rows < PANEL:
            padded[:rows, :columns] = x_MK[m : m + rows, start : start + columns]
            source, stride = padded.ctypes.data, PIECE * 4
        to = block + (start * panels + p * columns) * PANEL * 4
        transpose(to, PANEL * 4, source, stride, PANEL, columns)


@jit
def _stripe(scratch, code, weights, nbytes, w, row_bytes, rows, x, panels, K):
    """Fill scratch with sums, for each row of w the rows of x side by side.

    The rows of w are at w, w + row_bytes, ..., in blocks of so many weights and bytes, of which a
    piece has whole ones; x is a block of Packed.
    """
    scratch[: (rows + ROWS - 1) // ROWS * ROWS * panels * PANEL] = 0
    wide = np.empty((STRIPE, PIECE), np.float32)
    for start in range(0, K, PIECE):
        columns = min(K - start, PIECE)
        source = w + start // weights * nbytes
        widen_rows(code, source, row_bytes, rows, columns, wide.ctypes.data)
        part = x + start * panels * PANEL * 4
        _add_piece(scratch.ctypes.data, wide.ctypes.data, rows, part, panels, columns)


@jit
def _add_piece(sums, w, rows, x, panels, columns):
    """Add the products of widened rows and a piece of all panels."""
    width, stride, step = panels * PANEL * 4, columns * 4, columns * PANEL * 4
    for p in range(panels):
        panel = x + p * step
        for o in range(0, rows, ROWS):
            at, ahead = sums + o * width + p * PANEL * 4, panel + step + o * step // STRIPE
            _add_tile(at, width, w + o * stride, stride, rows - o - 1, panel, columns, ahead)


# ---- in the compiler's language ---------------------------------------------------------------


def _add_products(b: Builder, sums: Value, x: Value, w: Value) -> Value:
    return ir.fma(b, b.bitcast(x, vector(f32)), b.bitcast(w, vector(f32)), sums)


_add_tile = make_add_tile(_add_products)

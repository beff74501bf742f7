"""Products of many float32 rows by weights of any stored format, in float32.

    y_MO = x_MK @ w_OK.T        its oracle: kernels/product.py

How x is laid out and who computes what is in panels.py. A few hundred numbers of a few rows of w
at a time are widened where they stay in a core's first cache, and multiplied there by up to 512
rows of x: reading and decoding them costs little beside that, whatever their format, and BLAS,
which would want to lay out w too, has less time for the products themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from llama3np.kernels.cpu import ir, panels
from llama3np.kernels.cpu.compiler import jit
from llama3np.kernels.cpu.dots import widen_rows
from llama3np.kernels.cpu.ir import Builder, Value, f32, vector
from llama3np.kernels.cpu.layout import parts_of
from llama3np.kernels.cpu.panels import PANEL, PIECE, ROWS, Operand, Packed, multiply, transpose
from llama3np.kernels.cpu.shared import address
from llama3np.kernels.ggml import FORMATS
from llama3np.threads import Pool

FEWEST = 16  # rows of x from which on this is faster than BLAS on widened tiles


def supported() -> bool:
    """Whether numba compiles for a processor with the 32 registers that the sums need."""
    return ir.host_has("avx512f")


def takes(w: Any) -> bool:
    """Whether a weight is stored in a way that is known here: in whole rows, of a ggml format."""
    found = parts_of(w)
    return found is not None and (len(found[1]) == 1 or found[2] == 0)


def products(x_MK: np.ndarray, weights: Sequence[Any], pool: Pool) -> list[np.ndarray]:
    """The product of x with each weight, float32: x is laid out once, no thread waits between.

    Weights: plain arrays, Half, Blocks or Joined, for which `takes` holds. Raises ValueError for
    another, and for one of another width than x.
    """
    packed = pack(x_MK, pool)
    y = [np.empty((packed.M, w.shape[0]), np.float32) for w in weights]
    operands = []
    for w, y_MO in zip(weights, y, strict=True):
        operands += _operands(packed, w, y_MO)
    multiply(packed, operands, pool)
    return y


def pack(x_MK: np.ndarray, pool: Pool) -> Packed:
    """Lay out x as float32."""
    x_MK = np.require(x_MK, np.float32, ["C", "W"])  # one type of array, compiled once
    return panels.pack(x_MK, x_MK.shape[1], _pack_panel, pool)


def _operands(packed: Packed, w: Any, y_MO: np.ndarray) -> list[Operand]:
    """A weight's parts, each with the columns of y that are its own."""
    if not takes(w) or w.shape[1] != packed.K:
        expected = f"expected a weight of {packed.K} columns, in whole rows"
        raise ValueError(f"{expected}, found {type(w).__name__} of shape {w.shape}")
    code, parts, _ = parts_of(w)
    operands, start = [], 0
    for part in parts:
        own_MO = y_MO[:, start : start + len(part)]
        operands.append(Operand(own_MO, partial(_fill, _Stored.of(code, part, packed.K))))
        start += len(part)
    return operands


class _Stored(NamedTuple):
    """Rows of a weight as compiled code takes them."""

    array: np.ndarray
    K: int
    code: int  # ggml's number of the format
    weights: int  # of a block of the format
    nbytes: int

    @classmethod
    def of(cls, code: int, array: np.ndarray, K: int) -> _Stored:
        form = _FORMATS[code]
        return cls(array, K, code, form.weights, form.nbytes)


_FORMATS = {form.number: form for form in FORMATS.values()}


def _fill(w: _Stored, sums: np.ndarray, o: int, rows: int, x: int, panels: int) -> None:
    """Operand.fill, by address."""
    row_bytes = w.array.strides[0]
    place = address(w.array) + o * row_bytes
    _stripe(sums, w.code, w.weights, w.nbytes, place, row_bytes, rows, x, panels, w.K)


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

    The rows of w are at w, w + row_bytes, ..., in blocks of so many weights and bytes; x is a block
    of Packed.
    """
    wide = np.empty((ROWS, PIECE), np.float32)
    width = panels * PANEL
    scratch[: (rows + ROWS - 1) // ROWS * ROWS * width] = 0
    for start in range(0, K, PIECE):
        columns = min(K - start, PIECE)
        part = x + start * width * 4
        for o in range(0, rows, ROWS):
            source = w + o * row_bytes + start // weights * nbytes
            some = min(rows - o, ROWS)
            widen_rows(code, source, row_bytes, some, columns, wide.ctypes.data)
            for p in range(panels):
                sums = scratch[o * width + p * PANEL :].ctypes.data
                panel = part + p * columns * PANEL * 4
                _add_tile(sums, width * 4, wide.ctypes.data, columns * 4, some - 1, panel, columns)


# ---- in the compiler's language ---------------------------------------------------------------


def _add_products(b: Builder, sums: Value, x: Value, w: Value) -> Value:
    return ir.fma(b, b.bitcast(x, vector(f32)), b.bitcast(w, vector(f32)), sums)


_add_tile = panels.make_add_tile(_add_products)

"""Products of many rows by bfloat16 weights, with the processor's own bfloat16 arithmetic.

    y_MO = round_bf16(x_MK) @ w_OK.T        profile "bf16-mm"; in plain NumPy: kernels/rounded.py

The instruction VDPBF16PS (AVX512_BF16) has 16 float32 sums, takes a pair of bfloat16 numbers for
each from either side, and adds both products: twice the operations of a float32 FMA in its time.
Intel SDM volume 2, VDPBF16PS: two FMAs for each sum, the odd element of the pair first, each
rounded to nearest even; subnormal inputs count as 0 and subnormal results become 0; the control
register MXCSR is neither read nor changed. A product of two bfloat16 numbers is exact in float32,
so only the K additions round: |error| <= K * 2^-24 * sum |x w|, to first order in 2^-24 (Higham,
Accuracy and Stability of Numerical Algorithms, 4.2), as for any order of summation.

How x is laid out and who computes what is in panels.py. A pair of weights is broadcast straight
from the file's bytes: w is never repacked.
"""

from __future__ import annotations

from collections.abc import Sequence

import llvmlite.ir
import ml_dtypes
import numpy as np
from numba.core import cgutils

from llama3np.kernels.cpu import ir
from llama3np.kernels.cpu.attend import BF16, store_row
from llama3np.kernels.cpu.compiler import jit
from llama3np.kernels.cpu.ir import Builder, V, Value, vector
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
from llama3np.threads import Pool


def supported() -> bool:
    """Whether numba compiles for a processor that has AVX512_BF16."""
    return ir.host_has("avx512bf16")


def products(x_MK: np.ndarray, weights: Sequence[np.ndarray], pool: Pool) -> list[np.ndarray]:
    """The product of x, rounded to nearest even, with each weight: float32, (M, O).

    A weight is a bfloat16 array whose rows are contiguous, anywhere in memory, aligned or not, any
    distance apart. Raises ValueError for another. x is laid out once, and no thread waits between
    weights.
    """
    x_MK = np.require(x_MK, np.float32, ["C", "W"])  # one type of array, compiled once
    operands = [_operand(x_MK, w_OK) for w_OK in weights]
    # In pairs (x[m, 2j], x[m, 2j + 1]); an odd last column makes pairs with zeros.
    packed = pack(x_MK, (x_MK.shape[1] + 1) // 2, _pack_panel, pool)
    multiply(packed, operands, pool)
    return [operand.y_MO for operand in operands]


def _operand(x_MK: np.ndarray, w_OK: np.ndarray) -> Operand:
    M, K = x_MK.shape
    if w_OK.dtype != ml_dtypes.bfloat16 or w_OK.ndim != 2 or w_OK.shape[1] != K:
        expected = f"expected a bfloat16 matrix of {K} columns"
        raise ValueError(f"{expected}, found {w_OK.dtype} of shape {w_OK.shape}")
    if w_OK.strides[1] != 2 and K > 1:
        raise ValueError(f"expected contiguous rows, found strides {w_OK.strides}")
    # An odd last column in pairs with zero: in w itself a last pair would go beyond the row.
    last_O = w_OK[:, K - K % 2 :].ravel().view(np.uint16).astype(np.uint32)
    stride = w_OK.strides[0]

    def fill(sums: np.ndarray, o: int, rows: int, x: int, panels: int) -> None:
        w, last = address(w_OK) + o * stride, address(last_O) + o * 4
        _stripe(sums, w, stride, last, rows, x, panels, K)

    return Operand(np.empty((M, len(w_OK)), np.float32), fill)


# ---- compiled ---------------------------------------------------------------------------------


@jit
def _pack_panel(x_MK, m, block, p, panels):
    """Lay rows m, m + 1, ..., rounded, out as panel p of this block."""
    M, K = x_MK.shape
    rounded = np.zeros((PANEL, 2 * PIECE), np.uint16)
    for start in range(0, K, 2 * PIECE):
        count = min(K - start, 2 * PIECE)
        for i in range(min(M - m, PANEL)):
            store_row(x_MK[m + i, start:].ctypes.data, rounded[i].ctypes.data, count, BF16)
        rounded[:, count:] = 0
        pairs = (count + 1) // 2
        to = block + (start // 2 * panels + p * pairs) * PANEL * 4
        transpose(to, PANEL * 4, rounded.ctypes.data, PIECE * 4, PANEL, pairs)


@jit
def _stripe(scratch, w, stride, last, rows, x, panels, K):
    """Fill scratch with sums, for each row of w the rows of x side by side.

    The rows of w are at w, w + stride, ...; their odd last elements at `last`, as words; x is a
    block of Packed.
    """
    scratch[: (rows + ROWS - 1) // ROWS * ROWS * panels * PANEL] = 0
    sums, columns = scratch.ctypes.data, (K + 1) // 2
    for start in range(0, columns, PIECE):
        pairs = min(columns - start, PIECE)
        part, step = x + start * panels * PANEL * 4, pairs * PANEL * 4
        whole = min(pairs, K // 2 - start)
        _add_block(sums, w + start * 4, stride, rows, part, step, panels, whole)
        if whole < pairs:
            _add_block(sums, last, 4, rows, part + whole * PANEL * 4, step, panels, 1)


@jit
def _add_block(sums, w, stride, rows, x, step, panels, pairs):
    """Add the products of these pairs of columns; the panels of x are `step` bytes apart."""
    width = panels * PANEL * 4
    for p in range(panels):
        panel = x + p * step
        for o in range(0, rows, ROWS):
            at, ahead = sums + o * width + p * PANEL * 4, panel + step + o * step // STRIPE
            _add_tile(at, width, w + o * stride, stride, rows - o - 1, panel, pairs, ahead)


# ---- in the compiler's language ---------------------------------------------------------------


class _BFloat(llvmlite.ir.Type):
    """LLVM's bfloat, which llvmlite has no name for."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _BFloat)

    def __hash__(self) -> int:
        return hash(_BFloat)


_PAIRS = vector(_BFloat(), 2 * V)


def _add_pairs(b: Builder, sums: Value, x: Value, w: Value) -> Value:
    """VDPBF16PS."""
    kind = llvmlite.ir.FunctionType(sums.type, [sums.type, _PAIRS, _PAIRS])
    name = "llvm.x86.avx512bf16.dpbf16ps.512"
    function = cgutils.get_or_insert_function(b.module, kind, name)
    return b.call(function, [sums, b.bitcast(x, _PAIRS), b.bitcast(w, _PAIRS)])


_add_tile = make_add_tile(_add_pairs)

"""Products of many rows by bfloat16 weights, with the processor's own bfloat16 arithmetic.

    y_MO = round_bf16(x_MK) @ w_OK.T        profile "bf16-mm"; in plain NumPy: kernels/rounded.py

The instruction VDPBF16PS (AVX512_BF16) has 16 float32 sums, takes a pair of bfloat16 numbers for
each from either side, and adds both products: twice the operations of a float32 FMA in its time.
Intel SDM volume 2, VDPBF16PS: two FMAs for each sum, the odd element of the pair first, each
rounded to nearest even; subnormal inputs count as 0 and subnormal results become 0; the control
register MXCSR is neither read nor changed. A product of two bfloat16 numbers is exact in float32,
so only the K additions round: |error| <= K * 2^-24 * sum |x w|, to first order in 2^-24 (Higham,
Accuracy and Stability of Numerical Algorithms, 4.2), as for any order of summation.

Lanes are rows of x, so that a pair of weights is broadcast to all lanes straight from the file's
bytes: w is never repacked, and no sum goes across lanes. x is rounded and laid out once for all
the weights that it meets. Every sum runs over k in order, so a row's result has the same bits
whatever the number of threads, and alone or among others.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import llvmlite.ir
import ml_dtypes
import numba.extending
import numpy as np
from numba import types
from numba.core import cgutils

from llama3np.kernels.cpu import ir
from llama3np.kernels.cpu.compiler import jit
from llama3np.kernels.cpu.ir import Builder, V, Value, const, f32, i32, vector
from llama3np.threads import Pool

ADDRESS = types.intp
intrinsic: Any = numba.extending.intrinsic  # mypy would expect `typingctx` in each call

PANEL = 2 * V  # rows of x that the innermost loop multiplies ...
ROWS = 8  # ... by so many of w: 16 vectors of sums, where a latency of 6 at 2 a cycle needs 12
PAIRS = 256  # pairs of columns that are multiplied before the next: 1 KiB of each row
BLOCK = 16  # panels; BLOCK * PANEL * PAIRS pairs of x are 512 KiB and stay in an L2 cache
STRIPE = 64  # rows of w in one task


def supported() -> bool:
    """Whether numba compiles for a processor that has AVX512_BF16."""
    return ir.host_has("avx512bf16")


# ---- x, laid out ------------------------------------------------------------------------------


class Packed(NamedTuple):
    """Rows of x rounded to bfloat16, in pairs (x[m, 2j], x[m, 2j + 1]), in the kernel's order.

    BLOCK panels of 32 rows are together; in these PAIRS pairs of columns; in these each panel; in
    it each j; for it each m. Rows that fill up the last panel are zero, and so is what an odd last
    column makes pairs with.
    """

    words: np.ndarray
    M: int
    K: int

    def block(self, panel: int) -> tuple[int, int]:
        """Where the BLOCK of panels that begins with this one lies, and how many it has."""
        address = self.words.ctypes.data + panel * PANEL * _pairs(self.K) * 4
        return address, min(BLOCK, -(-self.M // PANEL) - panel)


def pack(x_MK: np.ndarray, pool: Pool) -> Packed:
    """Round x to bfloat16, to nearest even, and lay it out for the products."""
    x_MK = np.require(x_MK, np.float32, ["C", "W"])  # one type of array, compiled once
    M, K = x_MK.shape
    panels = -(-M // PANEL)
    packed = Packed(_aligned(panels * PANEL * _pairs(K)), M, K)
    bits_MK = x_MK.view(np.uint32)

    def task(panel: int, worker: int) -> None:
        p = panel % BLOCK
        address, count = packed.block(panel - p)
        _pack_panel(bits_MK, panel * PANEL, address, p, count)

    pool.map(task, panels)
    return packed


def _pairs(K: int) -> int:
    return (K + 1) // 2


def _aligned(words: int) -> np.ndarray:
    """Memory that begins where a cache line does: a vector that lies across two costs double."""
    raw = np.empty(words + V, np.uint32)
    skipped = -raw.ctypes.data % (4 * V) // 4
    return raw[skipped : skipped + words]


# ---- products ---------------------------------------------------------------------------------


def products(x_MK: np.ndarray, weights: Sequence[np.ndarray], pool: Pool) -> list[np.ndarray]:
    """The product of x with each weight; x is packed once, and no thread waits between them."""
    return _products(pack(x_MK, pool), weights, pool)


def product(packed: Packed, w_OK: np.ndarray, pool: Pool) -> np.ndarray:
    """The product of packed rows with a weight: float32, (M, O).

    w is a bfloat16 array whose rows are contiguous, anywhere in memory, aligned or not, any
    distance apart. Raises ValueError for another.
    """
    return _products(packed, [w_OK], pool)[0]


def _products(packed: Packed, weights: Sequence[np.ndarray], pool: Pool) -> list[np.ndarray]:
    operands = [_Operand(packed, w_OK) for w_OK in weights]
    stripes = [stripe for operand in operands for stripe in operand.stripes()]
    scratch = [_aligned(STRIPE * BLOCK * PANEL).view(np.float32) for _ in range(pool.threads)]

    def task(i: int, worker: int) -> None:
        operand, o, panel = stripes[i]
        operand.multiply(o, panel, scratch[worker])

    pool.map(task, len(stripes))
    return [operand.y_MO for operand in operands]


class _Operand:
    """A weight, and the product with it."""

    def __init__(self, packed: Packed, w_OK: np.ndarray):
        if w_OK.dtype != ml_dtypes.bfloat16 or w_OK.ndim != 2 or w_OK.shape[1] != packed.K:
            expected = f"expected a bfloat16 matrix of {packed.K} columns"
            raise ValueError(f"{expected}, found {w_OK.dtype} of shape {w_OK.shape}")
        if w_OK.strides[1] != 2 and packed.K > 1:
            raise ValueError(f"expected contiguous rows, found strides {w_OK.strides}")
        self.packed, self.w_OK = packed, w_OK
        self.y_MO = np.empty((packed.M, len(w_OK)), np.float32)
        # An odd last column in pairs with zero: in w itself a last pair would go beyond the row.
        last_O = w_OK[:, packed.K - packed.K % 2 :].ravel().view(np.uint16)
        self.last_O = last_O.astype(np.uint32)

    def stripes(self) -> list[tuple[_Operand, int, int]]:
        """(self, first row of w, first panel of x) of each task; those of one row in turn."""
        panels = range(0, -(-self.packed.M // PANEL), BLOCK)
        return [(self, o, panel) for o in range(0, len(self.w_OK), STRIPE) for panel in panels]

    def multiply(self, o: int, panel: int, scratch: np.ndarray) -> None:
        """Fill the part of y that STRIPE rows of w and BLOCK panels of x make."""
        (M, n_out), m = self.y_MO.shape, panel * PANEL
        x, panels = self.packed.block(panel)
        y = self.y_MO.ctypes.data + (m * n_out + o) * 4
        count, rows = min(M - m, panels * PANEL), min(n_out - o, STRIPE)
        w, stride = self.w_OK.ctypes.data + o * self.w_OK.strides[0], self.w_OK.strides[0]
        last = self.last_O.ctypes.data + o * 4
        _stripe(scratch, w, stride, last, rows, x, panels, self.packed.K)
        _transpose(y, n_out * 4, scratch.ctypes.data, panels * PANEL * 4, rows, count)


# ---- compiled ---------------------------------------------------------------------------------


@jit
def _pack_panel(bits_MK, m, block, p, panels):
    """Lay rows m, m + 1, ... out as panel p of this block; bits_MK is float32 as uint32."""
    M, K = bits_MK.shape
    rounded = np.zeros((PANEL, 2 * PAIRS), np.uint16)
    for start in range(0, K, 2 * PAIRS):
        count = min(K - start, 2 * PAIRS)
        for i in range(min(M - m, PANEL)):
            row = bits_MK[m + i, start : start + count]
            for k in range(count):
                rounded[i, k] = _rounded(row[k])
        rounded[:, count:] = 0
        pairs = (count + 1) // 2
        to = block + (start // 2 * panels + p * pairs) * PANEL * 4
        _transpose(to, PANEL * 4, rounded.ctypes.data, PAIRS * 4, PANEL, pairs)


@jit
def _rounded(bits):
    """The upper half of a float32 rounded to nearest even; a nan stays one."""
    if bits & np.uint32(0x7FFFFFFF) > np.uint32(0x7F800000):
        return np.uint16(0x7FC0)
    even = bits >> np.uint32(16) & np.uint32(1)
    return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + even) >> np.uint32(16))


@jit
def _stripe(scratch, w, stride, last, rows, x, panels, K):
    """Fill scratch with sums, for each row of w the rows of x side by side.

    The rows of w are at w, w + stride, ...; their odd last elements at `last`, as words; x is a
    block of Packed.
    """
    scratch[: (rows + ROWS - 1) // ROWS * ROWS * panels * PANEL] = 0
    sums, columns = scratch.ctypes.data, (K + 1) // 2
    for start in range(0, columns, PAIRS):
        pairs = min(columns - start, PAIRS)
        part, step = x + start * panels * PANEL * 4, pairs * PANEL * 4
        whole = min(pairs, K // 2 - start)
        _add_block(sums, w + start * 4, stride, rows, part, step, panels, whole)
        if whole < pairs:
            _add_block(sums, last, 4, rows, part + whole * PANEL * 4, step, panels, 1)


@jit
def _add_block(sums, w, stride, rows, x, step, panels, pairs):
    """Add the products of these pairs of columns; the panels of x are `step` bytes apart."""
    width = panels * PANEL * 4
    for o in range(0, rows, ROWS):
        for p in range(panels):
            at = sums + o * width + p * PANEL * 4
            _add_tile(at, width, w + o * stride, stride, rows - o - 1, x + p * step, pairs)


@jit
def _transpose(to, to_stride, source, stride, rows, columns):
    """to[j, i] = source[i, j], of words; strides in bytes."""
    for j in range(0, columns, V):
        for i in range(0, rows, V):
            here, there = source + i * stride + j * 4, to + j * to_stride + i * 4
            if rows - i >= V and columns - j >= V:
                _transpose_square(there, to_stride, here, stride)
                continue
            for a in range(min(rows - i, V)):
                for b in range(min(columns - j, V)):
                    _copy_word(there + b * to_stride + a * 4, here + a * stride + b * 4)


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
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), [sums, x, w])


@intrinsic
def _add_tile(typingctx, sums, width, w, stride, last, x, pairs):
    """Add products of ROWS rows of w and one panel of x to sums whose rows are `width` apart.

    Rows of w after the one numbered `last` are not there: that one is read again in their place.
    """

    def codegen(context, b, signature, arguments):
        sums, width, w, stride, last, x, pairs = arguments

        def row(r: int) -> Value:
            there = b.select(b.icmp_signed("<", const(r), last), const(r), last)
            return b.add(w, b.mul(stride, there))

        def add_pair(j: Value, before: list[Value]) -> list[Value]:
            here = ir.at(b, x, 4 * PANEL, j)
            halves = [ir.load(b, ir.at(b, here, 4 * V, half), _PAIRS) for half in range(2)]
            after = []
            for r, row in enumerate(rows):
                pair = ir.splat(b, ir.load(b, ir.at(b, row, 4, j), i32))
                many = b.bitcast(pair, _PAIRS)
                after += [
                    _add_pairs(b, before[2 * r + half], halves[half], many) for half in (0, 1)
                ]
            return after

        rows = [row(r) for r in range(ROWS)]
        places = [
            ir.at(b, b.add(sums, b.mul(width, const(r))), 4 * V, half)
            for r in range(ROWS)
            for half in (0, 1)
        ]
        starts = [ir.load(b, place, vector(f32)) for place in places]
        totals = ir.loop(b, const(0), pairs, 1, starts, add_pair)
        for place, total in zip(places, totals, strict=True):
            ir.store(b, total, place)
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 7), codegen


@intrinsic
def _transpose_square(typingctx, to, to_stride, source, stride):
    """Transpose V * V words; strides in bytes."""

    def codegen(context, b, signature, arguments):
        to, to_stride, source, stride = arguments
        rows = [ir.load(b, b.add(source, b.mul(stride, const(i))), vector(i32)) for i in range(V)]
        distance = V // 2
        while distance:  # exchange the off-diagonal quarters of squares, ever smaller ones
            upper = [i for i in range(V) if not i & distance]
            low = [i if i in upper else i - distance + V for i in range(V)]
            high = [lane + distance for lane in low]
            for i in upper:
                two = rows[i], rows[i + distance]
                rows[i] = b.shuffle_vector(*two, ir.lanes(i32, low))
                rows[i + distance] = b.shuffle_vector(*two, ir.lanes(i32, high))
            distance //= 2
        for i, row in enumerate(rows):
            ir.store(b, row, b.add(to, b.mul(to_stride, const(i))))
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 4), codegen


@intrinsic
def _copy_word(typingctx, to, source):
    """Copy 32 bits."""

    def codegen(context, b, signature, arguments):
        to, source = arguments
        ir.store(b, ir.load(b, source, i32), to)
        return context.get_dummy_value()

    return types.void(ADDRESS, ADDRESS), codegen

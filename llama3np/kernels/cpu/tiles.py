"""Products of a few rows of plain weights with several float32 vectors: a small matrix product.

Arithmetic is the limit, not memory: each vector that is loaded takes part in several products.
Every product is one running sum of V lanes, folded in one order, so it has the same bits in
whatever company it is calculated.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

from numba import types
from numba.extending import intrinsic

from llama3np.kernels.cpu import ir
from llama3np.kernels.cpu.compiler import jit
from llama3np.kernels.cpu.dots import PLAIN, Plain
from llama3np.kernels.cpu.ir import Builder, V, Value, const, f32
from llama3np.kernels.ggml import FORMATS

ADDRESS = types.intp
ROWS = 4  # of weights at a time; with 4 vectors 16 sums, which stay in registers


def _products(b: Builder, ws: list[Value], xs: list[Value], sums: list[Value]) -> list[Value]:
    """Add the products of every vector of xs with every one of ws, rows of weights fastest."""
    pairs = [(w, x) for x in xs for w in ws]
    return [ir.fma(b, w, x, so_far) for (w, x), so_far in zip(pairs, sums, strict=True)]


def _folded(b: Builder, sums: list[Value]) -> Value:
    """The lanes of ROWS sums added up: one vector of ROWS numbers."""
    first, second, third, fourth = sums
    halves = ir.fold(b, first, second, 8), ir.fold(b, third, fourth, 8)
    folded = ir.fold(b, halves[0], halves[1], 4)
    for width in (2, 1):
        folded = ir.fold(b, folded, folded, width)
    return folded


def _tile(rows: int, m: int) -> Any:
    """y[j, r] = w[r] . x[j] for rows (ROWS or 1) x m of them, rows in a plain format."""

    def emit(b: Builder, kind: Plain, arguments: Sequence[Value]) -> None:
        w, row_bytes, x, x_stride, n, y, y_stride = arguments
        w_rows = [b.add(w, b.mul(row_bytes, const(r))) for r in range(rows)]
        x_rows = [b.add(x, b.mul(x_stride, const(j))) for j in range(m)]
        ahead = b.mul(row_bytes, const(rows))  # the rows that come next, if it is the weights' turn

        def step(i: Value, sums: list[Value], count: int) -> list[Value]:
            ws = [kind.load(b, row, i, count) for row in w_rows]
            xs = [ir.load_f32(b, row, i, count) for row in x_rows]
            return _products(b, ws, xs, sums)

        def vectors(i: Value, sums: list[Value]) -> list[Value]:
            for row in w_rows:
                ir.prefetch(b, b.add(ir.at(b, row, kind.nbytes, i), ahead))
            return step(i, sums, V)

        full = b.and_(n, const(-V))
        sums = [ir.every(f32, 0)] * (rows * m)
        sums = ir.loop(b, const(0), full, V, sums, vectors)
        rest = [ir.every(f32, 0, 1)] * (rows * m)
        rest = ir.loop(b, full, n, 1, rest, lambda i, s: step(i, s, 1))
        for j in range(m):
            mine = slice(j * rows, (j + 1) * rows)
            of_rows = _folded(b, (sums[mine] * ROWS)[:ROWS])
            for r, tail in enumerate(rest[mine]):
                number = b.extract_element(of_rows, const(r))
                number = ir.add(b, number, b.extract_element(tail, const(0)))
                ir.store(b, number, ir.at(b, b.add(y, b.mul(y_stride, const(j))), 4, r))

    @intrinsic
    def tile(typingctx, code, w, row_bytes, x, x_stride, n, y, y_stride):
        def codegen(context, b, signature, arguments):
            code, rest = arguments[0], arguments[1:]
            cases: ir.Cases = {
                FORMATS[name].number: partial(emit, b, kind, rest) for name, kind in PLAIN.items()
            }
            ir.choose(b, code, cases)
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 8), codegen

    return tile


tile_4x4, tile_4x2, tile_4x1, tile_1x1 = _tile(4, 4), _tile(4, 2), _tile(4, 1), _tile(1, 1)


@jit
def tile_dots(code, w, row_bytes, rows, x, x_stride, m, n, y, y_stride):
    """Write the products of `rows` rows of weights with m vectors, all of n numbers.

    The rows are F32, F16 or BF16, by ggml's number; the first is at address w. Vector j is float32
    at x + j * x_stride, and its products at y + j * y_stride, one after the other; strides are in
    bytes. What is left of rows or vectors after fours is calculated with some of its neighbours
    again.
    """
    if rows < ROWS:
        for j in range(m):
            for r in range(rows):
                row, to = w + row_bytes * r, y + j * y_stride + 4 * r
                tile_1x1(code, row, row_bytes, x + j * x_stride, x_stride, n, to, y_stride)
        return
    for start in range(0, rows, ROWS):
        r = min(start, rows - ROWS)
        _four_rows(code, w + row_bytes * r, row_bytes, x, x_stride, m, n, y + 4 * r, y_stride)


@jit
def _four_rows(code, w, row_bytes, x, x_stride, m, n, y, y_stride):
    j = 0
    while j < m:
        if m >= 4 and j <= m - 3:
            j = min(j, m - 4)
            x_j, y_j = x + j * x_stride, y + j * y_stride
            tile_4x4(code, w, row_bytes, x_j, x_stride, n, y_j, y_stride)
            j += 4
        elif j <= m - 2:
            x_j, y_j = x + j * x_stride, y + j * y_stride
            tile_4x2(code, w, row_bytes, x_j, x_stride, n, y_j, y_stride)
            j += 2
        else:
            x_j, y_j = x + j * x_stride, y + j * y_stride
            tile_4x1(code, w, row_bytes, x_j, x_stride, n, y_j, y_stride)
            j += 1

"""Products of stored rows of weights with float32 vectors, and their widening.

Rows and vectors are given by address: a mapped file's rows are not aligned, and any distance
apart. `code` is ggml's number of a format, the only thing about it that compiled code is told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from numba import types
from numba.extending import intrinsic

from llama3np.kernels.cpu import ir
from llama3np.kernels.cpu.blocks import BLOCKS, Block
from llama3np.kernels.cpu.compiler import jit
from llama3np.kernels.cpu.ir import Builder, V, Value, const, f32, i16, vector
from llama3np.kernels.ggml import FORMATS

ADDRESS = types.intp

# A fused multiply-add takes 4 cycles and two begin in each, so one sum alone would wait. Four
# beside loads and conversions are enough.
SUMS = 4
# Bytes that memory is asked for ahead of use: a processor's own prefetching stops at each page
# of 4 KiB, and waits for the first misses of the next.
AHEAD = 4096

F32, F16, BF16 = (FORMATS[name].number for name in ("F32", "F16", "BF16"))
Q4_0, Q4_1, Q5_0, Q5_1, Q8_0, Q2_K, Q3_K, Q4_K, Q5_K, Q6_K = (FORMATS[n].number for n in BLOCKS)


def _prefetch(b: Builder, address: Value, nbytes: int) -> None:
    """Ask for what will be read AHEAD bytes after this."""
    for offset in range(0, nbytes, 64):
        ir.prefetch(b, ir.at(b, address, AHEAD + offset))


# ---- plain numbers ---------------------------------------------------------------------------


class Plain:
    """Numbers of one size, and what makes them float32."""

    def __init__(self, stored: Any, nbytes: int, widen: Callable[[Builder, Value], Value]):
        self.stored, self.nbytes, self.widen = stored, nbytes, widen

    def load(self, b: Builder, row: Value, i: Value, count: int) -> Value:
        """Numbers from the i-th, as float32."""
        address = ir.at(b, row, self.nbytes, i)
        return self.widen(b, ir.load(b, address, vector(self.stored, count)))


PLAIN = {
    "F32": Plain(f32, 4, lambda b, values: values),
    "F16": Plain(i16, 2, ir.widen_f16),
    "BF16": Plain(i16, 2, ir.widen_bf16),
}


def _plain_dot(kind: Plain) -> Any:
    @intrinsic
    def dot(typingctx, row, x, n):
        def codegen(context, b, signature, arguments):
            row, x, n = arguments

            def products(i: Value, sums: list[Value], count: int) -> list[Value]:
                new = []
                for u, so_far in enumerate(sums):
                    start = b.add(i, const(count * u))
                    w = kind.load(b, row, start, count)
                    new.append(ir.fma(b, w, ir.load_f32(b, x, start, count), so_far))
                return new

            def four(i: Value, sums: list[Value]) -> list[Value]:
                _prefetch(b, ir.at(b, row, kind.nbytes, i), SUMS * V * kind.nbytes)
                return products(i, sums, V)

            most, full = b.and_(n, const(-SUMS * V)), b.and_(n, const(-V))
            sums = ir.loop(b, const(0), most, SUMS * V, [ir.every(f32, 0)] * SUMS, four)
            one = [ir.tree(b, sums)]
            one = ir.loop(b, most, full, V, one, lambda i, s: products(i, s, V))
            rest = [ir.every(f32, 0, 1)]
            rest = ir.loop(b, full, n, 1, rest, lambda i, s: products(i, s, 1))
            return ir.add(b, ir.total(b, one[0]), b.extract_element(rest[0], const(0)))

        return types.float32(ADDRESS, ADDRESS, ADDRESS), codegen

    return dot


def _plain_widen(kind: Plain) -> Any:
    @intrinsic
    def widen(typingctx, row, out, n):
        def codegen(context, b, signature, arguments):
            row, out, n = arguments

            def copy(i: Value, count: int) -> list[Value]:
                ir.store(b, kind.load(b, row, i, count), ir.at(b, out, 4, i))
                return []

            full = b.and_(n, const(-V))
            ir.loop(b, const(0), full, V, [], lambda i, _: copy(i, V))
            ir.loop(b, full, n, 1, [], lambda i, _: copy(i, 1))
            return context.get_dummy_value()

        return types.void(ADDRESS, ADDRESS, ADDRESS), codegen

    return widen


# ---- blocks ----------------------------------------------------------------------------------


def _block_dot(kind: Block) -> Any:
    together = max(1, SUMS * V // kind.weights * 2)  # blocks of one step

    @intrinsic
    def dot(typingctx, row, x, n):
        def codegen(context, b, signature, arguments):
            row, x, n = arguments

            def products(first: Value, sums: list[Value], count: int) -> list[Value]:
                new = list(sums)
                for u in range(count):
                    i = b.add(first, const(u))
                    start = b.mul(i, const(kind.weights))
                    for v, w in enumerate(kind.decode(b, ir.at(b, row, kind.nbytes, i))):
                        so_far = (u * kind.weights // V + v) % SUMS
                        x_V = ir.load_f32(b, x, b.add(start, const(V * v)))
                        new[so_far] = ir.fma(b, w, x_V, new[so_far])
                return new

            def several(i: Value, sums: list[Value]) -> list[Value]:
                _prefetch(b, ir.at(b, row, kind.nbytes, i), together * kind.nbytes)
                return products(i, sums, together)

            blocks = b.udiv(n, const(kind.weights))
            most = b.and_(blocks, const(-together))
            sums = ir.loop(b, const(0), most, together, [ir.every(f32, 0)] * SUMS, several)
            if together > 1:
                sums = ir.loop(b, most, blocks, 1, sums, lambda i, s: products(i, s, 1))
            return ir.total(b, ir.tree(b, sums))

        return types.float32(ADDRESS, ADDRESS, ADDRESS), codegen

    return dot


def _block_widen(kind: Block) -> Any:
    @intrinsic
    def widen(typingctx, row, out, n):
        def codegen(context, b, signature, arguments):
            row, out, n = arguments

            def one(i: Value, _: list[Value]) -> list[Value]:
                _prefetch(b, ir.at(b, row, kind.nbytes, i), kind.nbytes)
                start = ir.at(b, out, 4 * kind.weights, i)
                for v, w in enumerate(kind.decode(b, ir.at(b, row, kind.nbytes, i))):
                    ir.store(b, w, ir.at(b, start, 4 * V, v))
                return []

            ir.loop(b, const(0), b.udiv(n, const(kind.weights)), 1, [], one)
            return context.get_dummy_value()

        return types.void(ADDRESS, ADDRESS, ADDRESS), codegen

    return widen


# ---- one row of any format -------------------------------------------------------------------

dot_f32, dot_f16, dot_bf16 = map(_plain_dot, PLAIN.values())
dot_q4_0, dot_q4_1, dot_q5_0, dot_q5_1, dot_q8_0 = (
    _block_dot(k) for k in list(BLOCKS.values())[:5]
)
dot_q2_k, dot_q3_k, dot_q4_k, dot_q5_k, dot_q6_k = (
    _block_dot(k) for k in list(BLOCKS.values())[5:]
)
widen_f32, widen_f16, widen_bf16 = map(_plain_widen, PLAIN.values())
widen_q4_0, widen_q4_1, widen_q5_0, widen_q5_1, widen_q8_0 = (
    _block_widen(k) for k in list(BLOCKS.values())[:5]
)
widen_q2_k, widen_q3_k, widen_q4_k, widen_q5_k, widen_q6_k = (
    _block_widen(k) for k in list(BLOCKS.values())[5:]
)


@jit
def row_dot(code, row, x, n, scratch):
    """The product of a stored row of n weights and n float32 at address x.

    A format of blocks needs whole ones. `scratch` is not used.
    """
    if code == BF16:
        return dot_bf16(row, x, n)
    if code == F16:
        return dot_f16(row, x, n)
    if code == F32:
        return dot_f32(row, x, n)
    if code == Q8_0:
        return dot_q8_0(row, x, n)
    if code == Q4_0:
        return dot_q4_0(row, x, n)
    if code == Q4_K:
        return dot_q4_k(row, x, n)
    if code == Q6_K:
        return dot_q6_k(row, x, n)
    if code == Q5_K:
        return dot_q5_k(row, x, n)
    if code == Q5_0:
        return dot_q5_0(row, x, n)
    if code == Q4_1:
        return dot_q4_1(row, x, n)
    if code == Q5_1:
        return dot_q5_1(row, x, n)
    if code == Q2_K:
        return dot_q2_k(row, x, n)
    return dot_q3_k(row, x, n)


@jit
def widen_row(code, row, out, n):
    """Write a stored row of n weights as float32 to an address."""
    if code == BF16:
        widen_bf16(row, out, n)
    elif code == F16:
        widen_f16(row, out, n)
    elif code == F32:
        widen_f32(row, out, n)
    elif code == Q8_0:
        widen_q8_0(row, out, n)
    elif code == Q4_0:
        widen_q4_0(row, out, n)
    elif code == Q4_K:
        widen_q4_k(row, out, n)
    elif code == Q6_K:
        widen_q6_k(row, out, n)
    elif code == Q5_K:
        widen_q5_k(row, out, n)
    elif code == Q5_0:
        widen_q5_0(row, out, n)
    elif code == Q4_1:
        widen_q4_1(row, out, n)
    elif code == Q5_1:
        widen_q5_1(row, out, n)
    elif code == Q2_K:
        widen_q2_k(row, out, n)
    else:
        widen_q3_k(row, out, n)


@jit
def widen_rows(code, address, row_bytes, rows, n, out_address):
    """Write stored rows as float32, one after the other."""
    for r in range(rows):
        widen_row(code, address + r * row_bytes, out_address + r * n * 4, n)


@jit
def tile_dots(tile, rows, x_MI, M, n, y_MC):
    for m in range(M):
        for r in range(rows):
            y_MC[m, r] = dot_f32(tile[r * n :].ctypes.data, x_MI[m].ctypes.data, n)

"""Products of stored rows of weights with float32 vectors, and their widening.

Rows and vectors are given by address: a mapped file's rows are not aligned, and any distance
apart. `code` is ggml's number of a format, the only thing about it that compiled code is told.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

from numba import types
from numba.extending import intrinsic

from llama3np.kernels.cpu import ir
from llama3np.kernels.cpu.blocks import BLOCKS, Block
from llama3np.kernels.cpu.compiler import jit
from llama3np.kernels.cpu.ir import Builder, Value, V, const, f32, i16, vector
from llama3np.kernels.ggml import FORMATS

ADDRESS = types.intp

# A fused multiply-add takes 4 cycles and two begin in each, so one sum alone would wait. Four
# beside loads and conversions are enough.
SUMS = 4
# Bytes that memory is asked for ahead of use: a processor's own prefetching stops at each page
# of 4 KiB, and waits for the first misses of the next.
AHEAD = 5120

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

GROUP = 8  # blocks that are prepared at a time

# What is done with each vector of weights: (index of the first, weights, carried, which sum).
Use = Callable[[Value, Value, list[Value], int], list[Value]]


class Row(NamedTuple):
    """A row of blocks in the hands of an intrinsic."""

    b: Builder
    kind: Block
    address: Value
    use: Use

    def use_block(self, i: Value, carried: list[Value], kept: Value, nth: int = 0) -> list[Value]:
        """Decode block i and use its weights."""
        b, kind = self.b, self.kind
        start = b.mul(i, const(kind.weights))
        for v, w in enumerate(kind.decode(b, self.block(i), kept)):
            carried = self.use(b.add(start, const(V * v)), w, carried, (nth + v) % SUMS)
        return carried

    def block(self, i: Value) -> Value:
        """The address of block i."""
        return ir.at(self.b, self.address, self.kind.nbytes, i)

    def prefetch(self, i: Value, blocks: int) -> None:
        """Ask for blocks far behind the i-th."""
        _prefetch(self.b, self.block(i), blocks * self.kind.nbytes)


def _visit_prepared(row: Row, blocks: Value, carried: list[Value]) -> list[Value]:
    """Use blocks in groups: prepare all of a group, then decode all of it."""
    b, nbytes = row.b, row.kind.kept
    kept = ir.reserve(b, GROUP * nbytes)

    def group(start: Value, carried: list[Value]) -> list[Value]:
        left = b.sub(blocks, start)
        last = b.icmp_signed("<", left, const(GROUP))
        count = b.select(last, left, const(GROUP))

        def prepare(i: Value, _: list[Value]) -> list[Value]:
            row.kind.prepare(b, row.block(b.add(start, i)), ir.at(b, kept, nbytes, i))
            return []

        def decode(i: Value, carried: list[Value]) -> list[Value]:
            row.prefetch(b.add(start, i), 1)
            return row.use_block(b.add(start, i), carried, ir.at(b, kept, nbytes, i))

        ir.loop(b, const(0), count, 1, [], prepare)
        return ir.loop(b, const(0), count, 1, carried, decode)

    return ir.loop(b, const(0), blocks, GROUP, carried, group)


def _visit(row: Row, blocks: Value, carried: list[Value]) -> list[Value]:
    """Use blocks of a kind that needs no preparation, several in each step."""
    b, none = row.b, const(0)
    vectors = row.kind.weights // V
    together = 2 * SUMS // vectors

    def several(i: Value, carried: list[Value]) -> list[Value]:
        row.prefetch(i, together)
        for u in range(together):
            carried = row.use_block(b.add(i, const(u)), carried, none, u * vectors)
        return carried

    most = b.and_(blocks, const(-together))
    carried = ir.loop(b, none, most, together, carried, several)
    return ir.loop(b, most, blocks, 1, carried, lambda i, c: row.use_block(i, c, none))


def _visit_blocks(row: Row, n: Value, carried: list[Value]) -> list[Value]:
    """Use all weights of a row, carrying values from use to use."""
    blocks = row.b.udiv(n, const(row.kind.weights))
    return (_visit_prepared if row.kind.prepare else _visit)(row, blocks, carried)


def _block_dot(kind: Block) -> Any:
    @intrinsic
    def dot(typingctx, row, x, n):
        def codegen(context, b, signature, arguments):
            row, x, n = arguments

            def use(i: Value, w: Value, sums: list[Value], which: int) -> list[Value]:
                new = list(sums)
                new[which] = ir.fma(b, w, ir.load_f32(b, x, i), sums[which])
                return new

            sums = _visit_blocks(Row(b, kind, row, use), n, [ir.every(f32, 0)] * SUMS)
            return ir.total(b, ir.tree(b, sums))

        return types.float32(ADDRESS, ADDRESS, ADDRESS), codegen

    return dot


def _block_widen(kind: Block) -> Any:
    @intrinsic
    def widen(typingctx, row, out, n):
        def codegen(context, b, signature, arguments):
            row, out, n = arguments

            def use(i: Value, w: Value, carried: list[Value], which: int) -> list[Value]:
                ir.store(b, w, ir.at(b, out, 4, i))
                return []

            _visit_blocks(Row(b, kind, row, use), n, [])
            return context.get_dummy_value()

        return types.void(ADDRESS, ADDRESS, ADDRESS), codegen

    return widen


# ---- one row of any format -------------------------------------------------------------------

dot_f32, dot_f16, dot_bf16 = map(_plain_dot, PLAIN.values())
dot_q4_0, dot_q4_1, dot_q5_0, dot_q5_1, dot_q8_0 = (_block_dot(k) for k in list(BLOCKS.values())[:5])
dot_q2_k, dot_q3_k, dot_q4_k, dot_q5_k, dot_q6_k = (_block_dot(k) for k in list(BLOCKS.values())[5:])
widen_f32, widen_f16, widen_bf16 = map(_plain_widen, PLAIN.values())
widen_q4_0, widen_q4_1, widen_q5_0, widen_q5_1, widen_q8_0 = (_block_widen(k) for k in list(BLOCKS.values())[:5])
widen_q2_k, widen_q3_k, widen_q4_k, widen_q5_k, widen_q6_k = (_block_widen(k) for k in list(BLOCKS.values())[5:])


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



# ---- the limit -------------------------------------------------------------------------------


@intrinsic
def _read(typingctx, address, nbytes):
    def codegen(context, b, signature, arguments):
        address, nbytes = arguments
        line, lines = vector(ir.i64, 8), 8  # of 64 bytes, each with its own sum

        def several(i: Value, seen: list[Value]) -> list[Value]:
            places = [ir.at(b, b.add(address, i), 64, k) for k in range(lines)]
            return [b.xor(v, ir.load(b, at, line)) for v, at in zip(seen, places, strict=True)]

        def one(i: Value, seen: list[Value]) -> list[Value]:
            return [b.xor(seen[0], b.zext(ir.load(b, b.add(address, i), ir.i8), ir.i64))]

        most = b.and_(nbytes, const(-64 * lines))
        nothing = [ir.every(ir.i64, 0, 8)] * lines
        seen = ir.loop(b, const(0), most, 64 * lines, nothing, several)
        while len(seen) > 1:
            seen = [b.xor(seen[0], seen[-1]), *seen[1:-1]]
        return ir.loop(b, most, nbytes, 1, [ir.exclusive_or(b, seen[0])], one)[0]

    return types.int64(ADDRESS, ADDRESS), codegen


@jit
def read_words(address, nbytes):
    """The exclusive or of the 64-bit words of memory, and then of the bytes that are left.

    Nothing reads memory faster than this with one thread: the measure of all products above.
    """
    return _read(address, nbytes)

"""Products of stored rows of weights with float32 vectors, and their widening.

Rows and vectors are given by address: a mapped file's rows are not aligned, and any distance
apart. `code` is ggml's number of a format, the only thing about it that compiled code is told.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

from llvmlite import ir as llvm
from numba import types
from numba.extending import intrinsic

from llama3np.kernels.cpu import ir
from llama3np.kernels.cpu.blocks import BLOCKS, Block, Prepare
from llama3np.kernels.cpu.compiler import jit
from llama3np.kernels.cpu.ir import Builder, V, Value, const, f32, i16, vector
from llama3np.kernels.cpu.shared import floats
from llama3np.kernels.ggml import FORMATS

ADDRESS = types.intp

# A fused multiply-add takes 4 cycles and two begin in each, so one sum alone would wait. Four
# beside loads and conversions are enough.
SUMS = 4
# Bytes that memory is asked for ahead of use: a processor's own prefetching stops at each page
# of 4 KiB, and waits for the first misses of the next.
AHEAD = 5120


def _prefetch(b: Builder, address: Value, nbytes: int) -> None:
    """Ask for what will be read AHEAD bytes after this."""
    for offset in range(0, nbytes, 64):
        ir.prefetch(b, ir.at(b, address, AHEAD + offset))


# ---- plain numbers ---------------------------------------------------------------------------


class Plain(NamedTuple):
    """Numbers of one size, and what makes them float32."""

    stored: Any
    nbytes: int
    widen: Callable[[Builder, Value], Value]

    def load(self, b: Builder, row: Value, i: Value, count: int) -> Value:
        """Numbers from the i-th, as float32."""
        address = ir.at(b, row, self.nbytes, i)
        return self.widen(b, ir.load(b, address, vector(self.stored, count)))


PLAIN = {
    "F32": Plain(f32, 4, lambda b, values: values),
    "F16": Plain(i16, 2, ir.widen_f16),
    "BF16": Plain(i16, 2, ir.widen_bf16),
}


def _plain_dot(b: Builder, kind: Plain, row: Value, x: Value, n: Value) -> Value:
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


def _plain_widen(b: Builder, kind: Plain, row: Value, out: Value, n: Value) -> None:
    def copy(i: Value, count: int) -> list[Value]:
        ir.store(b, kind.load(b, row, i, count), ir.at(b, out, 4, i))
        return []

    full = b.and_(n, const(-V))
    ir.loop(b, const(0), full, V, [], lambda i, _: copy(i, V))
    ir.loop(b, full, n, 1, [], lambda i, _: copy(i, 1))


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
        """Ask for as many blocks, far after the i-th."""
        _prefetch(self.b, self.block(i), blocks * self.kind.nbytes)


def _visit_prepared(row: Row, prepare: Prepare, blocks: Value, carried: list[Value]) -> list[Value]:
    """Use blocks in groups: prepare all of a group, then decode all of it."""
    b, nbytes = row.b, row.kind.kept
    kept = ir.reserve(b, GROUP * nbytes)

    def group(start: Value, carried: list[Value]) -> list[Value]:
        left = b.sub(blocks, start)
        last = b.icmp_signed("<", left, const(GROUP))
        count = b.select(last, left, const(GROUP))

        def write(i: Value, _: list[Value]) -> list[Value]:
            prepare(b, row.block(b.add(start, i)), ir.at(b, kept, nbytes, i))
            return []

        def decode(i: Value, carried: list[Value]) -> list[Value]:
            row.prefetch(b.add(start, i), 1)
            return row.use_block(b.add(start, i), carried, ir.at(b, kept, nbytes, i))

        ir.loop(b, const(0), count, 1, [], write)
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
    if row.kind.prepare:
        return _visit_prepared(row, row.kind.prepare, blocks, carried)
    return _visit(row, blocks, carried)


def _block_dot(b: Builder, kind: Block, row: Value, x: Value, n: Value) -> Value:
    def use(i: Value, w: Value, sums: list[Value], which: int) -> list[Value]:
        new = list(sums)
        new[which] = ir.fma(b, w, ir.load_f32(b, x, i), sums[which])
        return new

    sums = _visit_blocks(Row(b, kind, row, use), n, [ir.every(f32, 0)] * SUMS)
    return ir.total(b, ir.tree(b, sums))


def _block_widen(b: Builder, kind: Block, row: Value, out: Value, n: Value) -> None:
    def use(i: Value, w: Value, carried: list[Value], which: int) -> list[Value]:
        ir.store(b, w, ir.at(b, out, 4, i))
        return []

    _visit_blocks(Row(b, kind, row, use), n, [])


# ---- rows of any format ----------------------------------------------------------------------


def _cases(b: Builder, plain: Callable, block: Callable, *where: Value) -> ir.Cases:
    """What writes the code of each format, by ggml's number."""
    writers = {
        **{name: functools.partial(plain, b, kind, *where) for name, kind in PLAIN.items()},
        **{name: functools.partial(block, b, kind, *where) for name, kind in BLOCKS.items()},
    }
    return {FORMATS[name].number: writer for name, writer in writers.items()}


@intrinsic
def _dot(typingctx, code, row, x, n):
    def codegen(context, b, signature, arguments):
        code, *where = arguments
        cases = _cases(b, _plain_dot, _block_dot, *where)
        return ir.choose(b, code, cases, llvm.Constant(f32, float("nan")))

    return types.float32(*[ADDRESS] * 4), codegen


@intrinsic
def _widen(typingctx, code, row, out, n):
    def codegen(context, b, signature, arguments):
        code, *where = arguments
        ir.choose(b, code, _cases(b, _plain_widen, _block_widen, *where))
        return context.get_dummy_value()

    return types.void(*[ADDRESS] * 4), codegen


@jit
def row_dot(code, row, x, n):
    """The product of a stored row of n weights and n float32 at address x, in float32.

    A format of blocks needs whole ones. An x that begins a cache line of 64 bytes is read up to
    a third faster.
    """
    return _dot(code, row, x, n)


@jit
def widen_row(code, row, out, n):
    """Write a stored row of n weights as float32 to an address."""
    _widen(code, row, out, n)


@jit
def widen_rows(code, address, row_bytes, rows, n, out_address):
    """Write stored rows as float32, one after the other."""
    for r in range(rows):
        widen_row(code, address + r * row_bytes, out_address + r * n * 4, n)


@jit
def dot_rows(code, address, row_bytes, rows, x, n, y_address):
    """Write the products of stored rows with one x, as float32, one after the other."""
    y_R = floats(y_address, rows)
    for r in range(rows):
        y_R[r] = row_dot(code, address + r * row_bytes, x, n)


# ---- the limit -------------------------------------------------------------------------------

LINES = 16  # of 64 bytes in a step of a read, each with its own sum
READ_AHEAD = 8192  # bytes; a read does nothing else, so it is further ahead than a product


@intrinsic
def _read(typingctx, address, nbytes):
    def codegen(context, b, signature, arguments):
        address, nbytes = arguments

        def several(i: Value, seen: list[Value]) -> list[Value]:
            start = b.add(address, i)
            places = [ir.at(b, start, 64, line) for line in range(LINES)]
            for place in places:
                ir.prefetch(b, ir.at(b, place, READ_AHEAD))
            words = vector(ir.i64, 8)
            return [b.xor(v, ir.load(b, p, words)) for v, p in zip(seen, places, strict=True)]

        def one(i: Value, seen: list[Value]) -> list[Value]:
            return [b.xor(seen[0], b.zext(ir.load(b, b.add(address, i), ir.i8), ir.i64))]

        most, nothing = b.and_(nbytes, const(-64 * LINES)), ir.every(ir.i64, 0, 8)
        seen = ir.loop(b, const(0), most, 64 * LINES, [nothing] * LINES, several)
        words = ir.exclusive_or(b, functools.reduce(b.xor, seen))
        return ir.loop(b, most, nbytes, 1, [words], one)[0]

    return types.int64(ADDRESS, ADDRESS), codegen


@jit
def read_words(address, nbytes):
    """The exclusive or of the 64-bit words of memory, and then of the bytes that are left.

    Nothing reads memory faster than this with one thread: the measure of all products above.
    """
    return _read(address, nbytes)

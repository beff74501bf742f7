"""What products of many rows have in common: x laid out in panels, and tasks over rows of w.

    y_MO = x_MK @ w_OK.T

Lanes are rows of x, so that a number of w is broadcast to all lanes and no sum goes across them.
x is laid out once for all the weights that it meets, in words of 32 bits: a float32, or a pair of
bfloat16. Sums run over k in order, so a row's result has the same bits whatever the number of
threads, and alone or among others.

Of each row a piece of PIECE words is multiplied before the next. A panel's piece, 32 KiB, stays in
a core's first cache while it meets all rows of a stripe; these rows' pieces, 64 KiB, and the
sums, 128 KiB, stay in the second. x itself is read from farther away, once for every stripe, and is
asked for one panel ahead: otherwise a product takes an eighth longer if x is 512 x 8192.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numba import types
from numba.extending import intrinsic

from llama3np.kernels.cpu import ir
from llama3np.kernels.cpu.compiler import jit
from llama3np.kernels.cpu.ir import Builder, V, Value, const, f32, i32, vector
from llama3np.kernels.cpu.shared import address, aligned
from llama3np.threads import Pool

ADDRESS = types.intp

PANEL = 2 * V  # rows of x that the innermost loop multiplies ...
ROWS = 8  # ... by so many of w: 16 vectors of sums, where a latency of 6 at 2 a cycle needs 12
PIECE = 256  # columns, in words
STRIPE = 64  # rows of w in one task, at most,
BLOCK = 16  # and panels of x
KEPT = 2**23  # words of x that a thread keeps room for

# ---- x, laid out ------------------------------------------------------------------------------


class Packed(NamedTuple):
    """The words of x in the kernel's order.

    BLOCK panels of 32 rows are together; in these PIECE columns; in these each panel; in it each
    column; for it each row. Rows that fill up the last panel are zero.
    """

    words: np.ndarray
    M: int
    columns: int  # words in a row

    def block(self, panel: int) -> tuple[int, int]:
        """Where the BLOCK of panels that begins with this one lies, and how many it has."""
        place = address(self.words) + panel * PANEL * self.columns * 4
        return place, min(BLOCK, -(-self.M // PANEL) - panel)


# pack_panel(x_MK, m, block, p, panels) lays rows m, m + 1, ... out as panel p of a block of these
# many, which begins at an address.
PackPanel = Callable[[np.ndarray, int, int, int, int], None]


def pack(x_MK: np.ndarray, columns: int, pack_panel: PackPanel, pool: Pool) -> Packed:
    """Lay out x_MK, whose rows become this many words each, until this thread's next call."""
    M = len(x_MK)
    panels = -(-M // PANEL)
    packed = Packed(_room(panels * PANEL * columns), M, columns)

    def task(panel: int, worker: int) -> None:
        p = panel % BLOCK
        place, count = packed.block(panel - p)
        pack_panel(x_MK, panel * PANEL, place, p, count)

    pool.map(task, panels)
    return packed


_kept = threading.local()


def _room(words: int) -> np.ndarray:
    """Aligned memory of this thread, whatever is in it: new memory is slow to touch first."""
    if words > KEPT:
        return aligned(words, dtype=np.uint32)
    if getattr(_kept, "words", None) is None or len(_kept.words) < words:
        _kept.words = aligned(words, dtype=np.uint32)
    return _kept.words[:words]


# ---- tasks ------------------------------------------------------------------------------------


class Operand(NamedTuple):
    """Rows of a weight, and where their products with all rows of x belong.

    fill(sums, o, rows, x, panels) fills an array with the products of rows o, o + 1, ... of w and
    this many panels of x, which begin at an address: for each row of w the rows of x side by side.
    """

    y_MO: np.ndarray  # one row's numbers are contiguous
    fill: Callable[[np.ndarray, int, int, int, int], None]


def multiply(packed: Packed, operands: Sequence[Operand], pool: Pool) -> None:
    """Fill the operands' y; no thread waits between them."""
    panels = range(0, -(-packed.M // PANEL), BLOCK)
    tasks = [
        (operand, o, rows, panel)
        for operand in operands
        for o, rows in _stripes(operand.y_MO.shape[1], pool.threads)
        for panel in panels  # of one stripe in turn: its rows of w are still in a cache
    ]
    scratch = [aligned(STRIPE * BLOCK * PANEL) for _ in range(pool.threads)]

    def task(i: int, worker: int) -> None:
        _multiply(packed, *tasks[i], scratch[worker])

    pool.map(task, len(tasks))


def _stripes(n_out: int, threads: int) -> Iterator[tuple[int, int]]:
    """(first row of w, how many) of tasks, smaller towards the end: threads should end together."""
    o = 0
    while o < n_out:
        share = (n_out - o) // (2 * threads) // ROWS * ROWS
        rows = min(n_out - o, STRIPE, max(share, 2 * ROWS))
        yield o, rows
        o += rows


def _multiply(
    packed: Packed, operand: Operand, o: int, rows: int, panel: int, sums: np.ndarray
) -> None:
    """Fill the part of y that these rows of w and BLOCK panels of x make."""
    m = panel * PANEL
    x, panels = packed.block(panel)
    count = min(packed.M - m, panels * PANEL)
    operand.fill(sums, o, rows, x, panels)
    stride = operand.y_MO.strides[0]
    y = address(operand.y_MO) + m * stride + o * 4
    transpose(y, stride, address(sums), panels * PANEL * 4, rows, count)


# ---- compiled ---------------------------------------------------------------------------------


@jit
def transpose(to, to_stride, source, stride, rows, columns):
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


# add(b, sums, x, w): the sums with products of words of x and of w, all of them vectors.
Add = Callable[[Builder, Value, Value, Value], Value]


def make_add_tile(add: Add) -> Any:
    """The innermost loop for one kind of words."""

    @intrinsic
    def add_tile(typingctx, sums, width, w, stride, last, x, columns, ahead):
        """Add products of ROWS rows of w and one panel of x to sums whose rows are `width` apart.

        Rows of w after the one numbered `last` are not there: that one is read again in their
        place. From `ahead` on memory is asked for: a panel, if all tiles of a stripe do it.
        """

        def codegen(context, b, signature, arguments):
            sums, width, w, stride, last, x, columns, ahead = arguments

            def row(r: int) -> Value:
                there = b.select(b.icmp_signed("<", const(r), last), const(r), last)
                return b.add(w, b.mul(stride, there))

            def add_column(j: Value, before: list[Value]) -> list[Value]:
                here = ir.at(b, x, 4 * PANEL, j)
                ir.prefetch(b, ir.at(b, ahead, 4 * PANEL * ROWS // STRIPE, j))
                halves = [ir.load(b, ir.at(b, here, 4 * V, half), vector(i32)) for half in (0, 1)]
                words = [ir.splat(b, ir.load(b, ir.at(b, row, 4, j), i32)) for row in rows]
                pairs = [(half, word) for word in words for half in halves]
                return [add(b, so_far, *pair) for so_far, pair in zip(before, pairs, strict=True)]

            rows = [row(r) for r in range(ROWS)]
            starts = [b.add(sums, b.mul(width, const(r))) for r in range(ROWS)]
            places = [ir.at(b, start, 4 * V, half) for start in starts for half in (0, 1)]
            before = [ir.load(b, place, vector(f32)) for place in places]
            after = ir.loop(b, const(0), columns, 1, before, add_column)
            for place, total in zip(places, after, strict=True):
                ir.store(b, total, place)
            return context.get_dummy_value()

        return types.void(*[ADDRESS] * 8), codegen

    return add_tile


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

"""Attention of one decode step: every query of a group against the cache, in parts.

A part covers at most SPLIT slots of one key/value head; `combine` merges the parts of a head. Where
the cuts are depends on the context alone, so results do not depend on the number of threads. A
thread best takes a few neighbouring parts in a row: the end of one fetches the keys of the next.
All functions take addresses (intp). kv_code is ggml's number of the cache's format.

Reading keys and values takes the time, so a row that is read serves all heads of its group: heads
go in tiles of U = 4 (or 2 or 1), with one sum for each head and key, or head and column.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from math import inf, sqrt
from typing import Any

import numpy as np
from numba import types
from numba.extending import intrinsic

from llama3np.kernels.cpu import ir
from llama3np.kernels.cpu.compiler import jit
from llama3np.kernels.cpu.dots import ADDRESS, PLAIN, row_dot
from llama3np.kernels.cpu.exp import emit_exp, exp_f32
from llama3np.kernels.cpu.ir import Builder, V, Value, const, every, vector
from llama3np.kernels.ggml import FORMATS as GGML

SPLIT = 512  # slots of a part
SCRATCH = 4 * SPLIT  # floats of private memory that attend_part needs

TILES = (1, 2, 4)  # heads that are done at once, U
WIDTHS = (64, 32, 16, 1)  # columns of the values that are done at once
F32, F16, BF16 = (GGML[name].number for name in ("F32", "F16", "BF16"))
FORMATS = {F32: PLAIN["F32"], F16: PLAIN["F16"], BF16: PLAIN["BF16"]}
LINE = 64  # bytes that are fetched at once
# Measured: the processor's own prefetching, left alone, reads at half the rate.
AHEAD = 8192  # bytes from what is used to what is fetched
RUN = 4096  # values that stay in the nearest cache while columns are done in turn

# ---- pieces of vector code --------------------------------------------------------------------


def _fetch(b: Builder, address: Value, i: int, size: int) -> None:
    """Fetch what vector i from an address on has, if it begins a line."""
    if i * V * size % LINE == 0:
        ir.prefetch(b, ir.at(b, address, V * size, i))


def _larger(b: Builder, x: Value, y: Value) -> Value:
    """The larger lanes; where x is nan, y."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def _rows(b: Builder, address: Value, stride: Value, count: Value, n: int) -> list[Value]:
    """Addresses of n rows; the last one again where there are fewer, count."""
    last = b.sub(count, const(1))
    least = [b.select(b.icmp_signed("<", const(i), last), const(i), last) for i in range(n)]
    return [b.add(address, b.mul(i, stride)) for i in least]


def _soon(b: Builder, rows: Value, following: Value, s: Value, n: Value, row_bytes: Value) -> Value:
    """The address of row s of n, and of what follows as if it were more of them."""
    beyond = b.icmp_signed(">=", s, n)
    base = b.select(beyond, following, rows)
    return b.add(base, b.mul(b.select(beyond, b.sub(s, n), s), row_bytes))


def _specialise(
    b: Builder, values: Sequence[tuple[Value, Iterable[int]]], emit: Callable, chosen: Any = ()
) -> None:
    """Emit emit(*numbers) for all numbers that the values may have, and the jumps between."""
    if not values:
        emit(*chosen)
        return
    (value, numbers), *rest = values
    done = b.append_basic_block("done")
    switch = b.switch(value, done)
    for number in numbers:
        block = b.append_basic_block(f"is{number}")
        switch.add_case(number, block)
        b.position_at_end(block)
        _specialise(b, rest, emit, (*chosen, number))
        b.branch(done)
    b.position_at_end(done)


def _sums(b: Builder, vectors: Sequence[Value]) -> Value:
    """The sums of 16 vectors: lane i is the sum of the lanes of vectors[i].

    Each step adds the halves of two vectors' segments. Processors move quarters of a vector, or
    inside them, in one instruction each, so two steps do the one and two the other. These leave in
    place j of quarter i what began as vector i + 4 j.
    """
    both = range(2 * V)
    inside = [
        i + 4 * quarter + V * which for quarter in range(4) for which in (0, 1) for i in range(4)
    ]
    vectors = [vectors[4 * (i % 4) + i // 4] for i in range(V)]
    for order, bit in ((both, 8), (both, 4), (inside, 2), (inside, 1)):
        low, high = ([i for i in order if bool(i & bit) == upper] for upper in (False, True))
        masks = ir.lanes(ir.i32, low), ir.lanes(ir.i32, high)
        pairs = zip(vectors[::2], vectors[1::2], strict=True)
        vectors = [ir.add(b, *(b.shuffle_vector(x, y, mask) for mask in masks)) for x, y in pairs]
    return vectors[0]


def _over_heads(b: Builder, x: Value, U: int, join: Callable) -> Value:
    """Join all lanes of the same head, lane i being head i % U; every lane gets the result."""
    distance = V // 2
    while distance >= U:
        x = join(b, x, ir.pick(b, x, [(i + distance) % V for i in range(V)]))
        distance //= 2
    return x


# ---- the three loops --------------------------------------------------------------------------


@intrinsic
def _products(typingctx, U, code, q, heads, k, n, H, following, out):
    """Write the products of U heads with n keys: of key s and head g at out[s * U + g].

    Whole vectors of H alone count, and 16 products are written at a time: where heads or keys are
    missing, the last is repeated. following: address of what will be wanted after the last key.
    """

    def codegen(context, b, signature, arguments):
        U, code, q, heads, k, n, H, following, out = arguments

        def emit(U: int, code: int) -> None:
            kind, keys = FORMATS[code], V // U
            row_bytes = ir.at(b, const(0), kind.nbytes, H)
            q_rows = _rows(b, q, ir.at(b, const(0), 4, H), heads, U)
            ahead = b.add(b.udiv(const(AHEAD), row_bytes), const(1))

            def tile(s: Value, _: list[Value]) -> list[Value]:
                k_rows = _rows(b, b.add(k, b.mul(s, row_bytes)), row_bytes, b.sub(n, s), keys)
                soon = _soon(b, k, following, b.add(s, ahead), n, row_bytes)

                def column(h: Value, sums: list[Value]) -> list[Value]:
                    queries = [ir.load_f32(b, row, h) for row in q_rows]
                    fetched, new = ir.at(b, soon, kind.nbytes * keys, h), []
                    for i, row in enumerate(k_rows):
                        _fetch(b, fetched, i, kind.nbytes)
                        key = kind.load(b, row, h, V)
                        so_far = sums[i * U : i * U + U]
                        new += [ir.fma(b, key, *pair) for pair in zip(queries, so_far, strict=True)]
                    return new

                whole = b.and_(H, const(-V))
                sums = ir.loop(b, const(0), whole, V, [every(ir.f32, 0)] * V, column)
                ir.store(b, _sums(b, sums), ir.at(b, out, 4 * U, s))
                return []

            ir.loop(b, const(0), n, keys, [], tile)

        _specialise(b, [(U, TILES), (code, FORMATS)], emit)
        return context.get_dummy_value()

    return types.void(*(ADDRESS,) * 9), codegen


@intrinsic
def _exponentials(typingctx, U, scores, count, scale, heads, stride, part):
    """Turn scores into exp(scale * score - m), with m the largest of each head; write m and z.

    count: of the scores, U for each key; from there to a whole vector they are -inf.
    """

    def codegen(context, b, signature, arguments):
        U, scores, count, scale, heads, stride, part = arguments

        def emit(U: int) -> None:
            scales = ir.splat(b, scale)

            def largest(i: Value, found: list[Value]) -> list[Value]:
                return [_larger(b, ir.load_f32(b, scores, i), found[0])]

            found = ir.loop(b, const(0), count, V, [every(ir.f32, -inf)], largest)
            m = ir.multiply(b, _over_heads(b, found[0], U, _larger), scales)

            def power(i: Value, sums: list[Value]) -> list[Value]:
                score = ir.multiply(b, ir.load_f32(b, scores, i), scales)
                power = emit_exp(b, b.fsub(score, m))
                ir.store(b, power, ir.at(b, scores, 4, i))
                return [ir.add(b, power, sums[0])]

            sums = ir.loop(b, const(0), count, V, [every(ir.f32, 0)], power)
            z = _over_heads(b, sums[0], U, ir.add)
            for g, head in enumerate(_rows(b, part, stride, heads, U)):
                ir.store(b, b.extract_element(m, const(g)), head)
                ir.store(b, b.extract_element(z, const(g)), ir.at(b, head, 4))

        _specialise(b, [(U, TILES)], emit)
        return context.get_dummy_value()

    arguments = [ADDRESS] * 3 + [types.float32] + [ADDRESS] * 3
    return types.void(*arguments), codegen


@intrinsic
def _add_values(typingctx, width, U, code, weights, v, rows, H, heads, stride, fetch, out):
    """Add weighted rows to some columns of U heads: out[g] += sum of weights[i, g] * v[i].

    v: address of the first row's first column; out: of the same column of the first head, and
    the others' stride bytes apart. fetch: address of the values that will be wanted soon.
    """

    def codegen(context, b, signature, arguments):
        width, U, code, weights, v, rows, H, heads, stride, fetch, out = arguments

        def emit(width: int, U: int, code: int) -> None:
            kind, size, lanes = FORMATS[code], FORMATS[code].nbytes, min(width, V)
            count, row_bytes = width // lanes, ir.at(b, const(0), size, H)
            outs = [
                ir.at(b, head, 4 * V, c)
                for head in _rows(b, out, stride, heads, U)
                for c in range(count)
            ]

            def row(i: Value, sums: list[Value]) -> list[Value]:
                offset, values = b.mul(i, row_bytes), []
                at, soon = b.add(v, offset), b.add(fetch, offset)
                for c in range(count):
                    _fetch(b, soon, c, size)
                    values.append(kind.load(b, at, const(V * c), lanes))
                powers = ir.at(b, weights, 4 * U, i)
                splats = [
                    ir.splat(b, ir.load(b, ir.at(b, powers, 4, g), ir.f32), lanes) for g in range(U)
                ]
                terms = [(power, value) for power in splats for value in values]
                return [ir.fma(b, *term, total) for term, total in zip(terms, sums, strict=True)]

            before = [ir.load(b, at, vector(ir.f32, lanes)) for at in outs]
            sums = ir.loop(b, const(0), rows, 1, before, row)
            for at, total in zip(outs, sums, strict=True):
                ir.store(b, total, at)

        _specialise(b, [(width, WIDTHS), (U, TILES), (code, FORMATS)], emit)
        return context.get_dummy_value()

    return types.void(*(ADDRESS,) * 11), codegen


# ---- a part -----------------------------------------------------------------------------------


@intrinsic
def _floats(typingctx, address):
    """The float32 at an address, as a pointer."""

    def codegen(context, b, signature, arguments):
        return b.inttoptr(arguments[0], context.get_value_type(signature.return_type))

    return types.CPointer(types.float32)(ADDRESS), codegen


@jit
def _size(kv_code):
    """Bytes of a number."""
    return 4 if kv_code == F32 else 2


@jit
def _scores(U, kv_code, q, heads, k, n, H, following, scores):
    """Write the products of U heads with n keys, and -inf from there to a whole vector."""
    _products(U, kv_code, q, heads, k, n, H, following, scores)
    to, size, whole = _floats(scores), _size(kv_code), H // V * V
    for i in range(n * U if whole < H else 0):
        s, g = i // U, min(i % U, heads - 1)
        row, query = k + (s * H + whole) * size, q + (g * H + whole) * 4
        to[i] += row_dot(kv_code, row, query, H - whole)
    for i in range(n * U, (n * U + V - 1) // V * V):
        to[i] = -inf


@jit
def _values(U, kv_code, weights, v, n, H, heads, following, out):
    """Write to out[g, 0..H-1] the sum of weights[s * U + g] * v[s], over n rows of values."""
    stride, size = 4 * (H + 2), _size(kv_code)
    row_bytes = H * size
    for g in range(heads):
        row = _floats(out + g * stride)
        for h in range(H):
            row[h] = 0
    run, ahead = RUN // H + 1, AHEAD // row_bytes + 1
    for s in range(0, n, run):
        at, rows, weight, h = v + s * row_bytes, min(run, n - s), weights + 4 * s * U, 0
        soon = s + ahead
        soon = v + soon * row_bytes if soon < n else following + (soon - n) * row_bytes
        while h < H:
            rest = H - h
            width = 64 if rest >= 64 else 32 if rest >= 32 else 16 if rest >= 16 else 1
            here, next, to = at + h * size, soon + h * size, out + 4 * h
            _add_values(width, U, kv_code, weight, here, rows, H, heads, stride, next, to)
            h += width


@jit
def attend_part(q, k, v, kv_code, first, stop, G, H, part, scratch):
    """Attend with G heads to the slots first <= s < stop, at most SPLIT of them and at least one.

    q: address of G rows of H float32, turned by RoPE; k, v: of the [S, H] keys and values of this
    row and key/value head, contiguous, in the format kv_code.
    part: address of G * (H + 2) float32 to write. Each head's: the largest score m, the sum z of
    exp(score - m), then H sums of exp(score - m) * value.
    scratch: address of SCRATCH float32 that nobody else writes meanwhile.
    """
    n, row_bytes, stride = stop - first, H * _size(kv_code), 4 * (H + 2)
    scale = np.float32(1 / sqrt(H))
    keys, values = k + first * row_bytes, v + first * row_bytes
    for g in range(0, G, 4):
        heads, out = min(4, G - g), part + g * stride
        U = 4 if heads > 2 else heads
        _scores(U, kv_code, q + 4 * g * H, heads, keys, n, H, values, scratch)
        _exponentials(U, scratch, n * U, scale, heads, stride, out)
        # What follows is, as far as can be known here, the keys of the next part.
        _values(U, kv_code, scratch, values, n, H, heads, keys + n * row_bytes, out + 8)


@jit
def combine(parts, n_parts, part_stride, G, H, out):
    """Merge what n_parts calls of attend_part wrote, part_stride bytes apart, into the softmax.

    out: address of G * H float32 to write: for each head its mean of the values.
    """
    for g in range(G):
        at, mean = parts + 4 * g * (H + 2), _floats(out + 4 * g * H)
        largest, total = np.float32(-inf), np.float32(0)
        for i in range(n_parts):
            largest = max(largest, _floats(at + i * part_stride)[0])
        for h in range(H):
            mean[h] = 0
        for i in range(n_parts):
            part = _floats(at + i * part_stride)
            weight = exp_f32(part[0] - largest)
            total += weight * part[1]
            for h in range(H):
                mean[h] += weight * part[2 + h]
        for h in range(H):
            mean[h] /= total


# ---- one row of a head ------------------------------------------------------------------------


@intrinsic
def _product(typingctx, x, y):
    """The product, rounded: never half of a fused multiply-add, which would not round it."""

    def codegen(context, b, signature, arguments):
        return ir.multiply(b, *arguments)

    return types.float32(types.float32, types.float32), codegen


@jit
def turn_row(x, cos, sin, H, interleaved):
    """Turn one row by RoPE in place, to the bits of model.rope.

    x: address of H float32; cos, sin: of H / 2 float32, of the row's position.
    interleaved: pairs (x[2i], x[2i+1]) if true, else (x[i], x[i + H/2]).
    """
    P = H // 2
    step, distance = (2, 1) if interleaved else (1, P)
    a, b, c, s = _floats(x), _floats(x + 4 * distance), _floats(cos), _floats(sin)
    for i in range(P):
        old_a, old_b = a[i * step], b[i * step]
        a[i * step] = _product(old_a, c[i]) - _product(old_b, s[i])
        b[i * step] = _product(old_a, s[i]) + _product(old_b, c[i])


def _narrow_bf16(b: Builder, x: Value) -> Value:
    """Float32 as bfloat16, rounded to nearest even; nan as ml_dtypes has it, 0x7fc0."""
    count = x.type.count

    def number(n: int) -> Value:
        return every(ir.i32, n, count)

    bits = b.bitcast(x, vector(ir.i32, count))
    upper = b.lshr(bits, number(16))
    # Just under half of the last place, or half if it is odd, carries into it where it should.
    half = b.add(number(0x7FFF), b.and_(upper, number(1)))
    rounded = b.lshr(b.add(bits, half), number(16))
    nan = b.or_(b.and_(upper, number(0x8000)), number(0x7FC0))
    narrow = b.select(b.fcmp_unordered("uno", x, x), nan, rounded)
    return b.trunc(narrow, vector(ir.i16, count))


def _narrow_f16(b: Builder, x: Value) -> Value:
    """Float32 as float16, rounded to nearest even; of a nan the upper bits, as NumPy has it."""
    count = x.type.count

    def number(n: int) -> Value:
        return every(ir.i32, n, count)

    bits = b.bitcast(x, vector(ir.i32, count))
    size = b.and_(bits, number(0x7FFFFFFF))
    half = b.add(number(0x0FFF), b.and_(b.lshr(size, number(13)), number(1)))
    normal = b.sub(b.lshr(b.add(size, half), number(13)), number(112 << 10))
    # The last place of 1/2 is the smallest float16, so adding 1/2 rounds the subnormal ones.
    moved = ir.add(b, b.bitcast(size, x.type), every(ir.f32, 0.5, count))
    small = b.sub(b.bitcast(moved, bits.type), number(0x3F000000))
    payload = b.and_(b.lshr(size, number(13)), number(0x3FF))
    payload = b.select(b.icmp_unsigned("==", payload, number(0)), number(1), payload)
    rounded = b.select(b.icmp_unsigned("<", size, number(0x38800000)), small, normal)
    rounded = b.select(b.icmp_unsigned(">=", size, number(0x477FF000)), number(0x7C00), rounded)
    nan = b.or_(number(0x7C00), payload)
    rounded = b.select(b.icmp_unsigned(">", size, number(0x7F800000)), nan, rounded)
    sign = b.and_(b.lshr(bits, number(16)), number(0x8000))
    return b.trunc(b.or_(rounded, sign), vector(ir.i16, count))


@intrinsic
def _copy(typingctx, x, address, H, code):
    """Write H float32 from x to an address, in the format of the cache."""

    def codegen(context, b, signature, arguments):
        x, address, H, code = arguments

        def emit(code: int) -> None:
            narrow = {F16: _narrow_f16, BF16: _narrow_bf16}.get(code, lambda b, row: row)

            def copy(h: Value, lanes: int) -> list[Value]:
                row = ir.load(b, ir.at(b, x, 4, h), vector(ir.f32, lanes))
                ir.store(b, narrow(b, row), ir.at(b, address, FORMATS[code].nbytes, h))
                return []

            whole = b.and_(H, const(-V))
            ir.loop(b, const(0), whole, V, [], lambda h, _: copy(h, V))
            ir.loop(b, whole, H, 1, [], lambda h, _: copy(h, 1))

        _specialise(b, [(code, FORMATS)], emit)
        return context.get_dummy_value()

    return types.void(*(ADDRESS,) * 4), codegen


@jit
def store_row(x, address, H, kv_code):
    """Write H float32 at x to an address, in a format of the cache, as NumPy's cast does."""
    _copy(x, address, H, kv_code)

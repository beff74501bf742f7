"""Attention of one decode step: every query of a group against the cache, in parts.

A part covers at most SPLIT slots of one key/value head; `combine` merges the parts of a head. Where
the cuts are depends on the context alone, so results do not depend on the number of threads.
All functions take addresses (intp). kv_code is ggml's number of the cache's format.

Reading keys and values takes the time, so a row that is read serves all heads of its group: heads
go in tiles of U = 4 (or 2 or 1), with one accumulator for each head and key, or head and column.
"""

from __future__ import annotations

from collections.abc import Callable
from math import inf, sqrt
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from llama3np.kernels.cpu.compiler import jit
from llama3np.kernels.cpu.exp import emit_exp, exp_f32

F32, F16, BF16 = 0, 1, 30
SPLIT = 256  # slots of a part
SCRATCH = 4 * SPLIT  # floats of private memory that attend_part needs

LANES = 16  # of a vector; the compiler cuts it to the processor's size
TILES = (1, 2, 4)  # heads that are done at once, U
WIDTHS = (4, 2, 1)  # vectors of a value's row that are done at once, C
AHEAD = 16  # rows between the one that is used and the one that is fetched
RUN = 32  # rows whose values stay in the nearest cache while their columns are done in turn

I16, I32, I64, FLOAT = ir.IntType(16), ir.IntType(32), ir.IntType(64), ir.FloatType()
FLOATS = ir.VectorType(FLOAT, LANES)
ELEMENTS = {F32: (FLOAT, 4), F16: (ir.HalfType(), 2), BF16: (I16, 2)}  # type and bytes of each

# ---- pieces of vector code --------------------------------------------------------------------


def _const(value: int, kind: Any = I64) -> Any:
    return ir.Constant(kind, value)


def _same(kind: Any, value: Any) -> Any:
    """A constant vector, of one value in every lane."""
    return ir.Constant(ir.VectorType(kind, LANES), [value] * LANES)


def _spread(b: Any, scalar: Any) -> Any:
    """A run-time value in every lane."""
    empty = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    first = b.insert_element(empty, scalar, _const(0, I32))
    return b.shuffle_vector(first, empty, _same(I32, 0))


def _offset(b: Any, address: Any, count: Any, size: int) -> Any:
    return b.add(address, b.mul(count, _const(size)))


def _pointer(b: Any, address: Any, kind: Any) -> Any:
    return b.inttoptr(address, ir.PointerType(kind))


def _load(b: Any, address: Any, kind: Any = FLOATS) -> Any:
    return b.load(_pointer(b, address, kind), align=1)


def _store(b: Any, value: Any, address: Any) -> None:
    b.store(value, _pointer(b, address, value.type), align=1)


def _load_stored(b: Any, address: Any, code: int, lanes: int = LANES) -> Any:
    """Numbers in the format of the cache, as float32: a vector of them, or one if lanes is 1."""

    def shaped(kind: Any) -> Any:
        return ir.VectorType(kind, lanes) if lanes > 1 else kind

    value = _load(b, address, shaped(ELEMENTS[code][0]))
    if code == F16:
        return b.fpext(value, shaped(FLOAT))
    if code == BF16:  # the upper half of a float32
        wide = b.zext(value, shaped(I32))
        places = ir.Constant(wide.type, [16] * lanes if lanes > 1 else 16)
        return b.bitcast(b.shl(wide, places), shaped(FLOAT))
    return value


def _fetch(b: Any, address: Any) -> None:
    """Ask for a cache line that will be read soon; any address may be given."""
    pointer = _pointer(b, address, ir.IntType(8))
    kind = ir.FunctionType(ir.VoidType(), [pointer.type, I32, I32, I32])
    prefetch = b.module.declare_intrinsic("llvm.prefetch", [pointer.type], kind)
    read, keep, data = 0, 3, 1
    b.call(prefetch, [pointer, _const(read, I32), _const(keep, I32), _const(data, I32)])


def _multiply_add(b: Any, x: Any, y: Any, z: Any) -> Any:
    return b.fadd(b.fmul(x, y), z)  # contracted, as kernels are compiled


def _larger(b: Any, x: Any, y: Any) -> Any:
    """The larger lanes; where x is nan, y."""
    return b.select(b.fcmp_ordered(">", x, y), x, y)


def _least(b: Any, x: Any, y: Any) -> Any:
    return b.select(b.icmp_signed("<", x, y), x, y)


def _rows(b: Any, address: Any, stride: Any, count: Any, n: int) -> list[Any]:
    """Addresses of n rows; the last one again where there are fewer, count."""
    last = b.sub(count, _const(1))
    return [b.add(address, b.mul(_least(b, _const(i), last), stride)) for i in range(n)]


def _choose(b: Any, key: Any, bodies: dict[int, Callable[[], None]]) -> None:
    """Emit all bodies, and a jump to the one of the key."""
    done = b.append_basic_block("done")
    switch = b.switch(key, done)
    for number, body in bodies.items():
        block = b.append_basic_block(f"case{number}")
        switch.add_case(number, block)
        b.position_at_end(block)
        body()
        b.branch(done)
    b.position_at_end(done)


def _variables(b: Any, count: int) -> list[Any]:
    """Vectors that change in a loop; the compiler keeps them in registers."""
    return [cgutils.alloca_once(b, FLOATS) for _ in range(count)]


def _sums(b: Any, vectors: list[Any]) -> Any:
    """The sums of 16 vectors: lane i is the sum of the lanes of vectors[i]."""
    # The first two steps move quarters of a vector, the last two stay inside them: one instruction
    # for each. The result's quarter l has in place j what was vector l + 4 j.
    vectors = [vectors[4 * (i % 4) + i // 4] for i in range(LANES)]
    low = [[*range(8)], [0, 1, 2, 3, 8, 9, 10, 11]]
    high = [[*range(8, 16)], [4, 5, 6, 7, 12, 13, 14, 15]]
    steps = [(one + [LANES + i for i in one], two + [LANES + i for i in two]) for one, two in zip(low, high)]
    inside = [([0, 1, 16, 17], [2, 3, 18, 19]), ([0, 2, 16, 18], [1, 3, 17, 19])]
    steps += [
        tuple([4 * quarter + i for quarter in range(4) for i in half] for half in halves)
        for halves in inside
    ]
    for one, two in steps:
        masks = [ir.Constant(ir.VectorType(I32, LANES), mask) for mask in (one, two)]
        vectors = [
            b.fadd(*(b.shuffle_vector(x, y, mask) for mask in masks))
            for x, y in zip(vectors[::2], vectors[1::2], strict=True)
        ]
    return vectors[0]


def _over_heads(b: Any, x: Any, U: int, join: Callable) -> Any:
    """Join all lanes of the same head, lane i being head i % U; every lane gets the result."""
    distance = LANES // 2
    while distance >= U:
        turned = ir.Constant(
            ir.VectorType(I32, LANES), [(i + distance) % LANES for i in range(LANES)]
        )
        x = join(b, x, b.shuffle_vector(x, x, turned))
        distance //= 2
    return x


# ---- the three loops --------------------------------------------------------------------------


@intrinsic
def _score_tile(typingctx, U, code, q, heads, k, rows, H, out):
    """Write the products of U heads with 16 / U keys, of whole vectors, to out: 16 float32.

    Keys first: key i and head g have place i * U + g. Places beyond heads and rows repeat the last.
    """

    def codegen(context, b, signature, args):
        U, code, q, heads, k, rows, H, out = args

        def tile(U: int, code: int) -> None:
            size = ELEMENTS[code][1]
            q_rows = _rows(b, q, b.mul(H, _const(4)), heads, U)
            row_bytes = b.mul(H, _const(size))
            k_rows = _rows(b, k, row_bytes, rows, LANES // U)
            ahead = b.mul(row_bytes, _const(AHEAD))
            sums = _variables(b, LANES)
            for total in sums:
                b.store(_same(FLOAT, 0.0), total)
            with cgutils.for_range(b, b.sdiv(H, _const(LANES))) as loop:
                q_G = [_load(b, _offset(b, row, loop.index, 4 * LANES)) for row in q_rows]
                for i, row in enumerate(k_rows):
                    at = _offset(b, row, loop.index, size * LANES)
                    _fetch(b, b.add(at, ahead))
                    key = _load_stored(b, at, code)
                    for g, query in enumerate(q_G):
                        total = sums[i * U + g]
                        b.store(_multiply_add(b, key, query, b.load(total)), total)
            _store(b, _sums(b, [b.load(total) for total in sums]), out)

        bodies = {
            _key(n, format): (lambda n=n, format=format: tile(n, format))
            for n in TILES
            for format in ELEMENTS
        }
        _choose(b, b.add(b.mul(U, _const(32)), code), bodies)
        return context.get_dummy_value()

    return types.void(*(types.intp,) * 8), codegen


def _key(U: int, code: int, C: int = 0) -> int:
    return 256 * C + 32 * U + code


@intrinsic
def _exponentials(typingctx, U, scores, count, scale, heads, stride, part):
    """Turn scores into exp(scale * score - m), with m the largest of each head; write m and z.

    count: of the scores, U for each key; from there to a whole vector zeros are written.
    """

    def codegen(context, b, signature, args):
        U, scores, count, scale, heads, stride, part = args

        def tile(U: int) -> None:
            vectors = b.sdiv(b.add(count, _const(LANES - 1)), _const(LANES))
            (largest,), (total,) = _variables(b, 1), _variables(b, 1)
            b.store(_same(FLOAT, -inf), largest)
            with cgutils.for_range(b, vectors) as loop:
                score = _load(b, _offset(b, scores, loop.index, 4 * LANES))
                b.store(_larger(b, score, b.load(largest)), largest)
            scales = _spread(b, scale)
            top = b.fmul(_over_heads(b, b.load(largest), U, _larger), scales)
            b.store(_same(FLOAT, 0.0), total)
            places = ir.Constant(ir.VectorType(I64, LANES), list(range(LANES)))
            with cgutils.for_range(b, vectors) as loop:
                at = _offset(b, scores, loop.index, 4 * LANES)
                power = emit_exp(b, b.fsub(b.fmul(_load(b, at), scales), top))
                left = _spread(b, b.sub(count, b.mul(loop.index, _const(LANES))))
                real = b.icmp_signed("<", places, left)
                power = b.select(real, power, _same(FLOAT, 0.0))
                _store(b, power, at)
                b.store(b.fadd(b.load(total), power), total)
            z = _over_heads(b, b.load(total), U, lambda b, x, y: b.fadd(x, y))
            for g, head in enumerate(_rows(b, part, stride, heads, U)):
                _store(b, b.extract_element(top, _const(g, I32)), head)
                _store(b, b.extract_element(z, _const(g, I32)), b.add(head, _const(4)))

        _choose(b, U, {n: (lambda n=n: tile(n)) for n in TILES})
        return context.get_dummy_value()

    signature = types.void(*(types.intp,) * 3, types.float32, *(types.intp,) * 3)
    return signature, codegen


@intrinsic
def _add_values(typingctx, C, U, code, weights, v, rows, H, heads, stride, out):
    """Add weighted rows to C vectors of each of U heads: out[g] += sum of weights[i, g] * v[i].

    v: address of the first row's first column; out: of the same column of the first head.
    """

    def codegen(context, b, signature, args):
        C, U, code, weights, v, rows, H, heads, stride, out = args

        def tile(C: int, U: int, code: int) -> None:
            size = ELEMENTS[code][1]
            row_bytes = b.mul(H, _const(size))
            ahead = b.mul(row_bytes, _const(AHEAD))
            outs = [
                b.add(head, _const(4 * LANES * c))
                for head in _rows(b, out, stride, heads, U)
                for c in range(C)
            ]
            sums = _variables(b, len(outs))
            for at, total in zip(outs, sums, strict=True):
                b.store(_load(b, at), total)
            with cgutils.for_range(b, rows) as loop:
                row = b.add(v, b.mul(loop.index, row_bytes))
                values = []
                for c in range(C):
                    at = b.add(row, _const(size * LANES * c))
                    _fetch(b, b.add(at, ahead))
                    values.append(_load_stored(b, at, code))
                first = _offset(b, weights, loop.index, 4 * U)
                for g in range(U):
                    weight = _spread(b, _load(b, b.add(first, _const(4 * g)), FLOAT))
                    for c in range(C):
                        total = sums[g * C + c]
                        b.store(_multiply_add(b, weight, values[c], b.load(total)), total)
            for at, total in zip(outs, sums, strict=True):
                _store(b, b.load(total), at)

        bodies = {
            _key(n, format, width): (lambda c=width, n=n, format=format: tile(c, n, format))
            for width in WIDTHS
            for n in TILES
            for format in ELEMENTS
        }
        key = b.add(b.mul(C, _const(256)), b.add(b.mul(U, _const(32)), code))
        _choose(b, key, bodies)
        return context.get_dummy_value()

    return types.void(*(types.intp,) * 10), codegen


# ---- a part -----------------------------------------------------------------------------------


@intrinsic
def _floats(typingctx, address):
    """The float32 at an address, as a pointer."""

    def codegen(context, builder, signature, args):
        return _pointer(builder, args[0], FLOAT)

    return types.CPointer(types.float32)(types.intp), codegen


@intrinsic
def _load_bf16(typingctx, address):
    def codegen(context, b, signature, args):
        return _load_stored(b, args[0], BF16, 1)

    return types.float32(types.intp), codegen


@intrinsic
def _load_f16(typingctx, address):
    def codegen(context, b, signature, args):
        return _load_stored(b, args[0], F16, 1)

    return types.float32(types.intp), codegen


@jit
def _stored(address, i, kv_code):
    """Number i of an array in the format of the cache."""
    if kv_code == F32:
        return _floats(address)[i]
    if kv_code == F16:
        return _load_f16(address + 2 * i)
    return _load_bf16(address + 2 * i)


@jit
def _scores(U, kv_code, q, heads, k, n, H, scores):
    """Write the products of U heads with n keys: score of key s and head g at scores[s * U + g]."""
    row_bytes, keys, whole = H * (4 if kv_code == F32 else 2), LANES // U, H // LANES * LANES
    for s in range(0, n, keys):
        at = k + s * row_bytes
        _score_tile(U, kv_code, q, heads, at, min(keys, n - s), H, scores + 4 * s * U)
    if whole == H:
        return
    to = _floats(scores)
    for s in range(n):
        for g in range(U):
            row = _floats(q + 4 * H * min(g, heads - 1))
            for h in range(whole, H):
                to[s * U + g] += row[h] * _stored(k + s * row_bytes, h, kv_code)


@jit
def _values(U, kv_code, weights, v, n, H, heads, out):
    """Write to out[g, 0..H-1] the sum of weights[s * U + g] * v[s], over n rows of values."""
    stride, size = 4 * (H + 2), 4 if kv_code == F32 else 2
    row_bytes, whole = H * size, H // LANES * LANES
    for g in range(heads):
        row = _floats(out + g * stride)
        for h in range(H):
            row[h] = 0
    for s in range(0, n, RUN):
        rows, at, weight, column = min(RUN, n - s), v + s * row_bytes, weights + 4 * s * U, 0
        while column < whole:
            left = (whole - column) // LANES
            C = 4 if left >= 4 else 2 if left >= 2 else 1
            to = out + 4 * column
            _add_values(C, U, kv_code, weight, at + column * size, rows, H, heads, stride, to)
            column += C * LANES
    power = _floats(weights)
    for g in range(heads if whole < H else 0):
        row = _floats(out + g * stride)
        for s in range(n):
            for h in range(whole, H):
                row[h] += power[s * U + g] * _stored(v + s * row_bytes, h, kv_code)


@jit
def attend_part(q, k, v, kv_code, first, stop, G, H, part, scratch):
    """Attend with G heads to the slots first <= s < stop, at most SPLIT of them and at least one.

    q: address of G rows of H float32, turned by RoPE; k, v: of the [S, H] keys and values of this
    row and key/value head, contiguous, in the format kv_code.
    part: address of G * (H + 2) float32 to write. Each head's: the largest score m, the sum z of
    exp(score - m), then H sums of exp(score - m) * value.
    scratch: address of SCRATCH float32 that nobody else writes meanwhile.
    """
    n, offset = stop - first, first * H * (4 if kv_code == F32 else 2)
    scale, stride = np.float32(1 / sqrt(H)), 4 * (H + 2)
    for g in range(0, G, 4):
        heads, out = min(4, G - g), part + g * stride
        U = 4 if heads > 2 else heads
        _scores(U, kv_code, q + 4 * g * H, heads, k + offset, n, H, scratch)
        _exponentials(U, scratch, n * U, scale, heads, stride, out)
        _values(U, kv_code, scratch, v + offset, n, H, heads, out + 8)


@jit
def combine(parts, n_parts, part_stride, G, H, out):
    """Merge what n_parts calls of attend_part wrote, part_stride bytes apart, into the softmax.

    out: address of G * H float32 to write: for each head its mean of the values.
    """
    for g in range(G):
        at = parts + 4 * g * (H + 2)
        mean = _floats(out + 4 * g * H)
        largest = np.float32(-inf)
        for i in range(n_parts):
            largest = max(largest, _floats(at + i * part_stride)[0])
        total = np.float32(0)
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


@intrinsic
def _product(typingctx, a, b):
    """a * b, rounded: never the first half of a fused multiply-add, which would not round it."""

    def codegen(context, builder, signature, args):
        # Without any flag numba would give it the function's, "contract" among them. "arcp" is
        # about divisions, so it says nothing of a product.
        return builder.fmul(*args, flags=("arcp",))

    return types.float32(types.float32, types.float32), codegen


@jit
def turn_row(x, cos, sin, H, interleaved):
    """Turn one head row by RoPE in place, to the bits of model.rope.

    x: address of H float32; cos, sin: of H / 2 float32, of the row's position.
    interleaved: pairs (x[2i], x[2i+1]) if true, else (x[i], x[i + H/2]).
    """
    P = H // 2
    a_at, step = x, 4 * P
    stride = 1
    if interleaved:
        step, stride = 4, 2
    a, b, c, s = _floats(a_at), _floats(x + step), _floats(cos), _floats(sin)
    for i in range(P):
        new_a = _product(a[i * stride], c[i]) - _product(b[i * stride], s[i])
        new_b = _product(a[i * stride], s[i]) + _product(b[i * stride], c[i])
        a[i * stride], b[i * stride] = new_a, new_b


@intrinsic
def _store_bf16(typingctx, address, value):
    """Write a float32 as bfloat16, rounded to nearest even; nan as ml_dtypes does, 0x7fc0."""

    def codegen(context, b, signature, args):
        i16, i32 = ir.IntType(16), ir.IntType(32)

        def const(x):
            return ir.Constant(i32, x)

        bits = b.bitcast(args[1], i32)
        upper = b.lshr(bits, const(16))
        # Adding just under half of the last place, and the last bit itself, carries as it should.
        rounded = b.lshr(b.add(bits, b.add(const(0x7FFF), b.and_(upper, const(1)))), const(16))
        nan = b.or_(b.and_(upper, const(0x8000)), const(0x7FC0))
        magnitude = b.and_(bits, const(0x7FFFFFFF))
        is_nan = b.icmp_unsigned(">", magnitude, const(0x7F800000))
        narrow = b.trunc(b.select(is_nan, nan, rounded), i16)
        b.store(narrow, b.inttoptr(args[0], ir.PointerType(i16)), align=1)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32), codegen


@intrinsic
def _store_f16(typingctx, address, value):
    """Write a float32 as float16, rounded to nearest even; nan with its upper bits, as NumPy."""

    def codegen(context, b, signature, args):
        i16, i32 = ir.IntType(16), ir.IntType(32)

        def const(x):
            return ir.Constant(i32, x)

        bits = b.bitcast(args[1], i32)
        rounded = b.bitcast(b.fptrunc(args[1], ir.HalfType()), i16)
        magnitude = b.and_(bits, const(0x7FFFFFFF))
        payload = b.lshr(b.and_(bits, const(0x7FFFFF)), const(13))
        payload = b.select(b.icmp_unsigned("==", payload, const(0)), const(1), payload)
        sign = b.and_(b.lshr(bits, const(16)), const(0x8000))
        nan = b.trunc(b.or_(b.or_(sign, const(0x7C00)), payload), i16)
        is_nan = b.icmp_unsigned(">", magnitude, const(0x7F800000))
        narrow = b.select(is_nan, nan, rounded)
        b.store(narrow, b.inttoptr(args[0], ir.PointerType(i16)), align=1)
        return context.get_dummy_value()

    return types.void(types.intp, types.float32), codegen


@jit
def store_row(x, address, H, kv_code):
    """Write H float32 at x into the cache at an address, in its format, as NumPy's cast does."""
    row = _floats(x)
    if kv_code == F32:
        to = _floats(address)
        for h in range(H):
            to[h] = row[h]
    elif kv_code == F16:
        for h in range(H):
            _store_f16(address + 2 * h, row[h])
    else:
        for h in range(H):
            _store_bf16(address + 2 * h, row[h])

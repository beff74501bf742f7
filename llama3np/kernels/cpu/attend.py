"""Attention of one decode step: every query of a group against the cache, in parts.

A part covers at most SPLIT slots of one key/value head; `combine` merges the parts of a head. Where
the cuts are depends on the context alone, so results do not depend on the number of threads.
All functions take addresses (intp). kv_code is ggml's number of the cache's format.
"""

from __future__ import annotations

from math import inf, sqrt

import numba
import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from llama3np.kernels.cpu.compiler import jit

F32, F16, BF16 = 0, 1, 30
SPLIT = 256  # slots of a part
SCRATCH = 4 * SPLIT  # floats of private memory that attend_part needs


@intrinsic
def _floats(typingctx, address):
    """The float32 at an address, as a pointer."""

    def codegen(context, builder, signature, args):
        return builder.inttoptr(args[0], ir.PointerType(ir.FloatType()))

    return types.CPointer(types.float32)(types.intp), codegen


@intrinsic
def _load_bf16(typingctx, address):
    def codegen(context, b, signature, args):
        i16, i32 = ir.IntType(16), ir.IntType(32)
        bits = b.load(b.inttoptr(args[0], ir.PointerType(i16)), align=1)
        return b.bitcast(b.shl(b.zext(bits, i32), ir.Constant(i32, 16)), ir.FloatType())

    return types.float32(types.intp), codegen


@intrinsic
def _load_f16(typingctx, address):
    def codegen(context, b, signature, args):
        half = b.load(b.inttoptr(args[0], ir.PointerType(ir.HalfType())), align=1)
        return b.fpext(half, ir.FloatType())

    return types.float32(types.intp), codegen


@jit
def _stored(address, i, kv_code):
    if kv_code == F32:
        return _floats(address)[i]
    if kv_code == F16:
        return _load_f16(address + 2 * i)
    return _load_bf16(address + 2 * i)


@jit
def attend_part(q, k, v, kv_code, first, stop, G, H, part, scratch):
    """Attend with G heads to the slots first <= s < stop, at most SPLIT of them.

    q: address of G rows of H float32, turned by RoPE; k, v: of the [S, H] keys and values of this
    row and key/value head, contiguous, in the format kv_code.
    part: address of G * (H + 2) float32 to write. Each head's: the largest score m, the sum z of
    exp(score - m), then H sums of exp(score - m) * value.
    scratch: address of SCRATCH float32 that nobody else writes meanwhile.
    """
    size = 4 if kv_code == F32 else 2
    scores = _floats(scratch)
    scale = np.float32(1 / sqrt(H))
    for g in range(G):
        row, out = _floats(q + 4 * g * H), _floats(part + 4 * g * (H + 2))
        largest = np.float32(-inf)
        for s in range(first, stop):
            score = np.float32(0)
            for h in range(H):
                score += row[h] * _stored(k + s * H * size, h, kv_code)
            scores[s - first] = score * scale
            largest = max(largest, scores[s - first])
        out[0], out[1] = largest, 0
        for h in range(H):
            out[2 + h] = 0
        for s in range(first, stop):
            power = np.exp(scores[s - first] - largest)
            out[1] += power
            for h in range(H):
                out[2 + h] += power * _stored(v + s * H * size, h, kv_code)


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
            weight = np.exp(part[0] - largest)
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

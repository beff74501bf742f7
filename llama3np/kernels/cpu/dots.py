"""Products of stored rows of weights with float32 vectors, and their widening."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir as llvm
from numba import types
from numba.extending import intrinsic

from llama3np.kernels.cpu import ir
from llama3np.kernels.cpu.compiler import jit
from llama3np.kernels.cpu.ir import Builder, Value, f32, i16, vector
from llama3np.kernels.ggml import FORMATS

ADDRESS = types.intp
ACCUMULATORS = 4  # sums in flight: a sum of products takes 4 cycles, and two begin in each

F32, F16, BF16 = (FORMATS[name].number for name in ("F32", "F16", "BF16"))


def _as_is(b: Builder, values: Value) -> Value:
    return values


def plain_dot(stored: Any, widen: Callable[[Builder, Value], Value]) -> Any:
    """The product of a row of numbers and a row of float32: dot(row, x, n), any n."""
    size = {f32: 4, i16: 2}[stored]

    @intrinsic
    def dot(typingctx, row, x, n):
        def codegen(context, b, signature, arguments):
            row, x, n = arguments

            def product(i: Value, sum_: Value, lanes: int) -> Value:
                w = widen(b, ir.load(b, ir.at(b, row, size, i), vector(stored, lanes)))
                return ir.fma(b, w, ir.load(b, ir.at(b, x, 4, i), vector(f32, lanes)), sum_)

            def many(i: Value, sums: list[Value]) -> list[Value]:
                starts = [b.add(i, ir.const(ir.V * u)) for u in range(ACCUMULATORS)]
                return [product(start, s, ir.V) for start, s in zip(starts, sums, strict=True)]

            zero, step = ir.const(0), ir.V * ACCUMULATORS
            whole = b.and_(n, ir.const(-step))
            sums = ir.loop(b, zero, whole, step, [ir.every(f32, 0)] * ACCUMULATORS, many)
            full = b.and_(n, ir.const(-ir.V))
            one = ir.loop(
                b, whole, full, ir.V, [ir.tree(b, sums)], lambda i, s: [product(i, s[0], ir.V)]
            )
            rest = ir.loop(
                b, full, n, 1, [ir.every(f32, 0, 1)], lambda i, s: [product(i, s[0], 1)]
            )
            tail = b.extract_element(rest[0], llvm.Constant(ir.i32, 0))
            return ir.add(b, ir.total(b, one[0]), tail)

        return types.float32(ADDRESS, ADDRESS, ADDRESS), codegen

    return dot


dot_f32 = plain_dot(f32, _as_is)
dot_f16 = plain_dot(i16, ir.widen_f16)
dot_bf16 = plain_dot(i16, ir.widen_bf16)


@jit
def row_dot(code, row, x, n, scratch):
    """The product of a stored row and a float32 vector of n numbers, both given by address.

    `code` is ggml's number of the format; `scratch` the address of n floats of the caller's.
    """
    if code == BF16:
        return dot_bf16(row, x, n)
    if code == F16:
        return dot_f16(row, x, n)
    return dot_f32(row, x, n)

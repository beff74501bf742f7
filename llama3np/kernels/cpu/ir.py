"""Vector code for numba's intrinsics, for loops that LLVM does not vectorise by itself.

Vectors have V lanes whatever the processor: LLVM cuts or pads them to what there is. Addresses are
64-bit integers without alignment. Each function takes the builder `b` first and gives the value.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

import llvmlite.binding
import numba.core.config
from llvmlite import ir
from numba.core import cgutils

Value = Any  # of LLVM: a register, so to speak
Builder = Any

V = 16
i1, i8, i16, i32, i64 = (ir.IntType(bits) for bits in (1, 8, 16, 32, 64))
f16, f32 = ir.HalfType(), ir.FloatType()

# numba gives its own flags to sums and products that have none. "arcp" is about division alone,
# so it means: rounded as written, neither reordered nor contracted.
STRICT = ("arcp",)


def vector(element: Any, lanes: int = V) -> Any:
    """The type of a vector."""
    return ir.VectorType(element, lanes)


def host_has(feature: str) -> bool:
    """Whether numba compiles for processors with this feature, in LLVM's spelling."""
    chosen = numba.core.config.CPU_FEATURES  # set by NUMBA_CPU_FEATURES or NUMBA_CPU_NAME=generic
    features = llvmlite.binding.get_host_cpu_features().flatten() if chosen is None else chosen
    return f"+{feature}" in features.split(",")


# ---- constants, addresses, memory ------------------------------------------------------------


def const(number: int) -> Value:
    """A 64-bit integer."""
    return ir.Constant(i64, number)


def lanes(element: Any, numbers: Sequence[float]) -> Value:
    """A constant vector."""
    return ir.Constant(vector(element, len(numbers)), list(numbers))


def every(element: Any, number: float, count: int = V) -> Value:
    """A constant vector of one number."""
    return lanes(element, [number] * count)


def at(b: Builder, address: Value, stride: int, index: Value | int = 1) -> Value:
    """Address + stride * index."""
    if isinstance(index, int):
        return b.add(address, const(stride * index))
    return b.add(address, b.mul(index, const(stride)))


def load(b: Builder, address: Value, kind: Any) -> Value:
    """A scalar or vector that may lie anywhere."""
    return b.load(b.inttoptr(address, ir.PointerType()), typ=kind, align=1)


def load_f32(b: Builder, row: Value, i: Value, count: int = V) -> Value:
    """float32 numbers of a row, from the i-th."""
    return load(b, at(b, row, 4, i), vector(f32, count))


def store(b: Builder, value: Value, address: Value) -> None:
    """Write a scalar or vector anywhere."""
    b.store(value, b.inttoptr(address, ir.PointerType()), align=1)


def reserve(b: Builder, count: int) -> Value:
    """The address of `count` bytes on the stack, for as long as the function runs."""
    with b.goto_entry_block():  # not numba's own helper, which fills with zeros at each call
        kept = b.alloca(ir.ArrayType(i8, count))
        kept.align = 64
    return b.ptrtoint(kept, i64)


def prefetch(b: Builder, address: Value) -> None:
    """Ask for the cache line of an address, which need not exist."""
    kind = ir.FunctionType(ir.VoidType(), [ir.PointerType(), i32, i32, i32])
    function = cgutils.get_or_insert_function(b.module, kind, "llvm.prefetch.p0")
    read, keep, data = (ir.Constant(i32, number) for number in (0, 3, 1))
    b.call(function, [b.inttoptr(address, ir.PointerType()), read, keep, data])


# ---- lanes -----------------------------------------------------------------------------------


def pick(b: Builder, value: Value, numbers: Sequence[int]) -> Value:
    """The vector of the given lanes of a vector."""
    return b.shuffle_vector(value, ir.Constant(value.type, ir.Undefined), lanes(i32, numbers))


def splat(b: Builder, scalar: Value, count: int = V) -> Value:
    """The scalar in every lane."""
    nothing = ir.Constant(vector(scalar.type, count), ir.Undefined)
    first = b.insert_element(nothing, scalar, ir.Constant(i32, 0))
    return pick(b, first, [0] * count)


def look_up(b: Builder, table: Value, index: Value) -> Value:
    """table[index & 15] of a table of 16 float32, with AVX-512 alone."""
    kind = ir.FunctionType(table.type, [table.type, index.type])
    name = "llvm.x86.avx512.permvar.sf.512"
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), [table, index])


def total(b: Builder, value: Value) -> Value:
    """The sum of the lanes of a float32 vector, in pairs of pairs."""
    kind = ir.FunctionType(f32, [f32, value.type])
    name = f"llvm.vector.reduce.fadd.v{value.type.count}f32"
    function = cgutils.get_or_insert_function(b.module, kind, name)
    return b.call(function, [ir.Constant(f32, -0.0), value], fastmath=("reassoc",))


def fold(b: Builder, x: Value, y: Value, width: int) -> Value:
    """Add pairs of runs of `width` lanes, of x and then of y: a step of summing many vectors."""
    runs = [range(start, start + width) for start in range(0, 2 * V, width)]
    even, odd = ([lane for run in part for lane in run] for part in (runs[::2], runs[1::2]))
    return add(b, *(b.shuffle_vector(x, y, lanes(i32, part)) for part in (even, odd)))


# ---- arithmetic ------------------------------------------------------------------------------


def exclusive_or(b: Builder, value: Value) -> Value:
    """All lanes of a 64-bit integer vector in one number."""
    kind = ir.FunctionType(i64, [value.type])
    name = f"llvm.vector.reduce.xor.v{value.type.count}i64"
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), [value])


def add(b: Builder, x: Value, y: Value) -> Value:
    """Floats x + y."""
    return b.fadd(x, y, flags=STRICT)


def multiply(b: Builder, x: Value, y: Value) -> Value:
    """Floats x * y."""
    return b.fmul(x, y, flags=STRICT)


def fma(b: Builder, x: Value, y: Value, z: Value) -> Value:
    """Float32 vectors x * y + z, rounded once where the processor can."""
    kind = ir.FunctionType(x.type, [x.type] * 3)
    name = f"llvm.fmuladd.v{x.type.count}f32"
    return b.call(cgutils.get_or_insert_function(b.module, kind, name), [x, y, z])


def tree(b: Builder, values: Sequence[Value]) -> Value:
    """The sum of vectors, in pairs of pairs."""
    while len(values) > 1:
        pairs = zip(values[::2], values[1::2], strict=True)
        values = [add(b, x, y) for x, y in pairs]
    return values[0]


# ---- widening --------------------------------------------------------------------------------

HALF_IS_HARDWARE = platform.machine().lower() in ("aarch64", "arm64") or host_has("f16c")


def widen_bf16(b: Builder, bits: Value) -> Value:
    """A vector of bfloat16 (as 16-bit integers) as float32: the upper half of the bits."""
    count = bits.type.count
    wide = b.shl(b.zext(bits, vector(i32, count)), every(i32, 16, count))
    return b.bitcast(wide, vector(f32, count))


def widen_f16(b: Builder, bits: Value) -> Value:
    """A vector of float16 (as 16-bit integers) as float32."""
    count = bits.type.count
    if HALF_IS_HARDWARE:
        return b.fpext(b.bitcast(bits, vector(f16, count)), vector(f32, count))
    return _widen_f16_by_integers(b, bits)


def _widen_f16_by_integers(b: Builder, bits: Value) -> Value:
    """Without the instruction LLVM would call a function that nobody provides."""
    count = bits.type.count
    wide = b.zext(bits, vector(i32, count))
    size = b.shl(b.and_(wide, every(i32, 0x7FFF, count)), every(i32, 13, count))
    sign = b.shl(b.and_(wide, every(i32, 0x8000, count)), every(i32, 16, count))
    # The exponents differ by 112, and a product sets subnormal numbers right as well.
    number = multiply(b, b.bitcast(size, vector(f32, count)), every(f32, 2.0**112, count))
    huge = b.or_(size, every(i32, 0x7F800000, count))  # inf or nan
    is_huge = b.icmp_unsigned(">=", size, every(i32, 0x0F800000, count))
    magnitude = b.select(is_huge, huge, b.bitcast(number, size.type))
    return b.bitcast(b.or_(magnitude, sign), vector(f32, count))


# ---- loops and choices -----------------------------------------------------------------------


def loop(
    b: Builder,
    start: Value,
    stop: Value,
    step: int,
    carried: Sequence[Value],
    body: Callable[[Value, list[Value]], Sequence[Value]],
) -> list[Value]:
    """Code of: for i in range(start, stop, step): carried = body(i, carried)."""
    before = b.block
    names = ("loop", "body", "after")
    head, inside, after = (b.function.append_basic_block(name) for name in names)
    b.branch(head)
    b.position_at_end(head)
    i, *phis = (b.phi(value.type) for value in (start, *carried))
    for phi, value in zip((i, *phis), (start, *carried), strict=True):
        phi.add_incoming(value, before)
    b.cbranch(b.icmp_signed("<", i, stop), inside, after)
    b.position_at_end(inside)
    new = body(i, phis)
    for phi, value in zip((i, *phis), (b.add(i, const(step)), *new), strict=True):
        phi.add_incoming(value, b.block)
    b.branch(head)
    b.position_at_end(after)
    return phis


Cases = dict[int, Callable[[], Value]]


def choose(b: Builder, number: Value, cases: Cases, otherwise: Value | None = None) -> Value:
    """The value that the case of a run-time number gives; nothing without `otherwise`."""
    results = [(otherwise, b.block)]
    after = b.function.append_basic_block("chosen")
    switch = b.switch(number, after)
    for key, write in cases.items():
        case = b.function.append_basic_block(f"case{key}")
        switch.add_case(const(key), case)
        b.position_at_end(case)
        results.append((write(), b.block))
        b.branch(after)
    b.position_at_end(after)
    if otherwise is None:
        return None
    chosen = b.phi(otherwise.type)
    for value, block in results:
        chosen.add_incoming(value, block)
    return chosen

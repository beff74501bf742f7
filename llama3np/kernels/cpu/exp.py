"""e^x in float32, as instructions that the compiler can do sixteen of at a time.

The exponential of the C library is a call, and a call keeps a loop from being vectorised.
"""

from __future__ import annotations

import math
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

# e^r = 1 + r + r^2 (C[0] + C[1] r + ... + C[4] r^4) for |r| <= ln(2) / 2, to 2^-28: a fit of the
# least largest relative error, so that its terms are near 1/2!, 1/3!, ... but not these.
C = (0.49999994, 0.16666521, 0.04166839, 0.008368745, 0.001381454)
LN2_HIGH = 45426 / 2**16  # 16 bits, so that its product with a whole number of 8 bits is exact
LN2_LOW = math.log(2) - LN2_HIGH
# Added to a number below 2^22 it leaves the nearest whole number in the low bits.
ROUND, ROUND_BITS = 1.5 * 2**23, 0x4B400000
# The flags of every instruction here, whatever the function around allows (numba fills in flags
# only where there are none): reassociated, x + ROUND - ROUND would be x, and r would be lost.
EXACT = ("contract",)
LEAST, MOST = -104.0, 89.0  # e^x is 0 below the one, infinite above the other


def emit_exp(builder: Any, x: Any) -> Any:
    """Instructions for e^x of an IR value, float or vector of floats; at most 1 ulp off.

    inf gives inf, -inf gives 0, nan gives nan, and subnormal results are right. x = n ln 2 + r,
    n whole: e^x = 2^n e^r (Cody and Waite 1980).
    """
    bounded = _pick(builder, "<", x, _number(x, LEAST))
    bounded = _pick(builder, ">", bounded, _number(x, MOST))
    shifted = _multiply_add(builder, bounded, _number(x, 1 / math.log(2)), _number(x, ROUND))
    n = builder.fsub(shifted, _number(x, ROUND), flags=EXACT)
    r = _multiply_add(builder, n, _number(x, -LN2_HIGH), bounded)
    r = _multiply_add(builder, n, _number(x, -LN2_LOW), r)
    power = _number(x, C[-1])
    for c in (*C[-2::-1], 1.0, 1.0):
        power = _multiply_add(builder, power, r, _number(x, c))
    integers = _like(x, ir.IntType(32))
    whole = builder.sub(builder.bitcast(shifted, integers), _number(x, ROUND_BITS, integers))
    # In two steps: neither 2^128 nor 2^-150 is a float32, but the result may be one.
    half = builder.ashr(whole, _number(x, 1, integers))
    power = builder.fmul(power, _two_to_the(builder, half, x.type), flags=EXACT)
    rest = builder.sub(whole, half)
    return builder.fmul(power, _two_to_the(builder, rest, x.type), flags=EXACT)


def _two_to_the(builder: Any, n: Any, floats: Any) -> Any:
    biased = builder.add(n, _number(n, 127, n.type))
    return builder.bitcast(builder.shl(biased, _number(n, 23, n.type)), floats)


def _pick(builder: Any, comparison: str, x: Any, bound: Any) -> Any:
    """The bound where it is passed; x elsewhere, and where x is nan."""
    return builder.select(builder.fcmp_ordered(comparison, x, bound), bound, x)


def _multiply_add(builder: Any, a: Any, b: Any, c: Any) -> Any:
    """The sum a * b + c, in one rounding where the processor has that."""
    return builder.fadd(builder.fmul(a, b, flags=EXACT), c, flags=EXACT)


def _like(x: Any, element: Any) -> Any:
    """The element's type, or a vector of it as long as x."""
    return ir.VectorType(element, x.type.count) if isinstance(x.type, ir.VectorType) else element


def _number(x: Any, value: float, kind: Any = None) -> Any:
    """A constant for every lane of x."""
    kind = x.type if kind is None else kind
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [value] * kind.count)
    return ir.Constant(kind, value)


@intrinsic
def exp_f32(typingctx: Any, x: Any) -> Any:
    """e^x of a float32 as a float32, in compiled functions; loops over it are vectorised."""
    if x != types.float32:
        return None

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        return emit_exp(builder, args[0])

    return types.float32(types.float32), codegen

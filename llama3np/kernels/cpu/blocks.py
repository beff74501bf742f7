"""The weights of one GGUF block as vectors, in LLVM code: the one place that knows the layouts.

A decoder takes the address of a block and gives its weights in order, V in each vector, equal to
those of kernels.ggml, which names the sources of the layouts. Products of scales and stored
integers fit the 24 bits of a float32, so only the addition of a minimum rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from llama3np.kernels.cpu import ir
from llama3np.kernels.cpu.ir import Builder, V, Value, f32, i8, i16, i32, vector
from llama3np.kernels.ggml import FORMATS

# One instruction that looks 16 numbers up in a table of 16, by the lowest 4 bits of each index,
# turns four bits into weights without cutting, converting and scaling them.
HAS_TABLES = ir.host_has("avx512f")

# ---- parts of a block ------------------------------------------------------------------------


def scale(b: Builder, address: Value) -> Value:
    """A float16 number, in every lane."""
    return ir.pick(b, ir.widen_f16(b, ir.load(b, address, vector(i16, 1))), [0] * V)


def each(b: Builder, scales: Value) -> list[Value]:
    """Every lane of a vector, in all lanes of an own vector."""
    return [ir.pick(b, scales, [lane] * V) for lane in range(scales.type.count)]


def unsigned(b: Builder, address: Value, count: int = V) -> Value:
    """Bytes, each in a lane of 32 bits."""
    return b.zext(ir.load(b, address, vector(i8, count)), vector(i32, count))


def signed(b: Builder, address: Value) -> Value:
    """Signed bytes as float32."""
    return b.sitofp(b.sext(ir.load(b, address, vector(i8)), vector(i32)), vector(f32))


def shifted(b: Builder, value: Value, bits: int) -> Value:
    """The value without its lowest bits."""
    return b.lshr(value, ir.every(i32, bits)) if bits else value


def low_bits(b: Builder, value: Value, bits: int) -> Value:
    """The lowest bits of each lane."""
    return b.and_(value, ir.every(i32, 2**bits - 1))


def bit_is_set(b: Builder, bytes_: Value, bit: int) -> Value:
    """Whether each byte of a vector has a bit."""
    here = b.and_(bytes_, ir.every(i8, 1 << bit if bit < 7 else -128))
    return b.icmp_unsigned("!=", here, ir.every(i8, 0))


def scaled(b: Builder, q: Value, d: Value, minimum: Value | None) -> Value:
    """D * q + minimum."""
    return ir.multiply(b, d, q) if minimum is None else ir.fma(b, d, q, minimum)


def four_bits(
    b: Builder, d: Value, minimum: Value | None = None, first: int = 0
) -> Callable[[Value], Value]:
    """What makes weights, d * (q + first) + minimum, of the lowest four bits of each lane."""
    if HAS_TABLES:
        table = scaled(b, ir.lanes(f32, range(first, first + V)), d, minimum)
        return lambda q: ir.look_up(b, table, q)

    def compute(q: Value) -> Value:
        number = b.add(low_bits(b, q, 4), ir.every(i32, first))
        return scaled(b, b.sitofp(number, vector(f32)), d, minimum)

    return compute


def five_bits(
    b: Builder, d: Value, minimum: Value | None = None, first: int = 0
) -> Callable[[Value, Value], Value]:
    """As four_bits, with a vector of truths for the fifth bits."""
    low, high = (four_bits(b, d, minimum, first + more) for more in (0, 16))
    return lambda q, fifth: b.select(fifth, high(q), low(q))


# ---- blocks of 32 weights --------------------------------------------------------------------


def _q4_0(b: Builder, block: Value) -> list[Value]:
    q = unsigned(b, ir.at(b, block, 2))
    weights = four_bits(b, scale(b, block), first=-8)
    return [weights(q), weights(shifted(b, q, 4))]


def _q4_1(b: Builder, block: Value) -> list[Value]:
    q = unsigned(b, ir.at(b, block, 4))
    weights = four_bits(b, scale(b, block), scale(b, ir.at(b, block, 2)))
    return [weights(q), weights(shifted(b, q, 4))]


def _q5_0(b: Builder, block: Value) -> list[Value]:
    q, high = unsigned(b, ir.at(b, block, 6)), _masks(b, ir.at(b, block, 2))
    weights = five_bits(b, scale(b, block), first=-16)
    return [weights(q, high[0]), weights(shifted(b, q, 4), high[1])]


def _q5_1(b: Builder, block: Value) -> list[Value]:
    q, high = unsigned(b, ir.at(b, block, 8)), _masks(b, ir.at(b, block, 4))
    weights = five_bits(b, scale(b, block), scale(b, ir.at(b, block, 2)))
    return [weights(q, high[0]), weights(shifted(b, q, 4), high[1])]


def _masks(b: Builder, address: Value) -> list[Value]:
    """32 bits as two vectors of truths."""
    halves = [ir.load(b, ir.at(b, address, 2, half), i16) for half in range(2)]
    return [b.bitcast(half, vector(ir.i1)) for half in halves]


def _q8_0(b: Builder, block: Value) -> list[Value]:
    d = scale(b, block)
    return [ir.multiply(b, d, signed(b, ir.at(b, block, 2 + 16 * half))) for half in range(2)]


# ---- blocks of 256 weights, with a scale for each 16 or 32 -----------------------------------


def _two_bits(b: Builder, address: Value) -> list[Value]:
    """64 bytes of four: the lowest of 32 bytes, then the next of them, then of the others."""
    q = [unsigned(b, ir.at(b, address, 16, i)) for i in range(4)]
    return [shifted(b, q[v // 8 * 2 + v % 2], v % 8 // 2 * 2) for v in range(16)]


def _q2_k(b: Builder, block: Value) -> list[Value]:
    packed = unsigned(b, block)
    d, dmin = scale(b, ir.at(b, block, 80)), scale(b, ir.at(b, block, 82))
    scales = ir.multiply(b, d, b.sitofp(low_bits(b, packed, 4), vector(f32)))
    minima = ir.multiply(b, dmin, b.sitofp(shifted(b, packed, 4), vector(f32)))
    q = [b.sitofp(low_bits(b, bits, 2), vector(f32)) for bits in _two_bits(b, ir.at(b, block, 16))]
    parts = zip(q, each(b, scales), each(b, b.fneg(minima)), strict=True)
    return [ir.fma(b, *part) for part in parts]


def _q3_k(b: Builder, block: Value) -> list[Value]:
    thirds = [ir.load(b, ir.at(b, block, 16, half), vector(i8)) for half in range(2)]
    scales = each(b, ir.multiply(b, scale(b, ir.at(b, block, 108)), _q3_k_scales(b, block)))
    weights = []
    for v, bits in enumerate(_two_bits(b, ir.at(b, block, 32))):
        high = b.select(bit_is_set(b, thirds[v % 2], v // 2), ir.every(i32, 0), ir.every(i32, -4))
        q = b.sitofp(b.add(low_bits(b, bits, 2), high), vector(f32))
        weights.append(ir.multiply(b, q, scales[v]))
    return weights


def _q3_k_scales(b: Builder, block: Value) -> Value:
    """16 numbers of 6 bits less 32: 8 bytes of two low parts, 4 bytes of four high pairs."""
    low = ir.pick(b, unsigned(b, ir.at(b, block, 96), 8), [*range(8)] * 2)
    low = low_bits(b, b.lshr(low, ir.lanes(i32, [0] * 8 + [4] * 8)), 4)
    high = ir.pick(b, unsigned(b, ir.at(b, block, 104), 4), [*range(4)] * 4)
    high = low_bits(b, b.lshr(high, ir.lanes(i32, [0] * 4 + [2] * 4 + [4] * 4 + [6] * 4)), 2)
    number = b.or_(low, b.shl(high, ir.every(i32, 4)))
    return b.sitofp(b.sub(number, ir.every(i32, 32)), vector(f32))


def _q4_k(b: Builder, block: Value) -> list[Value]:
    scales, weights = _k_scales(b, block), []
    for pair in range(4):  # of runs of 32 weights, which share 32 bytes
        q = [unsigned(b, ir.at(b, block, 16 + 32 * pair + 16 * half)) for half in range(2)]
        for run in range(2):
            weight = four_bits(b, *scales[2 * pair + run])
            weights += [weight(shifted(b, part, 4 * run)) for part in q]
    return weights


def _q5_k(b: Builder, block: Value) -> list[Value]:
    fifths = [ir.load(b, ir.at(b, block, 16 + 16 * half), vector(i8)) for half in range(2)]
    scales, weights = _k_scales(b, block), []
    for pair in range(4):
        q = [unsigned(b, ir.at(b, block, 48 + 32 * pair + 16 * half)) for half in range(2)]
        for run in range(2 * pair, 2 * pair + 2):
            weight = five_bits(b, *scales[run])
            for part, fifth in zip(q, fifths, strict=True):
                weights.append(weight(shifted(b, part, run % 2 * 4), bit_is_set(b, fifth, run)))
    return weights


def _k_scales(b: Builder, block: Value) -> list[tuple[Value, Value]]:
    """D * scale and -dmin * minimum of the eight runs of Q4_K and Q5_K.

    Lanes are 8 scales and 8 minima: of each the first four are whole bytes' lower 6 bits, whose
    upper 2 are the upper part of the others; their lower 4 bits share bytes.
    """
    first = ir.load(b, block, vector(i8))  # d, dmin, 4 scales, 4 minima, 4 shared
    a, m, shared = [*range(4, 8)], [*range(8, 12)], [*range(12, 16)]
    low = b.zext(ir.pick(b, first, a + shared + m + shared), vector(i32))
    low = b.lshr(low, ir.lanes(i32, [0] * 12 + [4] * 4))
    low = b.and_(low, ir.lanes(i32, ([63] * 4 + [15] * 4) * 2))
    high = b.zext(ir.pick(b, first, a + a + m + m), vector(i32))
    high = b.and_(b.lshr(high, ir.every(i32, 2)), ir.lanes(i32, ([0] * 4 + [48] * 4) * 2))
    numbers = b.sitofp(b.or_(low, high), vector(f32))
    halves = ir.widen_f16(b, ir.load(b, block, vector(i16, 2)))
    signs = ir.lanes(f32, [1.0] * 8 + [-1.0] * 8)
    factors = ir.multiply(b, ir.pick(b, halves, [0] * 8 + [1] * 8), signs)
    spread = each(b, ir.multiply(b, numbers, factors))
    return list(zip(spread[:8], spread[8:], strict=True))


def _q6_k(b: Builder, block: Value) -> list[Value]:
    low = [unsigned(b, ir.at(b, block, 16, i)) for i in range(8)]
    high = [unsigned(b, ir.at(b, block, 128 + 16 * i)) for i in range(4)]
    d = scale(b, ir.at(b, block, 208))
    scales = each(b, ir.multiply(b, d, signed(b, ir.at(b, block, 192))))
    weights = []
    for v in range(16):
        half, u = divmod(v, 8)  # of 128 weights: 64 bytes of two, 32 bytes of four
        four = low_bits(b, shifted(b, low[4 * half + u % 4], u // 4 * 4), 4)
        two = low_bits(b, shifted(b, high[2 * half + u % 2], u // 2 * 2), 2)
        number = b.sub(b.or_(four, b.shl(two, ir.every(i32, 4))), ir.every(i32, 32))
        weights.append(ir.multiply(b, b.sitofp(number, vector(f32)), scales[v]))
    return weights


# ---- the table -------------------------------------------------------------------------------


class Block(NamedTuple):
    """How compiled code reads a format."""

    weights: int  # of one block
    nbytes: int
    decode: Callable[[Builder, Value], list[Value]]


_DECODERS = {
    "Q4_0": _q4_0, "Q4_1": _q4_1, "Q5_0": _q5_0, "Q5_1": _q5_1, "Q8_0": _q8_0,
    "Q2_K": _q2_k, "Q3_K": _q3_k, "Q4_K": _q4_k, "Q5_K": _q5_k, "Q6_K": _q6_k,
}  # fmt: skip
BLOCKS = {
    name: Block(FORMATS[name].weights, FORMATS[name].nbytes, decode)
    for name, decode in _DECODERS.items()
}

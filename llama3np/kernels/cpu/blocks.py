"""The weights of one GGUF block as vectors, in LLVM code: the one place that knows the layouts.

A decoder takes the address of a block and gives its weights in order, V in each vector, equal to
those of kernels.ggml, which names the sources of the layouts. Products of scales and stored
integers fit the 24 bits of a float32, so only the addition of a minimum rounds.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

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


def spread(b: Builder, address: Value, count: int) -> list[Value]:
    """float32 numbers, each in all lanes of an own vector."""
    return [ir.splat(b, ir.load(b, ir.at(b, address, 4, i), f32)) for i in range(count)]


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


def twice(b: Builder, address: Value) -> Value:
    """32 bytes, and again, as 16-bit lanes."""
    return ir.pick(b, ir.load(b, address, vector(i16)), [*range(16)] * 2)


def moved(b: Builder, value: Value, first: int, second: int) -> Value:
    """Both halves of 16-bit lanes shifted the same way: left, or right by negative numbers."""
    bits = ir.lanes(i16, [abs(first)] * 16 + [abs(second)] * 16)
    return (b.shl if first > 0 else b.lshr)(value, bits)


def joined(b: Builder, low: Value, high: Value, mask: int) -> Value:
    """Bytes of the lowest four bits of one vector and the masked bits of another."""
    low, high = (b.bitcast(value, vector(i8, 64)) for value in (low, high))
    return b.or_(b.and_(low, ir.every(i8, 15, 64)), b.and_(high, ir.every(i8, mask, 64)))


def bit_is_set(b: Builder, bytes_: Value, bit: int) -> Value:
    """Whether each byte of a vector has a bit."""
    here = b.and_(bytes_, ir.every(i8, 1 << bit if bit < 7 else -128))
    return b.icmp_unsigned("!=", here, ir.every(i8, 0))


def scaled(b: Builder, q: Value, d: Value, minimum: Value | None) -> Value:
    """The weights d * q + minimum."""
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


def _q4_0(b: Builder, block: Value, _: Value) -> list[Value]:
    q = unsigned(b, ir.at(b, block, 2))
    weights = four_bits(b, scale(b, block), first=-8)
    return [weights(q), weights(shifted(b, q, 4))]


def _q4_1(b: Builder, block: Value, _: Value) -> list[Value]:
    q = unsigned(b, ir.at(b, block, 4))
    weights = four_bits(b, scale(b, block), scale(b, ir.at(b, block, 2)))
    return [weights(q), weights(shifted(b, q, 4))]


def _q5_0(b: Builder, block: Value, _: Value) -> list[Value]:
    q, high = unsigned(b, ir.at(b, block, 6)), _masks(b, ir.at(b, block, 2))
    weights = five_bits(b, scale(b, block), first=-16)
    return [weights(q, high[0]), weights(shifted(b, q, 4), high[1])]


def _q5_1(b: Builder, block: Value, _: Value) -> list[Value]:
    q, high = unsigned(b, ir.at(b, block, 8)), _masks(b, ir.at(b, block, 4))
    weights = five_bits(b, scale(b, block), scale(b, ir.at(b, block, 2)))
    return [weights(q, high[0]), weights(shifted(b, q, 4), high[1])]


def _masks(b: Builder, address: Value) -> list[Value]:
    """32 bits as two vectors of truths."""
    halves = [ir.load(b, ir.at(b, address, 2, half), i16) for half in range(2)]
    return [b.bitcast(half, vector(ir.i1)) for half in halves]


def _q8_0(b: Builder, block: Value, _: Value) -> list[Value]:
    d = scale(b, block)
    return [ir.multiply(b, d, signed(b, ir.at(b, block, 2 + 16 * half))) for half in range(2)]


# ---- blocks of 256 weights, with a scale for each 16 or 32 -----------------------------------


def _two_bits(b: Builder, address: Value) -> list[Value]:
    """64 bytes of four: the lowest of 32 bytes, then the next of them, then of the others."""
    q = [unsigned(b, ir.at(b, address, 16, i)) for i in range(4)]
    return [shifted(b, q[v // 8 * 2 + v % 2], v % 8 // 2 * 2) for v in range(16)]


def _q2_k(b: Builder, block: Value, kept: Value) -> list[Value]:
    q = [b.sitofp(low_bits(b, bits, 2), vector(f32)) for bits in _two_bits(b, ir.at(b, block, 16))]
    scales, minima = spread(b, kept, 16), spread(b, ir.at(b, kept, 64), 16)
    return [ir.fma(b, *part) for part in zip(q, scales, minima, strict=True)]


def _q2_k_scales(b: Builder, block: Value, kept: Value) -> None:
    """Keep d * scale and -dmin * minimum, of 4 bits each."""
    packed = unsigned(b, block)
    d, dmin = scale(b, ir.at(b, block, 80)), scale(b, ir.at(b, block, 82))
    scales = b.sitofp(low_bits(b, packed, 4), vector(f32))
    minima = b.sitofp(shifted(b, packed, 4), vector(f32))
    ir.store(b, ir.multiply(b, d, scales), kept)
    ir.store(b, ir.multiply(b, b.fneg(dmin), minima), ir.at(b, kept, 64))


def _q3_k(b: Builder, block: Value, kept: Value) -> list[Value]:
    thirds = [ir.load(b, ir.at(b, block, 16, half), vector(i8)) for half in range(2)]
    scales, weights = spread(b, kept, 16), []
    for v, bits in enumerate(_two_bits(b, ir.at(b, block, 32))):
        high = b.select(bit_is_set(b, thirds[v % 2], v // 2), ir.every(i32, 0), ir.every(i32, -4))
        q = b.sitofp(b.add(low_bits(b, bits, 2), high), vector(f32))
        weights.append(ir.multiply(b, q, scales[v]))
    return weights


def _q3_k_scales(b: Builder, block: Value, kept: Value) -> None:
    """Keep d * (scale - 32), of 6 bits: 8 bytes of two low parts, 4 bytes of four high pairs."""
    low = ir.pick(b, unsigned(b, ir.at(b, block, 96), 8), [*range(8)] * 2)
    low = low_bits(b, b.lshr(low, ir.lanes(i32, [0] * 8 + [4] * 8)), 4)
    high = ir.pick(b, unsigned(b, ir.at(b, block, 104), 4), [*range(4)] * 4)
    high = low_bits(b, b.lshr(high, ir.lanes(i32, [0] * 4 + [2] * 4 + [4] * 4 + [6] * 4)), 2)
    number = b.sub(b.or_(low, b.shl(high, ir.every(i32, 4))), ir.every(i32, 32))
    d = scale(b, ir.at(b, block, 108))
    ir.store(b, ir.multiply(b, d, b.sitofp(number, vector(f32))), kept)


def _q4_k(b: Builder, block: Value, kept: Value) -> list[Value]:
    scales, weights = spread(b, kept, 16), []
    for pair in range(4):  # of runs of 32 weights, which share 32 bytes
        q = [unsigned(b, ir.at(b, block, 16 + 32 * pair + 16 * half)) for half in range(2)]
        for run in range(2 * pair, 2 * pair + 2):
            weight = four_bits(b, scales[run], scales[8 + run])
            weights += [weight(shifted(b, part, run % 2 * 4)) for part in q]
    return weights


def _q5_k(b: Builder, block: Value, kept: Value) -> list[Value]:
    scales, q = spread(b, kept, 16), [signed(b, ir.at(b, kept, 64 + 16 * v)) for v in range(16)]
    return [ir.fma(b, q[v], scales[v // 2], scales[8 + v // 2]) for v in range(16)]


def _q5_k_bytes(b: Builder, block: Value, kept: Value) -> None:
    """Keep scales as Q4_K's, then each weight in a byte of its own."""
    _q4_k_scales(b, block, kept)
    fifths = twice(b, ir.at(b, block, 16))
    for pair in range(4):  # of runs of 32 weights: bits 2 * pair and 2 * pair + 1 become bit 4
        low = moved(b, twice(b, ir.at(b, block, 48 + 32 * pair)), 0, -4)
        high = moved(b, fifths, 4 - 2 * pair, 3 - 2 * pair)
        ir.store(b, joined(b, low, high, 0x10), ir.at(b, kept, 64 + 64 * pair))


def _q4_k_scales(b: Builder, block: Value, kept: Value) -> None:
    """Keep d * scale, then -dmin * minimum, of the eight runs of Q4_K and Q5_K.

    The first four of each are the lower 6 bits of whole bytes, whose upper 2 bits are the upper
    part of the other four; the lower 4 bits of those share bytes.
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
    ir.store(b, ir.multiply(b, numbers, factors), kept)


def _q6_k(b: Builder, block: Value, kept: Value) -> list[Value]:
    scales, q = spread(b, kept, 16), [signed(b, ir.at(b, kept, 64 + 16 * v)) for v in range(16)]
    return [ir.multiply(b, *pair) for pair in zip(q, scales, strict=True)]


def _q6_k_bytes(b: Builder, block: Value, kept: Value) -> None:
    """Keep d * scale, then each weight in a byte of its own."""
    d = scale(b, ir.at(b, block, 208))
    ir.store(b, ir.multiply(b, d, signed(b, ir.at(b, block, 192))), kept)
    for half in range(2):  # of 128 weights: 64 bytes of two, 32 bytes of four
        low = ir.load(b, ir.at(b, block, 64 * half), vector(i16, 32))
        high = twice(b, ir.at(b, block, 128 + 32 * half))
        for nibble, shifts in enumerate(((4, 2), (0, -2))):  # bits 0, 2, 4, 6 become bit 4
            part = moved(b, low, -4 * nibble, -4 * nibble)
            number = joined(b, part, moved(b, high, *shifts), 0x30)
            number = b.sub(number, ir.every(i8, 32, 64))
            ir.store(b, number, ir.at(b, kept, 64 + 128 * half + 64 * nibble))


# ---- the table -------------------------------------------------------------------------------


Decode = Callable[[Builder, Value, Value], list[Value]]  # (b, block, address of what was kept)
Prepare = Callable[[Builder, Value, Value], None]


class Block(NamedTuple):
    """How compiled code reads a format.

    `prepare`, if there is one, writes `kept` bytes that `decode` reads, for several blocks before
    the first is decoded: so nothing waits, and to load a number into all lanes is one instruction
    beside the arithmetic, where to copy it from another lane would be two of it.
    """

    weights: int  # of one block
    nbytes: int
    decode: Decode
    prepare: Prepare | None = None
    kept: int = 0


def _block(name: str, *rest: Any) -> Block:
    return Block(FORMATS[name].weights, FORMATS[name].nbytes, *rest)


BLOCKS = {
    "Q4_0": _block("Q4_0", _q4_0),
    "Q4_1": _block("Q4_1", _q4_1),
    "Q5_0": _block("Q5_0", _q5_0),
    "Q5_1": _block("Q5_1", _q5_1),
    "Q8_0": _block("Q8_0", _q8_0),
    "Q2_K": _block("Q2_K", _q2_k, _q2_k_scales, 128),
    "Q3_K": _block("Q3_K", _q3_k, _q3_k_scales, 64),
    "Q4_K": _block("Q4_K", _q4_k, _q4_k_scales, 64),
    "Q5_K": _block("Q5_K", _q5_k, _q5_k_bytes, 64 + 256),
    "Q6_K": _block("Q6_K", _q6_k, _q6_k_bytes, 64 + 256),
}

"""GGUF's block formats as float32.

A row of weights is cut into blocks of 32 or 256, each with its own scale and, in some formats,
minimum: value = scale * q - or + minimum. Formats: ggml-common.h and ggml-quants.c of ggml.
Each decoder takes blocks_RC, R blocks of C bytes each, and fills out_RW, W weights a block.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np

from llama3np.kernels.widening import from_half

Decoder = Callable[[np.ndarray, np.ndarray], None]  # (blocks_RC, out_RW)

# Weights decoded at a time. Measured: with fewer, which would fit a core's own cache, threads wait
# for the interpreter's lock between the steps of a decoder longer than the steps take.
PIECE = 1 << 19

_VOID = {n: np.dtype((np.void, n)) for n in (4, 8, 16)}

# ---- parts of a block ------------------------------------------------------------------------


def _f16(blocks_RC: np.ndarray, *at: int) -> np.ndarray:
    """The float16 numbers of each block that begin at these bytes, as rows of float32: (J, R)."""
    bits_JR = np.empty((len(at), len(blocks_RC)), np.int16)
    for bits_R, start in zip(bits_JR, at, strict=True):
        bits_R[:] = blocks_RC[:, start : start + 2].view("<i2")[:, 0]
    return from_half(bits_JR, np.empty(bits_JR.shape, np.float32))


def _bytes(blocks_RC: np.ndarray, start: int, stop: int) -> np.ndarray:
    """Bytes start to stop of every block, in one piece: (R, stop - start)."""
    found_RC = np.empty((len(blocks_RC), stop - start), np.uint8)
    _copy(blocks_RC[:, start:stop], found_RC)
    return found_RC


def _copy(from_RC: np.ndarray, to_RC: np.ndarray) -> None:
    """Copy bytes that lie together by rows only: 16 at a time, all rows of them in one go.

    That is many times as fast as row by row, where NumPy's steps cost more than the bytes.
    """
    unit = _VOID[min(16, from_RC.shape[1])]
    from_RU, to_RU = from_RC.view(unit), to_RC.view(unit)
    for i in range(from_RU.shape[1]):
        to_RU[:, i] = from_RU[:, i]


def _fields(packed_RC: np.ndarray, bits: int, C: int) -> np.ndarray:
    """Cut each byte into fields of `bits`: of every C bytes the lowest, then the next, and so on.

    packed_RC: contiguous. Returns as many fields as there are, (R, W) uint8.
    """
    J, packed_XC = 8 // bits, packed_RC.reshape(-1, C)
    fields_XJC = np.empty((len(packed_XC), J, C), np.uint8)
    for j in range(J):
        field_XC = packed_XC >> np.uint8(j * bits)
        field_XC &= np.uint8(2**bits - 1)
        _copy(field_XC, fields_XJC[:, j])
    return fields_XJC.reshape(len(packed_RC), -1)


def _bits(packed_RC: np.ndarray) -> np.ndarray:
    """The bits of each byte, the lowest first: (R, C) -> (R, 8 C)."""
    return np.unpackbits(packed_RC.reshape(-1), bitorder="little").reshape(len(packed_RC), -1)


def _with_high(low_RW: np.ndarray, high_RW: np.ndarray, at: int) -> np.ndarray:
    """The bits of both, `high` moved up by `at`, in their place."""
    high_RW <<= np.uint8(at)
    low_RW |= high_RW
    return low_RW


def _less(q_RW: np.ndarray, by: int) -> np.ndarray:
    """Unsigned numbers below 128 less `by`, signed, in their place."""
    signed_RW = q_RW.view(np.int8)
    signed_RW -= np.int8(by)
    return signed_RW


def _products(d_JR: np.ndarray, *scales_RG: np.ndarray) -> list[np.ndarray]:
    """Each d with the scales of its block's parts; the second, of minima, turned negative.

    Adding the negative is subtracting, to the last bit.
    """
    signs = (1, -1)
    return [sign * d_R[:, None] * s_RG for sign, d_R, s_RG in zip(signs, d_JR, scales_RG)]  # noqa: B905


def _scale(out_RW: np.ndarray, q_RW: np.ndarray, *scales_RG: np.ndarray) -> None:
    """Fill with scale * q, or scale * q + minimum, one of each for each of a block's G parts.

    np.repeat for longer steps would hold the interpreter's lock, for which other threads wait.
    """
    np.copyto(out_RW, q_RW)
    out_GW = out_RW.reshape(scales_RG[0].size, -1)
    for operate, scale_RG in zip((np.multiply, np.add), scales_RG, strict=False):
        operate(out_GW, scale_RG.reshape(-1, 1), out=out_GW)


def _k_scales(packed_R12: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Eight 6-bit scales and minima of Q4_K and Q5_K: the first four whole, the others split."""
    a_R4, b_R4, c_R4 = packed_R12[:, :4], packed_R12[:, 4:8], packed_R12[:, 8:]
    scales_R8 = np.hstack((a_R4 & 63, (c_R4 & 15) | (a_R4 >> 6 << 4)))
    minima_R8 = np.hstack((b_R4 & 63, (c_R4 >> 4) | (b_R4 >> 6 << 4)))
    return scales_R8, minima_R8


# ---- plain numbers, blocks of one weight -----------------------------------------------------


def _plain(dtype: np.dtype) -> Decoder:
    def decode(blocks_RC: np.ndarray, out_RW: np.ndarray) -> None:
        out_RW[...] = blocks_RC.view(dtype)

    return decode


# ---- blocks of 32 weights --------------------------------------------------------------------


def _q4_0(blocks_RC: np.ndarray, out_RW: np.ndarray) -> None:
    """float16 d, 16 bytes of two: d * (q - 8)."""
    q_RW = _fields(_bytes(blocks_RC, 2, 18), 4, 16)
    _scale(out_RW, _less(q_RW, 8), _f16(blocks_RC, 0))


def _q4_1(blocks_RC: np.ndarray, out_RW: np.ndarray) -> None:
    """float16 d and m, 16 bytes of two: d * q + m."""
    q_RW = _fields(_bytes(blocks_RC, 4, 20), 4, 16)
    _scale(out_RW, q_RW, *_f16(blocks_RC, 0, 2))


def _q5_0(blocks_RC: np.ndarray, out_RW: np.ndarray) -> None:
    """float16 d, 32 fifth bits, 16 bytes of two: d * (q - 16)."""
    low_RW, high_RW = _fields(_bytes(blocks_RC, 6, 22), 4, 16), _bits(_bytes(blocks_RC, 2, 6))
    _scale(out_RW, _less(_with_high(low_RW, high_RW, 4), 16), _f16(blocks_RC, 0))


def _q5_1(blocks_RC: np.ndarray, out_RW: np.ndarray) -> None:
    """float16 d and m, 32 fifth bits, 16 bytes of two: d * q + m."""
    low_RW, high_RW = _fields(_bytes(blocks_RC, 8, 24), 4, 16), _bits(_bytes(blocks_RC, 4, 8))
    _scale(out_RW, _with_high(low_RW, high_RW, 4), *_f16(blocks_RC, 0, 2))


def _q8_0(blocks_RC: np.ndarray, out_RW: np.ndarray) -> None:
    """float16 d, 32 signed bytes: d * q."""
    _scale(out_RW, _bytes(blocks_RC, 2, 34).view(np.int8), _f16(blocks_RC, 0))


# ---- blocks of 256 weights, with a scale for each 16 or 32 -----------------------------------


def _q2_k(blocks_RC: np.ndarray, out_RW: np.ndarray) -> None:
    """16 scales and minima of 4 bits, 64 bytes of four, float16 d, dmin: d*scale*q - dmin*min."""
    q_RW = _fields(_bytes(blocks_RC, 16, 80), 2, 32)
    scales_R16, minima_R16 = blocks_RC[:, :16] & 15, blocks_RC[:, :16] >> 4
    _scale(out_RW, q_RW, *_products(_f16(blocks_RC, 80, 82), scales_R16, minima_R16))


def _q3_k(blocks_RC: np.ndarray, out_RW: np.ndarray) -> None:
    """256 third bits, 64 bytes of four, 16 scales of 6 bits, float16 d: d*(scale-32)*(q-4)."""
    low_R16 = _fields(_bytes(blocks_RC, 96, 104), 4, 8)
    scales_R16 = _with_high(low_R16, _fields(_bytes(blocks_RC, 104, 108), 2, 4), 4)
    low_RW = _fields(_bytes(blocks_RC, 32, 96), 2, 32)
    third_RW = _fields(_bytes(blocks_RC, 0, 32), 1, 32)
    d_R16 = _products(_f16(blocks_RC, 108), _less(scales_R16, 32))
    _scale(out_RW, _less(_with_high(low_RW, third_RW, 2), 4), *d_R16)


def _q4_k(blocks_RC: np.ndarray, out_RW: np.ndarray) -> None:
    """float16 d, dmin, 8 scales and minima of 6 bits, 128 bytes of two: d*scale*q - dmin*min."""
    _scale(out_RW, _fields(_bytes(blocks_RC, 16, 144), 4, 32), *_scales_q4_q5(blocks_RC))


def _q5_k(blocks_RC: np.ndarray, out_RW: np.ndarray) -> None:
    """As Q4_K, with 256 fifth bits between the scales and the bytes."""
    low_RW = _fields(_bytes(blocks_RC, 48, 176), 4, 32)
    high_RW = _fields(_bytes(blocks_RC, 16, 48), 1, 32)
    _scale(out_RW, _with_high(low_RW, high_RW, 4), *_scales_q4_q5(blocks_RC))


def _scales_q4_q5(blocks_RC: np.ndarray) -> list[np.ndarray]:
    """The eight d * scale, and the eight -dmin * minimum, of each block of Q4_K or Q5_K."""
    return _products(_f16(blocks_RC, 0, 2), *_k_scales(blocks_RC[:, 4:16]))


def _q6_k(blocks_RC: np.ndarray, out_RW: np.ndarray) -> None:
    """128 bytes of two, 64 of four high pairs, 16 signed scales, float16 d: d*scale*(q-32)."""
    low_RW = _fields(_bytes(blocks_RC, 0, 128), 4, 64)
    q_RW = _with_high(low_RW, _fields(_bytes(blocks_RC, 128, 192), 2, 32), 4)
    scales_R16 = _bytes(blocks_RC, 192, 208).view(np.int8)
    _scale(out_RW, _less(q_RW, 32), *_products(_f16(blocks_RC, 208), scales_R16))


# ---- the table, and whole tensors ------------------------------------------------------------


class Format(NamedTuple):
    """How a ggml type stores weights."""

    number: int  # in the file
    weights: int  # W of one block, 1 if plain
    nbytes: int  # C of one block
    decode: Decoder
    dtype: np.dtype | None = None  # of a type that is plain numbers, and can be used as it is


_F32, _F16, _BF16 = np.dtype("<f4"), np.dtype("<f2"), np.dtype(ml_dtypes.bfloat16)

FORMATS = {
    "F32": Format(0, 1, 4, _plain(_F32), _F32),
    "F16": Format(1, 1, 2, _plain(_F16), _F16),
    "BF16": Format(30, 1, 2, _plain(_BF16), _BF16),
    "Q4_0": Format(2, 32, 18, _q4_0),
    "Q4_1": Format(3, 32, 20, _q4_1),
    "Q5_0": Format(6, 32, 22, _q5_0),
    "Q5_1": Format(7, 32, 24, _q5_1),
    "Q8_0": Format(8, 32, 34, _q8_0),
    "Q2_K": Format(10, 256, 84, _q2_k),
    "Q3_K": Format(11, 256, 110, _q3_k),
    "Q4_K": Format(12, 256, 144, _q4_k),
    "Q5_K": Format(13, 256, 176, _q5_k),
    "Q6_K": Format(14, 256, 210, _q6_k),
}

NAMES = {form.number: name for name, form in FORMATS.items()}  # by the number in the file

# Where a block has its float16 scale and, of the formats that have one, its minimum, in bytes.
SCALES = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    **{"Q2_K": (80, 82), "Q3_K": (108,), "Q6_K": (208,)},
}

# ggml's other types, to name them when they are refused.
OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


def decode(type_name: str, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Decode a tensor's bytes (uint8, any shape), into a new float32 array of `shape`."""
    weights = np.empty(shape, np.float32)
    form = FORMATS[type_name]
    _decode(form, stored.reshape(-1, form.nbytes), weights.reshape(-1, form.weights))
    return weights


def decode_rows(type_name: str, stored_NC: np.ndarray, out_NW: np.ndarray) -> None:
    """Decode rows into `out_NW`, float32 and contiguous; of `stored_NC` only the rows must be.

    A few rows at a time, so that rows which lie apart are not gathered as a whole.
    """
    form = FORMATS[type_name]
    step = max(1, PIECE // max(1, out_NW.shape[1]))
    for i in range(0, len(out_NW), step):
        blocks_RC = stored_NC[i : i + step].reshape(-1, form.nbytes)
        _decode(form, blocks_RC, out_NW[i : i + step].reshape(-1, form.weights))


def _decode(form: Format, blocks_RC: np.ndarray, out_RW: np.ndarray) -> None:
    step = max(1, PIECE // form.weights)
    with np.errstate(all="ignore"):  # a scale that is inf or nan decodes to what it decodes to
        for i in range(0, len(blocks_RC), step):
            form.decode(blocks_RC[i : i + step], out_RW[i : i + step])

"""GGUF's block formats as float32.

A row of weights is cut into blocks of 32 or 256, each with its own scale and, in some formats,
minimum: value = scale * q - or + minimum. Formats: ggml-common.h and ggml-quants.c of ggml.
Each decoder takes blocks_RC, R blocks of C bytes each, and fills out_RW, W weights a block.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import NamedTuple

import ml_dtypes
import numpy as np

Decoder = Callable[[np.ndarray, np.ndarray], None]  # (blocks_RC, out_RW)

TASK_WEIGHTS = 1 << 20  # smaller tasks lose time in Python, larger ones need more memory

# ---- parts of a block ------------------------------------------------------------------------


def _f16(blocks_RC: np.ndarray, at: int, count: int = 1) -> np.ndarray:
    """`count` float16 numbers from byte `at` of each block, as float32 columns."""
    return np.ascontiguousarray(blocks_RC[:, at : at + 2 * count]).view("<f2").astype(np.float32)


def _fields(bytes_XC: np.ndarray, bits: int) -> np.ndarray:
    """Cut each byte into J fields of `bits`: the lowest of all C bytes, then the next of all.

    (X, C) -> (X, J, C), for any axes X.
    """
    shifts_J1 = np.arange(0, 8, bits, dtype=np.uint8)[:, None]
    return (bytes_XC[..., None, :] >> shifts_J1) & np.uint8(2**bits - 1)


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
    out_RW[...] = _fields(blocks_RC[:, 2:], 4).reshape(out_RW.shape)
    out_RW -= 8
    out_RW *= _f16(blocks_RC, 0)


def _q4_1(blocks_RC: np.ndarray, out_RW: np.ndarray) -> None:
    """float16 d and m, 16 bytes of two: d * q + m."""
    out_RW[...] = _fields(blocks_RC[:, 4:], 4).reshape(out_RW.shape)
    out_RW *= _f16(blocks_RC, 0)
    out_RW += _f16(blocks_RC, 2)


def _q5_0(blocks_RC: np.ndarray, out_RW: np.ndarray) -> None:
    """float16 d, 32 fifth bits, 16 bytes of two: d * (q - 16)."""
    high_RW = np.unpackbits(blocks_RC[:, 2:6], axis=1, bitorder="little")
    out_RW[...] = _fields(blocks_RC[:, 6:], 4).reshape(out_RW.shape) | (high_RW << 4)
    out_RW -= 16
    out_RW *= _f16(blocks_RC, 0)


def _q5_1(blocks_RC: np.ndarray, out_RW: np.ndarray) -> None:
    """float16 d and m, 32 fifth bits, 16 bytes of two: d * q + m."""
    high_RW = np.unpackbits(blocks_RC[:, 4:8], axis=1, bitorder="little")
    out_RW[...] = _fields(blocks_RC[:, 8:], 4).reshape(out_RW.shape) | (high_RW << 4)
    out_RW *= _f16(blocks_RC, 0)
    out_RW += _f16(blocks_RC, 2)


def _q8_0(blocks_RC: np.ndarray, out_RW: np.ndarray) -> None:
    """float16 d, 32 signed bytes: d * q."""
    out_RW[...] = blocks_RC[:, 2:].view(np.int8)
    out_RW *= _f16(blocks_RC, 0)


# ---- blocks of 256 weights, with a scale for each 16 or 32 -----------------------------------


def _q2_k(blocks_RC: np.ndarray, out_RW: np.ndarray) -> None:
    """16 scales and minima of 4 bits, 64 bytes of four, float16 d, dmin: d*scale*q - dmin*min."""
    R = len(blocks_RC)
    scales_R16, minima_R16 = blocks_RC[:, :16] & 15, blocks_RC[:, :16] >> 4
    out_R16W = out_RW.reshape(R, 16, 16)
    out_R16W[...] = _fields(blocks_RC[:, 16:80].reshape(R, 2, 32), 2).reshape(R, 16, 16)
    out_R16W *= (_f16(blocks_RC, 80) * scales_R16)[..., None]
    out_R16W -= (_f16(blocks_RC, 82) * minima_R16)[..., None]


def _q3_k(blocks_RC: np.ndarray, out_RW: np.ndarray) -> None:
    """256 third bits, 64 bytes of four, 16 scales of 6 bits, float16 d: d*(scale-32)*(q-4)."""
    R = len(blocks_RC)
    third_RW = _fields(blocks_RC[:, :32], 1).reshape(R, 256)
    low_RW = _fields(blocks_RC[:, 32:96].reshape(R, 2, 32), 2).reshape(R, 256)
    low_R16 = _fields(blocks_RC[:, 96:104], 4).reshape(R, 16)
    high_R16 = _fields(blocks_RC[:, 104:108], 2).reshape(R, 16)
    scales_R16 = (low_R16 | (high_R16 << 4)).astype(np.int8) - np.int8(32)
    out_RW[...] = low_RW | (third_RW << 2)
    out_RW -= 4
    out_R16W = out_RW.reshape(R, 16, 16)
    out_R16W *= (_f16(blocks_RC, 108) * scales_R16)[..., None]


def _q4_k(blocks_RC: np.ndarray, out_RW: np.ndarray) -> None:
    """float16 d, dmin, 8 scales and minima of 6 bits, 128 bytes of two: d*scale*q - dmin*min."""
    R = len(blocks_RC)
    q_R8W = _fields(blocks_RC[:, 16:].reshape(R, 4, 32), 4).reshape(R, 8, 32)
    _scale_q4_q5(blocks_RC, q_R8W, out_RW)


def _q5_k(blocks_RC: np.ndarray, out_RW: np.ndarray) -> None:
    """As Q4_K, with 256 fifth bits between the scales and the bytes."""
    R = len(blocks_RC)
    high_R8W = _fields(blocks_RC[:, 16:48], 1)
    low_R8W = _fields(blocks_RC[:, 48:].reshape(R, 4, 32), 4).reshape(R, 8, 32)
    _scale_q4_q5(blocks_RC, low_R8W | (high_R8W << 4), out_RW)


def _scale_q4_q5(blocks_RC: np.ndarray, q_R8W: np.ndarray, out_RW: np.ndarray) -> None:
    scales_R8, minima_R8 = _k_scales(blocks_RC[:, 4:16])
    out_R8W = out_RW.reshape(q_R8W.shape)
    out_R8W[...] = q_R8W
    out_R8W *= (_f16(blocks_RC, 0) * scales_R8)[..., None]
    out_R8W -= (_f16(blocks_RC, 2) * minima_R8)[..., None]


def _q6_k(blocks_RC: np.ndarray, out_RW: np.ndarray) -> None:
    """128 bytes of two, 64 of four high pairs, 16 signed scales, float16 d: d*scale*(q-32)."""
    R = len(blocks_RC)
    low_RW = _fields(blocks_RC[:, :128].reshape(R, 2, 64), 4).reshape(R, 256)
    high_RW = _fields(blocks_RC[:, 128:192].reshape(R, 2, 32), 2).reshape(R, 256)
    out_RW[...] = low_RW | (high_RW << 4)
    out_RW -= 32
    out_R16W = out_RW.reshape(R, 16, 16)
    out_R16W *= (_f16(blocks_RC, 208) * blocks_RC[:, 192:208].view(np.int8))[..., None]


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

# ggml's other types, to name them when they are refused.
OTHER_TYPES = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 20: "IQ4_NL",
    21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4", 40: "NVFP4", 41: "Q1_0",
}  # fmt: skip


def start_decoding(
    type_name: str, stored: np.ndarray, shape: tuple[int, ...], pool: Executor
) -> tuple[np.ndarray, list[Future]]:
    """Decode a tensor's bytes (any shape, uint8) in `pool`, into a new float32 array.

    The array is whole when every future is done; NumPy works without the interpreter's lock, so
    threads share the work. `type_name` is a key of FORMATS that has a decoder.
    """
    form = FORMATS[type_name]
    weights = np.empty(shape, np.float32)
    blocks_RC, out_RW = stored.reshape(-1, form.nbytes), weights.reshape(-1, form.weights)
    step = TASK_WEIGHTS // form.weights
    return weights, [
        pool.submit(_decode, form, blocks_RC[i : i + step], out_RW[i : i + step])
        for i in range(0, len(blocks_RC), step)
    ]


def decode(type_name: str, stored: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Decode bytes as start_decoding does, at once."""
    form = FORMATS[type_name]
    weights = np.empty(shape, np.float32)
    _decode(form, stored.reshape(-1, form.nbytes), weights.reshape(-1, form.weights))
    return weights


def _decode(form: Format, blocks_RC: np.ndarray, out_RW: np.ndarray) -> None:
    with np.errstate(all="ignore"):  # a scale that is inf or nan decodes to what it decodes to
        form.decode(blocks_RC, out_RW)

"""Matrices rounded to GGUF's blocks in the plainest way: each scale from its largest weight.

ggml searches for better scales, which costs it minutes; what is measured with these files is time,
which does not depend on the numbers. Layouts: llama3np/kernels/ggml.py, where they are decoded.
Each function takes weights_RW, R blocks of W float32, and returns blocks_RC of C bytes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llama3np.errors import InputError
from llama3np.kernels.ggml import FORMATS
from llama3np.load.gguf_file import Raw
from llama3np.load.lazy import Lazy


def tensor(w: Lazy, type: str) -> Raw:
    """A matrix as a tensor of a ggml type. Raises InputError if its rows are not whole blocks."""
    form, quantise = FORMATS[type], QUANTISE[type]
    if w.shape[1] % form.weights:
        raise InputError(f"{type}: expected rows of whole {form.weights}, found {w.shape[1]}")

    def chunks() -> Iterator[np.ndarray]:
        for chunk in w.chunks():
            yield quantise(chunk.reshape(-1, form.weights))

    return Raw(type, w.shape, Lazy((w.size // form.weights, form.nbytes), np.dtype("u1"), chunks))


def q8_0(weights_RW: np.ndarray) -> np.ndarray:
    """float16 d = largest / 127, then each weight as round(w / d)."""
    largest_R1 = np.abs(weights_RW).max(axis=1, keepdims=True)
    q_RW = np.rint(weights_RW * _inverse(largest_R1 / 127)).astype(np.int8)
    return np.hstack((_f16(largest_R1 / 127), q_RW.view(np.uint8)))


def q4_0(weights_RW: np.ndarray) -> np.ndarray:
    """float16 d = largest / -8, sign and all, so that it becomes 0 of 0..15; q = round(w/d) + 8."""
    at_R1 = np.abs(weights_RW).argmax(axis=1)[:, None]
    d_R1 = np.take_along_axis(weights_RW, at_R1, axis=1) / -8
    q_RW = _rounded(weights_RW * _inverse(d_R1) + 8, 15)
    return np.hstack((_f16(d_R1), q_RW[:, :16] | (q_RW[:, 16:] << 4)))


def q4_k(weights_RW: np.ndarray) -> np.ndarray:
    """Eight stretches of 32, w = d * scale * q - dmin * min, scale and min of 6 bits."""
    w_R8W = weights_RW.reshape(-1, 8, 32)
    min_R8 = np.maximum(-w_R8W.min(axis=2), 0)
    step_R8 = (w_R8W.max(axis=2) + min_R8) / 15
    d_R1, dmin_R1 = (a_R8.max(axis=1, keepdims=True) / 63 for a_R8 in (step_R8, min_R8))
    scale_R8, m_R8 = (
        _rounded(step_R8 * _inverse(d_R1), 63),
        _rounded(min_R8 * _inverse(dmin_R1), 63),
    )
    raised_R8W = w_R8W + (dmin_R1 * m_R8)[..., None]
    q_R42W = _rounded(raised_R8W * _inverse(d_R1 * scale_R8)[..., None], 15).reshape(-1, 4, 2, 32)
    q_RC = (q_R42W[:, :, 0] | (q_R42W[:, :, 1] << 4)).reshape(-1, 128)
    return np.hstack((_f16(d_R1), _f16(dmin_R1), _k_scales(scale_R8, m_R8), q_RC))


def _k_scales(scale_R8: np.ndarray, min_R8: np.ndarray) -> np.ndarray:
    """Twelve bytes: four scales and four minima whole, the others in 4 and 2 bits."""
    high_scale_R4, high_min_R4 = scale_R8[:, 4:], min_R8[:, 4:]
    return np.hstack(
        (
            scale_R8[:, :4] | (high_scale_R4 >> 4 << 6),
            min_R8[:, :4] | (high_min_R4 >> 4 << 6),
            (high_scale_R4 & 15) | (high_min_R4 << 4),
        )
    )


def q6_k(weights_RW: np.ndarray) -> np.ndarray:
    """Sixteen stretches of 16, w = d * scale * (q - 32), scale a signed byte."""
    w_R16W = weights_RW.reshape(-1, 16, 16)
    step_R16 = np.abs(w_R16W).max(axis=2) / 31
    d_R1 = step_R16.max(axis=1, keepdims=True) / 127
    scale_R16 = _rounded(step_R16 * _inverse(d_R1), 127)
    q_R16W = _rounded(w_R16W * _inverse(d_R1 * scale_R16)[..., None] + 32, 63)
    q_R24W = q_R16W.reshape(-1, 2, 4, 32)  # four stretches of 32 in each half
    low_RC = (q_R24W[:, :, :2] & 15) | (q_R24W[:, :, 2:] << 4)
    high_RC = sum((q_R24W[:, :, i] >> 4) << (2 * i) for i in range(4))
    parts = (low_RC.reshape(-1, 128), high_RC.reshape(-1, 64), scale_R16, _f16(d_R1))
    return np.hstack(parts)


QUANTISE = {"Q8_0": q8_0, "Q4_0": q4_0, "Q4_K": q4_k, "Q6_K": q6_k}


def _f16(d_R1: np.ndarray) -> np.ndarray:
    """As the two bytes of a float16."""
    return d_R1.astype("<f2").view(np.uint8)


def _inverse(d: np.ndarray) -> np.ndarray:
    """1 / d, and 0 where a stretch of zeros has no scale."""
    return np.divide(1, d, out=np.zeros_like(d, np.float32), where=d != 0)


def _rounded(x: np.ndarray, most: int) -> np.ndarray:
    """The nearest whole number of 0..most, uint8."""
    return np.clip(np.rint(x), 0, most).astype(np.uint8)

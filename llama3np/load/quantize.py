"""float32 as GGUF's Q8_0 blocks: 32 weights, each a signed byte times the block's float16 scale."""

from __future__ import annotations

import numpy as np

from llama3np.errors import InputError

WEIGHTS, NBYTES = 32, 34  # of one block


def q8_0(w_RC: np.ndarray, name: str) -> np.ndarray:
    """The blocks of some rows: (rows, columns) of any dtype -> (rows * columns / 32, 34) uint8.

    d = max |x| / 127, q = round(x * (1 / d)), halves away from zero; the d that is stored is
    rounded to float16 after that               (ggml-quants.c of ggml, quantize_row_q8_0_ref)
    Raises InputError, naming the tensor, for numbers whose scale float16 cannot hold.
    """
    x_BW = w_RC.astype(np.float32).reshape(-1, WEIGHTS)
    d_B1 = np.abs(x_BW).max(axis=1, keepdims=True) / np.float32(127)
    with np.errstate(over="ignore", divide="ignore", invalid="ignore"):
        stored_B1 = d_B1.astype(np.float16)
        exact_B1 = 1 / d_B1  # infinite only where float16 has no scale but 0
        inverse_B1 = np.where(np.isfinite(exact_B1), exact_B1, np.float32(0))
    if not np.isfinite(stored_B1).all():
        raise InputError(f"tensor {name!r}: has numbers that are not finite or too large for q8_0")
    q_BW = round_away(x_BW * inverse_B1).astype(np.int8)
    return np.hstack((stored_B1.view(np.uint8), q_BW.view(np.uint8)))


def round_away(x: np.ndarray) -> np.ndarray:
    """C's roundf: halves away from zero, where NumPy rounds them to even."""
    size = np.abs(x)
    whole = np.floor(size)
    return np.copysign(whole + (size - whole >= 0.5), x)

"""The product of profile "bf16-mm" in NumPy: activations rounded to bfloat16, float32 sums."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from llama3np.kernels.chunks import Transposed


def plain_product(x_MK: np.ndarray, w_OK: Any) -> np.ndarray:
    """round_bf16(x) @ w.T in float32: products of two bfloat16 numbers are exact in it.

    w is a bfloat16 array, or anything whose slices of rows are; it is widened chunk by chunk.
    """
    return rounded(x_MK) @ Transposed(w_OK)


def rounded(x: np.ndarray) -> np.ndarray:
    """The nearest bfloat16 numbers, ties to even, as float32."""
    return x.astype(ml_dtypes.bfloat16).astype(np.float32)

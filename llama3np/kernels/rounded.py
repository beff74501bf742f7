"""Profile "bf16-mm" in plain NumPy: activations rounded to bfloat16 as they enter a product."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np

from llama3np.kernels.half import Half


def round_bf16(x_MK: np.ndarray) -> np.ndarray:
    """To the nearest bfloat16, ties to even, in the type of x."""
    return x_MK.astype(ml_dtypes.bfloat16).astype(x_MK.dtype)


def plain_product(x_MK: np.ndarray, w_OK: Any) -> np.ndarray:
    """round_bf16(x) @ w.T with sums in float32: a product of two bfloat16 numbers is exact in it.

    w is a bfloat16 array or Joined; it is widened chunk by chunk.
    """
    return round_bf16(x_MK) @ Half(w_OK).T

"""The operations on single tokens, by stretches of them over the pool: a stretch stays in cache.

Each applies model.py's own operation, or one of the same numbers, to some tokens at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llama3np import model
from llama3np.threads import Pool

STRETCH = 2**16  # numbers of a stretch: what an operation makes of them fits a second-level cache


def over(pool: Pool, shape: tuple[int, ...], work: Callable[[slice], None]) -> None:
    """Call work(tokens) for stretches of tokens that cover an array of (M, ...)."""
    M, step = shape[0], max(1, STRETCH // int(np.prod(shape[1:])))
    pool.map(lambda i, _: work(slice(i * step, min((i + 1) * step, M))), -(-M // step))


def norm(x_BTD: np.ndarray, w_D: Any, eps: float) -> np.ndarray:
    """model.rms_norm of float32 or float64 by fewer calls: of one token, they take the time."""
    scale_BT = 1 / np.sqrt(np.vecdot(x_BTD, x_BTD) / x_BTD.shape[-1] + eps)
    return x_BTD * scale_BT[..., None] * w_D


def rms_norm(x_BTD: Any, w_D: Any, eps: float, *, pool: Pool) -> Any:
    """model.rms_norm."""
    if x_BTD.size <= STRETCH:
        return norm(x_BTD, w_D, eps)
    x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
    y_MD = np.empty_like(x_MD)

    def work(tokens: slice) -> None:
        y_MD[tokens] = norm(x_MD[tokens], w_D, eps)

    over(pool, x_MD.shape, work)
    return y_MD.reshape(x_BTD.shape)


def rope(x_BTNH: Any, cos_BTP: Any, sin_BTP: Any, pairing: str, *, pool: Pool) -> Any:
    """model.rope."""
    if x_BTNH.size <= STRETCH:
        return model.rope(x_BTNH, cos_BTP, sin_BTP, pairing)
    y_BTNH = np.empty_like(x_BTNH)
    for b in range(len(x_BTNH)):

        def work(tokens: slice, row: slice = slice(b, b + 1)) -> None:
            cos_1TP, sin_1TP = cos_BTP[row, tokens], sin_BTP[row, tokens]
            y_BTNH[row, tokens] = model.rope(x_BTNH[row, tokens], cos_1TP, sin_1TP, pairing)

        over(pool, x_BTNH.shape[1:], work)
    return y_BTNH


def swiglu(gate_BTF: Any, up_BTF: Any, *, pool: Pool) -> Any:
    """model.swiglu."""
    if gate_BTF.size <= STRETCH:
        return model.swiglu(gate_BTF, up_BTF)
    gate_MF, up_MF = (array.reshape(-1, array.shape[-1]) for array in (gate_BTF, up_BTF))
    act_MF = np.empty_like(gate_MF)

    def work(tokens: slice) -> None:
        act_MF[tokens] = model.swiglu(gate_MF[tokens], up_MF[tokens])

    over(pool, act_MF.shape, work)
    return act_MF.reshape(gate_BTF.shape)

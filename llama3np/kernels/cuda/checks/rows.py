"""What reads rows of a weight: widen, take and embed."""

from __future__ import annotations

from typing import Any

import cupy as cp
import numpy as np

from llama3np.kernels.cuda.checks.measures import (
    ULP,
    UNTOUCHED,
    same,
    untouched,
    weight,
    within,
)
from llama3np.kernels.cuda.launch import launch
from llama3np.kernels.cuda.registry import PLAIN, Kernel
from llama3np.kernels.cuda.step import pitch_of


def rows_of(kernel: Kernel, N: int, K: int, rng: np.random.Generator) -> None:
    """Rows to the last bit: a stretch of them, or those of ids, the last row among them."""
    (w, w_NK), start = weight(kernel, N, K, rng), N // 2
    ids = np.arange(start, N)
    which: dict[str, Any] = {"start": start}
    if kernel.entry == "take":
        ids = np.array([N - 1, 0, *rng.integers(0, N, 2)], np.int32)
        which = {"ids": cp.asarray(ids)}
    out = cp.full((len(ids), K + 3), UNTOUCHED, np.float32)
    launch(kernel, (len(ids),), 256, w=w, N=N, K=K, **which, out=out, pitch=K + 3)
    same(out.get()[:, :K], w_NK[ids], f"{kernel.name}: out")
    untouched(out.get()[:, K:], kernel.name)


def every_number(kernel: Kernel, rng: np.random.Generator) -> None:
    """Widen all numbers of 16 bits, but the subnormals of bfloat16.

    Those are float32's too, which are zero to kernels.
    """
    bits = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    if kernel.stored == PLAIN["BF16"]:
        bits = np.where((bits & 0x7F80) == 0, bits & 0x8000, bits).astype(np.uint16)
    w, out = bits.view(kernel.stored), cp.empty((256, 256), np.float32)
    launch(kernel, (256,), 256, w=cp.asarray(w), N=256, K=256, start=0, out=out, pitch=256)
    same(out.get(), w.astype(np.float32), f"{kernel.name}: out")


def embed(kernel: Kernel, N: int, K: int, rng: np.random.Generator) -> None:
    """Rows of tokens to the last bit, and the sums of their squares."""
    w, w_NK = weight(kernel, N, K, rng)
    ids = np.array([N - 1, 0, *rng.integers(0, N, 2)], np.int32)
    h = cp.full((len(ids), pitch_of(K) + 4), UNTOUCHED, np.float32)
    squares = cp.zeros(len(ids), np.float32)
    launch(
        kernel, (len(ids),), 256, w=w, N=N, K=K, tokens=cp.asarray(ids), h=h, pitch=h.shape[1],
        squares=squares,
    )  # fmt: skip
    same(h.get()[:, :K], w_NK[ids], f"{kernel.name}: h")
    untouched(h.get()[:, K:], kernel.name)
    exact = (w_NK[ids] ** 2).sum(axis=1)
    within(squares.get(), exact, (K / 256 + 20) * ULP * exact, f"{kernel.name}: squares")

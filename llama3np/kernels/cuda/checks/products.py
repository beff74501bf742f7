"""The products: project, gate_up, add, and swiglu between two of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy as cp
import ml_dtypes
import numpy as np

from llama3np import model
from llama3np.kernels.cuda import registry
from llama3np.kernels.cuda.checks.measures import (
    ULP,
    UNTOUCHED,
    numbers,
    on_device,
    same,
    untouched,
    vectors,
    weight,
    within,
)
from llama3np.kernels.cuda.launch import launch
from llama3np.kernels.cuda.registry import WARPS, Kernel
from llama3np.kernels.cuda.step import whole


def dot_bound(x_MK: np.ndarray, w_NK: np.ndarray, extra: int = 24) -> np.ndarray:
    """What a product may be off by: a lane's share of K sums, and what norm and decoding round.

    A weight scale * q - minimum is a difference: it is as exact as the largest of its row.
    """
    K = x_MK.shape[1]
    largest_NK = np.broadcast_to(np.abs(w_NK).max(axis=1, keepdims=True), w_NK.shape)
    return 1.01 * (K / 32 + extra) * ULP * (np.abs(x_MK) @ largest_NK.T)


def normed_arguments(
    kernel: Kernel, x_MK: np.ndarray, norm_K: np.ndarray, eps: float, parts: int
) -> dict[str, Any]:
    """Those of a kernel that norms vectors as it reads them; their squares are summed in parts."""
    M, K = dict(kernel.defines)["BATCH"], x_MK.shape[1]
    x, squares_MI = on_device(x_MK, M), np.zeros((M, parts), np.float32)
    for i, part in enumerate(np.array_split(x_MK, parts, axis=1)):
        squares_MI[: len(x_MK), i] = (part**2).sum(axis=1)
    return {
        "x": x, "x_pitch": x.shape[1], "K": K, "norm": whole(cp.asarray(norm_K)),
        "squares": cp.asarray(squares_MI), "parts": parts, "eps": eps, "rounded": 0,
    }  # fmt: skip


def normed(x_MK: np.ndarray, norm_K: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm in float64, of float32 numbers."""
    return model.rms_norm(x_MK.astype(np.float64), norm_K.astype(np.float64), eps)


def project(
    kernel: Kernel, sizes: Sequence[int], K: int, rows: int, rng: np.random.Generator,
    eps: float = 1e-5, parts: int = 3,
) -> None:  # fmt: skip
    """Project: y = W norm(x), for one to three weights of so many rows, side by side in y."""
    weights = [weight(kernel, N, K, rng) for N in sizes]
    x_MK, norm_K = vectors(rows, K, rng), rng.uniform(0.5, 2.0, K).astype(np.float32)
    padded = [*weights, *[weights[0]] * (3 - len(sizes))]
    counts = [*sizes, *[0] * (3 - len(sizes))]
    starts = np.cumsum([0, *counts]).tolist()
    arguments = {f"w{j}": w for j, (w, _) in enumerate(padded)}
    arguments |= {f"N{j}": N for j, N in enumerate(counts)}
    arguments |= {f"y{j}": starts[j] for j in range(3)}
    arguments |= normed_arguments(kernel, x_MK, norm_K, eps, parts)
    y = cp.full((dict(kernel.defines)["BATCH"], sum(sizes) + 3), UNTOUCHED, np.float32)
    blocks = sum(-(-N // registry.block_rows(kernel)) for N in sizes)
    launch(kernel, (blocks,), WARPS * 32, **arguments, y=y, y_pitch=y.shape[1])
    w_NK, exact_MK = np.concatenate([w for _, w in weights]), normed(x_MK, norm_K, eps)
    found = y.get()[:rows]
    within(found[:, :-3], exact_MK @ w_NK.T, dot_bound(exact_MK, w_NK), f"{kernel.name}: y")
    untouched(found[:, -3:], kernel.name)


def gate_up(kernel: Kernel, N: int, K: int, rows: int, rng: np.random.Generator) -> None:
    """Gate and up: y = silu(G norm(x)) * (U norm(x))."""
    (gate, gate_NK), (up, up_NK) = (weight(kernel, N, K, rng) for _ in range(2))
    x_MK, norm_K = vectors(rows, K, rng), rng.uniform(0.5, 2.0, K).astype(np.float32)
    y = cp.full((dict(kernel.defines)["BATCH"], N + 2), UNTOUCHED, np.float32)
    launch(
        kernel, (-(-N // registry.block_rows(kernel)),), WARPS * 32, gate=gate, up=up, N=N,
        **normed_arguments(kernel, x_MK, norm_K, 1e-5, 3), y=y, y_pitch=N + 2,
    )  # fmt: skip
    exact_MK = normed(x_MK, norm_K, 1e-5)
    gate_MN, up_MN = exact_MK @ gate_NK.T, exact_MK @ up_NK.T
    gate_bound, up_bound = dot_bound(exact_MK, gate_NK), dot_bound(exact_MK, up_NK)
    expected = model.swiglu(gate_MN, up_MN)
    silu = np.abs(model.swiglu(gate_MN, np.ones_like(up_MN)))  # whose slope is at most 1.1
    bound = 1.1 * gate_bound * (np.abs(up_MN) + up_bound) + silu * up_bound
    found = y.get()[:rows]
    within(found[:, :N], expected, bound + 16 * ULP * np.abs(expected), f"{kernel.name}: y")
    untouched(found[:, N:], kernel.name)


def add(
    kernel: Kernel, N: int, K: int, rows: int, rng: np.random.Generator, rounded: int = 0
) -> None:
    """Add: y += W x, and the sums of squares of the new y. rounded: x to bfloat16 first."""
    (w, w_NK), x_MK = weight(kernel, N, K, rng), vectors(rows, K, rng)
    M, old_MN = dict(kernel.defines)["BATCH"], numbers(rng, (rows, N), np.float32)
    x, y = on_device(x_MK, M), on_device(old_MN, M)
    blocks = -(-N // registry.block_rows(kernel))
    squares = cp.zeros((M, blocks * registry.square_parts(kernel)), np.float32)
    launch(
        kernel, (blocks,), WARPS * 32, w=w, N=N, K=K, x=x, x_pitch=x.shape[1], rounded=rounded,
        y=y, y_pitch=y.shape[1], squares=squares,
    )  # fmt: skip
    wide_MK = (x_MK.astype(ml_dtypes.bfloat16) if rounded else x_MK).astype(np.float64)
    expected, found = old_MN + wide_MK @ w_NK.T, y.get()
    bound = dot_bound(wide_MK, w_NK) + ULP * np.abs(expected)
    within(found[:rows, :N], expected, bound, f"{kernel.name}: y")
    same(found[:, N:], np.zeros_like(found[:, N:]), f"{kernel.name}: the end of a row: ")
    exact = (found[:rows, :N].astype(np.float64) ** 2).sum(axis=1)
    sums = squares.get()[:rows].astype(np.float64).sum(axis=1)
    within(sums, exact, 20 * ULP * exact, f"{kernel.name}: squares")


def swiglu(kernel: Kernel, N: int, M: int, rng: np.random.Generator) -> None:
    """SwiGLU of two buffers: y = silu(y) * other."""
    gate_MN, up_MN = numbers(rng, (2, M, N), np.float32) * np.float32(30)
    gate_MN[:, 0] = -200  # where e^-x would overflow
    y, other = on_device(gate_MN, M), on_device(up_MN, M)
    y[:, N:] = UNTOUCHED
    launch(kernel, (-(-N // 256), M), 256, y=y, other=other, N=N, pitch=y.shape[1])
    expected = model.swiglu(gate_MN.astype(np.float64), up_MN.astype(np.float64))
    found, bound = y.get(), 16 * ULP * np.abs(expected) + 1e-30
    within(found[:, :N], expected, bound, f"{kernel.name}: y")
    untouched(found[:, N:], kernel.name)

"""The operations on single tokens, compiled: as in model.py, on float32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from llama3np.kernels.cpu.attend import turn_row
from llama3np.kernels.cpu.compiler import jit
from llama3np.kernels.cpu.exp import exp_f32
from llama3np.kernels.cpu.shared import address, floats, words
from llama3np.threads import Pool


@jit
def norm_row(x, weight, eps, out, D):
    """RMSNorm of D float32 at address x: model.rms_norm, all by their addresses."""
    x_D, weight_D, out_D = floats(x, D), floats(weight, D), floats(out, D)
    total = np.float32(0)
    for i in range(D):
        total += x_D[i] * x_D[i]
    scale = np.float32(1) / np.sqrt(total / np.float32(D) + eps)
    for i in range(D):
        out_D[i] = x_D[i] * scale * weight_D[i]


@jit
def gate_row(gate, up, out, n):
    """silu(gate) * up of n float32 each at their addresses: model.swiglu."""
    gate_N, up_N, out_N = floats(gate, n), floats(up, n), floats(out, n)
    for i in range(n):
        out_N[i] = gate_N[i] / (np.float32(1) + exp_f32(-gate_N[i])) * up_N[i]


@jit
def round_row(x, n):
    """Round n float32 at an address to the nearest bfloat16, ties to even, in place."""
    bits_N = words(x, n)
    for i in range(n):
        bits = bits_N[i]
        odd = (bits >> np.uint32(16)) & np.uint32(1)
        up = bits + np.uint32(0x7FFF) + odd
        is_nan = (bits & np.uint32(0x7FFFFFFF)) > np.uint32(0x7F800000)  # a carry would hide it
        bits_N[i] = (bits | np.uint32(0x400000) if is_nan else up) & np.uint32(0xFFFF0000)


@jit
def _norm_rows(x, weight, eps, out, rows, D):
    for row in range(rows):
        norm_row(x + 4 * D * row, weight, eps, out + 4 * D * row, D)


@jit
def _turn_rows(x, cos, sin, tokens, heads, H, interleaved):
    for t in range(tokens):
        for n in range(heads):
            angle = 2 * H * t  # H / 2 numbers of 4 bytes for each token
            turn_row(x + 4 * H * (t * heads + n), cos + angle, sin + angle, H, interleaved)


# ---- of many tokens, over a pool ---------------------------------------------------------------

ENOUGH = 2**20  # numbers of which each thread's share takes longer than to wake it


def _share(pool: Pool, rows: int, columns: int, work: Callable[[int, int], None]) -> None:
    """Call work(first, rows) for parts of this many rows, one for each thread if it pays."""
    parts = pool.threads if rows * columns > ENOUGH else 1
    ends = [rows * i // parts for i in range(parts + 1)]
    pool.map(lambda i, _: work(ends[i], ends[i + 1] - ends[i]), parts)


def rms_norm(x_BTD: np.ndarray, w_D: np.ndarray, eps: float, *, pool: Pool) -> np.ndarray:
    """model.rms_norm of float32 in any number of dimensions."""
    x_BTD, y_BTD, D = np.ascontiguousarray(x_BTD), np.empty(x_BTD.shape, np.float32), len(w_D)
    w_D = np.ascontiguousarray(w_D, np.float32)  # a vector of 16 bits is widened, as in the spec
    x, w, y = map(address, (x_BTD, w_D, y_BTD))

    def work(first: int, rows: int) -> None:
        _norm_rows(x + 4 * D * first, w, np.float32(eps), y + 4 * D * first, rows, D)

    _share(pool, x_BTD.size // D, D, work)
    return y_BTD


def rope(x_BTNH: np.ndarray, cos_BTP: Any, sin_BTP: Any, pairing: str, *, pool: Pool) -> np.ndarray:
    """model.rope of float32."""
    y_BTNH, (B, T, N, H) = x_BTNH.copy(), x_BTNH.shape
    cos_BTP, sin_BTP = np.ascontiguousarray(cos_BTP), np.ascontiguousarray(sin_BTP)
    y, cos, sin = map(address, (y_BTNH, cos_BTP, sin_BTP))

    def work(first: int, tokens: int) -> None:
        angle, head = 2 * H * first, 4 * H * N * first  # H / 2 numbers of a token, and H * N
        _turn_rows(y + head, cos + angle, sin + angle, tokens, N, H, pairing == "interleaved")

    _share(pool, B * T, N * H, work)
    return y_BTNH


def swiglu(gate_BTF: np.ndarray, up_BTF: np.ndarray, *, pool: Pool) -> np.ndarray:
    """model.swiglu of float32 in any number of dimensions."""
    gate_BTF, up_BTF, F = *map(np.ascontiguousarray, (gate_BTF, up_BTF)), gate_BTF.shape[-1]
    act_BTF = np.empty_like(gate_BTF)
    gate, up, act = map(address, (gate_BTF, up_BTF, act_BTF))

    def work(first: int, rows: int) -> None:
        start = 4 * F * first
        gate_row(gate + start, up + start, act + start, rows * F)

    _share(pool, act_BTF.size // F, F, work)
    return act_BTF

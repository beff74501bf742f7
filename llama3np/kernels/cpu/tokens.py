"""The operations on single tokens, compiled: what kernels/tokens.py applies to stretches."""

from __future__ import annotations

from typing import Any

import numpy as np

from llama3np.kernels.cpu.attend import turn_row
from llama3np.kernels.cpu.compiler import jit
from llama3np.kernels.cpu.exp import exp_f32
from llama3np.kernels.cpu.shared import address, floats, words


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


def rms_norm(x_BTD: np.ndarray, w_D: np.ndarray, eps: float) -> np.ndarray:
    """model.rms_norm of float32 in any number of dimensions."""
    x_BTD, y_BTD, D = np.ascontiguousarray(x_BTD), np.empty(x_BTD.shape, np.float32), len(w_D)
    w_D = np.ascontiguousarray(w_D, np.float32)  # a vector of 16 bits is widened, as in the spec
    where = address(x_BTD), address(w_D), np.float32(eps), address(y_BTD)
    _norm_rows(*where, x_BTD.size // D, D)
    return y_BTD


def rope(x_BTNH: np.ndarray, cos_BTP: Any, sin_BTP: Any, pairing: str) -> np.ndarray:
    """model.rope of float32."""
    y_BTNH, (B, T, N, H) = x_BTNH.copy(), x_BTNH.shape
    cos_BTP, sin_BTP = np.ascontiguousarray(cos_BTP), np.ascontiguousarray(sin_BTP)
    whole = address(y_BTNH), address(cos_BTP), address(sin_BTP)
    _turn_rows(*whole, B * T, N, H, pairing == "interleaved")
    return y_BTNH


def swiglu(gate_MF: np.ndarray, up_MF: np.ndarray) -> np.ndarray:
    """model.swiglu of float32 in any number of dimensions."""
    gate_MF, up_MF = np.ascontiguousarray(gate_MF), np.ascontiguousarray(up_MF)
    act_MF = np.empty_like(gate_MF)
    gate_row(address(gate_MF), address(up_MF), address(act_MF), act_MF.size)
    return act_MF

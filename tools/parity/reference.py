"""Llama in float64 throughout, the truth that both sides are measured against.

transformers loaded in float64 is no such truth: its RMSNorm, softmax and RoPE stay in float32. So
this is a forward pass of its own, in matrices, from the published equations: RoPE as a product of
complex numbers, keys and values repeated for each query head, the stretched frequencies in the
form with branches. tests/test_parity.py holds it against the scalar loops of tests/oracle.py.
"""

from __future__ import annotations

import math

import numpy as np

from llama3np.config import Config
from llama3np.load.lazy import Lazy
from llama3np.params import Layer, Params

QUERIES = 256  # at a time: N * 256 * S scores fit in memory


def logits(params: Params, config: Config, ids_T: np.ndarray, first: int = 0) -> np.ndarray:
    """Logits (T - first, V) at positions first.., from weights in Meta's order of rows."""
    x_TD = np.asarray(params.embed_VD, np.float64)[ids_T]
    for layer in params.layers:
        x_TD = x_TD + attention(rms_norm(x_TD, layer.attn_norm_D, config), layer, config)
        x_TD = x_TD + feed_forward(rms_norm(x_TD, layer.mlp_norm_D, config), layer)
    return linear(rms_norm(x_TD[first:], params.norm_D, config), params.head_VD)


def linear(x_TD: np.ndarray, w: Lazy) -> np.ndarray:
    """The product with a matrix that is made in chunks of rows, each widened for itself."""
    return np.concatenate([x_TD @ rows.astype(np.float64).T for rows in w.chunks()], axis=1)


def rms_norm(x_TD: np.ndarray, w_D: Lazy, config: Config) -> np.ndarray:
    mean_T1 = np.mean(x_TD**2, axis=1, keepdims=True)
    return x_TD / np.sqrt(mean_T1 + config.norm_eps) * np.asarray(w_D, np.float64)


def feed_forward(x_TD: np.ndarray, layer: Layer) -> np.ndarray:
    gate_TF, up_TF = linear(x_TD, layer.w_gate), linear(x_TD, layer.w_up)
    return linear(gate_TF / (1 + np.exp(-gate_TF)) * up_TF, layer.w_down)


def attention(x_TD: np.ndarray, layer: Layer, config: Config) -> np.ndarray:
    T, H, group = len(x_TD), config.head_dim, config.group
    turns_TP = rotations(config, np.arange(T))
    q_NTH = turned(linear(x_TD, layer.wq).reshape(T, -1, H), turns_TP).swapaxes(0, 1)
    k_TKH = turned(linear(x_TD, layer.wk).reshape(T, -1, H), turns_TP)
    v_TKH = linear(x_TD, layer.wv).reshape(T, -1, H)
    k_NTH, v_NTH = (np.repeat(a_TKH, group, axis=1).swapaxes(0, 1) for a_TKH in (k_TKH, v_TKH))
    mixed_NTH = np.empty_like(q_NTH)
    for start in range(0, T, QUERIES):
        stop = min(start + QUERIES, T)  # the last of these queries sees no key from here on
        scores_NMS = q_NTH[:, start:stop] @ k_NTH[:, :stop].swapaxes(1, 2) / math.sqrt(H)
        scores_NMS[:, np.arange(start, stop)[:, None] < np.arange(stop)] = -math.inf
        powers_NMS = np.exp(scores_NMS - scores_NMS.max(axis=2, keepdims=True))
        probs_NMS = powers_NMS / powers_NMS.sum(axis=2, keepdims=True)
        mixed_NTH[:, start:stop] = probs_NMS @ v_NTH[:, :stop]
    return linear(mixed_NTH.swapaxes(0, 1).reshape(T, -1), layer.wo)


def turned(x_TNH: np.ndarray, turns_TP: np.ndarray) -> np.ndarray:
    """Each pair of neighbours as one complex number, turned by its position's angle."""
    pairs_TNP = np.ascontiguousarray(x_TNH).view(np.complex128)
    return (pairs_TNP * turns_TP[:, None]).view(np.float64)


def rotations(config: Config, positions_T: np.ndarray) -> np.ndarray:
    """The complex numbers cos + i sin of position * frequency, (T, P)."""
    return np.exp(1j * positions_T[:, None] * frequencies(config))


def frequencies(config: Config) -> np.ndarray:
    """theta^(-2i/H) of pair i, and Meta's apply_scaling of it where the config has a scaling."""
    H = config.head_dim
    freqs = [config.rope_theta ** (-2 * i / H) for i in range(H // 2)]
    if (scaling := config.rope_scaling) is None:
        return np.array(freqs)
    low, high = scaling.low_freq_factor, scaling.high_freq_factor
    stretched = []
    for freq in freqs:
        wavelength = 2 * math.pi / freq
        if wavelength < scaling.old_context / high:
            stretched.append(freq)
        elif wavelength > scaling.old_context / low:
            stretched.append(freq / scaling.factor)
        else:
            smooth = (scaling.old_context / wavelength - low) / (high - low)
            stretched.append((1 - smooth) * freq / scaling.factor + smooth * freq)
    return np.array(stretched)

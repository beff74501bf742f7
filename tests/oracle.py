"""Llama in scalar loops, written from the published equations; it shares no code with the package.

Every vector is a list of numbers and every sum is a loop. The numbers are Python floats, that is
float64; with `number=np.float32` the same loops tell how far an honest float32 forward strays
from the truth, which is where the float32 tolerances of the tests come from.

Equations: RMSNorm, Zhang & Sennrich 2019; RoPE, Su et al. 2021; grouped heads, Ainslie et al.
2023; SwiGLU, Shazeer 2020; the stretched RoPE of Llama 3.1, Meta's `apply_scaling`, in its own
form with branches.
"""

import math
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Scaling:
    factor: float
    low: float
    high: float
    old_context: int


@dataclass(frozen=True)
class Sizes:
    """The plain numbers of one model; all other sizes are those of its weights."""

    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    eps: float
    theta: float
    scaling: Scaling | None = None
    pairing: str = "interleaved"  # or "half": pair (i, i + P) of a head in place of (2i, 2i + 1)


# ---------------------------------------------------------------- the equations


def dot(a, b):
    total = 0.0
    for x, y in zip(a, b, strict=True):
        total = total + x * y
    return total


def matvec(matrix, x):
    return [dot(row, x) for row in matrix]


def add(a, b):
    return [x + y for x, y in zip(a, b, strict=True)]


def rms_norm(x, weight, eps, number):
    root = number(math.sqrt(dot(x, x) / len(x) + eps))
    return [value / root * w for value, w in zip(x, weight, strict=True)]


def inverse_frequencies(head_dim, theta, scaling):
    return [scaled(theta ** (-2 * i / head_dim), scaling) for i in range(head_dim // 2)]


def scaled(freq, scaling):
    if scaling is None:
        return freq
    wavelength = 2 * math.pi / freq
    if wavelength < scaling.old_context / scaling.high:
        return freq
    if wavelength > scaling.old_context / scaling.low:
        return freq / scaling.factor
    smooth = (scaling.old_context / wavelength - scaling.low) / (scaling.high - scaling.low)
    return (1 - smooth) * freq / scaling.factor + smooth * freq


def interleaved(head, pairing):
    """Bring the pairs of a head next to each other: a0 b0 a1 b1 ..."""
    if pairing == "interleaved":
        return head
    half = len(head) // 2
    return [head[i + side * half] for i in range(half) for side in (0, 1)]


def rotate(head, position, freqs, number):
    turned = []
    for i, freq in enumerate(freqs):
        angle = number(position) * number(freq)
        cos, sin = number(math.cos(angle)), number(math.sin(angle))
        a, b = head[2 * i], head[2 * i + 1]
        turned += [a * cos - b * sin, a * sin + b * cos]
    return turned


def softmax(scores, number):
    largest = max(scores)
    powers = [number(math.exp(score - largest)) for score in scores]
    total = dot(powers, [1.0] * len(powers))
    return [power / total for power in powers]


def silu(x, number):
    return x / (1 + number(math.exp(-x)))


# ---------------------------------------------------------------- the model


def forward(tensors, sizes, ids, number=float):
    """All taps and the logits of one sequence of token ids that starts at position 0.

    `tensors` are arrays by the names of llama3np.params.named; a head that is not there is tied.
    Returns a dict of float64 arrays in the order of the forward pass, without a batch axis: the
    heads of q, k, v, q_rope, k_rope, attn are (T, heads, H), scores and probs (N, T, T) with
    -inf and 0 where a query may not look.
    """
    weights = {name: lists(array, number) for name, array in tensors.items()}
    taps = {}
    x = [weights["embed_VD"][token] for token in ids]
    taps["embed"] = x
    for i in range(sizes.n_layers):
        prefix = f"layers.{i}."
        of_layer = {
            name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)
        }
        layer_taps = block(x, of_layer, sizes, number)
        taps |= {prefix + name: value for name, value in layer_taps.items()}
        x = layer_taps["h"]
    taps["norm"] = [rms_norm(row, weights["norm_D"], sizes.eps, number) for row in x]
    head = weights.get("head_VD", weights["embed_VD"])
    taps["logits"] = [matvec(head, row) for row in taps["norm"]]
    return {name: np.array(value, dtype=np.float64) for name, value in taps.items()}


def block(x, w, sizes, number):
    taps = {"attn_norm": [rms_norm(row, w["attn_norm_D"], sizes.eps, number) for row in x]}
    taps |= attention(taps["attn_norm"], w, sizes, number)
    taps["h_mid"] = [add(row, out) for row, out in zip(x, taps["attn_out"], strict=True)]
    taps["mlp_norm"] = [rms_norm(row, w["mlp_norm_D"], sizes.eps, number) for row in taps["h_mid"]]
    taps["gate"] = [matvec(w["w_gate"], row) for row in taps["mlp_norm"]]
    taps["up"] = [matvec(w["w_up"], row) for row in taps["mlp_norm"]]
    taps["act"] = [
        [silu(g, number) * u for g, u in zip(gate, up, strict=True)]
        for gate, up in zip(taps["gate"], taps["up"], strict=True)
    ]
    taps["mlp_out"] = [matvec(w["w_down"], row) for row in taps["act"]]
    taps["h"] = [add(row, out) for row, out in zip(taps["h_mid"], taps["mlp_out"], strict=True)]
    return taps


def attention(x, w, sizes, number):
    H, N, G = sizes.head_dim, sizes.n_heads, sizes.n_heads // sizes.n_kv_heads
    freqs = inverse_frequencies(H, sizes.theta, sizes.scaling)
    q = [[interleaved(h, sizes.pairing) for h in heads(matvec(w["wq"], row), H)] for row in x]
    k = [[interleaved(h, sizes.pairing) for h in heads(matvec(w["wk"], row), H)] for row in x]
    v = [heads(matvec(w["wv"], row), H) for row in x]
    q_rope = [[rotate(h, t, freqs, number) for h in row] for t, row in enumerate(q)]
    k_rope = [[rotate(h, t, freqs, number) for h in row] for t, row in enumerate(k)]

    scores = [[[-math.inf] * len(x) for _ in x] for _ in range(N)]
    probs = [[[0.0] * len(x) for _ in x] for _ in range(N)]
    attn = [[None] * N for _ in x]
    for n in range(N):
        shared = n // G  # query heads 0 .. G-1 read key/value head 0, the next G head 1, ...
        for t in range(len(x)):
            past = range(t + 1)  # a token sees itself and what came before
            visible = [dot(q_rope[t][n], k_rope[s][shared]) / number(math.sqrt(H)) for s in past]
            scores[n][t][: t + 1] = visible
            probs[n][t][: t + 1] = weight = softmax(visible, number)
            attn[t][n] = [dot(weight, [v[s][shared][h] for s in past]) for h in range(H)]

    attn_out = [matvec(w["wo"], [value for head in row for value in head]) for row in attn]
    names = ("q", "k", "v", "q_rope", "k_rope", "scores", "probs", "attn", "attn_out")
    return dict(zip(names, (q, k, v, q_rope, k_rope, scores, probs, attn, attn_out), strict=True))


def heads(vector, size):
    return [vector[start : start + size] for start in range(0, len(vector), size)]


def lists(array, number):
    """Nested lists of numbers: scalar loops over them are three times faster than over arrays."""
    if array.ndim == 1:
        return [number(value) for value in array]
    return [lists(row, number) for row in array]

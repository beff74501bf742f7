"""Llama 3: the whole forward pass, in plain array operations. Read it from top to bottom.

    token ids -> embedding -> L blocks of (attention, feed-forward) -> norm -> logits

Every array's name ends in its dimensions:
    B sequences, T new tokens, S positions in the cache, D width, F feed-forward, V vocabulary,
    N query heads = K key/value heads * G query heads for each, H head size, P = H/2 RoPE pairs.
Weight matrices are (out, in), as checkpoints store them, and carry no suffix.
"""

from collections import namedtuple
from functools import partial
from math import inf, pi

import numpy as np

from llama3np.backend import host_ids, namespace, narrow, widen

# ---- the five operations ------------------------------------------------------------------------


def rms_norm(x_BTD, w_D, eps):
    """Scale each vector to root mean square 1, then by a learned weight.

    y = x / sqrt(mean(x^2) + eps) * w        Zhang & Sennrich 2019; casts: Meta llama/model.py:44-46
    """
    xp = namespace(x_BTD)
    wide_BTD = widen(x_BTD)  # bf16 keeps 8 bits, too few for a sum of D = 4096 squares
    scale_BT1 = 1 / xp.sqrt((wide_BTD * wide_BTD).mean(axis=-1, keepdims=True) + eps)
    return narrow(wide_BTD * scale_BT1, x_BTD) * w_D  # bf16 shows this order


def linear(x_BTD, w):
    """Multiply every vector by a weight matrix: y = W x, written for rows as x @ W.T."""
    x_MD = widen(x_BTD.reshape(-1, x_BTD.shape[-1]))  # M = B * T rows: a product of two matrices
    return narrow(x_MD @ w.T, x_BTD).reshape(*x_BTD.shape[:-1], w.shape[0])


def rope(x_BTNH, cos_BTP, sin_BTP, pairing):
    """Turn each pair (a, b) of a head by its position's angle.

    (a, b) -> (a cos - b sin, a sin + b cos)            Su et al. 2021
    "interleaved" (Meta, GGUF): a, b = x[2i], x[2i+1];  "half" (Hugging Face): a, b = x[i], x[i+P]
    Scores then depend on the distance of two positions only, and are the same for both pairings.
    """
    P = cos_BTP.shape[-1]
    even_odd, halves = (np.s_[0::2], np.s_[1::2]), (np.s_[:P], np.s_[P:])
    first, second = even_odd if pairing == "interleaved" else halves
    a_BTNP, b_BTNP = x_BTNH[..., first], x_BTNH[..., second]
    cos_BT1P, sin_BT1P = cos_BTP[:, :, None], sin_BTP[:, :, None]  # one angle for all heads
    turned_BTNH = namespace(x_BTNH).empty_like(x_BTNH)
    turned_BTNH[..., first] = a_BTNP * cos_BT1P - b_BTNP * sin_BT1P
    turned_BTNH[..., second] = a_BTNP * sin_BT1P + b_BTNP * cos_BT1P
    return turned_BTNH


def attention(q_BTNH, k_BKSH, v_BKSH, positions_BT, see):
    """Let each query take a mean of the values, weighted by how well it matches their keys.

    softmax(q k^T / sqrt(H)) v        Vaswani et al. 2017; heads in groups: Ainslie et al. 2023
    The G queries of a group stand as rows of one matrix, so keys and values are never repeated.
    """
    (B, T, N, H), (K, S) = q_BTNH.shape, k_BKSH.shape[1:3]
    xp, G, k_BKHS = namespace(q_BTNH), N // K, widen(k_BKSH).swapaxes(2, 3)
    q_BKGTH = widen(q_BTNH).reshape(B, T, K, G, H).transpose(0, 2, 3, 1, 4)
    raw_BKGTS = narrow(q_BKGTH.reshape(B, K, G * T, H) @ k_BKHS, q_BTNH).reshape(B, K, G, T, S)
    # The query at position p stands in row p - length, because the cache holds the rows before it;
    # it sees the keys at 0..p. This one mask serves prefill, chunks, decode and ragged rows.
    visible_B11TS = xp.arange(S) <= positions_BT[:, None, None, :, None]
    scores_BKGTS = narrow(xp.where(visible_B11TS, widen(raw_BKGTS) * H**-0.5, -inf), q_BTNH)
    see("scores", scores_BKGTS.reshape(B, N, T, S))
    powers_BKGTS = xp.exp(widen(scores_BKGTS) - widen(scores_BKGTS.max(axis=-1, keepdims=True)))
    probs_BKGTS = narrow(powers_BKGTS / powers_BKGTS.sum(axis=-1, keepdims=True), q_BTNH)
    see("probs", probs_BKGTS.reshape(B, N, T, S))
    attn_BKGTH = (widen(probs_BKGTS).reshape(B, K, G * T, S) @ widen(v_BKSH)).reshape(B, K, G, T, H)
    return narrow(attn_BKGTH, q_BTNH).transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def swiglu(gate_BTF, up_BTF):
    """Let one projection gate the other: silu(gate) * up, silu(x) = x / (1 + e^-x). Shazeer 2020"""
    xp = namespace(gate_BTF)
    bounded_BTF = xp.maximum(widen(gate_BTF), -88)  # e^89 overflows; silu(-88) is 0 but for 1e-36
    return narrow(widen(gate_BTF) / (1 + xp.exp(-bounded_BTF)), gate_BTF) * up_BTF


# forward takes them as one tuple; an engine replaces them one by one, PLAIN._replace(linear=...)
Ops = namedtuple("Ops", "rms_norm linear rope attention swiglu")
PLAIN = Ops(rms_norm, linear, rope, attention, swiglu)

# ---- the model ----------------------------------------------------------------------------------


def block(layer, h_BTD, write, turn, positions_BT, config, ops, see):
    """Add to the residual stream what attention finds, then what the feed-forward makes of it."""
    B, T, _ = h_BTD.shape
    heads = (B, T, -1, config.head_dim)
    x_BTD = see("attn_norm", ops.rms_norm(h_BTD, layer.attn_norm_D, config.norm_eps))
    q_BTNH = see("q", ops.linear(x_BTD, layer.wq).reshape(heads))
    k_BTKH = see("k", ops.linear(x_BTD, layer.wk).reshape(heads))
    v_BTKH = see("v", ops.linear(x_BTD, layer.wv).reshape(heads))
    q_rope_BTNH, k_rope_BTKH = see("q_rope", turn(q_BTNH)), see("k_rope", turn(k_BTKH))
    k_BKSH, v_BKSH = write(k_rope_BTKH, v_BTKH)  # the cache holds keys already turned
    attn_BTNH = see("attn", ops.attention(q_rope_BTNH, k_BKSH, v_BKSH, positions_BT, see))
    out_BTD = see("attn_out", ops.linear(attn_BTNH.reshape(B, T, -1), layer.wo))
    h_mid_BTD = see("h_mid", h_BTD + out_BTD)
    y_BTD = see("mlp_norm", ops.rms_norm(h_mid_BTD, layer.mlp_norm_D, config.norm_eps))
    gate_BTF = see("gate", ops.linear(y_BTD, layer.w_gate))
    up_BTF = see("up", ops.linear(y_BTD, layer.w_up))
    act_BTF = see("act", ops.swiglu(gate_BTF, up_BTF))
    return see("h", h_mid_BTD + see("mlp_out", ops.linear(act_BTF, layer.w_down)))


def rope_tables(config, positions_BT, dtype):
    """Cosine and sine of every position's angles, position * theta^(-2i/H) for pair i of P.

    In float32 as in training: a more exact table would be another model at long context.
    "llama3" scaling stretches the wavelengths longer than old_context / high_freq_factor, the
    longest by the whole factor: Meta llama-models model.py.
    """
    xp, H, dtype = namespace(positions_BT), config.head_dim, np.result_type(dtype, np.float32)
    freq_P = 1 / np.power(config.rope_theta, np.arange(0, H, 2) / H).astype(dtype)
    if (scaling := config.rope_scaling) is not None:
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        turns_P = scaling.old_context * freq_P / (2 * pi)  # full turns within the old context
        keep_P = np.clip((turns_P - low) / (high - low), 0, 1)
        freq_P = (1 - keep_P) * freq_P / scaling.factor + keep_P * freq_P
    angles_BTP = positions_BT[:, :, None].astype(dtype) * xp.asarray(freq_P)
    return xp.cos(angles_BTP), xp.sin(angles_BTP)


def watcher(tap, pairing, prefix=""):
    """Return see(name, array) -> array: shows it to the tap, heads in interleaved order always."""

    def see(name, array):
        shown = array
        if pairing == "half" and name in ("q", "k", "q_rope", "k_rope"):
            shown = array.reshape(*array.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(array.shape)
        tap(prefix + name, shown)
        return array

    return see if tap else lambda name, array: array


def forward(
    params, config, ids_BT, cache, new_B=None, dtype="float32", ops=PLAIN, tap=None, last_only=True
):
    """Run T new tokens a row through the model; return logits and the cache, advanced by them.

    Row b's tokens stand at positions cache.lengths_B[b] + 0..T-1. In a ragged batch rows are padded
    on the right with any id, and only the first new_B[b] tokens of row b are real.
    logits_BTV is (B, 1, V), after each row's last real token (if any), or all T if not last_only.
    All arithmetic is in dtype; tap(name, array) is shown every intermediate, in order.
    Raises InputError, before any work, for an id or a length out of range.
    """
    xp, ids_BT = namespace(params.norm_D), host_ids(ids_BT, config.vocab_size)
    cache.check(config, dtype, xp)
    window = cache.window(ids_BT.shape, new_B)
    cos_BTP, sin_BTP = rope_tables(config, window.positions_BT, dtype)
    turn = partial(ops.rope, cos_BTP=cos_BTP, sin_BTP=sin_BTP, pairing=config.rope_pairing)
    see = watcher(tap, config.rope_pairing)
    h_BTD = see("embed", params.embed_VD[xp.asarray(ids_BT)].astype(dtype, copy=False))
    for i, layer in enumerate(params.layers):
        write = partial(cache.write, i, window)
        see_i = watcher(tap, config.rope_pairing, f"layers.{i}.")
        h_BTD = block(layer, h_BTD, write, turn, window.positions_BT, config, ops, see_i)
    wanted = window.last if last_only else slice(None)  # T is 1 from here on if last_only
    norm_BTD = see("norm", ops.rms_norm(h_BTD[wanted], params.norm_D, config.norm_eps))
    logits_BTV = see("logits", widen(ops.linear(norm_BTD, params.head_VD)))
    cache.advance(window)
    return logits_BTV, cache

"""The backward pass of model.py, in plain array operations: the same functions, read from the end.

For an intermediate y and the loss L, d_y is dL/dy: an array of y's shape, whose every entry says
how much L grows with that entry of y. Each function takes d_ of what an operation returned and what
the operation was given, and returns d_ of that. Two rules are all it takes:

    y = f(x)          d_x = J^T d_y, J the derivatives of y's entries by x's     (the chain rule)
    x used twice      d_x is the sum of what both uses give

The dimensions are model.py's; M is B * T rows, as in linear, and a matrix has O rows and I columns.
The forward pass is model.py itself: what is needed of it are its taps. From the loss back to the
first input is the reverse mode of Griewank & Walther 2008; each formula is derived where it stands.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Mapping
from functools import partial
from typing import Any, Protocol

import numpy as np

from llama3np import model
from llama3np.backend import namespace
from llama3np.cache import Window
from llama3np.config import Config
from llama3np.params import Layer, Params

Seen = Mapping[str, Any]  # tap name -> array

# ---- the operations -----------------------------------------------------------------------------


def token_losses(logits_BTV: Any, targets_BT: Any) -> tuple[Any, Any, Any]:
    """The loss of each token, -ln softmax(z)_t = ln(sum_j e^z_j) - z_t; e^z_BTV; its sums_BT1.

    z are the logits less their maximum: they have the same softmax, and e^z cannot overflow.
    targets_BT: ids 0 .. V-1.
    """
    xp = namespace(logits_BTV)
    powers_BTV = logits_BTV - logits_BTV.max(axis=-1, keepdims=True)
    chosen_BT1 = xp.take_along_axis(powers_BTV, targets_BT[..., None], axis=-1)
    xp.exp(powers_BTV, out=powers_BTV)
    sums_BT1 = powers_BTV.sum(axis=-1, keepdims=True)
    return (xp.log(sums_BT1) - chosen_BT1)[..., 0], powers_BTV, sums_BT1


def cross_entropy(logits_BTV: Any, targets_BT: Any, weights_BT: Any) -> tuple[float, Any]:
    """The loss, a weighted sum of -ln p(target), and d_logits_BTV.

    With p = softmax(z), the derivative of ln(sum_j e^z_j) - z_t by z_j is p_j, less 1 for j = t.
    A target of weight 0 counts nothing, but is an id 0 .. V-1 all the same.
    """
    xp, at_BT1 = namespace(logits_BTV), targets_BT[..., None]
    losses_BT, d_logits_BTV, sums_BT1 = token_losses(logits_BTV, targets_BT)
    d_logits_BTV *= weights_BT[..., None] / sums_BT1
    less_1_BT1 = xp.take_along_axis(d_logits_BTV, at_BT1, axis=-1) - weights_BT[..., None]
    xp.put_along_axis(d_logits_BTV, at_BT1, less_1_BT1, axis=-1)
    return float((losses_BT * weights_BT).sum()), d_logits_BTV


def rms_norm(d_y_BTD: Any, x_BTD: Any, w_D: Any, eps: float) -> tuple[Any, Any]:
    """d_x and d_w of y = x s w, where s = (mean(x^2) + eps)^-1/2 is one number for each vector.

    s depends on all of x: ds/dx_i = -s^3 x_i / D. So with g = d_y w, what reaches x s,
        d_x_i = s g_i + (sum_j g_j x_j) ds/dx_i = s (g_i - s^2 x_i mean_j(g_j x_j)),
    and w, the same for all vectors, has the sum over them: d_w = sum_BT(d_y x s).
    """
    xp = namespace(x_BTD)
    s_BT1 = 1 / xp.sqrt((x_BTD * x_BTD).mean(axis=-1, keepdims=True) + eps)
    unit_BTD = x_BTD * s_BT1
    d_w_D = (d_y_BTD * unit_BTD).reshape(-1, w_D.size).sum(axis=0)
    g_BTD = d_y_BTD * w_D
    mean_BT1 = (g_BTD * unit_BTD).mean(axis=-1, keepdims=True)
    return (g_BTD - unit_BTD * mean_BT1) * s_BT1, d_w_D


def linear(d_y_MO: Any, w: Any) -> Any:
    """d_x_MI of y = W x: W^T d_y, for rows d_y @ W. That of W is d_y^T @ x, see Gradients."""
    return d_y_MO @ w


def rope(d_y_BTNH: Any, cos_BTP: Any, sin_BTP: Any, pairing: str) -> Any:
    """d_x of a turn by an angle: the turn of d_y by minus that angle, a turn's J^T."""
    return model.rope(d_y_BTNH, cos_BTP, -sin_BTP, pairing)


def attention(
    d_attn_BTNH: Any, q_BTNH: Any, k_BKSH: Any, v_BKSH: Any, seen: Seen
) -> tuple[Any, Any, Any]:
    """d_q, d_k and d_v of attn = probs v, probs = softmax(scores), scores = q k^T / sqrt(H).

    seen has what the forward showed: probs_BNTS. By the product rule, and for the softmax
    dp_j/ds_i = p_i ((i = j) - p_j):
        d_v = probs^T d_attn          d_probs = d_attn v^T
        d_scores = probs (d_probs - sum_S(probs d_probs))
        d_q = d_scores k / sqrt(H)    d_k = d_scores^T q / sqrt(H)
    A masked score has p = 0, and so no gradient. The G queries of a group are rows of one matrix,
    as in the forward, and the products by d^T sum over them.
    """
    (B, T, N, H), (K, S) = q_BTNH.shape, k_BKSH.shape[1:3]
    probs_BKRS = seen["probs"].reshape(B, K, N // K * T, S)  # R = G * T rows
    q_BKRH, d_attn_BKRH = _rows(q_BTNH, K), _rows(d_attn_BTNH, K)
    d_v_BKSH = probs_BKRS.swapaxes(2, 3) @ d_attn_BKRH
    d_probs_BKRS = d_attn_BKRH @ v_BKSH.swapaxes(2, 3)
    mean_BKR1 = (d_probs_BKRS * probs_BKRS).sum(axis=-1, keepdims=True)
    d_scores_BKRS = probs_BKRS * (d_probs_BKRS - mean_BKR1) * H**-0.5
    d_q_BKRH = d_scores_BKRS @ k_BKSH
    d_k_BKSH = d_scores_BKRS.swapaxes(2, 3) @ q_BKRH
    return _heads(d_q_BKRH, N), d_k_BKSH, d_v_BKSH


def _rows(x_BTNH: Any, K: int) -> Any:
    """The G * T queries that share a key/value head as the rows of one matrix."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4).reshape(B, K, -1, H)


def _heads(x_BKRH: Any, N: int) -> Any:
    """The inverse of _rows."""
    B, K, R, H = x_BKRH.shape
    x_BKGTH = x_BKRH.reshape(B, K, N // K, R * K // N, H)
    return x_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, -1, N, H)


def swiglu(d_act_BTF: Any, gate_BTF: Any, up_BTF: Any) -> tuple[Any, Any]:
    """d_gate and d_up of act = silu(gate) up, silu(x) = x s(x), s(x) = 1 / (1 + e^-x).

    s' = s (1 - s), so silu' = s + x s (1 - s) = s (1 + x (1 - s)).
    """
    xp = namespace(gate_BTF)
    s_BTF = 1 / (1 + xp.exp(-xp.maximum(gate_BTF, -88)))  # as in model.swiglu
    silu_BTF = gate_BTF * s_BTF
    d_up_BTF = d_act_BTF * silu_BTF
    return d_act_BTF * up_BTF * (s_BTF + silu_BTF * (1 - s_BTF)), d_up_BTF


# An engine replaces them one by one, as it does those of model.Ops.
BackwardOps = namedtuple("BackwardOps", "rms_norm linear rope attention swiglu")
PLAIN = BackwardOps(rms_norm, linear, rope, attention, swiglu)

# ---- the model ----------------------------------------------------------------------------------


class Gradients(Protocol):
    """Where gradients of weights are added up. It may leave out what is not learned."""

    def product(self, name: str, d_y_MO: Any, x_MI: Any) -> None:
        """Of a matrix W in y = W x: d_y^T @ x, shape (O, I)."""

    def rows(self, name: str, ids_M: Any, d_y_MD: Any) -> None:
        """Of a table whose rows ids_M were taken: to each, all d_y of where it was taken."""

    def vector(self, name: str, d_w_D: Any) -> None:
        """Of the weight of a norm."""


class NoCache:
    """A cache that keeps nothing: each row is a whole text, its keys are those of this call."""

    def __init__(self, xp: Any):
        self.xp = xp

    def check(self, config: Config, dtype: Any, xp: Any) -> None:
        """Nothing is kept, so nothing can be wrong."""

    def window(self, shape_BT: tuple[int, int], new_B: Any = None) -> Window:
        """Positions 0 .. T-1 in every row."""
        positions_BT = self.xp.broadcast_to(self.xp.arange(shape_BT[1]), shape_BT)
        B, T = shape_BT
        return Window(positions_BT, None, None, None, None, np.full(B, T), size=T)

    def write(self, layer: int, window: Any, k_BTKH: Any, v_BTKH: Any) -> tuple[Any, Any]:
        """Views k_BKSH and v_BKSH of what this call computed."""
        return k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)

    def advance(self, window: Window) -> None:
        """Nothing is kept."""


# What block needs of a forward pass. tiles.attention shows powers in place of probs.
_KEPT = {"attn_norm", "q_rope", "k_rope", "v", "probs", "powers", "attn", "h_mid"}
_KEPT |= {"mlp_norm", "gate", "up", "act"}


class Taps:
    """The taps that the backward pass needs, as the forward pass shows them.

    h: what went into each block, and what came out of the last. blocks: the taps of each block by
    their last names; empty if they are computed again.
    """

    def __init__(self, n_layers: int, recompute: bool):
        self.h: list[Any] = []
        self.blocks: list[dict[str, Any]] = [{} for _ in range(n_layers)]
        self.norm: Any = None
        self._kept = set() if recompute else _KEPT

    def __call__(self, name: str, array: Any) -> None:
        """Take an array, or leave it: a tap for model.forward."""
        *where, last = name.split(".")
        if last in ("embed", "h"):
            self.h.append(array)
        elif last == "norm":
            self.norm = array
        elif last in self._kept:
            self.blocks[int(where[1])][last] = array


def block(
    layer: Layer,
    d_h_BTD: Any,
    in_BTD: Any,
    seen: dict[str, Any],
    turns: Turns,
    config: Config,
    back: BackwardOps,
    into: Gradients,
    prefix: str,
) -> Any:
    """d_in of a block, from d_h of what came out; gradients of its weights go `into`, by prefix.

    seen: the block's taps by their last names, used up here, so that memory is free for others.
    """
    d_mid_BTD = d_h_BTD + feed_forward(layer, d_h_BTD, seen, config, back, into, prefix)
    heads = (*d_h_BTD.shape[:2], config.n_heads, config.head_dim)
    linear = partial(_linear, layer, back, into, prefix)
    d_attn_BTNH = linear("wo", d_mid_BTD, seen["attn"]).reshape(heads)
    k_BKSH, v_BKSH = (seen.pop(name).swapaxes(1, 2) for name in ("k_rope", "v"))
    q_BTNH = seen.pop("q_rope")
    d_q_BTNH, d_k_BKSH, d_v_BKSH = back.attention(d_attn_BTNH, q_BTNH, k_BKSH, v_BKSH, seen)
    x_BTD = seen.pop("attn_norm")
    d_x_BTD = linear("wq", turns.backward(back, d_q_BTNH), x_BTD)
    d_x_BTD += linear("wk", turns.backward(back, d_k_BKSH.swapaxes(1, 2)), x_BTD)
    d_x_BTD += linear("wv", d_v_BKSH.swapaxes(1, 2), x_BTD)
    d_in_BTD, d_w_D = back.rms_norm(d_x_BTD, in_BTD, layer.attn_norm_D, config.norm_eps)
    into.vector(prefix + "attn_norm_D", d_w_D)
    return d_mid_BTD + d_in_BTD  # h_mid = in + attn_out: d_mid reaches both


def feed_forward(
    layer: Layer,
    d_out_BTD: Any,
    seen: dict[str, Any],
    config: Config,
    back: BackwardOps,
    into: Gradients,
    prefix: str,
) -> Any:
    """d_h_mid of a block's feed-forward, from d_mlp_out."""
    linear = partial(_linear, layer, back, into, prefix)
    d_act_BTF = linear("w_down", d_out_BTD, seen.pop("act"))
    d_gate_BTF, d_up_BTF = back.swiglu(d_act_BTF, seen.pop("gate"), seen.pop("up"))
    x_BTD = seen.pop("mlp_norm")
    d_x_BTD = linear("w_gate", d_gate_BTF, x_BTD)
    d_x_BTD += linear("w_up", d_up_BTF, x_BTD)
    d_mid_BTD, d_w_D = back.rms_norm(d_x_BTD, seen.pop("h_mid"), layer.mlp_norm_D, config.norm_eps)
    into.vector(prefix + "mlp_norm_D", d_w_D)
    return d_mid_BTD


def _linear(
    layer: Layer, back: BackwardOps, into: Gradients, prefix: str, name: str, d_y: Any, x: Any
) -> Any:
    """d_x of y = W x, W a matrix of a layer; its own gradient goes `into`. Heads may be apart."""
    (B, T), w = d_y.shape[:2], getattr(layer, name)
    d_y_MO, x_MI = d_y.reshape(B * T, -1), x.reshape(B * T, -1)
    into.product(prefix + name, d_y_MO, x_MI)
    return back.linear(d_y_MO, w).reshape(B, T, -1)


def _matrix(x_BTD: Any) -> Any:
    """A batch of vectors as the rows of one matrix."""
    return x_BTD.reshape(-1, x_BTD.shape[-1])


class Turns:
    """RoPE there and back, for the positions 0 .. T-1 of all rows."""

    def __init__(self, config: Config, positions_BT: Any, dtype: Any):
        self.positions_BT, self.pairing = positions_BT, config.rope_pairing
        cos_BTP, sin_BTP = model.rope_tables(config, positions_BT, dtype)
        self._tables = cos_BTP, sin_BTP

    def forward(self, ops: model.Ops, x_BTNH: Any) -> Any:
        """Turn q into q_rope, as model.forward does."""
        return ops.rope(x_BTNH, *self._tables, self.pairing)

    def backward(self, ops: BackwardOps, d_y_BTNH: Any) -> Any:
        """Turn d_q_rope into d_q.

        Taps show heads in interleaved order, so that is how d_q_rope comes; where rows of wq are in
        the other one, d_q is put into it.
        """
        d_x_BTNH = ops.rope(d_y_BTNH, *self._tables, "interleaved")
        if self.pairing == "interleaved":
            return d_x_BTNH
        pairs_BTNP2 = d_x_BTNH.reshape(*d_x_BTNH.shape[:-1], -1, 2)
        return pairs_BTNP2.swapaxes(-1, -2).reshape(d_x_BTNH.shape)


def again(layer: Layer, h_BTD: Any, turns: Turns, config: Config, ops: model.Ops) -> dict[str, Any]:
    """What a block showed in the forward pass, computed from what went into it."""
    taps = Taps(1, recompute=False)
    see = model.watcher(taps, config.rope_pairing, "layers.0.")
    write = partial(NoCache(namespace(h_BTD)).write, 0, None)
    turn = partial(turns.forward, ops)
    model.block(layer, h_BTD, write, turn, turns.positions_BT, config, ops, see)
    return taps.blocks[0]


def loss_and_gradients(
    params: Params,
    config: Config,
    ids_BT: Any,
    targets_BT: Any,
    weights_BT: Any,
    into: Gradients,
    ops: model.Ops = model.PLAIN,
    back: BackwardOps = PLAIN,
    recompute: bool = False,
) -> float:
    """The loss of a batch, the sum over its tokens of weight * -ln p(target); gradients go `into`.

    ids_BT: host integers, rows of T tokens at positions 0 .. T-1; a shorter row is padded on the
    right with any id, and its padding has weight 0. targets_BT: what follows each token, and
    weights_BT: what each counts, on the device of params and in its dtype, which is that of all
    arithmetic. With weights divided by their sum over a batch beforehand, losses and gradients of
    the batch's parts add up to those of its mean.
    recompute: keep the residual stream between blocks alone, and go through each block a second
    time: the activations of one block in memory in place of all, for a third more work.
    Raises InputError for ids out of range.
    """
    cache, dtype = NoCache(namespace(params.norm_D)), params.norm_D.dtype
    taps = Taps(config.n_layers, recompute)
    logits_BTV, _ = model.forward(
        params, config, ids_BT, cache, dtype=dtype, ops=ops, tap=taps, last_only=False
    )
    loss, d_logits_BTV = cross_entropy(logits_BTV, targets_BT, weights_BT)
    del logits_BTV  # the largest arrays of all
    d_h_BTD = head(params, config, d_logits_BTV, taps, back, into)
    del d_logits_BTV
    turns = Turns(config, cache.window(targets_BT.shape).positions_BT, dtype)
    for i in reversed(range(config.n_layers)):
        layer, h_BTD = params.layers[i], taps.h.pop()
        seen = again(layer, h_BTD, turns, config, ops) if recompute else taps.blocks.pop()
        d_h_BTD = block(layer, d_h_BTD, h_BTD, seen, turns, config, back, into, f"layers.{i}.")
    into.rows("embed_VD", cache.xp.asarray(ids_BT).reshape(-1), _matrix(d_h_BTD))
    return loss


def head(
    params: Params,
    config: Config,
    d_logits_BTV: Any,
    taps: Taps,
    back: BackwardOps,
    into: Gradients,
) -> Any:
    """d_h of the last block, through logits = head norm(h).

    A tied head is the embedding table used a second time: its gradient is the sum of this product
    and of the rows that the tokens took.
    """
    norm_BTD, d_logits_MV = taps.norm, _matrix(d_logits_BTV)
    into.product("embed_VD" if config.tied else "head_VD", d_logits_MV, _matrix(norm_BTD))
    d_norm_BTD = back.linear(d_logits_MV, params.head_VD).reshape(norm_BTD.shape)
    d_h_BTD, d_w_D = back.rms_norm(d_norm_BTD, taps.h.pop(), params.norm_D, config.norm_eps)
    into.vector("norm_D", d_w_D)
    return d_h_BTD

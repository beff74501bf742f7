"""Attention for training: the numbers of the plain operations, in fewer passes over them.

Queries go in stripes of TILE positions. A stripe has scores with the keys up to its own end alone,
so that of T = 256 positions three eighths are never computed, of many nearly half; and only its
last TILE columns need a mask. Between two products a stripe of scores is gone over four times
forward (maximum, difference, e^, sum) and twice backward, where plain array operations take seven
and five:

    forward     e = e^(scores - max), kept; attn = (e v) / sum e: divided where there is less of it
    backward    with u = d_attn / sum e:  d_v = e^T u,  d_scores = e (u v^T - sum_H(u attn))

for sum_S(probs d_probs) = sum_S(probs sum_H(d_attn v)) = sum_H(d_attn attn) (Dao et al. 2022).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import inf
from typing import Any

from llama3np.backend import namespace
from llama3np.train.backward import Seen

TILE = 64  # positions


def attention(
    q_BTNH: Any, k_BKSH: Any, v_BKSH: Any, positions_BT: Any, see: Callable[[str, Any], Any]
) -> Any:
    """model.attention for rows that begin at position 0, T = S. Shows `powers`, for `backward`.

    powers: for each stripe e, (B, K, G * t, s), and 1 / sum e, (B, K, G * t, 1).
    """
    (B, T, N, H), K = q_BTNH.shape, k_BKSH.shape[1]
    xp, powers = namespace(q_BTNH), []
    attn_BKGTH = xp.empty((B, K, N // K, T, H), q_BTNH.dtype)
    q_BKGTH = _grouped(q_BTNH, K) * H**-0.5
    later_tt = xp.triu(xp.full((TILE, TILE), -inf, q_BTNH.dtype), 1)
    for start, stop in _stripes(T):
        rows = (B, K, -1, H)
        q_BKRH = q_BKGTH[:, :, :, start:stop].reshape(rows)  # R = G * t rows
        e_BKRs = q_BKRH @ k_BKSH[:, :, :stop].swapaxes(2, 3)
        t = stop - start
        last_BKGtt = e_BKRs.reshape(B, K, -1, t, stop)[..., start:]
        last_BKGtt += later_tt[:t, :t]
        e_BKRs -= e_BKRs.max(axis=-1, keepdims=True)
        xp.exp(e_BKRs, out=e_BKRs)
        per_sum_BKR1 = 1 / e_BKRs.sum(axis=-1, keepdims=True)
        attn_BKRH = (e_BKRs @ v_BKSH[:, :, :stop]) * per_sum_BKR1
        attn_BKGTH[:, :, :, start:stop] = attn_BKRH.reshape(B, K, -1, t, H)
        powers.append((e_BKRs, per_sum_BKR1))
    see("powers", powers)
    return attn_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def backward(
    d_attn_BTNH: Any, q_BTNH: Any, k_BKSH: Any, v_BKSH: Any, seen: Seen
) -> tuple[Any, Any, Any]:
    """d_q_BTNH, d_k_BKSH, d_v_BKSH. seen: what the forward showed, attn and powers."""
    (B, T, N, H), K = q_BTNH.shape, k_BKSH.shape[1]
    xp, scale = namespace(q_BTNH), H**-0.5
    q_BKGTH, d_BKGTH = _grouped(q_BTNH, K) * scale, _grouped(d_attn_BTNH, K)
    mean_BKGT1 = (d_BKGTH * _grouped(seen["attn"], K)).sum(axis=-1, keepdims=True)
    d_q_BKGTH = xp.empty(q_BKGTH.shape, q_BTNH.dtype)
    d_k_BKSH, d_v_BKSH = (xp.zeros((B, K, T, H), q_BTNH.dtype) for _ in "kv")
    for (start, stop), (e_BKRs, per_sum_BKR1) in zip(_stripes(T), seen["powers"], strict=True):
        of_stripe = (slice(None), slice(None), slice(None), slice(start, stop))
        q_BKRH, d_BKRH, mean_BKR1 = (
            x[of_stripe].reshape(B, K, -1, x.shape[-1]) for x in (q_BKGTH, d_BKGTH, mean_BKGT1)
        )
        u_BKRH = d_BKRH * per_sum_BKR1
        d_v_BKSH[:, :, :stop] += e_BKRs.swapaxes(2, 3) @ u_BKRH
        d_scores_BKRs = u_BKRH @ v_BKSH[:, :, :stop].swapaxes(2, 3)
        d_scores_BKRs -= mean_BKR1 * per_sum_BKR1
        d_scores_BKRs *= e_BKRs
        d_q_BKRH = d_scores_BKRs @ k_BKSH[:, :, :stop]
        d_q_BKGTH[of_stripe] = d_q_BKRH.reshape(B, K, -1, stop - start, H)
        d_k_BKSH[:, :, :stop] += d_scores_BKRs.swapaxes(2, 3) @ q_BKRH
    d_q_BKGTH *= scale
    return d_q_BKGTH.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H), d_k_BKSH, d_v_BKSH


def _grouped(x_BTNH: Any, K: int) -> Any:
    """Queries by the key/value head that they share, (B, K, G, T, H)."""
    B, T, N, H = x_BTNH.shape
    return x_BTNH.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)


def _stripes(T: int) -> Iterator[tuple[int, int]]:
    """Beginning and end of each stripe of queries."""
    return ((start, min(start + TILE, T)) for start in range(0, T, TILE))

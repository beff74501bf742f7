"""Attention by blocks of queries and keys: the scores of a whole prompt are never held.

Prompts of 8192 tokens have 8.6 GB of scores in every layer of an 8B model, and all but a few of
them are read from main memory again for every step of a softmax. Here they are made, exponentiated
and multiplied a block at a time, while the block is in the processor's second-level cache.
"""

from __future__ import annotations

from collections.abc import Callable
from math import sqrt
from typing import Any, NamedTuple

import numpy as np

from llama3np import model
from llama3np.backend import widen
from llama3np.threads import Pool

# Queries of a product, all heads of a group counted, and numbers in a worker's array of scores:
# 768 x 768, 2.4 MB. Measured at 8192 tokens of 32/8 heads of 128: 192 queries of 4 heads beat 128,
# because BLAS packs the keys once for more rows, and 256, of which more lie beyond the diagonal.
ROWS = 768
SCRATCH = ROWS * ROWS
# Up to so many scores the plain operation, which makes fewer calls, is the faster one.
FEW = 2**15

# (scores_RC, counts_R, peaks_R, totals_R, sums_RH), see `soften`
Soften = Callable[[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray], None]


def soften(
    scores_RC: np.ndarray,
    counts_R: np.ndarray,
    peaks_R: np.ndarray,
    totals_R: np.ndarray,
    sums_RH: np.ndarray,
) -> None:
    """Take one block of keys into the softmax of R queries: scores become weights, in place.

    Row r sees its first counts_R[r] columns (none if that is negative); the weights of the others
    are 0. peaks_R, totals_R and sums_RH are the largest score so far and, relative to e^peak, the
    sum of the weights and the weighted sum of the values: all are brought to the new peak, so
    that the caller only adds this block's part of the sums. Milakov & Gimelshein 2018.
    """
    if counts_R.min() < scores_RC.shape[1]:
        hidden_RC = np.arange(scores_RC.shape[1]) >= counts_R[:, None]
        np.copyto(scores_RC, -np.inf, where=hidden_RC)
    before_R = peaks_R.copy()
    np.maximum(before_R, scores_RC.max(axis=1), out=peaks_R)
    scores_RC -= peaks_R[:, None]
    np.exp(scores_RC, out=scores_RC)
    fading_R = np.exp(before_R - peaks_R)
    totals_R *= fading_R
    totals_R += scores_RC @ np.ones_like(scores_RC[0])  # six times as fast as its sum(axis=1)
    sums_RH *= fading_R[:, None]


def attention(
    q_BTNH: np.ndarray,
    k_BKSH: np.ndarray,
    v_BKSH: np.ndarray,
    positions_BT: np.ndarray,
    see: Callable[[str, Any], Any],
    *,
    pool: Pool,
    soften: Soften = soften,
) -> np.ndarray:
    """What model.attention computes, but for the order of its sums; `see` is shown nothing.

    Keys and values may be float32, bfloat16 or float16 beside float32 queries: a block at a time
    is widened. Each worker of the pool takes blocks of queries of one row and key/value head; it
    holds 3 * SCRATCH numbers, and 3 * ROWS heads. BLAS is expected to be at one thread.
    """
    (B, T, N, H), (K, S) = q_BTNH.shape, k_BKSH.shape[1:3]
    if B * T * N * S <= FEW:
        if B * T == 1 and positions_BT[0, 0] == S - 1:
            return _one_token(q_BTNH, k_BKSH, v_BKSH)
        return model.attention(q_BTNH, k_BKSH, v_BKSH, positions_BT, see)
    G = N // K
    q_BTKGH, attn_BTKGH = q_BTNH.reshape(B, T, K, G, H), np.empty((B, T, K, G, H), q_BTNH.dtype)
    counts_BT = np.minimum(positions_BT + 1, S)
    tasks = _tasks(counts_BT, K, max(1, ROWS // G))
    scratches: list[_Scratch | None] = [None] * pool.threads

    def work(i: int, worker: int) -> None:
        b, k, block = tasks[i]
        scratch = scratches[worker] = scratches[worker] or _Scratch(q_BTNH.dtype)
        queries = q_BTKGH[b, block, k]
        attn_BTKGH[b, block, k] = _attend(
            queries, k_BKSH[b, k], v_BKSH[b, k], counts_BT[b, block], scratch, soften
        )

    pool.map(work, len(tasks))
    return attn_BTKGH.reshape(B, T, N, H)


def _one_token(q_11NH: np.ndarray, k_1KSH: np.ndarray, v_1KSH: np.ndarray) -> np.ndarray:
    """model.attention of the newest token, which sees all keys: no mask, and half the calls."""
    (N, H), K = q_11NH.shape[2:], k_1KSH.shape[1]
    powers_KGS = (q_11NH.reshape(K, N // K, H) / sqrt(H)) @ widen(k_1KSH[0]).swapaxes(1, 2)
    powers_KGS -= powers_KGS.max(axis=-1, keepdims=True)
    np.exp(powers_KGS, out=powers_KGS)
    attn_KGH = powers_KGS @ widen(v_1KSH[0])
    attn_KGH /= powers_KGS.sum(axis=-1, keepdims=True)
    return attn_KGH.reshape(q_11NH.shape)


class _Task(NamedTuple):
    b: int
    k: int
    block: slice  # of the T queries


def _tasks(counts_BT: np.ndarray, K: int, step: int) -> list[_Task]:
    """All tasks, head after head, so that the threads share its keys; big ones of a head first.

    The last tasks of all are then small ones of the shortest row: the threads end together.
    """
    B, T = counts_BT.shape
    rows = sorted(range(B), key=lambda b: -int(counts_BT[b].max()))
    starts = range((T - 1) // step * step, -1, -step)
    return [_Task(b, k, slice(t, t + step)) for b in rows for k in range(K) for t in starts]


class _Scratch:
    """The memory of one worker, for one call."""

    def __init__(self, dtype: np.dtype):
        self.scores, self.keys, self.values = (np.empty(SCRATCH, dtype) for _ in range(3))

    @staticmethod
    def widened(array_CH: np.ndarray, scratch: np.ndarray) -> np.ndarray:
        """The array, in the type of the scratch: itself, or a copy there."""
        if array_CH.dtype == scratch.dtype:
            return array_CH
        wide_CH = scratch[: array_CH.size].reshape(array_CH.shape)
        np.copyto(wide_CH, array_CH, casting="unsafe")  # to ml_dtypes, widening is "unsafe"
        return wide_CH


def _attend(
    q_TGH: np.ndarray,
    k_SH: np.ndarray,
    v_SH: np.ndarray,
    counts_T: np.ndarray,
    scratch: _Scratch,
    soften: Soften,
) -> np.ndarray:
    """attn_TGH of a block of queries: all heads of its group are rows R = T * G of one product."""
    T, G, H = q_TGH.shape
    R, seen = T * G, int(counts_T.max())
    q_RH = np.multiply(q_TGH, 1 / sqrt(H), dtype=q_TGH.dtype).reshape(R, H)
    counts_R = np.repeat(counts_T, G)
    peaks_R = np.full(R, np.finfo(q_RH.dtype).min)  # finite: no score, not even -inf, is below
    totals_R, sums_RH, part_RH = (np.zeros(shape, q_RH.dtype) for shape in (R, (R, H), (R, H)))
    step = max(1, SCRATCH // max(R, H))
    for start in range(0, seen, step):
        keys = slice(start, min(start + step, seen))
        k_CH = scratch.widened(k_SH[keys], scratch.keys)
        scores_RC = scratch.scores[: R * len(k_CH)].reshape(R, len(k_CH))
        np.matmul(q_RH, k_CH.T, out=scores_RC)
        soften(scores_RC, counts_R - start, peaks_R, totals_R, sums_RH)
        np.matmul(scores_RC, scratch.widened(v_SH[keys], scratch.values), out=part_RH)
        sums_RH += part_RH
    sums_RH /= totals_R[:, None]
    return sums_RH.reshape(T, G, H)

"""How near two models' predictions of one text are: perplexity, KL divergence, agreement.

A reference is kept compactly, its k largest logits at each position and the logarithm of the sum of
all: 64 of 128,256 take 0.3 % of the room, and hold all but a little of the probability.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from llama3np import generate
from llama3np.errors import InputError
from llama3np.llm import Llama

TOP = 64  # logits kept of each position
FIVE = 5
ROWS = 16  # positions in float64 at a time: 128,256 logits of each


class Kept(NamedTuple):
    """What is kept of the logits at R scored positions; window by window, in order.

    ids_T: all token ids that were fed, those of each window one after the other; starts_W: where
    each begins. Every id but the first of a window is predicted, so R = T - W.
    """

    ids_T: np.ndarray
    starts_W: np.ndarray
    top_ids_RK: np.ndarray  # int32, the largest logit first; of equal ones the lowest id
    top_logits_RK: np.ndarray  # float32
    logsumexp_R: np.ndarray  # float64, natural
    nll_R: np.ndarray  # float64, of the id that follows, natural

    def part(self, start: int, stop: int) -> Kept:
        """Some of the positions; ids and windows stay whole."""
        arrays = (a[start:stop] for a in self[2:])
        return Kept(self.ids_T, self.starts_W, *arrays)


class Apart(NamedTuple):
    """How far a candidate is from the reference, at each of R positions."""

    kl_R: np.ndarray  # of the reference's distribution from the candidate's, natural, float64
    same_R: np.ndarray  # whether the most probable token is the same
    five_R: np.ndarray  # the share of the reference's five most probable among the candidate's five


# ---- from logits ---------------------------------------------------------------------------------


def keep(logits_RV: np.ndarray, targets_R: np.ndarray, top: int = TOP) -> tuple[Any, ...]:
    """The last four fields of Kept for these logits and the ids that follow."""
    wide_RV = logits_RV.astype(np.float64)
    peak_R1 = wide_RV.max(axis=-1, keepdims=True)
    logsumexp_R = peak_R1[:, 0] + np.log(np.exp(wide_RV - peak_R1).sum(axis=-1))
    top_ids_RK = largest(logits_RV, top)
    top_logits_RK = np.take_along_axis(logits_RV, top_ids_RK, axis=-1).astype(np.float32)
    nll_R = logsumexp_R - wide_RV[np.arange(len(wide_RV)), targets_R]
    return top_ids_RK.astype(np.int32), top_logits_RK, logsumexp_R, nll_R


def kept(ids_T: np.ndarray, logits_RV: np.ndarray) -> Kept:
    """All logits of one window as they would be kept, whole: nothing is left out."""
    return Kept(ids_T, np.zeros(1, np.int64), *keep(logits_RV, ids_T[1:], logits_RV.shape[1]))


def largest(logits_RV: np.ndarray, k: int) -> np.ndarray:
    """Ids of the k largest logits (all, if there are fewer), largest first, of equal ones by id."""
    found = [_largest(logits_V, min(k, logits_RV.shape[-1])) for logits_V in logits_RV]
    return np.stack(found)


def _largest(logits_V: np.ndarray, k: int) -> np.ndarray:
    threshold = np.partition(logits_V, -k)[-k]
    above, ties = (np.flatnonzero(a) for a in (logits_V > threshold, logits_V == threshold))
    found_K = np.concatenate([above, ties[: k - len(above)]])
    return found_K[np.lexsort((found_K, -logits_V[found_K]))]


def windows(llm: Llama, ids: Sequence[int], size: int | None = None) -> list[list[int]]:
    """A text's ids in windows of at most `size`; if the text begins with BOS, all of them do.

    size: the model's max_seq_len if None, but not beyond its context. Raises InputError for fewer
    than two ids, or a size that is below 2 or above max_seq_len.
    """
    most = llm.max_seq_len
    size = min(most, llm.config.context_length, len(ids)) if size is None else size
    if len(ids) < 2:
        raise InputError(f"score: expected at least 2 token ids, found {len(ids)}")
    if not 2 <= size <= most:
        raise InputError(f"--window: expected 2 to {most} (max_seq_len), found {size}")
    bos = llm.tokenizer.bos_id if llm.tokenizer else None
    head = [ids[0]] if ids[0] == bos else []
    body = list(ids[len(head) :])
    step = size - len(head)
    cut = [head + body[i : i + step] for i in range(0, len(body), step)]
    return [window for window in cut if len(window) > 1]  # a last one of one id predicts nothing


def logits_of(llm: Llama, parts: Sequence[Sequence[int]]) -> Iterator[tuple[Any, Any]]:
    """(logits_RV, targets_R) for a few positions at a time, of every window in turn."""

    def forward(ids_BT: Any, cache: Any, new_B: Any, last_only: bool) -> np.ndarray:
        return llm.engine.forward(ids_BT, cache, new_B, None, last_only)

    for ids in parts:
        cache, done = llm.new_cache(1, len(ids)), 0
        fed = generate.chunks(forward, cache, [ids[:-1]], False, llm.prefill_chunk)
        for logits_1TV, _, _ in fed:
            for start in range(0, logits_1TV.shape[1], ROWS):
                rows_RV = logits_1TV[0, start : start + ROWS]
                targets = ids[done + 1 : done + 1 + len(rows_RV)]
                done += len(rows_RV)
                yield rows_RV, np.array(targets)


def score(
    llm: Llama, parts: Sequence[Sequence[int]], top: int = TOP, against: Kept | None = None
) -> tuple[Kept, Apart | None]:
    """Score windows of ids; with a reference, say how far from it, by all logits of this model.

    Raises InputError for a reference of other ids.
    """
    ids_T, starts_W = joined(parts)
    if against is not None:
        check_same_text(against, ids_T, starts_W)
    rows, far, done = [], [], 0
    for logits_RV, targets_R in logits_of(llm, parts):
        rows.append(keep(logits_RV, targets_R, top))
        if against is not None:
            some = against.part(done, done + len(logits_RV))
            far.append(apart_from(some, logits_RV, rows[-1][2]))
        done += len(logits_RV)
    whole = Kept(ids_T, starts_W, *map(np.concatenate, zip(*rows, strict=True)))
    return whole, Apart(*map(np.concatenate, zip(*far, strict=True))) if far else None


def joined(parts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """(ids_T, starts_W) of windows."""
    starts_W = np.cumsum([0, *map(len, parts)])[:-1]
    return np.concatenate([np.asarray(ids, np.int64) for ids in parts]), starts_W


def check_same_text(reference: Kept, ids_T: np.ndarray, starts_W: np.ndarray) -> None:
    """Raise InputError, naming the first difference, if a reference is of other ids or windows."""
    if len(reference.ids_T) != len(ids_T):
        raise InputError(
            f"logits: expected {len(reference.ids_T)} token ids as the reference has, "
            f"found {len(ids_T)}"
        )
    if (wrong := np.flatnonzero(reference.ids_T != ids_T)).size:
        at = wrong[0]
        raise InputError(
            f"logits: expected token id {reference.ids_T[at]} at {at} as the reference has, "
            f"found {ids_T[at]}"
        )
    if reference.starts_W.tolist() != starts_W.tolist():
        raise InputError(
            f"logits: expected {len(reference.starts_W)} windows as the reference has, found "
            f"{len(starts_W)} (--window)"
        )


# ---- distances -----------------------------------------------------------------------------------


def apart_from(reference: Kept, logits_RV: np.ndarray, logsumexp_R: np.ndarray) -> Apart:
    """A candidate of which all logits are known, from a reference that may be compact.

    Raises InputError if the candidate has no logits of an id that the reference kept.
    """
    ids_RK = reference.top_ids_RK
    if (last := int(ids_RK.max())) >= (V := logits_RV.shape[1]):
        raise InputError(
            f"logits: expected a vocabulary of more than {last} ids as the reference has, found {V}"
        )
    own_RK = np.take_along_axis(logits_RV, ids_RK, axis=-1).astype(np.float64)
    logq_RK = own_RK - logsumexp_R[:, None]
    logp_RK = reference.top_logits_RK - reference.logsumexp_R[:, None]
    whole = ids_RK.shape[1] == logits_RV.shape[1]
    five_R = agreement(ids_RK, largest(logits_RV, FIVE))
    same_R = ids_RK[:, 0] == logits_RV.argmax(axis=-1)
    return Apart(divergence(logp_RK, logq_RK, whole), same_R, five_R)


def apart(reference: Kept, candidate: Kept) -> Apart:
    """Both compact: over the ids that both kept, and one bucket for all others."""
    check_same_text(reference, candidate.ids_T, candidate.starts_W)
    p_RK, q_RK = (k.top_logits_RK - k.logsumexp_R[:, None] for k in (reference, candidate))
    kl = []
    for i, (p_ids, q_ids) in enumerate(
        zip(reference.top_ids_RK, candidate.top_ids_RK, strict=True)
    ):
        _, of_p, of_q = np.intersect1d(p_ids, q_ids, return_indices=True)
        kl.append(divergence(p_RK[i, of_p][None], q_RK[i, of_q][None], whole=False)[0])
    ids_RK = reference.top_ids_RK
    same_R = ids_RK[:, 0] == candidate.top_ids_RK[:, 0]
    return Apart(np.array(kl), same_R, agreement(ids_RK, candidate.top_ids_RK))


def divergence(logp_RK: np.ndarray, logq_RK: np.ndarray, whole: bool = True) -> np.ndarray:
    """KL divergence of p from q, sum of p (log p - log q), from some of their logarithms.

    whole: these are all. Else the others are taken as one event each: the result is at most the
    whole divergence (data processing), less by what the reference did not keep.
    """
    p_RK = np.exp(logp_RK)
    kl_R = (p_RK * (logp_RK - logq_RK)).sum(axis=-1)
    if not whole:
        p_R, q_R = (np.clip(1 - np.exp(a).sum(axis=-1), 1e-12, 1) for a in (logp_RK, logq_RK))
        kl_R += p_R * np.log(p_R / q_R)
    return kl_R if np.isnan(kl_R).any() else np.maximum(kl_R, 0)  # rounding may go below 0


def agreement(ids_RK: np.ndarray, others_RK: np.ndarray) -> np.ndarray:
    """The share of the first five ids that are among the first five others, of each row."""
    five_R5, others_R5 = ids_RK[:, :FIVE], others_RK[:, :FIVE]
    return (five_R5[:, :, None] == others_R5[:, None]).any(axis=-1).mean(axis=-1)


# ---- figures -------------------------------------------------------------------------------------


def perplexity(nll_R: np.ndarray) -> dict[str, float]:
    """Perplexity e^mean with the standard error of its mean over tokens, carried through e^x."""
    mean, error = mean_and_error(nll_R)
    return {"nll": mean, "perplexity": np.exp(mean), "standard_error": np.exp(mean) * error}


def mean_and_error(values_R: np.ndarray) -> tuple[float, float]:
    """The mean and its standard error; NaN for the error of a single value."""
    n = len(values_R)
    return float(values_R.mean()), float(values_R.std(ddof=1) / np.sqrt(n)) if n > 1 else np.nan


def figures(far: Apart) -> dict[str, float]:
    """Mean, 99th percentile and largest KL divergence in nats; shares of agreement."""
    mean, error = mean_and_error(far.kl_R)
    return {
        "kl_mean": mean,
        "kl_standard_error": error,
        "kl_p99": float(np.percentile(far.kl_R, 99)),
        "kl_max": float(far.kl_R.max()),
        "kl_max_at": int(far.kl_R.argmax()),
        "top1_agreement": float(far.same_R.mean()),
        "top5_agreement": float(far.five_R.mean()),
    }

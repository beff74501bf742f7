"""From logits to the next token: pure functions to probabilities, then one draw.

Everything is float64 on the host, so that one seed gives one text on every device.
"""

from __future__ import annotations

import sys
from numbers import Integral, Real
from typing import NamedTuple

import numpy as np

from llama3np.errors import InputError


class Sampling(NamedTuple):
    """How the next token is chosen. Temperature 0 is greedy: the largest logit, lowest id first."""

    temperature: float = 0.0
    top_k: int = 0  # keep the k most probable; 0 keeps all
    top_p: float = 1.0  # then keep the fewest whose sum reaches p; 1 keeps all
    seed: int | None = None  # None: a different text at every run

    def check(self) -> Sampling:
        """Return self; raise InputError naming the value that is out of range."""
        temperature, top_k, top_p, seed = self
        if not (isinstance(temperature, Real) and 0 <= temperature <= sys.float_info.max):
            raise InputError(f"temperature: expected a number from 0 on, found {temperature!r}")
        if not (isinstance(top_k, Integral) and top_k >= 0):
            raise InputError(f"top_k: expected a whole number, 0 for all, found {top_k!r}")
        if not (isinstance(top_p, Real) and 0 < top_p <= 1):
            raise InputError(f"top_p: expected 0 < top_p <= 1, found {top_p!r}")
        if not (seed is None or (isinstance(seed, Integral) and seed >= 0)):
            raise InputError(f"seed: expected a whole number from 0 on, found {seed!r}")
        return self

    def generator(self, row: int) -> np.random.Generator:
        """The random numbers of one row: rows of a batch do not disturb each other."""
        entropy = None if self.seed is None else [self.seed, row]
        return np.random.Generator(np.random.Philox(np.random.SeedSequence(entropy)))


GREEDY = Sampling()


def log_softmax(logits_TV: np.ndarray) -> np.ndarray:
    """Natural logarithms of the probabilities, in float64, over the last axis."""
    wide_TV = logits_TV.astype(np.float64)
    wide_TV -= wide_TV.max(axis=-1, keepdims=True)
    return wide_TV - np.log(np.exp(wide_TV).sum(axis=-1, keepdims=True))


# ---- probabilities -------------------------------------------------------------------------------


class Candidates(NamedTuple):
    """The ids among which a row's next one is: all of them, or those that a device has left.

    C of them, ascending. Left out is what top-k or top-p drops; where neither is asked for, all
    ids before the first and after the last.
    """

    powers_C: np.ndarray  # e^((logit - largest) / temperature), float64
    total: float  # their sum over all ids
    before: float  # their sum over the ids before the first; 0 where those are dropped


def powers(logits_C: np.ndarray, peak: float, temperature: float) -> np.ndarray:
    """e^((logit - peak) / temperature), float64. peak: the largest logit of the row."""
    # It goes to 0 first, so that no temperature, however small, overflows.
    with np.errstate(over="ignore"):
        return np.exp((logits_C.astype(np.float64) - peak) / temperature)


def largest(logits_V: np.ndarray) -> float:
    """Return it; raise InputError if it is not finite: weights that no forward pass can use."""
    peak = logits_V.max()
    if not np.isfinite(peak):
        raise InputError(f"logits: expected finite numbers, found {peak}: the weights are damaged")
    return float(peak)


def all_ids(logits_V: np.ndarray, temperature: float) -> Candidates:
    """Every id as a candidate. Raises InputError as `largest` does."""
    powers_V = powers(logits_V, largest(logits_V), temperature)
    return Candidates(powers_V, float(powers_V.sum()), 0.0)


def keep_top_k(probs_C: np.ndarray, k: int) -> np.ndarray:
    """Keep the k largest probabilities, of equal ones those with the lowest ids; renormalise."""
    if k == 0:
        return probs_C
    k = min(k, probs_C.size)
    threshold = np.partition(probs_C, -k)[-k]
    kept = probs_C > threshold
    ties = np.flatnonzero(probs_C == threshold)
    kept[ties[: k - kept.sum()]] = True
    return np.where(kept, probs_C, 0) / probs_C[kept].sum()


def keep_top_p(probs_C: np.ndarray, p: float) -> np.ndarray:
    """Keep the largest until the sum of those before one exceeds p; renormalise.

    This is Meta's rule (llama/generation.py, sample_top_p); equal ones are taken by id.
    """
    if p == 1:
        return probs_C
    # Those below this add up to less than what is beyond p and are all dropped: no need to sort
    # them. All add up to 1, but for what was left out of the candidates.
    least = min((probs_C.sum() - p) / probs_C.size, probs_C.max())  # rounded, it may be above all
    some = np.flatnonzero(probs_C >= least)
    order = some[np.argsort(-probs_C[some], kind="stable")]
    before = np.cumsum(probs_C[order]) - probs_C[order]
    kept = order[before <= p]
    nucleus_C = np.zeros_like(probs_C)
    nucleus_C[kept] = probs_C[kept] / probs_C[kept].sum()
    return nucleus_C


def probabilities(candidates: Candidates, sampling: Sampling) -> np.ndarray:
    """The distribution that is drawn from: temperature, then top-k, then top-p. float64."""
    probs_C = candidates.powers_C / candidates.total
    return keep_top_p(keep_top_k(probs_C, sampling.top_k), sampling.top_p)


# ---- the choice ----------------------------------------------------------------------------------


def draw(candidates: Candidates, sampling: Sampling, number: float) -> int:
    """Return the place of one candidate, by inverse CDF. number: a random one, at least 0, below 1.

    It is the same id, whatever else was left out of the candidates, but for what sums are rounded.
    """
    probs_C = probabilities(candidates, sampling)
    upto_C = candidates.before / candidates.total + np.cumsum(probs_C)
    # side="right" never lands on an id of probability 0: its sum equals the sum before it. Only by
    # rounding does a number lie before the first of the others, or after the last.
    some = np.flatnonzero(probs_C)
    return int(np.clip(np.searchsorted(upto_C, number, side="right"), some[0], some[-1]))


def choose(logits_V: np.ndarray, sampling: Sampling, rng: np.random.Generator) -> int:
    """Return the next token's id: the argmax at temperature 0, else one draw.

    Raises InputError as `largest` does.
    """
    if sampling.temperature == 0:
        largest(logits_V)
        return int(logits_V.argmax())
    return draw(all_ids(logits_V, sampling.temperature), sampling, rng.random())

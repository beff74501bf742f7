"""From logits to the next token: pure functions to probabilities, then one draw.

Everything is float64 on the host, so that one seed gives one text on every device.
"""

from __future__ import annotations

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
        if not (isinstance(temperature, Real) and 0 <= temperature < np.inf):
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


def keep_top_k(probs_V: np.ndarray, k: int) -> np.ndarray:
    """Keep the k largest probabilities, of equal ones those with the lowest ids; renormalise."""
    if k == 0 or k >= probs_V.size:
        return probs_V
    threshold = np.partition(probs_V, -k)[-k]
    kept = probs_V > threshold
    ties = np.flatnonzero(probs_V == threshold)
    kept[ties[: k - kept.sum()]] = True
    return np.where(kept, probs_V, 0) / probs_V[kept].sum()


def keep_top_p(probs_V: np.ndarray, p: float) -> np.ndarray:
    """Keep the largest until the sum of those before one exceeds p; renormalise.

    This is Meta's rule (llama/generation.py, sample_top_p); equal ones are taken by id.
    """
    if p == 1:
        return probs_V
    # Those below (1 - p) / V add up to less than 1 - p and are all dropped: no need to sort them.
    candidates = np.flatnonzero(probs_V >= (1 - p) / probs_V.size)
    order = candidates[np.argsort(-probs_V[candidates], kind="stable")]
    before = np.cumsum(probs_V[order]) - probs_V[order]
    kept = order[before <= p]
    nucleus_V = np.zeros_like(probs_V)
    nucleus_V[kept] = probs_V[kept] / probs_V[kept].sum()
    return nucleus_V


def probabilities(logits_V: np.ndarray, sampling: Sampling) -> np.ndarray:
    """The distribution that is drawn from: temperature, then top-k, then top-p. float64."""
    wide_V = logits_V.astype(np.float64)
    # The largest logit goes to 0 first, so that no temperature, however small, overflows.
    with np.errstate(over="ignore"):
        probs_V = np.exp((wide_V - wide_V.max()) / sampling.temperature)
    probs_V /= probs_V.sum()
    return keep_top_p(keep_top_k(probs_V, sampling.top_k), sampling.top_p)


def choose(logits_V: np.ndarray, sampling: Sampling, rng: np.random.Generator) -> int:
    """Return the next token's id: the argmax at temperature 0, else one draw by inverse CDF.

    Raises InputError for logits that are not finite: weights that no forward pass can use.
    """
    if not np.isfinite(logits_V.max()):
        raise InputError(
            f"logits: expected finite numbers, found {logits_V.max()}: the weights are damaged"
        )
    if sampling.temperature == 0:
        return int(logits_V.argmax())
    cumulative_V = np.cumsum(probabilities(logits_V, sampling))
    # side="right" never lands on an id of probability 0: its sum equals the sum before it.
    return int(np.searchsorted(cumulative_V, rng.random() * cumulative_V[-1], side="right"))

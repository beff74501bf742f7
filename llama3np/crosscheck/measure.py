"""How far one array is from another: the measures that budgets, comparisons and diagnoses share.

All are over the entries that are finite in the expected array, in float64: a masked score has no
distance, and whether two masks are the same is another question. What is NaN or infinite in the
found array where the expected one is finite is infinitely far.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from llama3np import numerics
from llama3np.sample import log_softmax


class Ulps(NamedTuple):
    """Distances counted in numbers of a dtype: of half the entries at most median."""

    median: float
    max: int


def max_abs(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest |found - expected|, 0 where nothing is finite. Shapes are the same, any dtype."""
    found_M, expected_M = finite(found, expected)
    return _number(np.abs(found_M - expected_M).max(initial=0))


def nmse(found: np.ndarray, expected: np.ndarray) -> float:
    """The mean squared error over the mean square of what is expected; 0 if both are 0.

    sum((found - expected)^2) / sum(expected^2)        as ggml's tests/test-backend-ops.cpp
    """
    found_M, expected_M = finite(found, expected)
    error_M = found_M - expected_M
    with np.errstate(over="ignore"):
        error, scale = _number(error_M @ error_M), _number(expected_M @ expected_M)
    if error == 0:
        return 0.0
    return error / scale if scale else np.inf


def cosine(found: np.ndarray, expected: np.ndarray) -> float:
    """The cosine of the angle between both, as vectors; 1 if both are 0, 0 if one is or is NaN."""
    found_M, expected_M = finite(found, expected)
    with np.errstate(over="ignore", invalid="ignore"):
        product = np.sqrt(found_M @ found_M) * np.sqrt(expected_M @ expected_M)
        if product == 0:
            return float(np.array_equal(found_M, expected_M))
        value = found_M @ expected_M / product
    return float(np.clip(value, -1, 1)) if np.isfinite(value) else 0.0


def ulps(found: np.ndarray, expected: np.ndarray, dtype: str) -> Ulps:
    """The median and the largest distance in numbers of a float dtype, both rounded to it first.

    Of 16-bit types: float16 and bfloat16. A NaN is the largest int64 away.
    """
    found_M, expected_M = finite(found, expected)
    if not expected_M.size:
        return Ulps(0.0, 0)
    with np.errstate(over="ignore", invalid="ignore"):
        gap_M = numerics.ulps(found_M.astype(dtype), expected_M.astype(dtype))
    return Ulps(float(np.median(gap_M)), int(gap_M.max()))


def kl(found_TV: np.ndarray, expected_TV: np.ndarray) -> np.ndarray:
    """kl_T: the Kullback-Leibler divergence, in nats, of the found next-token distributions.

    sum p (log p - log q), p of the expected logits, q of the found ones; at least 0. Infinite where
    a row of the found ones has no distribution.
    """
    with np.errstate(invalid="ignore"):
        log_p_TV, log_q_TV = log_softmax(expected_TV), log_softmax(found_TV)
        terms_TV = np.exp(log_p_TV) * (log_p_TV - log_q_TV)
    kl_T = np.where(log_p_TV == -np.inf, 0, terms_TV).sum(axis=-1)
    return np.where(np.isnan(kl_T), np.inf, np.maximum(kl_T, 0))


def finite(found: np.ndarray, expected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both as float64 vectors of M numbers: those whose expected value is finite."""
    if found.shape != expected.shape:  # NumPy would stretch one over the other
        raise ValueError(f"measure: expected shape {expected.shape}, found {found.shape}")
    keep = np.isfinite(expected)
    if keep.all():
        return found.ravel().astype(np.float64), expected.ravel().astype(np.float64)
    return found[keep].astype(np.float64), expected[keep].astype(np.float64)


def _number(value: float) -> float:
    """A number that can be compared: what is not one is infinitely large."""
    return float(np.inf if np.isnan(value) else value)

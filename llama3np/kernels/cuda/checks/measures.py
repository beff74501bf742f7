"""Random numbers for kernels, and how near what they leave has to be."""

from __future__ import annotations

from math import sqrt
from typing import Any

import cupy as cp
import numpy as np

from llama3np import selftest
from llama3np.kernels.cuda.registry import FORMATS, PLAIN, Kernel
from llama3np.kernels.cuda.step import pitch_of
from llama3np.kernels.cuda.weights import stored, upload
from llama3np.selftest import MismatchError

ULP = 2.0**-24  # half a unit in the last place of a float32 near 1: what one rounding may add
UNTOUCHED = 7  # what lies where a kernel must not write
# Half a unit in the last place of a number near 1, of what keys and values are stored as.
HALF_UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def within(found: Any, expected: Any, bound: Any, what: str) -> None:
    """Raise MismatchError if an element is farther from the expected one than its bound; NaN is."""
    found, expected = np.asarray(found), np.asarray(expected)
    if found.shape != expected.shape:
        raise MismatchError(f"{what}: shape {found.shape}, expected {expected.shape}")
    with np.errstate(invalid="ignore"):  # infinite ones that are the same
        error = np.where(found == expected, 0.0, np.abs(found.astype(np.float64) - expected))
    wrong = ~(error <= bound)
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        raise MismatchError(
            f"{what}{list(map(int, at))}: {found[at]!r}, expected {expected[at]!r}; the difference "
            f"{error[at]:.3g} is above {np.broadcast_to(bound, error.shape)[at]:.3g}"
        )


def same(found: Any, expected: Any, what: str) -> None:
    """Raise MismatchError if an element is another number; NaN is NaN."""
    with np.errstate(invalid="ignore"):  # signalling NaN among bfloat16's bits
        found, expected = (np.asarray(a).astype(np.float64) for a in (found, expected))
    both_nan = np.isnan(found) & np.isnan(expected)
    within(np.where(both_nan, 0, found), np.where(both_nan, 0, expected), 0, what)


def untouched(found: Any, what: str) -> None:
    """Raise MismatchError if anything was written here."""
    same(found, np.full(found.shape, UNTOUCHED), f"{what}, which is not its own: ")


def matrix(format: str, shape: tuple[int, int], rng: np.random.Generator) -> Any:
    """A random weight in this format, as a loader hands it over."""
    if format in PLAIN:
        return (rng.standard_normal(shape) / sqrt(shape[1])).astype(PLAIN[format])
    return selftest.blocks(format, shape, rng)


def weight(kernel: Kernel, N: int, K: int, rng: np.random.Generator) -> tuple[Any, np.ndarray]:
    """One in the kernel's format: what the kernel reads, and its numbers in float64."""
    w = matrix(FORMATS[dict(kernel.defines)["FORMAT"]], (N, K), rng)
    return stored(upload(w)), w[:].astype(np.float64)


def vectors(M: int, K: int, rng: np.random.Generator) -> np.ndarray:
    """M vectors in float32, each larger than the one before."""
    x_MK = rng.standard_normal((M, K)).astype(np.float32)
    return x_MK * np.geomspace(0.1, 10, M, dtype=np.float32)[:, None]


def on_device(x_MK: np.ndarray, M: int) -> Any:
    """Vectors as kernels take them: M rows of whole fours, zeros where there is none."""
    out_MP = cp.zeros((M, pitch_of(x_MK.shape[1])), np.float32)
    out_MP[: len(x_MK), : x_MK.shape[1]] = cp.asarray(x_MK)
    return out_MP


def numbers(rng: np.random.Generator, shape: tuple[int, ...], dtype: Any) -> np.ndarray:
    """Standard normal ones, as this dtype holds them."""
    return rng.standard_normal(shape).astype(dtype)

"""Tokens: obey, pick, settle, weigh and sift."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import cupy as cp
import numpy as np

from llama3np.kernels.cuda.checks.measures import (
    ULP,
    UNTOUCHED,
    numbers,
    same,
    untouched,
    within,
)
from llama3np.kernels.cuda.launch import launch
from llama3np.kernels.cuda.registry import BINS, Kernel
from llama3np.sample import powers


def obey(kernel: Kernel, M: int, rng: np.random.Generator) -> None:
    """Tokens and positions are those of the orders; the count begins anew."""
    orders = rng.integers(-1, 99, (2, M)).astype(np.int32)
    found = {name: cp.full(M + 1, UNTOUCHED, np.int32) for name in ("tokens", "positions")}
    count = cp.full(1, UNTOUCHED, np.int32)
    launch(kernel, (1,), M, orders=cp.asarray(orders), **found, count=count)
    for array, expected in zip(found.values(), orders, strict=True):
        same(array.get()[:M], expected, f"{kernel.name}: orders")
        untouched(array.get()[M:], kernel.name)
    same(count.get(), [0], f"{kernel.name}: count")


def pick(kernel: Kernel, V: int, M: int, parts: int, rng: np.random.Generator) -> None:
    """Of every part of a row the largest logit, its lowest id, and the sum of powers.

    Every logit is there many times, and the largest is the last one of a row, too.
    """
    logits_MV = rng.integers(-9, 9, (M, V)).astype(np.float32)
    logits_MV[:, [V // 3, V - 1]] = 9
    peaks, ids = cp.zeros((M, parts), np.float32), cp.zeros((M, parts), np.int32)
    sums = cp.zeros((M, parts), np.float64)
    at = {"logits": cp.asarray(logits_MV), "V": V, "peaks": peaks, "ids": ids, "sums": sums}
    launch(kernel, (parts, M), 256, **at)
    size = -(-V // parts)
    for i in range(-(-V // size)):
        own = logits_MV[:, i * size : (i + 1) * size].astype(np.float64)
        what, peak = f"{kernel.name}: part {i} ", own.max(axis=1)
        same(peaks.get()[:, i], peak, f"{what}peaks")
        same(ids.get()[:, i], i * size + own.argmax(axis=1), f"{what}ids")
        exact = np.exp(own - peak[:, None]).sum(axis=1)
        within(sums.get()[:, i], exact, 40 * ULP * exact, f"{what}sums")
    if (nothing := peaks.get()[:, -(-V // size) :]).size:
        same(nothing, np.full(nothing.shape, -np.inf), f"{kernel.name}: peaks of no logits")


def settle(kernel: Kernel, M: int, parts: int, rng: np.random.Generator) -> None:
    """The lowest id of the largest part goes in again and is recorded; row 0 is idle."""
    peaks = rng.integers(-9, 3, (M, parts)).astype(np.float32)
    peaks[:, -1] = peaks[:, parts // 2] = 3
    ids = np.sort(rng.choice(9999, (M, parts))).astype(np.int32)
    sums = rng.uniform(1, 99, (M, parts))
    best = {"peaks": cp.asarray(peaks), "ids": cp.asarray(ids), "sums": cp.asarray(sums)}
    tokens, positions = (
        cp.full(M, UNTOUCHED, np.int32),
        cp.asarray(np.arange(M, dtype=np.int32) - 1),
    )
    records, count = cp.full((3, M, 2), UNTOUCHED, np.float64), cp.ones(1, np.int32)
    left = {"tokens": tokens, "positions": positions, "records": records, "count": count}
    launch(kernel, (1,), 32 * M, **best, **left, parts=parts, V=9999, room=3)
    chosen = ids[np.arange(M), peaks.argmax(axis=1)]
    total = (sums * np.exp(peaks.astype(np.float64) - 3)).sum(axis=1)
    same(tokens.get(), [UNTOUCHED, *chosen[1:]], f"{kernel.name}: tokens")
    same(positions.get(), [-1, *range(1, M)], f"{kernel.name}: positions")
    same(records.get()[1, :, 0], chosen, f"{kernel.name}: recorded ids")
    within(records.get()[1, :, 1], total, 40 * ULP * total, f"{kernel.name}: recorded sums")
    untouched(records.get()[::2], kernel.name)
    same(count.get(), [2], f"{kernel.name}: count")


def bins_of(logits_V: np.ndarray) -> np.ndarray:
    """Of each logit, how far it is below the largest, in steps of 1/32 that begin a bin."""
    return np.minimum((logits_V.max() - logits_V) * np.float32(32), BINS - 1).astype(int)


def candidates_of(logits_V: np.ndarray, wish: Sequence[float], parts: int) -> Any:
    """The ids that `sift` is to leave, from the definition, in float64; see tokens.cu.

    wish: temperature, top-k, top-p, random number. None where rounding may move the border.
    """
    temperature, k, p, number = wish
    powers_V, bins_V = powers(logits_V, float(logits_V.max()), temperature), bins_of(logits_V)
    total, V = powers_V.sum(), logits_V.size
    if k:
        return np.flatnonzero(bins_V <= np.sort(bins_V)[min(int(k), V) - 1]) if k <= V else range(V)
    if p < 1:
        most_V = powers(-np.maximum(bins_V - 2.0**-10, 0) / 32, 0.0, temperature)
        beyond = np.array([(bins_V > b) @ most_V for b in range(BINS)])
        spare = (1 - p - 2.0**-36) * total
        sure = (np.abs(beyond - spare) > 1e-9 * total).all()
        return np.flatnonzero(bins_V <= (beyond <= spare).argmax()) if sure else None
    size = -(-V // parts)
    start = np.searchsorted(np.cumsum(powers_V), number * total, side="right") // size * size
    return np.arange(start, min(V, start + size))


def _parts_of(logits_MV: np.ndarray, parts: int, temperature: float) -> dict[str, np.ndarray]:
    """Peaks and sums of parts as `pick` leaves them, powers and counts as `weigh` does."""
    M, V = logits_MV.shape
    size, wide = -(-V // parts), logits_MV.astype(np.float64)
    found = {name: np.zeros((M, parts)) for name in ("peaks", "sums", "powers")}
    found["peaks"][:] = -np.inf
    found["counts"] = np.zeros((M, parts, BINS), np.int32)
    for m, i in np.ndindex(M, -(-V // size)):
        own = slice(i * size, (i + 1) * size)
        found["peaks"][m, i] = peak = wide[m, own].max()
        found["sums"][m, i] = np.exp(wide[m, own] - peak).sum()
        found["powers"][m, i] = powers(logits_MV[m, own], wide[m].max(), temperature).sum()
        found["counts"][m, i] = np.bincount(bins_of(logits_MV[m])[own], minlength=BINS)
    return found | {"peaks": found["peaks"].astype(np.float32)}


def weigh(kernel: Kernel, V: int, M: int, parts: int, rng: np.random.Generator) -> None:
    """Of every part of a row the sum of powers, and how many logits are in each bin."""
    logits_MV = numbers(rng, (M, V), np.float32) * np.float32(5)
    expected = _parts_of(logits_MV, parts, 0.7)
    wishes = cp.asarray(np.tile([0.7, 0, 1, 0.5], (M, 1)))
    found = {"powers": cp.full((M, parts), np.nan), "counts": cp.full((M, parts, BINS), -1, "i4")}
    at = {"logits": cp.asarray(logits_MV), "V": V, "peaks": cp.asarray(expected["peaks"])}
    launch(kernel, (parts, M), 256, **at, wishes=wishes, **found)
    within(
        found["powers"].get(), expected["powers"], 1e-12 * expected["powers"],
        f"{kernel.name}: powers",
    )  # fmt: skip
    same(found["counts"].get(), expected["counts"], f"{kernel.name}: counts")


def sift(kernel: Kernel, V: int, parts: int, rng: np.random.Generator) -> None:
    """What may be drawn of a row by top-k, of one by top-p, and of one without either."""
    wishes = np.array([[0.7, min(V, 20), 1, 0.5], [0.7, 0, 0.9, 0.5], [0.7, 0, 1, 0.8]])
    M, room = len(wishes), V + 2
    logits_MV = numbers(rng, (M, V), np.float32) * np.float32(5)
    of = _parts_of(logits_MV, parts, 0.7)
    facts, ids = cp.full((M, 5), np.nan), cp.full((M, room), UNTOUCHED, np.int32)
    kept = cp.full((M, room), UNTOUCHED, np.float32)
    launch(
        kernel, (M,), BINS, logits=cp.asarray(logits_MV), V=V, wishes=cp.asarray(wishes),
        **{name: cp.asarray(array) for name, array in of.items()},
        parts=parts, facts=facts, ids=ids, kept=kept, room=room,
    )  # fmt: skip
    for m, wish in enumerate(wishes):
        what, expected = f"{kernel.name}: row {m} ", candidates_of(logits_MV[m], wish, parts)
        powers_V = powers(logits_MV[m], float(logits_MV[m].max()), 0.7)
        before = powers_V[: expected[0]].sum() if m == 2 else 0
        once = powers(logits_MV[m], float(logits_MV[m].max()), 1.0).sum()
        exact = np.array([len(expected), logits_MV[m].max(), powers_V.sum(), once, before])
        bound = exact * [0, 0, 1e-12, 40 * ULP, 1e-12]
        within(facts.get()[m], exact, bound, f"{what}facts")
        for name, array, value in (("ids", ids, expected), ("kept", kept, logits_MV[m, expected])):
            same(array.get()[m, : len(expected)], value, f"{what}{name}")
            untouched(array.get()[m, len(expected) :], kernel.name)

"""Attention: turn, attend, combine, and attend_block of prefill."""

from __future__ import annotations

from collections.abc import Sequence
from math import sqrt
from typing import Any

import cupy as cp
import numpy as np

from llama3np import model
from llama3np.kernels.cuda import engine, registry
from llama3np.kernels.cuda.checks.measures import (
    HALF_UNIT,
    ULP,
    UNTOUCHED,
    numbers,
    on_device,
    same,
    untouched,
    within,
)
from llama3np.kernels.cuda.launch import launch
from llama3np.kernels.cuda.registry import STRETCH, Kernel


def turn(
    kernel: Kernel, K: int, slots: int, positions: Sequence[int], rng: np.random.Generator
) -> None:
    """RoPE of queries and keys, and keys and values in the cache; of idle rows nothing at all."""
    d, dtype = dict(kernel.defines), kernel.cached
    H, M, N = d["HEAD"], len(positions), d["GROUP"] * K
    heads = numbers(rng, (M, 1, N + 2 * K, H), np.float32)
    angles_SP = rng.uniform(-4, 4, (slots, H // 2)).astype(np.float32)
    cos_SP, sin_SP = np.cos(angles_SP), np.sin(angles_SP)
    old = numbers(rng, (2, M, K, slots, H), dtype)
    qkv, keys, values = on_device(heads.reshape(M, -1), M), cp.asarray(old[0]), cp.asarray(old[1])
    launch(
        kernel, (N + 2 * K, M), 64, qkv=qkv, pitch=qkv.shape[1], N=N, K=K,
        cos_SP=cp.asarray(cos_SP), sin_SP=cp.asarray(sin_SP), positions=places(positions),
        keys=keys, values=values, slots=slots,
    )  # fmt: skip
    rows, live = np.maximum(positions, 0), np.array(positions) >= 0
    cos, sin = (table[rows][:, None].astype(np.float64) for table in (cos_SP, sin_SP))
    pairing = "half" if d["PAIRING"] else "interleaved"
    turned = model.rope(heads.astype(np.float64), cos, sin, pairing)[:, 0]
    found, bound = qkv.get()[:, : N * H].reshape(M, N, H), 24 * ULP
    within(found[live], turned[live, :N], bound, f"{kernel.name}: q")
    same(found[~live], heads[~live, 0, :N], f"{kernel.name}: q of an idle row: ")
    _written(keys.get(), old[0], turned[:, N : N + K], positions, f"{kernel.name}: keys", bound)
    _written(values.get(), old[1], heads[:, 0, N + K :], positions, f"{kernel.name}: values")


def _written(
    found: np.ndarray, old: np.ndarray, new_MKH: np.ndarray, positions: Sequence[int], what: str,
    bound: float = 0.0,
) -> None:  # fmt: skip
    """At each row's position the new numbers, rounded once; all others as they were.

    bound: what the new numbers themselves may be off by; if by nothing, all bits are known.
    """
    for m, position in enumerate(positions):
        kept = np.arange(found.shape[2]) != position
        same(found[m][:, kept], old[m][:, kept], f"{what} of other positions: ")
        if position < 0:
            continue
        if bound == 0:
            same(found[m][:, position], new_MKH[m].astype(found.dtype), what)
        else:
            rounding = 1.001 * HALF_UNIT[str(found.dtype)] * np.abs(new_MKH[m])
            within(found[m][:, position], new_MKH[m], rounding + bound, what)


def rounding(kernel: Kernel, step: int, rng: np.random.Generator) -> None:
    """Values are rounded to the cache as NumPy does: ties, subnormals, the largest, infinity.

    step: every how manieth of 135,000 numbers; float32's subnormals, which are flushed, are none.
    """
    H, dtype = dict(kernel.defines)["HEAD"], kernel.cached
    bits = rng.integers(0, 2**32, 4096, dtype=np.uint32)
    halves = np.arange(2**16, dtype=np.uint16).view(dtype).astype(np.float32)
    with np.errstate(all="ignore"):
        ties = ((halves[:-1].astype(np.float64) + halves[1:]) / 2).astype(np.float32)
        every = np.concatenate([bits.view(np.float32), halves, ties])[::step]
        every = every[~(np.abs(every) < 2.0**-126) | (every == 0)]
        v_MH = np.append(every, np.zeros(-every.size % H, np.float32)).reshape(-1, H)
        expected = v_MH.astype(dtype)
    M = len(v_MH)
    qkv = on_device(np.concatenate([np.zeros_like(v_MH)] * 2 + [v_MH], axis=1), M)
    keys, values = (cp.zeros((M, 1, 1, H), dtype) for _ in "kv")
    table = cp.zeros((1, H // 2), np.float32)
    launch(
        kernel, (3, M), 64, qkv=qkv, pitch=qkv.shape[1], N=1, K=1, cos_SP=table, sin_SP=table,
        positions=places([0] * M), keys=keys, values=values, slots=1,
    )  # fmt: skip
    same(values.get()[:, 0, 0], expected, f"{kernel.name}: rounded values")


def places(positions: Sequence[int]) -> Any:
    """Positions of rows as kernels read them; -1 is that of an idle row."""
    return cp.asarray(np.array(positions, np.int32))


def run_attend(
    kernel: Kernel, q_MNH: np.ndarray, keys: np.ndarray, values: np.ndarray,
    positions: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    """Launch attend: out, peaks, sums of every stretch, on the device; NaN where there is none."""
    (M, N, H), (K, slots) = q_MNH.shape, keys.shape[1:3]
    qkv, stretches = on_device(q_MNH.reshape(M, -1), M), -(-slots // STRETCH)
    parts = {
        "out": cp.full((M, N, stretches, H), np.nan, np.float32),
        "peaks": cp.full((M, N, stretches), np.nan, np.float32),
        "sums": cp.full((M, N, stretches), np.nan, np.float32),
    }
    launch(
        kernel, (stretches, K * registry.query_shares(kernel), M), 128, **parts, qkv=qkv,
        pitch=qkv.shape[1], keys=cp.asarray(keys), values=cp.asarray(values), K=K, slots=slots,
        positions=places(positions), scale=1 / sqrt(H),
    )  # fmt: skip
    return parts


def run_combine(kernel: Kernel, parts: dict[str, Any], positions: Sequence[int]) -> np.ndarray:
    """Launch combine: the stretches of every head together, (M, N, H)."""
    M, N, stretches, H = parts["out"].shape
    y = cp.full((M, N * H + 4), UNTOUCHED, np.float32)
    at = {"positions": places(positions), "stretches": stretches}
    launch(kernel, (N, M), 64, **parts, **at, y=y, pitch=N * H + 4)
    untouched(y.get()[:, N * H :], kernel.name)
    return y.get()[:, : N * H].reshape(M, N, H)


def score_error(q_MNH: np.ndarray, keys: np.ndarray, positions: Sequence[int]) -> float:
    """What a score, a sum of H products, may be off by."""
    seen = keys[:, :, : max(1, max(positions) + 1)].astype(np.float64)
    H, largest = q_MNH.shape[-1], np.abs(seen).max(initial=0, where=~np.isnan(seen))
    return (H + 4) * ULP * np.abs(q_MNH).max() * largest * sqrt(H)


def attend(
    kernel: Kernel, K: int, slots: int, positions: Sequence[int], rng: np.random.Generator,
    size: float = 1,
) -> None:  # fmt: skip
    """Of every stretch the largest score, the sum of powers, and the values weighed by them.

    What lies beyond a row's position is no number here. size: of the queries.
    """
    d, M = dict(kernel.defines), len(positions)
    H, G, dtype = d["HEAD"], d["GROUP"], kernel.cached
    q_MNH = numbers(rng, (M, G * K, H), np.float32) * np.float32(size)
    keys, values = (numbers(rng, (M, K, slots, H), dtype) for _ in "kv")
    for m, position in enumerate(positions):
        keys[m, :, position + 1 :] = values[m, :, position + 1 :] = np.nan
    found = {
        name: a.get() for name, a in run_attend(kernel, q_MNH, keys, values, positions).items()
    }
    error = score_error(q_MNH, keys, positions)
    share = 2.1 * error + (STRETCH / 8 + 40) * ULP  # of a sum of powers, when scores are off
    for m, i in np.ndindex(M, -(-slots // STRETCH)):
        what = f"{kernel.name}: row {m} at {positions[m]}, stretch {i}, "
        own = {name: a[m, :, i] for name, a in found.items()}
        seen = slice(i * STRETCH, min((i + 1) * STRETCH, positions[m] + 1))
        if seen.start >= seen.stop:
            for name, array in own.items():
                same(array, np.full(array.shape, np.nan), f"{what}which no row sees: {name}")
            continue
        k, v = (a[m, :, seen].astype(np.float64) for a in (keys, values))
        peaks, sums, out = _stretch(q_MNH[m].reshape(K, G, H).astype(np.float64), k, v)
        within(own["peaks"], peaks, error, f"{what}peaks")
        within(own["sums"], sums, share * sums, f"{what}sums")
        within(own["out"], out, share * sums[:, None] * np.abs(v).max(), f"{what}out")


def _stretch(q_KGH: Any, k_KSH: Any, v_KSH: Any) -> tuple[Any, Any, Any]:
    """Peaks and sums of powers, (N,), and values weighed by powers, (N, H)."""
    H = q_KGH.shape[-1]
    scores_KGS = q_KGH @ k_KSH.swapaxes(1, 2) / sqrt(H)
    peaks_KG1 = scores_KGS.max(axis=-1, keepdims=True)
    powers_KGS = np.exp(scores_KGS - peaks_KG1)
    return (
        peaks_KG1.reshape(-1),
        powers_KGS.sum(-1).reshape(-1),
        (powers_KGS @ v_KSH).reshape(-1, H),
    )


def combine(
    kernel: Kernel, K: int, slots: int, positions: Sequence[int], rng: np.random.Generator
) -> None:
    """The means of a row's stretches, each by its sum of powers; zeros of an idle row."""
    d, M, stretches = dict(kernel.defines), len(positions), -(-slots // STRETCH)
    H, N = d["HEAD"], d["GROUP"] * K
    out = numbers(rng, (M, N, stretches, H), np.float32)
    peaks = numbers(rng, (M, N, stretches), np.float32) * np.float32(20)
    sums = rng.uniform(1, STRETCH, (M, N, stretches)).astype(np.float32)
    expected, bound = np.zeros((2, M, N, H))
    for m, position in enumerate(positions):
        used = (position + STRETCH) // STRETCH
        out[m, :, used:] = peaks[m, :, used:] = sums[m, :, used:] = np.nan
        if used:
            p, s, o = (a[m, :, :used].astype(np.float64) for a in (peaks, sums, out))
            powers = np.exp(p - p.max(axis=-1, keepdims=True))
            total = (powers * s).sum(axis=-1)[:, None]
            expected[m] = (powers[..., None] * o).sum(axis=1) / total
            bound[m] = (powers[..., None] * np.abs(o)).sum(axis=1) / total * (used + 40) * ULP
    parts = {"out": cp.asarray(out), "peaks": cp.asarray(peaks), "sums": cp.asarray(sums)}
    within(run_combine(kernel, parts, positions), expected, bound, f"{kernel.name}: y")


def attend_block(
    kernel: Kernel, G: int, K: int, lengths: Sequence[int], counts: Sequence[int], room: int,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    """Attention of ragged rows, that many tokens after these, in a cache with room for more."""
    H, dtype, B, T = dict(kernel.defines)["HEAD"], kernel.cached, len(lengths), max(counts)
    S = int(np.add(lengths, counts).max())
    q_BTNH = numbers(rng, (B, T, G * K, H), np.float32)
    keys, values = (numbers(rng, (B, K, S + room, H), dtype) for _ in "kv")
    positions_BT = np.array(lengths)[:, None] + np.arange(T)
    assert registry.prefill_kernel(H, dtype) == kernel
    k, v = cp.asarray(keys)[:, :, :S], cp.asarray(values)[:, :, :S]
    found = engine.attention(cp.asarray(q_BTNH), k, v, cp.asarray(positions_BT), None).get()
    q, k, v = (a.astype(np.float64) for a in (q_BTNH, keys[:, :, :S], values[:, :, :S]))
    expected = model.attention(q, k, v, positions_BT, lambda name, array: None)
    error = score_error(q_BTNH.reshape(-1, G * K, H), keys, [S - 1])
    bound = (2.1 * error + (S / 8 + 40) * ULP) * np.abs(values.astype(np.float64)).max()
    for b, count in enumerate(counts):
        within(found[b, :count], expected[b, :count], bound, f"{kernel.name}: row {b} y")

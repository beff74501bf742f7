"""Each CUDA kernel launched alone, and held against its plain expression in float64.

A function here is one launch over random numbers of the sizes that it is given: the tests draw
them, and `check` takes those where kernels break: less than a block or a tile, whole ones, and a
little more. What a kernel must not touch is filled before, and looked at after. Errors are bounded
by what sums of that many float32 numbers can lose.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from math import sqrt
from typing import Any

import cupy as cp
import ml_dtypes
import numpy as np

from llama3np import model, selftest
from llama3np.kernels import ggml
from llama3np.kernels.cuda import engine, registry
from llama3np.kernels.cuda.launch import launch
from llama3np.kernels.cuda.registry import BINS, FORMATS, PLAIN, STRETCH, WARPS, Kernel
from llama3np.kernels.cuda.step import pitch_of, whole
from llama3np.kernels.cuda.weights import stored, upload
from llama3np.sample import powers
from llama3np.selftest import MismatchError

ULP = 2.0**-24  # half a unit in the last place of a float32 near 1: what one rounding may add
UNTOUCHED = 7  # what lies where a kernel must not write
# Half a unit in the last place of a number near 1, of what keys and values are stored as.
HALF_UNIT = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}

Case = Callable[..., None]  # one launch and its comparison; takes rng=


def check(kernel: Kernel) -> int:
    """Launch a kernel over the sizes where it might break; return how many these were.

    Raises MismatchError, which names the kernel, the element and both values, and KeyError for a
    kernel of which nothing is known here.
    """
    cases = list(CASES[kernel.entry](kernel))
    for number, case in enumerate(cases):
        case(rng=np.random.default_rng(number))
    return len(cases)


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


# ---- numbers -------------------------------------------------------------------------------------


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


# ---- products ------------------------------------------------------------------------------------


def dot_bound(x_MK: np.ndarray, w_NK: np.ndarray, extra: int = 24) -> np.ndarray:
    """What a product may be off by: a lane's share of K sums, and what norm and decoding round.

    A weight scale * q - minimum is a difference: it is as exact as the largest of its row.
    """
    K = x_MK.shape[1]
    largest_NK = np.broadcast_to(np.abs(w_NK).max(axis=1, keepdims=True), w_NK.shape)
    return 1.01 * (K / 32 + extra) * ULP * (np.abs(x_MK) @ largest_NK.T)


def normed_arguments(
    kernel: Kernel, x_MK: np.ndarray, norm_K: np.ndarray, eps: float, parts: int
) -> dict[str, Any]:
    """Those of a kernel that norms vectors as it reads them; their squares are summed in parts."""
    M, K = dict(kernel.defines)["BATCH"], x_MK.shape[1]
    x, squares_MI = on_device(x_MK, M), np.zeros((M, parts), np.float32)
    for i, part in enumerate(np.array_split(x_MK, parts, axis=1)):
        squares_MI[: len(x_MK), i] = (part**2).sum(axis=1)
    return {
        "x": x, "x_pitch": x.shape[1], "K": K, "norm": whole(cp.asarray(norm_K)),
        "squares": cp.asarray(squares_MI), "parts": parts, "eps": eps, "rounded": 0,
    }  # fmt: skip


def normed(x_MK: np.ndarray, norm_K: np.ndarray, eps: float) -> np.ndarray:
    """RMSNorm in float64, of float32 numbers."""
    return model.rms_norm(x_MK.astype(np.float64), norm_K.astype(np.float64), eps)


def project(
    kernel: Kernel, sizes: Sequence[int], K: int, rows: int, rng: np.random.Generator,
    eps: float = 1e-5, parts: int = 3,
) -> None:  # fmt: skip
    """Project: y = W norm(x), for one to three weights of so many rows, side by side in y."""
    weights = [weight(kernel, N, K, rng) for N in sizes]
    x_MK, norm_K = vectors(rows, K, rng), rng.uniform(0.5, 2.0, K).astype(np.float32)
    padded = [*weights, *[weights[0]] * (3 - len(sizes))]
    counts = [*sizes, *[0] * (3 - len(sizes))]
    starts = np.cumsum([0, *counts]).tolist()
    arguments = {f"w{j}": w for j, (w, _) in enumerate(padded)}
    arguments |= {f"N{j}": N for j, N in enumerate(counts)}
    arguments |= {f"y{j}": starts[j] for j in range(3)}
    arguments |= normed_arguments(kernel, x_MK, norm_K, eps, parts)
    y = cp.full((dict(kernel.defines)["BATCH"], sum(sizes) + 3), UNTOUCHED, np.float32)
    blocks = sum(-(-N // registry.block_rows(kernel)) for N in sizes)
    launch(kernel, (blocks,), WARPS * 32, **arguments, y=y, y_pitch=y.shape[1])
    w_NK, exact_MK = np.concatenate([w for _, w in weights]), normed(x_MK, norm_K, eps)
    found = y.get()[:rows]
    within(found[:, :-3], exact_MK @ w_NK.T, dot_bound(exact_MK, w_NK), f"{kernel.name}: y")
    untouched(found[:, -3:], kernel.name)


def gate_up(kernel: Kernel, N: int, K: int, rows: int, rng: np.random.Generator) -> None:
    """Gate and up: y = silu(G norm(x)) * (U norm(x))."""
    (gate, gate_NK), (up, up_NK) = (weight(kernel, N, K, rng) for _ in range(2))
    x_MK, norm_K = vectors(rows, K, rng), rng.uniform(0.5, 2.0, K).astype(np.float32)
    y = cp.full((dict(kernel.defines)["BATCH"], N + 2), UNTOUCHED, np.float32)
    launch(
        kernel, (-(-N // registry.block_rows(kernel)),), WARPS * 32, gate=gate, up=up, N=N,
        **normed_arguments(kernel, x_MK, norm_K, 1e-5, 3), y=y, y_pitch=N + 2,
    )  # fmt: skip
    exact_MK = normed(x_MK, norm_K, 1e-5)
    gate_MN, up_MN = exact_MK @ gate_NK.T, exact_MK @ up_NK.T
    gate_bound, up_bound = dot_bound(exact_MK, gate_NK), dot_bound(exact_MK, up_NK)
    expected = model.swiglu(gate_MN, up_MN)
    silu = np.abs(model.swiglu(gate_MN, np.ones_like(up_MN)))  # whose slope is at most 1.1
    bound = 1.1 * gate_bound * (np.abs(up_MN) + up_bound) + silu * up_bound
    found = y.get()[:rows]
    within(found[:, :N], expected, bound + 16 * ULP * np.abs(expected), f"{kernel.name}: y")
    untouched(found[:, N:], kernel.name)


def add(
    kernel: Kernel, N: int, K: int, rows: int, rng: np.random.Generator, rounded: int = 0
) -> None:
    """Add: y += W x, and the sums of squares of the new y. rounded: x to bfloat16 first."""
    (w, w_NK), x_MK = weight(kernel, N, K, rng), vectors(rows, K, rng)
    M, old_MN = dict(kernel.defines)["BATCH"], numbers(rng, (rows, N), np.float32)
    x, y = on_device(x_MK, M), on_device(old_MN, M)
    blocks = -(-N // registry.block_rows(kernel))
    squares = cp.zeros((M, blocks * registry.square_parts(kernel)), np.float32)
    launch(
        kernel, (blocks,), WARPS * 32, w=w, N=N, K=K, x=x, x_pitch=x.shape[1], rounded=rounded,
        y=y, y_pitch=y.shape[1], squares=squares,
    )  # fmt: skip
    wide_MK = (x_MK.astype(ml_dtypes.bfloat16) if rounded else x_MK).astype(np.float64)
    expected, found = old_MN + wide_MK @ w_NK.T, y.get()
    bound = dot_bound(wide_MK, w_NK) + ULP * np.abs(expected)
    within(found[:rows, :N], expected, bound, f"{kernel.name}: y")
    same(found[:, N:], np.zeros_like(found[:, N:]), f"{kernel.name}: the end of a row: ")
    exact = (found[:rows, :N].astype(np.float64) ** 2).sum(axis=1)
    sums = squares.get()[:rows].astype(np.float64).sum(axis=1)
    within(sums, exact, 20 * ULP * exact, f"{kernel.name}: squares")


def swiglu(kernel: Kernel, N: int, M: int, rng: np.random.Generator) -> None:
    """SwiGLU of two buffers: y = silu(y) * other."""
    gate_MN, up_MN = numbers(rng, (2, M, N), np.float32) * np.float32(30)
    gate_MN[:, 0] = -200  # where e^-x would overflow
    y, other = on_device(gate_MN, M), on_device(up_MN, M)
    y[:, N:] = UNTOUCHED
    launch(kernel, (-(-N // 256), M), 256, y=y, other=other, N=N, pitch=y.shape[1])
    expected = model.swiglu(gate_MN.astype(np.float64), up_MN.astype(np.float64))
    found, bound = y.get(), 16 * ULP * np.abs(expected) + 1e-30
    within(found[:, :N], expected, bound, f"{kernel.name}: y")
    untouched(found[:, N:], kernel.name)


# ---- rows of a weight ----------------------------------------------------------------------------


def rows_of(kernel: Kernel, N: int, K: int, rng: np.random.Generator) -> None:
    """Rows to the last bit: a stretch of them, or those of ids, the last row among them."""
    (w, w_NK), start = weight(kernel, N, K, rng), N // 2
    ids = np.arange(start, N)
    which: dict[str, Any] = {"start": start}
    if kernel.entry == "take":
        ids = np.array([N - 1, 0, *rng.integers(0, N, 2)], np.int32)
        which = {"ids": cp.asarray(ids)}
    out = cp.full((len(ids), K + 3), UNTOUCHED, np.float32)
    launch(kernel, (len(ids),), 256, w=w, N=N, K=K, **which, out=out, pitch=K + 3)
    same(out.get()[:, :K], w_NK[ids], f"{kernel.name}: out")
    untouched(out.get()[:, K:], kernel.name)


def every_number(kernel: Kernel, rng: np.random.Generator) -> None:
    """Widen all numbers of 16 bits, but the subnormals of bfloat16.

    Those are float32's too, which are zero to kernels.
    """
    bits = np.arange(2**16, dtype=np.uint16).reshape(256, 256)
    if kernel.stored == PLAIN["BF16"]:
        bits = np.where((bits & 0x7F80) == 0, bits & 0x8000, bits).astype(np.uint16)
    w, out = bits.view(kernel.stored), cp.empty((256, 256), np.float32)
    launch(kernel, (256,), 256, w=cp.asarray(w), N=256, K=256, start=0, out=out, pitch=256)
    same(out.get(), w.astype(np.float32), f"{kernel.name}: out")


def embed(kernel: Kernel, N: int, K: int, rng: np.random.Generator) -> None:
    """Rows of tokens to the last bit, and the sums of their squares."""
    w, w_NK = weight(kernel, N, K, rng)
    ids = np.array([N - 1, 0, *rng.integers(0, N, 2)], np.int32)
    h = cp.full((len(ids), pitch_of(K) + 4), UNTOUCHED, np.float32)
    squares = cp.zeros(len(ids), np.float32)
    launch(
        kernel, (len(ids),), 256, w=w, N=N, K=K, tokens=cp.asarray(ids), h=h, pitch=h.shape[1],
        squares=squares,
    )  # fmt: skip
    same(h.get()[:, :K], w_NK[ids], f"{kernel.name}: h")
    untouched(h.get()[:, K:], kernel.name)
    exact = (w_NK[ids] ** 2).sum(axis=1)
    within(squares.get(), exact, (K / 256 + 20) * ULP * exact, f"{kernel.name}: squares")


# ---- attention -----------------------------------------------------------------------------------


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


# ---- tokens --------------------------------------------------------------------------------------


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


# ---- where kernels break -------------------------------------------------------------------------


def _product_sizes(kernel: Kernel) -> list[tuple[int, int, int]]:
    """(rows of the weight, its columns, vectors): part of a block and a tile, and one more."""
    d, block = dict(kernel.defines), registry.block_rows(kernel)
    format, M = FORMATS[d["FORMAT"]], d["BATCH"]
    tile = 512 if d["SCALAR"] or format == "F32" else 1024
    fewer = max(1, M - 1)
    if format in PLAIN and d["SCALAR"]:
        return [(1, 3, M), (block + 1, tile, fewer), (block - 1, tile + 1, M), (2, 2 * tile + 6, M)]
    unit = ggml.FORMATS[format].weights if format not in PLAIN else 16 // kernel.stored.itemsize
    return [(1, unit, M), (block + 1, tile, fewer), (block - 1, tile + unit, M)]


def _projects(kernel: Kernel) -> Iterator[Case]:
    for N, K, rows in _product_sizes(kernel):
        sizes = [N] if N == 1 else [N, 1, N - 1]
        yield partial(project, kernel, sizes, K, rows, eps=0.5, parts=33)


def _gate_ups(kernel: Kernel) -> Iterator[Case]:
    for N, K, rows in _product_sizes(kernel):
        yield partial(gate_up, kernel, N, K, rows)


def _adds(kernel: Kernel) -> Iterator[Case]:
    for rounded, (N, K, rows) in enumerate(_product_sizes(kernel)):
        yield partial(add, kernel, N, K, rows, rounded=rounded % 2)


def _row_cases(of: Case) -> Callable[[Kernel], Iterator[Case]]:
    def cases(kernel: Kernel) -> Iterator[Case]:
        format = FORMATS[dict(kernel.defines)["FORMAT"]]
        unit = 1 if format in PLAIN else ggml.FORMATS[format].weights
        for N, K in ((1, unit), (5, 3 * unit), (3, 256 + unit)):
            yield partial(of, kernel, N, K)
        if kernel.entry == "widen" and format in ("F16", "BF16"):
            yield partial(every_number, kernel)

    return cases


# Positions of rows: the first, the ends of stretches and those after them; -1 is an idle row.
EDGES = (0, STRETCH - 1, STRETCH, -1, 2 * STRETCH)


def _attention_cases(of: Case, **options: Any) -> Callable[[Kernel], Iterator[Case]]:
    """For a cache that is full, and for one with room; two heads of keys and values, and one."""

    def cases(kernel: Kernel) -> Iterator[Case]:
        yield partial(of, kernel, 2, 2 * STRETCH + 1, EDGES)
        yield partial(of, kernel, 1, 40, (-1, 31, 6), **options)
        if of is turn and kernel.cached.itemsize == 2:
            yield partial(rounding, kernel, 61)

    return cases


def _blocks(kernel: Kernel) -> Iterator[Case]:
    """Fewer queries and keys than a block has, as many, and more; groups of one and of three."""
    size = dict(kernel.defines)["QUERIES"]
    yield partial(attend_block, kernel, 1, 1, [0], [1], room=0)
    yield partial(attend_block, kernel, 3, 2, [size, 0, 2], [size + 1, size, 3], room=5)


def _always(of: Case, *sizes: tuple[int, ...]) -> Callable[[Kernel], Iterator[Case]]:
    return lambda kernel: (partial(of, kernel, *each) for each in sizes)


CASES: dict[str, Callable[[Kernel], Iterator[Case]]] = {
    "project": _projects,
    "gate_up": _gate_ups,
    "add": _adds,
    "swiglu": _always(swiglu, (1, 1), (256, 2), (257, 8)),
    "widen": _row_cases(rows_of),
    "take": _row_cases(rows_of),
    "embed": _row_cases(embed),
    "turn": _attention_cases(turn),
    "attend": _attention_cases(attend, size=30),  # scores of hundreds
    "combine": _attention_cases(combine),
    "attend_block": _blocks,
    "obey": _always(obey, (1,), (8,)),
    "pick": _always(pick, (7, 1, 32), (3001, 8, 32), (32 * 256 + 1, 2, 32)),
    "weigh": _always(weigh, (7, 1, 32), (3001, 8, 32)),
    "sift": _always(sift, (7, 32), (3001, 32)),
    "settle": _always(settle, (1, 32), (8, 33)),
}

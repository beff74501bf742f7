"""Attention of decode steps in parts, against softmax in float64; rows of heads, to the bit."""

from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from checks import assert_same
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

pytest.importorskip("numba")

from llama3np.kernels.cpu import attend
from llama3np.model import rope

CODES = {0: np.float32, 1: np.float16, 30: ml_dtypes.bfloat16}  # ggml's numbers
UNIT = 2.0**-24  # the largest relative error of rounding to float32
TINY = 2.0**-126  # below it errors are absolute
GUARD = 64  # floats that must stay as they are

codes, heads = st.sampled_from(sorted(CODES)), st.integers(1, 9)
sizes = st.integers(1, 72).map(lambda pairs: 2 * pairs)


# ---- attention --------------------------------------------------------------------------------


def guarded(count):
    return np.full(count + GUARD, -7, np.float32)


def assert_guarded(array):
    assert (array[-GUARD:] == -7).all(), "written beyond the end"


def attend_part(q_GH, k_SH, v_SH, first, stop):
    """What attend_part writes, as one row for each head."""
    G, H = q_GH.shape
    code = next(code for code, dtype in CODES.items() if dtype == k_SH.dtype)
    part, scratch = guarded(G * (H + 2)), guarded(attend.SCRATCH)
    q, k, v, to, private = (a.ctypes.data for a in (q_GH, k_SH, v_SH, part, scratch))
    attend.attend_part(q, k, v, code, first, stop, G, H, to, private)
    assert_guarded(part)
    assert_guarded(scratch)
    return part[:-GUARD].reshape(G, H + 2)


def attention(q_GH, k_SH, v_SH, cuts):
    """Attend from the first cut to the last, in parts from each cut to the next."""
    (G, H), parts = q_GH.shape, []
    for first, stop in pairwise(cuts):
        parts.append(attend_part(q_GH, k_SH, v_SH, first, stop))
    parts_XGH2, out = np.stack(parts), guarded(G * H)
    stride = parts_XGH2.strides[0]
    attend.combine(parts_XGH2.ctypes.data, len(parts), stride, G, H, out.ctypes.data)
    assert_guarded(out)
    return out[:-GUARD].reshape(G, H)


def cut(first, stop, rng):
    """Random cuts from first to stop, no part longer than SPLIT."""
    cuts = {first, stop, *rng.integers(first, stop + 1, rng.integers(0, 4)).tolist()}
    while (gaps := np.diff(sorted(cuts))).max() > attend.SPLIT:
        cuts.add(sorted(cuts)[gaps.argmax()] + attend.SPLIT)
    return sorted(cuts)


def draw(code, G, H, S, rng):
    q_GH = rng.standard_normal((G, H), dtype=np.float32)
    k_SH, v_SH = rng.standard_normal((2, S, H), dtype=np.float32).astype(CODES[code])
    return q_GH, k_SH, v_SH


def exact(q_GH, k_SH, v_SH, parts):
    """Softmax attention in float64, and how far rounding to float32 may lead from it."""
    q_GH, k_SH, v_SH = (array.astype(np.float64) for array in (q_GH, k_SH, v_SH))
    S, H = k_SH.shape
    scores_GS = q_GH @ k_SH.T / np.sqrt(H)
    below_GS = scores_GS - scores_GS.max(axis=1, keepdims=True)
    powers_GS = np.exp(below_GS)
    z_G1 = powers_GS.sum(axis=1, keepdims=True)
    mean_GH = powers_GS @ v_SH / z_G1
    # A score is H products and sums, and scaled by a rounded number; what is left of it when the
    # maxima of the part and of all are subtracted rounds twice more, and so may both maxima.
    wrong_GS = (H + 2) * UNIT * (np.abs(q_GH) @ np.abs(k_SH).T) / np.sqrt(H)
    wrong_GS += UNIT * (2 * np.abs(below_GS) + 2)
    # Two exponentials of an ulp, two products; then sums over all slots and all parts.
    relative_GS = np.expm1(wrong_GS) + (8 + S + 2 * parts) * UNIT
    numerator_GH = (powers_GS * relative_GS + TINY) @ np.abs(v_SH)
    denominator_G1 = (powers_GS * relative_GS + TINY).sum(axis=1, keepdims=True)
    error_GH = (numerator_GH + np.abs(mean_GH) * denominator_G1) / z_G1
    return mean_GH, 1.01 * error_GH + 2 * UNIT * np.abs(mean_GH) + TINY  # the squares of errors


@given(codes, heads, sizes, st.integers(1, 1100), st.floats(-3, 2), seeds)
def test_parts_together_are_the_softmax(code, G, H, S, size, seed):
    """Within rounding, wherever the parts are cut; slots outside them may hold anything."""
    rng = np.random.default_rng(seed)
    q_GH, k_SH, v_SH = draw(code, G, H, S, rng)
    q_GH *= np.float32(10**size)
    first, stop = sorted(rng.choice(S + 1, 2, replace=False).tolist())
    for array_SH in (k_SH, v_SH):
        array_SH[:first] = array_SH[stop:] = np.nan
    cuts = cut(first, stop, rng)
    actual_GH = attention(q_GH, k_SH, v_SH, cuts)
    mean_GH, error_GH = exact(q_GH, k_SH[first:stop], v_SH[first:stop], len(cuts) - 1)
    assert (np.abs(actual_GH - mean_GH) <= error_GH).all()


@given(codes, heads, sizes, seeds)
def test_one_key_gives_its_value(code, G, H, seed):
    rng = np.random.default_rng(seed)
    q_GH, k_SH, v_SH = draw(code, G, H, 3, rng)
    expected_GH = np.repeat(v_SH[1:2].astype(np.float32), G, axis=0)
    assert_same(attention(q_GH, k_SH, v_SH, [1, 2]), expected_GH, "value")


@given(codes, heads, sizes, st.integers(2, 600), seeds)
def test_huge_scores_choose_the_largest(code, G, H, S, seed):
    """Scores some 1e33 apart overflow nothing: the others' weights are 0."""
    rng = np.random.default_rng(seed)
    q_GH, k_SH, v_SH = draw(code, G, H, S, rng)
    q_GH[:] = np.float32(1e34) * np.sign(q_GH[:1])
    best = rng.integers(S)
    k_SH[:] = 0.5 * np.sign(q_GH[0]) * rng.random((S, 1))
    k_SH[best] = np.sign(q_GH[0])
    expected_GH = np.repeat(v_SH[best : best + 1].astype(np.float32), G, axis=0)
    actual_GH = attention(q_GH, k_SH, v_SH, cut(0, S, rng))
    assert_same(actual_GH, expected_GH, "value of the best key")


@given(codes, heads, sizes, st.integers(1, 600), st.sampled_from("qkv"), seeds)
def test_nan_comes_out_where_it_went_in(code, G, H, S, where, seed):
    """A query's spoils its head, a key's all heads, a value's its column."""
    rng = np.random.default_rng(seed)
    arrays = dict(zip("qkv", draw(code, G, H, S, rng), strict=True))
    row, column = rng.integers(G if where == "q" else S), rng.integers(H)
    arrays[where][row, column] = np.nan
    spoiled_GH = np.zeros((G, H), bool)
    spoiled_GH[{"q": row, "k": slice(None), "v": (slice(None), column)}[where]] = True
    actual_GH = attention(*arrays.values(), cut(0, S, rng))
    assert (np.isnan(actual_GH) == spoiled_GH).all()


@given(codes, heads, sizes, st.integers(1, attend.SPLIT), seeds)
def test_a_part_is_maximum_sum_and_weighted_values(code, G, H, S, seed):
    rng = np.random.default_rng(seed)
    q_GH, k_SH, v_SH = draw(code, G, H, S, rng)
    part_GH2 = attend_part(q_GH, k_SH, v_SH, 0, S)
    scores_GS = q_GH.astype(np.float64) @ k_SH.astype(np.float64).T / np.sqrt(H)
    error_GS = (H + 2) * UNIT * (np.abs(q_GH) @ np.abs(k_SH.astype(np.float32)).T) / np.sqrt(H)
    assert (np.abs(part_GH2[:, 0] - scores_GS.max(axis=1)) <= 1.01 * error_GS.max(axis=1)).all()
    mean_GH = attention(q_GH, k_SH, v_SH, [0, S])
    divided_GH = part_GH2[:, 2:] / part_GH2[:, 1:2]
    assert (np.abs(mean_GH - divided_GH) <= 4 * UNIT * np.abs(divided_GH)).all()


# ---- one row of a head ------------------------------------------------------------------------


@given(sizes, st.booleans(), seeds)
def test_turn_row_is_rope_to_the_bit(H, interleaved, seed):
    rng = np.random.default_rng(seed)
    row_BTNH = rng.standard_normal((1, 1, 1, H), dtype=np.float32)
    angles_BTP = rng.uniform(0, 9, (1, 1, H // 2)).astype(np.float32)
    cos_BTP, sin_BTP = np.cos(angles_BTP), np.sin(angles_BTP)
    pairing = "interleaved" if interleaved else "half"
    expected_BTNH = rope(row_BTNH, cos_BTP, sin_BTP, pairing)
    turned = guarded(H)
    turned[:H] = row_BTNH.ravel()
    addresses = (array.ctypes.data for array in (turned, cos_BTP, sin_BTP))
    attend.turn_row(*addresses, H, interleaved)
    assert_guarded(turned)
    assert_same(turned[:H].view(np.uint32), expected_BTNH.ravel().view(np.uint32), "bits")


def stored(x_H, code):
    """The bits that store_row writes."""
    H, dtype = len(x_H), np.dtype(CODES[code])
    row = np.zeros(H + 1, dtype)
    attend.store_row(x_H.ctypes.data, row.ctypes.data, H, code)
    assert row[-1] == 0, "written beyond the end"
    return row[:-1].view(f"u{dtype.itemsize}")


def cast(x_H, code):
    with np.errstate(over="ignore", invalid="ignore"):
        row_H = x_H.astype(CODES[code])
    return row_H.view(f"u{row_H.itemsize}")


@pytest.mark.parametrize("code", CODES)
def test_store_row_casts_as_numpy_does(code):
    """Every 997th of the 2^32 patterns, and what lies on and beside the ties of each half."""
    bits = np.arange(0, 2**32, 997, dtype=np.uint32)
    halves = np.arange(2**16, dtype=np.uint16)
    exact = [halves.view(CODES[c]).astype(np.float32).view(np.uint32) for c in (1, 30)]
    near = [(x + np.uint32(d)) for x in exact for d in (0, 2**11, 2**12, 2**15)]
    all_bits = [bits, *(x + np.uint32(d % 2**32) for x in near for d in (-1, 0, 1))]
    x_H = np.concatenate(all_bits).view(np.float32)
    assert_same(stored(x_H, code), cast(x_H, code), "bits")


@given(codes, st.integers(1, 150), seeds)
def test_store_row_takes_any_length(code, H, seed):
    x_H = np.random.default_rng(seed).standard_normal(H, dtype=np.float32)
    assert_same(stored(x_H, code), cast(x_H, code), "bits")

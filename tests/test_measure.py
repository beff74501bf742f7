"""The distances between arrays: against their formulas in scalar loops, and at their edges."""

import math

import ml_dtypes
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

from llama3np.crosscheck import measure

numbers = st.floats(-1e3, 1e3, width=32)
pairs = st.lists(st.tuples(numbers, numbers), min_size=1, max_size=12)


@given(pairs)
def test_distances_are_their_formulas(values):
    found, expected = np.array(values, np.float32).T
    errors = [float(f) - float(e) for f, e in zip(found, expected, strict=True)]
    square, scale = sum(e * e for e in errors), sum(float(e) ** 2 for e in expected)
    assert measure.max_abs(found, expected) == max(map(abs, errors))
    if scale:
        assert measure.nmse(found, expected) == pytest.approx(square / scale, rel=1e-12)
    dot = sum(float(f) * float(e) for f, e in zip(found, expected, strict=True))
    length = math.sqrt(sum(float(f) ** 2 for f in found)) * math.sqrt(scale)
    if length > 1e-100:
        assert measure.cosine(found, expected) == pytest.approx(dot / length, abs=1e-12)


@given(strategies.arrays(3, 5))
def test_an_array_is_at_no_distance_from_itself(x):
    assert (measure.max_abs(x, x), measure.nmse(x, x)) == (0, 0)
    assert measure.cosine(x, x) == pytest.approx(1)
    assert measure.ulps(x, x, "bfloat16") == (0, 0)
    assert measure.kl(x, x).max() < 1e-15


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_infinitely_far(bad):
    found, expected = np.array([[1.0, bad]]), np.array([[1.0, 2.0]])
    assert measure.max_abs(found, expected) == math.inf
    assert measure.nmse(found, expected) == math.inf
    assert measure.cosine(found, expected) == 0
    assert measure.ulps(found, expected, "float32").max > 1_000_000


def test_logits_without_a_distribution_are_infinitely_far():
    expected_TV = np.zeros((3, 2))
    found_TV = np.array([[np.nan, 0], [np.inf, 0], [0, 0]])
    assert measure.kl(found_TV, expected_TV).tolist() == [math.inf, math.inf, 0]


def test_masked_entries_have_no_distance():
    found, expected = np.array([1.0, -1e30]), np.array([1.5, -np.inf])
    assert measure.max_abs(found, expected) == 0.5
    assert measure.nmse(found, expected) == pytest.approx(0.25 / 2.25)
    assert measure.max_abs(found[1:], expected[1:]) == 0


def test_a_zero_is_only_near_a_zero():
    zero, one = np.zeros(2), np.ones(2)
    assert (measure.nmse(zero, zero), measure.nmse(one, zero)) == (0, math.inf)
    assert (measure.cosine(zero, zero), measure.cosine(one, zero)) == (1, 0)


def test_ulps_count_the_numbers_of_the_candidates_dtype():
    expected = np.array([1.0, 1.0, 1.0])
    found = np.array([1.0, 1 + 2**-7, 1 + 2**-6])
    assert measure.ulps(found, expected, "bfloat16") == (1, 2)
    assert measure.ulps(found.astype(ml_dtypes.bfloat16), expected, "float16") == (8, 16)


@given(strategies.arrays(2, 6), strategies.arrays(2, 6))
def test_kl_is_that_of_the_probabilities(found_TV, expected_TV):
    p_TV, q_TV = (np.exp(x) / np.exp(x).sum(-1, keepdims=True) for x in (expected_TV, found_TV))
    np.testing.assert_allclose(
        measure.kl(found_TV, expected_TV), (p_TV * np.log(p_TV / q_TV)).sum(-1), atol=1e-12
    )


def test_shapes_are_not_stretched():
    with pytest.raises(ValueError, match="expected shape"):
        measure.max_abs(np.zeros(3), np.zeros((2, 3)))

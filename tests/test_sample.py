"""From logits to a token: each rule against its definition."""

import math

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from llama3np.errors import InputError
from llama3np.sample import (
    Candidates,
    Sampling,
    all_ids,
    choose,
    draw,
    keep_top_k,
    keep_top_p,
    log_softmax,
    powers,
    probabilities,
)

# Few distinct values, so that ties are common.
logits = st.lists(st.integers(-12, 12).map(lambda n: n / 4), min_size=1, max_size=24).map(
    lambda values: np.array(values, dtype=np.float32)
)
distributions = logits.map(lambda logits_V: np.exp(log_softmax(logits_V)))


def by_rank(probs_V):
    """Ids from the most probable down, of equal ones the lowest first."""
    return sorted(range(len(probs_V)), key=lambda id: (-probs_V[id], id))


@given(logits)
def test_temperature_0_takes_the_largest_logit_and_of_equal_ones_the_first(logits_V):
    rng = Sampling().generator(0)
    assert choose(logits_V, Sampling(), rng) == by_rank(logits_V)[0]


@given(logits, st.floats(-50, 50))
def test_log_softmax_is_the_logarithm_of_the_definition(logits_V, shift):
    powers = [math.exp(value) for value in logits_V.tolist()]
    expected = [math.log(power / math.fsum(powers)) for power in powers]
    np.testing.assert_allclose(log_softmax(logits_V), expected, rtol=1e-12, atol=1e-12)
    np.testing.assert_allclose(log_softmax(logits_V.astype(float) + shift), expected, atol=1e-12)


@given(distributions, st.integers(0, 30))
def test_top_k_keeps_the_k_best(probs_V, k):
    kept = keep_top_k(probs_V, k)
    wanted = by_rank(probs_V)[: k or None]
    assert set(np.flatnonzero(kept)) == set(wanted)
    np.testing.assert_allclose(kept[wanted], probs_V[wanted] / probs_V[wanted].sum(), rtol=1e-12)


@given(distributions, st.floats(0.01, 1))
def test_top_p_keeps_the_largest_until_those_before_exceed_p(probs_V, p):
    """The definition, by a loop over the sorted list, which the shortcut must equal."""
    wanted, before = [], 0.0
    for id in by_rank(probs_V):
        assume(abs(before - p) > 1e-9)  # a sum that meets p to the last bit depends on its order
        if before > p:
            break
        wanted.append(id)
        before += probs_V[id]
    kept = keep_top_p(probs_V, p)
    assert set(np.flatnonzero(kept)) == set(wanted)
    np.testing.assert_allclose(kept[wanted], probs_V[wanted] / probs_V[wanted].sum(), rtol=1e-12)


def test_a_tiny_p_keeps_the_largest_of_equal_ones():
    """1 - p of their number, rounded, may be above every one of them."""
    for V in range(1, 300):
        probs_V = np.full(V, 1 / V)
        for p in (1e-300, 1e-17, 1e-3):
            kept_V = keep_top_p(probs_V, p)
            assert kept_V[0] > 0
            assert kept_V.sum() == pytest.approx(1)


@given(logits, st.floats(0.05, 20))
def test_temperature_divides_the_logits(logits_V, temperature):
    probs_V = probabilities(all_ids(logits_V, temperature), Sampling(temperature))
    expected = np.exp(log_softmax(logits_V.astype(float) / temperature))
    np.testing.assert_allclose(probs_V, expected, rtol=1e-9, atol=1e-15)


@given(logits)
def test_a_tiny_temperature_is_greedy(logits_V):
    best = np.flatnonzero(logits_V == logits_V.max())
    assert choose(logits_V, Sampling(1e-310, seed=1), Sampling(seed=1).generator(0)) in best


@given(logits, st.integers(0, 6), st.floats(0.05, 1), st.integers(0, 2**63))
def test_a_draw_is_one_of_those_kept(logits_V, k, p, seed):
    sampling = Sampling(1.0, k, p, seed)
    rng = sampling.generator(0)
    allowed = set(np.flatnonzero(probabilities(all_ids(logits_V, 1.0), sampling)))
    assert {choose(logits_V, sampling, rng) for _ in range(20)} <= allowed


# ---- some of the ids -----------------------------------------------------------------------------


@st.composite
def rows(draw_from):
    """(logits, flat or peaked and maybe with ties; a sampling)."""
    rng = np.random.default_rng(draw_from(st.integers(0, 2**32 - 1)))
    V = draw_from(st.integers(1, 2000))
    logits_V = rng.normal(0, draw_from(st.sampled_from([0.0, 0.1, 3.0, 30.0])), V)
    if draw_from(st.booleans()):
        logits_V = np.round(logits_V)
    temperature = 10 ** draw_from(st.floats(-3, 1))
    k = draw_from(st.one_of(st.just(0), st.integers(1, 2 * V)))
    p = draw_from(st.one_of(st.just(1.0), st.floats(0.01, 0.999)))
    return logits_V.astype(np.float32), Sampling(temperature, k, p)


def some_of(logits_V, sampling, number, rng):
    """(candidates, their ids) as a device may leave them: not too few, not only those needed."""
    every = all_ids(logits_V, sampling.temperature)
    if sampling.top_k or sampling.top_p < 1:
        first = sampling._replace(top_p=1.0) if sampling.top_k else sampling  # top-p looks at those
        needed_V = probabilities(every, first) > 0
        ids_C = np.flatnonzero(needed_V | (rng.random(logits_V.size) < rng.random()))
        before = 0.0
    else:  # a part of the ids
        sums_V = np.cumsum(every.powers_C)
        at = min(np.searchsorted(sums_V, number * sums_V[-1], side="right"), logits_V.size - 1)
        start, stop = rng.integers(0, at + 1), rng.integers(at, logits_V.size) + 1
        ids_C, before = np.arange(start, stop), math.fsum(every.powers_C[:start])
    powers_C = powers(logits_V[ids_C], float(logits_V.max()), sampling.temperature)
    return Candidates(powers_C, math.fsum(every.powers_C), before), ids_C


@given(rows(), st.integers(0, 2**32 - 1))
def test_a_draw_from_some_of_the_ids_is_the_draw_from_all(row, seed):
    """For the same random number; the sums are added up in other orders."""
    (logits_V, sampling), rng = row, np.random.default_rng(seed)
    for number in rng.random(20):
        candidates, ids_C = some_of(logits_V, sampling, number, rng)
        expected = draw(all_ids(logits_V, sampling.temperature), sampling, number)
        assert ids_C[draw(candidates, sampling, number)] == expected


@given(rows(), st.sampled_from([0.0, 1 - 2**-53]))
def test_the_least_and_the_largest_random_number_draw_an_id_that_is_kept(row, number):
    """Even where a rounded sum lies beside the candidates."""
    logits_V, sampling = row
    kept_V = probabilities(every := all_ids(logits_V, sampling.temperature), sampling) > 0
    for nudge in (-1e-15, 0.0, 1e-15):
        moved = every._replace(total=every.total * (1 + nudge))
        assert kept_V[draw(moved, sampling, number)]


def test_draws_follow_the_probabilities():
    """Chi-square with 4 degrees of freedom is below 23.5 but for one seed in ten thousand."""
    logits_V = np.log(np.array([0.4, 0.3, 0.05, 0.2, 0.05], dtype=np.float32))
    sampling = Sampling(1.0, seed=7)
    rng = sampling.generator(0)
    counts = np.bincount([choose(logits_V, sampling, rng) for _ in range(20000)], minlength=5)
    expected = 20000 * np.exp(logits_V.astype(float))
    assert ((counts - expected) ** 2 / expected).sum() < 23.5


def test_a_seed_repeats_and_rows_differ():
    def draws(seed, row):
        return Sampling(seed=seed).generator(row).random(4).tolist()

    assert draws(3, 0) == draws(3, 0)
    assert draws(3, 0) != draws(3, 1)
    assert draws(3, 0) != draws(4, 0)
    assert draws(None, 0) != draws(None, 0)


@pytest.mark.parametrize(
    ("values", "named"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": math.inf}, "temperature"),
        ({"temperature": math.nan}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"temperature": 10**400}, "temperature"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"seed": -1}, "seed"),
        ({"temperature": "warm"}, "temperature"),
        ({"top_k": 2.5}, "top_k"),
        ({"top_k": None}, "top_k"),
        ({"top_p": "most"}, "top_p"),
        ({"seed": 1.5}, "seed"),
    ],
)
def test_values_out_of_range_are_named(values, named):
    with pytest.raises(InputError, match=f"^{named}: expected"):
        Sampling(**values).check()


@pytest.mark.parametrize("wrong", [[0.0, math.nan], [math.inf, 0.0], [-math.inf, -math.inf]])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_not_finite_are_an_error(wrong, temperature):
    sampling = Sampling(temperature)
    with pytest.raises(InputError, match=f"found {max(wrong[0], wrong[1])}|found nan"):
        choose(np.array(wrong, dtype=np.float32), sampling, sampling.generator(0))

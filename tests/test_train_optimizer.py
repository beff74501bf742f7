"""AdamW, clipping and the learning rate: against scalar loops in float64, and against PyTorch."""

import math

import numpy as np
import paths
import pytest
import strategies
from devices import to_host
from hypothesis import given
from hypothesis import strategies as st

from llama3np.train import optimizer
from llama3np.train.flat import Flat
from llama3np.train.optimizer import AdamW, clip, learning_rate

EPS32 = 2.0**-24
shapes = st.fixed_dictionaries(
    {
        "a": st.tuples(st.integers(1, 5), st.integers(1, 5)),
        "norm": st.tuples(st.integers(1, 6)),
        "b": st.tuples(st.integers(1, 5), st.integers(1, 5)),
    }
)
betas = st.sampled_from([0.0, 0.5, 0.9, 0.999])
adams = st.builds(
    AdamW, betas, betas, st.sampled_from([1e-8, 1e-3]), st.sampled_from([0.0, 0.1, 2.0])
)
dtypes = st.sampled_from([np.float64, np.float32])


@pytest.fixture(autouse=True, scope="module")
def small_chunks():
    """Chunks of 8 numbers, so that tensors of a few dozen have several."""
    before, optimizer.CHUNK = optimizer.CHUNK, 8
    yield
    optimizer.CHUNK = before


def filled(shapes, numbers, xp=np, dtype=np.float64):
    flat = Flat.zeros(shapes, dtype, xp)
    flat.vector[...] = xp.asarray(numbers(len(flat.vector)).astype(dtype))
    return flat


def scalar_adamw(adam, w, grads, decays, rates):
    """Loshchilov & Hutter's algorithm 2, number by number."""
    m, v, w = [0.0] * len(w), [0.0] * len(w), list(w)
    for t, (grad, rate) in enumerate(zip(grads, rates, strict=True), 1):
        for i, g in enumerate(grad):
            m[i] = adam.beta1 * m[i] + (1 - adam.beta1) * g
            v[i] = adam.beta2 * v[i] + (1 - adam.beta2) * g**2
            m_hat, v_hat = m[i] / (1 - adam.beta1**t), v[i] / (1 - adam.beta2**t)
            decay = adam.decay if decays[i] else 0.0
            w[i] -= rate * (m_hat / (math.sqrt(v_hat) + adam.epsilon) + decay * w[i])
    return w


@given(shapes, adams, strategies.seeds, st.integers(1, 4), dtypes)
def test_an_update_is_that_of_each_number_alone(xp, shapes, adam, seed, updates, dtype):
    rng = np.random.default_rng(seed)
    w = filled(shapes, rng.standard_normal, xp, dtype)
    start, first, second = to_host(w.vector).astype(float), w.like(), w.like()
    grads = [filled(shapes, rng.standard_normal, xp, dtype) for _ in range(updates)]
    rates = rng.uniform(1e-3, 1e-1, updates).tolist()
    for t, (grad, rate) in enumerate(zip(grads, rates, strict=True), 1):
        adam.update(w, grad, first, second, rate, t)
    decays = [name != "norm" for name in w.tensors for _ in range(w.tensors[name].size)]
    expected = scalar_adamw(
        adam, start.tolist(), [to_host(g.vector).astype(float) for g in grads], decays, rates
    )
    # v may cancel to a few units of its rounding; its root, and so m / v, is off by that at most
    tolerance = 1e-12 if dtype == np.float64 else 200 * EPS32
    assert w.vector.dtype == first.vector.dtype == second.vector.dtype == dtype
    np.testing.assert_allclose(to_host(w.vector), expected, rtol=tolerance, atol=tolerance)


@given(shapes, strategies.seeds, st.floats(1e-3, 1e3), st.floats(1e-3, 1e3), dtypes)
def test_a_gradient_longer_than_the_limit_keeps_its_direction(xp, shapes, seed, size, limit, dtype):
    rng = np.random.default_rng(seed)
    grad = filled(shapes, lambda n: size * rng.standard_normal(n), xp, dtype)
    before = to_host(grad.vector).astype(float).copy()
    length = math.sqrt(math.fsum(g * g for g in before.tolist()))
    assert clip(grad, limit) == pytest.approx(length, rel=1e-12)
    scale = min(1.0, limit / length)
    np.testing.assert_allclose(to_host(grad.vector), before * scale, rtol=4 * EPS32)


@pytest.mark.parametrize("wrong", [np.nan, np.inf, -np.inf])
def test_a_gradient_that_is_not_finite_shows_in_its_length_and_stays(wrong):
    grad = filled({"a": (5, 5)}, lambda n: np.arange(1.0, n + 1))
    grad.vector[17] = wrong
    before = grad.vector.copy()
    assert not math.isfinite(clip(grad, 1.0))
    np.testing.assert_array_equal(grad.vector, before)


def test_a_length_beyond_what_float32_can_square_is_right():
    grad = Flat.zeros({"a": (3, 4)})
    grad.vector[...] = 1e30
    assert clip(grad, 1.0) == pytest.approx(1e30 * math.sqrt(12), rel=1e-6)
    assert optimizer.norm(grad.vector) == pytest.approx(1.0, rel=1e-6)


schedules = st.integers(1, 300).flatmap(
    lambda steps: st.tuples(st.just(steps), st.integers(0, steps - 1))
)


@given(schedules, st.floats(1e-6, 1.0), st.floats(0, 1))
def test_the_rate_rises_in_a_line_then_falls_along_half_a_cosine(schedule, peak, share):
    steps, warmup = schedule
    floor = share * peak
    rates = [learning_rate(step, peak, warmup, steps, floor) for step in range(steps)]
    rise, fall = rates[:warmup], rates[warmup:]
    assert rise == [pytest.approx(peak * (i + 1) / warmup) for i in range(warmup)]
    assert fall[0] == pytest.approx(peak)
    assert fall == sorted(fall, reverse=True)
    if len(fall) > 1:
        assert fall[-1] == pytest.approx(floor, abs=1e-12)
    for early, late in zip(fall, reversed(fall), strict=True):  # a cosine is odd about its middle
        assert early + late == pytest.approx(fall[0] + fall[-1])
    if len(fall) % 6 == 1 and len(fall) > 1:  # cos(pi/3) = 1/2
        third = floor + (peak - floor) * 0.75
        assert fall[(len(fall) - 1) // 3] == pytest.approx(third)


@pytest.mark.parametrize(
    ("warmup", "rates"),
    [(0, [1.0]), (2, [0.5, 1.0, 1.0]), (3, [1 / 3, 2 / 3, 1.0]), (1, [1.0, 1.0, 0.1])],
)
def test_a_schedule_without_room_for_the_cosine_ends_at_its_peak(warmup, rates):
    found = [learning_rate(step, 1.0, warmup, len(rates), 0.1) for step in range(len(rates))]
    assert found == pytest.approx(rates)


@pytest.mark.parametrize("word", ["float32", "float64"])
def test_updates_are_those_of_pytorch(word):
    golden = np.load(paths.GOLDENS / "optimizer.npz")
    names = ("wide", "tall", "norm")
    w = Flat.of({name: golden[name] for name in names}, word)
    first, second, adam = w.like(), w.like(), AdamW(0.9, 0.95, 1e-8, 0.1)
    for i, rate in enumerate(golden["rates_U"].tolist()):
        grad = Flat.of({name: golden[f"{name}_grads"][i] for name in names}, word)
        assert clip(grad, 1.0) == pytest.approx(golden["norms_float64"][i], rel=1e-6)
        adam.update(w, grad, first, second, rate, i + 1)
        for name in names:
            # Its clipping divides by the length + 1e-6, which Adam's quotient all but undoes.
            np.testing.assert_allclose(
                w.tensors[name], golden[f"{name}_{word}"][i], rtol=2e-6, atol=2e-7
            )

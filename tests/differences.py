"""Derivatives by central differences, in float64: what the backward pass is held against."""

import numpy as np

STEP = 1e-5  # small models with two norms in a row bend within 1e-4


def central(f, x, at=None):
    """df/dx for a function of no arguments that reads x, at each entry (or those flat indices).

    Of fourth order: (8 (f(+h) - f(-h)) - (f(+2h) - f(-2h))) / 12 h, whose error is h^4 of a fifth
    derivative, and of rounding 1e-16 f / h. x is changed for the while, and put back.
    """
    flat = x.reshape(-1)
    assert np.shares_memory(flat, x), "x must be contiguous, to be changed in place"
    at = np.arange(x.size) if at is None else at
    return np.array([_at(f, flat, i) for i in at])


def _at(f, flat, i):
    before, values = flat[i], {}
    for steps in (-2, -1, 1, 2):
        flat[i] = before + steps * STEP
        values[steps] = f()
    flat[i] = before
    return (8 * (values[1] - values[-1]) - (values[2] - values[-2])) / (12 * STEP)


def assert_derivative(found, expected, name, scale=None):
    """Equal but for 1e-6 of the largest entry (of `scale`, where only some entries are given)."""
    found, expected = np.asarray(found).reshape(-1), np.asarray(expected).reshape(-1)
    largest = np.abs(expected if scale is None else scale).max(initial=0)
    worst = np.abs(found - expected).max(initial=0)
    assert worst <= 1e-6 * largest + 1e-9, f"{name}: off by {worst:.3g} of {largest:.3g}"

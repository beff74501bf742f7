"""Assertions about numbers; a failure tells what failed, at which index, and both values."""

import numpy as np


def assert_close(actual, expected, tol, what):
    """Shapes equal, and every |actual - expected| at most tol times the largest |expected|.

    The scale is the array's, not the element's: the rounding of a sum follows its terms, and says
    nothing of how near zero they happened to cancel. Infinities must be the same; NaN never is.
    """
    actual, expected = wide(actual), wide(expected)
    assert actual.shape == expected.shape, f"{what}: {actual.shape}, expected {expected.shape}"
    if expected.size == 0:
        return
    finite = np.isfinite(expected)
    allowed = tol * np.abs(expected[finite]).max(initial=0)
    error = np.zeros(expected.shape)
    error[finite] = np.abs(actual[finite] - expected[finite])
    error[~finite] = np.where(actual[~finite] == expected[~finite], 0, np.inf)
    error[np.isnan(actual)] = np.inf
    worst = np.unravel_index(error.argmax(), error.shape)
    assert error[worst] <= allowed, (
        f"{what}{list(map(int, worst))}: {actual[worst]!r}, expected {expected[worst]!r}; "
        f"the difference {error[worst]:.3g} is above {allowed:.3g}"
    )


def assert_same(actual, expected, what):
    """Shapes, dtypes and every value equal, to the last bit (but +0 is -0)."""
    actual, expected = np.asarray(actual), np.asarray(expected)
    assert actual.dtype == expected.dtype, f"{what}: {actual.dtype}, expected {expected.dtype}"
    assert_close(actual, expected, 0, what)


def difference(actual, expected):
    """The largest |actual - expected| over the largest |expected|, of the finite entries."""
    actual, expected = wide(actual), wide(expected)
    finite = np.isfinite(expected)
    error = np.abs(actual[finite] - expected[finite]).max(initial=0)
    return error / (largest(expected) or 1)


def largest(array):
    """The largest magnitude of the finite entries."""
    array = wide(array)
    return np.abs(array[np.isfinite(array)]).max(initial=0)


def wide(array):
    return np.asarray(array).astype(np.float64)

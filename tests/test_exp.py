"""The compiled exponential over all of float32."""

import re

import numpy as np
import pytest

numba = pytest.importorskip("numba")

from llama3np.kernels.cpu.compiler import FAST, jit  # noqa: E402
from llama3np.kernels.cpu.exp import exp_f32  # noqa: E402


@jit
def exponentials(x_N, y_N):
    for i in range(x_N.size):
        y_N[i] = exp_f32(x_N[i])


def assert_within_ulps(bits_N, ulps):
    """Exact values are float64; an ulp is the distance of two float32 around them."""
    x_N = bits_N.view(np.float32)
    y_N = np.empty_like(x_N)
    exponentials(x_N, y_N)
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        exact_N = np.exp(x_N.astype(np.float64))
        rounded_N = exact_N.astype(np.float32)
        finite_N = np.isfinite(rounded_N)
        error_N = np.abs(y_N - exact_N)[finite_N] / np.spacing(rounded_N[finite_N])
    assert np.array_equal(y_N[~finite_N], rounded_N[~finite_N], equal_nan=True)
    worst = error_N.argmax()
    assert error_N[worst] <= ulps, (
        f"e^{x_N[finite_N][worst]!r} = {y_N[finite_N][worst]!r}, {error_N[worst]} ulps off"
    )


def test_exp_is_within_an_ulp_over_all_of_float32():
    """Every 997th of the 2^32 patterns: both signs, subnormals, infinities, nans."""
    assert_within_ulps(np.arange(0, 2**32, 997, dtype=np.uint32), 1.0)


@pytest.mark.parametrize("low", [0.25, 1.0, -0.5, -16.0, -80.0, 80.0, -100.0])
def test_exp_is_within_an_ulp_at_every_number_of_a_stretch(low):
    """Half a million neighbours, below and above the ties where n steps on."""
    start = int(np.float32(low).view(np.uint32))
    assert_within_ulps(np.arange(start, start + 2**19, dtype=np.uint32), 1.0)


def test_exp_at_the_edges():
    edges = {
        0.0: 1,
        -1e-45: 1,
        np.inf: np.inf,
        -np.inf: 0,
        88.72285: np.inf,
        -103.98: 0,
        3e38: np.inf,
    }
    x_N = np.array([*edges, np.nan], np.float32)
    y_N = np.empty_like(x_N)
    exponentials(x_N, y_N)
    assert np.array_equal(y_N[:-1], np.array(list(edges.values()), np.float32))
    assert np.isnan(y_N[-1])


def test_a_loop_over_exp_is_vectorised():
    signature = "void(float32[::1], float32[::1])"
    compiled = numba.njit(signature, fastmath=FAST, error_model="numpy")(exponentials.py_func)
    (text,) = compiled.inspect_llvm().values()
    assert re.search(r"fmul contract <\d+ x float>", text)

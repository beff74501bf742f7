"""The plain product of profile bf16-mm against float64."""

import ml_dtypes
import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from llama3np.kernels.rounded import plain_product


@given(st.integers(1, 5), st.integers(1, 30), st.integers(1, 70), seeds)
def test_plain_product_rounds_x_alone(M, n_out, n_in, seed):
    rng = np.random.default_rng(seed)
    x_MK = rng.standard_normal((M, n_in), np.float32)
    w_OK = rng.standard_normal((n_out, n_in)).astype(ml_dtypes.bfloat16)
    y_MO = plain_product(x_MK, w_OK)
    rounded_MK = x_MK.astype(ml_dtypes.bfloat16).astype(np.float64)
    exact_MO = rounded_MK @ w_OK.astype(np.float64).T
    # Products of bfloat16 numbers are exact; at most n_in sums round, by half an eps each.
    bound_MO = np.abs(rounded_MK) @ np.abs(w_OK.astype(np.float64)).T
    assert y_MO.dtype == np.float32
    assert (np.abs(y_MO - exact_MO) <= n_in * np.finfo(np.float32).eps * bound_MO).all()

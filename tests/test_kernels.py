"""Stored formats against the plain product."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from checks import assert_same
from hypothesis import given
from hypothesis import strategies as st
from strategies import configs, seeds

from llama3np.kernels import Half, chunks, stored
from llama3np.params import random

HALVES = (np.float16, ml_dtypes.bfloat16)


@given(
    st.sampled_from(HALVES),
    st.sampled_from(["float32", "float64"]),
    *(st.integers(1, n) for n in (4, 9, 70)),
    st.integers(1, 64),
    seeds,
)
def test_half_product_is_the_product_of_the_widened_rows(dtype, wide, M, n_in, n_out, chunk, seed):
    """Whatever the chunk: each output is the product with its own row, widened exactly."""
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((n_out, n_in)).astype(dtype)
    x_MD = rng.standard_normal((M, n_in)).astype(wide)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK", chunk)
        y_MO = x_MD @ Half(w).T
    exact = x_MD.astype(np.float64) @ w.astype(np.float64).T
    # Each product rounds once and n_in - 1 sums round: at most n_in units of the absolute sum.
    bound = np.abs(x_MD.astype(np.float64)) @ np.abs(w.astype(np.float64)).T
    assert y_MO.dtype == wide
    assert (np.abs(y_MO - exact) <= n_in * np.finfo(wide).eps * bound).all()


@given(st.sampled_from(HALVES), seeds)
def test_half_rows_are_widened_exactly(dtype, seed):
    bits = np.random.default_rng(seed).integers(0, 2**16, (7, 5), dtype=np.uint16)
    w = bits.view(dtype)
    ids = np.array([[6, 0], [3, 3]])
    assert_same(Half(w)[ids].view(np.uint32), w[ids].astype(np.float32).view(np.uint32), "rows")


@given(configs(), seeds, st.sampled_from([np.float32, *HALVES]))
def test_stored_wraps_16_bit_matrices_and_copies_nothing(config, seed, dtype):
    params = random(config, np.random.default_rng(seed), dtype)
    tree = stored(params)
    assert (tree.head_VD is tree.embed_VD) == config.tied
    for before, after in zip(params.layers, tree.layers, strict=True):
        assert after.attn_norm_D is before.attn_norm_D
        assert (after.wq if dtype == np.float32 else after.wq.stored) is before.wq


def test_half_never_holds_more_than_a_chunk_widened():
    w = Half(np.zeros((64, chunks.CHUNK // 16), np.float16))  # four chunks
    x_MD = np.zeros((1, w.shape[1]), np.float32)
    tracemalloc.start()
    x_MD @ w.T
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.1 * 4 * chunks.CHUNK

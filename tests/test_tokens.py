"""The compiled operations on single tokens: as the spec has them, and the same bits anywhere."""

import numpy as np
import pytest
from checks import assert_close, assert_same
from hypothesis import given
from hypothesis import strategies as st
from noise import ULP32
from strategies import seeds

from llama3np import model
from llama3np.threads import Pool

pytest.importorskip("numba")
from llama3np.kernels.cpu import tokens
from llama3np.kernels.cpu.shared import address

ONE, THREE = Pool(1), Pool(3)
lengths = st.integers(1, 100)


def drawn(shape, seed, dtype=np.float32):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


@given(st.integers(1, 5), lengths, seeds)
def test_rms_norm_is_the_specs(rows, D, seed):
    x_MD, w_D = drawn((rows, D), seed), drawn(D, seed + 1)
    expected = model.rms_norm(x_MD.astype("float64"), w_D.astype("float64"), 1e-5)
    assert_close(tokens.rms_norm(x_MD, w_D, 1e-5, pool=ONE), expected, (D + 8) * ULP32, "y")


@given(lengths, seeds, st.sampled_from([0.1, 1, 30]))
def test_swiglu_is_the_specs(n, seed, size):
    gate_N, up_N = size * drawn((2, n), seed)
    with np.errstate(over="ignore"):
        expected = model.swiglu(gate_N.astype("float64"), up_N.astype("float64"))
    found = tokens.swiglu(gate_N[None], up_N[None], pool=ONE)[0]
    assert (abs(found - expected) <= 8 * ULP32 * abs(expected) + 1e-34).all()  # e^89 is infinite


def placed(gap, n, seed):
    """gate, up and a place for the result, with gaps of so many floats in one piece of memory."""
    raw = drawn(3 * n + 2 * gap, seed)
    return (raw[i * (n + gap) :][:n] for i in range(3))


@given(lengths, st.integers(0, 300), seeds)
def test_bits_do_not_depend_on_where_memory_lies(n, gap, seed):
    """Compilers guard loops against overlaps by distances, and take another loop for near ones."""
    gate_N, up_N, out_N = placed(gap, n, seed)
    expected = tokens.swiglu(gate_N.copy(), up_N.copy(), pool=ONE)
    tokens.gate_row(address(gate_N), address(up_N), address(out_N), n)
    assert_same(out_N, expected, "swiglu")

    x_N, weight_N, out_N = placed(gap, n, seed)
    expected = tokens.rms_norm(x_N.copy(), weight_N.copy(), 1e-5, pool=ONE)
    tokens.norm_row(address(x_N), address(weight_N), np.float32(1e-5), address(out_N), n)
    assert_same(out_N, expected, "norm")


@given(lengths, seeds)
def test_a_number_alone_has_the_bits_that_it_has_among_others(n, seed):
    """So rows may be cut into units anywhere."""
    gate_N, up_N = drawn((2, n), seed)
    whole = tokens.swiglu(gate_N, up_N, pool=ONE)
    alone = [tokens.swiglu(gate_N[i:][:1], up_N[i:][:1], pool=ONE)[0] for i in range(n)]
    assert_same(np.array(alone), whole, "swiglu")


@given(st.integers(1, 9), st.integers(1, 3), st.sampled_from(["half", "interleaved"]), seeds)
def test_shares_of_threads_are_the_whole(rows, heads, pairing, seed):
    x_1TNH, angles_1TP = drawn((1, rows, heads, 8), seed), drawn((1, rows, 4), seed + 1)
    x_1TD, w_D = x_1TNH.reshape(1, rows, -1), drawn(8 * heads, seed)
    turned = model.rope(x_1TNH, np.cos(angles_1TP), np.sin(angles_1TP), pairing)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokens, "ENOUGH", 0)
        found = tokens.rope(x_1TNH, np.cos(angles_1TP), np.sin(angles_1TP), pairing, pool=THREE)
        assert_same(found, turned, "rope")
        for op, given in ((tokens.rms_norm, (x_1TD, w_D, 1e-5)), (tokens.swiglu, (x_1TD, x_1TD))):
            assert_same(op(*given, pool=THREE), op(*given, pool=ONE), op.__name__)

"""Products with VDPBF16PS against the manual's definition of it, and against float64."""

import mmap
import sys
from itertools import pairwise

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds

pytest.importorskip("numba", reason="numba is not installed")
from llama3np.kernels.cpu.gemm_bf16 import products, supported
from llama3np.kernels.cpu.panels import PIECE
from llama3np.kernels.rounded import plain_product
from llama3np.threads import Pool

pytestmark = pytest.mark.skipif(not supported(), reason="the processor has no AVX512_BF16")

BF16 = ml_dtypes.bfloat16
POOLS = {threads: Pool(threads) for threads in (1, 2, 3)}
SMALLEST = np.finfo(np.float32).tiny

# Around the sizes at which the kernel takes its steps: vectors, panels, rows of a tile, ...
rows_of_x = st.integers(1, 70) | st.sampled_from([511, 512, 513, 545])
rows_of_w = st.integers(1, 40) | st.sampled_from([63, 64, 65, 130])
columns = st.integers(1, 70) | st.sampled_from([510, 511, 512, 513, 514, 1025, 1100])
special = st.sampled_from([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-40, 3e38, -3e38])
pools = st.sampled_from(list(POOLS.values()))


@st.composite
def matrices(draw, n_out, n_in):
    """A bfloat16 matrix as a file may hold it: rows apart, at an odd address, nan between them."""
    gap, skip = draw(st.integers(0, 9)), draw(st.integers(0, 3))
    step = 2 * n_in + gap
    memory = np.full(skip + step * n_out + 8, 0xFF, np.uint8)
    w_OK = np.ndarray((n_out, n_in), BF16, memory, skip, (step, 2))
    w_OK[...] = np.random.default_rng(draw(seeds)).standard_normal((n_out, n_in))
    return w_OK[::-1] if draw(st.booleans()) else w_OK


def flushed(array):
    return np.where(np.abs(array) < SMALLEST, 0, array)


def defined_product(x_MK, w_OK):
    """Intel SDM, VDPBF16PS: two FMAs a pair of columns, the odd one first, subnormals as 0.

    A product is exact in float64, and a sum of two float32 rounds to the same float32 by way of
    float64, which has more than twice as many digits (Figueroa 1995).
    """
    x_MK, w_OK = (flushed(a.astype(BF16).astype(np.float64)) for a in (x_MK, w_OK))
    K = x_MK.shape[1]
    y_MO = np.zeros((len(x_MK), len(w_OK)), np.float32)
    ends = sorted({*range(0, K - K % 2, 2 * PIECE), K - K % 2, K})
    for start, end in pairwise(ends):
        sum_MO = np.zeros_like(y_MO)
        for k in range(start, end):
            k_ = k ^ 1 if k ^ 1 < K else k
            sum_MO = flushed((sum_MO + np.outer(x_MK[:, k_], w_OK[:, k_])).astype(np.float32))
        y_MO = y_MO + sum_MO
    return y_MO


@given(rows_of_x, rows_of_w, columns, st.data())
@np.errstate(all="ignore")
def test_product_is_what_the_manual_says(M, n_out, n_in, data):
    x_MK = np.random.default_rng(data.draw(seeds)).standard_normal((M, n_in), np.float32)
    w_OK = data.draw(matrices(n_out, n_in))
    for array in (x_MK, w_OK):
        places = st.tuples(*(st.integers(0, size - 1) for size in array.shape))
        if array.size:
            for place in data.draw(st.lists(places, max_size=3)):
                array[place] = data.draw(special)
    pool = data.draw(pools)
    y_MO = products(x_MK, [w_OK], pool)[0]
    assert y_MO.dtype == np.float32
    np.testing.assert_array_equal(y_MO, defined_product(x_MK, w_OK))


@given(rows_of_x, rows_of_w, columns, pools, st.data())
def test_product_is_near_the_exact_one(M, n_out, n_in, pool, data):
    x_MK = np.random.default_rng(data.draw(seeds)).standard_normal((M, n_in), np.float32)
    w_OK = data.draw(matrices(n_out, n_in))
    y_MO = products(x_MK, [w_OK], pool)[0]
    rounded_MK, wide_OK = x_MK.astype(BF16).astype(np.float64), w_OK.astype(np.float64)
    # Products are exact in float32, and each addition rounds once, by half an eps of a partial sum:
    # so many, times eps / 2 of the absolute sum, to first order; a whole eps is above it all.
    steps = min(n_in, 2 * PIECE) + n_in // (2 * PIECE) + 1
    bound_MO = steps * np.finfo(np.float32).eps * (np.abs(rounded_MK) @ np.abs(wide_OK).T)
    exact_MO = rounded_MK @ wide_OK.T
    assert (np.abs(y_MO - exact_MO) <= bound_MO).all()
    assert (np.abs(plain_product(x_MK, w_OK) - exact_MO) <= bound_MO).all()


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=100), seeds)
@np.errstate(invalid="ignore")
def test_x_is_rounded_as_ml_dtypes_does(bits, seed):
    drawn = np.random.default_rng(seed).integers(0, 2**32, 5000, np.uint32)
    ties = drawn & np.uint32(0xFFFF0000) | np.uint32(0x8000)
    x_M1 = np.concatenate([np.array(bits, np.uint32), drawn, ties]).view(np.float32)[:, None]
    (y_M1,) = products(x_M1, [np.ones((1, 1), BF16)], POOLS[1])
    np.testing.assert_array_equal(y_M1, flushed(x_M1.astype(BF16).astype(np.float32)))


@settings(max_examples=20)
@given(st.integers(1, 600), rows_of_w | st.just(1500), columns, st.data())
def test_bits_depend_on_nothing_but_the_row(M, n_out, n_in, data):
    """Neither on the number of threads, nor on the rows beside it, nor on other weights."""
    x_MK = np.random.default_rng(data.draw(seeds)).standard_normal((M, n_in), np.float32)
    w_OK, other = data.draw(matrices(n_out, n_in)), data.draw(matrices(70, n_in))
    y_MO = products(x_MK, [w_OK], POOLS[1])[0]
    for pool in POOLS.values():
        assert products(x_MK, [other, w_OK], pool)[1].tobytes() == y_MO.tobytes()
    m = data.draw(st.integers(0, M - 1))
    (alone_1O,) = products(x_MK[m : m + 1], [w_OK], POOLS[1])
    assert alone_1O.tobytes() == y_MO[m].tobytes()


def test_what_an_odd_last_column_is_paired_with_is_zero():
    x_MK = np.ones((1, 513), np.float32)
    x_MK[0, 1] = np.inf  # inf * 0 would be nan, if it were left over from another block
    assert products(x_MK, [np.ones((1, 513), BF16)], POOLS[1])[0] == np.inf


@pytest.mark.skipif(sys.platform != "linux", reason="the system may not cut a mapped file")
@pytest.mark.parametrize("n_in", [1, 7, 512, 1021])
def test_nothing_is_read_after_the_last_weight(tmp_path, n_in):
    page, n_out, path = mmap.PAGESIZE, 2, tmp_path / "weights"
    path.write_bytes(bytes(2 * page))
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 2 * page)
        file.truncate(page)  # from now on, to touch the second page is to die by a signal
    w_OK = np.ndarray((n_out, n_in), BF16, mapped, page - 2 * n_out * n_in)
    x_MK = np.ones((3, n_in), np.float32)
    w_OK[...] = 1
    assert (products(x_MK, [w_OK], POOLS[1])[0] == n_in).all()


def test_x_may_be_a_view_read_only_or_of_another_type():
    x_MK = np.random.default_rng(0).standard_normal((40, 30))
    w_OK = np.eye(9, 15, dtype=BF16)
    x_MK.flags.writeable = False
    (y_MO,) = products(x_MK[::2, ::2], [w_OK], POOLS[2])
    np.testing.assert_array_equal(y_MO, x_MK[::2, :18:2].astype(np.float32).astype(BF16))


@pytest.mark.parametrize(
    ("w_OK", "message"),
    [
        (np.zeros((3, 5), BF16), "expected a bfloat16 matrix of 4 columns, found bfloat16 of sha"),
        (np.zeros((3, 4), np.float32), "of 4 columns, found float32"),
        (np.zeros((4, 3), BF16).T, "contiguous rows"),
    ],
)
def test_another_weight_is_refused(w_OK, message):
    with pytest.raises(ValueError, match=message):
        products(np.zeros((2, 4), np.float32), [w_OK], POOLS[1])

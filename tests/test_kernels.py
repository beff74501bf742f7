"""Stored formats against the plain product."""

import platform
import subprocess
import sys
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np
import pytest
from checks import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import configs, seeds

from llama3np import model
from llama3np.kernels import Blocks, Half, Joined, chunks, ggml, product, stored
from llama3np.kernels.ggml import FORMATS, SCALES
from llama3np.kernels.linear import Linear
from llama3np.kernels.widening import from_half
from llama3np.params import random
from llama3np.threads import Pool, single_threaded_blas

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


# ---- widening float16 ---------------------------------------------------------------------------

ALL = np.arange(2**16, dtype=np.uint16).view(np.float16)


@pytest.mark.parametrize("halves", [ALL, ALL[np.isfinite(ALL)]], ids=["all", "finite"])
def test_every_float16_is_widened_as_by_a_cast(halves):
    for out in (np.empty(halves.shape, np.float32), np.empty((len(halves), 3), np.float32)[:, 1]):
        from_half(halves.view(np.int16), out)
        assert (out.view(np.uint32) == halves.astype(np.float32).view(np.uint32)).all()


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan, -np.nan])
def test_one_float16_that_is_not_finite_is_seen(value):
    halves = np.array([[1, -2], [value, 2**-24]], np.float16)
    out = from_half(halves.view(np.int16), np.empty(halves.shape, np.float32))
    np.testing.assert_array_equal(out, halves.astype(np.float32))


# ---- blocks -------------------------------------------------------------------------------------

BLOCKS = [name for name, form in FORMATS.items() if form.dtype is None]


def random_blocks(rng, type_name, n_out, n_blocks):
    """Random bytes, but for scales below 2; every second row of an array is another's."""
    form = FORMATS[type_name]
    bytes_ONC = rng.integers(0, 256, (n_out, 2 * n_blocks, form.nbytes), np.uint8)
    for at in SCALES[type_name]:
        bytes_ONC[:, :, at + 1] &= 0b10111111
    return Blocks(type_name, bytes_ONC.reshape(n_out, -1)[:, : n_blocks * form.nbytes])


@pytest.mark.parametrize("type_name", BLOCKS)
def test_blocks_read_as_the_decoded_matrix(type_name):
    form, rng = FORMATS[type_name], np.random.default_rng(0)
    w = random_blocks(rng, type_name, 5, 3)
    whole = ggml.decode(type_name, w.stored, (5, 3 * form.weights))
    assert (w.shape, w.ndim, w.dtype, w.size) == (whole.shape, 2, whole.dtype, whole.size)
    assert w.nbytes == 5 * 3 * form.nbytes
    assert_same(w, whole, "all")
    for rows in (np.s_[1:3], np.s_[4:4], np.s_[:], np.array([[3, 0], [4, 4]]), np.array([], int)):
        assert_same(w[rows], whole[rows], "rows")
    x_MD = rng.standard_normal((2, whole.shape[1]), np.float32)
    np.testing.assert_allclose(x_MD @ w.T, x_MD @ whole.T, rtol=1e-4, atol=1e-3)


def test_parts_of_blocks_are_refused():
    with pytest.raises(ValueError, match="Q8_0: expected rows of whole blocks, found 35 bytes"):
        Blocks("Q8_0", np.zeros((2, 35), np.uint8))


# ---- the NumPy engine's product -----------------------------------------------------------------

POOLS = [Pool(threads) for threads in (1, 2, 3)]


@pytest.fixture(autouse=True)
def one_thread_of_blas():
    with single_threaded_blas():
        yield


@st.composite
def weights(draw):
    """A weight of any kind and small shape; rows may be far from each other."""
    kind = draw(st.sampled_from(["float32", "half", "joined", *BLOCKS]))
    rng, n_out = np.random.default_rng(draw(seeds)), draw(st.integers(1, 24))
    if kind in BLOCKS:
        return random_blocks(rng, kind, n_out, draw(st.integers(1, 3)))
    n_in, apart = draw(st.integers(1, 70)), draw(st.sampled_from([1, 3, 1000]))
    dtype = draw(st.sampled_from([np.float32, *HALVES]))
    whole = rng.standard_normal((n_out, apart * n_in), np.float32).astype(dtype)[:, :n_in]
    if kind == "joined":
        parts = draw(st.integers(1, 3))
        w = Joined([np.roll(whole, i) for i in range(parts)], draw(st.integers(0, 1)))
        return w if dtype == np.float32 else Half(w)
    return Half(whole) if kind == "half" else np.asarray(whole, np.float32)


def plain(w):
    return np.asarray(w.stored if isinstance(w, Half) else w).astype(np.float64)


def limits(patch, chunk, prefill=32, vectors=1024):
    """Make chunks so small that small matrices have several."""
    for name, value in {
        "CHUNK": chunk,
        "TILE": 2 * chunk,
        "TILE_ROWS": 5,
    }.items():
        patch.setattr(product, name, value)
    for name, value in {"SHARE": 10, "PREFILL": prefill, "TILE_VECTORS": vectors}.items():
        patch.setattr(product, name, value)


SIZES = st.one_of(st.integers(1, 9), st.sampled_from([31, 32, 40]))


@settings(max_examples=200)
@given(
    st.lists(weights(), min_size=1, max_size=3),
    SIZES,
    st.sampled_from(["float32", "float64"]),
    st.sampled_from(POOLS),
    st.integers(1, 2000),
    st.sampled_from([2, 8, 32]),
    st.sampled_from([32, 1024]),
    seeds,
)
def test_products_are_those_of_the_widened_weights(
    ws, M, wide, pool, chunk, prefill, vectors, seed
):
    """Every format, number of vectors and of threads, in chunks of any size."""
    ws = [w for w in ws if w.shape[1] == ws[0].shape[1]]
    x_MD = np.random.default_rng(seed).standard_normal((M, ws[0].shape[1])).astype(wide)
    with pytest.MonkeyPatch.context() as patch:
        limits(patch, chunk, prefill, vectors)
        found = product.products(x_MD, ws, pool)
    for y_MO, w in zip(found, ws, strict=True):
        exact = x_MD.astype(np.float64) @ plain(w).T
        # Each product rounds once and n_in - 1 sums round: at most n_in units of the absolute sum.
        bound = np.abs(x_MD.astype(np.float64)) @ np.abs(plain(w)).T
        assert (y_MO.dtype, y_MO.shape) == (wide, exact.shape)
        assert (np.abs(y_MO - exact) <= w.shape[1] * np.finfo(wide).eps * bound).all()


@given(
    st.sampled_from(HALVES),
    SIZES,
    st.integers(1, 5),
    st.integers(1, 30),
    st.integers(1, 900),
    seeds,
)
def test_equal_weights_give_equal_bits_however_they_are_stored(dtype, M, parts, rows, chunk, seed):
    rng = np.random.default_rng(seed)
    w = rng.standard_normal((parts * rows, parts * 7), np.float32).astype(dtype)
    x_MD = rng.standard_normal((M, parts * 7), np.float32)
    wide = w.astype(np.float32)
    same = [Half(w), wide, np.hstack((wide, wide))[:, : parts * 7]]
    for axis in (0, 1):
        same += [
            Half(Joined(np.split(w, parts, axis), axis)),
            Joined(np.split(wide, parts, axis), axis),
        ]
    with pytest.MonkeyPatch.context() as patch:
        limits(patch, chunk)
        for pool in POOLS:
            first, *others = (product.product(x_MD, each, pool) for each in same)
            for other in others:
                assert_same(other, first, f"{pool.threads} threads")


@pytest.mark.parametrize("type_name", ["F32", "F16", "BF16", *BLOCKS])
def test_several_threads_at_once_get_the_bits_of_one(type_name, monkeypatch):
    limits(monkeypatch, 2**12)
    rng, n_in = np.random.default_rng(0), 512
    if type_name in BLOCKS:
        w = random_blocks(rng, type_name, 100, n_in // FORMATS[type_name].weights)
    else:
        w = rng.standard_normal((100, n_in), np.float32).astype(FORMATS[type_name].dtype)
        w = w if type_name == "F32" else Half(w)
    xs = [rng.standard_normal((M, n_in), np.float32) for M in (1, 2, 7, 40)]
    expected = [product.product(x_MD, w, POOLS[1]) for x_MD in xs]
    start = threading.Barrier(len(xs))

    def again(i):
        start.wait()
        return all((product.product(xs[i], w, POOLS[1]) == expected[i]).all() for _ in range(20))

    with ThreadPoolExecutor(len(xs)) as threads:
        assert all(threads.map(again, range(len(xs))))


def test_another_way_to_widen_is_used_for_every_format(monkeypatch):
    limits(monkeypatch, 600)
    rng, seen = np.random.default_rng(0), []

    def widen(w, start, stop, out):
        seen.append((start, stop))
        out[...] = plain(w)[start:stop]

    x_MD = rng.standard_normal((1, 256), np.float32)
    for w in (
        Half(np.ones((9, 256), np.float16)),
        *(random_blocks(rng, t, 9, 1) for t in ["Q6_K"]),
    ):
        seen.clear()
        y_MO = product.product(x_MD, w, POOLS[1], widen)
        np.testing.assert_allclose(y_MO, x_MD @ plain(w).T, rtol=1e-4, atol=1e-3)
        assert sorted(seen)[0][0] == 0
        assert sum(stop - start for start, stop in seen) == 9


def traced(work):
    """The most bytes that Python and NumPy held at a time while `work` ran."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("type_name", ["F16", "BF16", *BLOCKS])
def test_no_format_ever_holds_a_matrix_widened(type_name, monkeypatch):
    limits(monkeypatch, 2**14)
    monkeypatch.setattr(product, "_kept", threading.local())  # a scratch of its own, counted too
    monkeypatch.setattr(ggml, "PIECE", 2**14)
    monkeypatch.setattr(chunks, "CHUNK", 2**14)
    form, n_in, n_out = FORMATS[type_name], 1024, 1024
    bytes_OC = np.zeros((n_out, n_in // form.weights * form.nbytes), np.uint8)
    w = Half(bytes_OC.view(form.dtype)) if form.dtype else Blocks(type_name, bytes_OC)
    for M in (1, 8, 40):
        x_MD = np.zeros((M, n_in), np.float32)
        for work in (lambda x=x_MD: product.product(x, w, POOLS[1]), lambda x=x_MD: x @ w.T):
            assert traced(work) < n_out * n_in  # a quarter of the float32
    assert traced(lambda: w[np.array([[3, 4]])]) < 2**16


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="no glibc")
def test_memory_is_not_asked_for_again_and_again():
    """In a process of its own, because what malloc keeps depends on all that was ever freed."""
    code = """if True:
        import resource
        import numpy as np
        from llama3np.kernels import Blocks
        from llama3np.kernels.product import product
        from llama3np.threads import Pool
        w, x_MD = Blocks("Q5_K", np.zeros((2048, 8 * 176), np.uint8)), np.zeros((1, 2048), "f4")
        for _ in range(3):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            product(x_MD, w, Pool(1))
        print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 1000  # pages; it would be 2300


# ---- several weights of one x -------------------------------------------------------------------


@given(configs(), seeds, st.lists(st.tuples(st.integers(0, 2), st.integers(0, 7)), max_size=20))
def test_linear_is_the_specs_in_whatever_order_it_is_asked(config, seed, asked):
    """What is computed beside the first of a group is never given for another x or weight."""
    params = random(config, np.random.default_rng(seed))
    rng, calls = np.random.default_rng(seed), []
    xs = [rng.standard_normal((1, 2, config.dim)).astype(np.float32) for _ in range(3)]
    layer = params.layers[0]
    weights = (*layer[:4], layer.wk, layer.w_gate, layer.w_up, params.head_VD)
    weights = [w for w in weights if w.ndim == 2 and w.shape[1] == config.dim]

    def multiply(x_MD, ws):
        calls.append(len(ws))
        return [x_MD @ w.T for w in ws]

    linear = Linear(params, multiply)
    for i, j in asked:
        w = weights[j % len(weights)]
        assert_same(linear(xs[i], w), model.linear(xs[i], w), "y")
    x_BTD = xs[0].copy()
    calls.clear()
    for w in (layer.wq, layer.wk, layer.wv, layer.w_gate, layer.w_up):
        linear(x_BTD, w)
    assert calls == [3, 2]


@given(configs(), seeds, st.integers(2, 4))
def test_linear_may_be_called_by_several_threads(config, seed, callers):
    params = random(config, np.random.default_rng(seed))
    linear = Linear(params, lambda x_MD, ws: [x_MD @ w.T for w in ws])
    start = threading.Barrier(callers)

    def call(i):
        x_BTD = np.random.default_rng(i).standard_normal((1, 3, config.dim)).astype(np.float32)
        start.wait()
        for layer in params.layers * 3:
            for w in (layer.wq, layer.wk, layer.wv, layer.w_gate, layer.w_up):
                assert_same(linear(x_BTD, w), model.linear(x_BTD, w), "y")
        return True

    with ThreadPoolExecutor(callers) as pool:
        assert all(pool.map(call, range(callers)))

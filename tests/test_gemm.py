"""Products of many rows by weights of every format, against float64 and against each other."""

import mmap
import sys
import tracemalloc
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import seeds

pytest.importorskip("numba", reason="numba is not installed")
from llama3np.config import Config
from llama3np.kernels import Blocks, Half, Joined
from llama3np.kernels.cpu import gemm, gemv
from llama3np.kernels.cpu.gemm import products, takes
from llama3np.kernels.cpu.panels import PIECE
from llama3np.kernels.engine import make_engine
from llama3np.kernels.ggml import FORMATS, SCALES, decode
from llama3np.numerics import profile
from llama3np.params import random
from llama3np.threads import Pool

POOLS = {threads: Pool(threads) for threads in (1, 2, 3)}
UNIT = 2.0**-24  # what one rounding of float32 is off by, at most, relative to its result
SMALLEST = 2.0**-149

# Around the sizes at which the kernel takes its steps: vectors, panels, rows of a tile, ...
rows_of_x = st.integers(1, 70) | st.sampled_from([511, 512, 513, 545])
rows_of_w = st.integers(1, 40) | st.sampled_from([63, 64, 65, 130, 200])
columns = st.integers(1, 70) | st.sampled_from([255, 256, 257, 511, 513, 1025])
BLOCKS_IN_A_ROW = {1: columns, 32: st.integers(1, 35), 256: st.integers(1, 5)}
special = st.sampled_from([np.inf, -np.inf, np.nan, 0.0, -0.0, 1e-40])
pools = st.sampled_from(list(POOLS.values()))
every_format = pytest.mark.parametrize("name", FORMATS)


def stored_bytes(name, n_out, n_in, seed, place=(0, 0)):
    """Rows of a format as a file may hold them: `gap` bytes apart, from byte `skip` on, 0xFF
    between; weights near 1."""
    form, rng, (skip, gap) = FORMATS[name], np.random.default_rng(seed), place
    row_bytes = n_in // form.weights * form.nbytes
    step = row_bytes + gap
    memory = np.full(skip + n_out * step, 0xFF, np.uint8)
    stored_OC = np.ndarray((n_out, row_bytes), np.uint8, memory, skip, (step, 1))
    if form.dtype is not None:
        stored_OC[...] = rng.standard_normal((n_out, n_in)).astype(form.dtype).view(np.uint8)
        return stored_OC
    blocks = rng.integers(0, 256, (n_out, row_bytes // form.nbytes, form.nbytes), np.uint8)
    for at in SCALES[name]:
        halves = rng.normal(0, 0.01, blocks.shape[:2]).astype(np.float16)
        blocks[:, :, at : at + 2] = halves[..., None].view(np.uint8)
    stored_OC[...] = blocks.reshape(n_out, row_bytes)
    return stored_OC


def weight(name, stored_OC):
    """These bytes as a model's weight."""
    dtype = FORMATS[name].dtype
    if dtype is None:
        return Blocks(name, stored_OC)
    plain = stored_OC.view(dtype)
    return plain if dtype == np.float32 else Half(plain)


@st.composite
def weights(draw, name, n_out, n_in=None):
    """(w, the same as float32): a weight anywhere in memory."""
    n_in = n_in or draw(BLOCKS_IN_A_ROW[FORMATS[name].weights]) * FORMATS[name].weights
    place = draw(st.integers(0, 3)), draw(st.integers(0, 9))
    stored_OC = stored_bytes(name, n_out, n_in, draw(seeds), place)
    stored_OC = stored_OC[::-1] if draw(st.booleans()) else stored_OC
    wide_OK = decode(name, np.ascontiguousarray(stored_OC), (n_out, n_in))
    return weight(name, stored_OC), wide_OK


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


def assert_near_exact(y_MO, x_MK, wide_OK):
    """Higham, Accuracy and Stability, 4.2 and 2.1: of every product, as many roundings on its way
    as its piece has columns and as there are pieces, each off by a part of its result, or by half
    of the smallest number.
    """
    x_MK, wide_OK = x_MK.astype(np.float64), wide_OK.astype(np.float64)
    exact_MO, K = x_MK @ wide_OK.T, x_MK.shape[1]
    steps = min(K, PIECE) + -(-K // PIECE) - 1
    bound_MO = steps * UNIT / (1 - steps * UNIT) * (np.abs(x_MK) @ np.abs(wide_OK).T)
    bound_MO += (K + steps) * SMALLEST / 2
    finite_MO = np.isfinite(exact_MO)
    assert y_MO.dtype == np.float32
    assert (np.abs(y_MO - exact_MO) <= bound_MO)[finite_MO].all()
    np.testing.assert_array_equal(y_MO[~finite_MO], exact_MO[~finite_MO].astype(np.float32))


# ---- the numbers ------------------------------------------------------------------------------


@every_format
@settings(max_examples=12)
@given(rows_of_x, rows_of_w, pools, seeds, st.data())
def test_product_is_near_the_exact_one(name, M, n_out, pool, seed, data):
    w, wide_OK = data.draw(weights(name, n_out))
    x_MK = normal(seed, M, w.shape[1])
    (y_MO,) = products(x_MK, [w], pool)
    assert_near_exact(y_MO, x_MK, wide_OK)


@every_format
@settings(max_examples=12)
@given(rows_of_w, pools, seeds, st.data())
def test_product_of_one_row_is_near_the_exact_one(name, n_out, pool, seed, data):
    """In chunks small enough that there are several; the same bits over any number of threads."""
    w, wide_OK = data.draw(weights(name, n_out))
    both = [w, Joined([wide_OK, wide_OK], 0)]
    x_1K = normal(seed, 1, w.shape[1])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gemv, "CHUNK", 5 * w.shape[1])
        found = gemv.products(x_1K, both, pool)
    for y_1O, alone_1O in zip(found, gemv.products(x_1K, both, POOLS[1]), strict=True):
        assert_near_exact(y_1O, x_1K, np.tile(wide_OK, (y_1O.size // n_out, 1)))
        np.testing.assert_array_equal(y_1O, alone_1O)


@given(rows_of_x, rows_of_w, pools, seeds, st.data())
@np.errstate(all="ignore")
def test_nan_and_infinity_come_out_where_they_should(M, n_out, pool, seed, data):
    _, wide_OK = data.draw(weights("F32", n_out))
    x_MK = normal(seed, M, wide_OK.shape[1])
    for array in (x_MK, wide_OK):
        places = st.tuples(*(st.integers(0, size - 1) for size in array.shape))
        for place in data.draw(st.lists(places, max_size=3)):
            array[place] = data.draw(special)
    (y_MO,) = products(x_MK, [wide_OK], pool)
    assert_near_exact(y_MO, x_MK, wide_OK)


@settings(max_examples=20)
@given(st.integers(1, 600), rows_of_w | st.just(1500), seeds, st.data())
def test_bits_depend_on_nothing_but_the_row(M, n_out, seed, data):
    """Neither on the number of threads, nor on the rows beside it, nor on other weights."""
    w, _ = data.draw(weights("BF16", n_out))
    other, _ = data.draw(weights("F16", 70, w.shape[1]))
    x_MK = normal(seed, M, w.shape[1])
    (y_MO,) = products(x_MK, [w], POOLS[1])
    for pool in POOLS.values():
        assert products(x_MK, [other, w], pool)[1].tobytes() == y_MO.tobytes()
    m = data.draw(st.integers(0, M - 1))
    (alone_1O,) = products(x_MK[m : m + 1], [w], POOLS[1])
    assert alone_1O.tobytes() == y_MO[m].tobytes()


@every_format
def test_bits_depend_on_the_weights_and_not_on_their_format(name):
    w = weight(name, stored_bytes(name, 70, 768, 0))
    wide_OK = decode(name, stored_bytes(name, 70, 768, 0), w.shape)
    x_MK = normal(1, 40, 768)
    found, expected = products(x_MK, [w, wide_OK], POOLS[2])
    np.testing.assert_array_equal(found, expected)


@given(st.integers(1, 4), rows_of_w, st.integers(1, 70), seeds)
def test_parts_below_each_other_are_one_weight(parts, n_out, M, seed):
    whole_OK = normal(seed, parts * n_out, 37).astype(np.float16)
    joined = Half(Joined([part.copy() for part in np.split(whole_OK, parts)], 0))
    found, expected = products(normal(seed + 1, M, 37), [joined, Half(whole_OK)], POOLS[2])
    np.testing.assert_array_equal(found, expected)


def test_x_may_be_a_view_read_only_or_of_another_type():
    x_MK = np.random.default_rng(0).standard_normal((40, 30))
    x_MK.flags.writeable = False
    (y_MO,) = products(x_MK[::2, ::2], [np.eye(9, 15, dtype=np.float32)], POOLS[2])
    np.testing.assert_array_equal(y_MO, x_MK[::2, :18:2].astype(np.float32))


def test_several_threads_may_multiply_at_once():
    w, x = Half(normal(0, 200, 300).astype(np.float16)), [normal(i, 40 * i, 300) for i in (1, 2, 3)]
    expected = [products(x_MK, [w], POOLS[1])[0] for x_MK in x]
    with ThreadPoolExecutor(3) as callers:
        for _ in range(20):
            found = callers.map(lambda x_MK: products(x_MK, [w], POOLS[2])[0], x)
            for one, other in zip(found, expected, strict=True):
                np.testing.assert_array_equal(one, other)


# ---- memory -----------------------------------------------------------------------------------


@pytest.mark.skipif(sys.platform != "linux", reason="the system may not cut a mapped file")
@every_format
def test_nothing_is_read_after_the_last_weight(name, tmp_path):
    page, path, (n_out, n_in) = mmap.PAGESIZE, tmp_path / "weights", (3, 256)
    stored_OC = stored_bytes(name, n_out, n_in, 0)
    path.write_bytes(bytes(2 * page))
    with path.open("r+b") as file:
        mapped = mmap.mmap(file.fileno(), 2 * page)
        file.truncate(page)  # from now on, to touch the second page is to die by a signal
    mapped_OC = np.ndarray(stored_OC.shape, np.uint8, mapped, page - stored_OC.nbytes)
    mapped_OC[...] = stored_OC
    w = weight(name, mapped_OC)
    assert np.isfinite(products(normal(0, 3, n_in), [w], POOLS[1])[0]).all()


def test_no_weight_is_widened_as_a_whole():
    w = Half(np.zeros((4096, 1024), np.float16))
    x_MK = np.zeros((2, 1024), np.float32)
    products(x_MK, [w], POOLS[2])
    tracemalloc.start()
    products(x_MK, [w], POOLS[2])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < w.nbytes / 16


# ---- what is taken ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "w",
    [
        np.zeros((3, 4)),
        np.zeros((4, 3), np.float32).T,
        Half(Joined([np.zeros((3, 2), np.float16)] * 2, 1)),
        np.zeros((3, 5), np.float32),
    ],
    ids=["float64", "columns apart", "parts side by side", "another width"],
)
def test_another_weight_is_refused(w):
    assert not takes(w) or w.shape[1] != 4
    with pytest.raises(ValueError, match="expected a weight of 4 columns, in whole rows, found"):
        products(np.zeros((2, 4), np.float32), [w], POOLS[1])


@pytest.mark.parametrize("is_fast", [True, False])
def test_the_engine_multiplies_by_it_where_it_is_fast(is_fast, monkeypatch):
    monkeypatch.setattr(gemm, "supported", lambda: is_fast)
    config = Config(16, 1, 2, 1, 8, 8, 9)
    params = random(config, np.random.default_rng(0), np.float16)
    engine = make_engine("numba", 2, params, config, profile("float32"))
    called = []
    monkeypatch.setattr(gemm, "products", lambda *a: called.append("gemm") or products(*a))
    one = gemv.products
    monkeypatch.setattr(gemv, "products", lambda *a: called.append("gemv") or one(*a))
    stacked = np.stack([normal(1, 8, 16), normal(2, 8, 16)])
    for w, is_taken in (
        (Half(params.layers[0].wq), True),
        (Half(Joined([*stacked.astype(np.float16)], 0)), True),
        (Half(Joined([*stacked.astype(np.float16)[:, :, :8]], 1)), False),
    ):
        for rows, name, is_ours in ((40, "gemm", is_taken and is_fast), (1, "gemv", is_taken)):
            called.clear()
            x_BTD = normal(0, 1, rows, 16)
            y_BTO = engine.ops.linear(x_BTD, w)
            assert called == [name] * is_ours
            assert_near_exact(y_BTO[0], x_BTD[0], np.asarray(w.stored).astype(np.float32))

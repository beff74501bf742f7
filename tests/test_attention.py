"""Attention by blocks against the plain operation, and its compiled softmax against NumPy's."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from checks import assert_close, assert_same
from hypothesis import given
from hypothesis import strategies as st
from runs import extend, run
from strategies import MAX_TOKENS, padded, ragged_runs, seeds, token_ids

from llama3np import model
from llama3np.cache import new_cache
from llama3np.kernels import attention as blocks
from llama3np.model import PLAIN
from llama3np.threads import Pool, single_threaded_blas

try:
    from llama3np.kernels.cpu.softmax import soften as compiled
except ImportError:
    compiled = None

pytestmark = pytest.mark.filterwarnings("error")

EXACT = 1e-10  # float64, as in test_model.py
POOLS = (Pool(1), Pool(3))
SOFTENS = [blocks.soften] + [compiled] * (compiled is not None)
needs_numba = pytest.mark.skipif(compiled is None, reason="numba is not installed")


def nothing(name, array):
    return array


@pytest.fixture(autouse=True, scope="module")
def blas():
    with single_threaded_blas():
        yield


@st.composite
def inputs(draw, dtype="float32", stored=None):
    """q_BTNH, k_BKSH, v_BKSH, positions_BT; the keys are views into longer caches."""
    B, K, G, H = (draw(st.integers(1, n)) for n in (2, 3, 4, 5))
    T, S = draw(st.integers(1, 12)), draw(st.integers(1, 12))
    rng = np.random.default_rng(draw(seeds))
    q_BTNH = (draw(st.sampled_from([1, 30])) * rng.standard_normal((B, T, K * G, H))).astype(dtype)
    k_BKSH, v_BKSH = (
        rng.standard_normal((B, K, S + 3, H)).astype(stored or dtype)[:, :, :S] for _ in "kv"
    )
    # any positions, and those of tokens after others, with padding beyond the last slot
    follow = rng.integers(0, S, (B, 1)) + np.arange(T)
    positions_BT = follow if draw(st.booleans()) else rng.integers(0, S, (B, T))
    return q_BTNH, k_BKSH, v_BKSH, positions_BT


@st.composite
def cut(draw):
    """Sizes of blocks, small enough that there are many of them."""
    return draw(st.integers(1, 9)), draw(st.integers(1, 40))


def by_blocks(arrays, sizes, soften=blocks.soften, pool=POOLS[0]):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocks, "ROWS", sizes[0])
        patch.setattr(blocks, "SCRATCH", max(sizes[1], sizes[0] * 4, arrays[0].shape[-1]))
        patch.setattr(blocks, "FEW", 0)
        return blocks.attention(*arrays, nothing, pool=pool, soften=soften)


def wide(arrays):
    return [array.astype(np.float64) for array in arrays[:3]] + list(arrays[3:])


def assert_within_rounding(found_BTNH, arrays):
    """The difference from the exact result is at most what the roundings come to.

    A score is a sum of H products, scaled, less a maximum: H + 3 roundings of at most the sum of
    the magnitudes. So much its weight is off, relatively, as is the sum that it is divided by. On
    top are the exponentials (2 ulp each), the sums over S weights and S products, and a factor
    with its own rounding and exponential for each of at most S blocks.
    """
    q_BTNH, k_BKSH, v_BKSH, _ = wide(arrays)
    expected_BTNH = model.attention(*wide(arrays), nothing)
    H, S = q_BTNH.shape[-1], k_BKSH.shape[2]
    eps = np.finfo(np.float32).eps
    largest = np.abs(q_BTNH).sum(axis=-1).max() * np.abs(k_BKSH).max() / np.sqrt(H)
    relative = 2 * (H + 3) * eps * largest + (2 * S + 2 * 5 * S + 12) * eps
    error = np.abs(found_BTNH - expected_BTNH).max()
    assert error <= relative * np.abs(v_BKSH).max(), f"{error} above {relative}"


# ---- the operation ------------------------------------------------------------------------------


@given(inputs("float64"), cut(), st.sampled_from(POOLS))
def test_attention_by_blocks_is_the_plain_operation(arrays, sizes, pool):
    expected = model.attention(*arrays, nothing)
    assert_close(by_blocks(arrays, sizes, pool=pool), expected, EXACT, "attn")


@given(inputs("float32"), cut(), st.sampled_from(POOLS), st.sampled_from(SOFTENS))
def test_attention_in_float32_is_off_by_its_roundings_at_most(arrays, sizes, pool, soften):
    found = by_blocks(arrays, sizes, soften, pool)
    assert found.dtype == np.float32
    assert_within_rounding(found, arrays)


@given(
    st.sampled_from([np.float16, ml_dtypes.bfloat16]).flatmap(lambda d: inputs(stored=d)),
    cut(),
    st.sampled_from(POOLS),
)
def test_keys_and_values_of_16_bits_are_widened_exactly(arrays, sizes, pool):
    """As if they had been float32 before."""
    q_BTNH, k_BKSH, v_BKSH, positions_BT = arrays
    widened = q_BTNH, k_BKSH.astype("float32"), v_BKSH.astype("float32"), positions_BT
    assert_same(by_blocks(arrays, sizes, pool=pool), by_blocks(widened, sizes), "attn")
    assert_same(model.attention(*arrays, nothing), model.attention(*widened, nothing), "plain")


@given(inputs(), cut(), st.sampled_from(SOFTENS), st.sampled_from([1e30, -1e30]))
def test_attention_does_not_see_beyond_a_position(arrays, sizes, soften, garbage):
    q_BTNH, k_BKSH, v_BKSH, positions_BT = arrays
    middle = k_BKSH.shape[2] // 2
    arrays = q_BTNH, k_BKSH, v_BKSH, np.minimum(positions_BT, middle)
    expected = by_blocks(arrays, sizes, soften)
    k_BKSH[:, :, middle + 1 :] = v_BKSH[:, :, middle + 1 :] = garbage
    assert_same(by_blocks(arrays, sizes, soften), expected, "attn")


@given(inputs(), cut(), st.sampled_from(SOFTENS))
def test_scores_that_overflow_an_exponential_are_survived(arrays, sizes, soften):
    q_BTNH, k_BKSH, v_BKSH, positions_BT = arrays
    found = by_blocks((q_BTNH * np.float32(1e4), k_BKSH, v_BKSH, positions_BT), sizes, soften)
    assert np.abs(found).max() <= np.abs(v_BKSH).max() * (1 + 1e-5)


@pytest.mark.parametrize("soften", SOFTENS)
@given(inputs(), cut(), st.sampled_from([np.nan, np.inf, -np.inf]), st.data())
def test_damaged_numbers_come_out_where_the_plain_operation_has_them(
    soften, arrays, sizes, wrong, data
):
    q_BTNH, k_BKSH, v_BKSH, positions_BT = arrays
    positions_BT = np.full_like(positions_BT, k_BKSH.shape[2] - 1)
    damaged = data.draw(st.sampled_from([q_BTNH, k_BKSH]), label="damaged")
    damaged[tuple(data.draw(st.integers(0, n - 1)) for n in damaged.shape)] = wrong
    arrays = q_BTNH, k_BKSH, v_BKSH, positions_BT
    with np.errstate(all="ignore"):  # no warning comes out of a worker's thread either
        expected = model.attention(*arrays, nothing)
        found = by_blocks(arrays, sizes, soften, POOLS[1])
    assert np.array_equal(np.isnan(found), np.isnan(expected))


def test_few_scores_are_left_to_the_plain_operation(monkeypatch):
    """And they alone are shown."""
    rng, seen = np.random.default_rng(0), []
    arrays = *(rng.standard_normal((1, 3, 3, 2)) for _ in "qkv"), np.arange(3)[None]
    for few, names in ((26, []), (27, ["scores", "probs"])):
        monkeypatch.setattr(blocks, "FEW", few)
        blocks.attention(*arrays, lambda name, array: seen.append(name), pool=POOLS[0])
        assert seen == names


@pytest.mark.parametrize("stored", [np.float32, ml_dtypes.bfloat16])
def test_memory_is_bounded_whatever_the_length(monkeypatch, stored):
    """Beside the result: what each worker holds, and a few numbers for each token."""
    T, N, K, H, pool = 1500, 4, 2, 32, POOLS[1]
    monkeypatch.setattr(blocks, "ROWS", 128)
    monkeypatch.setattr(blocks, "SCRATCH", 128 * 128)
    rng = np.random.default_rng(0)
    q_BTNH = rng.standard_normal((1, T, N, H), dtype="float32")
    k_BKSH, v_BKSH = (rng.standard_normal((1, K, T, H)).astype(stored) for _ in "kv")
    positions_BT = np.arange(T)[None]
    blocks.attention(q_BTNH, k_BKSH, v_BKSH, positions_BT, nothing, pool=pool)
    tracemalloc.start()
    found = blocks.attention(q_BTNH, k_BKSH, v_BKSH, positions_BT, nothing, pool=pool)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    mask, buffers = blocks.SCRATCH, 3 * 8 * np.getbufsize()  # bytes; the latter NumPy's own
    worker = 4 * (3 * blocks.SCRATCH + 4 * blocks.ROWS * H) + mask + buffers
    bound = found.nbytes + pool.threads * worker + 64 * T
    assert peak <= bound < N * T * T * 4 / 8, f"{peak} bytes, expected at most {bound}"


def test_tasks_cover_every_query_once_and_end_with_the_small_ones():
    counts_BT = np.array([np.arange(1, 8), np.arange(11, 18)])
    tasks = blocks._tasks(counts_BT, 2, 3)
    covered = [(b, k, t) for b, k, block in tasks for t in range(7)[block]]
    assert sorted(covered) == [(b, k, t) for b in range(2) for k in range(2) for t in range(7)]
    assert (tasks[0].b, tasks[-1]) == (1, (0, 1, slice(0, 3)))


# ---- in the model -------------------------------------------------------------------------------


@given(ragged_runs(), cut(), st.data())
def test_a_model_with_attention_by_blocks_is_the_plain_model(run_of, sizes, data):
    """Ragged rows, rows that get no token, and a second call on what the cache holds."""
    model_of, rows, pad = run_of
    V = model_of.config.vocab_size
    more = [data.draw(token_ids(V, 0, 4), label="more") for _ in rows]
    more[0] = more[0] or [0]
    ops = PLAIN._replace(attention=lambda *arrays: by_blocks(arrays[:4], sizes, pool=POOLS[1]))
    cache = new_cache(model_of.config, len(rows), 2 * MAX_TOKENS, "float64")
    found = []
    for new in (rows, more):
        ids_BT, new_B = padded(new, pad)
        found.append(extend(model_of, ids_BT, cache, new_B=new_B, ops=ops))
    for b, (row, rest) in enumerate(zip(rows, more, strict=True)):
        logits = np.concatenate([found[0][b, : len(row)], found[1][b, : len(rest)]])
        assert_close(logits, run(model_of, [row + rest])[0], EXACT, f"row {b}: logits")


# ---- the compiled softmax -----------------------------------------------------------------------


@st.composite
def softenings(draw):
    """The arguments of soften: a block of scores, and what was found in the blocks before."""
    R, C, H = draw(st.integers(1, 5)), draw(st.integers(1, 70)), draw(st.integers(1, 20))
    rng = np.random.default_rng(draw(seeds))
    scores_RC = 10 * rng.standard_normal((R, C), dtype="float32")
    spoil = draw(st.sampled_from([None, np.nan, np.inf, -np.inf]))
    if spoil is not None:
        scores_RC[rng.random((R, C)) < draw(st.sampled_from([0.05, 1.0]))] = spoil
    peaks_R = (10 * rng.standard_normal(R)).astype("float32")
    peaks_R[rng.random(R) < 0.5] = np.finfo("float32").min
    totals_R, sums_RH = rng.random(R, dtype="float32"), rng.random((R, H), dtype="float32")
    return scores_RC, rng.integers(-3, C + 3, R), peaks_R, totals_R, sums_RH


@needs_numba
@given(softenings())
def test_the_compiled_softmax_is_numpys(arguments):
    """To 2 ulp of each exponential, and the order of a sum of C of them.

    A row that a nan or inf has spoiled is nan in its total, which is all that counts.
    """
    found, expected = ([array.copy() for array in arguments] for _ in range(2))
    with np.errstate(all="ignore"):
        compiled(*found)
        blocks.soften(*expected)
    tol = (4 + arguments[0].shape[1]) * np.finfo("float32").eps
    spoiled_R = np.isnan(expected[3])
    assert np.array_equal(np.isnan(found[3]), spoiled_R)
    names = ("weights", "counts", "peaks", "totals", "sums")
    for name, a, b in zip(names, found, expected, strict=True):
        np.testing.assert_allclose(a[~spoiled_R], b[~spoiled_R], tol, 1e-44, err_msg=name)

"""Every CUDA kernel against its plain expression in float64, over shapes where kernels break."""

import devices
import ml_dtypes
import numpy as np
import pytest
from checks import assert_same
from cuda_kernels import random_weight, strict, widths
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import pairings, seeds

from llama3np import model as spec
from llama3np import sample
from llama3np.kernels import Joined, ggml
from llama3np.kernels.half import Half
from llama3np.sample import Candidates, Sampling, all_ids, powers

cp = pytest.importorskip("cupy")

from llama3np.kernels.cuda import registry  # noqa: E402
from llama3np.kernels.cuda.checks import attention, edges, measures, products, rows, tokens  # noqa: E402
from llama3np.kernels.cuda.checks.attention import run_attend, run_combine  # noqa: E402
from llama3np.kernels.cuda.checks.measures import ULP, numbers, on_device  # noqa: E402
from llama3np.kernels.cuda.checks.tokens import candidates_of  # noqa: E402
from llama3np.kernels.cuda.launch import launch  # noqa: E402
from llama3np.kernels.cuda.registry import BATCHES, BINS, CACHED, FORMATS, STRETCH  # noqa: E402
from llama3np.kernels.cuda.step import pitch_of  # noqa: E402
from llama3np.kernels.cuda.weights import (  # noqa: E402
    DeviceBlocks,
    aligned,
    format_of,
    repack,
    rows_of,
    stored,
    taken,
    unpack,
    upload,
)  # fmt: skip

pytestmark = [pytest.mark.cuda, pytest.mark.gpu]

QUANTISED = FORMATS[3:]
# To compile a product takes seconds: two formats are tried with every batch, others with one.
WITH_BATCH = [
    (format, batch)
    for i, format in enumerate(FORMATS)
    for j, batch in enumerate(BATCHES)
    if format in ("BF16", "Q4_K") or i % 4 == j
]
each_format = pytest.mark.parametrize("format", FORMATS)
each_product = pytest.mark.parametrize("kind", WITH_BATCH, ids=lambda kind: f"{kind[0]}-{kind[1]}")
HEADS = [(2, 1), (10, 3), (64, 3), (128, 4), (24, 12)]  # (head size, group)
counts = st.integers(1, 70)


def shapes(draw, format):
    """(N, K) with rows beyond a block's and columns beyond a tile's, or less than one of either."""
    step = draw(st.sampled_from([1, 8])) if widths(format) == 1 else widths(format)
    most = {1: 1300, 8: 300, 32: 80, 256: 9}[step]
    return draw(st.integers(1, 70)), step * draw(st.integers(1, most))


# ---- launching -----------------------------------------------------------------------------------


def widen_arguments(**changed):
    w, out = cp.zeros((3, 4), np.float32), cp.empty((2, 4), np.float32)
    return {"w": w, "N": 3, "K": 4, "start": 0, "out": out, "pitch": 4} | changed


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("N", 3.0), ("N", True), ("N", 2**31), ("N", None), ("N", np.float32(3)),
        ("out", np.zeros(8, np.float32)), ("out", [0.0]), ("w", "array16"), ("w", "gaps"),
    ],
)  # fmt: skip
def test_a_wrong_argument_is_a_type_error_that_names_it(name, value):
    made = {"array16": cp.zeros((3, 4), np.float16), "gaps": cp.zeros((3, 8), np.float32)[:, ::2]}
    value = made[value] if isinstance(value, str) else value
    with pytest.raises(TypeError, match=rf"^widen: {name}: expected"):
        launch(registry.row_kernel("widen", "F32"), (1,), 32, **widen_arguments(**{name: value}))


def test_missing_and_unknown_parameters_are_named():
    kernel = registry.row_kernel("widen", "F32")
    arguments = widen_arguments()
    del arguments["start"]
    with pytest.raises(TypeError, match=r"^widen: start: expected parameters w, N, K, start"):
        launch(kernel, (1,), 32, **arguments)
    with pytest.raises(TypeError, match=r"^widen: stop: "):
        launch(kernel, (1,), 32, **widen_arguments(stop=1))


def test_a_python_float_reaches_a_float_parameter():
    """CuPy alone would pass it as a double, of which the kernel reads the wrong half."""
    types = {p.name: (p.dtype, p.array) for p in _project("F32", 1).parameters}
    assert types["eps"] == (np.float32, False)
    assert types["N0"] == (np.int32, False)
    assert types["w0"] == types["x"] == (np.float32, True)
    assert {p.dtype for p in _project("BF16", 1).parameters if p.name == "w0"} == {
        np.dtype(ml_dtypes.bfloat16)
    }


def test_every_parameter_of_every_kernel_is_read_from_its_prototype():
    for kernel in registry.every_kernel():
        text = kernel.source.partition(f" {kernel.entry}(")[2].partition(")")[0]
        assert len(kernel.parameters) == text.count(",") + 1, kernel.name


# ---- how weights lie -----------------------------------------------------------------------------


@given(st.sampled_from(QUANTISED), st.integers(1, 5), st.integers(1, 4), seeds)
def test_blocks_laid_out_for_the_device_come_back(format, n_rows, blocks, seed):
    form = ggml.FORMATS[format]
    rng = np.random.default_rng(seed)
    stored_NC = rng.integers(0, 256, (n_rows, blocks * form.nbytes), np.uint8)
    packed = repack(format, stored_NC)
    assert packed.nbytes == stored_NC.nbytes
    assert_same(unpack(format, packed, n_rows), stored_NC, format)


@each_format
@given(data=st.data(), seed=seeds)
def test_rows_on_the_device_have_the_bits_of_ggml(format, data, seed):
    rng = np.random.default_rng(seed)
    K = widths(format) * data.draw(st.integers(1, 3))
    w, w_NK = random_weight(format, data.draw(st.integers(1, 9)), K, rng)
    start = data.draw(st.integers(0, len(w_NK)))
    stop = data.draw(st.integers(start, len(w_NK)))
    ids = rng.integers(0, len(w_NK), (2, 3))
    with strict():
        on_device = upload(w)
        assert format_of(on_device) == format
        assert on_device.nbytes == (
            w.nbytes if format in QUANTISED else w_NK.astype(w.dtype).nbytes
        )
        assert_same(rows_of(on_device, start, stop).get(), w_NK[start:stop], "rows")
        assert_same(taken(on_device, cp.asarray(ids[0])).get(), w_NK[ids[0]], "taken")
        if isinstance(on_device, DeviceBlocks):
            assert_same(on_device[cp.asarray(ids)].get(), w_NK[ids], "w[ids]")
            assert_same(on_device[start:].get(), w_NK[start:], "w[start:]")


@pytest.mark.parametrize("format", ["F16", "BF16"])
def test_every_16_bit_number_is_widened_exactly(format):
    rows.every_number(registry.row_kernel("widen", format), np.random.default_rng(0))


def test_what_a_loader_hands_over_is_uploaded_as_it_is():
    w_NK = np.arange(24, dtype=np.float16).reshape(4, 6)
    for w in (w_NK, Half(w_NK), Joined([w_NK[:2], w_NK[2:]], 0), w_NK.T.copy().T):
        assert_same(upload(w).get(), w_NK, "upload")


# ---- products ------------------------------------------------------------------------------------


def _project(format, batch, rows_aligned=True):
    return registry.weight_kernel("project", format, rows_aligned, batch)


def product_kernel(entry, format, K, M):
    whole = format not in registry.PLAIN or K * registry.PLAIN[format].itemsize % 16 == 0
    return registry.weight_kernel(entry, format, whole, M)


@each_product
@given(data=st.data(), seed=seeds, eps=st.sampled_from([1e-6, 0.5]))
def test_project_is_a_product_with_the_normed_vectors(kind, data, seed, eps):
    """For one to three weights in one launch, of any number of rows."""
    (format, M), rng = kind, np.random.default_rng(seed)
    N, K = shapes(data.draw, format)
    sizes = [N, *data.draw(st.lists(counts, max_size=2))]
    rows, parts = data.draw(st.integers(1, M)), data.draw(st.integers(1, 40))
    with strict():
        kernel = product_kernel("project", format, K, M)
        products.project(kernel, sizes, K, rows, rng, eps, parts)


@pytest.mark.parametrize("format", registry.PLAIN)
def test_project_reads_rows_that_end_anywhere(format):
    """With 3, 1 and 2 numbers after the last four: sizes that are drawn seldom have them all."""
    with strict():
        edges.check(_project(format, 1, rows_aligned=False))


@each_product
@given(data=st.data(), seed=seeds)
def test_gate_up_is_swiglu_of_both_products(kind, data, seed):
    (format, M), rng = kind, np.random.default_rng(seed)
    N, K = shapes(data.draw, format)
    with strict():
        kernel = product_kernel("gate_up", format, K, M)
        products.gate_up(kernel, N, K, data.draw(st.integers(1, M)), rng)


@each_product
@given(data=st.data(), seed=seeds)
def test_add_adds_a_product_and_leaves_sums_of_squares(kind, data, seed):
    (format, M), rng = kind, np.random.default_rng(seed)
    N, K = shapes(data.draw, format)
    with strict():
        kernel = product_kernel("add", format, K, M)
        products.add(kernel, N, K, data.draw(st.integers(1, M)), rng)


@given(st.sampled_from(["F32", "BF16"]), st.data(), seeds)
def test_rounded_products_are_those_of_bf16_vectors(format, data, seed):
    """Rounded once, to nearest, after the norm; and as they are without one."""
    N, K = shapes(data.draw, format)
    with strict():
        kernel = product_kernel("add", format, K, 1)
        products.add(kernel, N, K, 1, np.random.default_rng(seed), rounded=1)


@given(st.sampled_from(["F32", "BF16", "Q8_0", "Q4_K"]), st.data(), seeds)
def test_a_vector_has_the_same_bits_alone_and_in_a_batch(format, data, seed):
    rng = np.random.default_rng(seed)
    N, K = shapes(data.draw, format)
    x_MK = rng.standard_normal((4, K)).astype(np.float32)
    w, _ = random_weight(format, N, K, rng)
    w = upload(w)
    results = {}
    for M in (1, 4):
        kernel = registry.weight_kernel("add", format, aligned(w), M)
        blocks = -(-N // registry.block_rows(kernel))
        x, y = on_device(x_MK[:M], M), cp.ones((M, pitch_of(N)), np.float32)
        squares = cp.zeros((M, blocks * registry.square_parts(kernel)), np.float32)
        launch(
            kernel, (blocks,), 256, w=stored(w), N=N, K=K, x=x, x_pitch=x.shape[1], rounded=0, y=y,
            y_pitch=y.shape[1], squares=squares,
        )  # fmt: skip
        results[M] = y.get()[0], squares.get()[0, : -(-N // 16)]
    for alone, together in zip(results[1], results[4], strict=True):
        assert_same(together, alone, format)


@given(st.integers(1, 600), st.integers(1, 3), seeds)
def test_swiglu_of_two_buffers(N, M, seed):
    with strict():
        products.swiglu(registry.SWIGLU, N, M, np.random.default_rng(seed))


# ---- embedding -----------------------------------------------------------------------------------


@each_format
@given(data=st.data(), seed=seeds)
def test_embed_looks_rows_up_and_sums_their_squares(format, data, seed):
    N, K = shapes(data.draw, format)
    with strict():
        kernel = registry.row_kernel("embed", format)
        rows.embed(kernel, N, K, np.random.default_rng(seed))


# ---- attention -----------------------------------------------------------------------------------


@st.composite
def caches(draw):
    """(head size, group, K, slots, positions of the rows, dtype), at the edges of stretches too."""
    head, group = draw(st.sampled_from(HEADS))
    edges = st.sampled_from([-1, 0, 1, STRETCH - 1, STRETCH, 2 * STRETCH, 2 * STRETCH + 5])
    positions = draw(st.lists(edges | st.integers(-1, 600), min_size=1, max_size=3))
    slots = max(*positions, 0) + draw(st.integers(1, 300))
    return head, group, draw(st.integers(1, 2)), slots, positions, draw(st.sampled_from(CACHED))


@given(caches(), pairings, seeds)
def test_turn_is_rope_and_a_write_to_the_cache(cache, pairing, seed):
    H, G, K, slots, positions, dtype = cache
    with strict():
        kernel = registry.attention_kernel("turn", H, G, dtype, pairing)
        attention.turn(kernel, K, slots, positions, np.random.default_rng(seed))


@pytest.mark.parametrize("dtype", CACHED[1:])
def test_numbers_are_rounded_to_the_cache_as_numpy_does(dtype):
    kernel = registry.attention_kernel("turn", 64, 1, dtype, "half")
    attention.rounding(kernel, 1, np.random.default_rng(0))


@given(caches(), st.sampled_from([1, 30]), seeds)
def test_attend_leaves_peaks_sums_and_means_of_every_stretch(cache, size, seed):
    H, G, K, slots, positions, dtype = cache
    with strict():
        kernel = registry.attention_kernel("attend", H, G, dtype, "half")
        attention.attend(kernel, K, slots, positions, np.random.default_rng(seed), size)


@given(caches(), seeds)
def test_combine_puts_stretches_together(cache, seed):
    H, G, K, slots, positions, dtype = cache
    with strict():
        kernel = registry.attention_kernel("combine", H, G, dtype, "half")
        attention.combine(kernel, K, slots, positions, np.random.default_rng(seed))


def decode_attention(q_MNH, keys, values, positions, G, **options):
    """attend and combine, on strict memory: (M, N, H)."""
    kind = q_MNH.shape[-1], G, keys.dtype, "half"
    attend, combine = (registry.attention_kernel(name, *kind) for name in ("attend", "combine"))
    with strict(**options):
        parts = run_attend(attend, q_MNH, keys, values, positions)
        return run_combine(combine, parts, positions)


def exact_attention(q_MNH, keys, values, positions):
    """(values, and the largest |value| that each mean is made of), in float64, row by row."""
    M, N, H = q_MNH.shape
    found, largest = np.zeros((2, M, N, H))
    for m, position in enumerate(positions):
        if position < 0:
            continue
        k, v = (a[m : m + 1, :, : position + 1].astype(np.float64) for a in (keys, values))
        at = np.array([[position]])
        q = q_MNH[m : m + 1, None].astype(np.float64)
        found[m] = spec.attention(q, k, v, at, lambda name, array: None)[0, 0]
        largest[m] = np.abs(v).max()
    return found, largest


def attention_bound(q_MNH, keys, positions, largest):
    """An error of scores moves a power, and a mean by two of it."""
    most = max(1, max(positions) + 1)
    error = attention.score_error(q_MNH, keys, positions)
    return (2 * error + (most / 8 + 40) * ULP) * largest + 1e-30


@given(caches(), seeds)
def test_decode_attention_is_that_of_the_spec(cache, seed):
    """For every grouping; what lies beyond a row's position is not even a number here."""
    H, G, K, slots, positions, dtype = cache
    rng, M = np.random.default_rng(seed), len(positions)
    q_MNH = numbers(rng, (M, G * K, H), np.float32)
    keys, values = (numbers(rng, (M, K, slots, H), dtype) for _ in range(2))
    for m, position in enumerate(positions):
        keys[m, :, position + 1 :] = values[m, :, position + 1 :] = np.nan
    found = decode_attention(q_MNH, keys, values, positions, G)
    expected, largest = exact_attention(q_MNH, keys, values, positions)
    bound = attention_bound(q_MNH, keys, positions, largest)
    measures.within(found, expected, bound, "attention")
    idle = np.array(positions) < 0
    assert (found[idle] == 0).all()


@given(caches(), seeds)
def test_large_scores_do_not_overflow(cache, seed):
    """Scores of hundreds, the largest in whichever stretch."""
    H, G, K, slots, positions, dtype = cache
    rng, M = np.random.default_rng(seed), len(positions)
    q_MNH = numbers(rng, (M, G * K, H), np.float32) * 30
    keys, values = (numbers(rng, (M, K, slots, H), dtype) for _ in range(2))
    found = decode_attention(q_MNH, keys, values, positions, G)
    expected, largest = exact_attention(q_MNH, keys, values, positions)
    measures.within(found, expected, attention_bound(q_MNH, keys, positions, largest), "attention")


@given(st.sampled_from(HEADS), st.sampled_from(CACHED), st.data(), seeds)
def test_prefill_attention_is_that_of_the_spec(heads, dtype, data, seed):
    """For ragged rows at different positions, of a cache that has room for more."""
    (H, G), B = heads, data.draw(st.integers(1, 3))
    lengths = data.draw(st.lists(st.integers(0, 50), min_size=B, max_size=B))
    new_B = data.draw(st.lists(st.integers(1, 40), min_size=B, max_size=B))
    K, room = data.draw(st.integers(1, 2)), data.draw(st.integers(0, 9))
    with strict():
        kernel = registry.prefill_kernel(H, dtype)
        attention.attend_block(kernel, G, K, lengths, new_B, room, np.random.default_rng(seed))


# ---- choosing ------------------------------------------------------------------------------------


def choose(logits_MV, parts, **options):
    """pick and settle: (id, sum of powers) of each row, and what they leave for the next step."""
    M, V = logits_MV.shape
    with strict(**options):
        best = {
            "peaks": cp.zeros((M, parts), np.float32),
            "ids": cp.zeros((M, parts), np.int32),
            "sums": cp.zeros((M, parts), np.float64),
        }
        left = {
            "tokens": cp.full(M, 5, np.int32),
            "positions": cp.asarray(np.arange(M, dtype=np.int32) - 1),  # row 0 is idle
            "records": cp.zeros((2, M, 2), np.float64),
            "count": cp.ones(1, np.int32),
        }
        launch(
            registry.token_kernel("pick"),
            (parts, M),
            256,
            logits=cp.asarray(logits_MV),
            V=V,
            **best,
        )
        settle = registry.token_kernel("settle")
        launch(settle, (1,), 32 * M, **best, **left, parts=parts, V=V, room=2)
        return {name: array.get() for name, array in left.items()}


@given(st.integers(1, 3000), st.integers(1, 8), st.integers(1, 40), st.data(), seeds)
def test_the_largest_logit_is_chosen_the_lowest_id_first(V, M, parts, data, seed):
    """Wherever it is: the last one, ties within a thread, a warp, a block and between blocks."""
    logits_MV = np.random.default_rng(seed).integers(-9, 9, (M, V)).astype(np.float32)
    for row_V in logits_MV:
        ids = data.draw(st.lists(st.sampled_from([0, V - 1, V // 2, (V - 1) // 3]), max_size=2))
        row_V[ids] = 9
    found = choose(logits_MV, parts)
    expected = logits_MV.argmax(axis=1)
    wide = logits_MV.astype(np.float64)
    assert found["records"][1, :, 0].tolist() == expected.tolist()
    sums = np.exp(wide - wide.max(axis=1, keepdims=True)).sum(axis=1)
    measures.within(found["records"][1, :, 1], sums, 40 * ULP * sums, "sum of powers")
    assert found["tokens"].tolist() == [5, *expected[1:].tolist()]
    assert found["positions"].tolist() == [-1, *range(1, M)]
    assert (found["records"][0] == 0).all()
    assert found["count"].tolist() == [2]


def test_logits_that_are_not_numbers_leave_a_token_that_is_one():
    logits_MV = np.full((2, 70), np.nan, np.float32)
    found = choose(logits_MV, 32)
    assert found["tokens"].tolist() == [5, 69]
    assert np.isnan(found["records"][1, :, 1]).all()


@given(st.integers(1, 8), seeds)
def test_orders_of_the_host_are_obeyed(M, seed):
    with strict():
        tokens.obey(registry.token_kernel("obey"), M, np.random.default_rng(seed))


@given(st.integers(2, 3000), st.integers(1, 8), st.integers(1, 40), seeds)
def test_pick_and_settle_alone(V, M, parts, seed):
    with strict():
        rng = np.random.default_rng(seed)
        tokens.pick(registry.token_kernel("pick"), V, M, parts, rng)
        tokens.settle(registry.token_kernel("settle"), M, parts, rng)


# ---- drawing -------------------------------------------------------------------------------------


def sieved(logits_MV, parts, wishes_M4, room, **options):
    """pick, weigh and sift: (facts_M5, ids_MC, logits_MC), unused places as they were: -1 and 7."""
    M, V = logits_MV.shape
    with strict(**options):
        rows = {"logits": cp.asarray(logits_MV), "V": V, "peaks": cp.zeros((M, parts), np.float32)}
        sums = cp.zeros((M, parts), np.float64)
        pick, weigh, sift = map(registry.token_kernel, ("pick", "weigh", "sift"))
        launch(pick, (parts, M), 256, **rows, ids=cp.zeros((M, parts), np.int32), sums=sums)
        rows["wishes"] = cp.asarray(np.array(wishes_M4, np.float64))
        rows["powers"] = cp.zeros((M, parts), np.float64)
        rows["counts"] = cp.full((M, parts, BINS), 7, np.int32)
        launch(weigh, (parts, M), 256, **rows)
        found = (
            cp.zeros((M, 5), np.float64), cp.full((M, room), -1, np.int32),
            cp.full((M, room), 7, np.float32),
        )  # fmt: skip
        into = dict(zip(("facts", "ids", "kept"), found, strict=True))
        launch(sift, (M,), BINS, **rows, **into, sums=sums, parts=parts, room=room)
        return [array.get() for array in found]


@st.composite
def drawings(draw):
    """(logits_MV with ties, flat or peaked, a wish of each row)."""
    rng, M = np.random.default_rng(draw(seeds)), draw(st.integers(1, 3))
    V = draw(st.one_of(st.integers(1, 90), st.integers(1, 5000)))
    spread = draw(st.sampled_from([0.0, 0.1, 3.0, 30.0]))
    logits_MV = rng.normal(0, spread, (M, V)).astype(np.float32)
    if draw(st.booleans()):
        logits_MV = np.round(logits_MV)
    wishes = []
    for _ in range(M):
        k = draw(st.one_of(st.just(0), st.integers(1, 60), st.integers(1, V + 1)))
        p = draw(st.one_of(st.just(1.0), st.floats(0.01, 0.999)))
        wishes.append((10 ** draw(st.floats(-3, 1)), k, p, rng.random()))
    return logits_MV, wishes


@given(drawings(), st.integers(1, 40))
def test_the_device_leaves_the_candidates_of_a_draw(drawing, parts):
    """Those, ascending, and their logits; and a draw among them is a draw among all."""
    logits_MV, wishes = drawing
    room = logits_MV.shape[1] + 2
    facts_M5, ids_MC, kept_MC = sieved(logits_MV, parts, wishes, room)
    for m, (temperature, k, p, number) in enumerate(wishes):
        logits_V, (count, peak, total, sum_of_all, before) = logits_MV[m], facts_M5[m]
        expected = candidates_of(logits_V, wishes[m], parts)
        assume(expected is not None)
        assert ids_MC[m].tolist() == [*expected, *[-1] * (room - len(expected))]
        unused = [7.0] * (room - len(expected))
        assert_same(kept_MC[m], np.array([*logits_V[expected], *unused], np.float32), "logits")
        every, once = all_ids(logits_V, temperature), all_ids(logits_V, 1.0)
        assert (count, peak) == (len(expected), logits_V.max())
        assert total == pytest.approx(every.total, rel=1e-12)
        assert sum_of_all == pytest.approx(once.total, rel=40 * ULP)
        skipped = 0 if k or p < 1 else every.powers_C[: expected[0]].sum()
        assert before == pytest.approx(skipped, rel=1e-12)
        sampling = Sampling(temperature, k, p)
        powers_C = powers(kept_MC[m, : int(count)], peak, temperature)
        place = sample.draw(Candidates(powers_C, total, before), sampling, number)
        assert expected[place] == sample.draw(every, sampling, number)


@pytest.mark.parametrize("wish", [(1.0, 40, 1.0, 0.5), (1.0, 0, 0.9, 0.5), (1.0, 0, 1.0, 0.5)])
def test_candidates_for_which_there_is_no_room_are_counted(wish):
    logits_MV = np.zeros((1, 3000), np.float32)
    facts_M5, ids_MC, _ = sieved(logits_MV, 2, [wish], 1499)
    assert facts_M5[0, 0] == (1500 if wish[1:3] == (0, 1.0) else 3000)
    assert (ids_MC == -1).all()


RISING, TIED, EVEN = np.arange(20), np.array([-3] * 19 + [0]), np.zeros(20)


@pytest.mark.parametrize(
    ("row", "wish", "expected"),
    [
        (RISING, (1.0, 1, 1.0, 0.0), range(19, 20)),
        (RISING, (1.0, 5, 1.0, 0.0), range(15, 20)),
        (RISING, (1.0, 21, 1.0, 0.0), range(20)),
        (RISING, (1.0, 0, 0.9, 0.0), range(17, 20)),  # 0.63, 0.23, 0.09, and 0.05 for all others
        (RISING, (2.0, 0, 0.9, 0.0), range(15, 20)),  # 0.08 for all others
        (TIED, (1.0, 2, 1.0, 0.0), range(20)),
        (TIED, (1.0, 0, 0.7, 0.0), range(20)),  # 0.51, and 19 times 0.026
        (TIED, (1.0, 0, 0.4, 0.0), range(19, 20)),
        (EVEN, (1.0, 0, 1.0, 0.45), range(10)),
        (EVEN, (1.0, 0, 1.0, 0.55), range(10, 20)),
    ],
)
def test_candidates_that_can_be_counted_by_hand(row, wish, expected):
    """Beside rows that wish for other things."""
    wishes = [(1.0, 1, 1.0, 0.0), wish, (1.0, 20, 1.0, 0.0)]
    facts_M5, ids_MC, _ = sieved(np.tile(row.astype(np.float32), (3, 1)), 2, wishes, 20)
    assert facts_M5[1, 0] == len(expected)
    assert ids_MC[1, : len(expected)].tolist() == [*expected]
    powers_V = powers(row, float(row.max()), wish[0])
    assert facts_M5[1, 2] == pytest.approx(powers_V.sum(), rel=1e-12)
    before = powers_V[: expected[0]].sum() if wish[1:3] == (0, 1.0) else 0
    assert facts_M5[1, 4] == pytest.approx(before, rel=1e-12)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_part_of_an_extreme_number_has_ids_that_may_be_drawn(number):
    """Neither parts without ids, nor such whose powers are all 0, however sums are rounded."""
    logits_MV = np.full((1, 33), -1000, np.float32)
    logits_MV[0, [9, 20]] = 0
    facts_M5, ids_MC, _ = sieved(logits_MV, 32, [(0.5, 0, 1.0, number)], 33)  # 17 parts of 2 ids
    assert ids_MC[0, : int(facts_M5[0, 0])].tolist() == ([8, 9] if number == 0 else [20, 21])
    assert facts_M5[0, 4] == (0 if number == 0 else 1)


@pytest.mark.parametrize("wrong", [[0, np.nan], [np.inf, 0], [-np.inf] * 2, [np.nan] * 2])
@pytest.mark.parametrize("wish", [(1.0, 1, 1.0, 0.5), (1.0, 0, 0.9, 0.5), (1.0, 0, 1.0, 0.5)])
def test_sums_of_logits_that_are_not_finite_are_no_numbers(wrong, wish):
    logits_MV = np.tile(np.array(wrong, np.float32), (2, 20))
    facts_M5, *_ = sieved(logits_MV, 32, [wish] * 2, 40)
    assert np.isnan(facts_M5[:, 2:4]).all()


def test_a_tiny_temperature_leaves_the_largest():
    """1e-305: what is below the largest is divided to infinity, and its power is 0."""
    logits_MV = np.array([[0, 3, 1, 3, -1e9]], np.float32)
    facts_M5, ids_MC, _ = sieved(logits_MV, 2, [(1e-305, 0, 0.9, 0.5)], 5)
    assert facts_M5[0, :3].tolist() == [2, 3, 2]
    assert ids_MC[0, :2].tolist() == [1, 3]


# ---- schedules -----------------------------------------------------------------------------------


@pytest.mark.skipif(devices.kind != devices.SOFT, reason="a GPU has its own schedules")
@given(caches(), st.integers(1, 2000), seeds)
def test_bits_do_not_depend_on_the_order_of_threads(cache, V, seed):
    H, G, K, slots, positions, dtype = cache
    rng, M = np.random.default_rng(seed), len(positions)
    q_MNH = numbers(rng, (M, G * K, H), np.float32)
    keys, values = (numbers(rng, (M, K, slots, H), dtype) for _ in range(2))
    first, *others = (
        decode_attention(q_MNH, keys, values, positions, G, sched=s) for s in range(3)
    )
    for other in others:
        assert_same(other, first, "attention")
    logits_MV = numbers(rng, (2, V), np.float32)
    first, *others = (choose(logits_MV, 32, sched=s) for s in range(3))
    for other in others:
        for name, array in other.items():
            assert_same(array, first[name], name)
    wishes = [(0.7, seed % 50, 0.9, 0.5), (0.7, 0, 1.0, 0.5)]
    first, *others = (sieved(logits_MV, 32, wishes, V, sched=s) for s in range(3))
    for other in others:
        for array, same, name in zip(other, first, ("facts", "ids", "kept"), strict=True):
            assert_same(array, same, name)

"""The engines on a device: the oracle's numbers; what the plain one copies, launches and holds."""

import json

import ml_dtypes
import numpy as np
import paths
import pytest
from checks import assert_close, assert_same, difference
from hypothesis import given, settings
from hypothesis import strategies as st
from strategies import SHORT, STORED, Model, models, padded, ragged_runs

import llama3np
from llama3np import cli, cost
from llama3np import params as tree
from llama3np.backend import to_host
from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.kernels.engine import CUDA_ENGINES
from llama3np.llm import Llama
from llama3np.load import save_hf
from llama3np.numerics import PROFILES, ulps

pytestmark = pytest.mark.gpu  # those that take softcuda are for that device alone

SMALL = settings(max_examples=64)  # an eighth of them on CuPy
TINY = Model(Config(24, 2, 6, 2, 4, 40, 31, rope_pairing="half", tied=False), 1)
GOLDEN = json.loads((paths.GOLDENS / "embedded.json").read_text(encoding="utf-8"))
engines = st.sampled_from(list(CUDA_ENGINES))


def on_device(model, engine="cupy", **options):
    return Llama(
        model.config, model.params, device="cuda", engine=engine, max_seq_len=32, **options
    )


def fed(llm, ids, parts):
    """Logits of all ids of one row, fed in parts of these sizes."""
    cache, logits, start = llm.new_cache(1, len(ids)), [], 0
    for size in parts:
        logits.append(llm.forward(ids[start : start + size], cache)[0])
        start += size
    return np.concatenate(logits)


# ---- the numbers --------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", SHORT)
def test_in_16_bits_whole_numbers_give_the_bits_of_numpy(dtype):
    """Products and scores, whose sums are exact; probs within a unit, for CUDA's own exp."""
    import cupy

    from llama3np.kernels.cuda.plain import linear, product

    chosen, rng = PROFILES[dtype], np.random.default_rng(0)
    x_BTD, w, q_BTNH, k_BKTH, v_BKTH = (
        (rng.integers(-60, 61, shape) / 8).astype(chosen.dtype)
        for shape in ((2, 5, 96), (50, 96), (2, 5, 4, 32), (2, 2, 5, 32), (2, 2, 5, 32))
    )
    found = linear(cupy.asarray(x_BTD), cupy.asarray(w), multiply=product)
    assert_same(to_host(found), chosen.ops.linear(x_BTD, w), "product")
    positions_BT, seen = np.broadcast_to(np.arange(5), (2, 5)), {np: {}, cupy: {}}
    for xp, taps in seen.items():
        chosen.ops.attention(
            *map(xp.asarray, (q_BTNH, k_BKTH, v_BKTH, positions_BT)),
            lambda name, array: taps.update({name: to_host(array)}),  # noqa: B023
        )
    assert_same(seen[cupy]["scores"], seen[np]["scores"], "scores")
    assert ulps(seen[cupy]["probs"], seen[np]["probs"]).max() <= 1


@pytest.mark.parametrize("kv", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("stored", STORED)
def test_keys_and_values_are_stored_as_on_the_cpu(stored, kv):
    model = Model(TINY.config, 3, stored)
    ours = on_device(model, kv_dtype=kv)
    theirs = Llama(model.config, model.params, engine="numpy", kv_dtype=kv)
    ids = list(range(20))
    found, expected = fed(ours, ids, [7, 1, 12]), fed(theirs, ids, [7, 1, 12])
    # A key on the edge between two 16-bit numbers may go either way: see test_engine.py.
    assert_close(found, expected, {"f32": 1e-5, "f16": 2**-11, "bf16": 2**-8}[kv], "logits")


def test_bf16_mm_is_that_of_the_cpu():
    """Rounded activations, and products that sum in float32: not those of bfloat16."""
    model = Model(Config(256, 2, 8, 2, 32, 512, 70), 5, "bfloat16")
    ids = list(range(40))
    found = on_device(model, dtype="bf16-mm").engine.forward(
        [ids], (llm := on_device(model, dtype="bf16-mm")).new_cache(1, 40), last_only=False
    )[0]
    expected = Llama(model.config, model.params, engine="numpy", dtype="bf16-mm").forward(ids)[0]
    exact = Llama(model.config, model.params, engine="numpy").forward(ids)[0]
    floor = difference(expected, exact)
    assert llm.profile.rounded
    assert difference(found, expected) < floor / 2 < difference(found, exact)


def test_bf16_mm_refuses_other_weights():
    with pytest.raises(InputError, match="embed_VD: the profile bf16-mm multiplies bfloat16"):
        on_device(TINY, dtype="bf16-mm")


# ---- products and attention, by their parts -----------------------------------------------------


@SMALL
@given(
    st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.sampled_from(STORED),
    st.integers(1, 40), st.integers(0, 99),
)  # fmt: skip
def test_a_product_by_tiles_is_the_product(M, K, N, stored, tile, seed):
    """Within the error of a float32 sum of K exact weights, tiles of any size."""
    import cupy

    from llama3np.kernels.cuda.plain import product

    rng = np.random.default_rng(seed)
    dtype = ml_dtypes.bfloat16 if stored == "bfloat16" else stored
    x_MK, w_NK = rng.standard_normal((M, K), np.float32), rng.standard_normal((N, K)).astype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "TILE", tile)
        found = to_host(product(cupy.asarray(x_MK), cupy.asarray(w_NK)))
    wide = w_NK.astype(np.float64)
    bound = (K + 1) * 2.0**-23 * (np.abs(x_MK) @ np.abs(wide).T)
    assert found.dtype == np.float32
    assert (np.abs(found - x_MK @ wide.T) <= bound).all()


@pytest.mark.parametrize("dtype", [np.float16, ml_dtypes.bfloat16])
def test_a_16_bit_product_is_summed_and_given_in_float32(softcuda, dtype):
    import cupy

    from llama3np.kernels.cuda import gemm

    rng = np.random.default_rng(0)
    x_MK, w_NK = (rng.standard_normal(shape).astype(dtype) for shape in ((3, 300), (5, 300)))
    found = to_host(gemm.product(cupy.asarray(x_MK), cupy.asarray(w_NK)))
    expected = x_MK.astype(np.float64) @ w_NK.astype(np.float64).T
    assert found.dtype == np.float32
    assert_close(found, expected, 300 * 2.0**-23, "product")
    assert softcuda.stats()["kernels"]["cublas::gemmEx"] == 1


def test_a_product_of_strange_operands_is_refused():
    import cupy

    from llama3np.kernels.cuda import gemm

    x, w, y = (cupy.zeros(shape, np.float32) for shape in ((2, 3), (4, 3), (2, 4)))
    half = x.astype(np.float16)
    for operands in (
        (x, w[:, :2], y),
        (half, w, y),
        (half, half, y),
        (x, w, y[:, :3]),
        (x[:, ::2], w, y),
    ):
        with pytest.raises(ValueError, match="expected"):
            gemm.multiply(*operands)
    with pytest.raises(ValueError, match="contiguous rows"):
        gemm.multiply(cupy.zeros((3, 2), np.float32).T, w, y)


@SMALL
@given(
    ragged_runs(),
    st.sampled_from([1, 7, 64, 300]),
    st.sampled_from(["float32", "f16-hf"]),
    st.data(),
)
def test_attention_by_blocks_is_attention(run_of, scores, dtype, data):
    """With so few scores at a time that rows, queries and keys are all cut; after any context."""
    model, rows, pad = run_of
    ids_BT, lengths = padded(rows, pad)
    llm = on_device(model, dtype=dtype)
    logits = []
    first = data.draw(st.integers(0, ids_BT.shape[1] - 1))
    for most in (scores, cost.SCORES):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(cost, "SCORES", most)
            cache = llm.new_cache(len(rows), 32)
            if first:
                llm.engine.forward(ids_BT[:, :first], cache, np.minimum(lengths, first))
            new_B = np.maximum(np.array(lengths) - first, 0)
            logits.append(llm.engine.forward(ids_BT[:, first:], cache, new_B, last_only=False))
    for b, new in enumerate(new_B):
        # A query sees fewer keys in a block, so its sums have another order: a unit of 2^-10.
        tol = 1e-4 if dtype == "float32" else 2**-7
        assert_close(logits[0][b, :new], logits[1][b, :new], tol, f"row {b}")


# ---- what goes over the bus, and what is held ---------------------------------------------------


def counts(softcuda, work):
    import cupy

    cupy.cuda.Device().synchronize()
    softcuda.reset()
    work()
    return softcuda.stats()


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_a_call_moves_ids_and_places_there_and_logits_back(softcuda, tokens, stored):
    """Seven small arrays to the device whatever the number of layers, the logits back: no more."""
    for layers in (1, 3):
        config = Config(24, layers, 6, 2, 4, 40, 31)
        llm = on_device(Model(config, 1, stored))
        cache = llm.new_cache(1, 32)
        llm.forward([1, 2, 3], cache)
        found = counts(softcuda, lambda: llm.forward([4] * tokens, cache, last_only=True))  # noqa: B023
        assert (found["h2d"], found["d2h"]) == (7, 1)
        assert found["h2d_bytes"] <= 8 * (2 + 5 * tokens) + 4 * config.head_dim
        assert found["d2h_bytes"] == 4 * config.vocab_size
        assert found["syncs"] == 1  # that of the copy back


def test_launches_of_a_decode_step_are_counted(softcuda):
    """So that a regression shows. The fast engine is for fewer."""
    launches = []
    for layers in (1, 2):
        llm = on_device(Model(Config(24, layers, 6, 2, 4, 40, 31), 1))
        cache = llm.new_cache(1, 32)
        llm.forward([1, 2, 3], cache)
        launches.append(counts(softcuda, lambda: llm.forward([4], cache))["launches"])  # noqa: B023
    per_layer = launches[1] - launches[0]
    assert (per_layer, launches[0] - per_layer) == (70, 14)


# Where vectors of width F, logits, scores, keys and values, or vectors of width D are the most.
GREEDY_FOR = (
    Config(16, 1, 4, 2, 4, 1024, 90),
    Config(64, 1, 4, 4, 16, 32, 2000),
    Config(8, 1, 16, 2, 2, 8, 20),
    Config(8, 1, 8, 4, 64, 8, 20),
    Config(256, 1, 4, 1, 64, 16, 20),
)


@pytest.mark.parametrize(
    ("config", "dtype"),
    [*((config, "float32") for config in GREEDY_FOR)]
    + [(config, "bf16-hf") for config in GREEDY_FOR[0:3:2]],
)
def test_the_workspace_that_is_planned_is_above_what_is_used(softcuda, monkeypatch, config, dtype):
    """Every array an allocation of its own; and for some call the plan is nearly all used."""
    import cupy

    for name, value in (("BESIDE", 0), ("TILE", 1 << 12), ("SCORES", 1 << 13)):
        monkeypatch.setattr(cost, name, value)
    old, shares = cupy.cuda.get_allocator(), []
    cupy.cuda.set_allocator(None)
    try:
        calls = (None, 64), ("bf16", 64), ("bf16", 1)
        for kv, tokens in calls if dtype == "float32" else calls[:1]:
            llm = on_device(Model(config, 1, "bfloat16"), dtype=dtype, kv_dtype=kv)
            cache = llm.new_cache(1, 300)
            llm.forward([1] * (300 - tokens), cache, last_only=True)
            before = softcuda.stats()["live_bytes"]
            softcuda.reset()
            llm.forward([1] * tokens, cache)
            used = softcuda.stats()["peak_bytes"] - before
            size = np.dtype(llm.profile.dtype).itemsize
            shares.append(used / cost.workspace_bytes(config, tokens, 300, size=size))
    finally:
        cupy.cuda.set_allocator(old)
    # The plan counts 4 bytes of every number; of 16 bits are those that are not widened just then.
    assert (0.75 if dtype == "float32" else 0.4) < max(shares) <= 1


def test_a_model_that_does_not_fit_is_told_before_anything_is_allocated(softcuda, monkeypatch):
    import cupy

    monkeypatch.setattr(cupy.cuda.runtime, "memGetInfo", lambda: (10**8, 10**9))
    cupy.get_default_memory_pool().free_all_blocks()
    before = softcuda.stats()["mallocs"]
    with pytest.raises(
        InputError, match=r"device: does not fit: cuda:0: .* 0.10 GB of 1.00 GB free"
    ):
        on_device(TINY)
    assert softcuda.stats()["mallocs"] - before <= 2  # of the trial that the device computes


def test_running_out_of_memory_is_a_sentence(monkeypatch):
    import cupy

    llm = on_device(TINY)
    cache = llm.new_cache(1, 8)

    def full(*_):
        raise cupy.cuda.memory.OutOfMemoryError(100, 50)

    with monkeypatch.context() as patch:
        patch.setattr(cupy, "empty", full)
        with pytest.raises(InputError, match="device: no memory left on cuda:0"):
            on_device(TINY)
    monkeypatch.setattr(cupy, "zeros", full)
    with pytest.raises(InputError, match="cache: cuda:0 has no memory for 9 rows of 32 tokens"):
        llm.new_cache(9)
    with pytest.raises(InputError, match=r"cache: no memory for a copy of 2 rows: Out of memory"):
        cache.fork([0, 0])
    monkeypatch.setattr(cupy, "arange", full)
    with pytest.raises(InputError, match="device: cuda:0 has no memory left for this call"):
        llm.forward([1, 2], cache)


@pytest.mark.parametrize("engine", CUDA_ENGINES)
def test_no_product_takes_tf32(softcuda, monkeypatch, engine):
    """CUPY_TF32=1 is the user's wish for CuPy's own `@`, and stays so outside of the engines."""
    import cupy
    from cupy._core import _routines_linalg as linalg
    from softcuda import cublas

    from llama3np.kernels.cuda import gemm

    single, asked, types_of_sums, arithmetic = np.dtype("f4"), [], set(), cublas._arithmetic

    def seen(compute, types):
        asked.append(compute)
        return arithmetic(compute, types)

    llm, before = on_device(TINY, engine), linalg.get_compute_type(single)
    monkeypatch.setattr(cublas, "_arithmetic", seen)
    linalg.set_compute_type(single, linalg.COMPUTE_TYPE_TF32)  # what CUPY_TF32=1 does
    try:
        llm.forward([[1, 2, 3], [4, 5, 6]])
        llm.forward([1, 2, 3], tap=lambda *_: types_of_sums.add(linalg.get_compute_type(single)))
        assert types_of_sums == {linalg.COMPUTE_TYPE_FP32}
        # The products of attention are batches, for which CuPy 14.2 asks by the type of numbers.
        assert set(asked) <= {cublas.module.CUBLAS_COMPUTE_32F, cublas.F32}
        with gemm.exact():
            cupy.ones((3, 4), np.float32) @ cupy.ones((4, 5), np.float32)
        assert asked[-1] == cublas.module.CUBLAS_COMPUTE_32F
        cupy.ones((3, 4), np.float32) @ cupy.ones((4, 5), np.float32)
        assert asked[-1] == cublas.module.CUBLAS_COMPUTE_32F_FAST_TF32
    finally:
        linalg.set_compute_type(single, before)


def test_ids_may_lie_on_the_device():
    import cupy

    llm, ids = on_device(TINY), [[1, 2, 3], [4, 5, 6]]
    expected = llm.forward(ids)
    assert_same(llm.forward(cupy.asarray(ids)), expected, "logits")
    assert_same(llm.forward([cupy.asarray(row) for row in ids]), expected, "logits")
    assert_same(llm.forward(cupy.asarray(ids[0])), llm.forward(ids[0]), "logits of a row")
    assert llm.generate(cupy.asarray(ids), 4) == llm.generate(ids, 4)
    with pytest.raises(InputError, match="token ids: expected a list of integers, found"):
        llm.forward([cupy.asarray(1), cupy.asarray(2)])
    with pytest.raises(InputError, match="token ids: expected a list of integers, found"):
        llm.forward(cupy.asarray([1.0, 2.0]))


# ---- the cache ----------------------------------------------------------------------------------


@SMALL
@given(models(), engines, st.data())
def test_trim_reset_and_fork_on_the_device(model, engine, data):
    V = model.config.vocab_size
    ids = data.draw(st.lists(st.integers(0, V - 1), min_size=2, max_size=8))
    llm = on_device(model, engine)
    whole = llm.forward(ids)[0, -1]
    cache = llm.new_cache(1, 16)
    llm.forward([*ids, 0, 0], cache)
    cache.trim(len(ids) - 1)
    forked = cache.fork([0, 0])
    again = llm.forward([[ids[-1]], [ids[-1]]], forked, last_only=True)
    assert (cache.lengths_B.tolist(), forked.lengths_B.tolist()) == ([len(ids) - 1], [len(ids)] * 2)
    for row in again[:, 0]:
        assert_close(row, whole, 1e-4, "after trim and fork")
    assert_close(llm.forward(ids, cache.reset())[0, -1], whole, 1e-4, "after reset")


def test_a_fork_moves_its_rows_once(softcuda):
    llm = on_device(TINY)
    cache = llm.new_cache(2, 16)
    llm.forward([[1, 2], [3, 4]], cache)
    assert counts(softcuda, lambda: cache.fork([1]))["h2d"] == 1


# ---- end to end ---------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", CUDA_ENGINES)
def test_generation_batches_sampling_and_scores_are_those_of_numpy(engine):
    ours = on_device(TINY, engine)
    theirs = Llama(TINY.config, TINY.params, engine="numpy", max_seq_len=32)
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    for options in ({}, {"temperature": 0.9, "top_k": 9, "top_p": 0.9, "seed": 3}):
        found, expected = (
            llm.generate(prompts, 12, logprobs=True, **options) for llm in (ours, theirs)
        )
        assert [c.ids for c in found] == [c.ids for c in expected]
        for ours_c, theirs_c in zip(found, expected, strict=True):
            np.testing.assert_allclose(ours_c.logprobs, theirs_c.logprobs, atol=1e-5)
    np.testing.assert_allclose(ours.score(prompts[2]), theirs.score(prompts[2]), atol=1e-5)


@pytest.mark.parametrize("engine", CUDA_ENGINES)
def test_nothing_waits_too_little_on_a_device_that_works_late(softcuda, engine):
    """From the prompt to the text: whatever is not waited for is not there yet."""
    softcuda.config(deferred=True)
    ours = on_device(TINY, engine).generate([[1, 2, 3], [4]], 8)
    theirs = Llama(TINY.config, TINY.params, engine="numpy").generate([[1, 2, 3], [4]], 8)
    assert [c.ids for c in ours] == [c.ids for c in theirs]


@pytest.mark.parametrize("item", GOLDEN["items"][:2], ids=lambda item: item["id"])
def test_the_embedded_model_generates_the_reference_ids_by_plain_operations(item):
    """The engine cuda has all of test_goldens.py."""
    llm = llama3np.load(paths.EMBEDDED, device="cuda", engine="cupy")
    count = min(12, item["max_new_tokens"])
    (completion,) = llm.generate(item["prompt_ids"], count, stop_ids=())
    assert completion.ids == item["generated_ids"][:count]
    logits_V = llm.forward(item["prompt_ids"], last_only=True)[0, 0]
    top5 = item["steps"][0]
    assert np.abs(logits_V[top5["top5_ids"]] - top5["top5_logits"]).max() < 1e-3


def test_a_checkpoint_of_many_tensors_tells_its_way_to_the_device():
    told = []
    llm = llama3np.load(
        paths.EMBEDDED, device="cuda", engine="cupy",
        progress=lambda *each: told.append(each),
    )  # fmt: skip
    total = sum(w.nbytes for w in tree.named(llm.params, llm.config.tied).values())
    assert told[-1][:2] == (total, total)
    assert repr(llm).endswith("engine cupy on cuda:0)")


# ---- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", CUDA_ENGINES)
def test_the_command_tells_the_memory_then_generates_as_on_the_cpu(capsys, engine):
    model = str(paths.EMBEDDED)
    asked = ["generate", model, "--prompt-ids", "1,43,47", "--max-new-tokens", "6"]
    texts = []
    for device in (["--device", "cuda:0", "--engine", engine], ["--engine", "numpy"]):
        assert cli.main([*asked, *device]) == 0
        texts.append(capsys.readouterr())
    assert texts[0].out == texts[1].out
    assert texts[0].err.startswith("cuda:0: 0.")
    assert " needed: weights 0.00 GB, keys and values of 256 tokens in f32 " in texts[0].err
    assert (texts[0].err.count("\n"), texts[1].err) == (1, "")


@pytest.mark.parametrize(
    ("args", "told"),
    [
        (["--engine", "cupy"], "expected one of numpy, numba (on the cpu), found 'cupy'"),
        (["--device", "cuda", "--engine", "numba"], "expected one of cupy, cuda (on cuda)"),
        (["--device", "cuda:5"], "device: expected cuda:0 (there are 1), found cuda:5"),
        (["--device", "cuda", "--dtype", "bf16-mm"], "multiplies bfloat16 weights"),
    ],
)
def test_what_a_device_cannot_do_is_a_sentence(softcuda, capsys, tmp_path, args, told):
    save_hf(tmp_path / "tiny", TINY.config, TINY.params)  # in float32
    assert cli.main(["generate", str(tmp_path / "tiny"), "--prompt-ids", "1", *args]) == 2
    error = capsys.readouterr().err
    assert told in error.splitlines()[-1]
    assert len(error.splitlines()) <= 2  # the plan, where loading came so far


def test_bench_refuses_what_a_device_cannot_tell(capsys):
    for option in (["--profile-ops"], ["--vs", "llama.cpp"]):
        assert cli.main(["bench", "/nowhere", "--device", "cuda", *option]) == 2
        assert f"{option[0]}: expected --device cpu, found cuda" in capsys.readouterr().err


def test_a_cache_of_another_device_is_refused_in_a_sentence():
    here, there = Llama(TINY.config, TINY.params, max_seq_len=8), on_device(TINY, "cuda")
    for llm, cache in ((there, here.new_cache(1, 8)), (here, there.new_cache(1, 8))):
        with pytest.raises(InputError, match="cache: expected one that lies on c"):
            llm.forward([1], cache)
        with pytest.raises(InputError, match="cache: expected one that lies on c"):
            next(llm.stream([1], 2, cache=cache))

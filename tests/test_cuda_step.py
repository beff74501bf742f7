"""The engine "cuda" as a whole: against the oracle, in batches, as a graph, and what it costs."""

import gc

import devices
import ml_dtypes
import numpy as np
import pytest
from checks import assert_close, assert_same, difference
from cuda_kernels import random_weight, strict
from hypothesis import given
from hypothesis import strategies as st
from noise import NOISE, ULP32, noise, oracle_taps
from strategies import models, runs, seeds, splits

import llama3np.params
from llama3np import model as spec
from llama3np.backend import Device
from llama3np.cache import new_cache
from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.generate import generate
from llama3np.kernels.engine import Engine
from llama3np.llm import Llama
from llama3np.numerics import profile
from llama3np.params import Layer, from_named, named
from llama3np.sample import Sampling, log_softmax
from llama3np.threads import Pool

cp = pytest.importorskip("cupy")

from llama3np.kernels.cuda import sieve  # noqa: E402
from llama3np.kernels.cuda import step as step_module  # noqa: E402
from llama3np.kernels.cuda.engine import CudaEngine  # noqa: E402
from llama3np.kernels.cuda.registry import FORMATS, STRETCH  # noqa: E402
from llama3np.kernels.cuda.step import RECORDS, Step  # noqa: E402
from llama3np.kernels.cuda.weights import upload  # noqa: E402

pytestmark = [pytest.mark.cuda, pytest.mark.gpu]

STORED_AS = ("float32", "float16", ml_dtypes.bfloat16)
WIDE = Config(256, 2, 8, 2, 32, 512, 70, tied=False)  # whole blocks of 256 in every row


def engine_of(params, config, dtype="float32"):
    tensors = {name: upload(w) for name, w in named(params, config.tied).items()}
    return CudaEngine(from_named(tensors, config), config, profile(dtype), Device("cuda"))


def cache_of(config, rows, slots=32, dtype="float32"):
    return new_cache(config, rows, slots, dtype, cp)


def fed(engine, cache, ids, parts):
    """Logits of all ids of one row, fed in parts of these sizes."""
    logits, start = [], 0
    for size in parts:
        logits.append(engine.forward([ids[start : start + size]], cache, last_only=False)[0])
        start += size
    return np.concatenate(logits)


def fed_one_by_one(engine, cache, ids):
    return fed(engine, cache, ids, [1] * len(ids))


def poisoned(cache):
    """The same cache, its unused slots not numbers."""
    for array in (*cache.k, *cache.v):
        for b, length in enumerate(cache.lengths_B):
            array[b, :, int(length) :] = np.nan
    return cache


def random_params(config, formats, seed):
    """(params, the same in float64). formats: of embedding and head, then of a layer's matrices in
    turn, over and over.
    """
    rng, stored, wide = np.random.default_rng(seed), {}, {}
    fields = ("embed_VD", *(name for name in Layer._fields if not name.endswith("_D")))
    for name, w in named(llama3np.params.random(config, rng), config.tied).items():
        stored[name] = w
        if w.ndim == 2:
            field = name.rpartition(".")[2]
            i = 0 if field == "head_VD" else fields.index(field)
            stored[name], w = random_weight(formats[i % len(formats)], *w.shape, rng)
        wide[name] = w.astype(np.float64)
    return from_named(stored, config), from_named(wide, config)


def spec_logits(wide, config, ids, dtype="float64", ops=spec.PLAIN):
    """Of all ids of one row, by the plain expression."""
    params = from_named({n: w.astype(dtype) for n, w in named(wide, config.tied).items()}, config)
    cache = new_cache(config, 1, len(ids), dtype)
    logits, _ = spec.forward(params, config, [ids], cache, dtype=dtype, ops=ops, last_only=False)
    return logits[0]


# ---- the numbers ---------------------------------------------------------------------------------


@given(runs(), st.data())
def test_the_engine_is_as_near_the_oracle_as_float32_is(run_of, data):
    """For any architecture; steps, prefill and all between; what a cache does not hold is NaN."""
    model, ids = run_of
    with strict():
        engine, cache = engine_of(model.params, model.config), cache_of(model.config, 1)
        found = fed(engine, cache, ids, data.draw(splits(len(ids))))
        steps = fed_one_by_one(engine, poisoned(cache_of(model.config, 1)), ids)
    truth = oracle_taps(model, ids)
    allowed = NOISE * (noise(model, ids, truth)["logits"] + ULP32)
    assert_close(found, truth["logits"], allowed, "logits")
    assert_close(steps, truth["logits"], allowed, "logits of steps")


# Embedding and head, wq, wk, wv, wo, w_gate, w_up, w_down.
AS_IN_Q4_K_M = ("Q6_K", "Q4_K", "Q4_K", "Q6_K", "Q4_K", "Q4_K", "Q4_K", "Q6_K")
MIXED = (
    *((format,) for format in FORMATS),
    AS_IN_Q4_K_M,
    ("F16", "Q4_0", "BF16", "F32", "Q5_K", "Q4_1", "Q8_0", "Q2_K"),
)


@pytest.mark.parametrize("formats", MIXED, ids="-".join)
def test_every_format_gives_the_logits_of_its_widened_weights(formats):
    """Alone, and mixed within a layer, as quantised files have them: in prefill and in steps."""
    params, wide = random_params(WIDE, formats, seed=3)
    ids = np.random.default_rng(4).integers(0, WIDE.vocab_size, 12).tolist()
    truth, narrow = (spec_logits(wide, WIDE, ids, dtype) for dtype in ("float64", "float32"))
    allowed = NOISE * (difference(narrow, truth) + ULP32)
    engine = engine_of(params, WIDE)
    found = fed(engine, cache_of(WIDE, 1), ids, (6, 1, 1, 1, 2, 1))
    assert_close(found, truth, allowed, "logits")


@pytest.mark.parametrize("stored_as", STORED_AS[1:])
def test_a_short_cache_is_that_of_rounded_keys_and_values(stored_as):
    params, _ = random_params(WIDE, ("F32",), seed=5)
    ids = np.random.default_rng(6).integers(0, WIDE.vocab_size, 12).tolist()
    expected, _ = spec.forward(
        params, WIDE, [ids], new_cache(WIDE, 1, len(ids), stored_as), last_only=False
    )
    found = fed_one_by_one(engine_of(params, WIDE), cache_of(WIDE, 1, dtype=stored_as), ids)
    # A key on the edge between two numbers may go either way: see test_engine.py.
    assert_close(found, expected[0], 2**-8, "logits")
    assert difference(found, spec_logits(params, WIDE, ids)) > 2**-14


def test_bf16_mm_rounds_activations_as_they_enter_a_product():
    params, wide = random_params(WIDE, ("BF16",), seed=7)
    ids = np.random.default_rng(8).integers(0, WIDE.vocab_size, 12).tolist()

    def rounding(x_BTD, w):
        return spec.linear(x_BTD.astype(ml_dtypes.bfloat16).astype(np.float64), w)

    expected = spec_logits(wide, WIDE, ids, ops=spec.PLAIN._replace(linear=rounding))
    exact = spec_logits(wide, WIDE, ids)
    floor = difference(expected, exact)  # what rounding itself does
    found = fed_one_by_one(engine_of(params, WIDE, "bf16-mm"), cache_of(WIDE, 1), ids)
    assert difference(found, expected) < floor / 2
    assert difference(found, exact) > floor / 2


def test_float64_goes_by_the_plain_operations():
    _, wide = random_params(WIDE, ("F32",), seed=9)
    engine, cache = engine_of(wide, WIDE, "float64"), cache_of(WIDE, 1, dtype="float64")
    found = fed_one_by_one(engine, cache, [1, 2, 3])
    assert_close(found, spec_logits(wide, WIDE, [1, 2, 3]), 1e-12, "logits")


# ---- rows ----------------------------------------------------------------------------------------


@given(models(), st.lists(st.integers(1, 5), min_size=1, max_size=8), seeds)
def test_rows_of_a_ragged_batch_have_the_bits_of_each_row_alone(model, lengths, seed):
    """Rows end one after the other; those that have ended are left alone."""
    c, rng, B = model.config, np.random.default_rng(seed), len(lengths)
    ids_BT = rng.integers(0, c.vocab_size, (B, max(lengths)))
    engine, cache = engine_of(model.params, c), poisoned(cache_of(c, B))
    rows = [[] for _ in lengths]
    for t in range(max(lengths)):
        new_B = (np.array(lengths) > t).astype(int)
        before = [array.get() for array in (*cache.k, *cache.v)]
        logits_B1V = engine.forward(ids_BT[:, t : t + 1], cache, new_B)
        for b in np.flatnonzero(new_B):
            rows[b].append(logits_B1V[b, 0])
        after = [array.get() for array in (*cache.k, *cache.v)]
        for old, new in zip(before, after, strict=True):
            assert np.array_equal(old[new_B == 0], new[new_B == 0], equal_nan=True)
    assert cache.lengths_B.tolist() == lengths
    for b, length in enumerate(lengths):
        alone = fed_one_by_one(engine, poisoned(cache_of(c, 1)), ids_BT[b, :length].tolist())
        assert_same(np.array(rows[b]), alone, f"row {b}")


def test_bits_do_not_depend_on_the_room_in_the_cache():
    params, _ = random_params(WIDE, ("F32",), seed=10)
    ids = np.random.default_rng(11).integers(0, WIDE.vocab_size, 5).tolist()
    engine = engine_of(params, WIDE)
    tight, roomy = (
        fed_one_by_one(engine, cache_of(WIDE, 1, slots), ids) for slots in (5, 3 * STRETCH)
    )
    assert_same(tight, roomy, "logits")


def test_what_is_wrong_is_said_before_anything_changes():
    params, _ = random_params(WIDE, ("F32",), seed=12)
    engine, cache = engine_of(params, WIDE), cache_of(WIDE, 2, 4)
    engine.forward([[1], [2]], cache)
    cache.lengths_B = np.array([1, 4])
    with pytest.raises(InputError, match="row 1 holds 4 tokens and 1 more do not fit"):
        engine.forward([[1], [2]], cache)
    with pytest.raises(InputError, match="expected 0 <= id < 70"):
        engine.forward([[1], [70]], cache)
    with pytest.raises(InputError, match="expected 2 counts"):
        engine.forward([[1], [2]], cache, [1, 2])
    with pytest.raises(InputError, match=r"expected \(layers"):
        engine.forward([[1]], cache_of(Config(256, 2, 8, 4, 32, 512, 70), 1))
    assert cache.lengths_B.tolist() == [1, 4]
    assert engine.forward([[1], [2]], cache, [1, 0]).shape == (2, 1, 70)


# ---- the graph -----------------------------------------------------------------------------------


@given(models(), st.sampled_from(STORED_AS), st.integers(1, 3))
def test_a_replayed_graph_has_the_bits_of_single_launches(model, stored_as, rows):
    """The same token three times at the same place: launched, captured, replayed."""
    c = model.config
    engine, cache = engine_of(model.params, c), cache_of(c, rows, dtype=stored_as)
    ids_BT = np.arange(rows * 3).reshape(rows, 3) % c.vocab_size
    engine.forward(ids_BT, cache)
    logits = []
    for _ in range(4):
        logits.append(engine.forward(ids_BT[:, :1], cache))
        cache.trim(3)
    for replayed in logits[1:]:
        assert_same(replayed, logits[0], "logits")


def test_a_graph_follows_token_and_position():
    """A replay is not a replay of old numbers: each step against a launch by launch one."""
    params, _ = random_params(WIDE, ("BF16",), seed=13)
    ids = np.random.default_rng(14).integers(0, WIDE.vocab_size, 8).tolist()
    engine, cache = engine_of(params, WIDE), cache_of(WIDE, 1)
    replayed = fed_one_by_one(engine, cache, ids)
    for t in range(len(ids)):
        fresh = cache_of(WIDE, 1)
        fresh.k, fresh.v = ([array.copy() for array in arrays] for arrays in (cache.k, cache.v))
        fresh.lengths_B = np.array([t])
        assert_same(engine.forward([[ids[t]]], fresh)[0, 0], replayed[t], f"token {t}")


def test_a_step_sees_a_cache_whose_arrays_were_exchanged():
    params, _ = random_params(WIDE, ("F32",), seed=15)
    engine, cache, ids = engine_of(params, WIDE), cache_of(WIDE, 1), [1, 2, 3, 4]
    expected = fed_one_by_one(engine, cache, ids)[-1]
    cache.trim(3)
    cache.k, cache.v = ([array.copy() for array in arrays] for arrays in (cache.k, cache.v))
    assert_same(engine.forward([[4]], cache)[0, 0], expected, "logits")


def test_a_step_waits_for_what_was_done_to_its_cache(softcuda):
    """Work of streams runs only when something waits for it: nothing may rely on luck."""
    params, _ = random_params(WIDE, ("F32",), seed=16)
    ids = [1, 2, 3, 4, 5]
    engine = engine_of(params, WIDE)
    expected = fed_one_by_one(engine, cache_of(WIDE, 1), ids)[-1]
    cache = cache_of(WIDE, 1)
    fed(engine, cache, ids[:4], [2, 1, 1])
    softcuda.config(deferred=True)
    forked = cache.fork()  # copies on the caller's stream
    for _ in range(3):
        found = engine.forward([[5]], forked)[0, 0]
        assert difference(found, expected) < 2**-18
        forked.trim(4)
    softcuda.config(deferred=False)


@pytest.mark.parametrize("way", ["forward", "greedy"])
def test_a_step_that_is_broken_off_is_waited_for(softcuda, monkeypatch, way):
    """Ctrl-C between the launch and the wait: what was launched has ended when the caller knows."""
    params, _ = random_params(WIDE, ("F32",), seed=16)
    engine, cache = engine_of(params, WIDE), cache_of(WIDE, 1)
    step, run = engine._step(cache), Step._run
    assert step.buffers.positions_M.get().tolist() == [-1]

    def broken_off(*args, **options):
        run(*args, **options)
        raise KeyboardInterrupt

    monkeypatch.setattr(Step, "_run", broken_off)
    softcuda.config(deferred=True)
    with pytest.raises(KeyboardInterrupt):
        engine.forward([[5]], cache) if way == "forward" else engine.greedy([5], cache, 2)
    assert step.buffers.positions_M.get().tolist() == [0 if way == "forward" else 1]
    softcuda.config(deferred=False)
    assert cache.lengths_B.tolist() == [0]


def test_a_capture_that_is_broken_off_leaves_a_step_that_works(monkeypatch):
    params, _ = random_params(WIDE, ("F32",), seed=16)
    engine, cache = engine_of(params, WIDE), cache_of(WIDE, 1)
    expected = engine.forward([[5]], cache)
    cache.reset()
    launches, launch = iter(range(99)), step_module.launch

    def broken_off(*args, **options):
        if next(launches) == 3:
            raise KeyboardInterrupt
        launch(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(step_module, "launch", broken_off)
        with pytest.raises(KeyboardInterrupt):
            engine.forward([[5]], cache)
    for _ in range(3):
        assert_same(engine.forward([[5]], cache), expected, "logits")
        cache.reset()


def test_a_step_is_freed_with_its_cache(softcuda):
    params, _ = random_params(WIDE, ("F32",), seed=17)
    engine = engine_of(params, WIDE)
    fed_one_by_one(engine, cache_of(WIDE, 1), [1, 2, 3])
    with strict():
        before = softcuda.stats()["live_bytes"]
        cache = cache_of(WIDE, 1)
        fed_one_by_one(engine, cache, [1, 2, 3])
        engine.greedy([4], cache, 3)
        engine.sample([4], cache, WISHES["both"], [0.5])
        assert softcuda.stats()["live_bytes"] > before + cache.nbytes
        gc.disable()  # no cycle may hold it
        del cache
        try:
            assert softcuda.stats()["live_bytes"] == before
        finally:
            gc.enable()


# ---- greedy --------------------------------------------------------------------------------------


@given(models(), st.integers(1, 4), st.integers(1, 6), seeds)
def test_greedy_is_the_loop_over_the_largest_logit(model, rows, n, seed):
    c, rng = model.config, np.random.default_rng(seed)
    engine = engine_of(model.params, c)
    ids_B, cache = rng.integers(0, c.vocab_size, rows), cache_of(c, rows)
    found, logprobs = engine.greedy(ids_B, cache, n)
    other = cache_of(c, rows)
    for i in range(n):
        logits_BV = engine.forward(ids_B[:, None], other)[:, 0]
        ids_B = logits_BV.argmax(axis=1)
        assert found[i].tolist() == ids_B.tolist()
        expected = log_softmax(logits_BV)[np.arange(rows), ids_B]
        np.testing.assert_allclose(logprobs[i], expected, atol=2**-19, rtol=0)
    assert cache.lengths_B.tolist() == [n] * rows
    for a, b in zip((*cache.k, *cache.v), (*other.k, *other.v), strict=True):
        assert_same(a.get()[:, :, :n], b.get()[:, :, :n], "cache")


def test_greedy_goes_on_beyond_what_the_device_records():
    config = Config(8, 1, 2, 1, 4, 8, 12)
    engine = engine_of(llama3np.params.random(config, np.random.default_rng(1)), config)
    n = 2 * RECORDS + 3
    found, _ = engine.greedy([1], cache_of(config, 1, n), n)
    cache, parts, last = cache_of(config, 1, n), [], [1]
    for size in (RECORDS + 1, RECORDS + 2):
        parts.append(engine.greedy(last, cache, size)[0])
        last = parts[-1][-1]
    assert found[:, 0].tolist() == np.concatenate(parts)[:, 0].tolist()


def test_greedy_says_that_weights_are_damaged():
    config = Config(8, 1, 2, 1, 4, 8, 12)
    params = llama3np.params.random(config, np.random.default_rng(1))
    params.norm_D[3] = np.nan
    with pytest.raises(InputError, match="the weights are damaged"):
        engine_of(params, config).greedy([1], cache_of(config, 1), 3)


def test_damage_beyond_what_is_asked_for_fails_no_answer():
    """The device looks ahead: its first tokens are good, and only who asks on is told."""
    config = Config(8, 1, 2, 1, 4, 8, 12, tied=False)
    params = llama3np.params.random(config, np.random.default_rng(35))
    ids = engine_of(params, config).greedy([1], cache_of(config, 1), 10)[0][:, 0].tolist()
    assert len({1, *ids[:4]}) == 5  # no token comes twice before the damaged one has been fed
    params.embed_VD[ids[2]] = np.nan  # what follows ids[2] is damaged
    engine, cache = engine_of(params, config), cache_of(config, 1)
    found, logprobs = engine.greedy([1], cache, 10)
    assert found[:, 0].tolist() == ids[:3]
    assert logprobs.shape == (3, 1)
    assert cache.lengths_B.tolist() == [3]
    assert all(np.isfinite(array.get()).all() for array in (*cache.k, *cache.v))
    with pytest.raises(InputError, match="the weights are damaged"):
        engine.greedy(found[-1], cache, 2)
    llm = Llama(config, params, device="cuda")
    for stop in (1, 2):
        (done,) = llm.generate([[1]], 12, stop_ids=[ids[stop]])
        assert done.ids == ids[: stop + 1]
    with pytest.raises(InputError, match="the weights are damaged"):
        llm.generate([[1]], 12, stop_ids=())


@pytest.mark.parametrize("way", ["greedy", "sample"])
def test_damage_at_the_first_token_leaves_no_trace_in_the_cache(way):
    """In a batch, one row of which is damaged: lengths as they were, and finite numbers beyond."""
    config = Config(8, 1, 2, 1, 4, 8, 12, tied=False)
    params = llama3np.params.random(config, np.random.default_rng(35))
    params.embed_VD[7] = np.nan
    engine, cache = engine_of(params, config), cache_of(config, 2)
    engine.forward([[1, 2], [3, 4]], cache)
    wanted = {"greedy": (20,), "sample": (WISHES["plain"], [0.5, 0.5])}
    with pytest.raises(InputError, match="the weights are damaged"):
        getattr(engine, way)([7, 8], cache, *wanted[way])
    assert cache.lengths_B.tolist() == [2, 2]
    assert all(np.isfinite(array.get()).all() for array in (*cache.k, *cache.v))


def test_greedy_refuses_what_no_step_takes():
    config = Config(8, 1, 2, 1, 4, 8, 12)
    engine = engine_of(llama3np.params.random(config, np.random.default_rng(1)), config)
    with pytest.raises(InputError, match="expected float32 and 1 to 8 rows, found 9"):
        engine.greedy([1] * 9, cache_of(config, 9), 1)
    with pytest.raises(InputError, match="do not fit"):
        engine.greedy([1], cache_of(config, 1, 4), 5)


# ---- sampling ------------------------------------------------------------------------------------

WISHES = {
    "plain": Sampling(0.8, seed=5),
    "top-k": Sampling(1.5, top_k=4, seed=6),
    "top-p": Sampling(1.0, top_p=0.7, seed=7),
    "both": Sampling(1.2, 9, 0.8, seed=8),
    "k of all": Sampling(1.2, WIDE.vocab_size, seed=9),
    "k beyond": Sampling(1.2, 10**400, 0.9, seed=9),  # nor a float64
}


def tokens_of(engine, cache, prompts, n, sampling, stops=(), chooser=None):
    """All tokens of all rows, step by step, with their log-probabilities."""
    steps = generate(
        lambda ids_BT, cache, new_B, last_only: engine.forward(ids_BT, cache, new_B),
        cache, prompts, n, sampling, stops, True, chooser=chooser,
    )  # fmt: skip
    return [token for step in steps for token in step]


def ids_of(tokens):
    """What must be the same to the last bit: all of a token but its log-probability."""
    return [(token.row, token.id, token.finish_reason) for token in tokens]


@given(models(), st.integers(1, 4), st.sampled_from([*WISHES.values()]), seeds)
def test_what_the_device_helps_to_draw_is_what_the_host_draws(model, rows, sampling, seed):
    """From logits of the same bits: the same ids, whichever rows stop; and the cache goes on."""
    c, rng = model.config, np.random.default_rng(seed)
    engine, prompts = engine_of(model.params, c), rng.integers(0, c.vocab_size, (rows, 2)).tolist()
    expected, found = (
        tokens_of(engine, cache_of(c, rows), prompts, 8, sampling, [0, 1], chooser)
        for chooser in (None, engine)
    )
    assert ids_of(found) == ids_of(expected)
    logprobs = [[token.logprob for token in tokens] for tokens in (found, expected)]
    np.testing.assert_allclose(*logprobs, atol=2**-19, rtol=0)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("wish", WISHES)
def test_one_seed_gives_one_text_on_every_device(rows, wish):
    """By the engine numpy and by this one, with rows that stop at different steps."""
    params, _ = random_params(WIDE, ("BF16",), seed=23)
    here, there = Engine(params, WIDE, profile("float32"), Pool(1)), engine_of(params, WIDE)
    prompts = np.random.default_rng(24).integers(0, 70, (rows, 3)).tolist()
    wanted = prompts, 20, WISHES[wish], range(6)
    expected = tokens_of(here, new_cache(WIDE, rows, 32), *wanted)
    found = tokens_of(there, cache_of(WIDE, rows), *wanted, there)
    assert ids_of(found) == ids_of(expected)
    if rows > 1:  # ragged
        assert len({sum(token.row == row for token in found) for row in range(rows)}) > 1


@pytest.mark.parametrize("wish", WISHES)
def test_rows_with_more_candidates_than_there_is_room_for_are_drawn_from_all(monkeypatch, wish):
    """Then their logits are copied, and the ids are the same."""
    params, _ = random_params(WIDE, ("F32",), seed=25)
    engine, found = engine_of(params, WIDE), []
    for room in (sieve.ROOM, 3):  # a part has 3 ids
        monkeypatch.setattr(sieve, "ROOM", room)
        cache = cache_of(WIDE, 2)
        found.append(tokens_of(engine, cache, [[1], [2]], 12, WISHES[wish], (), engine))
    assert ids_of(found[0]) == ids_of(found[1])
    logprobs = [[token.logprob for token in tokens] for tokens in found]
    np.testing.assert_allclose(*logprobs, atol=2**-19, rtol=0)


@pytest.mark.parametrize("wish", WISHES)
def test_a_draw_says_that_weights_are_damaged_as_the_host_does(wish):
    config = Config(8, 1, 2, 1, 4, 8, 12)
    params = llama3np.params.random(config, np.random.default_rng(1))
    params.norm_D[3] = np.nan
    with pytest.raises(InputError, match=r"^logits: expected finite numbers, found nan: the "):
        engine_of(params, config).sample([1], cache_of(config, 1), WISHES[wish], [0.5])


def test_a_draw_refuses_what_no_step_takes():
    config = Config(8, 1, 2, 1, 4, 8, 12)
    engine = engine_of(llama3np.params.random(config, np.random.default_rng(1)), config)
    with pytest.raises(InputError, match=r"^sample: expected float32 and 1 to 8 rows, found 9"):
        engine.sample([1] * 9, cache_of(config, 9), WISHES["plain"], [0.5] * 9)
    full = cache_of(config, 1, 1)
    engine.sample([1], full, WISHES["plain"], [0.5])
    with pytest.raises(InputError, match="do not fit"):
        engine.sample([1], full, WISHES["plain"], [0.5])


def full(*_):
    raise cp.cuda.memory.OutOfMemoryError(100, 50)


def nothing_page_locked(*_):
    raise cp.cuda.runtime.CUDARuntimeError(2)  # cudaErrorMemoryAllocation


@pytest.mark.parametrize("way", ["forward", "greedy", "sample"])
@pytest.mark.parametrize(
    ("module", "name", "fails"),
    [(cp, "zeros", full), (cp.cuda, "alloc_pinned_memory", nothing_page_locked)],
    ids=["device", "page-locked"],
)
def test_running_out_of_memory_is_a_sentence_and_the_next_call_goes_on(
    monkeypatch, way, module, name, fails
):
    params, _ = random_params(WIDE, ("F32",), seed=16)
    engine, cache = engine_of(params, WIDE), cache_of(WIDE, 1)
    calls = {
        "forward": lambda: engine.forward([[5]], cache),
        "greedy": lambda: engine.greedy([5], cache, 2),
        "sample": lambda: engine.sample([5], cache, WISHES["both"], [0.5]),
    }
    if way == "sample":  # the step is there already: what has no room is the sieve
        engine.forward([[5]], cache)
        cache.reset()
    with monkeypatch.context() as patch:
        patch.setattr(module, name, fails)
        with pytest.raises(InputError, match=r"^device: cuda:0 has no memory left for this"):
            calls[way]()
    assert cache.lengths_B.tolist() == [0]
    calls[way]()


# ---- what a step costs ---------------------------------------------------------------------------

COUNTED = ("launches", "graph_launches", "mallocs", "h2d", "d2h", "d2d", "syncs")


def counts(softcuda):
    found = softcuda.stats()
    return {name: found[name] for name in COUNTED if found[name]}


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_step_is_one_graph_launch_and_one_copy_back(softcuda, rows):
    """0 launches, 0 allocations, 0 copies to the device; one wait, which is for the copy."""
    params, _ = random_params(WIDE, ("Q4_K",), seed=18)
    engine, cache = engine_of(params, WIDE), cache_of(WIDE, rows)
    with strict():
        for _ in range(2):
            engine.forward([[1]] * rows, cache)
        softcuda.reset()
        engine.forward([[1]] * rows, cache)
        assert counts(softcuda) == {"graph_launches": 1, "d2h": 1, "syncs": 1}
        assert softcuda.stats()["d2h_bytes"] == rows * WIDE.vocab_size * 4


def test_greedy_steps_are_a_graph_launch_each_and_one_copy_back_in_all(softcuda):
    params, _ = random_params(WIDE, ("BF16",), seed=19)
    engine, cache = engine_of(params, WIDE), cache_of(WIDE, 1)
    with strict():
        for _ in range(2):  # launch by launch, and captured
            engine.greedy([1], cache, 2)
        for n in (20, 1):
            softcuda.reset()
            engine.greedy([1], cache, n)
            assert counts(softcuda) == {"graph_launches": n, "d2h": 1, "syncs": 1}
            assert softcuda.stats()["d2h_bytes"] == 16 * n


LARGE = Config(32, 1, 2, 1, 16, 32, 9000)  # a vocabulary of more ids than candidates are copied


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_step_that_draws_is_one_graph_launch_and_one_small_copy_back(softcuda, rows):
    """Whatever is wished for: the same graph reads temperature, top-k, top-p and random numbers."""
    params, _ = random_params(LARGE, ("F32",), seed=26)
    engine, cache = engine_of(params, LARGE), cache_of(LARGE, rows)
    numbers_B = np.linspace(0, 0.99, rows)
    with strict():
        for _ in range(2):  # launch by launch, and captured
            engine.sample([1] * rows, cache, WISHES["top-k"], numbers_B)
        for wish in ("plain", "top-k", "both"):
            softcuda.reset()
            engine.sample([1] * rows, cache, WISHES[wish], numbers_B)
            assert counts(softcuda) == {"graph_launches": 1, "d2h": 1, "syncs": 1}
            assert softcuda.stats()["d2h_bytes"] == rows * (5 * 8 + 4096 * 8)


@pytest.mark.parametrize(
    ("formats", "a_layer"), [(("BF16",), 7), (AS_IN_Q4_K_M, 8)], ids=["one format", "as in Q4_K_M"]
)
def test_a_step_launch_by_launch_is_at_most_9_a_layer(softcuda, formats, a_layer):
    engines = [engine_of(random_params(c, formats, seed=20)[0], c) for c in map(layered, (1, 3))]
    found = []
    for engine in engines:
        cache = cache_of(engine.config, 1)
        engine.forward([[1]], cache)  # compiles
        other = cache_of(engine.config, 1)
        step = engine._step(other)
        softcuda.reset()
        step.forward(np.array([1]), np.array([0]))
        found.append(softcuda.stats()["launches"])
    assert (found[1] - found[0]) / 2 == a_layer <= 9
    assert found[0] == a_layer + 3  # obey, embed, head


def layered(n):
    c = WIDE
    return Config(
        c.dim, n, c.n_heads, c.n_kv_heads, c.head_dim, c.ffn_dim, c.vocab_size, tied=False
    )


# Wide enough that what passes between kernels is little beside the weights, as in a real model.
REAL = Config(512, 2, 8, 2, 64, 1536, 2048, tied=False)


def between_kernels(config, slots):
    """Bytes of one row that one kernel of a step leaves for the next, and that one reads."""
    c, heads = config, config.n_heads * config.head_dim
    qkv, stretches = heads + 2 * c.n_kv_heads * c.head_dim, -(-slots // STRETCH)
    # The residual stream is read by two norms and changed twice; see step.py for the others.
    a_layer = 6 * c.dim + 2 * qkv + (4 + 2 * stretches) * heads + 2 * c.ffn_dim
    return 4 * (2 * c.dim + c.n_layers * a_layer)


@pytest.mark.parametrize("rows", [1, 8])
@pytest.mark.parametrize("format", ["BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K"])
def test_a_step_touches_little_but_weights_cache_and_logits(softcuda, format, rows):
    """At most 1.03 times their bytes for a row; for more, the weights are not read more often."""
    if softcuda.executor != "ptx":
        pytest.skip("the executor ptx counts bytes: SOFTCUDA_EXECUTOR=ptx")
    params, _ = random_params(REAL, (format,), seed=21)
    engine, cache = engine_of(params, REAL), cache_of(REAL, rows, 512, "float16")
    cache.lengths_B = np.full(rows, 400)
    engine.forward([[1]] * rows, cache)
    softcuda.config(touch=True)
    softcuda.reset()
    engine.forward([[1]] * rows, cache)
    found = softcuda.stats()["touched_bytes"]
    softcuda.config(touch=False)
    tensors = named(engine.params, REAL.tied)
    weights = sum(w.nbytes for name, w in tensors.items() if name != "embed_VD")
    held = cache.nbytes * 402 // 512
    needed = weights + held + rows * REAL.vocab_size * 4
    passed_on = 0 if rows == 1 else rows * between_kernels(REAL, 402)
    assert weights + held <= found <= 1.03 * (needed + passed_on)


# ---- schedules -----------------------------------------------------------------------------------


@pytest.mark.skipif(devices.kind != devices.SOFT, reason="a GPU has its own schedules")
@pytest.mark.parametrize("format", ["BF16", "Q8_0", "Q4_K"])
def test_logits_have_the_same_bits_in_every_order_of_threads(format):
    params, _ = random_params(WIDE, (format,), seed=22)
    engine, ids = engine_of(params, WIDE), [[1], [2], [3]]
    found = []
    for sched in range(3):
        with strict(sched=sched):
            cache = cache_of(WIDE, 3)
            found.append([engine.forward(ids, cache) for _ in range(3)])
    for other in found[1:]:
        assert_same(np.array(other), np.array(found[0]), "logits")

"""The engines against the oracle: whole models, over threads, storage, ragged rows and splits."""

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import time
import tracemalloc
import weakref
from concurrent.futures import ThreadPoolExecutor

import devices
import ml_dtypes
import numpy as np
import pytest
from checks import assert_close, assert_same, difference
from devices import to_host
from hypothesis import given, settings
from hypothesis import strategies as st
from noise import NOISE, ULP32, noise, oracle_taps, short_noise
from strategies import SHORT, STORED, models, padded, ragged_runs, runs, splits

import llama3np.params
from llama3np import model as spec
from llama3np.cache import Cache, new_cache
from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.kernels import Joined, stored
from llama3np.kernels.engine import ENGINES, make_engine
from llama3np.kernels.ggml import SCALES
from llama3np.llm import Llama
from llama3np.load.files import map_file, view
from llama3np.numerics import profile, short_params
from llama3np.params import from_named, named
from llama3np.selftest import blocks

threads = st.integers(1, 3)
dtypes = st.sampled_from(["float32", *SHORT])
everywhere = pytest.mark.parametrize("name", [*ENGINES, *devices.ENGINES_THERE])
FEWER = settings(max_examples=settings().max_examples * 2 // 3)  # for each of several engines


def engine_of(model, name, threads=2, dtype="float32"):
    """The engine, the weights on its own device."""
    if name not in ENGINES:
        return on_device(model, name, dtype).engine
    chosen = profile(dtype)
    params = short_params(model.params, chosen.dtype) if chosen.short else model.params
    return make_engine(name, threads, stored(params), model.config, chosen)


def on_device(model, name, dtype="float32"):
    return Llama(model.config, model.params, dtype=dtype, max_seq_len=32, **devices.placed(name))


def fed(engine, cache, ids, parts, last_only=False):
    """Logits of all ids of one row, fed in parts of these sizes."""
    logits, start = [], 0
    for size in parts:
        logits.append(engine.forward([ids[start : start + size]], cache, last_only=last_only)[0])
        start += size
    return np.concatenate(logits)


def cache_for(model, rows, slots=16, dtype="float32", name="numpy"):
    """An empty cache, on the device of the engine of that name."""
    xp = np if name in ENGINES else devices.cupy
    return new_cache(model.config, rows, slots, profile(dtype).dtype, xp)


# ---- the numbers --------------------------------------------------------------------------------


@everywhere
@FEWER
@given(runs(), threads, st.data())
def test_an_engine_is_as_near_the_oracle_as_float32_is(name, run_of, threads, data):
    """For prefill, decode and all between."""
    model, ids = run_of
    parts = data.draw(splits(len(ids)))
    found = fed(engine_of(model, name, threads), cache_for(model, 1, name=name), ids, parts)
    assert type(found) is np.ndarray
    assert found.dtype == np.float32
    truth = oracle_taps(model, ids)
    allowed = NOISE * (noise(model, ids, truth)["logits"] + ULP32)
    assert_close(found, truth["logits"], allowed, "logits")


@everywhere
@FEWER
@given(runs(), st.data())
def test_in_float64_an_engine_is_the_oracle(name, run_of, data):
    model, ids = run_of
    engine = engine_of(model, name, dtype="float64")
    cache = cache_for(model, 1, dtype="float64", name=name)
    found = fed(engine, cache, ids, data.draw(splits(len(ids))))
    assert_close(found, oracle_taps(model, ids)["logits"], 1e-10, "logits")


@everywhere
@settings(max_examples=20)
@given(runs(), threads, st.sampled_from(SHORT), st.data())
def test_in_16_bits_an_engine_is_as_near_the_oracle_as_they_allow(
    name, run_of, threads, dtype, data
):
    """For prefill, decode and all between; the cache holds 16 bits too, logits are widened."""
    model, ids = run_of
    engine = engine_of(model, name, threads, dtype)
    cache = cache_for(model, 1, dtype=dtype, name=name)
    found = fed(engine, cache, ids, data.draw(splits(len(ids))))
    truth = oracle_taps(model, ids)
    allowed = short_noise(model, ids, truth, engine.profile.dtype)["logits"]
    assert found.dtype == np.float32
    assert {str(array.dtype) for array in (*cache.k, *cache.v)} == {engine.profile.dtype}
    assert_close(found, truth["logits"], allowed, "logits")


@everywhere
@FEWER
@given(ragged_runs(), st.booleans(), st.data())
def test_rows_of_a_ragged_batch_equal_each_row_alone(name, run_of, last_only, data):
    """To the last bit in a compiled step, which never mixes rows."""
    model, rows, pad = run_of
    engine = engine_of(model, name)
    ids_BT, lengths = padded(rows, pad)
    cache = cache_for(model, len(rows), name=name)
    for size in data.draw(splits(ids_BT.shape[1])):
        done = cache.lengths_B
        start = int(done.max())
        new_B = np.clip(np.array(lengths) - start, 0, size)
        found = engine.forward(ids_BT[:, start : start + size], cache, new_B, last_only=last_only)
        for b, ids in enumerate(rows):
            if new_B[b] == 0:
                continue
            alone_cache = cache_for(model, 1, name=name)
            alone = fed(engine, alone_cache, ids[: start + new_B[b]], [start + new_B[b]])[start:]
            expected = alone[-1:] if last_only else alone
            actual = found[b] if last_only else found[b, : new_B[b]]
            truth = oracle_taps(model, ids)
            allowed = 2 * NOISE * (noise(model, ids, truth)["logits"] + ULP32)
            assert_close(actual, expected, allowed, f"row {b}")
        if start + size >= ids_BT.shape[1]:
            break
        if len(set(lengths)) > 1 and (np.array(lengths) <= start + size).any():
            break  # rows have parted: their columns are no longer those of ids_BT


@everywhere
@FEWER
@given(models(), st.integers(2, 12), dtypes)
def test_an_idle_row_changes_nothing_and_is_not_changed(name, model, extra, dtype):
    engine = engine_of(model, name, dtype=dtype)
    cache = cache_for(model, 3, 32, dtype, name)
    ids = [i % model.config.vocab_size for i in range(extra)]
    engine.forward([ids, ids, ids], cache)
    before = [k[1].copy() for k in cache.k]
    engine.forward([[0], [0], [0]], cache, [1, 0, 1])
    assert cache.lengths_B.tolist() == [extra + 1, extra, extra + 1]
    assert all((k[1] == old).all() for k, old in zip(cache.k, before, strict=True))


# ---- every format -------------------------------------------------------------------------------

WIDE = Config(256, 2, 8, 2, 32, 512, 70, tied=False)  # whole blocks of 256 in every row
STEPS = (40, 1, 1, 3, 12, 1)  # tokens of each call: prefill, decode, and what lies between


def shards(w, axis):
    """A bfloat16 matrix in two parts, as Meta's files hold it."""
    return Joined(np.split(w.astype(ml_dtypes.bfloat16), 2, axis), axis)


def params_of(kind, config, rng):
    """Random weights, all matrices of one kind."""
    params = llama3np.params.random(config, rng)

    def change(name, w):
        if w.ndim == 1:
            return w
        if kind in SCALES:
            return blocks(kind, w.shape, rng)
        if kind == "shards":
            return shards(w, 1 if name.endswith(("wo", "w_down", "embed_VD")) else 0)
        return w.astype(ml_dtypes.bfloat16 if kind == "bfloat16" else kind)

    changed = {name: change(name, w) for name, w in named(params, config.tied).items()}
    return from_named(changed, config)


def widened(params, config):
    tensors = {name: np.asarray(w) for name, w in named(params, config.tied).items()}
    return from_named({n: w.astype(np.float64) for n, w in tensors.items()}, config)


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("kind", [*STORED, "shards", *SCALES])
def test_every_format_gives_the_logits_of_its_widened_weights(name, kind):
    """Within the noise of float32, which the plain forward pass of the same weights shows."""
    config, rng = WIDE, np.random.default_rng(3)
    params = params_of(kind, config, rng)
    plain = widened(params, config)
    narrow = from_named(
        {n: w.astype(np.float32) for n, w in named(plain, config.tied).items()}, config
    )
    ids = rng.integers(0, config.vocab_size, sum(STEPS)).tolist()
    logits = {}
    for dtype, weights in (("float64", plain), ("float32", narrow)):
        cache = new_cache(config, 1, len(ids), dtype)
        logits[dtype], _ = spec.forward(weights, config, [ids], cache, dtype=dtype, last_only=False)
    engine = make_engine(name, 2, stored(params), config, profile("float32"))
    found = fed(engine, new_cache(config, 1, len(ids)), ids, STEPS)
    truth = logits["float64"][0]
    allowed = NOISE * (difference(logits["float32"][0], truth) + ULP32)
    assert_close(found, truth, allowed, "logits")


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("stored_as", ["bfloat16", "float16"])
def test_a_short_cache_is_that_of_rounded_keys_and_values(name, stored_as):
    """The same in decode steps and in prefill, in every engine: as the spec does it."""
    rng = np.random.default_rng(5)
    params = llama3np.params.random(WIDE, rng)
    ids = rng.integers(0, WIDE.vocab_size, sum(STEPS)).tolist()
    expected, _ = spec.forward(
        params, WIDE, [ids], new_cache(WIDE, 1, len(ids), stored_as), last_only=False
    )
    engine = make_engine(name, 2, params, WIDE, profile("float32"))
    found = fed(engine, new_cache(WIDE, 1, len(ids), stored_as), ids, STEPS)
    # A key that lies on the edge between two bf16 numbers may go either way: a unit of 2^-8 of one
    # number in 32, of one key, where equal arithmetic is 2^-24 apart.
    assert_close(found, expected[0], 2**-8, "logits")
    assert difference(found, expected[0]) > 0 or name == "numpy"


def test_bf16_mm_rounds_activations_as_they_enter_a_product():
    """Both engines: against float64 arithmetic on rounded numbers, and not against float32."""
    rng = np.random.default_rng(7)
    params = params_of("bfloat16", WIDE, rng)
    ids = rng.integers(0, WIDE.vocab_size, sum(STEPS)).tolist()
    plain = widened(params, WIDE)

    def rounding(x_BTD, w):
        return spec.linear(x_BTD.astype(ml_dtypes.bfloat16).astype(np.float64), w)

    expected, exact = (
        spec.forward(
            plain, WIDE, [ids], new_cache(WIDE, 1, len(ids), "float64"), dtype="float64", ops=ops,
            last_only=False,
        )[0][0]
        for ops in (spec.PLAIN._replace(linear=rounding), spec.PLAIN)
    )  # fmt: skip
    floor = difference(expected, exact)  # what rounding itself does
    for name in ENGINES:
        engine = make_engine(name, 2, stored(params), WIDE, profile("bf16-mm"))
        found = fed(engine, new_cache(WIDE, 1, len(ids)), ids, STEPS)
        assert difference(found, expected) < floor / 2, name
        assert difference(found, exact) > floor / 2, name


def test_bf16_mm_refuses_other_weights_by_name():
    params = llama3np.params.random(WIDE, np.random.default_rng(0))
    with pytest.raises(InputError, match="embed_VD: the profile bf16-mm multiplies bfloat16"):
        Llama(WIDE, params, dtype="bf16-mm")


@pytest.mark.parametrize("name", ENGINES)
def test_no_engine_holds_a_widened_matrix(name):
    """Traced from loading to decoding: all that is held is smaller than any one of the matrices."""
    config = Config(512, 1, 4, 2, 128, 32768, 64)
    params = params_of("Q4_0", config, np.random.default_rng(1))
    whole = 4 * config.dim * config.ffn_dim  # bytes of w_gate in float32: 67 MB
    tracemalloc.start()
    llm = Llama(config, params, engine=name, threads=2, max_seq_len=64)
    tracemalloc.reset_peak()
    llm.generate([[1, 2, 3, 4] * 5], max_new_tokens=3)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < whole / 2


# ---- the same bits ------------------------------------------------------------------------------


@everywhere
@FEWER
@given(runs(min_tokens=2), threads, dtypes, st.data())
def test_bits_are_the_same_run_after_run(name, run_of, threads, dtype, data):
    model, ids = run_of
    parts = data.draw(splits(len(ids)))
    first, second = (
        fed(
            engine_of(model, name, threads, dtype),
            cache_for(model, 1, dtype=dtype, name=name),
            ids,
            parts,
        )
        for _ in range(2)
    )
    assert_same(first, second, "logits")


@given(runs(min_tokens=2))
def test_bits_of_compiled_steps_do_not_depend_on_the_number_of_threads(run_of):
    model, ids = run_of
    one, *more = (
        fed(engine_of(model, "numba", threads), cache_for(model, 1), ids, [1] * len(ids))
        for threads in (1, 2, 3, 7)
    )
    for other in more:
        assert_same(other, one, "logits")


@pytest.mark.parametrize("stored", STORED)
@pytest.mark.parametrize("name", ENGINES)
@given(runs(min_tokens=2), st.integers(2, 5))
def test_several_python_threads_may_use_one_model_at_once(name, stored, run_of, callers):
    model, ids = run_of
    llm = Llama(model.config, model.params, engine=name, threads=2, max_seq_len=32)
    expected = llm.generate([ids], max_new_tokens=6, logprobs=True)
    start = threading.Barrier(callers)

    def call(_):
        start.wait()
        return llm.generate([ids], max_new_tokens=6, logprobs=True)

    with ThreadPoolExecutor(callers) as pool:
        assert all(found == expected for found in pool.map(call, range(callers)))


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize("name", ENGINES)
def test_a_forked_process_has_threads_of_its_own(name):
    config = Config(64, 2, 4, 2, 16, 96, 50)
    llm = Llama(
        config, llama3np.params.random(config, np.random.default_rng(0)), engine=name, threads=2
    )
    expected = llm.forward([[1, 2, 3]])
    child = os.fork()
    if child == 0:
        same = (llm.forward([[1, 2, 3]]) == expected).all()
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


# ---- what is asked for --------------------------------------------------------------------------


@everywhere
@FEWER
@given(runs(), st.sampled_from(["float32", "float64"]))
def test_a_tap_is_shown_the_oracles_numbers_in_order(name, run_of, dtype):
    """By every engine, in the dtype of the profile, on the device that computed them."""
    model, ids = run_of
    xp = np if name in ENGINES else devices.cupy
    taps = {}

    def tap(tapped, array):
        assert isinstance(array, xp.ndarray)
        assert array.dtype == dtype
        taps[tapped] = to_host(array)[0].copy()

    cache = cache_for(model, 1, dtype=dtype, name=name)
    engine_of(model, name, dtype=dtype).forward([ids], cache, tap=tap, last_only=False)
    truth = oracle_taps(model, ids)
    floors = noise(model, ids, truth)
    assert list(taps) == list(truth)
    for tapped, expected in truth.items():
        found = taps[tapped]
        allowed = 1e-10 if dtype == "float64" else NOISE * (floors[tapped] + ULP32)
        assert_close(found, expected.reshape(found.shape), allowed, tapped)


def test_an_unknown_engine_is_refused(tmp_path):
    with pytest.raises(InputError, match="engine: expected one of numpy, numba, found 'torch'"):
        make_engine("torch", None, None, None, None)


def test_without_numba_numpy_is_the_engine(monkeypatch):
    monkeypatch.setitem(sys.modules, "llama3np.kernels.cpu.engine", None)
    config = Config(8, 1, 2, 1, 4, 8, 9)
    params = llama3np.params.random(config, np.random.default_rng(0))
    assert Llama(config, params).engine.name == "numpy"
    with pytest.raises(InputError, match="engine: numba cannot be imported"):
        Llama(config, params, engine="numba")


def test_numba_told_to_interpret_is_no_engine():
    """In a process of its own: what reads the setting reads it when it is imported."""
    code = "from llama3np.kernels.engine import engine_class; engine_class('numba')"
    env = os.environ | {"NUMBA_DISABLE_JIT": "1"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 1
    last = done.stderr.splitlines()[-1]
    assert last.startswith("llama3np.errors.InputError: engine: numba cannot be imported")
    assert "NUMBA_DISABLE_JIT is set" in last


def test_a_cache_of_several_kinds_is_refused():
    """Compiled code is told one dtype and one size for all of its arrays."""
    config = Config(8, 2, 2, 1, 4, 8, 9)
    one, other = new_cache(config, 1, 8), new_cache(config, 1, 8, "float16")
    longer = new_cache(config, 1, 16)
    for k, v in ((one.k, other.v), (one.k, longer.v), (one.k, one.v[:1])):
        with pytest.raises(InputError, match="cache: expected keys and values all of one kind"):
            Cache(k, v, one.lengths_B)


@pytest.mark.parametrize("name", ENGINES)
def test_a_cache_of_views_is_written_where_it_lies(name):
    config, ids = Config(8, 2, 2, 1, 4, 8, 9), [[1, 2], [3, 4]]
    engine = make_engine(name, 2, llama3np.params.random(config, np.random.default_rng(0)), config,
                         profile("float32"))  # fmt: skip
    base, plain = new_cache(config, 2, 32), new_cache(config, 2, 16)
    k, v = ([array[:, :, :16] for array in arrays] for arrays in (base.k, base.v))
    found = engine.forward(ids, Cache(k, v, base.lengths_B))
    assert_close(found, engine.forward(ids, plain), 32 * ULP32, "logits")
    for array, expected in zip(base.k, plain.k, strict=True):
        assert_close(array[:, :, :16], expected, 32 * ULP32, "keys")
        assert not array[:, :, 16:].any()


@pytest.mark.parametrize("name", ENGINES)
def test_a_weight_of_one_repeated_row_is_multiplied(name):
    """Its rows lie on each other, as those of np.broadcast_to do."""
    config = Config(8, 1, 2, 1, 4, 8, 9, tied=False)
    params = llama3np.params.random(config, np.random.default_rng(0))
    row_D = np.random.default_rng(1).standard_normal(8, np.float32)
    params = params._replace(head_VD=np.broadcast_to(row_D, (9, 8)))
    whole = params._replace(head_VD=np.array(params.head_VD))
    found, expected = (
        make_engine(name, 2, p, config, profile("float32")).forward([[1]], new_cache(config, 1, 4))
        for p in (params, whole)
    )
    assert_close(found, expected, 8 * ULP32, "logits")


@pytest.mark.parametrize("name", ENGINES)
def test_bits_are_the_same_in_every_python_thread(name):
    """BLAS computes on the thread that calls it, whichever asked for that first."""
    params = params_of("bfloat16", WIDE, np.random.default_rng(2))
    llm = Llama(WIDE, params, engine=name, threads=2, max_seq_len=700)
    ids = np.random.default_rng(3).integers(0, WIDE.vocab_size, 600).tolist()
    expected, found = llm.forward(ids), []
    thread = threading.Thread(target=lambda: found.append(llm.forward(ids)))
    thread.start()
    thread.join()
    assert_same(found[0], expected, "logits")


@pytest.mark.parametrize("name", ENGINES)
def test_a_model_is_freed_when_nobody_has_it(name):
    config = Config(8, 1, 2, 1, 4, 8, 9)
    llm = Llama(config, llama3np.params.random(config, np.random.default_rng(0)), engine=name)
    llm.generate([[1]], max_new_tokens=2)
    engine = weakref.ref(llm.engine)
    gc.disable()
    try:
        del llm
        until = time.monotonic() + 20  # a helper may be about to finish its last job
        while engine() is not None and time.monotonic() < until:
            time.sleep(0.01)
        assert engine() is None
    finally:
        gc.enable()


def mapped(params, config, path):
    """The same weights in a mapped file, read-only."""
    weights = {name: np.asarray(w) for name, w in named(params, config.tied).items()}
    path.write_bytes(b"".join(w.tobytes() for w in weights.values()))
    data, ends = map_file(path), np.cumsum([w.nbytes for w in weights.values()]).tolist()
    return from_named(
        {
            name: view(data, w.dtype, w.shape, end - w.nbytes)
            for (name, w), end in zip(weights.items(), ends, strict=True)
        },
        config,
    )


@pytest.mark.parametrize("name", ENGINES)
@pytest.mark.parametrize("kind", ["bfloat16", "mapped", "shards", "Q4_0"])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda llm: pickle.loads(pickle.dumps(llm))])
def test_a_copy_of_a_model_has_weights_and_threads_of_its_own(name, kind, copied, tmp_path):
    params = params_of("bfloat16" if kind == "mapped" else kind, WIDE, np.random.default_rng(4))
    if kind == "mapped":
        params = mapped(params, WIDE, tmp_path / "weights")
    llm = Llama(WIDE, params, engine=name, threads=2)
    ids = np.random.default_rng(5).integers(0, WIDE.vocab_size, 12).tolist()
    expected = llm.forward(ids), llm.forward(ids[:1])
    other = copied(llm)
    assert other.engine.params is other.params
    assert other.engine.pool is not llm.engine.pool
    assert other.params.head_VD is not llm.params.head_VD
    del llm, params  # their memory goes
    for found, logits in zip((other.forward(ids), other.forward(ids[:1])), expected, strict=True):
        assert_same(found, logits, "logits")


@pytest.mark.parametrize("threads", [0, -1, 10**6, 1.5, True])
def test_a_number_of_threads_that_cannot_be_is_refused_before_a_file_is_opened(threads):
    with pytest.raises(InputError, match="threads: expected a whole number from 1 to"):
        llama3np.load("nowhere", threads=threads)


def test_a_step_that_is_broken_off_is_over_when_the_caller_goes_on():
    """What helpers have begun is finished first: it is in the caller's own cache."""
    llm = Llama(WIDE, llama3np.params.random(WIDE, np.random.default_rng(0)), engine="numba")
    cache = llm.new_cache(1, 16)
    expected = llm.forward([1], llm.new_cache(1, 16))
    begun = []

    def broken_off(job):
        begun.append(threading.Thread(target=job, args=(1,)))
        begun[0].start()
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(llm.engine.pool, "run", broken_off)
        with pytest.raises(KeyboardInterrupt):
            llm.forward([1], cache)
    key = cache.k[-1].copy()
    begun[0].join()
    assert key.any()  # written in full
    assert_same(cache.k[-1], key, "keys")
    assert cache.lengths_B.tolist() == [0]
    assert_same(llm.forward([1], cache), expected, "logits")

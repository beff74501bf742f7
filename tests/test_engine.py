"""The engines against the oracle: whole models, over threads, storage, ragged rows and splits."""

import os
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from checks import assert_close, assert_same
from hypothesis import given
from hypothesis import strategies as st
from noise import NOISE, ULP32, noise, oracle_taps
from strategies import STORED, models, padded, ragged_runs, runs, splits, token_ids

from llama3np import model as spec
from llama3np.errors import InputError
from llama3np.kernels import stored
from llama3np.kernels.engine import ENGINES, make_engine
from llama3np.llm import Llama
from llama3np.numerics import profile

engines = st.sampled_from(ENGINES)
threads = st.integers(1, 3)


def engine_of(model, name, threads=2, dtype="float32"):
    return make_engine(name, threads, stored(model.params), model.config, profile(dtype))


def fed(engine, cache, ids, parts, last_only=False):
    """Logits of all ids of one row, fed in parts of these sizes."""
    logits, start = [], 0
    for size in parts:
        logits.append(engine.forward([ids[start : start + size]], cache, last_only=last_only)[0])
        start += size
    return np.concatenate(logits)


def cache_for(model, rows, slots=16, dtype="float32"):
    return Llama(model.config, model.params, kv_dtype=None, dtype=dtype).new_cache(rows, slots)


# ---- the numbers --------------------------------------------------------------------------------


@given(runs(), engines, threads, st.data())
def test_an_engine_is_as_near_the_oracle_as_float32_is(run_of, name, threads, data):
    """For prefill, decode and all between."""
    model, ids = run_of
    parts = data.draw(splits(len(ids)))
    found = fed(engine_of(model, name, threads), cache_for(model, 1), ids, parts)
    truth = oracle_taps(model, ids)
    allowed = NOISE * (noise(model, ids, truth)["logits"] + ULP32)
    assert_close(found, truth["logits"], allowed, "logits")


@given(runs(), engines, st.data())
def test_in_float64_an_engine_is_the_oracle(run_of, name, data):
    model, ids = run_of
    engine, cache = engine_of(model, name, dtype="float64"), cache_for(model, 1, dtype="float64")
    found = fed(engine, cache, ids, data.draw(splits(len(ids))))
    assert_close(found, oracle_taps(model, ids)["logits"], 1e-10, "logits")


@given(ragged_runs(), engines, st.booleans(), st.data())
def test_rows_of_a_ragged_batch_equal_each_row_alone(run_of, name, last_only, data):
    """To the last bit in a compiled step, which never mixes rows."""
    model, rows, pad = run_of
    engine = engine_of(model, name)
    ids_BT, lengths = padded(rows, pad)
    cache = cache_for(model, len(rows))
    for size in data.draw(splits(ids_BT.shape[1])):
        done = cache.lengths_B
        start = int(done.max())
        new_B = np.clip(np.array(lengths) - start, 0, size)
        found = engine.forward(ids_BT[:, start : start + size], cache, new_B, last_only=last_only)
        for b, ids in enumerate(rows):
            if new_B[b] == 0:
                continue
            alone_cache = cache_for(model, 1)
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


@given(models(), st.integers(2, 12), engines)
def test_an_idle_row_changes_nothing_and_is_not_changed(model, extra, name):
    engine, cache = engine_of(model, name), cache_for(model, 3, 32)
    ids = [i % model.config.vocab_size for i in range(extra)]
    engine.forward([ids, ids, ids], cache)
    before = [k[1].copy() for k in cache.k]
    engine.forward([[0], [0], [0]], cache, [1, 0, 1])
    assert cache.lengths_B.tolist() == [extra + 1, extra, extra + 1]
    assert all((k[1] == old).all() for k, old in zip(cache.k, before, strict=True))


# ---- the same bits ------------------------------------------------------------------------------


@given(runs(min_tokens=2), engines, threads)
def test_bits_are_the_same_run_after_run(run_of, name, threads):
    model, ids = run_of
    first, second = (
        fed(engine_of(model, name, threads), cache_for(model, 1), ids, [1] * len(ids))
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
    from llama3np.config import Config
    from llama3np.params import random

    config = Config(64, 2, 4, 2, 16, 96, 50)
    llm = Llama(config, random(config, np.random.default_rng(0)), engine=name, threads=2)
    expected = llm.forward([[1, 2, 3]])
    child = os.fork()
    if child == 0:
        same = (llm.forward([[1, 2, 3]]) == expected).all()
        os._exit(0 if same else 1)
    assert os.waitpid(child, 0)[1] == 0


# ---- what is asked for --------------------------------------------------------------------------


@given(models(), st.data())
def test_a_tap_is_shown_everything_by_every_engine(model, data):
    ids = data.draw(token_ids(model.config.vocab_size))
    for name in ENGINES:
        seen = []
        engine = engine_of(model, name)
        engine.forward([ids], cache_for(model, 1), tap=lambda tap, _: seen.append(tap))  # noqa: B023
        expected = []
        cache = cache_for(model, 1)
        spec.forward(
            model.params,
            model.config,
            [ids],
            cache,
            tap=lambda tap, _: expected.append(tap),  # noqa: B023
        )
        assert seen == expected


def test_an_unknown_engine_is_refused(tmp_path):
    with pytest.raises(InputError, match="engine: expected one of numpy, numba, found 'torch'"):
        make_engine("torch", None, None, None, None)


def test_without_numba_numpy_is_the_engine(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "llama3np.kernels.cpu.engine", None)
    from llama3np.config import Config
    from llama3np.params import random

    config = Config(8, 1, 2, 1, 4, 8, 9)
    params = random(config, np.random.default_rng(0))
    assert Llama(config, params).engine.name == "numpy"
    with pytest.raises(InputError, match="engine: numba cannot be imported"):
        Llama(config, params, engine="numba")

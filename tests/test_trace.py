"""crosscheck/trace.py: what is recorded is what the oracle computes, however it was fed."""

import numpy as np
import oracle
import pytest
from checks import assert_close, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from noise import NOISE, noise
from strategies import runs

import llama3np
from llama3np.config import PAIRINGS, Config
from llama3np.crosscheck import files, taps, trace
from llama3np.errors import InputError
from llama3np.llm import Llama
from llama3np.params import random

TINY = Config(
    dim=16, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=4, ffn_dim=20, vocab_size=30,
    context_length=64, rope_pairing="half",
)  # fmt: skip


def llama(model, dtype="float32"):
    return Llama(model.config, model.params, dtype=dtype, engine="numpy", threads=1)


@pytest.fixture(scope="module")
def tiny():
    return Llama(TINY, random(TINY, np.random.default_rng(0)), engine="numpy", threads=1)


@st.composite
def prefilled(draw, **fixed):
    """(model, ids, prefill): a run and how many of its tokens go first."""
    model, ids = draw(runs(**fixed))
    return model, ids, draw(st.none() | st.integers(1, len(ids)))


# ---- what is recorded ---------------------------------------------------------------------------


@settings(max_examples=30)
@given(prefilled())
def test_a_trace_is_the_oracles_within_the_noise_of_float32(run):
    """All at once, or through the cache: scalar loops that know no cache say the same."""
    model, ids, prefill = run
    truth = oracle.forward(model.tensors, model.sizes, ids)
    floors = noise(model, ids, truth)
    found = trace.record(llama(model), ids, prefill).arrays
    assert list(found) == list(truth)
    for name, expected in truth.items():
        assert found[name].dtype == np.float32
        assert_close(found[name], expected, NOISE * floors[name], f"{name} of prefill {prefill}")


@settings(max_examples=30)
@given(prefilled())
def test_a_trace_of_float64_does_not_depend_on_the_split(run):
    """To the last bits of float64: nothing on the way is float32."""
    model, ids, prefill = run
    llm = llama(model, "float64")
    whole, split = trace.record(llm, ids).arrays, trace.record(llm, ids, prefill).arrays
    assert list(whole) == list(split)
    for name, expected in whole.items():
        assert split[name].dtype == np.float64
        assert_close(split[name], expected, 1e-11, name)
        assert_same(np.isfinite(split[name]), np.isfinite(expected), f"the mask of {name}")


@given(prefilled())
def test_names_order_and_shapes_are_those_of_the_table(run):
    model, ids, prefill = run
    found = trace.record(llama(model), ids, prefill).arrays
    assert list(found) == taps.order(model.config.n_layers)
    for name, array in found.items():
        assert array.shape == taps.shape(name, model.config, len(ids), len(ids))


@settings(max_examples=20)
@given(runs(), st.sampled_from(["bf16-meta", "bf16-hf", "f16-hf"]))
def test_16_bits_are_recorded_in_float32_without_loss(run, profile):
    model, ids = run
    llm, shown = llama(model, profile), {}
    llm.forward(ids, tap=lambda name, array: shown.setdefault(name, np.array(array[0])))
    found = trace.record(llm, ids).arrays
    for name, expected in shown.items():
        assert_same(found[name], expected.astype(np.float32), name)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_heads_are_shown_in_one_order_whatever_the_checkpoint(pairing):
    """The same function in both orders of rows gives the same trace."""
    from llama3np.load.names import with_pairing

    params = random(TINY, np.random.default_rng(0))
    config, turned = with_pairing(TINY, params, pairing)
    expected = trace.record(Llama(TINY, params, engine="numpy"), [1, 2, 3]).arrays
    found = trace.record(Llama(config, turned, engine="numpy"), [1, 2, 3]).arrays
    for name in expected:
        assert_close(found[name], expected[name], 1e-5, name)


# ---- selections ---------------------------------------------------------------------------------


@st.composite
def selections(draw):
    """(model, ids, prefill, layers, positions, taps): any of them None."""
    model, ids, prefill = draw(prefilled())
    some = lambda n: st.none() | st.sets(st.integers(0, n - 1), min_size=1)  # noqa: E731
    kinds = st.none() | st.sets(st.sampled_from(sorted(taps.DIMS)), min_size=1)
    return model, ids, prefill, draw(some(model.config.n_layers)), draw(some(len(ids))), draw(kinds)


@given(selections())
def test_a_selection_is_cut_out_of_the_whole_trace(chosen):
    model, ids, prefill, layers, positions, kinds = chosen
    llm = llama(model)
    whole = trace.record(llm, ids, prefill)
    part = trace.record(llm, ids, prefill, layers, positions, kinds)
    rows = sorted(range(len(ids)) if positions is None else positions)
    wanted = []
    for name in whole.arrays:
        layer, tap = taps.parse(name)
        if (layer is None or layers is None or layer in layers) and (kinds is None or tap in kinds):
            wanted.append(name)
    assert list(part.arrays) == wanted
    assert part.meta["positions"] == rows
    for name in wanted:
        axis = taps.DIMS[taps.parse(name)[1]].index("T")
        assert_same(part.arrays[name], np.take(whole.arrays[name], rows, axis), name)


def test_a_selection_may_be_in_any_order_and_name_one_twice(tiny):
    found = trace.record(tiny, [1, 2, 3, 4], 2, [2, 0, 2], [3, 1, 3], ["q", "logits", "q"])
    expected = trace.record(tiny, [1, 2, 3, 4], 2, [0, 2], [1, 3], ["logits", "q"])
    assert list(found.arrays) == list(expected.arrays)
    assert found.meta == expected.meta
    for name in expected.arrays:
        assert_same(found.arrays[name], expected.arrays[name], name)


@given(selections())
def test_the_plan_says_the_bytes_that_come(chosen):
    model, ids, prefill, *selected = chosen
    plan = trace.planned(model.config, len(ids), *selected)
    found = trace.record(llama(model), ids, prefill, *selected).arrays
    assert {name: (a.shape, a.dtype) for name, a in found.items()} == plan.specs
    assert plan.nbytes == sum(array.nbytes for array in found.values())


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"taps": ["q", "qq"]}, "found 'qq'"),
        ({"taps": ["layers.0.q"]}, "found 'layers.0.q'"),
        ({"taps": []}, "none selected"),
        ({"layers": [0, 3]}, "layers: expected numbers from 0 to 2, found 3"),
        ({"layers": [-1]}, "found -1"),
        ({"layers": [], "taps": ["q"]}, "none selected"),
        ({"positions": [3]}, "positions: expected numbers from 0 to 2, found 3"),
        ({"positions": []}, "none selected"),
        ({"prefill": 0}, "prefill: expected 1 to 3 tokens, found 0"),
        ({"prefill": 4}, "prefill: expected 1 to 3 tokens, found 4"),
    ],
)
def test_what_is_not_there_is_refused(tiny, tmp_path, options, words):
    with pytest.raises(InputError, match=words.replace("[", r"\[")):
        trace.record(tiny, [1, 2, 3], **options)
    with pytest.raises(InputError, match=words):
        trace.write(tmp_path / "out", tiny, [1, 2, 3], **options)
    assert list(tmp_path.iterdir()) == []


# ---- metadata -----------------------------------------------------------------------------------


def test_metadata_say_what_was_run(tiny):
    meta = trace.record(tiny, [1, 2, 3], prefill=2, positions=[2]).meta
    assert meta["format"] == taps.FORMAT
    assert meta["config"]["rope_pairing"] == "half"
    assert (meta["ids"], meta["positions"], meta["prefill"]) == ([1, 2, 3], [2], 2)
    assert (meta["profile"], meta["engine"], meta["device"]) == ("float32", "numpy", "cpu")
    assert meta["versions"]["llama3np"] == llama3np.__version__
    assert meta["versions"]["numpy"] == np.__version__


# ---- onto the disk ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["t.safetensors", "t.npz", "t"])
def test_what_is_written_is_what_is_recorded(tiny, tmp_path, name):
    options = {"prefill": 2, "positions": [0, 2, 3]}
    meta = trace.write(tmp_path / name, tiny, [5, 6, 7, 8], **options, facts={"model": "tiny"})
    found, expected = files.read(tmp_path / name), trace.record(tiny, [5, 6, 7, 8], **options)
    assert found.meta == meta == expected.meta | {"model": "tiny"}
    assert list(found.arrays) == list(expected.arrays)
    for tap, array in expected.arrays.items():
        assert_same(found.arrays[tap], array, tap)
    assert [path.name for path in tmp_path.iterdir()] == [name]


@pytest.mark.parametrize("name", ["t.safetensors", "t.npz", "t"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
def test_nothing_is_left_of_a_trace_that_was_broken_off(tiny, tmp_path, monkeypatch, name, error):
    forward = tiny.forward

    def broken(ids, cache, tap):
        if cache.lengths_B[0] == 2:
            raise error
        return forward(ids, cache, tap)

    monkeypatch.setattr(tiny, "forward", broken)
    with pytest.raises(error):
        trace.write(tmp_path / name, tiny, [5, 6, 7, 8], prefill=2)
    assert list(tmp_path.iterdir()) == []


# ---- on CUDA ------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["cupy", "cuda"])
def test_taps_come_from_the_device(engine):
    params = random(TINY, np.random.default_rng(0))
    there = Llama(TINY, params, device="cuda", engine=engine)
    here = Llama(TINY, params, engine="numpy")
    options = {"prefill": 3, "positions": [0, 1, 4]}
    found, expected = (trace.record(llm, [1, 2, 3, 4, 5], **options) for llm in (there, here))
    assert found.meta["device"] == "cuda:0"
    assert "cupy" in found.meta["versions"]
    for name, array in expected.arrays.items():
        assert type(found.arrays[name]) is np.ndarray
        assert_close(found.arrays[name], array, 1e-4, name)

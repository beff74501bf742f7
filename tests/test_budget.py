"""crosscheck/budget.py: measured errors of profiles against float64."""

import threading
from hashlib import sha256
from math import inf

import numpy as np
import pytest
import strategies
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3np.config import Config
from llama3np.crosscheck import budget, hashes, measure, taps, trace
from llama3np.errors import InputError
from llama3np.llm import Llama
from llama3np.load import save_gguf, save_hf, save_meta
from llama3np.params import random

ALL = list(budget.DEFAULT)
SMALL = Config(
    dim=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, ffn_dim=20, vocab_size=30,
    context_length=64, rope_pairing="half",
)  # fmt: skip


def small(dtype="float32", seed=0, kind=np.float32):
    params = random(SMALL, np.random.default_rng(seed), kind)
    return Llama(SMALL, params, dtype=dtype, engine="numpy", threads=1)


def llama(model, dtype="float32"):
    return Llama(model.config, model.params, dtype=dtype, engine="numpy", threads=1)


# ---- what is measured ---------------------------------------------------------------------------


@settings(max_examples=20)
@given(strategies.runs(), st.data())
def test_a_budget_is_the_error_of_whole_traces_handed_on(run, data):
    """Two traces in memory, compared by another function, say the same as the lock-step."""
    model, ids = run
    prefill = data.draw(st.integers(1, len(ids)))
    found = budget.measure(llama(model), ids, ALL, prefill)
    truth = trace.record(llama(model, "float64"), ids, prefill).arrays
    for profile, of_profile in found.items():
        own = trace.record(llama(model, profile), ids, prefill).arrays
        assert list(of_profile) == list(truth)
        nmse = relative = 0
        for name, expected in truth.items():
            nmse = max(nmse, measure.nmse(own[name], expected))
            size = np.abs(expected[np.isfinite(expected)]).max(initial=0)
            if size:
                relative = max(relative, measure.max_abs(own[name], expected) / size)
            assert of_profile[name]["nmse"] == pytest.approx(nmse, rel=1e-3)
            assert of_profile[name]["max_abs"] == pytest.approx(relative * size, rel=1e-3)


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1))
def test_fewer_bits_are_further_from_the_truth(seed):
    found = budget.measure(small(seed=seed), range(12), ALL)
    errors = [found[name]["logits"]["nmse"] for name in ("float32", "f16-hf", "bf16-hf")]
    assert 0 < errors[0] < 1e-10 < errors[1] < errors[2] < 1


def test_a_budget_says_the_same_whatever_the_profile_it_is_asked_of():
    """bf16-mm computes with bfloat16 weights, which are those of the files: they count."""
    found = budget.measure(small("bf16-mm", kind=np.dtype("bfloat16")), range(8), ALL)
    assert found == budget.measure(small("float64", kind=np.dtype("bfloat16")), range(8), ALL)


def test_an_overflow_has_no_budget(caplog):
    params = random(SMALL, np.random.default_rng(0))
    layers = tuple(layer._replace(w_up=layer.w_up * 1e6) for layer in params.layers)
    llm = Llama(SMALL, params._replace(layers=layers), engine="numpy")
    assert list(budget.measure(llm, range(5), ALL)) == ["float32", "bf16-hf", "bf16-meta"]
    assert "f16-hf overflows at layers.0.up" in caplog.text


def test_every_tap_has_its_budget_and_progress_is_told():
    told = []
    found = budget.measure(small(), range(4), ["float32"], 2, lambda *args: told.append(args))
    names = taps.order(SMALL.n_layers)
    assert list(found["float32"]) == names
    assert told == [(i + 1, 3 * len(names), (3 * names)[i]) for i in range(3 * len(names))]


def test_errors_are_handed_on_relative_to_each_taps_size():
    sums = {
        "a": budget.Sums(error2=1, truth2=100, error=1, truth=10),
        "b": budget.Sums(error2=0, truth2=4, error=0, truth=2),
        "c": budget.Sums(error2=4, truth2=8, error=2, truth=4),
        "d": budget.Sums(),
    }
    assert budget.handed_on(sums) == {
        "a": {"nmse": 0.01, "max_abs": 1},
        "b": {"nmse": 0.01, "max_abs": 0.2},
        "c": {"nmse": 0.5, "max_abs": 2},
        "d": {"nmse": 0.5, "max_abs": 0},
    }


@given(st.floats(1e-30, 1e30), st.floats(1e-30, 1e30))
def test_no_budget_is_below_what_was_measured(error, truth):
    """A right run would leave it by a rounding of its text."""
    sums = budget.Sums(error2=error, truth2=truth, error=error, truth=truth)
    found = budget.handed_on({"q": sums})["q"]
    assert error / truth <= found["nmse"] <= 1.0011 * error / truth
    assert error / truth * truth <= found["max_abs"] <= 1.0011 * error
    assert all(float(f"{value:.4g}") == value for value in found.values())


def test_masked_scores_count_nothing():
    truth = np.array([[1, -inf], [3, 4]])
    sums = budget.Sums().plus(np.array([[1.5, -inf], [3, 4]], np.float32), truth)
    assert sums == (0.25, 26, 0.5, 4)


# ---- which profiles -----------------------------------------------------------------------------


def test_profiles_are_measured_as_far_as_rounded_weights_fit(monkeypatch):
    llm = small()
    size = 2 * sum(w.size for w in (llm.params.embed_VD, llm.params.head_VD, llm.params.norm_D))
    size += 2 * sum(w.size for layer in llm.params.layers for w in layer)
    for room, expected in {
        0: ["float32"],
        size: ["float32", "bf16-hf", "bf16-meta"],  # one copy for both
        2 * size: ALL,
    }.items():
        monkeypatch.setattr(budget, "ROOM", room)
        assert budget.affordable(llm) == expected
    assert budget.affordable(small("bf16-mm", kind=np.dtype("bfloat16")))[-1] == "bf16-mm"


def test_weights_of_16_bits_are_not_copied(monkeypatch):
    monkeypatch.setattr(budget, "ROOM", 1000)  # the norms, which are float32, fit
    llm = small(kind=np.dtype("bfloat16"))
    assert budget.affordable(llm) == ["float32", "bf16-hf", "bf16-meta"]


@pytest.mark.parametrize(
    ("profiles", "words"),
    [
        (["float64"], "float64 is what the others"),
        (["f32"], "--budgets: expected some of float32, .* found 'f32'"),
    ],
)
def test_profiles_that_cannot_be_measured_are_refused(profiles, words):
    with pytest.raises(InputError, match=words):
        budget.measure(small(), [1], profiles)


def test_rounded_weights_are_no_truth():
    with pytest.raises(ValueError, match="not rounded"):
        budget.measure(small("bf16-hf"), [1], ["float32"])


# ---- in lock-step -------------------------------------------------------------------------------


@pytest.mark.parametrize("which", [0, 1, 2])
def test_the_error_of_one_run_ends_all_and_is_told(monkeypatch, which):
    """Of float64's, in the caller's thread, or of another."""
    made = budget._twins

    def broken(llm, profiles):
        twins = made(llm, profiles)
        forward = twins[which].forward

        def failing(ids, cache, tap):
            def until_v(name, array):
                if name == "layers.1.v":
                    raise MemoryError("no room")
                tap(name, array)

            return forward(ids, cache, until_v)

        twins[which].forward = failing
        return twins

    monkeypatch.setattr(budget, "_twins", broken)
    before = threading.active_count()
    with pytest.raises(MemoryError, match="no room"):
        budget.measure(small(), [1, 2], ALL[:2])
    assert threading.active_count() == before


@pytest.mark.parametrize("error", [KeyboardInterrupt, InputError])
def test_what_progress_raises_ends_all(error):
    def progress(done, total, name):
        if done == 5:
            raise error("stop")

    with pytest.raises(error, match="stop"):
        budget.measure(small(), [1, 2], ALL, None, progress)


# ---- hashes -------------------------------------------------------------------------------------


def test_weight_files_are_found_in_every_layout(tmp_path):
    params = random(SMALL, np.random.default_rng(0))
    save_hf(tmp_path / "hf", SMALL, params)
    save_hf(tmp_path / "shards", SMALL, params, 2000)
    save_gguf(tmp_path / "x.gguf", SMALL, params)
    save_meta(tmp_path / "meta" / "original", SMALL, params, 2)
    for name, pattern in {
        "hf": "*.safetensors",
        "shards": "*.safetensors",
        "meta": "original/*.pth",
    }.items():
        files = sorted((tmp_path / name).glob(pattern))
        assert len(files) == {"hf": 1, "meta": 2}.get(name, len(files)) > 0
        expected = {file.name: sha256(file.read_bytes()).hexdigest() for file in files}
        assert hashes.sha256(tmp_path / name) == expected
    told = []
    one = tmp_path / "x.gguf"
    assert hashes.sha256(one, lambda *a: told.append(a)) == {
        "x.gguf": sha256(one.read_bytes()).hexdigest()
    }
    assert told[-1] == (one.stat().st_size, one.stat().st_size, "x.gguf")

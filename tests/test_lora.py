"""Low-rank adapters: their gradients, what they leave alone, PEFT's layout, training, merging."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
import trainings
from devices import to_host
from differences import assert_derivative, central
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import GOLDENS
from strategies import models, seeds

from llama3np.backend import CPU
from llama3np.config import Config, RopeScaling
from llama3np.errors import CheckpointError, InputError
from llama3np.kernels import Blocks, Half, Joined
from llama3np.kernels.adapted import Adapted
from llama3np.load import adapters, load_checkpoint, names, quantize, safetensors
from llama3np.load.convert import convert
from llama3np.params import mapped, named, random
from llama3np.train import checkpoint, frozen, loop, lora, metrics, start
from llama3np.train.flat import Flat
from llama3np.train.parts import Batch, BatchGradient
from llama3np.train.settings import changed

COMMAND = [sys.executable, "-c", "import sys; from llama3np.cli import main; sys.exit(main())"]
pytestmark = [pytest.mark.filterwarnings("error"), pytest.mark.usefixtures("signals_heeded")]


@st.composite
def cases(draw, dtype=np.float64, **fixed):
    """(base, config, adapters, batch): B is not zero, so A has a gradient."""
    drawn = draw(models(stored="float32", norm_eps=1e-2, **fixed))
    config, rng = drawn.config, np.random.default_rng(draw(seeds))
    most = min(side for shape in adapters.matrices(config).values() for side in shape)
    flat = lora.initial(config, draw(st.integers(1, min(4, most))), 0, dtype)
    flat.vector[...] = rng.standard_normal(flat.vector.size) * 0.3
    B, T = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    ids_BT, targets_BT = rng.integers(0, config.vocab_size, (2, B, T))
    batch = Batch(ids_BT, targets_BT, rng.random((B, T)).astype(dtype))
    return mapped(drawn.host_params, lambda w: w.astype(dtype)), config, flat, batch


def gradient(base, config, flat, batch, **options):
    return BatchGradient(config, trained=lora.Lora(base, config), **options)(flat, batch)


# ---- gradients ---------------------------------------------------------------------------------


@settings(max_examples=25)
@given(cases(), st.booleans())
def test_gradients_are_central_differences(case, recompute):
    base, config, flat, batch = case
    _, grad = gradient(base, config, flat, batch, recompute=recompute)
    rng = np.random.default_rng(0)
    for name, w in flat.tensors.items():
        at = rng.choice(w.size, min(w.size, 2), replace=False)
        expected = central(lambda: gradient(*case)[0], w, at)
        found = grad.tensors[name]
        assert_derivative(found.reshape(-1)[at], expected, name, scale=found)


@settings(max_examples=25)
@given(cases())
def test_gradients_are_those_of_the_merged_weights_by_the_chain_rule(case):
    """With W' = W + s B A: dL/dB = s dL/dW' A^T and dL/dA = s B^T dL/dW'."""
    base, config, flat, batch = case
    loss, grad = gradient(*case)
    merged = Flat.of(named(lora.merged(lora.Lora(base, config).params(flat)), config.tied), "f8")
    merged_loss, full = BatchGradient(config)(merged, batch)
    assert loss == pytest.approx(merged_loss, rel=1e-12)
    for name in adapters.matrices(config):
        a_RI, b_OR = flat.tensors[f"{name}.A"], flat.tensors[f"{name}.B"]
        d_w = full.tensors[name] * lora.SCALE
        close = {"rtol": 1e-9, "atol": 1e-12 * (1 + np.abs(d_w).max())}
        np.testing.assert_allclose(grad.tensors[f"{name}.B"], d_w @ a_RI.T, **close)
        np.testing.assert_allclose(grad.tensors[f"{name}.A"], b_OR.T @ d_w, **close)


@pytest.mark.parametrize("case", ["all", "rslora"])
def test_against_peft(case, tmp_path):
    """PEFT's adapters, their loss and gradients by torch's autograd: tools/goldens_lora.py."""
    config, base, golden = of_peft(case)
    found = adapters.read(peft_directory(golden, tmp_path), config)
    pairs = {f"{n}.{k}": w for n, p in found.pairs.items() for k, w in zip("AB", p, strict=True)}
    flat, batch = Flat.of(pairs), Batch(*(golden[k] for k in ("ids", "targets", "weights")))
    trained = lora.Lora(base, config, scale=found.scale)
    loss, grad = BatchGradient(config, trained=trained)(flat, batch)
    assert loss == pytest.approx(float(golden["loss"]), rel=1e-6)
    for name in found.pairs:
        for letter in "AB":
            key = f"d.base_model.model.{adapters.module(name)}.lora_{letter}.weight"
            expected, got = golden[key], grad.tensors[f"{name}.{letter}"]
            assert np.abs(got - expected).max() < 1e-5 * np.abs(expected).max(), key
    for name, w in adapters.merged(named(base, config.tied), found).items():
        if name in found.pairs:
            expected = golden[f"m.{names.foreign(name, 'huggingface')}"]
            np.testing.assert_allclose(np.asarray(w), expected, rtol=1e-6, atol=1e-7)


def of_peft(case):
    """Config, frozen weights and all else of a case."""
    with np.load(GOLDENS / "lora.npz") as file:
        golden = {k.partition("/")[2]: w for k, w in file.items() if k.startswith(f"{case}/")}
    fields = json.loads(str(golden["config"]))
    scaling = fields.pop("rope_scaling")
    config = Config(**fields, rope_scaling=scaling and RopeScaling(**scaling))
    base = Flat.of({k[2:]: w for k, w in golden.items() if k.startswith("w.")}).params(config)
    return config, base, golden


def peft_directory(golden, path, **changes):
    """The two files as PEFT wrote them, but for changes of settings; None drops a tensor."""
    told = json.loads(str(golden["settings"])) | changes.pop("settings", {})
    (path / adapters.SETTINGS).write_text(json.dumps(told))
    tensors = {k[2:]: w for k, w in golden.items() if k.startswith("t.")} | changes
    kept = {k: w for k, w in tensors.items() if w is not None}
    safetensors.write(path / adapters.WEIGHTS, kept)
    return path


def test_gradients_on_a_device(xp):
    config = Config(12, 2, 4, 2, 4, 14, 19, rope_pairing="half", tied=True)
    base, rng = random(config, np.random.default_rng(1)), np.random.default_rng(2)
    flat = lora.initial(config, 3, 0)
    flat.vector[...] = rng.standard_normal(flat.vector.size) * 0.3
    ids_BT, targets_BT = rng.integers(0, 19, (2, 2, 5))
    weights_BT = np.full((2, 5), 0.1, np.float32)
    expected_loss, expected = gradient(base, config, flat, Batch(ids_BT, targets_BT, weights_BT))
    there = Flat(xp.asarray(flat.vector), flat.shapes)
    trained = lora.Lora(base, config, lora.on_device(base, xp))
    batch = Batch(ids_BT, xp.asarray(targets_BT), xp.asarray(weights_BT))
    loss, grad = BatchGradient(config, trained=trained)(there, batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5)
    np.testing.assert_allclose(to_host(grad.vector), expected.vector, rtol=1e-4, atol=1e-5)
    here = named(trained.on_host(there), config.tied)["layers.1.wk"]
    np.testing.assert_allclose(
        np.asarray(here), np.asarray(trained.on_host(flat).layers[1].wk), rtol=1e-6
    )


# ---- the operand -------------------------------------------------------------------------------


def stored_as(kind, w):
    """A matrix in a stored format."""
    if kind == "q8_0":
        return Blocks("Q8_0", quantize.q8_0(w, "w").reshape(len(w), -1))
    if kind == "joined":
        return Joined(np.split(w, 2), 0)
    return Half(w.astype(ml_dtypes.bfloat16)) if kind == "bf16" else w


@pytest.mark.parametrize("chunk", [64, 2**19])
@pytest.mark.parametrize("kind", ["float32", "bf16", "joined", "q8_0"])
@settings(max_examples=15)
@given(seeds, st.integers(1, 4), st.integers(1, 3), st.integers(1, 5), st.integers(1, 9))
def test_an_adapted_matrix_multiplies_as_the_merged_one(kind, chunk, seed, half, n, R, M):
    O, I = 2 * half, 32 * n  # noqa: E741
    rng = np.random.default_rng(seed)
    w_OI, a_RI, b_OR, x_MI, y_MO = (
        rng.standard_normal(shape, dtype=np.float32)
        for shape in ((O, I), (R, I), (O, R), (M, I), (M, O))
    )
    w = stored_as(kind, w_OI)
    adapted = Adapted(w, a_RI, b_OR, 1.5)
    merged = np.asarray(w).astype(np.float64) + 1.5 * b_OR.astype(np.float64) @ a_RI
    bound = 2e-6 * (R + O + I)
    with mock.patch("llama3np.kernels.chunks.CHUNK", chunk):
        np.testing.assert_allclose(x_MI @ adapted.T, x_MI @ merged.T, atol=bound)
        np.testing.assert_allclose(y_MO @ adapted, y_MO @ merged, atol=bound)
        if kind != "float32":
            np.testing.assert_allclose(y_MO @ w, y_MO @ np.asarray(w).astype("f8"), atol=bound)
    np.testing.assert_allclose(np.asarray(adapted), merged, atol=1e-5)
    assert np.array_equal(adapted[1:O], np.asarray(adapted)[1:O])
    assert (x_MI @ adapted.T).dtype == (y_MO @ adapted).dtype == adapted.dtype == np.float32


@settings(max_examples=15)
@given(cases(np.float32), st.sampled_from(["float32", "bfloat16"]), seeds)
def test_at_first_the_model_is_the_frozen_one_to_the_bit(case, stored, seed):
    base, config, flat, batch = case
    if stored == "bfloat16":
        base = mapped(base, lambda w: w.astype(ml_dtypes.bfloat16) if w.ndim == 2 else w)
    rank = flat.tensors["layers.0.wq.A"].shape[0]
    first, plain = lora.initial(config, rank, seed), lora.Lora(base, config).base
    trained = lora.Lora(base, config)
    for w, adapted in zip(plain.layers[0], trained.params(first).layers[0], strict=True):
        if w.ndim == 2:
            assert np.array_equal(np.asarray(adapted), np.asarray(w).astype(np.float32))
            x_MI = np.random.default_rng(seed).standard_normal((3, w.shape[1]), np.float32)
            assert np.array_equal(x_MI @ adapted.T, x_MI @ w.T)
    _, grad = gradient(base, config, first, batch)
    assert not any(grad.tensors[name].any() for name in grad.tensors if name.endswith("A"))
    assert any(grad.tensors[name].any() for name in grad.tensors if name.endswith("B"))


def test_the_first_adapters():
    """B is zero; A fills the interval of PEFT's kaiming_uniform_(a=sqrt(5)), by its seed."""
    config = Config(64, 2, 4, 2, 16, 100, 30)
    flat = lora.initial(config, 16, seed=3)
    for name, w in flat.tensors.items():
        bound = 0 if name.endswith("B") else w.shape[1] ** -0.5
        assert 0.99 * bound <= np.abs(w).max() <= bound
        assert abs(w.mean()) <= bound / 10
    assert np.array_equal(flat.vector, lora.initial(config, 16, seed=3).vector)
    assert not np.array_equal(flat.vector, lora.initial(config, 16, seed=4).vector)
    sides = (64 + 64) * 2 + (64 + 32) * 2 + (64 + 100) * 3  # wq, wo; wk, wv; w_gate, w_up, w_down
    assert flat.matrices == flat.vector.size == 2 * 16 * sides


@pytest.mark.parametrize("rank", [0, 33])
def test_a_rank_that_no_matrix_has_is_refused(rank):
    config = Config(64, 2, 4, 2, 16, 100, 30)  # wk and wv are (32, 64)
    with pytest.raises(InputError, match=f"lora: expected a rank from 1 to 32, found {rank}"):
        lora.shapes(config, rank)
    assert len(lora.shapes(config, 32)) == 2 * 7 * 2


# ---- PEFT's layout -----------------------------------------------------------------------------


Q = "base_model.model.model.layers.1.self_attn.q_proj"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"peft_type": "IA3"}, "peft_type: expected LORA, found 'IA3'"),
        ({"use_dora": True}, "use_dora: expected none, found True"),
        ({"bias": "all"}, "bias: expected none, found 'all'"),
        ({"lora_bias": True}, "lora_bias: expected none, found True"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern: expected none, found {'q_proj': 2}"),
        ({"alpha_pattern": {"q_proj": 2}}, "alpha_pattern: expected none"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save: expected none"),
        ({"of_the_future": 1}, "of_the_future: expected none, found 1"),
        ({"init_lora_weights": "pissa"}, "found 'pissa', which changes it"),
        ({"r": 0}, "r: expected a whole number from 1 on, found 0"),
        ({"r": True}, "r: expected a whole number"),
        ({"lora_alpha": None}, "lora_alpha: expected a number, found None"),
        ({"r": 10**400}, "r: expected at most 2147483647, found 1000"),
        ({"lora_alpha": 10**400}, "lora_alpha: expected a number, found 1000"),
        ({"lora_alpha": True}, "lora_alpha: expected a number, found True"),
        ({"use_rslora": "no"}, "use_rslora: expected true or false, found 'no'"),
        ({"layers_to_transform": [0]}, r"layers_to_transform: .* found \[0\] without layer 1"),
        ({"layers_to_transform": 1}, "layers_to_transform: .* found 1 without layer 0"),
        ({"layers_pattern": "h"}, "layers_pattern: expected layers, found 'h'"),
        ({"r": 2}, r"lora_A.weight': expected shape \(2, 12\), found \(3, 12\)"),
    ],
)
def test_adapters_of_another_kind_are_refused_by_the_setting(tmp_path, changes, message):
    config, _, golden = of_peft("all")
    path = peft_directory(golden, tmp_path, settings=changes)
    with pytest.raises(CheckpointError, match=message) as raised:
        adapters.read(path, config)
    assert str(tmp_path) in str(raised.value)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({f"{Q}.lora_B.weight": None}, r"q_proj.lora_B.weight' is missing, its partner is there"),
        (
            {f"{Q}.lora_B.weight": np.ones((5, 3), "f4")},
            r"expected shape \(24, 3\), found \(5, 3\)",
        ),
        (
            {f"{Q}.lora_magnitude_vector": np.ones(24, "f4")},
            "expected lora_A and lora_B of down_proj",
        ),
        ({"base_model.model.lm_head.lora_A.weight": np.ones((3, 12), "f4")}, "lm_head.lora_A"),
        ({f"{Q}.lora_A.weight": np.full((3, 12), np.nan, "f4")}, "q_proj.lora_A.*expected finite"),
        ({f"{Q}.lora_B.weight": np.full((24, 3), np.inf, "f2")}, "q_proj.lora_B.*expected finite"),
        ({Q.replace("1", "2") + ".lora_A.weight": np.ones((3, 12), "f4")}, r"layers\.2\.self_attn"),
    ],
)
def test_other_tensors_are_refused_by_name(tmp_path, changes, message):
    config, _, golden = of_peft("all")
    path = peft_directory(golden, tmp_path, **changes)
    with pytest.raises(CheckpointError, match=message):
        adapters.read(path, config)


@pytest.mark.parametrize("layers", [None, [], [0, 1], [1, 0, 7]])
def test_settings_that_name_all_layers_change_nothing(tmp_path, layers):
    config, _, golden = of_peft("all")
    told = {"layers_to_transform": layers, "layers_pattern": "layers"}
    assert adapters.read(peft_directory(golden, tmp_path, settings=told), config).pairs


def test_what_is_no_adapter_is_refused(tmp_path):
    config, _, golden = of_peft("all")
    with pytest.raises(CheckpointError, match=r"adapter_config.json: cannot be read: No such file"):
        adapters.read(tmp_path, config)
    peft_directory(golden, tmp_path)
    (tmp_path / adapters.WEIGHTS).unlink()
    with pytest.raises(CheckpointError, match=r"expected adapter_model\.safetensors, found none"):
        adapters.read(tmp_path, config)
    safetensors.write(tmp_path / adapters.WEIGHTS, {})
    with pytest.raises(CheckpointError, match="expected adapters, found no tensor"):
        adapters.read(tmp_path, config)


@settings(max_examples=15)
@given(cases(np.float32, rope_scaling=None, n_kv_heads=2))
def test_what_is_written_is_read_in_either_order_of_rows(tmp_path_factory, case):
    """A model in the other pairing gets the other rows of B; merged, it is the same model."""
    base, config, flat, _ = case
    pairs = {n: (flat.tensors[f"{n}.A"], flat.tensors[f"{n}.B"]) for n in adapters.matrices(config)}
    directory = tmp_path_factory.mktemp("adapter")
    (directory / adapters.SETTINGS).write_text(
        json.dumps(adapters.settings(adapters.Adapters(pairs, 2.0), "base"))
    )
    tensors = adapters.tensors(adapters.Adapters(pairs, 2.0), config)
    safetensors.write(directory / adapters.WEIGHTS, tensors)
    found = {}
    for pairing in ("half", "interleaved"):
        turned, params = names.with_pairing(config, base, pairing)
        read = adapters.read(directory, turned)
        if pairing == config.rope_pairing:
            for name, (a_RI, b_OR) in pairs.items():
                assert np.array_equal(read.pairs[name][0], a_RI)
                assert np.array_equal(read.pairs[name][1], b_OR)
        merged = adapters.merged(named(params, config.tied), read)
        found[pairing] = named(
            names.with_pairing(turned, Flat.of(merged).params(turned), "half")[1], config.tied
        )
    for name, w in found["half"].items():
        np.testing.assert_array_equal(found["interleaved"][name], w)


# ---- training ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model with a tokenizer, trained a little."""
    out = trainings.begin(tmp_path_factory.mktemp("model"))
    trainings.go_on(out)
    return out


@pytest.fixture(scope="module")
def begun(model, tmp_path_factory):
    return of_adapters(model, tmp_path_factory.mktemp("begun"))


def of_adapters(init, directory, **given):
    """A training of adapters at step 0."""
    (directory / "text.txt").write_text(trainings.TEXT[::-1])
    given = {
        "lora": 2,
        "steps": 6,
        "eval_every": 2,
        "checkpoint_every": 1,
        "rows": 3,
        "learning_rate": 0.05,
    } | given
    order = start.Order([directory / "text.txt"], init=str(init), given=given)
    assert start.begin(directory / "out", order) == []
    return directory / "out"


@pytest.fixture(scope="module")
def unbroken(begun, tmp_path_factory):
    return trained(begun, tmp_path_factory)


def trained(begun, tmp_path_factory, threads=1):
    out = tmp_path_factory.mktemp("trained") / "out"
    shutil.copytree(begun, out)
    trainings.go_on(out, threads)
    return out


def test_adapters_learn_and_all_else_keeps_its_bits(model, begun, unbroken):
    losses = [x["val_loss"] for x in metrics.read(unbroken / "metrics.jsonl") if "val_loss" in x]
    assert min(losses) < losses[0] - 0.01
    before, after = (safetensors.read(path / "model.safetensors") for path in (model, unbroken))
    changed_names = {n for n in before if before[n].tobytes() != after[n].tobytes()}
    assert changed_names == {n for n in before if "_proj" in n}
    _, state = checkpoint.load(unbroken / checkpoint.FILE, CPU)
    shapes = lora.shapes(load_checkpoint(model).config, 2)
    assert state.params.shapes == state.first.shapes == state.second.shapes == shapes
    assert {"adapter", "training", "metrics.jsonl"} <= {p.name for p in unbroken.iterdir()}


def test_the_model_in_out_is_its_base_with_its_adapters(model, unbroken, tmp_path):
    convert(model, tmp_path / "merged", dtype="bf16", adapter=unbroken / "adapter")
    assert bits(tmp_path / "merged") == bits(unbroken) != bits(model)


def bits(directory):
    tensors = safetensors.read(Path(directory) / "model.safetensors")
    return {name: w.tobytes() for name, w in tensors.items()}


@pytest.mark.parametrize("dtype", [None, "f32", "f16", "bf16", "q8_0"])
def test_a_merged_model_is_rounded_to_the_dtype_asked_for(model, unbroken, tmp_path, dtype):
    """Or to that of its base, which is bf16, and not to both; W + s B A by NumPy in float64."""
    out, found = tmp_path / ("x.gguf" if dtype == "q8_0" else "x"), adapters_of(model, unbroken)
    convert(model, out, dtype=dtype, adapter=unbroken / "adapter")
    got, had = load_checkpoint(out), load_checkpoint(model)
    merged = named(names.with_pairing(got.config, got.params, "half")[1], tied=True)
    base = named(had.params, tied=True)
    # Rows are not whole blocks, so f16 takes the place of q8_0.
    to = {None: ml_dtypes.bfloat16, "f32": "f4", "bf16": ml_dtypes.bfloat16}.get(dtype, "f2")
    for name, (a_RI, b_OR) in found.pairs.items():
        exact = np.asarray(base[name], "f8") + found.scale * b_OR.astype("f8") @ a_RI.astype("f8")
        expected = exact.astype("f4").astype(to)
        np.testing.assert_array_equal(np.asarray(merged[name]).astype(to), expected, name)


def adapters_of(model, trained):
    return adapters.read(trained / "adapter", load_checkpoint(model).config)


@pytest.mark.parametrize(
    ("factor", "dtype", "message"),
    [
        (1e30, None, "tensor 'layers.0.wq': with its adapter, has numbers too large for float32"),
        (1e6, "f16", "tensor 'layers.0.wq': has numbers too large for float16; use bf16 or f32"),
    ],
)
def test_a_sum_that_the_dtype_cannot_hold_is_refused(
    model, unbroken, tmp_path, factor, dtype, message
):
    shutil.copytree(unbroken / "adapter", tmp_path / "adapter")
    weights = tmp_path / "adapter" / adapters.WEIGHTS
    tensors = {n: np.full_like(w, factor) for n, w in safetensors.read(weights).items()}
    weights.unlink()
    safetensors.write(weights, tensors)
    with pytest.raises(InputError, match=message):
        convert(model, tmp_path / "x", dtype=dtype, adapter=tmp_path / "adapter")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize("step", [1, 3])
def test_a_resumed_training_of_adapters_is_an_unbroken_one(
    begun, unbroken, tmp_path_factory, step, monkeypatch
):
    out = tmp_path_factory.mktemp("broken") / "out"
    shutil.copytree(begun, out)
    monkeypatch.setattr(loop, "clip", signalled_after(step, loop.clip))
    assert trainings.go_on(out).signal == signal.SIGINT
    monkeypatch.undo()
    trainings.go_on(out, threads=2)
    assert trainings.outcome(out) == trainings.outcome(unbroken)
    name = "adapter/adapter_model.safetensors"
    assert (out / name).read_bytes() == (unbroken / name).read_bytes()


def signalled_after(calls, function):
    """The function, during which Ctrl-C comes after some calls."""
    left = iter(range(calls))

    def counted(*args):
        if next(left, None) is None:
            os.kill(os.getpid(), signal.SIGINT)
        return function(*args)

    return counted


def test_the_frozen_model_must_be_there_and_the_same(model, tmp_path_factory):
    base = tmp_path_factory.mktemp("base") / "model"
    shutil.copytree(model, base)
    out = of_adapters(base, base.parent)
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[:-1] + b"!")
    with pytest.raises(CheckpointError, match=r"model: is not the model that this training's"):
        trainings.go_on(out)
    shutil.rmtree(base)
    with pytest.raises(CheckpointError, match="expected the model that this training's adapters"):
        trainings.go_on(out)
    base.mkdir()
    with pytest.raises(CheckpointError, match=r"model: expected config\.json .* found no files"):
        trainings.go_on(out)


def test_a_frozen_model_in_the_folder_of_metas_files(model, tmp_path):
    convert(model, tmp_path / "meta" / "original", "meta")
    known = frozen.identity(tmp_path / "meta")
    assert sorted(known["files"]) == ["consolidated.00.pth", "params.json"]
    embed_VD = load_checkpoint(model).params.embed_VD
    np.testing.assert_array_equal(frozen.load(known).embed_VD, embed_VD)
    with (tmp_path / "meta" / "original" / "params.json").open("a") as file:
        file.write("\n")
    with pytest.raises(CheckpointError, match="is not the model that this training's"):
        frozen.load(known)


@pytest.mark.parametrize("kind", ["q8_0.gguf", "bf16.gguf"])
def test_a_frozen_model_of_any_format(model, tmp_path, kind):
    """Its rows are in the other order, and its blocks stay blocks; OUT is what its copy gives."""
    convert(model, tmp_path / kind, dtype=kind.partition(".")[0])
    convert(tmp_path / kind, tmp_path / "copy")
    outs = []
    for i, init in enumerate((tmp_path / kind, tmp_path / "copy")):
        (tmp_path / str(i)).mkdir()
        outs.append(of_adapters(init, tmp_path / str(i), steps=2))
        trainings.go_on(outs[-1])
    a, b = (safetensors.read(out / "adapter/adapter_model.safetensors") for out in outs)
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_allclose(a[name], b[name], atol=2e-5, err_msg=name)


def test_adapters_need_a_model(tmp_path):
    with pytest.raises(InputError, match="--lora: expected --init MODEL"):
        trainings.begin(tmp_path, given={"lora": 2})
    with pytest.raises(InputError, match="lora: expected a whole number from 1 on, found 0"):
        changed(trainings.SETTINGS, lora=0)
    assert not (tmp_path / "out").exists()


def test_a_rank_above_the_smallest_matrix_leaves_nothing_behind(model, tmp_path):
    with pytest.raises(InputError, match="lora: expected a rank from 1 to 4, found 5"):
        of_adapters(model, tmp_path, lora=5)
    assert not (tmp_path / "out").exists()


# ---- the commands ------------------------------------------------------------------------------


def llama3np(*args):
    done = subprocess.run([*COMMAND, *map(str, args)], capture_output=True, text=True, timeout=60)
    return done.returncode, done.stdout, done.stderr


def test_the_commands(model, tmp_path):
    (tmp_path / "text.txt").write_text(trainings.TEXT)
    small = ("--context", "8", "--rows", "2", "--max-steps", "2")
    begin = ("train", "--text", tmp_path / "text.txt", "--out", tmp_path / "out", *small)
    status, _, err = llama3np(*begin, "--lora", "2")
    assert (status, err) == (
        2, "llama3np: --lora: expected --init MODEL, for adapters of its weights, found none\n",
    )  # fmt: skip
    status, _, err = llama3np(*begin, "--init", model, "--lora", "2")
    assert status == 0, err
    status, _, err = llama3np("train", "--out", tmp_path / "out", "--resume", "--lora", "3")
    assert status == 2
    assert "--lora: the training in" in err
    adapter = tmp_path / "out/adapter"
    for out in ("merged", "merged.gguf"):
        assert llama3np("convert", model, tmp_path / out, "--adapter", adapter)[0] == 0
    assert bits(tmp_path / "merged") == bits(tmp_path / "out")
    convert(tmp_path / "merged.gguf", tmp_path / "back", dtype="bf16")
    assert bits(tmp_path / "back") == bits(tmp_path / "merged")
    status, _, err = llama3np("convert", model, tmp_path / "x", "--adapter", tmp_path / "nothing")
    assert status == 2
    assert "adapter_config.json: cannot be read: No such file or directory" in err
    for wrong, said in ((tmp_path / "out", f"there is one in {adapter}"), ("", "an empty name")):
        status, _, err = llama3np("convert", model, tmp_path / "x", "--adapter", wrong)
        assert (status, said in err) == (2, True), err
    assert not (tmp_path / "x").exists()

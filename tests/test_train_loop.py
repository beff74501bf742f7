"""The training loop: whatever stops it, --resume ends where an unbroken run does, bit for bit."""

import json
import math
import os
import shutil
import signal
import sys
from contextlib import suppress
from unittest import mock

import faults
import numpy as np
import pytest
import trainings
from hypothesis import given, settings
from hypothesis import strategies as st

import llama3np
from llama3np.backend import CPU, Device
from llama3np.errors import InputError
from llama3np.load import load_checkpoint
from llama3np.load.huggingface import tokenizer_of
from llama3np.params import mapped
from llama3np.threads import Pool
from llama3np.train import checkpoint, curve, evaluation, loop, metrics, result, tokens
from llama3np.train.optimizer import AdamW, clip, learning_rate
from llama3np.train.parts import BatchGradient
from llama3np.train.settings import PRESETS, Settings, initial


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    """A training at step 0, to be copied."""
    return trainings.begin(tmp_path_factory.mktemp("begun"))


@pytest.fixture(scope="module")
def unbroken(begun, tmp_path_factory):
    out = tmp_path_factory.mktemp("unbroken") / "out"
    shutil.copytree(begun, out)
    assert trainings.go_on(out).signal is None
    return out


def copied(begun, tmp_path_factory):
    out = tmp_path_factory.mktemp("copy") / "out"
    shutil.copytree(begun, out)
    return out


# ---- a whole run -------------------------------------------------------------------------------


def test_a_run_has_a_line_for_each_step_and_each_validation(unbroken):
    lines = metrics.read(unbroken / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == list(range(1, 8))
    assert all(set(line) == {"step", "loss", "lr", "tokens_per_s"} for line in steps)
    validations = [line for line in lines if "val_loss" in line]
    assert [line["step"] for line in validations] == [0, 3, 6, 7]
    assert all(set(line) == {"step", "val_loss"} for line in validations)
    assert steps[0]["loss"] == pytest.approx(math.log(257), abs=0.1)  # nothing is known yet
    assert validations[-1]["val_loss"] < validations[0]["val_loss"] - 0.1


def test_the_model_in_out_is_that_of_the_lowest_validation_loss(unbroken):
    _, state = checkpoint.load(unbroken / checkpoint.FILE, CPU)
    lines = [line for line in metrics.read(unbroken / "metrics.jsonl") if "val_loss" in line]
    assert state.best == min(line["val_loss"] for line in lines) == lines[-1]["val_loss"]
    llm = llama3np.load(unbroken, max_seq_len=9, engine="numpy")
    np.testing.assert_array_equal(
        llm.params.layers[0].wq.stored.astype(np.float32),
        state.params.tensors["layers.0.wq"].astype(result.BF16).astype(np.float32),
    )
    assert llm.sampling.temperature == 0.8
    _, validation = tokens.open_tokens(unbroken / "training/tokens")
    scored = -llm.score(validation.ids_M[:9].tolist()).mean()
    batch = next(tokens.whole(validation, 1, 8))
    full = state.params.params(llm.config)
    assert scored == pytest.approx(evaluation.summed_loss(full, llm.config, batch) / 8, abs=0.02)


def test_what_is_validated_are_the_weights_as_they_are_written(begun, tmp_path_factory):
    """Not the float32 ones, whose loss differs by more than a fine-tuning may gain."""
    out = copied(begun, tmp_path_factory)
    done = trainings.go_on(out)
    assert done.best_val_loss == done.val_loss, "the last model is the one in OUT"
    found = load_checkpoint(out)
    read = mapped(found.params, lambda w: np.asarray(w[:]).astype(np.float32))
    assert validated(out, read, found.config) == done.val_loss
    _, state = checkpoint.load(out / checkpoint.FILE, CPU)
    assert validated(out, state.params.params(found.config), found.config) != done.val_loss


def validated(out, params, config):
    _, validation = tokens.open_tokens(out / "training/tokens")
    return evaluation.mean_loss(params, config, tokens.whole(validation, 64, 8), Pool(1))


def test_a_model_that_gets_worse_does_not_replace_the_best(begun, tmp_path_factory, monkeypatch):
    out = copied(begun, tmp_path_factory)
    losses = iter([3.0, 2.0, 2.5, 2.5])
    monkeypatch.setattr(evaluation, "mean_loss", lambda *_: next(losses))
    written = []
    monkeypatch.setattr(loop, "replace_weights", lambda *_: written.append(len(written)))
    done = trainings.go_on(out)
    assert (done.val_loss, done.best_val_loss, len(written)) == (2.5, 2.0, 2)


def test_each_step_is_clipped_adamw_at_the_rate_of_the_schedule(begun, unbroken):
    run, state = checkpoint.load(begun / checkpoint.FILE, CPU)
    data, _ = tokens.open_tokens(begun / "training/tokens")
    w, first, second, s = state.params, state.first, state.second, run.settings
    gradient, adam = BatchGradient(run.config), AdamW(0.9, 0.99, 1e-8, 0.1)
    for step in range(7):
        loss, grad = gradient(w, tokens.batch(data, s.seed, step, rows=3, length=8))
        clip(grad, 1.0)
        rate = learning_rate(step, peak=1e-2, warmup=0, steps=7, floor=1e-3)
        adam.update(w, grad, first, second, rate, t=step + 1)
    _, found = checkpoint.load(unbroken / checkpoint.FILE, CPU)
    np.testing.assert_array_equal(found.params.vector, w.vector)
    np.testing.assert_array_equal(found.second.vector, second.vector)
    lines = [line for line in metrics.read(unbroken / "metrics.jsonl") if "loss" in line]
    assert (lines[-1]["loss"], lines[-1]["lr"]) == (loss, rate)


@pytest.mark.cuda
@pytest.mark.gpu
def test_a_training_on_a_device_is_that_on_the_cpu(begun, unbroken, tmp_path_factory):
    out = copied(begun, tmp_path_factory)
    with mock.patch.object(curve, "draw"):
        loop.train(out, Device("cuda"), 1)
    expected, found = (metrics.read(path / "metrics.jsonl") for path in (unbroken, out))
    for here, there in zip(expected, found, strict=True):
        loss = "val_loss" if "val_loss" in here else "loss"
        assert there["step"] == here["step"]
        assert there[loss] == pytest.approx(here[loss], abs=1e-4)


@pytest.mark.parametrize("threads", [2, 3])
def test_the_number_of_threads_changes_nothing(begun, unbroken, tmp_path_factory, threads):
    out = copied(begun, tmp_path_factory)
    trainings.go_on(out, threads)
    assert trainings.outcome(out) == trainings.outcome(unbroken)


@given(st.integers(1, 5), st.integers(1, 9), st.integers(1, 3))
@settings(max_examples=15)
def test_the_validation_loss_is_the_mean_over_all_targets(unbroken, rows, length, threads):
    run, state = checkpoint.load(unbroken / checkpoint.FILE, CPU)
    _, validation = tokens.open_tokens(unbroken / "training/tokens")
    params, pool = state.params.params(run.config), BatchGradient(run.config, threads).pool
    found = evaluation.mean_loss(params, run.config, tokens.whole(validation, rows, length), pool)
    ids = validation.ids_M.tolist()
    llm = llama3np.Llama(run.config, params, engine="numpy", max_seq_len=10)
    parts = [ids[i : i + length + 1] for i in range(0, len(ids) - 1, length)]
    logprobs = np.concatenate([llm.score(part) for part in parts])
    assert len(logprobs) == len(ids) - 1
    assert found == pytest.approx(-logprobs.mean(), rel=1e-5)


# ---- interruptions -----------------------------------------------------------------------------


@given(st.lists(st.integers(0, 40), max_size=3), st.sampled_from([signal.SIGINT, signal.SIGTERM]))
@settings(max_examples=12)
def test_a_signal_at_any_time_and_going_on_is_an_unbroken_run(
    begun, unbroken, tmp_path_factory, times, number
):
    """The signal comes at the n-th of the things a loop does, between or in the middle of them."""
    out = copied(begun, tmp_path_factory)
    for time in times:
        with at_event(time, lambda: os.kill(os.getpid(), number)) as seen:
            done = trainings.go_on(out)
        came = len(seen) > time
        assert done.signal == (number if came and done.signal else None)
    assert trainings.go_on(out).signal is None
    assert trainings.outcome(out) == trainings.outcome(unbroken)


class at_event:  # noqa: N801  reads as a phrase
    """Does something at the n-th call of what a loop calls; yields the names of all calls."""

    OF = (
        (BatchGradient, "__call__"), (evaluation, "summed_loss"), (evaluation, "sample"),
        (loop, "clip"), (loop, "learning_rate"), (loop, "replace_weights"),
        (metrics.Metrics, "write"), (metrics.Metrics, "sync"), (checkpoint, "save"),
    )  # fmt: skip

    def __init__(self, time, act):
        self.time, self.act, self.seen = time, act, []
        self.patch = pytest.MonkeyPatch()

    def __enter__(self):
        for owner, name in self.OF:
            self.patch.setattr(owner, name, self.counted(name, getattr(owner, name)))
        return self.seen

    def __exit__(self, *_):
        self.patch.undo()

    def counted(self, name, real):
        def call(*args, **options):
            self.seen.append(name)
            if len(self.seen) == self.time + 1:
                self.act()
            return real(*args, **options)

        return call


@given(st.lists(st.integers(0, 130), min_size=1, max_size=2))
@settings(max_examples=10)
def test_a_kill_at_any_call_of_the_system_and_going_on_is_an_unbroken_run(
    begun, unbroken, tmp_path_factory, times
):
    out = copied(begun, tmp_path_factory)
    for time in times:
        with faults.injected(time, kills=True), suppress(faults.Killed):
            trainings.go_on(out)
        assert (
            llama3np.load(out, engine="numpy").config.dim == trainings.SIZES.dim
        )  # a model at any time
    trainings.go_on(out)
    assert trainings.outcome(out) == trainings.outcome(unbroken)
    assert not list(out.rglob("*.partial"))


def test_a_second_signal_ends_at_once(begun, tmp_path_factory, monkeypatch):
    out = copied(begun, tmp_path_factory)

    def save(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(KeyboardInterrupt):
        trainings.go_on(out)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_full_disk_is_one_sentence_and_the_training_goes_on_later(
    begun, unbroken, tmp_path_factory
):
    out = copied(begun, tmp_path_factory)
    with faults.injected(20) as disk, pytest.raises(InputError, match="No space left on device"):
        trainings.go_on(out)
    assert disk.hit
    trainings.go_on(out)
    assert trainings.outcome(out) == trainings.outcome(unbroken)


def test_a_run_that_is_done_does_nothing_more(unbroken, tmp_path_factory):
    out = copied(unbroken, tmp_path_factory)
    assert trainings.go_on(out).steps == 7
    assert trainings.outcome(out) == trainings.outcome(unbroken)


# ---- what goes wrong -----------------------------------------------------------------------------


@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_loss_that_is_not_finite_ends_the_training_and_the_checkpoint_stays(
    begun, tmp_path_factory, monkeypatch, what
):
    out, real = copied(begun, tmp_path_factory), BatchGradient.__call__

    def gradient(self, params, batch):
        loss, grad = real(self, params, batch)
        if len(metrics.read(out / "metrics.jsonl")) == 6:  # four steps, two validations
            loss = math.nan if what == "loss" else loss
            grad.vector[0] = math.inf
        return loss, grad

    monkeypatch.setattr(BatchGradient, "__call__", gradient)
    with pytest.raises(InputError, match=r"step 5: the loss is .* a lower --learning-rate"):
        trainings.go_on(out)
    assert checkpoint.load(out / checkpoint.FILE, CPU)[1].step == 4
    assert "NaN" not in (out / "metrics.jsonl").read_text()


def test_a_picture_or_sample_that_fails_is_told_once_and_loses_nothing(
    begun, unbroken, tmp_path_factory, monkeypatch, capsys
):
    out = copied(begun, tmp_path_factory)

    def fails(*_, **__):
        raise RuntimeError("no colours left")

    monkeypatch.setattr(curve, "draw", fails)
    monkeypatch.setattr(evaluation, "sample", fails)
    loop.train(out, CPU, 1)
    assert trainings.outcome(out) == trainings.outcome(unbroken)
    said = capsys.readouterr().err
    assert said.count("no loss.png: no colours left") == 1
    assert said.count("no sample: no colours left") == 1


def test_matplotlibs_absence_is_told_as_the_end_of_a_sentence(tmp_path, monkeypatch):
    """`no loss.png:` stands before it."""
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(InputError, match=r"^the curve needs matplotlib: pip install "):
        curve.draw(tmp_path / "metrics.jsonl", tmp_path / "loss.png")


def test_samples_cannot_steer_a_terminal(unbroken, monkeypatch):
    run, state = checkpoint.load(unbroken / checkpoint.FILE, CPU)
    tokenizer, tree = tokenizer_of(unbroken), state.params.params(run.config)
    prompt = tokenizer.encode("\x1b[2Jé\n")
    text = evaluation.sample(tree, run.config, tokenizer, prompt, seed=1)
    assert text.startswith("\ufffd[2Jé\n")
    assert all(c.isprintable() or c == "\n" for c in text)
    assert text == evaluation.sample(tree, run.config, tokenizer, prompt, seed=1)


def test_data_that_were_changed_since_are_refused(begun, tmp_path_factory):
    out = copied(begun, tmp_path_factory)
    path = out / "training/tokens/train.npy"
    path.write_bytes(path.read_bytes()[:-2] + b"\0\0")
    with pytest.raises(InputError, match=r"train\.npy: is not the file this training began with"):
        trainings.go_on(out)


# ---- beginning ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_sizes_they_are_said_to_have(name):
    preset = PRESETS[name]
    config = preset.config(257, preset.settings.context)
    total = sum(math.prod(shape) for shape in llama3np.params.named_shapes(config).values())
    low, high = {"tiny": (0.7, 0.9), "small": (4, 6), "medium": (25, 30)}[name]
    assert low < total / 1e6 < high
    assert config.context_length == preset.settings.context
    assert preset.settings.warmup < preset.settings.steps


def test_first_weights_are_normal_narrower_into_the_residual_stream_and_tell_the_seed():
    preset = PRESETS["tiny"]
    config = preset.config(257, 64)
    params = initial(config, 3)
    assert params.head_VD is params.embed_VD
    for name, w in llama3np.params.named(params, tied=True).items():
        assert w.dtype == np.float32
        narrow = name.endswith((".wo", ".w_down"))
        std = 0.02 / math.sqrt(8) if narrow else 0.02
        if w.ndim == 1:
            assert (w == 1).all()
        else:
            assert w.std() == pytest.approx(std, rel=0.03)
            assert abs(w.mean()) < 5 * std / math.sqrt(w.size)
    again = initial(config, 3)
    np.testing.assert_array_equal(again.layers[3].w_down, params.layers[3].w_down)
    assert (initial(config, 4).embed_VD != params.embed_VD).mean() > 0.99


def test_settings_out_of_range_are_named():
    for name, value in {"rows": 0, "steps": 2.5, "learning_rate": -1.0, "seed": -1}.items():
        with pytest.raises(InputError, match=f"{name}: expected"):
            Settings(**{**vars(trainings.SETTINGS), name: value})


def test_a_beginning_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match=r"expected .* tokens or more"):
        trainings.begin(tmp_path, text="too short")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


# ---- the curve ---------------------------------------------------------------------------------


def test_the_curve_is_a_small_picture_with_the_same_bytes_each_time(tmp_path):
    rng = np.random.default_rng(0)
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(20000):
            line = {"step": step, "loss": 2 + 2 / (1 + step / 500) + rng.normal() / 10}
            file.write(json.dumps(line) + "\n")
            if step % 250 == 0:
                file.write(json.dumps({"step": step, "val_loss": line["loss"]}) + "\n")
    for name in ("a.png", "b.png"):
        curve.draw(tmp_path / "metrics.jsonl", tmp_path / name)
    picture = (tmp_path / "a.png").read_bytes()
    assert picture == (tmp_path / "b.png").read_bytes()
    assert picture.startswith(b"\x89PNG")
    assert len(picture) < 60_000
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "val_loss": 5.5}\n{"step": 1, "lo')
    curve.draw(tmp_path / "metrics.jsonl", tmp_path / "a.png")  # of a run that has just begun

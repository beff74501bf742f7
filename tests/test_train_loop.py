"""The training loop: whatever stops it, --resume ends where an unbroken run does, bit for bit."""

import errno
import io
import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import warnings
from contextlib import suppress
from dataclasses import replace
from types import SimpleNamespace
from unittest import mock

import faults
import numpy as np
import pytest
import trainings
from hypothesis import example, given, settings
from hypothesis import strategies as st

import llama3np
from llama3np.backend import CPU, Device
from llama3np.errors import InputError
from llama3np.load import load_checkpoint
from llama3np.load.huggingface import tokenizer_of
from llama3np.params import mapped
from llama3np.threads import Pool
from llama3np.train import checkpoint, curve, evaluation, lock, loop, metrics, result, start, tokens
from llama3np.train.optimizer import AdamW, clip, learning_rate
from llama3np.train.parts import PART, BatchGradient
from llama3np.train.progress import Progress
from llama3np.train.settings import PRESETS, changed, initial

pytestmark = pytest.mark.usefixtures("signals_heeded")


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
    losses = iter([3.0, 2.0, 2.0, 2.5])  # as good is not better
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


def test_batches_that_are_accumulated_are_one_larger_batch(tmp_path):
    """Bit for bit, because a gradient is added up part by part, whatever batch a part is of."""
    outcomes = []
    for rows, times in ((3, 2), (6, 1)):
        directory = tmp_path / str(rows)
        directory.mkdir()
        out = trainings.begin(directory, given={"rows": rows, "accumulate": times})
        trainings.go_on(out)
        lines, _, *rest = trainings.outcome(out)
        outcomes.append((lines, rest))
    assert outcomes[0] == outcomes[1]


def test_speed_is_targets_by_seconds_of_steps(tmp_path, monkeypatch):
    out = trainings.begin(tmp_path, given={"accumulate": 2})
    ticks = itertools.count()  # a second passes from one look at the clock to the next
    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    done = trainings.go_on(out)
    lines = metrics.read(out / "metrics.jsonl")
    assert {line["tokens_per_s"] for line in lines if "loss" in line} == {2 * 3 * 8.0}
    assert done.tokens_per_s == 2 * 3 * 8.0
    assert done.seconds == 2 * 7 + 1  # all looks since the first


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize(
    ("device", "threads", "part"), [(CPU, 3, PART), (Device("cuda"), 1, 3 * 8)]
)
def test_the_gradient_is_computed_as_the_settings_and_the_device_want_it(
    begun, tmp_path_factory, recompute, device, threads, part
):
    """A device runs one part after the other, and each of them is as large as a batch."""
    out = copied(begun, tmp_path_factory)
    run, state = checkpoint.load(out / checkpoint.FILE, CPU)
    run = run._replace(settings=replace(run.settings, recompute=recompute))
    made = loop.Training(out, run, state, device, 3, Progress(0, 7))
    made.metrics.close()
    gradient = made.gradient
    assert (gradient.recompute, gradient.pool.threads, gradient.part) == (recompute, threads, part)


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


@st.composite
def interruptions(draw):
    """(what, when): a signal at the n-th of the things a loop does, or death at its n-th call."""
    if draw(st.booleans()):
        return "dies", draw(st.integers(0, 240))  # of 233 in all
    # the first event of all is between the opening of metrics.jsonl and its first line
    number = draw(st.sampled_from([signal.SIGINT, signal.SIGTERM]))
    return number, draw(st.just(0) | st.integers(0, 40))


@given(st.lists(interruptions(), max_size=4))
@example([("dies", 95), (signal.SIGINT, 0)])  # metrics.jsonl is cut back, and nothing added to it
@settings(max_examples=16)
def test_interruptions_of_any_kinds_and_going_on_are_an_unbroken_run(
    begun, unbroken, tmp_path_factory, several
):
    out = copied(begun, tmp_path_factory)
    for what, when in several:
        if what == "dies":
            killed(out, when)
        else:
            signalled(out, what, when)
    assert trainings.go_on(out).signal is None
    assert trainings.outcome(out) == trainings.outcome(unbroken)
    assert not list(out.rglob("*.partial"))


def killed(out, time):
    """A process that dies at a call of the system leaves a model."""
    with faults.injected(time, kills=True), suppress(faults.Killed):
        trainings.go_on(out)
    assert llama3np.load(out, engine="numpy").config.dim == trainings.SIZES.dim


def signalled(out, number, time):
    """A signal comes between or in the middle of the things a loop does."""
    with at_event(time, lambda: os.kill(os.getpid(), number)) as seen:
        done = trainings.go_on(out)
    came = len(seen) > time
    assert done.signal == (number if came and done.signal else None)


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


def test_a_second_signal_ends_at_once(begun, tmp_path_factory, monkeypatch):
    out = copied(begun, tmp_path_factory)

    def save(*_):
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(checkpoint, "save", save)
    with pytest.raises(KeyboardInterrupt):
        trainings.go_on(out)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_a_signal_that_was_ignored_stays_so(begun, unbroken, tmp_path_factory, name):
    """Under nohup, or in the background of a script, a training outlives its terminal."""
    if not hasattr(signal, name):
        pytest.skip(f"this system has no {name}")
    out, number = copied(begun, tmp_path_factory), getattr(signal, name)
    before = signal.signal(number, signal.SIG_IGN)
    try:
        with at_event(5, lambda: os.kill(os.getpid(), number)):
            assert trainings.go_on(out).signal is None
        assert signal.getsignal(number) is signal.SIG_IGN
    finally:
        signal.signal(number, before)
    assert trainings.outcome(out) == trainings.outcome(unbroken)


HOLDER = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.flock(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def test_one_process_at_a_time_trains_and_a_kill_locks_nobody_out(
    begun, unbroken, tmp_path_factory
):
    pytest.importorskip("fcntl")
    out = copied(begun, tmp_path_factory)
    command = [sys.executable, "-c", HOLDER, str(out / lock.FILE)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.read(4) == b"held"
        before = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
        with pytest.raises(InputError, match=rf"^{out}: another process is training there; "):
            trainings.go_on(out)
        assert {path: path.stat().st_mtime_ns for path in out.rglob("*")} == before
        other.kill()
    trainings.go_on(out)
    assert trainings.outcome(out) == trainings.outcome(unbroken)


def test_a_file_system_without_locks_is_trained_on(begun, tmp_path_factory, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    assert trainings.go_on(copied(begun, tmp_path_factory)).steps == 7


def test_where_no_training_was_begun_none_is_locked(tmp_path):
    (tmp_path / "training").mkdir()
    with pytest.raises(InputError, match=r"checkpoint\.safetensors: cannot be read"):
        trainings.go_on(tmp_path)
    assert list((tmp_path / "training").iterdir()) == []


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


@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_a_validation_loss_that_is_not_finite_ends_the_training_as_well(
    begun, tmp_path_factory, monkeypatch, wrong
):
    out, losses = copied(begun, tmp_path_factory), iter([3.0, wrong])
    monkeypatch.setattr(evaluation, "mean_loss", lambda *_: next(losses))
    with pytest.raises(InputError, match=rf"the loss is {wrong} .* a lower --learning-rate"):
        trainings.go_on(out)
    _, state = checkpoint.load(out / checkpoint.FILE, CPU)
    assert (state.step, state.best) == (2, 3.0)
    assert len(metrics.read(out / "metrics.jsonl")) == 1 + 3  # no line of that validation


def test_a_checkpoint_comes_after_the_metrics_it_knows_of_are_on_the_disk(
    begun, tmp_path_factory, monkeypatch
):
    """What a power cut would show, with lines in the system's memory alone."""
    out, on_disk = copied(begun, tmp_path_factory), []
    real_sync, real_save = os.fsync, checkpoint.save
    path = out / "metrics.jsonl"

    def sync(descriptor):
        real_sync(descriptor)
        if path.exists() and os.path.samestat(os.fstat(descriptor), path.stat()):
            on_disk.append(path.stat().st_size)

    def save(*args):
        assert on_disk[-1] == path.stat().st_size == args[2].metrics
        real_save(*args)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(checkpoint, "save", save)
    assert trainings.go_on(out).steps == len(on_disk) + 3 == 7  # checkpoints of 2, 4, 6 and 7


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


class Hung(io.TextIOBase):
    """A stderr whose reader has left."""

    def write(self, _):
        raise BrokenPipeError


def test_a_reader_who_leaves_costs_no_training(begun, unbroken, tmp_path_factory, monkeypatch):
    out = copied(begun, tmp_path_factory)
    monkeypatch.setattr("sys.stderr", Hung())
    assert trainings.go_on(out).steps == 7
    assert trainings.outcome(out) == trainings.outcome(unbroken)


def test_numbers_out_of_range_are_one_sentence_without_warnings(tmp_path, monkeypatch):
    monkeypatch.setattr(trainings, "SETTINGS", replace(trainings.SETTINGS, learning_rate=1e30))
    out = trainings.begin(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        with pytest.raises(InputError, match="a lower --learning-rate"):
            trainings.go_on(out, threads=2)


def test_too_little_memory_is_one_sentence_with_what_to_lower(begun, tmp_path_factory, monkeypatch):
    def gradient(*_):
        raise MemoryError

    monkeypatch.setattr(BatchGradient, "__call__", gradient)
    with pytest.raises(InputError, match=r"3 rows of 8 tokens; .* --rows or --context, or with"):
        trainings.go_on(copied(begun, tmp_path_factory))


@pytest.mark.parametrize("step", [0, 7])
def test_a_model_that_was_taken_away_is_written_again_and_said_to_be(
    begun, unbroken, tmp_path_factory, capsys, step
):
    out = copied(unbroken if step else begun, tmp_path_factory)
    (out / "model.safetensors").unlink()
    trainings.go_on(out)
    assert f"model.safetensors: was gone; it is the model of step {step}" in capsys.readouterr().err
    assert trainings.outcome(out) == trainings.outcome(unbroken)


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


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"],
)
def test_files_that_were_changed_since_are_refused(begun, tmp_path_factory, name):
    out = copied(begun, tmp_path_factory)
    text = (out / name).read_bytes()
    (out / name).write_bytes(text + b"\n")
    with pytest.raises(InputError, match=rf"{name}: is not the file this training began with"):
        trainings.go_on(out)
    (out / name).unlink()
    with pytest.raises(InputError, match=rf"{name}: expected the file this training began with"):
        trainings.go_on(out)


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


NAN, INF = math.nan, math.inf
OUT_OF_RANGE = {
    **dict.fromkeys(("context", "rows", "steps", "accumulate"), (0, -1, 2.5, "3", True, None)),
    **dict.fromkeys(("eval_every", "checkpoint_every"), (0, -1, 2.5, "3", True, None)),
    **dict.fromkeys(
        ("warmup", "seed"), (-1, 0.5, "3", False, None)
    ),  # NumPy takes no negative seed
    "lora": (0, -1, 1.5, "8", True),
    "recompute": (0, 1, None, "yes"),
    "learning_rate": (0, -1.0, NAN, INF, "1", True, None),
    "epsilon": (0, -1e-8, NAN, INF, "1", True, None),
    "clip": (0.0, -1, NAN, INF, "1", True, None),
    "decay": (-0.1, NAN, INF, "1", False, None),
    "floor": (-0.1, 1.1, NAN, "1", True, None),
    **dict.fromkeys(("beta1", "beta2"), (-0.1, 1.0, NAN, "0", False, None)),
}


@pytest.mark.parametrize("name", OUT_OF_RANGE)
def test_settings_out_of_range_are_named(name):
    for value in OUT_OF_RANGE[name]:
        with pytest.raises(InputError, match=f"^{name}: expected .*, found {value}$"):
            replace(trainings.SETTINGS, **{name: value})


def test_every_setting_has_a_range_and_its_ends_are_inside():
    assert set(OUT_OF_RANGE) == set(vars(trainings.SETTINGS))
    ends = {"warmup": 0, "seed": 0, "decay": 0, "floor": 0, "beta1": 0, "beta2": 0.0, "lora": 1}
    assert vars(replace(trainings.SETTINGS, **ends)).items() >= ends.items()
    assert replace(trainings.SETTINGS, floor=1).floor == 1


@given(st.integers(1, 3000), st.integers(0, 300))
def test_the_warm_up_is_a_tenth_of_the_steps_at_most(steps, warmup):
    found = changed(replace(trainings.SETTINGS, warmup=warmup), steps=steps, lora=None)
    assert (found.steps, found.warmup) == (steps, min(warmup, steps // 10))


def test_a_beginning_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match=r"expected .* tokens or more"):
        trainings.begin(tmp_path, text="too short")
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


@pytest.mark.parametrize("rows", [10**8, 10**18])
def test_batches_that_memory_cannot_hold_are_refused_before_there_is_an_out(
    tmp_path, monkeypatch, rows
):
    if rows == 10**8:  # where the system does not tell what is free

        def batch(*_):
            raise MemoryError

        monkeypatch.setattr(start.machine, "available", lambda: None)
        monkeypatch.setattr(tokens, "batch", batch)
    with pytest.raises(InputError, match=f"--rows: memory is too small for {rows} rows of 8"):
        trainings.begin(tmp_path, given={"rows": rows})
    assert [path.name for path in tmp_path.iterdir()] == ["text.txt"]


def test_texts_are_known_by_one_digest_of_all_in_their_order(tmp_path):
    a, b = tmp_path / "a", tmp_path / "b"
    for path in (a, b):
        path.write_text(path.name)
    digests = {start.text_digest(files) for files in ([], [a], [a, b], [b, a], [a, b] * 1000)}
    assert len(digests) == 5
    assert {len(digest) for digest in digests} == {0, 64}


def test_a_text_that_has_no_end_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(InputError, match="pipe: expected a file, found something else"):
        start.text_digest([tmp_path / "pipe"])


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

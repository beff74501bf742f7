"""`llama3np train` as a person meets it: its files, signals, refusals, and fine-tuning."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from unittest import mock

import numpy as np
import paths
import pytest
import trainings

from llama3np import cli
from llama3np.backend import CPU
from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.load import load_checkpoint, save_hf
from llama3np.load.convert import convert
from llama3np.params import random
from llama3np.train import checkpoint, metrics, start
from llama3np.train.flat import Flat
from llama3np.train.settings import Preset

pytestmark = pytest.mark.usefixtures("signals_heeded")
COMMAND = [sys.executable, "-c", "import sys; from llama3np.cli import main; sys.exit(main())"]
STEPS = 60
SMALL = ("--context", "16", "--rows", "2", "--eval-every", "25", "--max-steps", str(STEPS))


def begun(*args):
    """The command, running."""
    return subprocess.Popen(
        [*COMMAND, *map(str, args)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def llama3np(*args):
    process = begun(*args)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "text ü.txt"
    path.write_text(trainings.TEXT * 3, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def trained(text, tmp_path_factory):
    """OUT of a whole run, and what it said."""
    out = tmp_path_factory.mktemp("trained") / "out"
    return out, llama3np("train", "--text", text, "--out", out, *SMALL, "--json")


# ---- files -------------------------------------------------------------------------------------


def test_a_run_prints_one_object_and_leaves_a_model(trained):
    out, (status, stdout, stderr) = trained
    assert status == 0
    told = json.loads(stdout)
    lines = metrics.read(out / "metrics.jsonl")
    losses = [line["val_loss"] for line in lines if "val_loss" in line]
    assert told["out"] == str(out)
    assert (told["steps"], told["loss"]) == (STEPS, lines[-2]["loss"])
    assert (told["val_loss"], told["best_val_loss"]) == (losses[-1], min(losses))
    assert told["tokens_per_s"] > 0
    assert told["seconds"] > 0
    assert told["signal"] is None
    assert f"step {STEPS} of {STEPS}: loss" in stderr
    assert "0:00:00 left" in stderr
    assert "  | " in stderr  # a sample
    files = {path.name for path in out.iterdir()}
    settings = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}
    assert files == settings | {"model.safetensors", "metrics.jsonl", "loss.png", "training"}


def test_the_model_opens_with_the_other_commands(trained, tmp_path):
    out, _ = trained
    status, stdout, _ = llama3np(
        "generate", out, "12 sheep", "--max-new-tokens", "4", "--engine", "numpy", "--json"
    )
    assert status == 0
    assert len(json.loads(stdout)["ids"]) == 4
    convert(out, tmp_path / "model.gguf")
    kept = load_checkpoint(tmp_path / "model.gguf")
    assert kept.tokenizer.encode("12 sheep") == load_checkpoint(out).tokenizer.encode("12 sheep")


# ---- signals -----------------------------------------------------------------------------------


def signalled(text, out, number):
    """A run that got a signal after a few steps: its status and what it said on stderr."""
    process = begun("train", "--text", text, "--out", out, *SMALL, "--checkpoint-every", "3")
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and process.poll() is None:
        path = out / "metrics.jsonl"
        if path.exists() and path.read_bytes().count(b'"loss"') > 6:
            process.send_signal(number)
            break
        time.sleep(0.002)
    _, err = process.communicate(timeout=60)
    return process.returncode, err


def same(out, trained):
    a, b = trainings.outcome(out), trainings.outcome(trained[0])
    assert a[0] == b[0]
    assert a[2:] == b[2:]  # the run has another checkpoint_every


@pytest.mark.parametrize(("name", "status"), [("SIGINT", 130), ("SIGTERM", 143), ("SIGKILL", -9)])
def test_a_run_that_is_ended_goes_on_to_the_same_bits(text, trained, tmp_path, name, status):
    out = tmp_path / "out"
    found, err = signalled(text, out, getattr(signal, name))
    assert found == status
    if name != "SIGKILL":
        assert f"to go on: llama3np train --out {out} --resume" in err
    _, state = checkpoint.load(out / checkpoint.FILE, CPU)
    assert 3 <= state.step < STEPS
    status, stdout, _ = llama3np("train", "--out", out, "--resume", "--threads", "2")
    assert (status, stdout.split()[0]) == (0, "written:")
    same(out, trained)
    assert not list(out.rglob("*.partial"))


# ---- refusals ----------------------------------------------------------------------------------


def run(*args):
    """The command in this process: its status."""
    parsed = cli.parse(["train", *map(str, args)])
    return parsed.run(parsed)


def refused(*args):
    """The sentence of the InputError that the command ends with."""
    with pytest.raises(InputError) as error:
        run(*args)
    said = str(error.value)
    assert "\n" not in said
    return said


def test_an_out_that_is_not_empty_is_refused(trained, text):
    before = sorted(path.name for path in trained[0].parent.rglob("*"))
    assert "--resume goes on" in refused("--text", text, "--out", trained[0])
    assert sorted(path.name for path in trained[0].parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("option", "value", "was"),
    [
        ("--max-steps", STEPS + 1, STEPS),
        ("--seed", 1, 0),
        ("--learning-rate", 0.5, 0.003),
        ("--preset", "small", "tiny"),
        ("--tokenizer", "bpe:300", "char"),
        ("--context", 17, 16),
    ],
)
def test_another_option_than_the_stored_one_is_refused_with_resume(trained, option, value, was):
    said = refused("--out", trained[0], "--resume", option, value)
    assert said.startswith(f"{option}: the training in {trained[0]} began with {was}, not with")
    assert said.endswith("a new --out" if value in ("small", "bpe:300") else f"--init {trained[0]}")


def test_options_are_compared_without_reading_a_tensor(trained):
    with mock.patch.object(Flat, "of", side_effect=AssertionError("read")):
        assert refused("--out", trained[0], "--resume", "--seed", 1).startswith("--seed: ")


def test_another_text_is_refused_with_resume(trained, tmp_path, text):
    other = tmp_path / "other.txt"
    other.write_text("another text")
    said = refused("--out", trained[0], "--resume", "--text", other)
    assert said.startswith(f"--text: the training in {trained[0]} began with other files")
    assert run("--out", trained[0], "--resume", "--text", text) == 0  # and done already


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--resume"], "--resume: out: expected a training, found none"),
        ([], "--text: expected a file or more, found none"),
        (["--text", "absent.txt"], "absent.txt: cannot be read: No such file"),
        (["--text", "a.txt", "b.jsonl"], "plain text or dialogs (.jsonl), found a.txt and b.jsonl"),
        (["--init", "m", "--preset", "tiny"], "--preset: is for new models"),
        (["--init", "m", "--tokenizer", "char"], "--tokenizer: is for new models"),
        (["--init", "m", "--resume"], "--init: begins a training"),
        (["--text", "TEXT", "--max-steps", "0"], "steps: expected a whole number from 1 on"),
        (["--text", "TEXT", "--threads", "0"], "threads: expected a whole number from 1"),
        (["--text", "TEXT", "--device", "tpu"], "device: expected cpu, cuda or cuda:N"),
        (["--text", "TEXT", "--device", "cuda:77"], "device: "),
        (["--text", "TEXT", "--tokenizer", "words"], "--tokenizer: expected char, bpe:N or a file"),
        (["--text", "TEXT", "--context", "9999"], "text: expected"),
        (["--text", "TEXT", "--context", "1000000000"], "text: expected 10000000001 tokens"),
        (["--text", "TEXT", "--context", "9" * 400], "--context: expected at most 2147483647"),
    ],
)
def test_what_cannot_be_trained_is_told_in_a_sentence_and_leaves_nothing(
    tmp_path, monkeypatch, text, args, said
):
    monkeypatch.chdir(tmp_path)
    args = [str(text) if arg == "TEXT" else arg for arg in args]
    assert said in refused(*args, "--out", "out")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("out", "said"),
    [
        (".", "expected a name for what is to be made, found none"),
        ("", "expected a name for what is to be made, found none"),
        ("a" * 300, "cannot be written: File name too long"),
        ("a" * 300 + "/out", "cannot be written: File name too long"),
        ("empty", "exists already, and is not overwritten"),
        ("dangling", "exists already, and is not overwritten"),
        ("empty/x/y", "cannot be written: empty is no directory"),
    ],
)
def test_an_out_that_cannot_be_is_told(tmp_path, monkeypatch, text, out, said):
    monkeypatch.chdir(tmp_path)
    if "empty" in out:
        (tmp_path / "empty").touch()
    elif out == "dangling":
        (tmp_path / out).symlink_to("nowhere")
    before = list(tmp_path.iterdir())
    assert said in refused("--text", text, "--out", out)
    assert list(tmp_path.iterdir()) == before


@pytest.mark.parametrize("name", ["a" * 255, "é" * 127])
def test_an_out_may_have_as_long_a_name_as_the_system_takes(tmp_path, name):
    assert trainings.begin(tmp_path, name=name).joinpath(checkpoint.FILE).exists()


def test_an_error_in_an_out_of_a_long_name_is_told(tmp_path):
    with pytest.raises(InputError, match=r"expected .* tokens or more"):
        trainings.begin(tmp_path, "too short", name="a" * 255)


def test_a_reader_who_leaves_stderr_costs_no_training(begun_small):
    read, write = os.pipe()
    os.close(read)
    command = [*COMMAND, "train", "--out", begun_small, "--resume"]
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=write, check=False)
    os.close(write)
    assert (done.returncode, done.stdout[:9]) == (0, b"written: ")


def test_a_full_disk_at_the_beginning_is_told_by_the_name_of_out(tmp_path, monkeypatch):
    def full(self, *_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    (tmp_path / "text.txt").write_bytes(trainings.TEXT.encode())
    out = tmp_path / "out"
    said = refused("--text", tmp_path / "text.txt", "--out", out)
    assert said == f"{out}/tokenizer_config.json: cannot be written: No space left on device"


def test_a_missing_matplotlib_costs_the_picture_alone(begun_small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run("--out", begun_small, "--resume") == 0
    assert not (begun_small / "loss.png").exists()
    assert capsys.readouterr().err.count('pip install "llama3np[train]"') == 1


# ---- fine-tuning -------------------------------------------------------------------------------

# Rows of 32 numbers, so that Q8_0 has whole blocks.
SIZES = replace(trainings.SIZES, dim=32, n_heads=4, n_kv_heads=2, head_dim=8, ffn_dim=32)


@pytest.fixture
def begun_small(tmp_path):
    return trainings.begin(tmp_path)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A small model with a tokenizer, as a Hugging Face directory."""
    directory = tmp_path_factory.mktemp("model")
    with mock.patch.object(trainings, "SIZES", SIZES):
        return trainings.begin(directory)


def fine_tuned(init, tmp_path, **given):
    (tmp_path / "text.txt").write_text(trainings.TEXT)
    out = tmp_path / "out"
    notes = start.begin(
        out, start.Order([tmp_path / "text.txt"], init=str(init), given={"steps": 2, **given})
    )
    assert notes == []
    return out, *checkpoint.load(out / checkpoint.FILE, CPU)


@pytest.mark.parametrize("kind", ["hf", "f32.gguf", "q8_0.gguf"])
def test_fine_tuning_begins_with_the_weights_and_the_tokenizer_of_any_format(model, tmp_path, kind):
    init = model
    if kind != "hf":
        init = tmp_path / kind
        convert(model, init, dtype=kind.partition(".")[0])
    out, run, state = fine_tuned(init, tmp_path)
    loaded = load_checkpoint(init)
    assert run.config == replace(loaded.config, rope_pairing="half")
    assert run.settings.context == 8  # the model's: it saw no more
    ids = [[1, 5, 200, 256, 7, 3]]
    expected = llm_logits(loaded.config, loaded.params, ids)
    found = llm_logits(run.config, state.params.params(run.config), ids)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)
    written = load_checkpoint(out)
    assert written.tokenizer.encode("12 é") == loaded.tokenizer.encode("12 é")
    read = llm_logits(written.config, written.params, ids)
    np.testing.assert_allclose(read, expected, rtol=1e-4, atol=1e-5)  # nothing is rounded away
    trainings.go_on(out)
    assert metrics.read(out / "metrics.jsonl")[-1]["step"] == 2


def llm_logits(config, params, ids):
    from llama3np import Llama

    return Llama(config, params, engine="numpy").forward(ids)


def test_a_model_of_another_vocabulary_is_fine_tuned(tmp_path):
    """A llama2.c file: Llama 2's kind of vocabulary, which is not written; it still serves."""
    stories = tmp_path / "stories260K.bin"
    shutil.copyfile(paths.shared("data/stories260K.bin"), stories)
    shutil.copyfile(paths.shared("data/tok512.bin"), tmp_path / "tok512.bin")
    (tmp_path / "text.txt").write_text("Once upon a time, there was a llama. " * 200)
    given = {"steps": 2, "context": 64}
    order = start.Order([tmp_path / "text.txt"], init=str(stories), given=given)
    (note,) = start.begin(tmp_path / "out", order)
    assert "the tokenizer is left out" in note
    assert note.endswith("the new model takes token ids only, and samples of it are left out")
    trainings.go_on(tmp_path / "out")
    losses = [line.get("val_loss") for line in metrics.read(tmp_path / "out/metrics.jsonl")]
    assert losses[0] < 4  # of 6.2 for guessing: the weights and the ids fit each other


def test_what_cannot_be_fine_tuned_is_told(model, tmp_path):
    config = Config(8, 1, 2, 1, 4, 12, 30, context_length=16)
    save_hf(tmp_path / "bare", config, random(config, np.random.default_rng(0)))
    with pytest.raises(InputError, match="has no tokenizer, which a text needs"):
        fine_tuned(tmp_path / "bare", tmp_path)
    with pytest.raises(InputError, match="--context: expected at most the 8 positions"):
        fine_tuned(model, tmp_path, context=9)
    with pytest.raises(InputError, match="context: expected a whole number from 1 on, found 0"):
        fine_tuned(model, tmp_path, context=0)
    assert not (tmp_path / "out").exists()


def test_dialogs_are_learned_from_with_masks(tmp_path):
    lines = [
        {"messages": [{"role": "user", "content": str(n)}, {"role": "assistant", "content": "ok"}]}
        for n in range(20)
    ]
    path = tmp_path / "chat.JSONL"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    out, preset = tmp_path / "out", Preset(trainings.SIZES, trainings.SETTINGS)
    with mock.patch.dict(start.PRESETS, tiny=preset):
        start.begin(out, start.Order([path]))
    trainings.go_on(out)
    losses = [line["val_loss"] for line in metrics.read(out / "metrics.jsonl") if len(line) == 2]
    assert losses[-1] < losses[0]
    assert (out / "training/tokens/train_mask.npy").exists()
    assert load_checkpoint(out).tokenizer.chat_template is not None

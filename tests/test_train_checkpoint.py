"""Checkpoints: read is what was written, and no fault while writing loses the one before."""

import shutil
from dataclasses import asdict, replace

import faults
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

from llama3np.backend import CPU
from llama3np.errors import CheckpointError, InputError
from llama3np.params import named, random
from llama3np.train import checkpoint, durable
from llama3np.train.checkpoint import Run, State
from llama3np.train.flat import Flat
from llama3np.train.metrics import Metrics, read
from llama3np.train.settings import FINE_TUNING

counts = st.integers(0, 10**9)
losses = st.none() | st.floats(0, 20)


@st.composite
def trainings(draw):
    """(run, state) of any small model, with everything drawn."""
    config = draw(strategies.configs())
    rng = np.random.default_rng(draw(strategies.seeds))
    flats = [Flat.of(named(random(config, rng), config.tied)) for _ in range(3)]
    seed, rows = draw(st.integers(0, 2**63)), draw(st.integers(1, 64))
    settings = replace(FINE_TUNING, seed=seed, rows=rows)
    origin = {"text": ["ab"], "tokenizer": draw(st.text(max_size=5)), "init": None}
    run = Run(config, settings, origin, {"tokenizer.json": "00"})
    numbers = [draw(kind) for kind in (counts, counts, losses, losses, counts)]
    return run, State(*flats, *numbers)


def bits(found):
    """Everything of a run and its state that must be the same."""
    run, state = found
    told = {k: v for k, v in vars(state).items() if not isinstance(v, Flat)}
    flats = [
        {name: (w.shape, w.tobytes()) for name, w in flat.tensors.items()}
        for flat in (state.params, state.first, state.second)
    ]
    return asdict(run.config), run.settings, run.origin, run.files, told, flats


@given(trainings())
def test_what_is_loaded_is_what_was_saved(tmp_path_factory, training):
    path = tmp_path_factory.mktemp("run") / "checkpoint.safetensors"
    checkpoint.save(path, *training)
    assert bits(checkpoint.load(path, CPU)) == bits(training)
    assert checkpoint.load_run(path) == training[0]
    assert checkpoint.load(path, CPU)[1].params.vector.flags.writeable


# ---- faults ------------------------------------------------------------------------------------

SMALL = strategies.Config(
    dim=4, n_layers=1, n_heads=2, n_kv_heads=1, head_dim=2, ffn_dim=6, vocab_size=5, tied=True
)


def training(seed):
    params = random(SMALL, np.random.default_rng(seed))
    state = State.start(Flat.of(named(params, SMALL.tied)))
    state.step = seed
    return Run(SMALL, FINE_TUNING, {"text": []}, {}), state


@pytest.fixture
def begun(tmp_path):
    """prepare(): a directory with the checkpoint of step 1, new each time."""

    def prepare():
        shutil.rmtree(tmp_path / "training", ignore_errors=True)
        (tmp_path / "training").mkdir()
        path = tmp_path / checkpoint.FILE
        checkpoint.save(path, *training(1))
        return path

    return prepare


OLD, NEW = bits(training(1)), bits(training(2))


def test_a_disk_that_fails_at_any_call_leaves_the_checkpoint_before_whole(begun):
    hits = []
    for hit, error, path in faults.every(
        lambda path: checkpoint.save(path, *training(2)), begun, kills=False
    ):
        hits.append(hit)
        if hit != "unlink":
            assert type(error) is InputError
            assert "checkpoint.safetensors: cannot be written: No space left" in str(error)
        renamed = hits.count("fsync") == 2  # that of the directory: the new name is there
        assert bits(checkpoint.load(path, CPU)) == (NEW if renamed else OLD)
        assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert hits[0] == "open_new"
    assert hits[-3:] == ["fsync", "replace", "fsync"]
    assert hits.count("write") == 1 + 3 * len(training(1)[1].params.tensors)


def test_a_kill_at_any_call_leaves_a_whole_checkpoint_and_one_file_at_most(begun):
    hits = []
    for hit, error, path in faults.every(
        lambda path: checkpoint.save(path, *training(2)), begun, kills=True
    ):
        hits.append(hit)
        assert isinstance(error, faults.Killed)
        assert bits(checkpoint.load(path, CPU)) == (NEW if hits.count("fsync") == 2 else OLD)
        checkpoint.save(path, *training(2))  # what a kill left is replaced by the next
        assert bits(checkpoint.load(path, CPU)) == NEW
        assert [file.name for file in path.parent.iterdir()] == [path.name]
    assert {"open_new", "write", "fsync", "replace"} <= set(hits)


def test_the_new_name_comes_after_the_new_bytes_are_on_the_disk(tmp_path, monkeypatch):
    """What a power cut would show: nothing is renamed that was not sent to the disk."""
    events = []
    real_sync, real_replace = durable.sync, durable.os.replace
    monkeypatch.setattr(durable, "sync", lambda file: (events.append("sync"), real_sync(file)))
    monkeypatch.setattr(
        durable.os, "replace", lambda *names: (events.append("rename"), real_replace(*names))
    )
    monkeypatch.setattr(durable, "sync_directory", lambda path: events.append("directory"))
    durable.replace_file(tmp_path / "file", lambda file: file.write(b"new"))
    assert events == ["sync", "rename", "directory"]


# ---- wrong files -------------------------------------------------------------------------------


def test_parameters_that_are_no_numbers_are_not_written(begun):
    path, (run, state) = begun(), training(2)
    state.params.vector[3] = np.nan
    with pytest.raises(InputError, match="not finite at step 2"):
        checkpoint.save(path, run, state)
    assert bits(checkpoint.load(path, CPU)) == OLD


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data[: len(data) // 2],
        lambda data: data.replace(b"first.embed_VD", b"third.embed_VD"),
        lambda data: data.replace(b'\\"step\\"', b'\\"stop\\"'),
        lambda data: data.replace(b'\\"dim\\": 4', b'\\"dim\\": 5'),
        lambda data: data.replace(b"llama3np.train", b"somebody.else1"),
        lambda data: b"",
    ],
)
def test_a_file_that_is_no_checkpoint_is_refused_by_name(begun, spoil):
    path = begun()
    data = path.read_bytes()
    assert spoil(data) != data
    path.write_bytes(spoil(data))
    with pytest.raises(CheckpointError, match=r"checkpoint\.safetensors: "):
        checkpoint.load(path, CPU)


def test_a_file_that_was_changed_since_is_named(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    run, _ = training(1)
    run = run._replace(files=checkpoint.digests(tmp_path, ["tokenizer.json"]))
    checkpoint.verify(tmp_path, run)
    (tmp_path / "tokenizer.json").write_text("{ }")
    with pytest.raises(CheckpointError, match=r"tokenizer\.json: is not the file this training"):
        checkpoint.verify(tmp_path, run)
    (tmp_path / "tokenizer.json").unlink()
    with pytest.raises(CheckpointError, match="found none"):
        checkpoint.verify(tmp_path, run)


# ---- metrics -----------------------------------------------------------------------------------


def test_metrics_are_cut_back_to_what_a_checkpoint_knows_of(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.write(step=1, loss=2.5)
    length = metrics.sync()
    metrics.write(step=2, loss=2.25)
    assert len(read(metrics.path)) == 2  # nothing waits in a buffer
    metrics.close()
    with metrics.path.open("ab") as file:
        file.write(b'{"step": 3, "lo')
    again = Metrics(metrics.path, length)
    assert again.sync() == length == metrics.path.stat().st_size  # with nothing added yet
    again.write(step=2, loss=2.0)
    assert again.sync() == metrics.path.stat().st_size
    assert read(metrics.path) == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}]


def test_metrics_that_are_shorter_than_a_checkpoint_knows_are_refused(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match=r"at least the 10 bytes .* found 3"):
        Metrics(tmp_path / "metrics.jsonl", 10)


def test_a_loss_that_is_no_number_is_never_written_as_json(tmp_path):
    metrics = Metrics(tmp_path / "metrics.jsonl")
    with pytest.raises(ValueError, match="JSON"):
        metrics.write(step=1, loss=float("nan"))
    assert read(metrics.path) == []

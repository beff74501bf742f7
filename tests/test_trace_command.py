"""The command `llama3np trace`: what it writes, says and refuses."""

import hashlib
import json
import shutil
import signal
import subprocess
import sys
import time

import numpy as np
import paths
import pytest
from checks import assert_same

from llama3np.cli import main
from llama3np.config import Config
from llama3np.crosscheck import files, taps, trace
from llama3np.llm import load
from llama3np.load import save_hf
from llama3np.params import random

TINY = Config(
    dim=16, n_layers=3, n_heads=4, n_kv_heads=2, head_dim=4, ffn_dim=20, vocab_size=30,
    context_length=64, rope_pairing="half",
)  # fmt: skip
IDS = ["--prompt-ids", "1,2,3,4"]
PLAIN = [*IDS, "--engine", "numpy", "--no-budgets"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny"
    save_hf(directory, TINY, random(TINY, np.random.default_rng(0)))
    return str(directory)


@pytest.fixture
def command(tiny, capsys, monkeypatch, tmp_path):
    """Run `llama3np trace tiny ...` in an empty folder; (status, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)

    def run(*args):
        status = main(["trace", tiny, *args])
        return status, *capsys.readouterr()

    return run


def recorded(tiny, ids, *args, dtype="float32", **options):
    return trace.record(load(tiny, dtype=dtype, engine="numpy"), ids, *args, **options)


def assert_same_trace(found, expected):
    assert list(found) == list(expected)
    for name, array in expected.items():
        assert_same(found[name], array, name)


@pytest.mark.parametrize("out", ["t.safetensors", "t.npz", "t"])
def test_all_taps_are_written(command, tiny, out):
    status, stdout, stderr = command(*PLAIN, "-o", out)
    assert (status, stdout) == (0, f"written: {out}\n")
    found, expected = files.read(out), recorded(tiny, [1, 2, 3, 4])
    assert_same_trace(found.arrays, expected.arrays)
    size = sum(array.nbytes for array in expected.arrays.values())
    assert stderr == f"{out}: 54 taps at 4 of 4 positions, {size / 1000:.3g} kB\n"
    assert found.meta["model"] == tiny
    assert list(found.meta["files"]) == ["model.safetensors"]
    assert found.meta["budgets"] == {}


def test_a_selection_is_written(command, tiny):
    selected = ["--layers", "0,2", "--positions", "0-1,3", "--taps", "q, k_rope,logits"]
    assert command(*PLAIN, *selected, "-o", "t")[0] == 0
    options = {"layers": [0, 2], "positions": [0, 1, 3], "taps": ["q", "k_rope", "logits"]}
    found = files.read("t")
    assert_same_trace(found.arrays, recorded(tiny, [1, 2, 3, 4], **options).arrays)
    assert len(found.arrays) == 5
    assert found.meta["positions"] == [0, 1, 3]


def test_the_prompt_can_be_split(command, tiny):
    assert command(*PLAIN, "--prefill", "2", "-o", "t")[0] == 0
    found = files.read("t")
    assert_same_trace(found.arrays, recorded(tiny, [1, 2, 3, 4], 2).arrays)
    assert (found.meta["prefill"], found.meta["ids"]) == (2, [1, 2, 3, 4])


def test_greedy_tokens_are_traced_one_at_a_time(command, tiny):
    assert command(*PLAIN, "--decode", "3", "-o", "t")[0] == 0
    found = files.read("t")
    ids = found.meta["ids"]
    assert (ids[:4], len(ids), found.meta["prefill"]) == ([1, 2, 3, 4], 7, 4)
    assert_same_trace(found.arrays, recorded(tiny, ids, 4).arrays)
    assert found.arrays["logits"].argmax(-1)[3:6].tolist() == ids[4:]


def test_positions_beyond_the_context_are_told(command):
    said = "positions, of a model whose context is 64"
    for length, told in ((64, False), (65, True)):
        args = ("--prompt-ids", ",".join(["1"] * length), "--no-budgets", "--taps", "embed")
        status, _, err = command(*args, "-o", f"{length}.npz")
        assert (status, f"{length} {said}" in err) == (0, told), err


def test_a_stop_token_does_not_end_a_trace(tiny, capsys, monkeypatch, tmp_path):
    shutil.copytree(tiny, tmp_path / "stops")
    (tmp_path / "stops" / "generation_config.json").write_text(
        json.dumps({"eos_token_id": list(range(TINY.vocab_size))})
    )
    monkeypatch.chdir(tmp_path)
    assert main(["trace", "stops", *PLAIN, "--decode", "3", "-o", "t"]) == 0
    assert len(files.read("t").meta["ids"]) == 7


def test_float64_is_the_oracle(command, tiny):
    assert command(*PLAIN, "--profile", "float64", "-o", "t.npz")[0] == 0
    found = files.read("t.npz")
    assert found.meta["profile"] == "float64"
    assert {array.dtype for array in found.arrays.values()} == {np.dtype(np.float64)}
    assert_same_trace(found.arrays, recorded(tiny, [1, 2, 3, 4], dtype="float64").arrays)


def test_budgets_are_measured_unless_told_otherwise(command):
    profiles = ["float32", "bf16-hf", "bf16-meta", "f16-hf"]
    status, stdout, stderr = command(*IDS, "--json", "-o", "t")
    assert status == 0
    assert json.loads(stdout)["budgets"] == list(files.read("t").meta["budgets"]) == profiles
    assert f"measuring {', '.join(profiles)} against float64" in stderr
    assert command(*IDS, "--profile", "bf16-hf", "--budgets", "f16-hf", "-o", "u")[0] == 0
    budgets = files.read("u").meta["budgets"]
    assert list(budgets) == ["f16-hf"]
    assert list(budgets["f16-hf"]) == taps.order(TINY.n_layers)


def test_json_is_one_object(command, tiny):
    status, stdout, _ = command(*PLAIN, "--json", "-o", "t.npz")
    told = json.loads(stdout)
    assert status == 0
    assert (told["out"], told["taps"], told["ids"]) == ("t.npz", 54, [1, 2, 3, 4])
    assert told["bytes"] == sum(array.nbytes for array in files.read("t.npz").arrays.values())


# ---- what is refused ----------------------------------------------------------------------------

BAD = {
    "tap": (["--taps", "q,qq"], "taps: expected some of embed, attn_norm"),
    "layer": (["--layers", "3"], "layers: expected numbers from 0 to 2, found 3"),
    "position": (["--positions", "0-4"], "positions: expected numbers from 0 to 3, found 4"),
    "range": (["--layers", "3-1"], "--layers: expected numbers such as 0,3-5, found '3-1'"),
    "word": (["--positions", "last"], "--positions: expected numbers such as 0,3-5, found 'last'"),
    "empty": (["--taps", ""], "found ''"),
    "prefill": (["--prefill", "0"], "--prefill: expected 1 to 4 ids, found 0"),
    "prefill of decode": (["--prefill", "5", "--decode", "2"], "--prefill: expected 1 to 4 ids"),
    "decode too many": (["--decode", "9999"], "--decode: expected "),
    "decode": (["--decode", "-1"], "decode: expected a whole number from 0 on, found -1"),
    "budgets": (["--budgets", "float32"], "expected one of --budgets and --no-budgets"),
    "ending": (["-o", "t.pt"], "t.pt: expected a name that ends in .safetensors or .npz"),
    "prompt": (["Hello"], "expected either PROMPT or --prompt-ids"),
}


@pytest.mark.parametrize("name", BAD)
def test_mistakes_are_told_in_one_sentence_and_leave_nothing(command, tmp_path, name):
    args, words = BAD[name]
    status, stdout, stderr = command(*PLAIN, "-o", "t", *args)
    assert (status, stdout) == (2, "")
    assert stderr.startswith("llama3np: ")
    assert words in stderr
    assert stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten_and_that_is_said_at_once(command, tmp_path):
    (tmp_path / "t.npz").write_bytes(b"mine")
    status, _, stderr = command(*PLAIN, "-o", "t.npz")
    assert (status, stderr) == (2, "llama3np: t.npz: exists already, and is not overwritten\n")
    assert (tmp_path / "t.npz").read_bytes() == b"mine"


def test_a_disk_without_room_is_told_before_anything_runs(command, monkeypatch, tmp_path):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    status, _, stderr = command(*PLAIN, "-o", "t.npz")
    assert status == 2
    assert "t.npz: needs " in stderr
    assert "has 1,000 free (--layers, --positions and --taps bound the size)" in stderr
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("signals_heeded")
@pytest.mark.parametrize("out", ["t.safetensors", "t.npz", "t"])
def test_ctrl_c_leaves_nothing(tiny, tmp_path, out):
    ids = ",".join("1" for _ in range(3000))
    args = ["trace", tiny, "--prompt-ids", ids, "--prefill", "1", "--taps", "logits", "-o", out]
    code = "import sys; from llama3np.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, *args, "--engine", "numpy", "--no-budgets"],
        cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stderr.readline() == "3000 positions, of a model whose context is 64\n"
    assert process.stderr.readline() == f"{out}: 1 tap at 3000 of 3000 positions, 360 kB\n"
    time.sleep(0.3)  # amid its 3000 calls
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=60) == ("", "")
    assert process.returncode == 130
    assert list(tmp_path.iterdir()) == []


# ---- a real model -------------------------------------------------------------------------------


def test_the_embedded_model_is_traced_from_a_text(command):
    golden = json.loads((paths.GOLDENS / "embedded.json").read_text(encoding="utf-8"))
    romeo = next(item for item in golden["items"] if item["prompt"] == "ROMEO:")
    args = ("ROMEO:", "-o", "t.npz", "--layers", "0", "--no-budgets")
    assert main(["trace", "shakespeare", *args]) == 0
    found = files.read("t.npz")
    assert found.meta["ids"] == romeo["prompt_ids"]
    assert len(found.arrays) == 20
    known = np.load(paths.GOLDENS / "embedded_arrays.npz")["taps/romeo/layers.0.h"]
    assert np.abs(found.arrays["layers.0.h"] - known).max() < 1e-5 * np.abs(known).max()
    weights = (paths.EMBEDDED / "model.safetensors").read_bytes()
    assert found.meta["files"] == {"model.safetensors": hashlib.sha256(weights).hexdigest()}

"""tools/capture: what the adapters that need no torch write is what was computed, bit for bit."""

import ctypes
import json
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np
import pytest
from capture import numpy_capture
from checks import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from paths import REPOSITORY
from strategies import runs

from llama3np.config import Config
from llama3np.crosscheck import files, schemes, trace
from llama3np.crosscheck.allowance import precision
from llama3np.llm import Llama
from llama3np.params import random

CAPTURE = REPOSITORY / "tools" / "capture"
C_COMPILER = shutil.which(os.environ.get("CC", "cc")) or shutil.which("gcc")
needs_c = pytest.mark.skipif(C_COMPILER is None, reason="no C compiler (cc, gcc or $CC)")

# ---- NumPy ---------------------------------------------------------------------------------------


@settings(max_examples=20)
@given(runs(), st.data())
def test_taps_of_a_numpy_port_are_what_a_trace_has(run, data):
    """Through any split into calls: rows are joined, and early queries' later keys are masked."""
    model, ids = run
    prefill = data.draw(st.none() | st.integers(1, len(ids)))
    llm = Llama(model.config, model.params, engine="numpy", threads=1)
    expected = trace.record(llm, ids, prefill).arrays
    trace.run(llm, ids, prefill, lambda name, _, array: numpy_capture.tap(name, array))
    with tempfile.TemporaryDirectory() as folder:
        numpy_capture.save(Path(folder) / "port.npz", ids, implementation="a port")
        found = files.read(Path(folder) / "port.npz")
        assert found.meta == {
            "ids": list(ids), "prefill": prefill or len(ids), "implementation": "a port",
        }  # fmt: skip
        assert list(found.arrays) == list(expected)
        for name, array in expected.items():
            assert_same(found.arrays[name], array, name)


def test_a_tap_keeps_what_the_array_was_and_forgets_it_once_saved(tmp_path):
    x_D = np.ones(3)
    assert numpy_capture.tap("x", x_D) is x_D
    x_D += 1
    numpy_capture.save(tmp_path / "x.npz", [1])
    assert files.read(tmp_path / "x.npz").arrays["x"].tolist() == [1, 1, 1]
    assert not numpy_capture.calls


@pytest.mark.parametrize(
    ("rows", "told"),
    [([5], 5), ([3, 1, 1], 3), ([1] * 5, 1), ([3, 2], None), ([1], None), ([4, 1, 1], None)],
)
def test_the_calls_tell_the_prefill_or_nobody_does(tmp_path, rows, told):
    for count in rows:
        numpy_capture.tap("x", np.ones((count, 2)))
    numpy_capture.save(tmp_path / "x.npz", range(5))
    assert files.read(tmp_path / "x.npz").meta.get("prefill") == told


def test_a_16_bit_array_does_not_speak_for_the_others(tmp_path):
    """A float16 embedding, and everything else in float32."""
    numpy_capture.tap("embed", np.full((2, 3), 0.1, np.float16))
    numpy_capture.tap("logits", np.full((2, 3), 0.1, np.float32))
    numpy_capture.save(tmp_path / "x.npz", [1, 2])
    found = files.read(tmp_path / "x.npz")
    assert precision(found.meta, found.arrays).dtype == "float32"


# ---- C -------------------------------------------------------------------------------------------

# What a caller of capture.h sees, as a library, so that drawn arrays can go through it.
LIBRARY = """
#include "capture.h"
void start(const char *folder, const char *metadata) { capture_open(folder, metadata); }
void put(const char *name, const float *x, int n, const long *shape) { capture(name, x, n, shape); }
int stop(void) { return capture_close(); }
"""
STRICT = ("-std=c99", "-O2", "-Wall", "-Wextra", "-pedantic", "-Wno-format-truncation", "-Werror")

tensors = st.dictionaries(
    st.from_regex(r"[a-z0-9_.]{1,20}", fullmatch=True).filter(lambda name: name.strip(".")),
    arrays.arrays(np.float32, arrays.array_shapes(min_dims=0, max_dims=4, max_side=4)),
    max_size=4,
)


@pytest.fixture(scope="module")
def header(tmp_path_factory):
    """capture.h as a shared library."""
    folder = tmp_path_factory.mktemp("capture")
    (folder / "port.c").write_text(LIBRARY)
    command = [C_COMPILER, *STRICT, "-shared", "-fPIC", f"-I{CAPTURE}", "port.c", "-o", "port.so"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "port.so"))


@needs_c
@settings(max_examples=30)
@given(tensors, st.lists(st.integers(0, 9)))
def test_what_the_header_writes_is_read_back_bit_for_bit(header, given_arrays, ids):
    """NaN, subnormals and negative zeros too; any shape, also that of a single number."""
    with tempfile.TemporaryDirectory() as folder:
        header.start(folder.encode(), f'"ids": {ids}'.encode())
        for name, array in given_arrays.items():
            shape = (ctypes.c_long * array.ndim)(*array.shape)
            pointer = array.ctypes.data_as(ctypes.c_void_p)
            header.put(name.encode(), pointer, array.ndim, shape)
        assert header.stop() == 0
        found = files.read(folder)
        assert found.meta["ids"] == ids
        assert list(found.arrays) == list(given_arrays)
        for name, array in given_arrays.items():
            assert found.arrays[name].shape == array.shape
            assert found.arrays[name].tobytes() == array.tobytes()


@needs_c
def test_without_the_last_call_there_is_no_manifest(header, tmp_path):
    header.start(bytes(tmp_path), b"")
    assert not (tmp_path / "manifest.json").exists()
    assert header.stop() == 0
    assert json.loads((tmp_path / "manifest.json").read_text()) == {"metadata": {}, "arrays": []}


@needs_c
def test_the_header_counts_what_it_could_not_write(header, tmp_path):
    header.start(bytes(tmp_path / "absent"), b"")
    assert header.stop() > 0
    header.start(bytes(tmp_path), b"")
    one = (ctypes.c_float * 1)(1.0)
    header.put(b"no/such/folder", one, 1, (ctypes.c_long * 1)(1))
    assert header.stop() == 1
    assert not (tmp_path / "manifest.json").exists()


@needs_c
@pytest.mark.parametrize("theta", ["10000", "500000"])
def test_the_unit_in_c_agrees_with_the_reference_it_was_fed_from(tmp_path, theta):
    """Of another theta it diverges, where positions are not 0."""
    config = Config(
        dim=12, n_layers=1, n_heads=4, n_kv_heads=2, head_dim=6, ffn_dim=8, vocab_size=20
    )
    llm = Llama(config, random(config, np.random.default_rng(0)), engine="numpy", threads=1)
    trace.write(tmp_path / "raw", llm, [3, 1, 4, 1, 5])
    command = [C_COMPILER, *STRICT, str(CAPTURE / "rope_unit.c"), "-o", "unit", "-lm"]
    subprocess.run(command, cwd=tmp_path, check=True)
    (tmp_path / "out").mkdir()
    subprocess.run(["./unit", "raw", "5", "4", "6", theta, "out"], cwd=tmp_path, check=True)
    found = files.read(tmp_path / "out")
    assert found.meta == {"implementation": "rope_unit.c", "dtype": "float32"}
    expected_TNH = files.read(tmp_path / "raw").arrays["layers.0.q_rope"]
    error_TNH = abs(found.arrays["layers.0.q_rope"] - expected_TNH)
    assert error_TNH[0].max() == 0
    assert (error_TNH.max() < 1e-6) == (theta == "10000")


def test_the_header_is_short():
    assert len((CAPTURE / "capture.h").read_text().splitlines()) <= 40


# ---- names ---------------------------------------------------------------------------------------

# What the other adapters called the arrays of one layer, and of the rest, when they were run.
TRANSFORMERS = """
model.embed_tokens.output model.layers.0.input_layernorm.output
model.layers.0.self_attn.q_proj.output model.layers.0.self_attn.k_proj.output
model.layers.0.self_attn.v_proj.output model.layers.0.self_attn.q_rope
model.layers.0.self_attn.k_rope model.layers.0.self_attn.scores model.layers.0.self_attn.probs
model.layers.0.self_attn.o_proj.input model.layers.0.self_attn.o_proj.output
model.layers.0.post_attention_layernorm.input model.layers.0.post_attention_layernorm.output
model.layers.0.mlp.gate_proj.output model.layers.0.mlp.up_proj.output
model.layers.0.mlp.down_proj.input model.layers.0.mlp.down_proj.output model.layers.0.output
model.norm.output lm_head.output
"""
META = """
tok_embeddings.output layers.0.attention_norm.output layers.0.attention.wq.output
layers.0.attention.wk.output layers.0.attention.wv.output layers.0.attention.q_rope
layers.0.attention.k_rope layers.0.attention.scores layers.0.attention.probs
layers.0.attention.wo.input layers.0.attention.wo.output layers.0.ffn_norm.input
layers.0.ffn_norm.output layers.0.feed_forward.w1.output layers.0.feed_forward.w3.output
layers.0.feed_forward.w2.input layers.0.feed_forward.w2.output layers.0.output
norm.output output.output
"""
LLAMA_CPP = """
embd attn_norm-0 Qcur-0 Kcur-0 Vcur-0 Qcur_rope-0 Kcur_rope-0 kq-0 kq_soft_max-0 kqv_out-0
attn_out-0 ffn_inp-0 ffn_norm-0 ffn_gate-0 ffn_up-0 ffn_swiglu-0 ffn_out-0 l_out-0
result_norm result_output
"""
ALL_TAPS = 20


@pytest.mark.parametrize("names", [TRANSFORMERS, META, LLAMA_CPP])
def test_each_adapters_names_mean_every_tap(names):
    """In the order of a forward pass, each tap once or, in llama.cpp, one of two."""
    meanings = [schemes.meaning(name, n_layers=1) for name in names.split()]
    assert None not in meanings
    assert len({meaning.kinds for meaning in meanings}) == ALL_TAPS
    assert {meaning.layer for meaning in meanings} == {None, 0}

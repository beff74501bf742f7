"""load/convert.py: weights, tokenizers and stop ids from one format into another, whole or not."""

import errno
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
import tracemalloc
from dataclasses import replace

import gguf as peer_gguf
import ml_dtypes
import numpy as np
import paths
import pytest
import strategies
import vocabularies
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import llama3np
from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.kernels import Blocks
from llama3np.load import (
    gguf,
    gguf_file,
    load_checkpoint,
    names,
    quantize,
    safetensors,
    save_gguf,
    save_hf,
    save_llama2c,
    save_meta,
)
from llama3np.load.convert import CHOICES, convert
from llama3np.params import named, random
from llama3np.tokenizer import export, from_gguf, from_tokenizer_json

SMALL = Config(
    dim=64, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=16, ffn_dim=96, vocab_size=40,
    context_length=2048,
)  # fmt: skip
COMMAND = [sys.executable, "-c", "import sys; from llama3np.cli import main; sys.exit(main())"]
NUMPY = {"f32": np.dtype("f4"), "f16": np.dtype("f2"), "bf16": np.dtype(ml_dtypes.bfloat16)}
TEXTS = ["Hello, wörld! 12345", "\n\n\tx = 1\r\n  it's 漢字 🦙", " ", "", "a\u2581b \x04"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("convert")


def small(dtype="f32", config=SMALL):
    return random(config, np.random.default_rng(0), NUMPY[dtype])


def saved(path, kind, config, params, mp=1):
    """A checkpoint of this kind at `path`, where there was perhaps another."""
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    if kind == "meta":
        save_meta(path, config, params, mp)
    else:
        {"hf": save_hf, "gguf": save_gguf, "llama2c": save_llama2c}[kind](path, config, params)
    return path


def values(path, pairing="half", dtype=None):
    """Every tensor's dtype and bits, in one order of rows; cast if a dtype is given."""
    checkpoint = load_checkpoint(path)
    config, params = names.with_pairing(checkpoint.config, checkpoint.params, pairing)
    tensors = {name: np.asarray(w) for name, w in named(params, config.tied).items()}
    cast = {n: w.astype(NUMPY[dtype]) if dtype else w for n, w in tensors.items()}
    return config, {name: (str(w.dtype), w.tobytes()) for name, w in cast.items()}


# ---- weights -----------------------------------------------------------------------------------


@st.composite
def models(draw):
    """Models that every format has a place for."""
    K, G, H = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6]))
    fixed = {"n_kv_heads": K, "n_heads": K * G, "head_dim": H, "dim": K * G * H}
    fixed |= {"norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None}
    return draw(strategies.models(**fixed))


def inside(folder):
    """The names in a folder."""
    return sorted(path.name for path in folder.iterdir())


def shards_for(config):
    sizes = (config.n_kv_heads, config.ffn_dim, config.vocab_size)
    return 2 if all(size % 2 == 0 for size in sizes) else 1


@given(models(), st.lists(st.sampled_from(["hf", "meta", "gguf"]), min_size=1, max_size=3))
def test_weights_keep_their_bits_on_any_way_through_the_formats(folder, model, way):
    config = replace(model.config, context_length=2048)
    path = saved(folder / "source", "hf", config, model.params)
    expected_config, expected = values(path)
    for i, to in enumerate(way):
        out = folder / f"out{i}"
        shutil.rmtree(out, ignore_errors=True)
        out.unlink(missing_ok=True)
        mp = shards_for(config) if to == "meta" else None
        assert convert(path, out, to, model_parallel=mp) == []
        path = out
    found_config, found = values(path)
    assert found == expected
    assert replace(found_config, context_length=2048) == expected_config


@given(models())
def test_llama2c_files_are_a_source(folder, model):
    source = saved(folder / "x.bin", "llama2c", model.config, model.params)
    out = folder / "of_llama2c"
    shutil.rmtree(out, ignore_errors=True)
    convert(source, out)
    assert values(out) == values(source)


@pytest.mark.parametrize("kind", ["hf", "meta", "gguf"])
@pytest.mark.parametrize("to", ["hf", "meta", "gguf"])
@pytest.mark.parametrize("dtype", ["f32", "f16", "bf16"])
def test_a_dtype_is_that_of_a_plain_cast(tmp_path, kind, to, dtype):
    source = saved(tmp_path / "source", kind, replace(SMALL, rope_pairing="half"), small())
    convert(source, tmp_path / "out", to, dtype)
    found, expected = values(tmp_path / "out")[1], values(source, dtype=dtype)[1]
    assert found.keys() == expected.keys()
    for name in found:
        if "norm" not in name:
            assert found[name] == expected[name], name
    if to == "gguf":
        norms = {n: t.type for n, t in gguf_file.read(tmp_path / "out").tensors.items()}
        assert {kind for name, kind in norms.items() if "norm" in name} == {"F32"}


def test_norms_keep_their_dtype_outside_gguf(tmp_path):
    source = saved(tmp_path / "source", "hf", replace(SMALL, rope_pairing="half"), small("bf16"))
    convert(source, tmp_path / "meta", "meta")
    convert(tmp_path / "meta", tmp_path / "hf")
    tensors = safetensors.read(tmp_path / "hf" / "model.safetensors")
    assert {str(w.dtype) for w in tensors.values()} == {"bfloat16"}


def test_shards_have_the_size_that_is_asked_for(tmp_path):
    source = saved(tmp_path / "source", "gguf", SMALL, small())
    convert(source, tmp_path / "hf", shard_bytes=40_000)
    files = list((tmp_path / "hf").glob("*.safetensors"))
    assert len(files) > 2
    assert all(file.stat().st_size < 45_000 for file in files)
    assert values(tmp_path / "hf")[1] == values(source)[1]


@pytest.mark.parametrize("axis_of_embedding", [0, 1])
def test_meta_shards_are_joined_and_cut(tmp_path, axis_of_embedding):
    config = replace(SMALL, vocab_size=128_256) if axis_of_embedding == 0 else SMALL
    source = saved(tmp_path / "two", "meta", config, small("bf16", config), 2)
    whole = saved(tmp_path / "whole.gguf", "gguf", config, small("bf16", config))
    assert values(source)[1] == values(whole)[1]
    convert(source, tmp_path / "one", "meta")
    convert(tmp_path / "one", tmp_path / "again", "meta", model_parallel=2)
    assert values(tmp_path / "one") == values(source)
    for name in ("consolidated.00.pth", "consolidated.01.pth"):
        assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()


# ---- blocks ------------------------------------------------------------------------------------


@given(
    arrays(np.float32, (3, 64), elements=st.floats(-65504, 65504, width=32)),
    st.sampled_from([1, 2**-10, 2**-20, 2**-40, 0]),
)
@settings(max_examples=200)
def test_q8_0_is_the_peers_to_the_last_bit(w, scale):
    w = w * np.float32(scale)
    tiny = np.abs(w).reshape(-1, 32).max(axis=1) / np.float32(127)
    w.reshape(-1, 32)[tiny < 1e-37] = 0  # where 1 / d is infinite the reference is undefined
    expected = peer_gguf.quants.quantize(w, peer_gguf.GGMLQuantizationType.Q8_0)
    assert (quantize.q8_0(w, "w").reshape(3, -1) == expected).all()


@given(st.integers(-(2**23), 2**23))
def test_halves_are_rounded_away_from_zero(n):
    x = np.float32(n / 2)
    assert quantize.round_away(x) == np.sign(x) * np.floor(np.abs(np.float64(x)) + 0.5)
    assert quantize.round_away(np.nextafter(np.float32(0.5), np.float32(0))) == 0


def test_numbers_that_a_dtype_cannot_hold_are_refused(tmp_path):
    for value, dtype in ((1e6, "f16"), (1e8, "q8_0"), (np.inf, "q8_0")):
        params = small()
        params.layers[1].w_up[3, 5] = value
        source = saved(tmp_path / "source", "hf", replace(SMALL, rope_pairing="half"), params)
        with pytest.raises(InputError, match=r"layers\.1\.w_up.*too large"):
            convert(source, tmp_path / "out.gguf", dtype=dtype)
    assert inside(tmp_path) == ["source"]


def blocks(params, config, kind):
    """A GGUF file's tensors with every matrix in blocks made by the peer."""
    type_ = peer_gguf.GGMLQuantizationType[kind]
    raw = {}
    for name, w in named(params, config.tied).items():
        stored = peer_gguf.quants.quantize(w, type_) if w.ndim == 2 else w
        of = gguf_file.Raw(kind, w.shape, stored) if w.ndim == 2 else w
        raw[names.foreign(name, "gguf")] = of
    return raw


@pytest.fixture
def quantized(tmp_path):
    """Files of the small model with Q8_0 and Q4_1 matrices."""
    save_gguf(tmp_path / "plain.gguf", SMALL, small(), {"general.name": "Tiny", "n.other": 1})
    metadata = gguf_file.read(tmp_path / "plain.gguf").metadata
    for kind in ("Q8_0", "Q4_1"):
        gguf_file.write(tmp_path / f"{kind}.gguf", metadata, blocks(small(), SMALL, kind))
    return tmp_path


@pytest.mark.parametrize(("kind", "dtype"), [("Q8_0", None), ("Q8_0", "q8_0"), ("Q4_1", None)])
def test_blocks_stay_as_they_are_in_gguf(quantized, kind, dtype):
    convert(quantized / f"{kind}.gguf", quantized / "out.gguf", dtype=dtype)
    source, out = (gguf_file.read(quantized / f"{name}.gguf") for name in (kind, "out"))
    assert source.tensors.keys() == out.tensors.keys()
    for name, info in source.tensors.items():
        assert out.tensors[name].type == info.type
        assert (out.stored(name) == source.stored(name)).all()
    assert out.metadata["general.name"] == "Tiny"
    assert out.metadata["general.file_type"] == {"Q8_0": 7, "Q4_1": 3}[kind]


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_blocks_are_decoded_exactly_elsewhere(quantized, kind):
    source = quantized / f"{kind}.gguf"
    convert(source, quantized / "hf")
    assert values(quantized / "hf")[1] == values(source)[1]
    convert(source, quantized / "requantized.gguf", dtype="q8_0")
    out = gguf_file.read(quantized / "requantized.gguf")
    assert {info.type for info in out.tensors.values()} == {"F32", "Q8_0"}


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_1"])
def test_a_model_that_was_loaded_is_saved_in_its_blocks(quantized, kind):
    """In GGUF; elsewhere as float32. Whole rows change places, with what is stored of them."""
    path = quantized / f"{kind}.gguf"
    config, params = load_checkpoint(path)[:2]
    assert {w.type for w in named(params, True).values() if isinstance(w, Blocks)} == {kind}
    save_gguf(quantized / "again.gguf", config, params)
    there = names.with_pairing(config, params, "half")
    assert isinstance(there[1].layers[0].wk, Blocks)
    save_gguf(quantized / "turned.gguf", *there)
    for name in ("again", "turned"):
        source, out = (gguf_file.read(quantized / f"{n}.gguf") for n in (kind, name))
        for tensor, info in source.tensors.items():
            assert out.tensors[tensor].type == info.type
            assert (out.stored(tensor) == source.stored(tensor)).all()
    save_hf(quantized / "hf", config, params)
    save_meta(quantized / "meta", config, params)
    save_llama2c(quantized / "x.bin", config, params)
    for name in ("hf", "meta", "x.bin"):
        assert values(quantized / name)[1] == values(path)[1]


def test_loading_blocks_reads_nothing_of_them(tmp_path):
    convert(paths.EMBEDDED, tmp_path / "x.gguf", dtype="q8_0")
    file, _, matched, _ = gguf.open_file(tmp_path / "x.gguf")
    tracemalloc.start()
    try:
        tensors = [gguf.matrix_or_vector(file, theirs) for theirs in matched.values()]
        held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert sum(w.nbytes for w in tensors) > 870_000
    assert held < 100_000


def test_rows_that_are_no_whole_blocks_become_f16(tmp_path):
    config = replace(SMALL, dim=48, n_heads=6, head_dim=8)
    source = saved(tmp_path / "source.gguf", "gguf", config, small(config=config))
    convert(source, tmp_path / "out.gguf", dtype="q8_0")
    types = {n: i.type for n, i in gguf_file.read(tmp_path / "out.gguf").tensors.items()}
    assert types["blk.0.attn_q.weight"] == "F16"
    assert types["blk.0.ffn_down.weight"] == "Q8_0"
    assert types["output_norm.weight"] == "F32"


def test_one_tensor_is_never_whole_in_memory(tmp_path):
    config = Config(512, 1, 4, 4, 128, 64, 32_768, tied=True, context_length=2048)
    source = saved(tmp_path / "x.gguf", "gguf", config, small("f16", config))
    for out, dtype in (("hf", "f32"), ("y.gguf", "q8_0")):
        tracemalloc.start()
        convert(source, tmp_path / out, dtype=dtype)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 32e6, f"{peak} bytes for a table of 67 MB in float32"


# ---- tokenizers --------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """A small model with SmolLM2's tokenizer in a GGUF file, and converted to the others."""
    folder = tmp_path_factory.mktemp("smollm2")
    config = replace(SMALL, vocab_size=49_152 + 3, dim=8, n_heads=2, n_kv_heads=1, head_dim=4)
    keys = vocabularies.smollm2_metadata()
    extra = {key: value for key, value in keys.items() if key.startswith("tokenizer.")}
    save_hf(folder / "made", replace(config, rope_pairing="half"), small("bf16", config))
    extra["tokenizer.ggml.tokens"] = [*extra["tokenizer.ggml.tokens"], "[A]", "[B]", "[C]"]
    extra["tokenizer.ggml.token_type"] = [*map(int, extra["tokenizer.ggml.token_type"]), 5, 5, 5]
    save_gguf(folder / "x.gguf", config, small("bf16", config), extra)
    assert convert(folder / "x.gguf", folder / "hf") == []
    assert convert(folder / "hf", folder / "again.gguf") == []
    return folder


def test_a_vocabulary_without_merges_has_a_list_of_no_strings(tmp_path):
    """llama.cpp refuses one of no numbers; the gguf package reads no empty list at all."""
    (told,) = convert(paths.EMBEDDED, tmp_path / "x.gguf")
    assert "the sampling is not kept" in told
    key, array, string = b"tokenizer.ggml.merges", 9, 8
    assert key + struct.pack("<IIQ", array, string, 0) in (tmp_path / "x.gguf").read_bytes()
    ours, source = (load_checkpoint(p).tokenizer for p in (tmp_path / "x.gguf", paths.EMBEDDED))
    for text in TEXTS:
        assert ours.encode(text) == source.encode(text)


def test_a_vocabulary_comes_back_from_hugging_face_as_it_was(smollm2):
    before, after = (gguf_file.read(smollm2 / f"{n}.gguf").metadata for n in ("x", "again"))
    for key in ("model", "pre", "tokens", "merges", "bos_token_id", "eos_token_id"):
        assert after[f"tokenizer.ggml.{key}"] == before[f"tokenizer.ggml.{key}"], key
    assert not after["tokenizer.ggml.add_bos_token"]
    assert after["tokenizer.chat_template"] == before["tokenizer.chat_template"]
    assert "tokenizer.ggml.eot_token_id" not in after  # <|im_end|> is the end already


def test_the_written_tokenizer_json_gives_the_ids_of_the_library(smollm2):
    file = json.loads((smollm2 / "hf" / "tokenizer.json").read_text("utf-8"))
    library, ours = vocabularies.library(file), load_checkpoint(smollm2 / "hf").tokenizer
    source = load_checkpoint(smollm2 / "x.gguf").tokenizer
    for text in TEXTS:
        expected = source.encode(text)
        assert ours.encode(text) == expected
        assert vocabularies.library_ids(library, text) == expected
    assert (ours.bos_id, ours.add_bos, ours.specials) == (1, False, source.specials)
    assert library.token_to_id("<|im_end|>") == 2
    assert library.token_to_id("[C]") == 49_154


def test_stop_ids_are_carried_over(smollm2):
    source = load_checkpoint(smollm2 / "x.gguf")
    assert 2 in source.stop_ids
    for name in ("hf", "again.gguf"):
        assert set(load_checkpoint(smollm2 / name).stop_ids) == set(source.stop_ids)


def test_rows_without_a_token_get_one_in_gguf(smollm2):
    tokenizer = from_gguf(vocabularies.smollm2_metadata(), "smollm2")
    keys = export.to_gguf(tokenizer, 49_154, 2)
    assert keys["tokenizer.ggml.tokens"][-2:] == ["[PAD49152]", "[PAD49153]"]
    assert keys["tokenizer.ggml.token_type"][-2:] == [5, 5]
    assert from_gguf(keys, "padded").encode("Hello") == tokenizer.encode("Hello")


def test_meta_has_no_place_for_another_vocabulary(smollm2, tmp_path):
    told, context = convert(smollm2 / "x.gguf", tmp_path / "meta", "meta")
    assert context == "the context length is not kept: 2048 became 4096"
    assert "tokenizer is left out" in told
    assert "Llama 3's" in told
    assert load_checkpoint(tmp_path / "meta").tokenizer is None


def test_llama3s_ranks_go_to_every_format_and_back(tmp_path):
    file, tokenizer = paths.llama3_tokenizer(), vocabularies.llama3()
    config = replace(SMALL, vocab_size=128_256, dim=8, n_heads=2, n_kv_heads=1, head_dim=4)
    save_meta(tmp_path / "meta", config, small("bf16", config))
    shutil.copy(file, tmp_path / "meta" / "tokenizer.model")
    assert convert(tmp_path / "meta", tmp_path / "x.gguf") == []
    assert convert(tmp_path / "x.gguf", tmp_path / "hf") == []
    assert convert(tmp_path / "hf", tmp_path / "back", "meta") == []
    assert (tmp_path / "back" / "tokenizer.model").read_bytes() == file.read_bytes()
    written = json.loads((tmp_path / "hf" / "tokenizer.json").read_text("utf-8"))
    assert written["model"]["merges"] == [" ".join(m) for m in llama3_merges()]
    library = vocabularies.library(written)
    for text in TEXTS:
        expected = tokenizer.encode(text, bos=True)
        assert library.encode(text).ids == expected
        for name in ("x.gguf", "hf"):
            assert load_checkpoint(tmp_path / name).tokenizer.prompt_ids(text) == expected


def llama3_merges():
    return vocabularies.llama3_json()["model"]["merges"]


def test_vocabularies_of_characters_are_left_out_with_a_word(tmp_path):
    config = replace(SMALL, vocab_size=261)
    source = saved(tmp_path / "m.bin", "llama2c", config, small(config=config))
    pieces = vocabularies.llama2c_bytes([(0.0, " "), (-1.0, "a")])
    (tmp_path / "tokenizer.bin").write_bytes(pieces)
    for out in ("hf", "x.gguf"):
        (told,) = convert(source, tmp_path / out)
        assert "m.bin: the tokenizer is left out: a vocabulary of characters" in told
        assert load_checkpoint(tmp_path / out).tokenizer is None
    assert values(tmp_path / "hf")[1] == values(source)[1]


def test_hugging_face_files_are_copied(smollm2, tmp_path):
    (smollm2 / "hf" / "special_tokens_map.json").write_text("{}")
    convert(smollm2 / "hf", tmp_path / "copy", dtype="f32")
    for name in ("tokenizer.json", "generation_config.json", "special_tokens_map.json"):
        assert (tmp_path / "copy" / name).read_bytes() == (smollm2 / "hf" / name).read_bytes()


def test_stop_ids_of_the_config_alone_are_kept(tmp_path):
    source = saved(tmp_path / "source", "hf", replace(SMALL, rope_pairing="half"), small())
    settings = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(settings | {"eos_token_id": [3, 5]}))
    convert(source, tmp_path / "out")
    assert load_checkpoint(tmp_path / "out").stop_ids == (3, 5)


def test_merges_are_recovered_only_where_merging_reaches_every_token():
    ids = {text: id for id, text in enumerate(["a", "b", "c", "ab", "abc"])}
    assert export._last_merges(ids) == [("a", "b"), ("ab", "c")]
    with pytest.raises(InputError, match="'abc' cannot be reached"):
        export._last_merges({"a": 0, "b": 1, "c": 2, "abc": 3})


def test_the_tokenizer_json_of_a_bos_model_says_so(tmp_path):
    tokenizer = vocabularies.smollm2()
    tokenizer = type(tokenizer)(
        tokenizer._pieces, tokenizer.pre, specials=tokenizer.specials, bos_id=1, add_bos=True
    )
    file = export.to_tokenizer_json(tokenizer)
    (tmp_path / "tokenizer.json").write_text(json.dumps(file))
    read = from_tokenizer_json(tmp_path / "tokenizer.json")
    expected = [1, *tokenizer.encode("Hi")]
    assert read.prompt_ids("Hi") == vocabularies.library(file).encode("Hi").ids == expected


# ---- whole or not at all -----------------------------------------------------------------------


@pytest.fixture
def source(tmp_path):
    return saved(tmp_path / "source", "hf", replace(SMALL, rope_pairing="half"), small())


OUTS = {"hf": {}, "meta": {"to": "meta"}, "x.gguf": {}}


@pytest.mark.parametrize("out", OUTS)
def test_nothing_is_overwritten(source, tmp_path, out):
    (tmp_path / out).mkdir()
    (tmp_path / out / "mine").touch()
    with pytest.raises(InputError, match="exists already"):
        convert(source, tmp_path / out, **OUTS[out])
    assert inside(tmp_path / out) == ["mine"]


@pytest.mark.parametrize("out", OUTS)
def test_files_of_the_users_with_a_temporary_name_stay(source, tmp_path, out):
    (tmp_path / f"{out}.partial").write_text("mine")
    convert(source, tmp_path / out, **OUTS[out])
    assert (tmp_path / f"{out}.partial").read_text() == "mine"
    assert inside(tmp_path) == sorted([out, f"{out}.partial", "source"])


@pytest.mark.parametrize("out", OUTS)
def test_a_full_disk_leaves_nothing_behind(source, tmp_path, out, monkeypatch):
    def full(file, name, tensor):
        if "mlp" in name or "feed_forward" in name or "ffn" in name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        file.write(bytes(tensor.nbytes))

    for module in ("gguf_file", "safetensors", "pth"):
        monkeypatch.setattr(sys.modules[f"llama3np.load.{module}"], "write_tensor", full)
    with pytest.raises(InputError, match=f"{out}.*cannot be written: No space left"):
        convert(source, tmp_path / "new" / "folder" / out, **OUTS[out])
    assert inside(tmp_path) == ["source"]


@pytest.mark.parametrize("out", OUTS)
def test_a_limit_on_file_size_leaves_nothing_behind(source, tmp_path, out):
    to = OUTS[out].get("to", "hf" if out == "hf" else "gguf")
    run = subprocess.run(
        [*COMMAND, "convert", str(source), str(tmp_path / out), "--to", to],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000)),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (run.returncode, run.stdout) == (2, "")
    assert "cannot be written: File too large" in run.stderr
    assert run.stderr.count("\n") == 1
    assert inside(tmp_path) == ["source"]


# The command, pausing after each tensor: it cannot have finished when the signal comes.
SLOW_COMMAND = [
    sys.executable,
    "-c",
    """
import sys, time
from llama3np.cli import main
from llama3np.load import gguf_file, pth, safetensors
def slowly(write):
    return lambda *args: (write(*args), time.sleep(0.2))
for module in (gguf_file, pth, safetensors):
    module.write_tensor = slowly(module.write_tensor)
sys.exit(main())
""",
]


@pytest.mark.usefixtures("signals_heeded")
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
@pytest.mark.parametrize("out", OUTS)
def test_ctrl_c_a_kill_and_a_closed_terminal_leave_nothing_behind(tmp_path, out, name):
    if not hasattr(signal, name):
        pytest.skip(f"this system has no {name}")
    config = Config(1024, 2, 8, 8, 128, 2048, 20_000, context_length=2048)
    source = saved(tmp_path / "s.gguf", "gguf", config, small("bf16", config))
    to = OUTS[out].get("to", "hf" if out == "hf" else "gguf")
    command = [*SLOW_COMMAND, "convert", str(source), str(tmp_path / out), "--to", to]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while process.poll() is None and len(inside(tmp_path)) == 1:
        time.sleep(0.001)
    process.send_signal(getattr(signal, name))
    stdout, stderr = process.communicate(timeout=60)
    assert (process.returncode, stdout, stderr) == (128 + getattr(signal, name), "", "")
    assert inside(tmp_path) == ["s.gguf"]


def test_an_empty_directory_of_the_users_stays_if_writing_fails(source, tmp_path):
    (tmp_path / "out").mkdir()
    with pytest.raises(InputError, match="divide"):
        convert(source, tmp_path / "out", "meta", model_parallel=7)
    assert inside(tmp_path / "out") == []
    convert(source, tmp_path / "out", "meta", model_parallel=2)
    assert values(tmp_path / "out")[1] == values(source)[1]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"dtype": "q8_0"}, "q8_0 is for GGUF"),
        ({"dtype": "q4_0"}, f"expected one of {', '.join(CHOICES)}, found 'q4_0'"),
        ({"to": "onnx"}, "expected one of hf, meta, gguf, found 'onnx'"),
        ({"model_parallel": 2}, "for Meta"),
        ({"to": "meta", "shard_bytes": 5}, "for Hugging Face"),
        ({"shard_bytes": 0}, "found 0"),
        ({"to": "meta", "model_parallel": 0}, "model_parallel"),
        ({"rope_factor": 8.0}, "rope_factor is for Meta"),
    ],
)
def test_options_that_do_not_fit_are_refused(source, tmp_path, options, told):
    with pytest.raises(InputError, match=told):
        convert(source, tmp_path / "out", **options)
    assert inside(tmp_path) == ["source"]


@pytest.mark.parametrize(("to", "mp"), [("hf", None), ("meta", 2), ("gguf", None)])
def test_progress_counts_all_bytes_of_all_shards(source, tmp_path, to, mp):
    seen = []
    convert(source, tmp_path / to, to, model_parallel=mp, progress=lambda *a: seen.append(a))
    dones = [done for done, _, _ in seen]
    assert dones == sorted(dones)
    assert dones[-1] == seen[-1][1] == seen[0][1]


# ---- the command -------------------------------------------------------------------------------


def test_the_command_converts(source, tmp_path):
    out = tmp_path / "x.gguf"
    command = [*COMMAND, "convert", str(source), str(out), "--dtype", "q8_0", "--json"]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == {"out": str(out), "left_out": []}
    assert gguf_file.read(out).tensors["output.weight"].type == "Q8_0"
    again = subprocess.run(command[:-1], capture_output=True, text=True, check=False)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr == f"llama3np: {out}: exists already, and is not overwritten\n"


# ---- a loaded model's own weights --------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["f16", "bf16"])
@pytest.mark.parametrize("kind", ["hf", "meta", "gguf", "llama2c"])
@pytest.mark.parametrize("source_mp", [None, 2])
@pytest.mark.parametrize("tied", [True, False])
def test_the_params_of_a_loaded_model_can_be_saved(tmp_path, dtype, kind, source_mp, tied):
    config = replace(SMALL, tied=tied)
    first = "hf" if source_mp is None else "meta"
    source = saved(tmp_path / "source", first, config, small(dtype, config), source_mp or 1)
    llm = llama3np.load(source)
    out = saved(tmp_path / "out", kind, llm.config, llm.params)
    assert values(out)[1] == values(source, dtype="f32" if kind == "llama2c" else None)[1]


@pytest.mark.parametrize("kind", ["hf", "meta", "gguf", "llama2c"])
def test_other_dtypes_are_refused_by_name(tmp_path, kind):
    params = random(SMALL, np.random.default_rng(0), np.float64)
    with pytest.raises(InputError, match=r"tensor '.*(embed|token_embd).*float64"):
        saved(tmp_path / "out", kind, SMALL, params)
    assert inside(tmp_path) == []


def test_stop_ids_and_sampling_that_a_target_cannot_hold_are_told(smollm2, tmp_path):
    """GGUF has one end of a text and no sampling: what no longer counts must not go unsaid."""
    convert(smollm2 / "x.gguf", tmp_path / "hf")
    generation = {"eos_token_id": [2, 0, 5], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (tmp_path / "hf" / "generation_config.json").write_text(json.dumps(generation))
    told = convert(tmp_path / "hf", tmp_path / "back.gguf")
    assert told == [
        "the sampling is not kept: temperature 0.6, top_k 0, top_p 0.9 became temperature 0.0, "
        "top_k 0, top_p 1.0",
        "the stop ids is not kept: [0, 2, 5] became [0, 2]",
    ]


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("to", "options"), [("meta", {"model_parallel": 7}), ("hf", {})])
def test_errors_name_what_was_asked_for_and_no_temporary(source, tmp_path, to, options):
    with pytest.MonkeyPatch.context() as patch:
        if to == "hf":
            patch.setattr(safetensors, "write_tensor", no_space)
        with pytest.raises(InputError) as caught:
            convert(source, tmp_path / "out", to, **options)
    assert str(tmp_path / "out") in str(caught.value)
    assert ".partial" not in str(caught.value)

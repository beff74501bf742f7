"""tools/make_checkpoint.py: the formula, number by number, and the same weights in every format."""

from dataclasses import replace

import gguf
import made_up
import made_up_blocks
import made_up_vocabulary
import make_checkpoint
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from llama3np.config import Config, RopeScaling
from llama3np.errors import InputError
from llama3np.kernels.ggml import FORMATS
from llama3np.llm import Llama
from llama3np.load import gguf_file, load_checkpoint, names
from llama3np.params import from_named, named, named_shapes
from llama3np.tokenizer import from_gguf, from_tokenizer_json, from_tokenizer_model

TINY = Config(
    32, 2, 4, 2, 8, 64, 96, rope_theta=500000.0, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 64)
)
TEXTS = ["hello world", " abc ABJ xyz", "été 1234 \n\n!", "It's a test."]


def scalar(name, n_columns, i, seed):
    """One number as the docstring of made_up.py has it, in Python's whole numbers."""
    h = 0x811C9DC5
    for byte in f"{seed}/{name}".encode():
        h = (h ^ byte) * 0x01000193 % 2**32
    x = (i // 4 * 0x9E3779B9 % 2**32) ^ h
    x = (x ^ (x >> 16)) * 0x85EBCA6B % 2**32
    x = ((x ^ (x >> 13)) + h) * 0xC2B2AE35 % 2**32
    x = x ^ (x >> 16)
    byte = (x >> 8 * (i % 4)) & 255
    if n_columns is None:
        return (112 + byte // 8) / 128
    e = min(e for e in range(7, 40) if 3 * 4 ** (e - 7) >= 2 * n_columns)
    e += 2 if name.endswith("attention.wo.weight") else 0
    return (2 * byte - 255) / 2**e


def whole(lazy):
    return np.concatenate(list(lazy.chunks())).reshape(lazy.shape)


def made(config=TINY, **options):
    tensors = named(made_up.params(config, **options), config.tied)
    return {name: whole(w) for name, w in tensors.items()}


def test_the_worked_example_of_the_docstring():
    name = "layers.0.attention.wq.weight"
    row = next(made_up.tensor(name, (4096, 4096), np.dtype("f4"), 0).chunks())[0]
    assert [scalar(name, 4096, i, 0) * 8192 for i in range(4)] == [41, -201, 7, -103]
    assert (row[:4] * 8192).tolist() == [41, -201, 7, -103]


@given(st.sampled_from(list(named_shapes(TINY))), st.data(), st.integers(0, 2**70))
def test_every_number_is_that_of_scalar_arithmetic(ours, data, seed):
    shape = named_shapes(TINY)[ours]
    name = names.foreign(ours, "meta")
    i = data.draw(st.integers(0, np.prod(shape) - 1))
    array = whole(made_up.tensor(name, shape, np.dtype("f8"), seed))
    n_columns = shape[1] if len(shape) == 2 else None
    assert array.flat[i] == scalar(name, n_columns, i, seed)


@given(st.integers(0, 200), st.integers(0, 200))
def test_any_stretch_is_cut_out_of_the_same_sequence(a, b):
    start, stop = sorted((a, b))
    key = made_up.key("x", 1)
    assert (
        made_up.drawn(key, start, stop).tolist() == made_up.drawn(key, 0, 200)[start:stop].tolist()
    )


@pytest.mark.parametrize("chunk", [1, 100, 1 << 20])
@pytest.mark.parametrize("pairing", ["half", "interleaved"])
def test_chunks_change_nothing(monkeypatch, chunk, pairing):
    config = replace(TINY, rope_pairing=pairing)
    expected = made(config)
    monkeypatch.setattr(made_up, "CHUNK", chunk)
    for name, w in made(config).items():
        np.testing.assert_array_equal(w, expected[name], err_msg=name)


@pytest.mark.parametrize("n_columns", [1, 7, 64, 4096, 14336, 53248])
def test_a_matrix_has_the_scale_of_one_over_its_root_of_columns(n_columns):
    shape = (max(1, 2**16 // n_columns), n_columns)
    w = whole(made_up.tensor("output.weight", shape, np.dtype("f4"), 0))
    assert 0.7 < w.std() * n_columns**0.5 < 1.43
    assert abs(w.mean()) < 5 * w.std() / w.size**0.5


def test_tensors_and_seeds_do_not_repeat_one_another():
    rows = [made_up.drawn(made_up.key(name, seed), 0, 4096) for name in "ab" for seed in (0, 1)]
    correlation = np.corrcoef(np.array(rows, float)) - np.eye(4)
    assert np.abs(correlation).max() < 5 / 4096**0.5


@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("layout", "mp"), [("hf", 1), ("gguf", 1), ("meta", 1), ("meta", 2)])
def test_every_format_loads_to_the_same_weights(tmp_path, layout, mp, tied, dtype):
    scaling = None if layout == "meta" else TINY.rope_scaling  # params.json has only Meta's own
    config = replace(TINY, tied=tied, rope_scaling=scaling)
    make_checkpoint.write(config, layout, tmp_path / "made", 3, dtype, mp, shard_bytes=9000)
    checkpoint = load_checkpoint(tmp_path / "made")
    found, params = names.with_pairing(checkpoint.config, checkpoint.params, "interleaved")
    assert replace(found, context_length=config.context_length) == config
    for name, expected in made(config, dtype="f32", seed=3).items():
        w = named(params, tied)[name]
        np.testing.assert_array_equal(np.asarray(w, "f4"), expected, err_msg=name)
    assert len(list(tmp_path.rglob("*.pth"))) == (mp if layout == "meta" else 0)
    assert checkpoint.params.layers[0].wq.dtype.itemsize == (4 if dtype == "f32" else 2)


def test_hugging_face_shards_have_an_index(tmp_path):
    make_checkpoint.write(TINY, "hf", tmp_path / "made", shard_bytes=20_000)
    shards = sorted(file.name for file in (tmp_path / "made").glob("*.safetensors"))
    assert shards == [
        f"model-{i:05}-of-{len(shards):05}.safetensors" for i in range(1, len(shards) + 1)
    ]
    assert len(shards) > 1
    assert (tmp_path / "made" / "model.safetensors.index.json").exists()


def test_q8_0_is_within_half_a_step_of_the_weights(tmp_path):
    make_checkpoint.write(TINY, "gguf", tmp_path / "x.gguf", 0, "q8_0")
    loaded = named(load_checkpoint(tmp_path / "x.gguf").params, False)
    for name, expected in made(dtype="f32").items():
        step = 0 if expected.ndim == 1 else np.abs(expected).max() / 127
        np.testing.assert_allclose(loaded[name], expected, rtol=0, atol=0.51 * step, err_msg=name)
    kinds = {info.type for info in gguf_file.read(tmp_path / "x.gguf").tensors.values()}
    assert kinds == {"Q8_0", "F32"}


@pytest.mark.parametrize("dtype", make_checkpoint.BLOCKS)
def test_blocks_are_for_gguf_only(tmp_path, dtype):
    with pytest.raises(InputError, match=f"found {dtype}"):
        make_checkpoint.write(TINY, "hf", tmp_path / "x", 0, dtype)


def step_of(kind, w_RW):
    """The largest error that the plainest rounding to a type makes, for each block."""
    low_R, high_R = (np.array([f(w) for w in w_RW]) for f in (np.min, np.max))
    most_R = np.maximum(-low_R, high_R)
    if kind == "Q8_0":
        return 0.5 * most_R / 127
    if kind == "Q4_0":  # 16 steps from one end; the other end has 7 of them above 0, not 8
        return most_R / 8
    if kind == "Q6_K":  # half a step of 31, and 31 times half a step of the scale
        return (0.5 + 31 * 0.5 / 127) * most_R / 31
    range_R = np.maximum(high_R, 0) + np.maximum(-low_R, 0)  # Q4_K: the same, of 15 and 63,
    return (0.5 + 15 * 0.5 / 63) * range_R / 15 + np.maximum(-low_R, 0) * 0.5 / 63  # and a minimum


@pytest.mark.parametrize("kind", made_up_blocks.QUANTISE)
@given(seeds, st.floats(1, 1e3), st.floats(-3, 3))  # smaller ones have subnormal scales
def test_blocks_are_the_weights_to_their_precision(kind, seed, scale, shift):
    """By gguf's own reading of them."""
    width = FORMATS[kind].weights
    w_RW = np.random.default_rng(seed).standard_normal((4, width), dtype=np.float32)
    w_RW = (scale * (w_RW + shift)).astype(np.float32)
    w_RW[1] = 0
    blocks_RC = made_up_blocks.QUANTISE[kind](w_RW)
    read_RW = gguf.quants.dequantize(blocks_RC, gguf.GGMLQuantizationType[kind])
    scales = 2.0**-10 * np.abs(w_RW).max(axis=1) * (2 if kind == "Q4_K" else 1)  # are float16
    allowed_R = 1.01 * step_of(kind, w_RW) + scales
    assert (np.abs(read_RW - w_RW) <= allowed_R[:, None]).all()


def test_q4_k_m_is_shared_out_as_llama_cpp_does(tmp_path):
    """16 layers: Q6_K for the head, and where llama.cpp's use_more_bits says so."""
    config = Config(256, 16, 4, 2, 64, 256, 300, tied=True)
    make_checkpoint.write(config, "gguf", tmp_path / "x.gguf", 0, "q4_k_m")
    tensors = gguf_file.read(tmp_path / "x.gguf").tensors
    kinds = {name: info.type for name, info in tensors.items()}
    assert kinds.pop("token_embd.weight") == "Q6_K"
    layers = (0, 1, 4, 7, 10, 13, 14, 15)
    more = {f"blk.{i}.{name}.weight" for i in layers for name in ("attn_v", "ffn_down")}
    for name, kind in kinds.items():
        expected = "F32" if "norm" in name else "Q6_K" if name in more else "Q4_K"
        assert kind == expected, name
    assert make_checkpoint.q4_k_m("embed_VD", replace(config, tied=False)) == "Q4_K"
    assert make_checkpoint.q4_k_m("head_VD", replace(config, tied=False)) == "Q6_K"
    logits_TV = Llama(config, load_checkpoint(tmp_path / "x.gguf").params).forward([1, 2])[0]
    # Unrelated, and the correlation 0, if a part of a block is misplaced.
    expected_TV = Llama(config, from_named(made(config, dtype="f32"), config)).forward([1, 2])[0]
    assert np.corrcoef(logits_TV.ravel(), expected_TV.ravel())[0, 1] > 0.7


def test_rows_that_are_no_whole_blocks_are_refused(tmp_path):
    with pytest.raises(InputError, match="Q4_K: expected rows of whole 256, found 32"):
        make_checkpoint.write(TINY, "gguf", tmp_path / "x.gguf", 0, "q4_k_m")


def test_a_deep_model_stays_finite_and_tells_positions_apart():
    config = Config(64, 80, 4, 2, 16, 224, 1000)
    tensors = {name: whole(w) for name, w in named(made_up.params(config, "f32"), False).items()}
    llm = Llama(config, from_named(tensors, config))
    ids = np.random.default_rng(0).integers(0, 1000, 32)
    logits_TV = llm.forward(ids)[0]
    assert 0.5 < logits_TV.std() < 2
    correlation = np.corrcoef(logits_TV)[np.triu_indices(32, 1)]
    assert correlation.mean() < 0.3
    assert len(set(logits_TV.argmax(-1).tolist())) > 20


# ---- the vocabulary ------------------------------------------------------------------------------


def test_the_vocabulary_has_the_size_of_llama_3s():
    assert len(set(made_up_vocabulary.tokens())) == 128_000
    assert abs(len(made_up_vocabulary.merges()) - 280_147) < 500  # Llama 3's own
    assert 5.5 < np.mean([len(token) for token in made_up_vocabulary.tokens()]) < 7  # 6.5 there


def test_its_three_files_are_one_tokenizer(tmp_path):
    made_up_vocabulary.write_tokenizer_json(tmp_path / "tokenizer.json")
    made_up_vocabulary.write_tokenizer_model(tmp_path / "tokenizer.model")
    one, two, three = (
        from_gguf(made_up_vocabulary.gguf_metadata(), "made up"),
        from_tokenizer_json(tmp_path / "tokenizer.json"),
        from_tokenizer_model(tmp_path / "tokenizer.model"),
    )
    assert one.specials == two.specials == three.specials
    for text in TEXTS:
        assert one.encode(text) == two.encode(text) == three.encode(text)
        assert one.decode(one.encode(text)) == text


@pytest.mark.parametrize(
    ("layout", "file"), [("hf", "made"), ("meta", "made"), ("gguf", "made.gguf")]
)
def test_the_command_makes_a_model_that_talks(tmp_path, monkeypatch, capsys, layout, file):
    small = Config(8, 2, 1, 1, 8, 8, 128_256)
    monkeypatch.setitem(make_checkpoint.PRESETS, "llama3-8b", small)
    out = str(tmp_path / file)
    monkeypatch.setattr("sys.argv", ["", "llama3-8b", layout, out, "--scale-layers", "1"])
    make_checkpoint.main()
    assert f"{out}: 0.0" in capsys.readouterr().out
    checkpoint = load_checkpoint(out)
    assert checkpoint.config.n_layers == 1
    assert checkpoint.tokenizer.decode(checkpoint.tokenizer.encode("hello")) == "hello"
    with pytest.raises(SystemExit, match="exists already"):
        make_checkpoint.main()

"""load/: each format saved and loaded, recognised, mapped, and refused when it is broken."""

import json
import shutil
import struct
from dataclasses import replace

import gguf as peer_gguf
import ml_dtypes
import numpy as np
import paths
import pytest
import safetensors as peer
import strategies
from hypothesis import given
from hypothesis import strategies as st
from vocabularies import llama2c_bytes

import llama3np.params
from llama3np.config import Config, RopeScaling
from llama3np.errors import InputError
from llama3np.load import (
    detect,
    inspect,
    load_checkpoint,
    names,
    safetensors,
    save_gguf,
    save_hf,
    save_llama2c,
)
from llama3np.load import gguf as our_gguf
from llama3np.load import llama2c as our_llama2c
from llama3np.load.files import new_file
from llama3np.params import named, named_shapes

SMALL = Config(dim=8, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=2, ffn_dim=6, vocab_size=5)


def random_params(config, dtype=np.float32):
    return llama3np.params.random(config, np.random.default_rng(0), dtype)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("load")


def fresh(folder, name):
    """A path in the folder at which there is nothing."""
    path = folder / name
    if path.is_dir():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    return path


def bits(params, tied):
    """Every tensor's name, shape, dtype and bytes; norm vectors as the float32 they load as."""
    found = {}
    for name, w in named(params, tied).items():
        loaded = np.asarray(w) if w.ndim == 2 else w.astype(np.float32)
        found[name] = (loaded.shape, str(loaded.dtype), loaded.tobytes())
    return found


def assert_holds(checkpoint, config, params):
    assert checkpoint.config == config
    assert bits(checkpoint.params, config.tied) == bits(params, config.tied)
    assert (checkpoint.params.head_VD is checkpoint.params.embed_VD) == config.tied


def owner(array):
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array.base


def assert_mapped(params, tied):
    """No float32 norm and no matrix is a copy: all lie in a file's map, read-only."""
    for name, w in named(params, tied).items():
        assert type(owner(w)).__name__ == "mmap", name
        assert not w.flags.writeable, name


# ---- save, then load ---------------------------------------------------------------------------


@given(strategies.models(), st.integers(1, 10**6))
def test_hugging_face_saved_then_loaded_is_bit_identical(folder, model, context_length):
    config = replace(model.config, context_length=context_length)
    path = fresh(folder, "hf")
    save_hf(path, config, model.params)
    checkpoint = load_checkpoint(path)
    assert_holds(checkpoint, *names.with_pairing(config, model.params, "half"))
    kind = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[model.stored]
    assert checkpoint.layout == f"Hugging Face directory, 1 safetensors file, {kind}"


# What GGUF's divisors can tell: low 1, high 4, and waves long enough to show the whole factor.
gguf_scalings = st.none() | st.builds(
    RopeScaling, st.sampled_from([2.0, 8.0, 32.0]), st.just(1.0), st.just(4.0), st.integers(1, 3)
)


@given(st.data(), st.integers(1, 10**6))
def test_gguf_saved_then_loaded_is_bit_identical(folder, data, context_length):
    scaling = data.draw(gguf_scalings)
    fixed = {"head_dim": 8, "rope_theta": 500000.0} if scaling else {}
    model = data.draw(strategies.models(rope_scaling=scaling, **fixed))
    config = replace(model.config, context_length=context_length)
    path = fresh(folder, "x.gguf")
    save_gguf(path, config, model.params, {"general.name": "n"})
    checkpoint = load_checkpoint(path)
    assert_holds(checkpoint, *names.with_pairing(config, model.params, "interleaved"))
    kind = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[model.stored]
    assert checkpoint.layout == f"GGUF v3, {kind}"


@st.composite
def llama2c_models(draw):
    """Models without what the format has no place for."""
    K, G, H = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.sampled_from([2, 4, 6]))
    fixed = {"n_kv_heads": K, "n_heads": K * G, "head_dim": H, "dim": K * G * H}
    fixed |= {"norm_eps": 1e-5, "rope_theta": 10000.0, "rope_scaling": None}
    return draw(strategies.models(**fixed))


@given(llama2c_models(), st.integers(1, 20))
def test_llama2c_saved_then_loaded_is_the_same_in_float32(folder, model, context_length):
    config = replace(model.config, context_length=context_length)
    path = fresh(folder, "x.bin")
    save_llama2c(path, config, model.params)
    config, params = names.with_pairing(config, model.params, "interleaved")
    tensors = {name: w.astype(np.float32) for name, w in named(params, config.tied).items()}
    assert_holds(load_checkpoint(path), config, llama3np.params.from_named(tensors, config))


def version_1(config, params):
    """llama2.c's version 1 export: norms first, then the matrices, each for all layers."""
    c, shared = config, int(config.tied)
    sizes = (c.dim, c.ffn_dim, c.n_layers, c.n_heads, c.n_kv_heads, c.vocab_size, c.context_length)
    parts = [struct.pack("<Ii7iB", 0x616B3432, 1, *sizes, shared).ljust(256, b"\0")]
    of_layers = lambda field: b"".join(getattr(layer, field).tobytes() for layer in params.layers)  # noqa: E731
    parts += [of_layers("attn_norm_D"), of_layers("mlp_norm_D"), params.norm_D.tobytes()]
    parts += [params.embed_VD.tobytes(), *map(of_layers, ("wq", "wk", "wv", "wo"))]
    parts += map(of_layers, ("w_gate", "w_down", "w_up"))
    return b"".join(parts if c.tied else [*parts, params.head_VD.tobytes()])


@pytest.mark.parametrize("tied", [True, False])
def test_version_1_of_llama2c_loads(tmp_path, tied):
    config = replace(SMALL, tied=tied)
    params = random_params(config)
    (tmp_path / "x.bin").write_bytes(version_1(config, params))
    assert_holds(load_checkpoint(tmp_path / "x.bin"), config, params)


@given(strategies.models(), st.integers(1, 4000))
def test_shards_hold_the_same_as_one_file(folder, model, shard_bytes):
    path = fresh(folder, "sharded")
    save_hf(path, model.config, model.params, shard_bytes=shard_bytes)
    config, params = names.with_pairing(model.config, model.params, "half")
    assert_holds(load_checkpoint(path), config, params)
    shards = [safetensors.read(file) for file in sorted(path.glob("*.safetensors"))]
    assert sum(map(len, shards)) == len(named_shapes(config))
    assert all(len(s) == 1 or sum(w.nbytes for w in s.values()) <= shard_bytes for s in shards)


@pytest.mark.parametrize("save", [save_hf, save_gguf, save_llama2c])
def test_nothing_is_overwritten_and_nothing_is_left_behind(tmp_path, save):
    path = tmp_path / "model"
    path.write_text("precious")
    with pytest.raises(InputError, match="model: exists already"):
        save(path, SMALL, random_params(SMALL))
    assert path.read_text() == "precious"
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_that_is_not_empty_is_not_touched(tmp_path):
    (tmp_path / "config.json").write_text("precious")
    with pytest.raises(InputError, match="exists already"):
        save_hf(tmp_path, SMALL, random_params(SMALL))
    assert [file.name for file in tmp_path.iterdir()] == ["config.json"]


def test_a_save_that_fails_leaves_nothing(tmp_path):
    with pytest.raises(InputError, match="hf: cannot be written: No such file"):
        save_hf(tmp_path / "hf", SMALL, random_params(SMALL), tokenizer_files=[tmp_path / "none"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_a_write_that_is_interrupted_leaves_nothing(tmp_path, error):
    def interrupted_write():
        with new_file(tmp_path / "x") as temporary:
            temporary.write_text("half of it")
            raise error

    with pytest.raises(error):
        interrupted_write()
    assert list(tmp_path.iterdir()) == []


def test_an_empty_directory_is_filled_and_tokenizer_files_are_copied(tmp_path):
    (tmp_path / "tokenizer_config.json").write_text("{}")
    (tmp_path / "hf").mkdir()
    files = [tmp_path / "tokenizer_config.json"]
    save_hf(tmp_path / "hf", SMALL, random_params(SMALL), tokenizer_files=files)
    written = {file.name for file in (tmp_path / "hf").iterdir()}
    assert written == {"config.json", "model.safetensors", "tokenizer_config.json"}


@pytest.mark.parametrize(
    "change",
    [{"rope_theta": 5e5}, {"norm_eps": 1e-6}, {"rope_scaling": RopeScaling(8, 1, 4, 64)}],
)
def test_what_llama2c_cannot_hold_is_refused(tmp_path, change):
    config = replace(SMALL, **change)
    with pytest.raises(InputError, match=r"llama2\.c checkpoints have theta 10000"):
        save_llama2c(tmp_path / "x.bin", config, random_params(config))


def test_a_scaling_that_gguf_cannot_hold_is_refused(tmp_path):
    config = replace(SMALL, rope_scaling=RopeScaling(8.0, 2.0, 4.0, 8192))
    with pytest.raises(InputError, match="RoPE"):
        save_gguf(tmp_path / "x.gguf", config, random_params(config))


def test_a_scaling_by_one_is_saved_to_gguf_as_none(tmp_path):
    config = replace(SMALL, rope_scaling=RopeScaling(1.0, 2.0, 4.0, 8192))
    save_gguf(tmp_path / "x.gguf", config, random_params(config))
    assert load_checkpoint(tmp_path / "x.gguf").config == SMALL


# ---- other implementations ---------------------------------------------------------------------


@given(strategies.models())
def test_the_safetensors_library_reads_what_is_written(folder, model):
    path = fresh(folder, "peer")
    save_hf(path, model.config, model.params)
    config, params = names.with_pairing(model.config, model.params, "half")
    ours = bits_as_stored(params, config)
    theirs = dict(peer.deserialize((path / "model.safetensors").read_bytes()))
    assert set(theirs) == {names.foreign(name, "huggingface") for name in ours}
    for name, (shape, data) in ours.items():
        found = theirs[names.foreign(name, "huggingface")]
        assert (tuple(found["shape"]), bytes(found["data"])) == (shape, data)


def bits_as_stored(params, config):
    return {name: (w.shape, w.tobytes()) for name, w in named(params, config.tied).items()}


@given(strategies.models(rope_scaling=None))
def test_the_gguf_package_reads_what_is_saved(folder, model):
    path = fresh(folder, "peer.gguf")
    save_gguf(path, model.config, model.params)
    config, params = names.with_pairing(model.config, model.params, "interleaved")
    reader = peer_gguf.GGUFReader(path)
    arch = {"arch": "llama"}
    for key, value in (
        (peer_gguf.Keys.LLM.EMBEDDING_LENGTH, config.dim),
        (peer_gguf.Keys.LLM.BLOCK_COUNT, config.n_layers),
        (peer_gguf.Keys.LLM.FEED_FORWARD_LENGTH, config.ffn_dim),
        (peer_gguf.Keys.LLM.CONTEXT_LENGTH, config.context_length),
        (peer_gguf.Keys.Attention.HEAD_COUNT, config.n_heads),
        (peer_gguf.Keys.Attention.HEAD_COUNT_KV, config.n_kv_heads),
        (peer_gguf.Keys.Attention.KEY_LENGTH, config.head_dim),
        (peer_gguf.Keys.Attention.LAYERNORM_RMS_EPS, np.float32(config.norm_eps)),
        (peer_gguf.Keys.Rope.FREQ_BASE, config.rope_theta),
        (peer_gguf.Keys.Rope.DIMENSION_COUNT, config.head_dim),
    ):
        assert reader.fields[key.format(**arch)].contents() == value
    ours = bits_as_stored(params, config)
    assert len(reader.tensors) == len(ours)
    theirs = {t.name: (tuple(t.shape[::-1]), t.data.tobytes()) for t in reader.tensors}
    assert theirs == {names.foreign(name, "gguf"): found for name, found in ours.items()}


def test_a_gguf_model_of_the_gguf_package_loads(tmp_path):
    config = replace(SMALL, dim=32, ffn_dim=64, tied=True)
    params = random_params(config)
    writer = peer_gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    writer.add_block_count(config.n_layers)
    writer.add_context_length(config.context_length)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.ffn_dim)
    writer.add_head_count(config.n_heads)
    writer.add_head_count_kv(config.n_kv_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    expected = {}
    for ours, w in named(params, config.tied).items():
        kind = peer_gguf.GGMLQuantizationType["F32" if w.ndim == 1 or w.shape[1] % 32 else "Q8_0"]
        stored = peer_gguf.quantize(w, kind)
        expected[ours] = peer_gguf.dequantize(stored, kind)
        writer.add_tensor(names.foreign(ours, "gguf"), stored, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    told = []
    checkpoint = load_checkpoint(tmp_path / "x.gguf", lambda *progress: told.append(progress))
    assert_holds(checkpoint, config, llama3np.params.from_named(expected, config))
    assert checkpoint.layout == "GGUF v3, Q8_0 and F32"
    assert (checkpoint.tokenizer, checkpoint.stop_ids) == (None, ())
    nbytes = {name: w.nbytes for name, w in named(checkpoint.params, config.tied).items()}
    assert nbytes["layers.0.w_up"] == 64 * 34  # rows of one block
    assert [name for _, _, name in told] == list(named_shapes(config)) == list(nbytes)
    assert [done for done, _, _ in told] == np.cumsum(list(nbytes.values())).tolist()
    assert {all_bytes for _, all_bytes, _ in told} == {sum(nbytes.values())}


def test_the_embedded_model_is_the_same_in_a_llama2c_file(tmp_path):
    hf = load_checkpoint(paths.EMBEDDED)
    save_llama2c(tmp_path / "x.bin", *names.with_pairing(hf.config, hf.params, "interleaved"))
    found = load_checkpoint(tmp_path / "x.bin")
    wide = llama3np.params.mapped(hf.params, lambda w: np.asarray(w, np.float32))
    assert_holds(found, *names.with_pairing(hf.config, wide, "interleaved"))


def test_stories260k_is_the_same_model_in_both_formats():
    hf = load_checkpoint(paths.shared("data/stories260K-hf"))
    bin_ = load_checkpoint(paths.shared("data/stories260K.bin"))
    assert_holds(hf, *names.with_pairing(bin_.config, bin_.params, "half"))
    assert bin_.layout == "llama2.c checkpoint"
    assert bin_.tokenizer.n_vocab == 512  # tok512.bin lies beside it
    assert hf.tokenizer is None
    assert hf.stop_ids == (2,)


def test_smollm2_with_its_tokenizer():
    checkpoint = load_checkpoint(paths.smollm2_gguf())
    assert checkpoint.layout == "GGUF v3, Q4_1 and Q8_0"
    assert checkpoint.config == Config(
        dim=576,
        n_layers=30,
        n_heads=9,
        n_kv_heads=3,
        head_dim=64,
        ffn_dim=1536,
        vocab_size=49152,
        norm_eps=1e-5,
        rope_theta=100000.0,
        tied=True,
        context_length=8192,
    )
    assert checkpoint.tokenizer.n_vocab == 49152
    assert 2 in checkpoint.stop_ids


# ---- mapped, not copied ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
def test_matrices_lie_in_the_map(tmp_path, dtype):
    params = random_params(SMALL, dtype)
    save_hf(tmp_path / "hf", SMALL, params, shard_bytes=200)
    save_gguf(tmp_path / "x.gguf", SMALL, params)
    for path in (tmp_path / "hf", tmp_path / "x.gguf"):
        loaded = load_checkpoint(path).params
        for layer in loaded.layers:
            assert all(w.dtype == np.float32 for w in (layer.attn_norm_D, layer.mlp_norm_D))
        matrices = {n: w for n, w in named(loaded, False).items() if w.ndim == 2}
        assert all(w.dtype == dtype for w in matrices.values())
        assert all(type(owner(w)).__name__ == "mmap" for w in matrices.values())


def test_float32_checkpoints_are_mapped_whole(tmp_path):
    params = random_params(SMALL)
    save_hf(tmp_path / "hf", SMALL, params)
    save_gguf(tmp_path / "x.gguf", SMALL, params)
    save_llama2c(tmp_path / "x.bin", SMALL, params)
    for name in ("hf", "x.gguf", "x.bin"):
        assert_mapped(load_checkpoint(tmp_path / name).params, SMALL.tied)


# ---- safetensors -------------------------------------------------------------------------------


def safetensors_bytes(header, data=b"", length=None):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def entry(dtype="F32", shape=(2,), offsets=(0, 8)):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)}


@given(padding=st.integers(0, 8), dtype=st.sampled_from(list(safetensors.SUPPORTED)))
def test_tensors_at_any_alignment_are_read_without_a_copy(folder, padding, dtype):
    path = folder / "aligned.safetensors"
    w = np.arange(6).reshape(2, 3).astype(safetensors.SUPPORTED[dtype])
    text = json.dumps({"w": entry(dtype, w.shape, (0, w.nbytes))}).encode() + b" " * padding
    path.write_bytes(safetensors_bytes(text, w.tobytes()))
    found = safetensors.read(path)["w"]
    assert (found.dtype, found.tobytes()) == (w.dtype, w.tobytes())
    assert (found.astype(np.float32) == w.astype(np.float32)).all()
    assert type(owner(found)).__name__ == "mmap"


BROKEN = {
    "empty": (b"", "the file is empty"),
    "seven bytes": (b"1234567", "header of 8 bytes, found 7"),
    "long header": (safetensors_bytes({}, length=2**63), "header's length is 9223372036854775808"),
    "cut header": (safetensors_bytes({"a": entry()})[:20], "header's length"),
    "no JSON": (safetensors_bytes(b"hello"), "header: expected JSON"),
    "not UTF-8": (safetensors_bytes(b'{"\xff": 1}'), "header: expected JSON"),
    "a list": (safetensors_bytes([1]), "header: expected a JSON object, found list"),
    "endless": (safetensors_bytes(b"[" * 200_000), "header: expected JSON"),
    "long number": (safetensors_bytes(b'{"a": ' + b"9" * 5000 + b"}"), "header: expected JSON"),
    "twice": (safetensors_bytes(b'{"a": 1, "a": 2}'), "'a' stands twice"),
    "no entry": (safetensors_bytes({"a": 5}), "'a'.*expected dtype, shape and data_offsets"),
    "no offsets": (safetensors_bytes({"a": {"dtype": "F32", "shape": [1]}}), "'a'.*data_offsets"),
    "F64": (safetensors_bytes({"a": entry("F64")}, bytes(8)), "'a'.*F32, F16, BF16, found 'F64'"),
    "F8": (safetensors_bytes({"a": entry("F8_E4M3")}, bytes(8)), "'a'.*found 'F8_E4M3'"),
    "I8": (safetensors_bytes({"a": entry("I8")}, bytes(8)), "'a'.*found 'I8'"),
    "dtype 5": (safetensors_bytes({"a": entry(5)}, bytes(8)), "'a'.*found 5"),
    "shape text": (safetensors_bytes({"a": entry(shape="12")}, bytes(8)), "'a'.*whole numbers"),
    "shape -2": (safetensors_bytes({"a": entry(shape=(-2,))}, bytes(8)), "'a'.*whole numbers"),
    "shape true": (
        safetensors_bytes({"a": entry(shape=(True, 2))}, bytes(8)),
        "'a'.*whole numbers",
    ),
    "33 dims": (safetensors_bytes({"a": entry(shape=(1,) * 33)}, bytes(8)), "'a'.*whole numbers"),
    "3 offsets": (safetensors_bytes({"a": entry(offsets=(0, 8, 8))}, bytes(8)), "'a'.*two as"),
    "too long": (safetensors_bytes({"a": entry(shape=(3,))}, bytes(8)), "takes 12 bytes.*give 8"),
    "huge": (safetensors_bytes({"a": entry(shape=(2**40, 2**40))}, bytes(8)), "'a'.*takes"),
    "backwards": (safetensors_bytes({"a": entry(offsets=(8, 0))}, bytes(8)), "give -8"),
    "hole": (safetensors_bytes({"a": entry(offsets=(4, 12))}, bytes(12)), "'a'.*data at byte 0"),
    "overlap": (
        safetensors_bytes({"a": entry(), "b": entry(offsets=(4, 12))}, bytes(12)),
        "'b'.*expected its data at byte 8",
    ),
    "cut data": (safetensors_bytes({"a": entry()}, bytes(7)), "expected 8 bytes.*found 7"),
    "more data": (safetensors_bytes({"a": entry()}, bytes(9)), "expected 8 bytes.*found 9"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_safetensors_file_is_an_input_error(tmp_path, case):
    content, told = BROKEN[case]
    (tmp_path / "x.safetensors").write_bytes(content)
    with pytest.raises(InputError, match=f"x.safetensors.*{told}"):
        safetensors.read(tmp_path / "x.safetensors")


def test_an_empty_tensor_and_annotations_are_allowed(tmp_path):
    header = {
        "__metadata__": {"format": "pt"},
        "a": entry(),
        "b": entry(shape=(0, 3), offsets=(8, 8)),
    }
    (tmp_path / "x.safetensors").write_bytes(safetensors_bytes(header, bytes(8)))
    found = safetensors.read(tmp_path / "x.safetensors")
    assert {name: w.shape for name, w in found.items()} == {"a": (2,), "b": (0, 3)}


# ---- Hugging Face directories ------------------------------------------------------------------


@pytest.fixture
def hf(tmp_path):
    """A directory of three shards, to be broken."""
    save_hf(tmp_path / "hf", SMALL, random_params(SMALL), shard_bytes=1200)
    return tmp_path / "hf"


def edit(path, **changes):
    """Set keys of a JSON file; `...` takes one away."""
    merged = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in merged.items() if v is not ...}))


def edit_map(hf, **changes):
    index = hf / "model.safetensors.index.json"
    file_of = json.loads(index.read_text())["weight_map"] | changes
    edit(index, weight_map={k: v for k, v in file_of.items() if v is not ...})


FIRST = "model-00001-of-00003.safetensors"


def test_an_index_and_its_shards_must_agree(hf):
    assert load_checkpoint(hf).layout == "Hugging Face directory, 3 safetensors files, f32"
    file_of = json.loads((hf / "model.safetensors.index.json").read_text())["weight_map"]
    shutil.copy(hf / FIRST, hf.parent / "a.safetensors")  # an index names files beside it only
    cases = [
        ({"model.norm.weight": ...}, "'model.norm.weight' is not in the index but in model-0000"),
        ({"model.norm.bias": FIRST}, f"'model.norm.bias' is in the index but not in {FIRST}"),
        ({"model.norm.weight": "../a.safetensors"}, "names the file '../a.safetensors'"),
        ({"model.norm.weight": "absent.safetensors"}, "names the file 'absent.safetensors'"),
        ({"model.norm.weight": 5}, "weight_map"),
    ]
    for changes, told in cases:
        edit_map(hf, **changes)
        with pytest.raises(InputError, match=f"index.json: .*{told}"):
            load_checkpoint(hf)
        edit(hf / "model.safetensors.index.json", weight_map=file_of)


def test_a_lost_shard_is_named(hf):
    (hf / FIRST).unlink()
    with pytest.raises(InputError, match=f"index.json: names the file '{FIRST}'"):
        load_checkpoint(hf)
    (hf / "model.safetensors.index.json").write_text('{"weight_map": ["a"]}')
    with pytest.raises(InputError, match="weight_map"):
        load_checkpoint(hf)
    (hf / "model.safetensors.index.json").unlink()
    with pytest.raises(
        InputError, match=r"expected model.safetensors or .*index.json, found neith"
    ):
        load_checkpoint(hf)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"num_hidden_layers": 3}, "9 tensors are missing: model.layers.2.*and 6 more"),
        ({"num_hidden_layers": 1}, "9 tensors have no place.*model.layers.1"),
        ({"num_hidden_layers": 10**12}, "expected 1000000000000 layers, found 21 tensors"),
        ({"vocab_size": 6}, r"2 tensors have a wrong shape.*\(expected \(6, 8\), found \(5, 8\)\)"),
        ({"tie_word_embeddings": True}, "lm_head.weight differs from model.embed_tokens.weight"),
        ({"model_type": "qwen2"}, "config.json: model_type: .*qwen2"),
        ({"num_attention_heads": 3}, "config.json: "),
    ],
)
def test_tensors_and_config_must_agree(hf, changes, told):
    edit(hf / "config.json", **changes)
    with pytest.raises(InputError, match=told):
        load_checkpoint(hf)


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_checkpoint_may_repeat_its_embedding(tmp_path, tied):
    config = replace(SMALL, tied=False)
    params = random_params(config)
    save_hf(tmp_path / "hf", config, params._replace(head_VD=params.embed_VD))
    edit(tmp_path / "hf" / "config.json", tie_word_embeddings=tied)
    loaded = load_checkpoint(tmp_path / "hf").params
    assert (loaded.head_VD is loaded.embed_VD) == tied
    assert (loaded.head_VD == params.embed_VD).all()


def test_inv_freq_of_old_checkpoints_is_tolerated(tmp_path):
    save_hf(tmp_path / "hf", SMALL, random_params(SMALL))
    file = tmp_path / "hf" / "model.safetensors"
    tensors = dict(safetensors.read(file))
    file.unlink()
    extra = {"model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(1, np.float32)}
    safetensors.write(file, tensors | extra)
    assert load_checkpoint(tmp_path / "hf").config.n_layers == 2


def test_stop_ids_are_the_declared_ones_and_the_tokenizers(tmp_path):
    """A model whose settings name its text's end only must still stop at its dialog's end."""
    config = Config(2, 1, 1, 1, 2, 2, vocab_size=257)
    save_hf(tmp_path / "hf", config, random_params(config))
    edit(tmp_path / "hf" / "config.json", eos_token_id=7)
    shutil.copy(paths.EMBEDDED / "tokenizer.json", tmp_path / "hf")
    assert load_checkpoint(tmp_path / "hf").stop_ids == (7, 256)
    assert inspect(tmp_path / "hf").stop_ids == (7, 256)


def test_stop_ids_come_from_the_generation_config_first(hf):
    assert load_checkpoint(hf).stop_ids == ()
    edit(hf / "config.json", eos_token_id=3)
    assert load_checkpoint(hf).stop_ids == (3,)
    (hf / "generation_config.json").write_text('{"eos_token_id": [1, 4]}')
    assert load_checkpoint(hf).stop_ids == (1, 4)
    (hf / "generation_config.json").write_text('{"eos_token_id": "</s>"}')
    with pytest.raises(InputError, match=r"generation_config\.json: eos_token_id.*</s>"):
        load_checkpoint(hf)


def test_a_config_that_is_no_json_is_named(hf):
    (hf / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(InputError, match=r"config\.json: expected JSON"):
        load_checkpoint(hf)


# ---- GGUF and llama2.c models ------------------------------------------------------------------


def test_a_gguf_of_another_kind_is_named(tmp_path):
    params = random_params(SMALL)
    for i, (extra, told) in enumerate(
        [
            ({"general.architecture": "qwen2"}, "general.architecture.*qwen2"),
            ({"llama.expert_count": 8}, "expert_count"),
            ({"llama.block_count": 3}, "9 tensors are missing: blk.2"),
            ({"llama.vocab_size": 9}, "vocab_size"),
        ]
    ):
        save_gguf(tmp_path / f"{i}.gguf", SMALL, params, extra)
        with pytest.raises(InputError, match=rf"{i}\.gguf: .*{told}"):
            load_checkpoint(tmp_path / f"{i}.gguf")


def test_a_gguf_without_embedding_is_named(tmp_path):
    our_gguf.write(tmp_path / "x.gguf", {"general.architecture": "llama"}, {})
    with pytest.raises(InputError, match=r"expected a tensor 'token_embd\.weight'"):
        load_checkpoint(tmp_path / "x.gguf")


def test_a_llama2c_file_of_a_wrong_size_says_both_sizes(tmp_path):
    save_llama2c(tmp_path / "x.bin", SMALL, random_params(SMALL))
    whole = (tmp_path / "x.bin").read_bytes()
    for content in (whole[:-1], whole + b"\0", whole[:28]):
        (tmp_path / "x.bin").write_bytes(content)
        told = f"expected {len(whole)} bytes.*found {len(content)}$"
        with pytest.raises(InputError, match=told):
            load_checkpoint(tmp_path / "x.bin")


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"24ka" + bytes(20), "header of 256 bytes, found 24"),
        (struct.pack("<Ii", 0x616B3432, 2).ljust(256, b"\0"), r"found 2 \(int8 groups\)"),
        (struct.pack("<Ii", 0x616B3432, 7).ljust(256, b"\0"), "version 0 or 1, found 7"),
        (struct.pack("<Ii", 0x616B3432, 1).ljust(256, b"\0"), "dim: expected a whole number"),
    ],
)
def test_other_llama2c_exports_are_named(tmp_path, content, told):
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(InputError, match=told):
        load_checkpoint(tmp_path / "x.bin")


# ---- what is at a path -------------------------------------------------------------------------


def test_each_format_is_recognised_whatever_its_name(tmp_path):
    params = random_params(SMALL)
    save_hf(tmp_path / "a.gguf", SMALL, params)
    save_gguf(tmp_path / "b.bin", SMALL, params)
    save_llama2c(tmp_path / "c.safetensors", SMALL, params)
    (tmp_path / "d").write_bytes(version_1(SMALL, params))
    found = {name: detect(tmp_path / name) for name in ("a.gguf", "b.bin", "c.safetensors", "d")}
    assert list(found.values()) == ["huggingface", "gguf", "llama2c", "llama2c"]


FILES = {
    "": "an empty file",
    "The quick brown fox jumps over the lazy dog.": "begins with b'The quick brown ",
    "PK\x03\x04": "zip.*PyTorch",
    "\x80\x02}q": "pickle.*PyTorch",
    "tjgg": "GGML.*GGUF",
    '\x10\0\0\0\0\0\0\0{"a": 1}': "safetensors file; give its directory",
}


@pytest.mark.parametrize("content", FILES)
def test_a_file_of_another_kind_is_told(tmp_path, content):
    (tmp_path / "model.gguf").write_bytes(content.encode("latin-1"))
    with pytest.raises(InputError, match=rf"model\.gguf: .*{FILES[content]}"):
        detect(tmp_path / "model.gguf")


DIRECTORIES = {
    (): "expected config.json and .safetensors files, .* found no files",
    ("readme.md",): "found readme.md",
    ("config.json",): "found config.json",
    ("config.json", "pytorch_model.bin"): "found config.json, pytorch_model.bin",
    ("consolidated.00.pth",): "params.json and consolidated.00.pth, found consolidated.00.pth",
    ("config.json", "params.json"): "found config.json, params.json",
}


@pytest.mark.parametrize("files", DIRECTORIES)
def test_a_directory_of_another_kind_is_told(tmp_path, files):
    for file in files:
        (tmp_path / file).write_text("{}")
    with pytest.raises(InputError, match=rf"{tmp_path}: .*{DIRECTORIES[files]}$"):
        detect(tmp_path)


def test_a_path_to_nothing_is_told(tmp_path):
    with pytest.raises(
        InputError, match=r"nothing: expected a checkpoint.*\(smollm2, shakespeare\), found nothing"
    ):
        detect(tmp_path / "nothing")


def test_a_path_too_long_to_be_one_is_told(tmp_path):
    with pytest.raises(InputError, match="cannot be read: File name too long"):
        detect(tmp_path / ("x" * 5000))


def test_the_header_of_llama2c_is_the_one_that_run_c_reads():
    """plausible() keeps a text file from being taken for sizes: ASCII makes them 10^8 and more."""
    assert our_llama2c.plausible(struct.pack("<7i", 64, 172, 5, 8, 4, -512, 512))
    assert not our_llama2c.plausible(b"{" + b" " * 60)
    assert not our_llama2c.plausible(struct.pack("<7i", 64, 172, 5, 4, 8, 512, 512))


def test_a_llama2c_tokenizer_cut_between_two_tokens_is_refused(tmp_path):
    """The file has no count of its own, but the checkpoint beside it has."""
    config = replace(SMALL, vocab_size=262)
    save_llama2c(tmp_path / "model.bin", config, random_params(config))
    pieces = [(0.0, " "), (-1.0, "a"), (-2.0, " a")]
    (tmp_path / "tokenizer.bin").write_bytes(llama2c_bytes(pieces))
    assert load_checkpoint(tmp_path / "model.bin").tokenizer.n_vocab == 262
    (tmp_path / "tokenizer.bin").write_bytes(llama2c_bytes(pieces[:2]))
    with pytest.raises(InputError, match=r"tokenizer\.bin.*26[12]"):
        load_checkpoint(tmp_path / "model.bin")

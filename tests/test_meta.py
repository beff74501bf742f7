"""load/meta.py and kernels/joined.py: Meta's directories, whole and in model-parallel shards."""

import json
import shutil
from dataclasses import replace

import ml_dtypes
import numpy as np
import paths
import pytest
import strategies
import torches
from checks import assert_close, assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from test_load import assert_holds, fresh, owner
from torches import Storage, View

import llama3np
from llama3np.cli import main
from llama3np.config import Config, RopeScaling, from_meta
from llama3np.errors import CheckpointError, InputError
from llama3np.kernels import Half, Joined, chunks
from llama3np.load import (
    detect,
    load_checkpoint,
    names,
    pth,
    save_gguf,
    save_hf,
    save_meta,
    save_pth,
)
from llama3np.params import named, random

SMALL = Config(dim=8, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=2, ffn_dim=6, vocab_size=10)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("meta")


@pytest.fixture
def directory(tmp_path):
    """A directory of two shards, to be broken."""
    save_meta(tmp_path / "meta", SMALL, random_params(SMALL), 2)
    return tmp_path / "meta"


def random_params(config, dtype=np.float32):
    return random(config, np.random.default_rng(0), dtype)


def edit(directory, **changes):
    """Set keys of params.json; `...` takes one away."""
    path = directory / "params.json"
    merged = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({k: v for k, v in merged.items() if v is not ...}))


def replace_shard(directory, rank, **changes):
    """Set tensors of a shard; `...` takes one away."""
    path = directory / f"consolidated.{rank:02}.pth"
    tensors = {name: np.array(w) for name, w in pth.read(path).items()} | changes
    path.unlink()
    save_pth(path, {name: w for name, w in tensors.items() if w is not ...})


# ---- Joined ------------------------------------------------------------------------------------


@st.composite
def joined(draw):
    """A Joined and the array that it stands for."""
    dtype = draw(st.sampled_from([np.float32, np.float16, ml_dtypes.bfloat16]))
    n, rows, columns = (draw(st.integers(1, 5)) for _ in range(3))
    rng = np.random.default_rng(draw(strategies.seeds))
    parts = [rng.standard_normal((rows, columns)).astype(dtype) for _ in range(n)]
    axis = draw(st.integers(0, 1))
    return Joined(parts, axis), np.concatenate(parts, axis)


@given(joined(), st.data())
def test_joined_reads_as_the_concatenated_parts(pair, data):
    w, whole = pair
    assert (w.shape, w.ndim, w.dtype, w.nbytes, w.size) == (
        whole.shape,
        whole.ndim,
        whole.dtype,
        whole.nbytes,
        whole.size,
    )
    assert_same(np.asarray(w), whole, "all")
    rows = data.draw(st.slices(len(whole)).filter(lambda s: s.step in (None, 1)))
    assert_same(w[rows], whole[rows], "slice")
    shape = data.draw(st.lists(st.integers(0, 3), max_size=3))
    ids = np.random.default_rng(0).integers(0, len(whole), shape)
    assert_same(w[ids], whole[ids], "ids")


@given(joined(), st.integers(1, 3), st.integers(1, 30), st.sampled_from(["float32", "float64"]))
def test_joined_multiplies_with_the_same_bits_as_one_part(pair, M, chunk, dtype):
    w, whole = pair
    x_MD = np.random.default_rng(1).standard_normal((M, whole.shape[1])).astype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chunks, "CHUNK", chunk)
        one = x_MD @ Joined([whole], 0).T
        assert_same(x_MD @ w.T, one, "product")
        assert_same(x_MD @ Half(w).T, one, "product of Half")
    assert_close(one, x_MD.astype(float) @ whole.astype(float).T, 1e-5, "product")


def test_joined_refuses_what_it_cannot_join():
    with pytest.raises(ValueError, match="one shape and dtype"):
        Joined([np.zeros((2, 3)), np.zeros((3, 2))], 0)
    w = Joined([np.zeros((2, 3))] * 2, 0)
    for ids in ([4], [-1]):
        with pytest.raises(IndexError, match="rows 0 to 3"):
            w[np.array(ids)]


# ---- shards ------------------------------------------------------------------------------------


@st.composite
def divisible(draw, by=8):
    """A model whose sizes can be cut into so many shards."""
    G, H = draw(st.integers(1, 2)), draw(st.sampled_from([2, 4]))
    fixed = {"n_kv_heads": by, "n_heads": G * by, "head_dim": H, "dim": G * by * H}
    fixed |= {"ffn_dim": by * draw(st.integers(1, 4)), "vocab_size": by * draw(st.integers(1, 6))}
    fixed |= {"rope_pairing": "interleaved", "rope_scaling": None}
    return draw(strategies.models(**fixed))


OF_INPUT = ("attention.wo.weight", "feed_forward.w2.weight")


def write_shards(path, model, n, embed_axis):
    """As Meta's own training leaves them, cut by hand."""
    config, params = model.config, model.params
    path.mkdir()
    settings = {"dim": config.dim, "n_layers": config.n_layers, "n_heads": config.n_heads}
    settings |= {"n_kv_heads": config.n_kv_heads, "vocab_size": -1, "norm_eps": config.norm_eps}
    settings |= {"rope_theta": config.rope_theta}
    (path / "params.json").write_text(json.dumps(settings))
    for rank in range(n):
        shard = {"rope.freqs": np.ones(config.head_dim // 2, np.float32)}
        for ours, w in named(params, config.tied).items():
            name = names.foreign(ours, "meta")
            axis = embed_axis if name.startswith("tok_") else int(name.endswith(OF_INPUT))
            shard[name] = w if w.ndim == 1 else np.split(w, n, axis)[rank]
        torches.save(path / f"consolidated.{rank:02}.pth", torches.plain(shard))


@settings(max_examples=30)
@given(divisible(), st.integers(0, 1), st.integers(1, 200), st.data())
def test_logits_have_the_same_bits_in_1_2_4_and_8_shards(folder, model, embed_axis, chunk, data):
    ids = data.draw(strategies.token_ids(model.config.vocab_size))
    logits = {}
    for n in (1, 2, 4, 8):
        path = fresh(folder, f"mp{n}")
        write_shards(path, model, n, embed_axis)
        llm = llama3np.load(path)
        assert llm.config == model.config
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(chunks, "CHUNK", chunk)
            logits[n] = llm.forward(ids)
        assert_same(logits[n], logits[1], f"{n} shards")
    assert_close(logits[1], llama3np.Llama(model.config, model.params).forward(ids), 1e-4, "whole")


@given(divisible(), st.sampled_from([1, 2, 4, 8]))
def test_saved_then_loaded_is_bit_identical(folder, model, n):
    path = fresh(folder, "saved")
    save_meta(path, model.config, model.params, n)
    checkpoint = load_checkpoint(path)
    assert_holds(whole(checkpoint), model.config, model.params)
    kind = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}[model.stored]
    told = "1 shard" if n == 1 else f"{n} shards"
    assert checkpoint.layout == f"Meta directory, {told}, {kind}"
    assert len(list(path.iterdir())) == n + 1


def whole(checkpoint):
    """The checkpoint with every Joined made an array."""
    params = checkpoint.params
    layers = tuple(type(layer)(*map(np.asarray, layer)) for layer in params.layers)
    embed_VD, head_VD = np.asarray(params.embed_VD), np.asarray(params.head_VD)
    head_VD = embed_VD if params.head_VD is params.embed_VD else head_VD
    params = params._replace(embed_VD=embed_VD, layers=layers, head_VD=head_VD)
    return checkpoint._replace(params=params)


@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16])
@pytest.mark.parametrize("n", [1, 2])
def test_every_part_of_every_matrix_is_mapped(tmp_path, dtype, n):
    save_meta(tmp_path / "meta", SMALL, random_params(SMALL, dtype), n)
    for name, w in named(load_checkpoint(tmp_path / "meta").params, False).items():
        for part in w.parts if isinstance(w, Joined) else [w]:
            assert part.ndim == 1 or type(owner(part)).__name__ == "mmap", name
            assert part.ndim == 1 or part.dtype == dtype


@given(divisible(), st.sampled_from([1, 4]))
def test_what_is_loaded_can_be_saved_in_other_formats(folder, model, n):
    """Through np.asarray, one tensor at a time."""
    save_meta(path := fresh(folder, "meta"), model.config, model.params, n)
    loaded = load_checkpoint(path)
    save_hf(other := fresh(folder, "hf"), loaded.config, loaded.params)
    assert_holds(load_checkpoint(other), *names.with_pairing(loaded.config, model.params, "half"))
    save_gguf(gguf := fresh(folder, "x.gguf"), loaded.config, loaded.params)
    assert_holds(load_checkpoint(gguf), loaded.config, model.params)
    save_meta(again := fresh(folder, "again"), loaded.config, loaded.params, 2)
    assert_holds(whole(load_checkpoint(again)), loaded.config, model.params)


def test_llama3_vocabularies_are_cut_by_rows_and_llama2s_by_columns(tmp_path):
    for V, shape in ((128_000, (64_000, 4)), (32_000, (32_000, 2))):
        config = Config(
            dim=4, n_layers=1, n_heads=2, n_kv_heads=2, head_dim=2, ffn_dim=2, vocab_size=V
        )
        save_meta(tmp_path / str(V), config, random_params(config, np.float16), 2)
        shard = pth.read(tmp_path / str(V) / "consolidated.01.pth")
        assert shard["tok_embeddings.weight"].shape == shape
        assert shard["output.weight"].shape == (V // 2, 4)
        assert load_checkpoint(tmp_path / str(V)).config.vocab_size == V


# ---- the tie -----------------------------------------------------------------------------------


def test_a_head_is_tied_if_it_is_absent_or_the_same_storage(tmp_path):
    config = replace(SMALL, tied=True)
    params = random_params(config)
    save_meta(tmp_path / "absent", config, params)
    assert_holds(whole(load_checkpoint(tmp_path / "absent")), config, params)
    save_meta(tmp_path / "shared", config, params)
    path = tmp_path / "shared" / "consolidated.00.pth"
    table = torches.plain({name: np.array(w) for name, w in pth.read(path).items()})
    table["output.weight"] = table["tok_embeddings.weight"]
    torches.save(path, table)
    assert_holds(whole(load_checkpoint(tmp_path / "shared")), config, params)


def test_a_head_of_equal_numbers_elsewhere_is_a_head(directory):
    """As in stories260K: to compare them would be to read both."""
    for rank in (0, 1):
        path = directory / f"consolidated.{rank:02}.pth"
        w = np.array(pth.read(path)["output.weight"])
        replace_shard(directory, rank, **{"tok_embeddings.weight": w})
    assert not load_checkpoint(directory).config.tied


# ---- params.json -------------------------------------------------------------------------------

LLAMA2_7B = {
    "dim": 4096,
    "multiple_of": 256,
    "n_heads": 32,
    "n_layers": 32,
    "norm_eps": 1e-06,
    "vocab_size": -1,
}
LLAMA2_70B = LLAMA2_7B | {
    "dim": 8192,
    "multiple_of": 4096,
    "ffn_dim_multiplier": 1.3,
    "n_heads": 64,
    "n_kv_heads": 8,
    "n_layers": 80,
    "norm_eps": 1e-05,
}
LLAMA3_8B = {
    "dim": 4096,
    "n_layers": 32,
    "n_heads": 32,
    "n_kv_heads": 8,
    "vocab_size": 128256,
    "multiple_of": 1024,
    "ffn_dim_multiplier": 1.3,
    "norm_eps": 1e-05,
    "rope_theta": 500000.0,
}
LLAMA31_405B = LLAMA3_8B | {
    "dim": 16384,
    "n_layers": 126,
    "n_heads": 128,
    "multiple_of": 4096,
    "ffn_dim_multiplier": 1.2,
    "use_scaled_rope": True,
}
LLAMA32_1B = LLAMA3_8B | {
    "dim": 2048,
    "n_layers": 16,
    "multiple_of": 256,
    "ffn_dim_multiplier": 1.5,
    "use_scaled_rope": True,
}
LLAMA32_3B = LLAMA32_1B | {"dim": 3072, "n_layers": 28, "n_heads": 24, "ffn_dim_multiplier": 1.0}

# params.json, rows of the embedding, rows of w1 -> head size, theta, factor, context
FAMILIES = {
    "llama2-7b": (LLAMA2_7B, 32000, 11008, 128, 1e4, None, 4096),
    "llama2-70b": (LLAMA2_70B, 32000, 28672, 128, 1e4, None, 4096),
    "llama3-8b": (LLAMA3_8B, 128256, 14336, 128, 5e5, None, 8192),
    "llama3.1-405b": (LLAMA31_405B, 128256, 53248, 128, 5e5, 8.0, 131072),
    "llama3.2-1b": (LLAMA32_1B, 128256, 8192, 64, 5e5, 32.0, 131072),
    "llama3.2-3b": (LLAMA32_3B, 128256, 8192, 128, 5e5, 32.0, 131072),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_params_of_every_family(family):
    values, V, F, H, theta, factor, context = FAMILIES[family]
    scaling = factor and RopeScaling(factor, 1.0, 4.0, 8192)
    assert from_meta(values, V, F, False, "params.json") == Config(
        dim=values["dim"],
        n_layers=values["n_layers"],
        n_heads=values["n_heads"],
        n_kv_heads=values.get("n_kv_heads", values["n_heads"]),
        head_dim=H,
        ffn_dim=F,
        vocab_size=V,
        norm_eps=values["norm_eps"],
        rope_theta=theta,
        rope_scaling=scaling,
        context_length=context,
    )


def test_an_absent_theta_is_what_the_reader_of_that_time_has():
    values = {key: value for key, value in LLAMA3_8B.items() if key != "rope_theta"}
    assert from_meta(values, 128256, 14336, False, "x").rope_theta == 5e5
    assert from_meta(values | {"vocab_size": None}, 512, 14336, False, "x").rope_theta == 1e4


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"dim": None}, "the key 'dim'"),
        ({"n_heads": 0}, "n_heads: expected a whole number"),
        ({"n_heads": 3}, "divisible by 3"),
        ({"n_layers": 2.0}, "n_layers: expected a whole number"),
        ({"norm_eps": float("nan")}, "norm_eps: expected a finite number"),
        ({"rope_theta": "5e5"}, "rope_theta: expected a finite number"),
        ({"vocab_size": 32000}, "vocab_size: only 128256"),
        ({"multiple_of": 4096}, "width of 16384, but w1 has 14336 rows"),
        ({"ffn_dim_multiplier": 1e308}, "width|dim times"),
        ({"use_scaled_rope": 1}, "use_scaled_rope: expected true or false"),
        ({"quantization_args": {"spinquant": True}}, "quantization_args: only None"),
        ({"lora_args": {"rank": 16}}, "lora_args: only None"),
        ({"vision_chunk_size": 448}, "vision_chunk_size: only -1"),
        ({"moe_args": {}}, "the key 'moe_args' is not known"),
    ],
)
def test_params_that_are_not_supported_are_named(changes, told):
    with pytest.raises(CheckpointError, match=f"^params.json: .*({told})"):
        from_meta(LLAMA3_8B | changes, 128256, 14336, False, "params.json")


def test_run_time_limits_of_metas_code_are_no_matter():
    harmless = {"max_batch_size": 32, "model_parallel_size": 8, "quantization_args": None}
    config = from_meta(LLAMA3_8B | harmless, 128256, 14336, False, "x")
    assert config == from_meta(LLAMA3_8B, 128256, 14336, False, "x")
    assert (
        from_meta(LLAMA3_8B | {"max_seq_len": 99}, 128256, 14336, False, "x").context_length == 99
    )


def scaled(dim):
    heads = dim // 64
    scaling = RopeScaling(32.0 if dim == 2048 else 8.0, 1.0, 4.0, 8192)
    return Config(dim, 1, heads, heads, 64, 4, 8, rope_scaling=scaling, context_length=131072)


@pytest.mark.parametrize("dim", [2048, 64])
def test_the_factor_is_chosen_told_and_overridden(tmp_path, dim):
    config = scaled(dim)
    save_meta(tmp_path / "m", config, random_params(config, np.float16))
    checkpoint = load_checkpoint(tmp_path / "m")
    assert checkpoint.config == config
    told = f"use_scaled_rope taken as factor {config.rope_scaling.factor:g}"
    assert checkpoint.layout == f"Meta directory, 1 shard, f16, {told}"
    llm = llama3np.load(tmp_path / "m", rope_factor=16)
    assert llm.config.rope_scaling.factor == 16
    assert llm.layout.endswith("factor 16")
    with pytest.raises(InputError, match="RoPE scaling: expected factor >= 1"):
        load_checkpoint(tmp_path / "m", rope_factor=0.5)


def test_the_factor_is_an_option_of_the_command(tmp_path, capsys):
    save_meta(tmp_path / "m", scaled(64), random_params(scaled(64)))
    assert main(["info", str(tmp_path / "m"), "--rope-factor", "16", "--json"]) == 0
    assert "use_scaled_rope taken as factor 16" in json.loads(capsys.readouterr().out)["layout"]


def test_a_factor_that_nothing_asks_for_is_refused(directory, tmp_path):
    with pytest.raises(InputError, match=r"params\.json: a rope_factor was given"):
        load_checkpoint(directory, rope_factor=8)
    save_gguf(tmp_path / "x.gguf", SMALL, random_params(SMALL))
    with pytest.raises(InputError, match=r"x\.gguf: rope_factor is for Meta directories"):
        load_checkpoint(tmp_path / "x.gguf", rope_factor=8)


# ---- what cannot be saved ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "n", "told"),
    [
        ({"head_dim": 4}, 1, "has no place for"),
        ({"rope_scaling": RopeScaling(32, 1, 4, 8192)}, 1, "has no place for.*factor=8"),
        ({"rope_scaling": RopeScaling(8, 2, 4, 8192)}, 1, "has no place for"),
        ({}, 4, "to divide n_kv_heads = 2, found 4"),
        ({}, 0, "found 0"),
        ({"vocab_size": 5}, 2, "to divide vocab_size = 5, found 2"),
    ],
)
def test_what_meta_cannot_hold_is_refused(tmp_path, changes, n, told):
    config = replace(SMALL, **changes)
    with pytest.raises(InputError, match=told):
        save_meta(tmp_path / "m", config, random_params(config), n)
    assert list(tmp_path.iterdir()) == []


@given(st.integers(1, 300), st.integers(1, 900))
def test_any_feed_forward_width_can_be_told(dim, ffn_dim):
    from llama3np.config import meta_ffn_dim
    from llama3np.load.meta import _ffn_settings

    multiplier, multiple_of = _ffn_settings(dim, ffn_dim)
    assert meta_ffn_dim(dim, multiplier or 1.0, multiple_of) == ffn_dim


@pytest.mark.parametrize("family", FAMILIES)
def test_metas_own_settings_are_written_where_they_fit(family):
    from llama3np.load.meta import _ffn_settings

    values, _, F, *_ = FAMILIES[family]
    own = (values.get("ffn_dim_multiplier"), values["multiple_of"])
    assert _ffn_settings(values["dim"], F) in (own, (None, own[1]))


def test_a_directory_that_is_not_empty_is_not_touched(directory):
    before = {file.name: file.read_bytes() for file in directory.iterdir()}
    with pytest.raises(InputError, match="exists already"):
        save_meta(directory, SMALL, random_params(SMALL))
    assert {file.name: file.read_bytes() for file in directory.iterdir()} == before


# ---- directories -------------------------------------------------------------------------------


def test_a_directory_is_found_in_itself_or_in_original(directory, tmp_path):
    assert detect(directory) == "meta"
    (tmp_path / "hub").mkdir()
    shutil.copytree(directory, tmp_path / "hub" / "original")
    assert detect(tmp_path / "hub") == "meta"
    assert load_checkpoint(tmp_path / "hub").config == SMALL
    save_hf(tmp_path / "both", SMALL, random_params(SMALL))
    shutil.copytree(directory, tmp_path / "both" / "original")
    assert detect(tmp_path / "both") == "huggingface"


def test_a_tokenizer_beside_it_is_read(directory):
    (directory / "tokenizer.model").symlink_to(paths.llama3_tokenizer())
    assert load_checkpoint(directory).tokenizer.n_vocab == 128256
    assert load_checkpoint(directory).stop_ids == (128001, 128008, 128009)
    (directory / "tokenizer.model").rename(directory.parent / "tokenizer.model")
    assert load_checkpoint(directory).tokenizer.n_vocab == 128256


def test_shards_are_numbered_without_a_gap(directory):
    second = directory / "consolidated.01.pth"
    for name in ("consolidated.02.pth", "consolidated.1.pth", "consolidated.01-old.pth"):
        second.rename(directory / name)
        with pytest.raises(CheckpointError, match=rf"meta: expected .*01\.pth, found {name}"):
            load_checkpoint(directory)
        (directory / name).rename(second)
    (directory / "consolidated.00.pth").unlink()
    with pytest.raises(CheckpointError, match=r"expected the shard consolidated.00.pth, found"):
        load_checkpoint(directory)
    second.unlink()
    with pytest.raises(CheckpointError, match=r"found params\.json"):
        load_checkpoint(directory)


def test_a_lost_or_doubled_shard_is_told_by_the_sizes(directory):
    shutil.copyfile(directory / "consolidated.01.pth", directory / "consolidated.02.pth")
    with pytest.raises(
        CheckpointError, match=r"expected 2 shards, each with 4 of the 8 .* found 3"
    ):
        load_checkpoint(directory)
    (directory / "consolidated.02.pth").unlink()
    (directory / "consolidated.01.pth").unlink()
    with pytest.raises(
        CheckpointError, match=r"expected 2 shards, each with 4 of the 8 .* found 1"
    ):
        load_checkpoint(directory)


BROKEN = {
    "lost": ({"norm.weight": ...}, r"01\.pth: tensor 'norm.weight' is not in this shard"),
    "more": ({"x": np.ones(1, np.float32)}, r"01\.pth: tensor 'x' is in this shard, unlike"),
    "shape": ({"norm.weight": np.ones(9, np.float32)}, r"'norm.weight': expected float32 \(8,\)"),
    "dtype": ({"norm.weight": np.ones(8, np.float16)}, r"found float16 \(8,\)"),
    "norm": ({"norm.weight": np.ones(8, np.float32)}, "'norm.weight' differs between the shards"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_shard_unlike_the_first_is_named(directory, case):
    changes, told = BROKEN[case]
    replace_shard(directory, 1, **changes)
    with pytest.raises(CheckpointError, match=told):
        load_checkpoint(directory)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"n_layers": 3}, "9 tensors are missing: layers.2.attention_norm.weight"),
        ({"n_layers": 1}, "9 tensors have no place"),
        ({"n_layers": 10**12}, "expected 1000000000000 layers"),
        ({"n_kv_heads": 4}, "4 tensors have a wrong shape: layers.0.attention.wk"),
        ({"dim": 16}, "expected 4 shards"),
        ({"dim": 9}, "divisible by 4"),
        ({"dim": "8"}, "dim: expected a whole number"),
        ({"dim": [8]}, "dim: expected a whole number"),
        ({"vocab_size": 11}, "vocab_size: only 10"),
    ],
)
def test_tensors_and_params_must_agree(directory, changes, told):
    edit(directory, **({"multiple_of": ...} | changes))
    with pytest.raises(CheckpointError, match=told):
        load_checkpoint(directory)


@pytest.mark.parametrize(
    "name", ["tok_embeddings", "layers.0.feed_forward.w1", "layers.0.attention.wo"]
)
def test_a_matrix_that_tells_a_size_must_be_there(tmp_path, name):
    save_meta(tmp_path / "meta", SMALL, random_params(SMALL))
    for value in (..., np.ones(3, np.float32)):
        replace_shard(tmp_path / "meta", 0, **{f"{name}.weight": value})
        with pytest.raises(CheckpointError, match=f"meta: expected a matrix '{name}.weight'"):
            load_checkpoint(tmp_path / "meta")


def test_an_expanded_norm_is_refused(tmp_path):
    """PyTorch's expand makes any size of one number; none of a checkpoint's weights is one."""
    save_meta(tmp_path / "meta", SMALL, random_params(SMALL))
    path = tmp_path / "meta" / "consolidated.00.pth"
    table = torches.plain({name: np.array(w) for name, w in pth.read(path).items()})
    table["norm.weight"] = View(Storage("one", np.ones(1, np.float32)), 0, (8,), (0,))
    torches.save(path, table)
    with pytest.raises(CheckpointError, match=r"'norm\.weight': shape"):
        load_checkpoint(tmp_path / "meta")

"""config.py: what each format's keys say, and what is refused."""

import json
import math

import gguf
import numpy as np
import pytest
import strategies
from hypothesis import assume, given
from hypothesis import strategies as st

from llama3np.config import (
    Config,
    RopeScaling,
    from_gguf,
    from_hf,
    from_llama2c,
    scaling_from_divisors,
)
from llama3np.errors import InputError

LLAMA_31 = RopeScaling(8.0, 1.0, 4.0, 8192)

# ---- Config itself -----------------------------------------------------------------------------

SIZES = {"dim": 8, "n_layers": 1, "n_heads": 4, "n_kv_heads": 2, "head_dim": 2, "ffn_dim": 3}


@pytest.mark.parametrize(
    "wrong",
    [
        {"dim": 0},
        {"n_layers": -1},
        {"vocab_size": 0},
        {"context_length": 0},
        {"n_kv_heads": 3},
        {"head_dim": 3},
        {"rope_pairing": "neox"},
        {"norm_eps": -1e-5},
        {"norm_eps": math.nan},
        {"rope_theta": 0.0},
    ],
)
def test_a_senseless_config_names_its_field(wrong):
    with pytest.raises(InputError, match=f"{next(iter(wrong))}"):
        Config(**{"vocab_size": 5} | SIZES | wrong)


@pytest.mark.parametrize("four", [(0.5, 1, 4, 8), (8, 0, 4, 8), (8, 4, 4, 8), (8, 1, 4, 0)])
def test_a_senseless_scaling_is_refused(four):
    with pytest.raises(InputError, match="RoPE scaling"):
        RopeScaling(*four)


# ---- Hugging Face ------------------------------------------------------------------------------

# Llama-3.1-8B's published config.json
LLAMA_31_8B = {
    "architectures": ["LlamaForCausalLM"],
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 14336,
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "model_type": "llama",
    "num_attention_heads": 32,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rms_norm_eps": 1e-05,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
        "rope_type": "llama3",
    },
    "rope_theta": 500000.0,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.0.dev0",
    "use_cache": True,
    "vocab_size": 128256,
}
EXPECTED_8B = Config(
    dim=4096,
    n_layers=32,
    n_heads=32,
    n_kv_heads=8,
    head_dim=128,
    ffn_dim=14336,
    vocab_size=128256,
    norm_eps=1e-5,
    rope_theta=500000.0,
    rope_scaling=LLAMA_31,
    rope_pairing="half",
    tied=False,
    context_length=131072,
)


def changed(**keys):
    """Llama 3.1's settings with keys set, or taken away where the value is `...`."""
    merged = LLAMA_31_8B | keys
    return {key: value for key, value in merged.items() if value is not ...}


def test_the_published_config_of_llama_31_8b():
    assert from_hf(LLAMA_31_8B, "config.json") == EXPECTED_8B


def test_the_newer_form_with_rope_parameters_says_the_same():
    inside = LLAMA_31_8B["rope_scaling"] | {"rope_theta": 500000.0}
    newer = changed(rope_theta=..., rope_scaling=..., rope_parameters=inside, dtype="bfloat16")
    assert from_hf(newer, "config.json") == EXPECTED_8B
    both = changed(rope_parameters=inside)
    assert from_hf(both, "config.json") == EXPECTED_8B


def test_the_key_type_means_rope_type():
    older = dict(LLAMA_31_8B["rope_scaling"])
    older["type"] = older.pop("rope_type")
    assert from_hf(changed(rope_scaling=older), "c") == EXPECTED_8B


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_scaling": None},
        {"rope_scaling": ...},
        {"rope_scaling": {"type": "default"}},
        {"rope_scaling": {"rope_type": "none"}},
        {"rope_scaling": ..., "rope_theta": ..., "rope_parameters": {"rope_theta": 500000.0}},
        {
            "rope_scaling": None,
            "rope_theta": ...,
            "rope_parameters": {"rope_theta": 500000.0, "rope_type": "default"},
        },
    ],
)
def test_no_scaling_is_said_in_many_ways(rope):
    config = from_hf(changed(**rope), "c")
    assert config.rope_scaling is None
    assert config.rope_theta == 500000.0


@pytest.mark.parametrize(
    ("keys", "field", "expected"),
    [
        ({"head_dim": None}, "head_dim", 128),
        ({"head_dim": 64}, "head_dim", 64),
        ({"num_key_value_heads": ...}, "n_kv_heads", 32),
        ({"num_key_value_heads": None}, "n_kv_heads", 32),
        ({"rope_theta": ..., "rope_scaling": ...}, "rope_theta", 10000.0),
        ({"rope_theta": 500000}, "rope_theta", 500000.0),
        ({"tie_word_embeddings": ...}, "tied", False),
        ({"tie_word_embeddings": True}, "tied", True),
        ({"sliding_window": None, "quantization_config": None}, "dim", 4096),
        ({"pretraining_tp": 4}, "dim", 4096),
        ({"rope_interleaved": False, "transformers.js_config": {}}, "dim", 4096),  # SmolLM2's
    ],
)
def test_defaults_and_harmless_keys(keys, field, expected):
    assert getattr(from_hf(changed(**keys), "c"), field) == expected


SCALING = LLAMA_31_8B["rope_scaling"]
REFUSED_HF = [
    ({"model_type": "mistral"}, "model_type.*mistral"),
    ({"model_type": ...}, "'model_type'"),
    ({"hidden_act": "gelu"}, "hidden_act.*gelu"),
    ({"attention_bias": True}, "attention_bias"),
    ({"mlp_bias": True}, "mlp_bias"),
    ({"sliding_window": 4096}, "sliding_window"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ({"rope_interleaved": True}, "rope_interleaved"),
    ({"residual_multiplier": 0.2}, "residual_multiplier"),
    ({"hidden_size": ...}, "'hidden_size'"),
    ({"rms_norm_eps": ...}, "'rms_norm_eps'"),
    ({"hidden_size": "4096"}, "hidden_size.*'4096'"),
    ({"hidden_size": 4096.0}, r"hidden_size.*4096\.0"),
    ({"hidden_size": True}, "hidden_size.*True"),
    ({"hidden_size": 4100}, "head size.*4100"),
    ({"num_hidden_layers": -1}, "num_hidden_layers.*-1"),
    ({"num_key_value_heads": 5}, "n_kv_heads"),
    ({"head_dim": 0}, "head_dim"),
    ({"rms_norm_eps": math.nan}, "rms_norm_eps.*nan"),
    ({"rms_norm_eps": "1e-5"}, "rms_norm_eps"),
    ({"rms_norm_eps": -1.0}, "norm_eps"),
    ({"rope_theta": math.inf}, "rope_theta.*inf"),
    ({"rope_theta": 10**400}, "rope_theta"),
    ({"rope_theta": -1.0}, "rope_theta"),
    ({"rope_theta": {}}, "rope_theta"),
    ({"tie_word_embeddings": "yes"}, "tie_word_embeddings.*'yes'"),
    ({"rope_scaling": "llama3"}, "rope_scaling.*llama3"),
    ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "yarn"),
    ({"rope_scaling": {"type": "linear", "factor": 4.0}}, "linear"),
    ({"rope_scaling": {"factor": 8.0}}, "rope_type"),
    ({"rope_scaling": {"rope_type": ["llama3"]}}, "rope_type"),
    ({"rope_scaling": {"rope_type": "default", "factor": 8.0}}, "factor"),
    ({"rope_scaling": SCALING | {"factor": 0.5}}, "factor"),
    ({"rope_scaling": SCALING | {"factor": None}}, "factor"),
    ({"rope_scaling": SCALING | {"type": "default"}}, "rope_type"),
    ({"rope_scaling": SCALING | {"beta_fast": 32}}, "beta_fast"),
    ({"rope_scaling": SCALING | {"original_max_position_embeddings": 0.5}}, "original_max"),
    ({"rope_parameters": {"rope_theta": 10000.0}}, "rope_theta"),
    ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor.*0.5"),
]


@pytest.mark.parametrize(("keys", "named"), REFUSED_HF)
def test_what_changes_the_arithmetic_is_refused_by_name(keys, named):
    with pytest.raises(InputError, match=rf"^some/config\.json: .*{named}"):
        from_hf(changed(**keys), "some/config.json")


json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)


@given(
    st.dictionaries(st.sampled_from(sorted(LLAMA_31_8B)) | st.text(max_size=4), json_values),
    st.dictionaries(st.sampled_from(sorted(SCALING)), json_values),
)
def test_any_json_gives_a_config_or_an_input_error(keys, scaling):
    for settings in (keys, LLAMA_31_8B | keys, changed(rope_scaling=SCALING | scaling)):
        told = ""
        try:
            assert isinstance(from_hf(json.loads(json.dumps(settings)), "c"), Config)
        except InputError as error:
            told = str(error)
        assert len(told) < 1000


# ---- GGUF --------------------------------------------------------------------------------------

GGUF_8B = {
    "general.architecture": "llama",
    "general.type": "model",
    "general.name": "Meta Llama 3.1 8B",
    "llama.block_count": 32,
    "llama.context_length": 131072,
    "llama.embedding_length": 4096,
    "llama.feed_forward_length": 14336,
    "llama.attention.head_count": 32,
    "llama.attention.head_count_kv": 8,
    "llama.rope.freq_base": 500000.0,
    "llama.attention.layer_norm_rms_epsilon": 1e-05,
    "llama.vocab_size": 128256,
    "llama.rope.dimension_count": 128,
    "tokenizer.ggml.model": "gpt2",
}
DIVISORS_8B = LLAMA_31.divisors_P(500000.0, 128).astype(np.float32)


def gguf_config(keys, divisors_P=None):
    merged = {key: value for key, value in (GGUF_8B | keys).items() if value is not ...}
    return from_gguf(merged, 128256, False, "some.gguf", divisors_P)


def test_gguf_and_hugging_face_describe_the_same_model():
    config = gguf_config({}, DIVISORS_8B)
    assert config == Config(**vars(EXPECTED_8B) | {"rope_pairing": "interleaved"})


@pytest.mark.parametrize(
    ("keys", "field", "expected"),
    [
        ({"llama.attention.head_count_kv": ...}, "n_kv_heads", 32),
        ({"llama.rope.freq_base": ...}, "rope_theta", 10000.0),
        ({"llama.rope.dimension_count": ...}, "head_dim", 128),
        ({"llama.vocab_size": ...}, "vocab_size", 128256),
        ({"llama.rope.scaling.type": "none"}, "rope_scaling", None),
        ({"llama.expert_count": 0}, "dim", 4096),
        (
            {
                "llama.attention.key_length": 64,
                "llama.attention.value_length": 64,
                "llama.rope.dimension_count": 64,
            },
            "head_dim",
            64,
        ),
    ],
)
def test_gguf_defaults(keys, field, expected):
    assert getattr(gguf_config(keys), field) == expected


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ({"general.architecture": "qwen2"}, "general.architecture.*qwen2"),
        ({"general.architecture": ...}, "general.architecture"),
        ({"general.type": "adapter"}, "general.type.*adapter"),
        ({"llama.rope.scaling.type": "yarn"}, "scaling.type.*yarn"),
        ({"llama.rope.scaling.type": "linear"}, "scaling.type.*linear"),
        ({"llama.rope.scaling.factor": 4.0}, "scaling.factor"),
        ({"llama.rope.dimension_count": 64}, "dimension_count.*128.*64"),
        ({"llama.attention.key_length": 64}, "dimension_count.*64.*128"),
        ({"llama.attention.value_length": 64}, "value_length"),
        ({"llama.expert_count": 8}, "expert_count.*8"),
        ({"llama.attention.sliding_window": 4096}, "sliding_window"),
        ({"llama.some_new_scale": 2.0}, "some_new_scale"),
        ({"llama.block_count": ...}, "block_count"),
        ({"llama.attention.head_count_kv": [8, 4]}, "head_count_kv"),
        ({"llama.attention.layer_norm_rms_epsilon": math.nan}, "epsilon"),
        ({"llama.vocab_size": 128000}, "vocab_size.*128256.*128000"),
    ],
)
def test_gguf_refuses_by_name(keys, named):
    with pytest.raises(InputError, match=rf"^some\.gguf: .*{named}"):
        gguf_config(keys)


def branch_form(theta, H, scaling):
    """Meta's apply_scaling as divisors, pair by pair: llama-models models/llama3/model.py."""
    low_wavelength = scaling.old_context / scaling.low_freq_factor
    high_wavelength = scaling.old_context / scaling.high_freq_factor
    divisors = []
    for i in range(H // 2):
        frequency = theta ** (-2 * i / H)
        wavelength = 2 * math.pi / frequency
        if wavelength < high_wavelength:
            new = frequency
        elif wavelength > low_wavelength:
            new = frequency / scaling.factor
        else:
            span = scaling.high_freq_factor - scaling.low_freq_factor
            smooth = (scaling.old_context / wavelength - scaling.low_freq_factor) / span
            new = (1 - smooth) * frequency / scaling.factor + smooth * frequency
        divisors.append(frequency / new)
    return divisors


thetas = st.sampled_from([10.0, 10000.0, 500000.0])
head_dims = st.integers(1, 64).map(lambda pairs: 2 * pairs)


@given(thetas, head_dims, strategies.scalings())
def test_divisors_equal_the_form_with_branches(theta, H, scaling):
    np.testing.assert_allclose(
        scaling.divisors_P(theta, H), branch_form(theta, H, scaling), rtol=1e-12
    )


@given(
    theta=st.floats(5e4, 1e7),
    H=st.sampled_from([64, 128]),
    factor=st.sampled_from([2.0, 2.3, 8.0, 32.0]),
    old=st.sampled_from([2048, 8192]),
)
def test_a_scaling_is_found_again_in_its_divisors(theta, H, factor, old):
    scaling = RopeScaling(factor, 1.0, 4.0, old)
    divisors_P = scaling.divisors_P(theta, H).astype(np.float32)
    assert scaling_from_divisors(divisors_P, theta, H, old) == scaling


@given(st.integers(0, 63), st.sampled_from([0.999, 1.001, 0.0, -1.0, math.nan, math.inf]))
def test_divisors_of_another_kind_are_refused(pair, times):
    divisors_P = DIVISORS_8B.copy()
    divisors_P[pair] *= times
    assume(divisors_P[pair] != DIVISORS_8B[pair])
    with pytest.raises(InputError, match=r"some\.gguf: RoPE divisors"):
        gguf_config({}, divisors_P)


def test_divisors_of_one_are_no_scaling_and_too_few_are_refused():
    assert gguf_config({}, np.ones(64, np.float32)).rope_scaling is None
    with pytest.raises(InputError, match="expected 64"):
        gguf_config({}, DIVISORS_8B[:32])


def test_the_old_context_is_read():
    scaling = RopeScaling(8.0, 1.0, 4.0, 4096)
    divisors_P = scaling.divisors_P(500000.0, 128).astype(np.float32)
    key = gguf.Keys.Rope.SCALING_ORIG_CTX_LEN.format(arch="llama")
    assert gguf_config({key: 4096}, divisors_P).rope_scaling == scaling
    with pytest.raises(InputError, match="old context 8192"):
        gguf_config({}, divisors_P)


# ---- llama2.c ----------------------------------------------------------------------------------


def test_llama2c_header():
    config = from_llama2c((64, 172, 5, 8, 4, 512, 256), True, "s.bin")
    assert config == Config(64, 5, 8, 4, 8, 172, 512, tied=True, context_length=256)
    assert (config.rope_theta, config.norm_eps) == (10000.0, 1e-5)
    assert config.rope_pairing == "interleaved"


@pytest.mark.parametrize("place", range(7))
def test_llama2c_header_names_a_senseless_size(place):
    header = [64, 172, 5, 8, 4, 512, 256]
    header[place] = 0
    with pytest.raises(InputError, match=r"^s\.bin: .*expected a whole number >= 1, found 0"):
        from_llama2c(header, True, "s.bin")

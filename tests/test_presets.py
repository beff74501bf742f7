"""The published models: parameter counts, and the config.json that each was published with."""

from dataclasses import replace

import pytest

from llama3np import cost
from llama3np.config import Config, RopeScaling, from_hf
from llama3np.errors import InputError
from llama3np.presets import PRESETS

TOTALS = {
    "llama2-7b": 6_738_415_616,
    "llama2-13b": 13_015_864_320,
    "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248,
    "llama3-70b": 70_553_706_496,
    "llama3.1-8b": 8_030_261_248,
    "llama3.1-70b": 70_553_706_496,
    "llama3.1-405b": 405_853_388_800,
    "llama3.2-1b": 1_235_814_400,
    "llama3.2-3b": 3_212_749_824,
    "llama3.3-70b": 70_553_706_496,
}


def test_the_presets_are_these():
    assert list(PRESETS) == list(TOTALS)


@pytest.mark.parametrize("name", TOTALS)
def test_totals_are_the_published_ones(name):
    assert sum(cost.parameters(PRESETS[name]).values()) == TOTALS[name]


def test_llama2_7b_in_float32_is_25705_mebibytes():
    assert round(cost.weight_bytes(PRESETS["llama2-7b"], "f32") / 2**20, 2) == 25705.02


# ---- config.json as published ------------------------------------------------------------------

COMMON = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_act": "silu",
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-05,
    "tie_word_embeddings": False,
    "use_cache": True,
}
LLAMA2 = COMMON | {
    "_name_or_path": "meta-llama/Llama-2-7b-hf",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "max_position_embeddings": 4096,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "torch_dtype": "float16",
    "transformers_version": "4.31.0.dev0",
    "vocab_size": 32000,
}
LLAMA3 = COMMON | {
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "max_position_embeddings": 8192,
    "num_key_value_heads": 8,
    "pretraining_tp": 1,
    "rope_scaling": None,
    "rope_theta": 500000.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.0.dev0",
    "vocab_size": 128256,
}
SCALING = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
    "rope_type": "llama3",
}
LLAMA31 = LLAMA3 | {
    "max_position_embeddings": 131072,
    "mlp_bias": False,
    "rope_scaling": SCALING,
    "eos_token_id": [128001, 128008, 128009],
    "transformers_version": "4.42.3",
}
LLAMA32 = LLAMA31 | {
    "rope_scaling": SCALING | {"factor": 32.0},
    "tie_word_embeddings": True,
    "transformers_version": "4.45.0.dev0",
}


def sizes(dim, ffn_dim, n_layers, n_heads, **more):
    return {
        "hidden_size": dim,
        "intermediate_size": ffn_dim,
        "num_hidden_layers": n_layers,
        "num_attention_heads": n_heads,
        **more,
    }


S8, S70 = sizes(4096, 14336, 32, 32), sizes(8192, 28672, 80, 64)
PUBLISHED = {
    "llama2-7b": LLAMA2 | sizes(4096, 11008, 32, 32, num_key_value_heads=32),
    "llama2-13b": LLAMA2 | sizes(5120, 13824, 40, 40, num_key_value_heads=40),
    "llama2-70b": LLAMA2 | sizes(8192, 28672, 80, 64, num_key_value_heads=8),
    "llama3-8b": LLAMA3 | S8,
    "llama3-70b": LLAMA3 | S70,
    "llama3.1-8b": LLAMA31 | S8,
    "llama3.1-70b": LLAMA31 | S70,
    "llama3.1-405b": LLAMA31 | sizes(16384, 53248, 126, 128),
    "llama3.2-1b": LLAMA32 | sizes(2048, 8192, 16, 32, head_dim=64),
    "llama3.2-3b": LLAMA32 | sizes(3072, 8192, 28, 24, head_dim=128),
    "llama3.3-70b": LLAMA31 | S70 | {"head_dim": 128, "transformers_version": "4.47.0.dev0"},
}


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_is_what_its_config_json_says(name):
    published = from_hf(PUBLISHED[name], "config.json")
    assert replace(published, rope_pairing="interleaved") == PRESETS[name]


def newer(settings):
    """The same settings as transformers 5 writes them: dtype, and RoPE in one object."""
    dropped = ("rope_theta", "rope_scaling", "torch_dtype", "pretraining_tp")
    rope = {"rope_theta": settings.get("rope_theta", 10000.0), "rope_type": "default"}
    rope |= settings["rope_scaling"] or {}
    kept = {key: value for key, value in settings.items() if key not in dropped}
    return kept | {"rope_parameters": rope, "dtype": "bfloat16", "transformers_version": "5.0.0"}


@pytest.mark.parametrize("name", PRESETS)
def test_the_newer_form_says_the_same(name):
    assert from_hf(newer(PUBLISHED[name]), "c") == from_hf(PUBLISHED[name], "c")


# Models of the same architecture by others, and what tools add when they upload a copy.
OTHERS = {
    "TinyLlama-1.1B-Chat-v1.0": (
        LLAMA2
        | sizes(2048, 5632, 22, 32, num_key_value_heads=4, max_position_embeddings=2048)
        | {"attention_bias": False, "rope_theta": 10000.0, "torch_dtype": "bfloat16"},
        Config(2048, 22, 32, 4, 64, 5632, 32000, context_length=2048, rope_pairing="half"),
    ),
    "SmolLM2-135M-Instruct": (
        COMMON
        | sizes(576, 1536, 30, 9, num_key_value_heads=3, vocab_size=49152)
        | {
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
            "initializer_range": 0.041666666666666664,
            "is_llama_config": True,
            "max_position_embeddings": 8192,
            "mlp_bias": False,
            "rope_interleaved": False,
            "rope_scaling": None,
            "rope_theta": 100000,
            "tie_word_embeddings": True,
            "torch_dtype": "bfloat16",
            "transformers.js_config": {"kv_cache_dtype": {"q4f16": "float16", "fp16": "float16"}},
        },
        Config(
            576, 30, 9, 3, 64, 1536, 49152,
            rope_theta=100000.0, tied=True, context_length=8192, rope_pairing="half",
        ),
    ),
    "Hermes-3-Llama-3.1-8B": (
        LLAMA31 | S8 | {"_name_or_path": "x", "eos_token_id": 128040, "pad_token_id": 128001},
        replace(PRESETS["llama3.1-8b"], rope_pairing="half"),
    ),
    "unsloth/Llama-3.2-1B-Instruct": (
        PUBLISHED["llama3.2-1b"]
        | {"pad_token_id": 128004, "unsloth_fixed": True, "unsloth_version": "2024.12.4"},
        replace(PRESETS["llama3.2-1b"], rope_pairing="half"),
    ),
    "NousResearch/Llama-2-7b-hf": (
        PUBLISHED["llama2-7b"] | {"pad_token_id": 0, "rope_theta": 10000.0, "mlp_bias": False},
        replace(PRESETS["llama2-7b"], rope_pairing="half"),
    ),
    "an early copy with the key `type`": (
        PUBLISHED["llama3.1-8b"]
        | {"rope_scaling": {"type": "llama3", **{k: SCALING[k] for k in list(SCALING)[:4]}}},
        replace(PRESETS["llama3.1-8b"], rope_pairing="half"),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", OTHERS)
def test_models_of_others_are_read(name):
    settings, expected = OTHERS[name]
    assert from_hf(settings, "config.json") == expected


@pytest.mark.parametrize(
    ("name", "keys", "complaint"),
    [
        # Llama-3.1-405B-Instruct-FP8, and the copies quantised by bitsandbytes, GPTQ and AWQ
        ("llama3.1-405b", {"quantization_config": {"quant_method": "fbgemm_fp8"}}, "quantization"),
        ("llama3.1-8b", {"quantization_config": {"load_in_4bit": True}}, "quantization_config"),
        # LongChat, CodeLlama-like and YaRN models of Llama 2
        ("llama2-7b", {"rope_scaling": {"type": "linear", "factor": 8.0}}, "'linear'"),
        ("llama2-7b", {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "'dynamic'"),
        ("llama2-7b", {"rope_scaling": {"type": "yarn", "factor": 16.0}}, "'yarn'"),
        ("llama3-8b", {"attention_bias": True}, "attention_bias"),
        ("llama3-8b", {"mlp_bias": True}, "mlp_bias"),
        ("llama3-8b", {"sliding_window": 4096}, "sliding_window"),
        ("llama3-8b", {"model_type": "mllama"}, "model_type: only 'llama'"),
        ("llama3-8b", {"num_local_experts": 8}, "num_local_experts"),
        ("llama3-8b", {"hidden_act": "gelu"}, "hidden_act"),
    ],
)
def test_what_changes_the_arithmetic_is_refused_by_name(name, keys, complaint):
    with pytest.raises(InputError, match=rf"^config\.json: .*{complaint}"):
        from_hf(PUBLISHED[name] | keys, "config.json")


def test_scalings_differ_by_family():
    factors = {name: getattr(config.rope_scaling, "factor", 1) for name, config in PRESETS.items()}
    assert factors["llama3-8b"] == factors["llama2-70b"] == 1
    assert factors["llama3.1-405b"] == factors["llama3.3-70b"] == 8
    assert factors["llama3.2-1b"] == factors["llama3.2-3b"] == 32
    assert PRESETS["llama3.2-1b"].rope_scaling == RopeScaling(32.0, 1.0, 4.0, 8192)

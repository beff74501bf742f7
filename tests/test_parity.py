"""Every family against transformers: goldens of tools/parity, made where torch is (goldens/README).

The models are made anew by the integer formula of tools/made_up.py, written as a Hugging Face
directory and loaded; no torch. The tolerance is measured: three times the error that transformers
itself makes in float32, against the same float64 reference.
"""

import json
from dataclasses import asdict

import made_up
import make_checkpoint
import numpy as np
import oracle
import paths
import pytest
from parity import families

import llama3np
from llama3np.params import named

GOLDEN = json.loads((paths.GOLDENS / "parity.json").read_text(encoding="utf-8"))
TIMES = 3  # of transformers' own error

# One for each factor; the other scaled ones take as long each, and have their rows in results.md.
LONG = ("llama3.1-8b", "llama3.2-1b")


@pytest.fixture(scope="module")
def arrays():
    return np.load(paths.GOLDENS / "parity.npz")


@pytest.fixture
def tiny(tmp_path):
    """Return load(model): it, out of the files that were made for it."""

    def load(model):
        make_checkpoint.write(config_of(model), "hf", tmp_path / "model")
        return llama3np.load(tmp_path / "model")

    return load


def config_of(model):
    part, family = model.split("/")
    return {"tiny": families.tiny, "long": families.long}[part](family)


def logits_at(llm, ids_T, positions):
    """Logits (positions, V), the ids going through in chunks."""
    cache, kept = llm.new_cache(1, len(ids_T)), []
    for start in range(0, len(ids_T), families.CHUNK):
        logits_TV = llm.forward(ids_T[None, start : start + families.CHUNK], cache)[0]
        kept += [logits_TV[p - start] for p in positions if 0 <= p - start < len(logits_TV)]
    return np.stack(kept)


def check(logits_TV, arrays, model):
    error = np.abs(logits_TV - arrays[model]).max()
    assert error < TIMES * GOLDEN["models"][model]["transformers_error"]


def test_every_family_has_its_goldens(arrays):
    short = {f"tiny/{family}" for family in families.FAMILIES}
    long = {f"long/{family}" for family in families.SCALED}
    assert set(GOLDEN["models"]) == short | long == set(arrays.files) - {"ids"}


@pytest.mark.parametrize("model", GOLDEN["models"])
def test_the_tiny_models_are_those_of_the_goldens(model):
    assert asdict(config_of(model)) == GOLDEN["models"][model]["config"]


def test_the_ids_are_those_of_the_goldens(arrays):
    ids_T = families.token_ids(families.LONG, families.TINY_VOCABULARY)
    assert np.array_equal(ids_T, arrays["ids"])


@pytest.mark.parametrize("family", families.FAMILIES)
def test_logits_are_within_thrice_the_error_of_transformers(tiny, arrays, family):
    ids_T = arrays["ids"][: families.SHORT]
    logits_TV = logits_at(tiny(f"tiny/{family}"), ids_T, GOLDEN["positions"]["tiny"])
    check(logits_TV, arrays, f"tiny/{family}")


@pytest.mark.parametrize("family", LONG)
def test_logits_beyond_the_old_context(tiny, arrays, family):
    """Positions from 8192 on, all tokens before them in the cache: long wavelengths matter here."""
    logits_TV = logits_at(tiny(f"long/{family}"), arrays["ids"], GOLDEN["positions"]["long"])
    check(logits_TV, arrays, f"long/{family}")


@pytest.mark.parametrize("family", ["llama2-7b", "llama3-8b", "llama3.2-1b", "llama3.2-3b"])
def test_the_reference_is_the_scalar_oracle(arrays, family):
    """At the first four positions, as the loops are slow; both are float64, to the last digits."""
    config = families.tiny(family)
    tensors = named(made_up.params(config, "f32"), config.tied)
    scaling = config.rope_scaling and oracle.Scaling(
        config.rope_scaling.factor,
        config.rope_scaling.low_freq_factor,
        config.rope_scaling.high_freq_factor,
        config.rope_scaling.old_context,
    )
    sizes = oracle.Sizes(
        *(config.n_layers, config.n_heads, config.n_kv_heads, config.head_dim),
        *(config.norm_eps, config.rope_theta, scaling),
    )
    tensors = {name: np.asarray(w) for name, w in tensors.items()}
    logits_TV = oracle.forward(tensors, sizes, arrays["ids"][:4].tolist())["logits"]
    assert np.abs(logits_TV - arrays[f"tiny/{family}"][:4]).max() < 1e-12

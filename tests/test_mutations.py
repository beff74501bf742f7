"""The list of mistakes: complete, applicable, and each of them one."""

from dataclasses import replace

import numpy as np
import pytest

import llama3np.cache
import llama3np.model
import llama3np.numerics
import llama3np.params
from llama3np.config import Config, RopeScaling
from llama3np.crosscheck import mutant
from llama3np.crosscheck.mutations import Setting, table
from llama3np.numerics import PROFILES

# What the cross-checker promises to find, and the ids that find it.
PROMISED = {
    "RoPE pairing swapped": ["rope-pairing-swapped"],
    "theta 10000 or 500000": ["theta-10000", "theta-500000"],
    "scaling absent": ["rope-scaling-absent"],
    "scaling linear": ["rope-scaling-linear"],
    "factor 8 for 32 and 32 for 8": ["rope-factor-8", "rope-factor-32"],
    "angles in bf16": ["angles-bf16"],
    "position off by one": ["positions-from-one", "positions-restart-at-decode"],
    "eps 1e-6, 1e-5, 0": ["eps-1e-6", "eps-1e-5", "eps-0"],
    "norm weight": ["norm-weight-before-cast", "norm-weight-missing", "norm-weight-plus-one"],
    "scale of the scores": ["scale-missing", "scale-by-width", "scale-twice"],
    "softmax over the wrong axis": ["softmax-over-queries"],
    "mask": ["mask-missing", "mask-sees-next", "mask-hides-self", "mask-only-in-prefill"],
    "heads grouped by tile instead of repeat": ["heads-tiled"],
    "K and V swapped": ["kv-swapped", "wk-wv-swapped"],
    "cache hole or overwritten slot": ["cache-hole", "cache-overwritten", "cache-slot-stuck"],
    "RoPE to V, only to Q, after caching twice": [
        "rope-on-v",
        "rope-only-on-q",
        "rope-only-on-k",
        "rope-twice-on-cached-keys",
    ],
    "gate and up swapped": ["gate-up-swapped", "w-gate-up-swapped"],
    "gelu or relu for silu": ["gelu-tanh", "gelu-exact", "relu"],
    "residual from the normed stream": ["residual-from-norm"],
    "final norm missing": ["final-norm-missing"],
    "transposed q/k weights": ["q-transposed", "k-transposed", "qk-transposed"],
    "unpermuted q/k weights": ["qk-permuted", "qk-permuted-back", "k-permuted-as-q"],
    "tied head where it is not, and the reverse": ["head-tied", "head-untied"],
    "BOS missing or doubled": ["bos-missing", "bos-doubled"],
    "embedding scaled": ["embedding-scaled"],
    "bf16 truncation for rounding": ["bf16-truncated", "weights-truncated"],
    "f16 overflow": ["f16-overflow"],
    "a layer skipped or repeated": ["layer-skipped", "layer-repeated"],
    "layers in lexicographic order": ["layers-lexicographic"],
    "a shard merged on the wrong axis": ["shard-axis"],
    "wrong rows of a sharded embedding": ["embedding-shard-rows"],
}

# Four head sizes, so that no two matrices but w_gate and w_up are of one shape by chance; an old
# context within reach of the positions.
SCALED = RopeScaling(32.0, 1.0, 4.0, 64)
PLAIN = Config(64, 12, 8, 4, 8, 48, 64, 1e-4, 1000.0)
CONFIGS = {
    "plain": PLAIN,
    "scaled": Config(64, 12, 8, 4, 8, 48, 64, 1e-4, 1000.0, SCALED, "half"),
    "tied": Config(64, 2, 8, 4, 8, 48, 64, 1e-4, 1000.0, replace(SCALED, factor=8.0), tied=True),
}
# ids, prefill: among the ids are some of every part of the table
IDS, PREFILL = (1, 40, 63, 17, 5, 33, 22, 8), 5

# Where a mutation cannot change a number, and why.
INVISIBLE = {
    "positions-from-one": "scores depend on distances of positions only: all moved is none moved",
    "norm-weight-before-cast": "there is no cast in float32",
    "bf16-truncated": "nothing is bfloat16 in float32",
    "rope-scaling-added": "all waves of so short a head are within the old context of 8192",
}


def setting(config, seed=0, prefill=PREFILL):
    params = llama3np.params.random(config, np.random.default_rng(seed))
    return Setting(config, params, IDS, prefill)


def logits(run, profile="float32"):
    """The logits of every call, one after the other."""
    found = []

    def see(_, name, array):
        if name == "logits":
            found.append(np.array(array, dtype=np.float64))

    mutant.run(run, PROFILES[profile], None, see)
    return np.concatenate(found)


def changed(run, expected):
    found = logits(run)
    if found.shape != expected.shape:
        return True  # of BOS mutations
    return not np.abs(found - expected).max() < 1e-5  # NaN is a change


@pytest.mark.parametrize("what", PROMISED)
def test_what_is_promised_is_listed(what):
    for id in PROMISED[what]:
        assert id in table()


def test_ids_are_kebab_case_and_sentences_are_one_line():
    for id, mutation in table().items():
        assert mutation.id == id
        assert set(id) <= set("abcdefghijklmnopqrstuvwxyz0123456789-"), id
        assert 20 < len(mutation.sentence) <= 100, id
        assert "\n" not in mutation.sentence, id


def test_every_mutation_changes_the_logits_of_some_model_or_is_listed_as_invisible():
    seen = dict.fromkeys(table(), False)
    for config in CONFIGS.values():
        run = setting(config)
        expected = logits(run)
        for id, mutation in table().items():
            cases = [] if seen[id] else mutation.cases(run)
            seen[id] |= any(changed(other, expected) for _, other in cases)
    assert {id for id, changes in seen.items() if not changes} == set(INVISIBLE)


@pytest.mark.parametrize("config", CONFIGS)
def test_every_edit_has_one_place_and_a_line_to_show(config):
    for mutation in table().values():
        for _, run in mutation.cases(setting(CONFIGS[config])):
            for before, after in mutant.lines(run.edits):
                assert before != after


def test_an_edit_without_a_place_is_an_error():
    wrong = setting(PLAIN).edited(mutant.Edit("no such passage", ""))
    with pytest.raises(ValueError, match="found 0 times"):
        logits(wrong)


def test_truncation_and_the_order_of_casts_show_in_bfloat16():
    run = setting(PLAIN)
    run = run._replace(params=llama3np.numerics.short_params(run.params, "bfloat16"))
    expected = logits(run, "bf16-hf")
    for id in ("bf16-truncated", "norm-weight-before-cast"):
        ((_, other),) = table()[id].cases(run)
        assert (logits(other, "bf16-hf") != expected).any(), id


@pytest.mark.parametrize("config", CONFIGS)
def test_without_edits_the_run_is_the_spec(config):
    """One call and then single tokens, through a cache that has one slot more than it needs."""
    run = setting(CONFIGS[config])
    cache = llama3np.cache.new_cache(run.config, 1, len(IDS))
    expected_BTV, _ = llama3np.model.forward(
        run.params, run.config, [list(IDS)], cache, last_only=False
    )
    np.testing.assert_allclose(logits(run), expected_BTV[0], rtol=0, atol=1e-5)

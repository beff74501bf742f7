"""Names of other implementations, and of users, as taps."""

import json

import candidates
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama3np.crosscheck import schemes, taps
from llama3np.crosscheck.schemes import checked_map, meaning, read_map
from llama3np.errors import InputError

LAYERS = 40
layers = st.integers(0, LAYERS - 1)
names = st.sampled_from(
    [
        (theirs, kind)
        for scheme in schemes.SCHEMES.values()
        for theirs, kind in scheme.items()
        if " " not in kind
    ]
)


@given(names, layers, st.sampled_from(["", ".output"]))
def test_every_name_of_a_scheme_means_its_tap(name, i, suffix):
    theirs, kind = name
    if theirs.endswith(".input"):
        suffix = ""
    found = meaning(theirs.replace("{i}", str(i)) + suffix, LAYERS)
    assert (found.kinds, found.layer) == ((kind,), i if "{i}" in theirs else None)
    assert (found.layer is None) == (kind not in taps.LAYER)


@given(st.sampled_from(taps.order(LAYERS)))
def test_our_own_names_mean_themselves(name):
    found = meaning(name, LAYERS)
    assert (found.layer, found.kinds[0]) == taps.parse(name)
    assert found.scheme == schemes.OURS


@pytest.mark.parametrize("prefix", ["", "model.", "module.model.", "base_model.model.model."])
def test_wrappers_put_their_names_before(prefix):
    assert meaning(f"{prefix}layers.3.mlp.up_proj", LAYERS).kinds == ("up",)


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.0.self_attn.q_proj.weight",
        "model.layers.x.mlp.up_proj",
        "model.layers.0.mlp.gate_proj.input",  # that is mlp_norm, which has its own name
        "Qcur-0-1",
        "model.Qcur-0",
        "blk.0.attn_q",
        "hidden_states.41",
    ],
)
def test_other_names_mean_nothing(name):
    assert meaning(name, LAYERS) is None


def test_one_name_of_llama_cpp_stands_for_two_taps():
    assert meaning("Qcur-7", LAYERS).kinds == ("q", "q_rope")
    assert meaning("Qcur_rope-7", LAYERS).kinds == ("q_rope",)
    assert meaning("kq-7", LAYERS).raw
    assert not meaning("kq_soft_max-7", LAYERS).raw


def test_hidden_states_of_transformers_end_with_the_norm():
    found = [meaning(f"hidden_states.{i}", 2) for i in range(4)]
    assert [(m.layer, m.kinds[0]) for m in found[:3]] == [(None, "embed"), (0, "h"), (None, "norm")]
    assert found[3] is None


def test_what_the_helpers_of_the_tests_write_is_every_tap():
    for table in (candidates.HUGGING_FACE, candidates.LLAMA_CPP):
        assert list(table) == list(taps.DIMS)


# ---- the user's own map --------------------------------------------------------------------------


@given(layers, st.sampled_from(list(taps.LAYER)), st.sampled_from(["a{i}", "x.{i}.y(*)", "{i}"]))
def test_a_map_comes_before_every_scheme(i, kind, theirs):
    own = {theirs: f"layers.{{i}}.{kind}", "logits": "norm"}
    found = meaning(theirs.replace("{i}", str(i)), LAYERS, own)
    assert (found.layer, found.kinds, found.scheme) == (i, (kind,), "the map")
    assert meaning("logits", LAYERS, own).kinds == ("norm",)


@pytest.mark.parametrize(
    ("names", "told"),
    [
        ([], "expected a JSON object of names, found list"),
        ({"a": "q"}, "'a': expected a tap such as 'layers.{i}.q' or 'logits', found 'q'"),
        ({"a": 3}, "found 3"),
        ({"a": "layers.{i}.q"}, "'a': expected {i}, the layer, once in both names or in neither"),
        ({"a{i}": "logits"}, "expected {i}, the layer"),
        ({"{i}{i}": "layers.{i}.q"}, "expected {i}, the layer"),
    ],
)
def test_a_map_that_says_nothing_is_refused(names, told):
    with pytest.raises(InputError) as error:
        checked_map(names, "names.json")
    assert str(error.value).startswith("names.json: ")
    assert told in str(error.value)


def test_a_map_is_read_from_json(tmp_path):
    path = tmp_path / "names.json"
    path.write_text(json.dumps({"x{i}": "layers.{i}.q"}))
    assert read_map(path) == {"x{i}": "layers.{i}.q"}
    path.write_text("{")
    with pytest.raises(InputError, match=r"names\.json: expected a JSON object"):
        read_map(path)
    with pytest.raises(InputError, match=r"absent\.json: No such file"):
        read_map(tmp_path / "absent.json")

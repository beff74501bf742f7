"""load/names.py: the table against the gguf package's own, and the two orders of q/k rows."""

import gguf
import numpy as np
import pytest
import strategies
from hypothesis import given
from hypothesis import strategies as st

from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.load import names
from llama3np.params import named, named_shapes

LAYOUTS = ("meta", "huggingface", "gguf")
CONFIG = Config(dim=6, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, ffn_dim=5, vocab_size=7)

# ---- the table ---------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["meta", "huggingface"])
def test_names_lead_to_the_gguf_name_that_the_gguf_package_gives(layout):
    theirs = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG.n_layers)
    for ours in named_shapes(CONFIG):
        source = names.foreign(ours, layout)
        assert theirs.get_name(source, (".weight",)) == names.foreign(ours, "gguf")


@pytest.mark.parametrize("layout", LAYOUTS)
@given(config=strategies.configs())
def test_no_two_tensors_share_a_name(layout, config):
    ours = named_shapes(config)
    assert len({names.foreign(name, layout) for name in ours}) == len(ours)


# ---- what a file has and what it should have ---------------------------------------------------


def foreign_shapes(layout):
    return {names.foreign(ours, layout): shape for ours, shape in named_shapes(CONFIG).items()}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_complete_file_matches_every_tensor(layout):
    matched = names.matched(foreign_shapes(layout), CONFIG, layout, "f")
    assert matched == {ours: names.foreign(ours, layout) for ours in named_shapes(CONFIG)}


TABLES_OF_THETA = {
    "meta": "rope.freqs",
    "huggingface": "model.layers.1.self_attn.rotary_emb.inv_freq",
    "gguf": "rope_freqs.weight",
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tables_of_theta_are_tolerated_and_only_in_their_own_layout(layout):
    for other, name in TABLES_OF_THETA.items():
        found = foreign_shapes(layout) | {name: (2,)}
        if other == layout:
            names.matched(found, CONFIG, layout, "f")
        else:
            with pytest.raises(InputError, match="no place"):
                names.matched(found, CONFIG, layout, "f")


@given(missing=st.sets(st.sampled_from(sorted(named_shapes(CONFIG))), min_size=1))
def test_missing_tensors_are_named_and_counted(missing):
    gone = {names.foreign(ours, "gguf") for ours in missing}
    found = {name: shape for name, shape in foreign_shapes("gguf").items() if name not in gone}
    with pytest.raises(InputError) as error:
        names.matched(found, CONFIG, "gguf", "some.gguf")
    text = str(error.value)
    if CONFIG.n_layers > len(found):
        assert f"expected {CONFIG.n_layers} layers" in text
        return
    assert text.startswith(f"some.gguf: {len(gone)} tensors are missing: ")
    assert sum(name in text.replace(",", "").split() for name in gone) == min(3, len(gone))
    assert (f"and {len(gone) - 3} more" in text) == (len(gone) > 3)


def test_extra_tensors_and_wrong_shapes_are_named():
    found = foreign_shapes("gguf")
    with pytest.raises(InputError, match=r"1 tensors have no place .*: blk\.0\.attn_q\.bias$"):
        names.matched(found | {"blk.0.attn_q.bias": (16,)}, CONFIG, "gguf", "f")
    with pytest.raises(InputError, match=r"blk\.1\.attn_k\.weight \(expected \(8, 6\), found \(6"):
        names.matched(found | {"blk.1.attn_k.weight": (6, 8)}, CONFIG, "gguf", "f")


# ---- the order of rows -------------------------------------------------------------------------


@st.composite
def projections(draw):
    """(w, n_heads, H) with rows of different numbers."""
    n_heads, P, D = draw(st.integers(1, 6)), draw(st.integers(1, 5)), draw(st.integers(1, 3))
    return np.arange(n_heads * 2 * P * D).reshape(n_heads * 2 * P, D), n_heads, 2 * P


@given(projections())
def test_each_order_is_undone_by_the_other(drawn):
    w, n_heads, _ = drawn
    assert (names.to_interleaved(names.to_half(w, n_heads), n_heads) == w).all()
    assert (names.to_half(names.to_interleaved(w, n_heads), n_heads) == w).all()


@given(projections())
def test_pair_i_of_a_head_moves_from_2i_to_i_and_i_plus_half(drawn):
    w, n_heads, H = drawn
    half = names.to_half(w, n_heads)
    for head in range(n_heads):
        for i in range(H // 2):
            assert (half[head * H + i] == w[head * H + 2 * i]).all()
            assert (half[head * H + H // 2 + i] == w[head * H + 2 * i + 1]).all()


@given(strategies.models())
def test_with_pairing_moves_the_rows_of_wk_by_its_own_number_of_heads(model):
    """With n_heads for k, 64 heads over 8 look right and 32 over 4 do not: TinyLlama issue 24."""
    config, H = model.config, model.config.head_dim
    other = "half" if config.rope_pairing == "interleaved" else "interleaved"
    turned_config, turned = names.with_pairing(config, model.params, other)
    assert turned_config.rope_pairing == other
    old, new = (turned, model.params) if other == "interleaved" else (model.params, turned)
    for field, n_heads in (("wq", config.n_heads), ("wk", config.n_kv_heads)):
        w, half = getattr(old.layers[0], field), getattr(new.layers[0], field)
        for head in range(n_heads):
            rows, half_rows = w[head * H : (head + 1) * H], half[head * H : (head + 1) * H]
            assert rows[0::2].tobytes() == half_rows[: H // 2].tobytes()
            assert rows[1::2].tobytes() == half_rows[H // 2 :].tobytes()


@given(strategies.models())
def test_with_pairing_and_back_is_the_same_model(model):
    other = "half" if model.config.rope_pairing == "interleaved" else "interleaved"
    config, params = names.with_pairing(
        *names.with_pairing(model.config, model.params, other), model.config.rope_pairing
    )
    assert config == model.config
    before, after = named(model.params, config.tied), named(params, config.tied)
    assert all(before[name].tobytes() == after[name].tobytes() for name in before)


def test_a_pairing_of_another_name_is_refused():
    with pytest.raises(InputError, match="neox"):
        names.with_pairing(CONFIG, None, "neox")

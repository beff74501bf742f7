"""docs/numerics.md against the code: its expressions, evaluated with a rounding of their own."""

import re
from dataclasses import replace

import ml_dtypes
import numpy as np
import paths
import pytest
import rounding
from hypothesis import given, settings
from strategies import runs

from llama3np.cache import kv_dtype, new_cache
from llama3np.config import Config
from llama3np.kernels import stored
from llama3np.kernels.engine import make_engine
from llama3np.llm import Llama
from llama3np.model import forward, rope_tables
from llama3np.numerics import PROFILES, short_params
from llama3np.params import random

TEXT = (paths.REPOSITORY / "docs" / "numerics.md").read_text(encoding="utf-8")
DTYPES = {
    "float16": np.dtype(np.float16), "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32), "float64": np.dtype(np.float64),
}  # fmt: skip


def table(title):
    """The rows of the first table under a heading, its own head left out; backticks too."""
    section = TEXT.split(f"## {title}\n")[1].split("\n## ")[0]
    rows = [line.strip("| ").split(" | ") for line in section.splitlines() if line[:1] == "|"]
    return [[cell.strip(" `") for cell in row] for row in rows[2:]]


TYPES = {name: dict(zip("actpw", cells, strict=False)) for name, *cells in table("Types")}
EXPRESSIONS = {
    (tap, turn): expression
    for taps, expression, *_ in table("Operations")
    for names, _, turn in [taps.partition(", ")]
    for tap in names.split()
}


def test_the_table_of_types_is_that_of_the_profiles():
    assert list(TYPES) == list(PROFILES)
    for name, profile in PROFILES.items():
        types = {letter: DTYPES.get(kind) for letter, kind in TYPES[name].items()}
        short = DTYPES[profile.dtype].itemsize == 2
        assert types["a"] == DTYPES[profile.dtype] == kv_dtype(None, profile.dtype)
        assert types["c"] == (np.float32 if short else types["a"])
        assert types["w"] == (types["a"] if short else None)


# ---- evaluating the words of the table -----------------------------------------------------------


def letters(name):
    """The functions a, c, t and p of a profile, and the others, on arrays of its type c."""
    wide = DTYPES[TYPES[name]["c"]]

    def to(kind):
        if kind.itemsize == 2:
            return lambda x: rounding.nearest(x, kind).astype(wide)
        return lambda x: x.astype(kind).astype(wide)

    found = {letter: to(DTYPES[TYPES[name][letter]]) for letter in "actp"}
    over = {"axis": -1, "keepdims": True}
    return found | {
        "sqrt": np.sqrt,
        "exp": np.exp,
        "mean": lambda x: x.mean(**over),
        "sum": lambda x: x.sum(**over),
        "max": lambda x: x.max(**over),
    }


def evaluated(name, tap, turn="", **inputs):
    """What the table says of a tap, in type c; inputs are widened to it, which is exact."""
    wide = DTYPES[TYPES[name]["c"]]
    arrays = {
        key: value.astype(wide) if isinstance(value, np.ndarray) and key != "ids" else value
        for key, value in inputs.items()
    }
    with np.errstate(over="ignore"):
        return eval(EXPRESSIONS[tap, turn], {}, letters(name) | arrays)


def assert_bits(found, expected, what):
    """Equal numbers of equal type; the table's come in type c."""
    same = (found.astype(expected.dtype) == expected) | (np.isnan(found) & np.isnan(expected))
    where = np.argwhere(~same)
    assert len(where) == 0, (
        f"{what}{where[0].tolist()}: {found[tuple(where[0])]}, by the table "
        f"{expected[tuple(where[0])]}; {len(where)} of {same.size} differ"
    )


# ---- a whole forward pass, tap by tap ------------------------------------------------------------

# What goes into a tap: taps by name, weights by the names of params.named. "stream" is what the
# block was given, "embed" or the h of the block before.
ADDED = {"h_mid": ("stream", "attn_out"), "h": ("h_mid", "mlp_out")}
NORMS = {"attn_norm": ("stream", "attn_norm_D"), "mlp_norm": ("h_mid", "mlp_norm_D")}
PRODUCTS = {
    "q": ("attn_norm", "wq"), "k": ("attn_norm", "wk"), "v": ("attn_norm", "wv"),
    "attn_out": ("attn", "wo"), "gate": ("mlp_norm", "w_gate"), "up": ("mlp_norm", "w_up"),
    "mlp_out": ("act", "w_down"),
}  # fmt: skip


def traced(model, name, ids):
    """Every tap of the spec by a profile (engine numpy has the product of bf16-mm), B left out."""
    profile, taps = PROFILES[name], {}
    params = short_params(model.params, profile.dtype) if profile.short else model.params
    ops = profile.ops
    if profile.rounded:
        engine = make_engine("numpy", 1, stored(params), model.config, profile)
        ops = ops._replace(linear=engine.tapped.linear)
    cache = new_cache(model.config, 1, len(ids), profile.dtype)
    forward(
        params, model.config, [ids], cache, dtype=profile.dtype, ops=ops, last_only=False,
        tap=lambda tap, array: taps.update({tap: array[0].copy()}),
    )  # fmt: skip
    return params, taps


def assert_elementwise(name, config, layer, taps):
    """What has no sum but those that NumPy makes in the table's words too: to the last bit."""
    for tap, (x, w) in NORMS.items():
        w_D = getattr(layer, w)
        expected = evaluated(name, tap, x=taps[x], w=w_D, eps=config.norm_eps)
        assert_bits(taps[tap], expected, tap)
    for tap, (x, y) in ADDED.items():
        assert_bits(taps[tap], evaluated(name, tap, x=taps[x], y=taps[y]), tap)
    expected = evaluated(name, "act", gate=taps["gate"], up=taps["up"])
    assert_bits(taps["act"], expected, "act")
    expected = evaluated(name, "probs", scores=taps["scores"])
    assert_bits(taps["probs"], expected, "probs")
    T = len(taps["q"])
    cos_TP, sin_TP = (
        table[0] for table in rope_tables(config, np.arange(T)[None], TYPES[name]["c"])
    )
    tables = {"cos": cos_TP[:, None], "sin": sin_TP[:, None]}
    for x in ("q", "k"):
        tap, pair = x + "_rope", {"x0": taps[x][..., 0::2], "x1": taps[x][..., 1::2]}
        for i, turn in enumerate(("first of a pair", "second of a pair")):
            assert_bits(taps[tap][..., i::2], evaluated(name, tap, turn, **pair, **tables), tap)


@pytest.mark.parametrize("name", PROFILES)
@settings(max_examples=25)
@given(runs(min_tokens=2))
def test_elementwise_operations_are_those_of_the_table(name, run):
    """In a whole forward pass: each from the taps that went into it."""
    model, ids = run
    model = replace(model, stored="bfloat16") if PROFILES[name].rounded else model
    params, taps = traced(model, name, ids)
    assert {array.dtype for tap, array in taps.items() if tap != "logits"} == {
        DTYPES[TYPES[name]["a"]]
    }
    assert taps["logits"].dtype == DTYPES[TYPES[name]["c"]]
    assert_bits(taps["embed"], evaluated(name, "embed", w=params.embed_VD, ids=ids), "embed")
    stream = taps["embed"]
    for i, layer in enumerate(params.layers):
        prefix = f"layers.{i}."
        of_layer = {tap.removeprefix(prefix): array for tap, array in taps.items() if prefix in tap}
        assert_elementwise(name, model.config, layer, of_layer | {"stream": stream})
        stream = of_layer["h"]
    expected = evaluated(name, "norm", x=stream, w=params.norm_D, eps=model.config.norm_eps)
    assert_bits(taps["norm"], expected, "norm")


# ---- products, of numbers whose sums are exact in any order --------------------------------------


def whole(rng, shape, kind, most=8):
    """Small whole numbers over 8: no sum of some hundred products needs more than 24 bits."""
    return (rng.integers(-most, most + 1, shape) / 8).astype(kind)


@pytest.mark.parametrize("name", PROFILES)
def test_products_are_those_of_the_table(name):
    """Results need more than 16 bits, so each is rounded; x of bf16-mm does too, as it enters."""
    rng, profile = np.random.default_rng(0), PROFILES[name]
    kind = DTYPES[profile.dtype]
    x_BTD = whole(rng, (1, 40, 96), kind, 2047 if kind.itemsize > 2 else 255)
    w = whole(rng, (50, 96), ml_dtypes.bfloat16 if profile.rounded else kind)
    linear = profile.ops.linear
    if profile.rounded:
        config = Config(8, 1, 2, 1, 4, 8, 9)
        engine = Llama(config, random(config, rng, w.dtype), dtype=name, engine="numpy").engine
        linear = engine.tapped.linear
    found = linear(x_BTD, w)[0]
    assert found.dtype == kind
    assert_bits(found, evaluated(name, "q", x=x_BTD[0], w=w), "product")
    for tap in PRODUCTS:
        assert EXPRESSIONS[tap, ""] == EXPRESSIONS["q", ""]
    assert EXPRESSIONS["logits", ""] == f"c({EXPRESSIONS['q', '']})"


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("head_dim", [8, 64, 96, 128])
def test_attention_is_that_of_the_table(name, head_dim):
    """Scores from whole numbers; probs from the scores; attn where all that is summed is exact."""
    rng, profile = np.random.default_rng(1), PROFILES[name]
    kind, T = DTYPES[profile.dtype], 5
    q_TNH, k_TKH, v_TKH = (whole(rng, (T, n, head_dim), kind) for n in (4, 2, 2))
    seen, positions_BT = {}, np.arange(T)[None]
    k_BKSH, v_BKSH = (x.swapaxes(0, 1)[None] for x in (k_TKH, v_TKH))
    attn_BTNH = profile.ops.attention(
        q_TNH[None], k_BKSH, v_BKSH, positions_BT, lambda tap, array: seen.update({tap: array[0]})
    )
    visible_TS = np.tri(T, dtype=bool)
    for n in range(4):
        heads = {"q_rope": q_TNH[:, n], "k_rope": k_TKH[:, n // 2], "v": v_TKH[:, n // 2]}
        expected = evaluated(name, "scores", H=head_dim, **heads)
        assert_bits(seen["scores"][n], np.where(visible_TS, expected, -np.inf), "scores")
        assert_bits(seen["probs"][n], evaluated(name, "probs", scores=seen["scores"][n]), "probs")
        expected = evaluated(name, "attn", probs=seen["probs"][n], **heads)
        # Of five terms; NumPy's product may add them in another order than a lone head's.
        found = attn_BTNH[0, :, n].astype(expected.dtype)
        assert np.abs(found - expected).max() <= step(kind) * np.abs(expected).max()
        assert_bits(
            found[0], evaluated(name, "attn", probs=seen["probs"][n][:1], **heads)[0], "attn"
        )


def step(kind):
    return float(ml_dtypes.finfo(kind).eps)


def test_every_tap_has_its_row():
    taps = {tap for tap, _ in EXPRESSIONS}
    rows = {*NORMS, *ADDED, *PRODUCTS, "embed", "norm", "logits", "act", "probs", "scores", "attn"}
    assert taps == rows | {"q_rope", "k_rope"}
    assert not re.search(r"\b(bfloat16|float16)\b", "".join(EXPRESSIONS.values()))

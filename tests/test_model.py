"""The spec against the equations: the operations by their invariances, the forward pass whole.

The algebraic properties are stated in float64, where EXACT leaves room for a million roundings
and for no mistake. What float32 is allowed is not chosen but measured: see noise.py.
"""

import json
import math
import tracemalloc
from dataclasses import replace

import numpy as np
import oracle
import pytest
from checks import assert_close, assert_same
from devices import apply, on, to_host
from hypothesis import assume, given
from hypothesis import strategies as st
from noise import NOISE, ULP32, noise, oracle_taps
from paths import shared
from runs import extend, new_cache, run, trace
from strategies import (
    STORED,
    Model,
    arrays,
    configs,
    models,
    padded,
    pairings,
    ragged_runs,
    runs,
    scalings,
    seeds,
    splits,
    token_ids,
)

import llama3np.params
from llama3np.config import Config, RopeScaling
from llama3np.errors import InputError
from llama3np.model import (
    PLAIN,
    attention,
    forward,
    linear,
    rms_norm,
    rope,
    rope_tables,
    swiglu,
)

pytestmark = pytest.mark.filterwarnings("error")  # an overflow in a masked slot is a mistake too

EXACT = 1e-10  # 2^-53 times a million

LAYER_TAPS = [
    *("attn_norm", "q", "k", "v", "q_rope", "k_rope", "scores", "probs", "attn", "attn_out"),
    *("h_mid", "mlp_norm", "gate", "up", "act", "mlp_out", "h"),
]


def tap_names(n_layers):
    """The table of tap names, as the design has it."""
    layers = [f"layers.{i}.{name}" for i in range(n_layers) for name in LAYER_TAPS]
    return ["embed", *layers, "norm", "logits"]


def nothing(name, array):
    return array


def with_tensors(model, config, **changed):
    """The logits function of a model with other weights: tensors by name, float64."""
    host_params = llama3np.params.from_named(model.tensors | changed, config)
    llama3np.params.check(host_params, config)
    params, changed_model = on(model.xp, host_params), replace(model, config=config)

    def logits(ids):
        cache = new_cache(changed_model, 1, len(ids))
        return to_host(forward(params, config, [ids], cache, dtype="float64", last_only=False)[0])

    return logits


# ---- rms_norm -----------------------------------------------------------------------------------


@given(arrays(2, 3, 7), st.floats(1e-3, 1e3))
def test_rms_norm_without_eps_ignores_the_scale_of_its_input(xp, x_BTD, scale):
    w_D = np.arange(7) - 3.0
    assert_close(
        apply(xp, rms_norm, scale * x_BTD, w_D, 0.0),
        apply(xp, rms_norm, x_BTD, w_D, 0.0),
        EXACT,
        "y",
    )


@given(arrays(2, 3, 7))
def test_rms_norm_makes_the_mean_square_one(xp, x_BTD):
    y_BTD = apply(xp, rms_norm, x_BTD, np.ones(7), 0.0)
    assert_close((y_BTD**2).mean(axis=-1), np.ones((2, 3)), EXACT, "mean square")


@given(arrays(1, 4, 5), arrays(5), st.sampled_from([1e-6, 1e-2, 1.0]))
def test_rms_norm_is_its_equation(xp, x_BTD, w_D, eps):
    expected = [oracle.rms_norm(list(x), list(w_D), eps, float) for x in x_BTD[0]]
    assert_close(apply(xp, rms_norm, x_BTD, w_D, eps)[0], np.array(expected), EXACT, "y")


def test_rms_norm_of_zero_is_zero(xp):
    assert_same(
        apply(xp, rms_norm, np.zeros((1, 1, 3)), np.ones(3), 1e-5), np.zeros((1, 1, 3)), "y"
    )


# ---- linear -------------------------------------------------------------------------------------


@given(arrays(2, 3, 5), arrays(4, 5))
def test_linear_multiplies_every_vector_by_the_matrix(xp, x_BTD, w):
    expected = [[oracle.matvec(w, x) for x in row] for row in x_BTD]
    assert_close(apply(xp, linear, x_BTD, w), np.array(expected), EXACT, "y")


# ---- rope ---------------------------------------------------------------------------------------


def turned(xp, config, x_H, position):
    """One head at one position."""
    cos_BTP, sin_BTP = apply(xp, rope_tables, config, np.array([[position]]), "float64")
    x_BTNH = x_H[None, None, None]
    return apply(xp, rope, x_BTNH, cos_BTP, sin_BTP, config.rope_pairing)[0, 0, 0]


def heads_of(config, seed):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((2, config.head_dim))


def halves_of(head, pairing):
    """Both members of every pair, by the definition of the pairings."""
    if pairing == "interleaved":
        return head[0::2], head[1::2]
    return head[: len(head) // 2], head[len(head) // 2 :]


positions = st.integers(0, 5000)


@given(configs(), seeds, positions, positions, positions)
def test_rope_scores_depend_on_the_distance_only(xp, config, seed, query, key, shift):
    q_H, k_H = heads_of(config, seed)
    score = turned(xp, config, q_H, query) @ turned(xp, config, k_H, key)
    moved = turned(xp, config, q_H, query + shift) @ turned(xp, config, k_H, key + shift)
    scale = np.linalg.norm(q_H) * np.linalg.norm(k_H)
    assert abs(score - moved) <= EXACT * scale, f"{score} and {moved}"


@given(configs(), seeds, positions)
def test_rope_keeps_the_norm_of_every_pair(xp, config, seed, position):
    x_H, _ = heads_of(config, seed)
    before, after = (
        np.hypot(*halves_of(head, config.rope_pairing))
        for head in (x_H, turned(xp, config, x_H, position))
    )
    assert_close(after, before, EXACT, "norms")


@given(configs(), seeds)
def test_rope_leaves_position_0_alone(xp, config, seed):
    x_H, _ = heads_of(config, seed)
    assert_same(turned(xp, config, x_H, 0), x_H, "head")


@given(configs(), seeds, positions)
def test_rope_is_a_product_of_complex_numbers(xp, config, seed, position):
    x_H, _ = heads_of(config, seed)
    freqs = oracle.inverse_frequencies(
        config.head_dim, config.rope_theta, Model(config, 0).sizes.scaling
    )
    a, b = halves_of(x_H, config.rope_pairing)
    expected = (a + 1j * b) * np.exp(1j * position * np.array(freqs))
    a, b = halves_of(turned(xp, config, x_H, position), config.rope_pairing)
    assert_close([a, b], [expected.real, expected.imag], EXACT, "pairs")


@given(configs(rope_pairing="interleaved"), seeds, positions)
def test_rope_pairings_agree_under_the_permutation(xp, config, seed, position):
    x_H, _ = heads_of(config, seed)
    order = half_order(config.head_dim)
    half = turned(xp, replace(config, rope_pairing="half"), x_H[order], position)
    assert_same(half, turned(xp, config, x_H, position)[order], "head")


def half_order(head_dim):
    """Where each element of a half-split head stands in the interleaved one: evens, then odds."""
    return [*range(0, head_dim, 2), *range(1, head_dim, 2)]


def frequencies(xp, config, dtype):
    """Radians per position of every pair, read off the tables: all public ones are at most 1."""
    cos_BTP, sin_BTP = apply(xp, rope_tables, config, np.array([[1]]), dtype)
    return np.arctan2(sin_BTP[0, 0], cos_BTP[0, 0])


@given(configs(), scalings())
def test_rope_scaling_leaves_short_wavelengths_alone(xp, config, scaling):
    plain, scaled = (
        frequencies(xp, replace(config, rope_scaling=each), "float64") for each in (None, scaling)
    )
    short = 2 * math.pi / plain < scaling.old_context / scaling.high_freq_factor
    assert_same(scaled[short], plain[short], "frequencies")


@given(configs(), scalings())
def test_rope_scaling_stretches_long_wavelengths_by_the_factor(xp, config, scaling):
    plain, scaled = (
        frequencies(xp, replace(config, rope_scaling=each), "float64") for each in (None, scaling)
    )
    long = 2 * math.pi / plain > scaling.old_context / scaling.low_freq_factor
    assert_close(scaled[long], plain[long] / scaling.factor, EXACT, "frequencies")


@given(configs(), scalings(), positions)
def test_rope_scaling_by_factor_1_changes_nothing(xp, config, scaling, position):
    at_BT = np.array([[position]])
    plain, scaled = (
        np.array(apply(xp, rope_tables, replace(config, rope_scaling=each), at_BT, "float64"))
        for each in (None, replace(scaling, factor=1.0))
    )
    assert_close(scaled, plain, EXACT, "tables")


LLAMA3_8B = Config(
    dim=4096, n_layers=32, n_heads=32, n_kv_heads=8, head_dim=128, ffn_dim=14336,
    vocab_size=128256, norm_eps=1e-5, rope_theta=500000.0, context_length=8192,
)  # fmt: skip
LLAMA31 = oracle.Scaling(8.0, 1.0, 4.0, 8192)
LLAMA32 = oracle.Scaling(32.0, 1.0, 4.0, 8192)


def public_config(head_dim, scaling):
    if scaling is not None:
        scaling = RopeScaling(scaling.factor, scaling.low, scaling.high, scaling.old_context)
    return replace(LLAMA3_8B, head_dim=head_dim, rope_scaling=scaling)


def test_rope_frequencies_of_llama3_8b_are_the_printed_ones(xp):
    tensors = json.loads(shared("reference/llama3_8b_public_values.json").read_text())["tensors"]
    (printed,) = (t["printed_strings"] for t in tensors if t["op"] == "rope.inv_freq")
    for i, (found, text) in enumerate(
        zip(frequencies(xp, LLAMA3_8B, "float32"), printed, strict=True)
    ):
        last_digit = 10.0 ** (int(text.split("e")[1]) - 4)  # the text is like 8.1462e-01
        assert abs(found - float(text)) <= 0.5 * last_digit + 4 * ULP32 * found, f"pair {i}"


@pytest.mark.parametrize(
    ("head_dim", "scaling"), [(128, None), (128, LLAMA31), (64, LLAMA32), (128, LLAMA32)]
)
def test_rope_frequencies_of_the_public_models_are_those_of_the_branch_form(xp, head_dim, scaling):
    config = public_config(head_dim, scaling)
    expected = np.array(oracle.inverse_frequencies(head_dim, 500000.0, scaling))
    for dtype, ulps in (("float64", 16 * 2.0**-52), ("float32", 16 * ULP32)):
        relative = frequencies(xp, config, dtype) / expected - 1
        assert np.abs(relative).max() <= ulps, f"{dtype}: {relative}"


@pytest.mark.parametrize("position", [1, 17, 4095, 8191, 131071])
def test_rope_angles_are_float32_products_as_in_training(xp, position):
    """The position times the rounded frequency, rounded: at 131071 another model if in float64.

    Cosines differ by an ulp between vectorised and scalar float32, hence the 2.
    """
    cos_BTP, sin_BTP = apply(xp, rope_tables, LLAMA3_8B, np.array([[position]]), "float32")
    for i in range(64):
        freq = np.float32(1) / np.float32(500000.0 ** (i / 64))
        angle = np.float32(position) * freq
        for table_BTP, function in ((cos_BTP, np.cos), (sin_BTP, np.sin)):
            found, expected = table_BTP[0, 0, i], function(angle)
            assert abs(found - expected) <= 2 * ULP32, f"pair {i}: {found}, expected {expected}"


@given(configs(), st.sampled_from(["float32", "float64"]))
def test_rope_tables_have_the_dtype_of_the_profile(xp, config, dtype):
    for table_BTP in apply(xp, rope_tables, config, np.array([[0, 7]]), dtype):
        assert table_BTP.dtype == dtype
        assert table_BTP.shape == (1, 2, config.head_dim // 2)


# ---- attention ----------------------------------------------------------------------------------


@st.composite
def attention_inputs(draw):
    """q_BTNH, k_BKSH, v_BKSH, positions_BT: each query sees from one key to all of them."""
    B, T, K, G, H = (draw(st.integers(1, 3)) for _ in range(5))
    S = draw(st.integers(1, 6))
    rng = np.random.default_rng(draw(seeds))
    q_BTNH, k_BKSH, v_BKSH = (
        rng.standard_normal(shape) for shape in ((B, T, K * G, H), (B, K, S, H), (B, K, S, H))
    )
    return q_BTNH, k_BKSH, v_BKSH, rng.integers(0, S, (B, T))


@given(attention_inputs(), st.floats(-30, 30))
def test_attention_ignores_a_vector_added_to_all_keys(xp, inputs, shift):
    """It adds one number, q c, to all scores of a query, and a softmax ignores that."""
    q_BTNH, k_BKSH, v_BKSH, positions_BT = inputs
    c_H = shift * np.cos(np.arange(k_BKSH.shape[-1]))
    moved = apply(xp, attention, q_BTNH, k_BKSH + c_H, v_BKSH, positions_BT, nothing)
    assert_close(moved, apply(xp, attention, *inputs, nothing), EXACT, "attn")


@given(attention_inputs())
def test_attention_to_equal_values_gives_that_value(xp, inputs):
    """The weights of every query sum to 1."""
    q_BTNH, k_BKSH, v_BKSH, positions_BT = inputs
    same_BKSH = np.broadcast_to(v_BKSH[:, :, :1], v_BKSH.shape)
    G = q_BTNH.shape[2] // k_BKSH.shape[1]
    expected = np.repeat(v_BKSH[:, None, :, 0], G, axis=2) + np.zeros_like(q_BTNH)
    found = apply(xp, attention, q_BTNH, k_BKSH, same_BKSH, positions_BT, nothing)
    assert_close(found, expected, EXACT, "attn")


@given(attention_inputs(), seeds)
def test_attention_permutes_its_heads_as_its_inputs(xp, inputs, seed):
    """Key/value heads are permuted with their groups, and the heads of a group alike."""
    q_BTNH, k_BKSH, v_BKSH, positions_BT = inputs
    K, G = k_BKSH.shape[1], q_BTNH.shape[2] // k_BKSH.shape[1]
    rng = np.random.default_rng(seed)
    groups, members = rng.permutation(K), rng.permutation(G)
    order = [group * G + member for group in groups for member in members]
    permuted = apply(
        xp,
        attention,
        q_BTNH[:, :, order],
        k_BKSH[:, groups],
        v_BKSH[:, groups],
        positions_BT,
        nothing,
    )
    assert_close(permuted, apply(xp, attention, *inputs, nothing)[:, :, order], EXACT, "attn")


@given(attention_inputs(), st.sampled_from([1e30, -1e30]))
def test_attention_does_not_see_beyond_a_position(xp, inputs, garbage):
    q_BTNH, k_BKSH, v_BKSH, _ = inputs
    B, T, S = *q_BTNH.shape[:2], k_BKSH.shape[2]
    positions_BT = np.full((B, T), S // 2)
    expected = apply(xp, attention, q_BTNH, k_BKSH, v_BKSH, positions_BT, nothing)
    k_BKSH[:, :, S // 2 + 1 :] = v_BKSH[:, :, S // 2 + 1 :] = garbage
    found = apply(xp, attention, q_BTNH, k_BKSH, v_BKSH, positions_BT, nothing)
    assert_same(found, expected, "attn")


@given(attention_inputs())
def test_attention_survives_scores_that_overflow_an_exponential(xp, inputs):
    q_BTNH, k_BKSH, v_BKSH, positions_BT = (
        array.astype("float32") if array.dtype == "float64" else array for array in inputs
    )
    attn_BTNH = apply(
        xp, attention, q_BTNH * np.float32(1e4), k_BKSH, v_BKSH, positions_BT, nothing
    )
    assert np.abs(attn_BTNH).max() <= np.abs(v_BKSH).max() * (1 + 8 * ULP32)


@pytest.mark.parametrize("T", [1, 3])
def test_attention_never_repeats_keys_or_values_in_memory(T):
    """Peak memory stays below half a copy of the keys of the cache, whose repetition takes G."""
    K, G, S, H = 2, 8, 2000, 256
    rng = np.random.default_rng(0)
    q_BTNH = rng.standard_normal((1, T, K * G, H), dtype="float32")
    whole_BKSH = rng.standard_normal((1, K, S + 50, H), dtype="float32")
    k_BKSH = v_BKSH = whole_BKSH[:, :, :S]  # the cache gives a view as well
    tracemalloc.start()
    attention(q_BTNH, k_BKSH, v_BKSH, np.full((1, T), S - 1), nothing)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    scores = T * K * G * S * q_BTNH.itemsize
    assert peak <= 5 * scores + q_BTNH.nbytes * 4 < k_BKSH.nbytes, f"{peak} bytes"


# ---- swiglu -------------------------------------------------------------------------------------


@given(arrays(1, 2, 5), arrays(1, 2, 5), st.sampled_from([1.0, 10.0]))
def test_swiglu_is_its_equation(xp, gate_BTF, up_BTF, scale):
    expected = np.vectorize(lambda g, u: oracle.silu(g, float) * u)(scale * gate_BTF, up_BTF)
    assert_close(apply(xp, swiglu, scale * gate_BTF, up_BTF), expected, EXACT, "act")


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_swiglu_of_a_huge_gate_is_the_gate_or_nothing(xp, dtype):
    gate_BTF = np.array([[[1e4, 200.0, -200.0, -1e4]]], dtype)
    found = apply(xp, swiglu, gate_BTF, np.ones_like(gate_BTF))
    assert_close(found, [[[1e4, 200, 0, 0]]], 1e-30, "act")


# ---- forward against the oracle -----------------------------------------------------------------


@given(runs())
def test_forward_in_float64_equals_the_oracle_at_every_tap(xp, run_of):
    model, ids = run_of
    model = model.on(xp)
    truth, found = oracle_taps(model, ids), trace(model, [ids])
    for name, expected in truth.items():
        assert_close(found[name][0], expected, EXACT, name)


@given(runs())
def test_forward_in_float32_equals_the_oracle_within_measured_noise(xp, run_of):
    model, ids = run_of
    model = model.on(xp)
    truth, found = oracle_taps(model, ids), trace(model, [ids], "float32")
    for name, floor in noise(model, ids, truth).items():
        assert_close(found[name][0], truth[name], NOISE * (floor + ULP32), name)


@given(runs())
def test_taps_are_those_of_the_table_in_its_order(xp, run_of):
    model, ids = run_of
    model = model.on(xp)
    names = tap_names(model.config.n_layers)
    assert list(trace(model, [ids])) == names
    assert list(oracle_taps(model, ids)) == names


@given(runs())
def test_a_tap_changes_nothing(xp, run_of):
    model, ids = run_of
    model = model.on(xp)
    assert_same(trace(model, [ids])["logits"], run(model, [ids]), "logits")


@given(runs(), st.sampled_from(["float32", "float64"]))
def test_every_tap_and_the_cache_have_the_dtype_of_the_profile(xp, run_of, dtype):
    model, ids = run_of
    model = model.on(xp)
    cache = new_cache(model, 1, len(ids), dtype)
    found = {}
    logits_BTV = extend(
        model, [ids], cache, dtype, tap=lambda name, array: found.update({name: array.dtype})
    )
    found |= {"cache.k": cache.k[0].dtype, "cache.v": cache.v[0].dtype, "out": logits_BTV.dtype}
    assert {name: d for name, d in found.items() if d != dtype} == {}


@pytest.mark.parametrize("stored", STORED)
def test_weights_are_exact_whatever_their_storage(xp, stored):
    """16-bit weights give the very logits of the same numbers stored as float32."""
    config = Config(7, 2, 6, 2, 4, 9, 11)
    model = Model(config, 5, stored, xp)
    widened = llama3np.params.from_named(
        {name: tensor.astype("float32") for name, tensor in model.tensors.items()}, config
    )
    cache = new_cache(model, 1, 3, "float32")
    expected, _ = forward(on(xp, widened), config, [[1, 2, 3]], cache, last_only=False)
    assert_same(run(model, [[1, 2, 3]], "float32"), to_host(expected), "logits")


# ---- forward against itself ---------------------------------------------------------------------


@given(runs(min_tokens=2))
def test_decode_equals_prefill_for_every_split(xp, run_of):
    model, ids = run_of
    model = model.on(xp)
    whole = run(model, [ids])
    for prompt in range(1, len(ids)):
        cache = new_cache(model, 1, len(ids))
        pieces = [extend(model, [ids[:prompt]], cache)]
        pieces += [extend(model, [[token]], cache) for token in ids[prompt:]]
        assert_close(np.concatenate(pieces, axis=1), whole, EXACT, f"prompt of {prompt}: logits")


@given(runs(min_tokens=2), st.data())
def test_chunked_prefill_equals_whole(xp, run_of, data):
    model, ids = run_of
    model = model.on(xp)
    sizes = data.draw(splits(len(ids)), label="chunks")
    cache = new_cache(model, 1, len(ids))
    ends = np.cumsum(sizes)
    pieces = [
        extend(model, [ids[end - size : end]], cache) for size, end in zip(sizes, ends, strict=True)
    ]
    assert_close(np.concatenate(pieces, axis=1), run(model, [ids]), EXACT, "logits")


@given(runs(min_tokens=2))
def test_decode_in_float32_is_as_near_the_oracle_as_prefill(xp, run_of):
    model, ids = run_of
    model = model.on(xp)
    truth = oracle_taps(model, ids)
    floor = noise(model, ids, truth)["logits"]
    cache = new_cache(model, 1, len(ids), "float32")
    pieces = [extend(model, [[token]], cache, "float32") for token in ids]
    found = np.concatenate(pieces, axis=1)[0]
    assert_close(found, truth["logits"], NOISE * (floor + ULP32), "logits")


@given(ragged_runs(), st.data())
def test_rows_of_a_ragged_batch_equal_each_row_alone(xp, run_of, data):
    """Whatever the order, the company, the padding and the calls in which the tokens come."""
    model, rows, pad = run_of
    model = model.on(xp)
    calls = data.draw(st.integers(1, 3), label="calls")
    parts = [data.draw(splits(len(row), calls), label="parts") for row in rows]
    cache = new_cache(model, len(rows), max(map(len, rows)))
    found = [[] for _ in rows]
    done = [0] * len(rows)
    for call in range(calls):
        new = [
            row[start : start + sizes[call]]
            for row, start, sizes in zip(rows, done, parts, strict=True)
        ]
        if not any(new):
            continue
        ids_BT, new_B = padded(new, pad)
        logits_BTV = extend(model, ids_BT, cache, new_B=new_B)
        for b, count in enumerate(new_B):
            found[b].append(logits_BTV[b, :count])
            done[b] += count
    assert cache.lengths_B.tolist() == [len(row) for row in rows]
    for b, row in enumerate(rows):
        assert_close(np.concatenate(found[b]), run(model, [row])[0], EXACT, f"row {b}: logits")


@given(ragged_runs())
def test_last_only_gives_the_logits_of_every_rows_last_token(xp, run_of):
    model, rows, pad = run_of
    model = model.on(xp)
    ids_BT, new_B = padded(rows, pad)
    whole = run(model, ids_BT, new_B=new_B)
    last = run(model, ids_BT, new_B=new_B, last_only=True)
    expected = np.stack([whole[b, [count - 1]] for b, count in enumerate(new_B)])
    assert_close(last, expected, EXACT, "logits")


def test_last_only_is_the_default(xp):
    model = Model(Config(4, 1, 2, 1, 2, 5, 9), 1, xp=xp)
    cache = new_cache(model, 2, 3, "float32")
    logits_BTV, _ = forward(model.params, model.config, [[1, 2, 3], [4, 5, 6]], cache)
    assert logits_BTV.shape == (2, 1, 9)
    assert logits_BTV.dtype == "float32"


@given(models(), st.integers(2, 4), st.data())
def test_equal_rows_of_a_batch_get_equal_logits(xp, model, rows, data):
    ids = data.draw(token_ids(model.config.vocab_size), label="ids")
    logits_BTV = run(model.on(xp), [ids] * rows)
    assert_close(logits_BTV, np.broadcast_to(logits_BTV[:1], logits_BTV.shape), EXACT, "logits")


@given(runs(min_tokens=2), st.data())
def test_a_token_never_changes_what_came_before_it(xp, run_of, data):
    """Bit for bit: a masked score has weight 0, not nearly 0."""
    model, ids = run_of
    model = model.on(xp)
    j = data.draw(st.integers(1, len(ids) - 1), label="j")
    other = data.draw(st.integers(0, model.config.vocab_size - 1), label="other token")
    assume(other != ids[j])
    changed = [*ids[:j], other, *ids[j + 1 :]]
    before, after = run(model, [ids], "float32"), run(model, [changed], "float32")
    assert_same(after[:, :j], before[:, :j], "logits")
    assert not np.array_equal(after[:, j:], before[:, j:]) or is_blind(model, ids[j], other)


def is_blind(model, token, other):
    """Whether two tokens have one direction: the norm with eps 0 of a narrow model may."""
    a_D, b_D = model.tensors["embed_VD"][[token, other]]
    return abs(abs(a_D @ b_D) - np.linalg.norm(a_D) * np.linalg.norm(b_D)) < 1e-6


@given(runs(rope_pairing="interleaved"))
def test_pairings_agree_under_the_permutation_of_wq_and_wk(xp, run_of):
    model, ids = run_of
    model = model.on(xp)
    H = model.config.head_dim
    order = half_order(H)

    def half(w):
        return np.concatenate([w[start : start + H][order] for start in range(0, len(w), H)])

    changed = {name: half(w) for name, w in model.tensors.items() if name.endswith((".wq", ".wk"))}
    logits = with_tensors(model, replace(model.config, rope_pairing="half"), **changed)
    assert_close(logits(ids), run(model, [ids]), EXACT, "logits")


@given(runs())
def test_grouped_heads_equal_repeated_heads(xp, run_of):
    model, ids = run_of
    model = model.on(xp)
    config, H = model.config, model.config.head_dim

    def repeated(w):
        heads = [w[start : start + H] for start in range(0, len(w), H)]
        return np.concatenate([head for head in heads for _ in range(config.group)])

    changed = {
        name: repeated(w) for name, w in model.tensors.items() if name.endswith((".wk", ".wv"))
    }
    logits = with_tensors(model, replace(config, n_kv_heads=config.n_heads), **changed)
    assert_close(logits(ids), run(model, [ids]), EXACT, "logits")


@given(runs(), seeds)
def test_the_order_of_the_heads_is_of_no_account(xp, run_of, seed):
    model, ids = run_of
    model = model.on(xp)
    config, H, rng = model.config, model.config.head_dim, np.random.default_rng(seed)
    groups = rng.permutation(config.n_kv_heads)
    members = rng.permutation(config.group)
    heads = [group * config.group + member for group in groups for member in members]
    changed = {}
    for i in range(config.n_layers):
        w = {name: model.tensors[f"layers.{i}.{name}"] for name in ("wq", "wk", "wv", "wo")}
        rows_of = {"wq": heads, "wk": groups, "wv": groups}
        for name, chosen in rows_of.items():
            changed[f"layers.{i}.{name}"] = w[name][elements(chosen, H)]
        changed[f"layers.{i}.wo"] = w["wo"][:, elements(heads, H)]
    assert_close(with_tensors(model, config, **changed)(ids), run(model, [ids]), EXACT, "logits")


def elements(heads, head_dim):
    return [head * head_dim + i for head in heads for i in range(head_dim)]


@given(runs(tied=True))
def test_tied_equals_untied_with_a_copied_head(xp, run_of):
    model, ids = run_of
    model = model.on(xp)
    untied = replace(model.config, tied=False)
    logits = with_tensors(model, untied, head_VD=model.tensors["embed_VD"].copy())
    assert_close(logits(ids), run(model, [ids]), EXACT, "logits")


@given(runs(rope_scaling=None), scalings())
def test_scaling_of_factor_1_changes_no_logit(xp, run_of, scaling):
    model, ids = run_of
    model = model.on(xp)
    stretched = replace(model.config, rope_scaling=replace(scaling, factor=1.0))
    assert_close(with_tensors(model, stretched)(ids), run(model, [ids]), EXACT, "logits")


@given(pairings, runs())
def test_positions_before_the_first_token_are_of_no_account(xp, pairing, run_of):
    """RoPE makes scores relative, so a sequence may start anywhere: here at 100, seen by a tap."""
    model, ids = run_of
    model = model.on(xp)
    far = new_cache(model, 1, 100 + len(ids))
    far.lengths_B = np.array([100])
    near, scores = trace(model, [ids]), {}
    extend(model, [ids], far, tap=lambda name, array: scores.update({name: to_host(array)}))
    expected = near["layers.0.scores"]
    assert_close(scores["layers.0.scores"][..., 100:], expected, EXACT, "scores")


# ---- forward and its ops ------------------------------------------------------------------------


@given(runs())
def test_every_operation_goes_through_ops(xp, run_of):
    model, ids = run_of
    model = model.on(xp)
    counts = dict.fromkeys(PLAIN._fields, 0)

    def counted(name):
        def op(*args, **kwargs):
            counts[name] += 1
            return getattr(PLAIN, name)(*args, **kwargs)

        return op

    logits = run(model, [ids], ops=type(PLAIN)(*map(counted, PLAIN._fields)))
    L = model.config.n_layers
    expected = {"rms_norm": 2 * L + 1, "linear": 7 * L + 1, "rope": 2 * L, "attention": L}
    assert counts == expected | {"swiglu": L}
    assert_same(logits, run(model, [ids]), "logits")


# ---- what is refused ----------------------------------------------------------------------------


@given(models(), st.data())
def test_a_token_id_out_of_range_is_refused_before_any_work(xp, model, data):
    model, V = model.on(xp), model.config.vocab_size
    ids = data.draw(token_ids(V), label="ids")
    wrong = data.draw(st.sampled_from([-1, -V, V, V + 1, 2**31, -(2**31)]), label="wrong id")
    ids.insert(data.draw(st.integers(0, len(ids)), label="at"), wrong)
    cache = new_cache(model, 1, len(ids), "float32")
    with pytest.raises(InputError, match=f"{V}.*{wrong}"):
        forward(model.params, model.config, [ids], cache)
    assert cache.lengths_B.tolist() == [0]
    assert not cache.k[0].any()


@pytest.mark.parametrize("ids", [[[]], [], [1, 2], [[[1]]], [[0.5]], [["a"]], [[1], [1, 2]]])
def test_ids_that_are_not_rows_of_integers_are_refused(xp, ids):
    model = Model(Config(4, 1, 2, 1, 2, 5, 9), 1, xp=xp)
    with pytest.raises(InputError, match="token ids"):
        forward(model.params, model.config, ids, new_cache(model, 1, 4, "float32"))

"""Gradients against central differences, op by op and whole, and the laws they obey."""

import json
from functools import partial

import numpy as np
import pytest
from devices import on, to_host
from differences import assert_derivative, central
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import GOLDENS
from strategies import Model, models, pairings, seeds

from llama3np import model
from llama3np.config import Config, RopeScaling
from llama3np.errors import InputError
from llama3np.params import named, named_shapes
from llama3np.train import backward, tiles
from llama3np.train.backward import cross_entropy, loss_and_gradients
from llama3np.train.flat import Flat
from llama3np.train.gradients import Sums
from llama3np.train.parts import BACK, OPS, Batch, BatchGradient

pytestmark = pytest.mark.filterwarnings("error")

PLAIN = model.PLAIN, backward.PLAIN
TILED = OPS, BACK
sizes = st.integers(1, 6)


def normal(seed, *shapes):
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape) for shape in shapes]


def assert_gradients(forward, backward, *inputs, seed=0, xp=np):
    """d of each input, against differences of sum(forward(*inputs) * d_y) for some d_y."""
    (d_y,) = normal(seed, forward(*inputs).shape)
    found = to_host(backward(xp.asarray(d_y), *on(xp, inputs)))
    for i, (x, d_x) in enumerate(zip(inputs, found, strict=True)):
        expected = central(lambda: (forward(*inputs) * d_y).sum(), x)
        assert_derivative(d_x, expected, f"input {i}")


# ---- the operations ------------------------------------------------------------------------------


@given(seeds, sizes, sizes, st.sampled_from([1e-5, 1e-2, 1.0]))
def test_rms_norm(xp, seed, T, D, eps):
    x_BTD, w_D = normal(seed, (2, T, D), (D,))
    x_BTD += np.sign(x_BTD) * 0.1  # at 0 the fifth derivative is that of 1 / sqrt(eps)
    assert_gradients(
        partial(model.rms_norm, eps=eps), partial(backward.rms_norm, eps=eps), x_BTD, w_D, xp=xp
    )


@given(seeds, sizes, sizes, sizes)
def test_linear(xp, seed, T, n_in, n_out):
    x_BTI, w = normal(seed, (2, T, n_in), (n_out, n_in))

    def both(d_y_BTO, x_BTI, w):
        grad = Flat.zeros({"w": w.shape}, np.float64, xp)
        Sums(grad).product("w", d_y_BTO.reshape(-1, n_out), x_BTI.reshape(-1, n_in))
        return backward.linear(d_y_BTO, w), grad.tensors["w"]

    assert_gradients(model.linear, both, x_BTI, w, xp=xp)


@given(seeds, sizes, sizes, sizes, pairings)
def test_rope(xp, seed, T, N, P, pairing):
    x_BTNH, angles_BTP = normal(seed, (2, T, N, 2 * P), (2, T, P))
    tables = np.cos(angles_BTP), np.sin(angles_BTP)

    def turn(x_BTNH):
        return model.rope(x_BTNH, *tables, pairing)

    def back(d_y_BTNH, x_BTNH):
        return (backward.rope(d_y_BTNH, *on(xp, tables), pairing),)

    assert_gradients(turn, back, x_BTNH, xp=xp)


@pytest.mark.parametrize("ops", [PLAIN, TILED], ids=["plain", "tiles"])
@given(seeds, st.integers(1, 2), st.integers(1, 3), st.integers(1, 3), st.integers(1, 7), sizes)
def test_attention(xp, ops, seed, B, K, G, T, H):
    forward_ops, backward_ops = ops
    q_BTNH, k_BKSH, v_BKSH = normal(seed, (B, T, K * G, H), (B, K, T, H), (B, K, T, H))
    positions_BT = np.broadcast_to(np.arange(T), (B, T))

    def attend(q_BTNH, k_BKSH, v_BKSH):
        return model.attention(q_BTNH, k_BKSH, v_BKSH, positions_BT, lambda name, array: array)

    def back(d_attn_BTNH, *qkv):
        seen = {}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiles, "TILE", 3)
            seen["attn"] = forward_ops.attention(*qkv, xp.asarray(positions_BT), seen.__setitem__)
            np.testing.assert_allclose(to_host(seen["attn"]), attend(*to_host(qkv)), atol=1e-12)
            return backward_ops.attention(d_attn_BTNH, *qkv, seen)

    assert_gradients(attend, back, q_BTNH, k_BKSH, v_BKSH, xp=xp)


@given(seeds, sizes, sizes, st.sampled_from([1.0, 30.0]))
def test_swiglu(xp, seed, T, F, scale):
    gate_BTF, up_BTF = normal(seed, (2, T, F), (2, T, F))
    assert_gradients(model.swiglu, backward.swiglu, gate_BTF * scale, up_BTF, xp=xp)


def test_swiglu_of_a_gate_that_overflows_is_quiet(xp):
    gate_BTF = xp.asarray(np.array([[[-1e30, -100.0, 100.0, 1e30]]], np.float32))
    d_gate_BTF, _ = to_host(backward.swiglu(xp.ones_like(gate_BTF), gate_BTF, gate_BTF * 0 + 1))
    # model.swiglu itself, bounded at -88, makes -6e-9 of -1e30
    np.testing.assert_allclose(d_gate_BTF[0, 0], [0, 0, 1, 1], atol=1e-8)


@given(seeds, sizes, st.integers(1, 9))
def test_cross_entropy(xp, seed, T, V):
    logits_BTV, weights_BT = normal(seed, (2, T, V), (2, T))
    targets_BT = np.random.default_rng(seed).integers(0, V, (2, T))
    weights_BT[:, T // 2 :] = 0
    loss, d_logits_BTV = cross_entropy(*on(xp, (logits_BTV, targets_BT, weights_BT)))
    expected = central(lambda: cross_entropy(logits_BTV, targets_BT, weights_BT)[0], logits_BTV)
    assert_derivative(to_host(d_logits_BTV), expected, "logits")
    powers_BTV = np.exp(logits_BTV)
    p_BT = np.take_along_axis(powers_BTV, targets_BT[..., None], -1)[..., 0] / powers_BTV.sum(-1)
    assert loss == pytest.approx(-(weights_BT * np.log(p_BT)).sum(), rel=1e-10, abs=1e-12)


def test_cross_entropy_of_huge_logits_is_finite():
    logits_BTV = np.array([[[1e30, 0, -1e30]]], np.float32)
    loss, d_logits_BTV = cross_entropy(logits_BTV, np.array([[0]]), np.ones((1, 1), np.float32))
    assert loss == 0
    assert not d_logits_BTV.any()


# ---- the model -----------------------------------------------------------------------------------


def float64(drawn):
    return Flat.of(drawn.tensors, np.float64)


def batch_of(seed, V, B, T):
    """Rows of different lengths: beyond a row's end there is anything, of weight 0."""
    rng = np.random.default_rng(seed)
    ids_BT, targets_BT = rng.integers(0, V, (2, B, T))
    lengths_B = rng.integers(0, T + 1, B)
    weights_BT = rng.random((B, T)) * (np.arange(T) < lengths_B[:, None])
    return Batch(ids_BT, targets_BT, weights_BT)


def gradient(flat, config, batch, ops=PLAIN, recompute=False, xp=np):
    grad = Flat.zeros(flat.shapes, flat.vector.dtype, xp)
    params = Flat(xp.asarray(flat.vector), flat.shapes).params(config)
    host_ids, *rest = batch
    loss = loss_and_gradients(
        params, config, host_ids, *on(xp, tuple(rest)), Sums(grad), *ops, recompute
    )
    return loss, to_host(grad.vector)


drawn_models = models(stored="float32", norm_eps=1e-2)


@pytest.mark.parametrize("ops", [PLAIN, TILED], ids=["plain", "tiles"])
@settings(max_examples=25)
@given(drawn_models, seeds, st.integers(1, 3), st.integers(1, 6), st.booleans())
def test_the_whole_model(ops, drawn, seed, B, T, recompute):
    """Some entries of every tensor, and all of them together along one direction."""
    config, flat = drawn.config, float64(drawn)
    batch = batch_of(seed, config.vocab_size, B, T)
    _, grad_P = gradient(flat, config, batch, ops, recompute)
    grads = Flat(grad_P, flat.shapes).tensors
    rng = np.random.default_rng(seed)

    def loss():
        return gradient(flat, config, batch)[0]

    for name, w in flat.tensors.items():
        at = rng.choice(w.size, min(w.size, 3), replace=False)
        expected = central(loss, w, at)
        assert_derivative(grads[name].reshape(-1)[at], expected, name, scale=grads[name])
    start_P, along_P, step = flat.vector.copy(), rng.standard_normal(grad_P.size), np.zeros(1)

    def loss_along():
        flat.vector[:] = start_P + step[0] * along_P
        return loss()

    (expected,) = central(loss_along, step)
    assert grad_P @ along_P == pytest.approx(expected, rel=1e-6, abs=1e-8)


@settings(max_examples=15)
@given(drawn_models, seeds, st.booleans())
@pytest.mark.cuda
def test_cupy_gives_the_gradients_of_numpy(drawn, seed, recompute):
    cupy = pytest.importorskip("cupy")
    batch, flat = batch_of(seed, drawn.config.vocab_size, 2, 5), float64(drawn)
    for ops in (PLAIN, TILED):
        loss, grad_P = gradient(flat, drawn.config, batch, ops, recompute)
        there, there_P = gradient(flat, drawn.config, batch, ops, recompute, cupy)
        assert there == pytest.approx(loss, rel=1e-12, abs=1e-12)
        np.testing.assert_allclose(
            there_P, grad_P, rtol=1e-9, atol=1e-12 * max(1, abs(grad_P).max())
        )


@given(drawn_models, seeds, st.integers(1, 6), st.sampled_from([PLAIN, TILED]))
def test_what_stands_after_the_last_target_has_no_influence(drawn, seed, T, ops):
    """Not on the loss, and not, to the bit, on any gradient but that of its own embedding."""
    V, flat = drawn.config.vocab_size, float64(drawn)
    batch = batch_of(seed, V, 2, T)
    padding_BT = np.cumsum(batch.weights_BT[:, ::-1], axis=1)[:, ::-1] == 0
    others_BT = np.random.default_rng(seed + 1).integers(0, V, (2, T))
    changed = batch._replace(
        ids_BT=np.where(padding_BT, others_BT, batch.ids_BT),
        targets_BT=np.where(padding_BT, others_BT, batch.targets_BT),
    )
    loss, grad_P = gradient(flat, drawn.config, batch, ops)
    other_loss, other_P = gradient(flat, drawn.config, changed, ops)
    assert other_loss == loss
    np.testing.assert_array_equal(other_P, grad_P)


@given(drawn_models, seeds, st.integers(1, 4), st.integers(1, 6))
def test_gradients_of_rows_add_up(drawn, seed, B, T):
    batch, flat = batch_of(seed, drawn.config.vocab_size, B, T), float64(drawn)
    loss, grad_P = gradient(flat, drawn.config, batch)
    rows = [Batch(*(array[b : b + 1] for array in batch)) for b in range(B)]
    losses, grads = zip(*(gradient(flat, drawn.config, row) for row in rows), strict=True)
    assert sum(losses) == pytest.approx(loss, rel=1e-12, abs=1e-14)
    np.testing.assert_allclose(sum(grads), grad_P, atol=1e-11 * max(1, abs(grad_P).max()))


@given(drawn_models, seeds, st.integers(1, 6), st.sampled_from([PLAIN, TILED]))
def test_recomputing_gives_the_same_bits(drawn, seed, T, ops):
    batch, flat = batch_of(seed, drawn.config.vocab_size, 2, T), float64(drawn)
    kept = gradient(flat, drawn.config, batch, ops)
    again = gradient(flat, drawn.config, batch, ops, recompute=True)
    assert kept[0] == again[0]
    np.testing.assert_array_equal(kept[1], again[1])


@given(drawn_models)
def test_a_model_of_zeros_has_the_loss_of_chance(drawn):
    flat = Flat.zeros(named_shapes(drawn.config), np.float64)
    batch = Batch(*np.zeros((2, 1, 3), int), np.full((1, 3), 1 / 3))
    assert gradient(flat, drawn.config, batch)[0] == pytest.approx(np.log(drawn.config.vocab_size))


# ---- parts ---------------------------------------------------------------------------------------


@settings(max_examples=25)
@given(drawn_models, seeds, st.integers(1, 7), st.integers(1, 5), st.integers(1, 12), st.booleans())
def test_parts_make_the_batch_whatever_the_threads(drawn, seed, B, T, part, recompute):
    batch, flat = batch_of(seed, drawn.config.vocab_size, B, T), float64(drawn)
    loss, grad_P = gradient(flat, drawn.config, batch)
    found = [
        BatchGradient(drawn.config, threads, recompute, part)(flat, batch) for threads in (1, 3)
    ]
    assert found[0][0] == found[1][0] == pytest.approx(loss, rel=1e-12, abs=1e-14)
    np.testing.assert_array_equal(found[0][1].vector, found[1][1].vector)
    np.testing.assert_allclose(found[0][1].vector, grad_P, atol=1e-11 * max(1, abs(grad_P).max()))


def test_a_mistake_in_one_part_is_told():
    drawn = Model(Config(4, 1, 2, 1, 2, 4, 5), 0)
    batch = Batch(np.full((4, 2), 5), np.zeros((4, 2), int), np.full((4, 2), 1 / 8))
    with pytest.raises(InputError, match="5"):
        BatchGradient(drawn.config, 2, part=2)(float64(drawn), batch)


# ---- flat ----------------------------------------------------------------------------------------


@given(drawn_models)
def test_flat_holds_every_tensor_once_matrices_first(drawn):
    flat = float64(drawn)
    params = flat.params(drawn.config)
    for name, w in named(params, drawn.config.tied).items():
        np.testing.assert_array_equal(w, drawn.tensors[name])
        assert np.shares_memory(w, flat.vector)
    flat.vector[: flat.matrices] = np.nan
    assert all(np.isnan(w).all() == (w.ndim == 2) for w in flat.tensors.values())


def test_flat_refuses_a_vector_of_another_size():
    with pytest.raises(ValueError, match="expected a vector of 6"):
        Flat(np.zeros(7), {"w": (2, 3)})


# ---- another implementation ----------------------------------------------------------------------


@pytest.mark.parametrize("ops", [PLAIN, TILED], ids=["plain", "tiles"])
@pytest.mark.parametrize("case", ["tied", "scaled"])
def test_gradients_equal_those_of_torch(case, ops):
    """transformers' Llama under torch's autograd, float32: tools/goldens_gradients.py."""
    golden = np.load(GOLDENS / "gradients.npz")
    fields = json.loads(str(golden[f"{case}/config"]))
    if fields["rope_scaling"] is not None:
        fields["rope_scaling"] = RopeScaling(**fields["rope_scaling"])
    config = Config(**fields)
    names = named_shapes(config)
    flat = Flat.of({name: golden[f"{case}/w.{name}"] for name in names})
    batch = Batch(*(golden[f"{case}/{name}"] for name in ("ids", "targets", "weights")))
    loss, grad_P = gradient(flat, config, batch, ops)
    assert loss == pytest.approx(float(golden[f"{case}/loss"]), rel=1e-6)
    for name, grad in Flat(grad_P, flat.shapes).tensors.items():
        theirs = golden[f"{case}/d.{name}"]
        assert grad.dtype == np.float32
        assert np.abs(grad - theirs).max() <= 1e-5 * np.abs(theirs).max(), name

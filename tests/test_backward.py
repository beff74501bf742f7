"""Gradients against central differences, op by op and whole, and the laws they obey."""

import itertools
import json
import sys
import threading
import time
from functools import partial
from unittest import mock

import numpy as np
import pytest
from devices import on, to_host
from differences import assert_derivative, central
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import GOLDENS
from strategies import Model, models, pairings, seeds
from threadpoolctl import threadpool_info

from llama3np import model
from llama3np.config import Config, RopeScaling
from llama3np.errors import InputError
from llama3np.params import named, named_shapes
from llama3np.train import backward, tiles
from llama3np.train.backward import cross_entropy, loss_and_gradients
from llama3np.train.evaluation import summed_loss
from llama3np.train.flat import Flat
from llama3np.train.gradients import Sums
from llama3np.train.parts import BACK, OPS, Batch, BatchGradient
from llama3np.train.settings import PRESETS, initial

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
        grad, d_y_MO = Flat.zeros({"w": w.shape}, np.float64, xp), d_y_BTO.reshape(-1, n_out)
        Sums(grad).product("w", d_y_MO, x_BTI.reshape(-1, n_in))
        return backward.linear(d_y_MO, w).reshape(x_BTI.shape), grad.tensors["w"]

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


@given(seeds, st.integers(1, 9))
def test_tiles_of_huge_scores_are_the_plain_attention(seed, T):
    """e^score would overflow, and 10,000 less would not hide a later key."""
    q_BTNH, k_BKSH, v_BKSH, d_attn_BTNH = normal(
        seed, (1, T, 4, 3), (1, 2, T, 3), (1, 2, T, 3), (1, T, 4, 3)
    )
    k_BKSH[..., 0] += 1e6 * np.arange(1, T + 1) * np.sign(q_BTNH[0, 0, 0, 0])
    positions_BT, found = np.arange(T)[None], []
    for forward_ops, backward_ops in (PLAIN, TILED):
        seen = {}
        seen["attn"] = forward_ops.attention(q_BTNH, k_BKSH, v_BKSH, positions_BT, seen.__setitem__)
        back = backward_ops.attention(d_attn_BTNH, q_BTNH, k_BKSH, v_BKSH, seen)
        found.append((seen["attn"], *back))
    for plain, tiled in zip(*found, strict=True):
        assert np.isfinite(tiled).all()
        np.testing.assert_allclose(tiled, plain, atol=1e-6 * max(1, np.abs(plain).max()))


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
    _, grad = gradient(flat, config, batch, ops, recompute)
    grads = Flat(grad, flat.shapes).tensors
    rng = np.random.default_rng(seed)

    def loss():
        return summed_loss(flat.params(config), config, batch)

    for name, w in flat.tensors.items():
        at = rng.choice(w.size, min(w.size, 3), replace=False)
        expected = central(loss, w, at)
        assert_derivative(grads[name].reshape(-1)[at], expected, name, scale=grads[name])
    start, along, step = flat.vector.copy(), rng.standard_normal(grad.size), np.zeros(1)

    def loss_along():
        flat.vector[:] = start + step[0] * along
        return loss()

    (expected,) = central(loss_along, step)
    assert grad @ along == pytest.approx(expected, rel=1e-6, abs=1e-8)


@settings(max_examples=15)
@given(drawn_models, seeds, st.booleans())
@pytest.mark.cuda
def test_cupy_gives_the_gradients_of_numpy(drawn, seed, recompute):
    cupy = pytest.importorskip("cupy")
    batch, flat = batch_of(seed, drawn.config.vocab_size, 2, 5), float64(drawn)
    for ops in (PLAIN, TILED):
        loss, grad = gradient(flat, drawn.config, batch, ops, recompute)
        there, there_grad = gradient(flat, drawn.config, batch, ops, recompute, cupy)
        assert there == pytest.approx(loss, rel=1e-12, abs=1e-12)
        np.testing.assert_allclose(
            there_grad, grad, rtol=1e-9, atol=1e-12 * max(1, abs(grad).max())
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
    loss, grad = gradient(flat, drawn.config, batch, ops)
    other_loss, other_grad = gradient(flat, drawn.config, changed, ops)
    assert other_loss == loss
    np.testing.assert_array_equal(other_grad, grad)


@given(drawn_models, seeds, st.integers(1, 4), st.integers(1, 6))
def test_gradients_of_rows_add_up(drawn, seed, B, T):
    batch, flat = batch_of(seed, drawn.config.vocab_size, B, T), float64(drawn)
    loss, grad = gradient(flat, drawn.config, batch)
    rows = [Batch(*(array[b : b + 1] for array in batch)) for b in range(B)]
    losses, grads = zip(*(gradient(flat, drawn.config, row) for row in rows), strict=True)
    assert sum(losses) == pytest.approx(loss, rel=1e-12, abs=1e-14)
    np.testing.assert_allclose(sum(grads), grad, atol=1e-11 * max(1, abs(grad).max()))


@given(drawn_models, seeds, st.integers(1, 6), st.sampled_from([PLAIN, TILED]))
def test_recomputing_gives_the_same_bits(drawn, seed, T, ops):
    batch, flat = batch_of(seed, drawn.config.vocab_size, 2, T), float64(drawn)
    kept = gradient(flat, drawn.config, batch, ops)
    with mock.patch.object(backward, "again", wraps=backward.again) as computed:
        again = gradient(flat, drawn.config, batch, ops, recompute=True)
    assert computed.call_count == drawn.config.n_layers
    assert kept[0] == again[0]
    np.testing.assert_array_equal(kept[1], again[1])


def test_recomputing_keeps_the_residual_stream_alone():
    taps = backward.Taps(2, recompute=True)
    for name in ("embed", "layers.0.q_rope", "layers.0.h", "layers.1.act", "layers.1.h", "norm"):
        taps(name, name)
    assert (taps.h, taps.blocks, taps.norm) == (
        ["embed", "layers.0.h", "layers.1.h"],
        [{}, {}],
        "norm",
    )


@given(drawn_models, seeds)
def test_gradients_are_added_to_what_is_there(drawn, seed):
    batch, flat = batch_of(seed, drawn.config.vocab_size, 2, 3), float64(drawn)
    into = Sums(flat.like())
    for _ in range(2):
        loss_and_gradients(flat.params(drawn.config), drawn.config, *batch, into)
    once = gradient(flat, drawn.config, batch)[1]
    np.testing.assert_allclose(into.flat.vector, 2 * once, atol=1e-12 * max(1, abs(once).max()))


@pytest.mark.parametrize("ops", [PLAIN, TILED], ids=["plain", "tiles"])
@pytest.mark.parametrize("recompute", [False, True])
def test_a_step_in_float32_is_float32_throughout(xp, ops, recompute):
    """Nothing that an operation is given or returns, and nothing that gradients are added of."""
    config = Config(12, 2, 4, 2, 6, 20, 23, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 16))
    flat = Flat.of(Model(config, 0).tensors, xp=xp)
    ids_BT, targets_BT, weights_BT = batch_of(0, 23, 2, 70)
    grad = Flat.zeros(flat.shapes, xp=xp)
    watched = [type(each)(*map(only_float32, each)) for each in ops]
    into = mock.Mock(wraps=Sums(grad))
    loss_and_gradients(
        flat.params(config), config, ids_BT, xp.asarray(targets_BT),
        xp.asarray(weights_BT.astype(np.float32)), into, *watched, recompute,
    )  # fmt: skip
    assert len(into.method_calls) == 1 + 1 + 2 * 9 + 1
    for call in into.method_calls:
        assert all(a.dtype == np.float32 for a in call.args[1:] if a.dtype.kind == "f"), call.args[
            0
        ]


def only_float32(op):
    def watched(*args, **options):
        found = op(*args, **options)
        assert_float32(op, (args, options, found))
        return found

    return watched


def assert_float32(op, tree):
    if isinstance(tree, (tuple, list, dict)):
        for member in tree.values() if isinstance(tree, dict) else tree:
            assert_float32(op, member)
    elif hasattr(tree, "dtype") and tree.dtype.kind == "f":
        assert tree.dtype == np.float32, f"{op.__module__}.{op.__name__}: {tree.dtype}"


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
    loss, grad = gradient(flat, drawn.config, batch)
    found = [
        BatchGradient(drawn.config, threads, recompute, part)(flat, batch) for threads in (1, 3)
    ]
    assert found[0][0] == found[1][0] == pytest.approx(loss, rel=1e-12, abs=1e-14)
    np.testing.assert_array_equal(found[0][1].vector, found[1][1].vector)
    np.testing.assert_allclose(found[0][1].vector, grad, atol=1e-11 * max(1, abs(grad).max()))


def test_a_wrong_id_is_told_with_its_row_of_the_batch():
    drawn = Model(Config(4, 1, 2, 1, 2, 4, 5), 0)
    batch = Batch(np.zeros((9, 2), int), np.zeros((9, 2), int), np.full((9, 2), 1 / 18))
    batch.ids_BT[7, 1] = 5
    with pytest.raises(InputError, match="row 7, position 1"):
        BatchGradient(drawn.config, 2, part=2)(float64(drawn), batch)


@pytest.mark.timeout(30)
@pytest.mark.parametrize("failing", range(5))
def test_an_error_in_one_part_ends_all_and_harms_no_later_batch(failing):
    drawn = Model(Config(4, 1, 2, 1, 2, 4, 5), 0)
    flat, batch = float64(drawn), batch_of(0, 5, 12, 3)
    calls, whole = itertools.count(), backward.loss_and_gradients

    def sometimes(*args):
        if next(calls) == failing:
            time.sleep(0.05)  # so that the other threads have come to wait for this part
            raise MemoryError("none left")
        return whole(*args)

    of_batch = BatchGradient(drawn.config, 3, part=3)
    failing_one = mock.patch.object(backward, "loss_and_gradients", sometimes)
    with failing_one, pytest.raises(MemoryError, match="none left"):
        of_batch(flat, batch)
    np.testing.assert_array_equal(
        of_batch(flat, batch)[1].vector,
        BatchGradient(drawn.config, 1, part=3)(flat, batch)[1].vector,
    )


def test_few_gradients_exist_at_a_time_though_one_part_takes_long():
    drawn, threads = Model(Config(4, 1, 2, 1, 2, 4, 5), 0), 3
    flat, batch = float64(drawn), batch_of(0, 5, 40, 3)
    begun, most, whole = [], [], backward.loss_and_gradients
    slow = threading.Event()

    def counted(*args):
        begun.append(args)
        if len(begun) == 1:  # some part of the first few, while the others go on
            slow.wait(0.3)
            most.append(len(begun))
        return whole(*args)

    with mock.patch.object(backward, "loss_and_gradients", counted):
        BatchGradient(drawn.config, threads, part=3)(flat, batch)
    assert len(begun) == 40
    assert most[0] <= 2 * threads


def test_a_part_has_one_thread_of_blas_and_recomputes_if_told_to():
    drawn = Model(Config(4, 2, 2, 1, 2, 4, 5), 0)
    seen, whole = [], backward.again

    def again(*args):
        blas = (each for each in threadpool_info() if each["user_api"] == "blas")
        seen.extend(library["num_threads"] for library in blas)
        return whole(*args)

    with mock.patch.object(backward, "again", again):
        BatchGradient(drawn.config, 2, recompute=True)(float64(drawn), batch_of(0, 5, 2, 3))
    assert set(seen) == {1}


def test_threads_change_no_bit_where_blas_would_use_several():
    """At the sizes of the tiny preset, with threads that take turns as often as they can."""
    preset, before = PRESETS["tiny"], sys.getswitchinterval()
    config = preset.config(257, 256)
    flat = Flat.of(named(initial(config, 0), config.tied))
    ids_BT, targets_BT, weights_BT = batch_of(1, 257, 6, 256)
    batch = Batch(ids_BT, targets_BT, weights_BT.astype(np.float32))
    sys.setswitchinterval(1e-6)
    try:
        one, three = (BatchGradient(config, threads)(flat, batch) for threads in (1, 3))
    finally:
        sys.setswitchinterval(before)
    assert one[0] == three[0]
    np.testing.assert_array_equal(one[1].vector, three[1].vector)


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
    loss, found = gradient(flat, config, batch, ops)
    assert loss == pytest.approx(float(golden[f"{case}/loss"]), rel=1e-6)
    for name, grad in Flat(found, flat.shapes).tensors.items():
        theirs = golden[f"{case}/d.{name}"]
        assert grad.dtype == np.float32
        assert np.abs(grad - theirs).max() <= 1e-5 * np.abs(theirs).max(), name

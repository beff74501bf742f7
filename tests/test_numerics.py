"""numerics.py and the rounding of backend.py: against whole numbers, on NumPy and on CuPy."""

import json
from dataclasses import replace

import ml_dtypes
import numpy as np
import pytest
import rounding
from checks import assert_close, assert_same
from devices import apply, on
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from noise import oracle_taps, short_noise
from rounding import around, every, nearest
from runs import trace
from strategies import SHORT, arrays, models, pairings, runs, seeds

from llama3np.backend import narrow, widen
from llama3np.cache import kv_dtype
from llama3np.cli import main
from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.kernels import Joined
from llama3np.llm import Llama
from llama3np.model import rms_norm, rope, rope_tables, swiglu
from llama3np.numerics import PROFILES, narrow_rope, profile, short_params, ulps
from llama3np.params import named, random
from llama3np.selftest import blocks

KINDS = [*rounding.FORMATS]
TYPES = [*KINDS, np.dtype(np.float32), np.dtype(np.float64)]
kinds = pytest.mark.parametrize("kind", KINDS, ids=str)
types = pytest.mark.parametrize("kind", TYPES, ids=str)
MOST = np.iinfo(np.int64).max

SMALL = Config(32, 2, 4, 2, 8, 48, 40)


def same_bits(found, expected):
    """To the last bit, the sign of a zero too; a NaN is a NaN."""
    number = ~np.isnan(expected.astype(np.float32))
    assert found.dtype == expected.dtype
    assert (np.isnan(found.astype(np.float32)) == ~number).all()
    whole = f"u{found.dtype.itemsize}"
    assert (found.view(whole)[number] == expected.view(whole)[number]).all()


# ---- rounding -----------------------------------------------------------------------------------


def narrowed(xp, numbers, kind):
    with np.errstate(over="ignore", invalid="ignore"):  # to infinity, and NaNs that signal
        return apply(xp, lambda x: narrow(x, xp.empty(0, kind)), numbers)


@kinds
def test_narrow_rounds_as_whole_numbers_do_wherever_rounding_turns(xp, kind):
    """At every number, every middle of two, beside both; beyond the largest; subnormals, zeros."""
    numbers = around(kind)
    same_bits(narrowed(xp, numbers, kind), nearest(numbers, kind))


@kinds
def test_narrow_rounds_every_upper_half_with_any_lower_half(xp, kind):
    """All 2^16 upper halves of a float32, NaNs of every payload and infinities among them."""
    upper_N = np.arange(2**16, dtype=np.uint32) << 16
    for lower in (0, 1, 0x0FFF, 0x1000, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        numbers = (upper_N | np.uint32(lower)).view(np.float32)
        same_bits(narrowed(xp, numbers, kind), nearest(numbers, kind))


@kinds
@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=40))
def test_narrow_rounds_any_float32(xp, kind, bits):
    numbers = np.array(bits, np.uint32).view(np.float32)
    same_bits(narrowed(xp, numbers, kind), nearest(numbers, kind))


@kinds
def test_widen_is_exact_and_narrow_takes_it_back(xp, kind):
    numbers = every(kind)
    wide = apply(xp, widen, numbers)
    same_bits(narrowed(xp, wide, kind), numbers)
    if kind == ml_dtypes.bfloat16:  # the upper half of a float32
        number = ~np.isnan(wide)
        assert (
            wide.view(np.uint32)[number] == numbers.view(np.uint16)[number].astype(np.uint32) << 16
        ).all()


def test_the_independent_rounding_of_known_numbers():
    """IEEE 754's own examples, so that the reference is not only as good as what it judges."""
    bf16, f16 = KINDS
    for kind, number, bits in (
        (bf16, 1 + 2**-8, 0x3F80), (bf16, 1 + 3 * 2**-8, 0x3F82), (bf16, -(2.0**-126), 0x8080),
        (bf16, 1 + 2**-8 + 2**-23, 0x3F81), (bf16, 3.3961775e38, 0x7F80), (bf16, 3e-45, 0x0000),
        (bf16, 3.396177e38, 0x7F7F), (bf16, 2.0**-134, 0x0000), (bf16, 3 * 2.0**-135, 0x0001),
        (f16, 65504, 0x7BFF), (f16, 65519.996, 0x7BFF), (f16, 65520, 0x7C00), (f16, -0.0, 0x8000),
        (f16, 2.0**-25, 0x0000), (f16, 2.0**-24, 0x0001), (f16, 1 + 2**-11, 0x3C00),
        (f16, 1 + 3 * 2**-11, 0x3C02),
    ):  # fmt: skip
        assert nearest(np.float32([number]), kind).view(np.uint16)[0] == bits, (kind, number)


@kinds
@given(seeds)
def test_products_and_sums_of_16_bit_arrays_round_once(xp, kind, seed):
    """What residual adds and norm weights rely on: float32 arithmetic, rounded, infinities too.

    CuPy has its kernels compiled to take a subnormal float32 for 0, so a subnormal bfloat16 too.
    """
    x_N, y_N = np.random.default_rng(seed).integers(0, 2**16, (2, 400), dtype=np.uint16).view(kind)
    with np.errstate(all="ignore"):
        wide = x_N.astype(np.float32), y_N.astype(np.float32)
        for of in (np.add, np.multiply):
            exact = of(*wide)
            plain = np.all([xp is np or ~subnormal(x) for x in (*wide, exact)], axis=0)
            x_M, y_M = (x * plain for x in (x_N, y_N))
            found = apply(xp, lambda x, y: x + y if of is np.add else x * y, x_M, y_M)  # noqa: B023
            same_bits(found, nearest(of(x_M.astype(np.float32), y_M.astype(np.float32)), kind))


def subnormal(x):
    return (x != 0) & (np.abs(x) < np.finfo(np.float32).smallest_normal)


# ---- distances ----------------------------------------------------------------------------------


@types
def test_neighbours_are_one_apart_and_zeros_are_one_number(xp, kind):
    bits = kind.itemsize * 8
    ends = every(kind) if bits == 16 else beside_special(kind)
    with np.errstate(over="ignore", invalid="ignore"):
        ends = ends[np.isfinite(ends.astype(np.float64))]
        after = np.nextafter(ends, np.array(np.inf, kind))
    assert (apply(xp, ulps, ends, after) == 1).all()
    assert (apply(xp, ulps, ends, ends) == 0).all()
    zero = np.zeros(3, kind)
    assert (apply(xp, ulps, zero, -zero) == 0).all()


def beside_special(kind):
    """float32 or float64 numbers where the order of bits has its edges."""
    fine = np.finfo(kind)
    some = [0.0, 1.0, 1.5, 2.0, fine.smallest_normal, fine.smallest_subnormal, fine.max]
    some = np.array([*some, *(-x for x in some)], kind)
    return np.concatenate((some, np.nextafter(some, kind.type(0))))


@types
@given(st.data())
def test_ulps_count_the_numbers_between(xp, kind, data):
    """Of any bits: 0 only for equals, the same both ways, additive along the line; NaN is far."""
    n_bits = kind.itemsize * 8
    drawn = st.lists(st.integers(0, 2**n_bits - 1), min_size=3, max_size=3)
    a, b, c = np.array(data.draw(drawn), f"u{kind.itemsize}").view(kind).reshape(3, 1)
    found = {
        (i, j): int(apply(xp, ulps, x, y)[0])
        for i, x in enumerate((a, b, c)) for j, y in enumerate((a, b, c))
    }  # fmt: skip
    nan = [bool(np.isnan(x.astype(np.float64))[0]) for x in (a, b, c)]
    for (i, j), gap in found.items():
        assert gap == found[j, i]
        if nan[i] or nan[j]:
            assert gap == MOST
        else:
            assert (gap == 0) == bool(((a, b, c)[i] == (a, b, c)[j])[0])
    assume(not any(nan))
    low, middle, high = sorted(range(3), key=lambda i: (a, b, c)[i].astype(np.float64)[0])
    assert found[low, high] == min(found[low, middle] + found[middle, high], MOST)


def test_ulps_of_the_ends_of_float64_do_not_overflow(xp):
    most, one = np.array([np.finfo(np.float64).max]), np.array([1.0])
    assert apply(xp, ulps, most, -most)[0] == MOST
    assert apply(xp, ulps, np.array([np.inf]), np.array([-np.inf]))[0] == MOST
    assert apply(xp, ulps, one, -one)[0] == 2 * 0x3FF0000000000000  # just fits
    assert apply(xp, ulps, np.float32([np.inf]), np.float32([-np.inf]))[0] == 2 * 0x7F800000


def test_ulps_keep_the_shape_and_need_one_dtype(xp):
    one = on(xp, np.ones((2, 3), ml_dtypes.bfloat16))
    assert ulps(one, one).shape == (2, 3)
    assert ulps(one[:1, 0].reshape(()), one[:1, 0].reshape(())).shape == ()
    assert ulps(one.T, one.T).dtype == np.int64
    with pytest.raises(ValueError, match="expected one dtype, found bfloat16 and float32"):
        ulps(one, widen(one))


# ---- profiles -----------------------------------------------------------------------------------


def test_an_unknown_profile_is_told_with_those_there_are():
    names = "float32, float64, bf16-mm, bf16-meta, bf16-hf, f16-hf"
    with pytest.raises(InputError, match=f"dtype: expected one of {names}, found 'bf16'"):
        profile("bf16")


@pytest.mark.parametrize(("name", "own"), [("bf16-meta", "bf16"), ("f16-hf", "f16")])
def test_a_cache_of_16_bits_holds_its_own_type_alone(name, own):
    """Keys are rounded once, as they are made; another type would round them again."""
    for kv in (None, own):
        assert kv_dtype(kv, PROFILES[name].dtype) == PROFILES[name].dtype
    for kv in {"f32", "bf16", "f16"} - {own}:
        with pytest.raises(InputError, match=f"kv-dtype: expected one of {own}, found '{kv}'"):
            Llama(SMALL, random(SMALL, np.random.default_rng(0)), dtype=name, kv_dtype=kv)


def test_info_tells_the_cache_of_every_profile(capsys):
    found = {}
    for name in PROFILES:
        assert main(["info", "llama3-8b", "--dtype", name, "--json"]) == 0
        found[name] = json.loads(capsys.readouterr().out)
    per_token = {name: facts["cache_bytes_per_token"] for name, facts in found.items()}
    wide = per_token["float32"]
    assert per_token == {
        name: wide * np.dtype(p.dtype).itemsize // 4 for name, p in PROFILES.items()
    }


@kinds
@pytest.mark.parametrize("head_dim", range(2, 258, 2))
def test_dividing_by_sqrt_and_multiplying_by_its_inverse_are_one_number_in_bf16(kind, head_dim):
    """So one profile serves Meta's division too, and torch's of it on CUDA, by the reciprocal."""
    scores = every(kind).astype(np.float32)
    root = np.float32(np.sqrt(head_dim))
    with np.errstate(over="ignore", invalid="ignore"):
        times = nearest(scores * np.float32(head_dim**-0.5), kind)
        divided = nearest(scores / root, kind)
        reciprocal = nearest(scores * (1 / root), kind)
    if kind == ml_dtypes.bfloat16:
        same_bits(divided, times)
        same_bits(reciprocal, times)
    elif head_dim in (32, 128):  # float16 has 11 bits: there it shows, in a few
        apart = ulps(divided, times)[~np.isnan(scores)]
        assert 0 < (apart > 0).sum() < 60
        assert apart.max() == 1


# ---- weights ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@given(models(), st.integers(1, 50))
def test_weights_are_rounded_one_by_one_norms_and_tables_too(dtype, model, tile):
    """In tiles of any size; a tied head stays the table itself, and nothing is rounded twice."""
    kind = np.dtype(dtype)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("llama3np.numerics.TILE", tile)
        params = short_params(model.params, dtype)
    assert (params.head_VD is params.embed_VD) == model.config.tied
    own, short = (named(p, model.config.tied) for p in (model.params, params))
    for name, w in own.items():
        same_bits(short[name], nearest(w.astype(np.float32), kind))
        assert (short[name] is w) == (w.dtype == kind)


def test_float64_weights_go_by_way_of_float32_as_in_torch():
    """1 + 2^-8 + 2^-40 is above the middle of two bfloat16, and in float32 it is the middle."""
    config = Config(2, 1, 1, 1, 2, 1, 2)
    params = random(config, np.random.default_rng(0), np.float64)
    for dtype, half in (("bfloat16", 2**-8), ("float16", 2**-11)):
        beside = params._replace(norm_D=np.full(2, 1 + half + 2.0**-40))
        assert (short_params(beside, dtype).norm_D == 1).all()


def test_blocks_and_shards_are_rounded_as_the_numbers_they_mean():
    config, rng = Config(256, 1, 4, 2, 64, 256, 70, tied=False), np.random.default_rng(0)
    params = random(config, rng)
    quantised = blocks("Q4_0", (70, 256), rng)
    joined = Joined(np.split(params.embed_VD, 2), 0)
    short = short_params(params._replace(head_VD=quantised, embed_VD=joined), "bfloat16")
    same_bits(short.head_VD, nearest(np.asarray(quantised), ml_dtypes.bfloat16))
    same_bits(short.embed_VD, nearest(params.embed_VD, ml_dtypes.bfloat16))


def test_weights_beyond_float16_become_infinite_without_a_warning(recwarn):
    config = Config(2, 1, 1, 1, 2, 1, 2)
    params = random(config, np.random.default_rng(0))._replace(norm_D=np.float32([65519.9, 65520]))
    assert short_params(params, "float16").norm_D.tolist() == [65504, np.inf]
    assert not recwarn.list


# ---- operations on NumPy and on CuPy -------------------------------------------------------------

SHORT_KINDS = {name: np.dtype(PROFILES[name].dtype) for name in SHORT}
profiles = pytest.mark.parametrize("name", SHORT)


@profiles
@given(arrays(2, 3, 4, 10), pairings)
def test_rope_from_the_same_tables_has_the_same_bits_everywhere(xp, name, x_BTNH, pairing):
    config = Config(2, 1, 1, 1, 10, 1, 2)
    cos_BTP, sin_BTP = rope_tables(config, np.arange(6).reshape(2, 3), "float32")
    turn = narrow_rope if PROFILES[name].narrow_tables else rope
    given_ = x_BTNH.astype(SHORT_KINDS[name]), cos_BTP, sin_BTP, pairing
    assert_same(apply(xp, turn, *given_), turn(*given_), "turned")


@profiles
@given(seeds)
def test_rms_norm_has_the_same_bits_where_the_sum_of_squares_is_exact(xp, name, seed):
    """Whole numbers, so that no order of the sum rounds; 32 of them, so that no mean does."""
    rng = np.random.default_rng(seed)
    x_BTD = rng.integers(-64, 65, (2, 3, 32)).astype(SHORT_KINDS[name])
    w_D = rng.standard_normal(32).astype(SHORT_KINDS[name])
    assert_same(apply(xp, rms_norm, x_BTD, w_D, 1e-5), rms_norm(x_BTD, w_D, 1e-5), "norm")


@profiles
@given(arrays(2, 3, 33), arrays(33))
def test_rms_norm_is_within_two_ulps_elsewhere(xp, name, x_BTD, w_D):
    x_BTD, w_D = x_BTD.astype(SHORT_KINDS[name]), w_D.astype(SHORT_KINDS[name])
    ones_D = np.ones_like(w_D)
    for w, most in ((ones_D, 1), (w_D, 2)):
        found = apply(xp, rms_norm, x_BTD, w, 1e-5)
        assert ulps(found, rms_norm(x_BTD, w, 1e-5)).max() <= most


@profiles
def test_silu_is_within_one_ulp_of_the_exact_one_for_every_number(xp, name):
    """By NumPy's and CUDA's exp; e^-x would overflow below -88, where x / e^88 stands for 0."""
    kind = SHORT_KINDS[name]
    gate_F = every(kind)
    wide = gate_F.astype(np.float32)
    gate_F = gate_F[np.isfinite(wide) & ~subnormal(wide)]
    found = apply(xp, swiglu, gate_F, np.ones_like(gate_F))
    wide = gate_F.astype(np.float64)
    with np.errstate(over="ignore"):
        exact = (wide / (1 + np.exp(-wide))).astype(np.float32)
    near = (wide >= -88) & ~subnormal(exact)
    assert ulps(found, nearest(exact, kind))[near].max() <= 1
    below = wide < -88
    assert (np.abs(found.astype(np.float64))[below] <= -wide[below] / 1.6e38).all()


@profiles
@given(seeds)
def test_swiglu_is_within_two_ulps_of_the_exact_one_rounded_twice(xp, name, seed):
    kind, rng = SHORT_KINDS[name], np.random.default_rng(seed)
    gate_F, up_F = (8 * rng.standard_normal((2, 400))).astype(kind)
    wide = gate_F.astype(np.float64)
    silu_F = nearest((wide / (1 + np.exp(-wide))).astype(np.float32), kind)
    expected = nearest(silu_F.astype(np.float32) * up_F.astype(np.float32), kind)
    assert ulps(apply(xp, swiglu, gate_F, up_F), expected).max() <= 2


# ---- whole models --------------------------------------------------------------------------------


@profiles
@settings(max_examples=24)
@given(runs())
def test_every_tap_is_as_near_the_oracle_as_its_bits_allow(xp, name, run):
    """And in the profile's type, but for logits, which are widened at the end."""
    chosen, (model, ids) = PROFILES[name], run
    model = replace(model, stored=chosen.dtype, xp=xp)
    taps, truth = trace(model, [ids], chosen.dtype, chosen.ops), oracle_taps(model, ids)
    allowed = short_noise(model, ids, truth, chosen.dtype)
    assert list(taps) == list(truth)
    for tap, expected in truth.items():
        assert taps[tap].dtype == ("float32" if tap == "logits" else chosen.dtype)
        found = taps[tap][0].reshape(expected.shape)
        assert_close(found, expected, allowed[tap], tap)

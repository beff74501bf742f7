"""The cost model against the model itself: its tensors, its cache, its products as they run."""

from dataclasses import replace

import gguf
import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from strategies import configs

from llama3np import cost
from llama3np.cache import new_cache
from llama3np.errors import InputError
from llama3np.model import forward
from llama3np.params import Params, named, named_shapes, random
from llama3np.presets import PRESETS


@given(config=configs())
def test_parameters_and_bytes_are_those_of_the_tensors(config):
    tensors = named(random(config, np.random.default_rng(0)), config.tied)
    assert sum(cost.parameters(config).values()) == sum(w.size for w in tensors.values())
    assert cost.weight_bytes(config, "f32") == sum(w.nbytes for w in tensors.values())
    assert cost.weight_bytes(config, "bf16") == sum(w.nbytes for w in tensors.values()) // 2


@pytest.mark.parametrize("name", PRESETS)
def test_block_formats_take_the_bytes_that_gguf_says(name):
    """Matrices by the gguf package's own sizes of a row; vectors float32."""
    shapes = named_shapes(PRESETS[name]).values()
    for ours, theirs in (("q8_0", "Q8_0"), ("q4_0", "Q4_0"), ("f16", "F16")):
        kind = gguf.GGMLQuantizationType[theirs]
        expected = sum(
            (2 if ours == "f16" else 4) * shape[0]
            if len(shape) == 1
            else int(np.prod(gguf.quant_shape_to_byte_shape(shape, kind)))
            for shape in shapes
        )
        assert cost.weight_bytes(PRESETS[name], ours) == expected


def test_rows_that_are_no_whole_blocks_stay_wide():
    assert cost.tensor_bytes((4, 48), "q8_0") == 4 * 4 * 48
    assert cost.tensor_bytes((4, 64), "q8_0") == 4 * 2 * 34
    assert [cost.FORMATS[name].bits for name in ("q8_0", "q4_0")] == [8.5, 4.5]


@given(config=configs(), length=st.integers(1, 9), batch=st.integers(1, 3))
def test_cache_bytes_are_those_of_a_cache(config, length, batch):
    for ours, dtype in (("f32", "float32"), ("f64", "float64"), ("f16", "float16")):
        made = new_cache(config, batch, length, dtype)
        assert batch * length * cost.cache_bytes_per_token(config, ours) == made.nbytes


class Counted:
    """A weight that counts the operations of its products and the bytes read."""

    def __init__(self, w, counts):
        self.w, self.counts = w, counts
        self.shape, self.dtype, self.nbytes = w.shape, w.dtype, w.nbytes

    @property
    def T(self):
        return CountedTransposed(self)

    def __getitem__(self, ids):
        rows = self.w[ids]
        self.counts["bytes"] += rows.nbytes
        return rows


class CountedTransposed:
    __array_ufunc__ = None

    def __init__(self, counted):
        self.counted = counted

    def __rmatmul__(self, x_MD):
        self.counted.counts["flops"] += 2 * len(x_MD) * self.counted.w.size
        self.counted.counts["bytes"] += self.counted.nbytes
        return x_MD @ self.counted.w.T


@given(config=configs(), context=st.integers(0, 6), batch=st.integers(1, 3))
def test_a_decode_step_does_the_work_that_is_said(config, context, batch):
    counts = {"flops": 0, "bytes": 0}
    plain = random(config, np.random.default_rng(0))
    wrap = lambda w: Counted(w, counts) if w.ndim == 2 else w  # noqa: E731
    embed = wrap(plain.embed_VD)
    layers = tuple(type(layer)(*map(wrap, layer)) for layer in plain.layers)
    params = Params(embed, layers, plain.norm_D, embed if config.tied else wrap(plain.head_VD))
    cache = new_cache(config, batch, context + 1)
    if context:
        forward(params, config, np.zeros((batch, context), int), cache, None, "float32")
    counts.update(flops=0, bytes=0)

    def tap(name, array):
        if name.endswith((".scores", ".probs")):  # each is one product with H numbers a score
            counts["flops"] += 2 * config.head_dim * array.size

    forward(params, config, np.zeros((batch, 1), int), cache, None, "float32", tap=tap)
    assert counts["flops"] == batch * cost.flops_per_token(config, context)
    norms = 4 * cost.parameters(config)["norms"]
    kept = batch * context * cost.cache_bytes_per_token(config, "f32")
    looked_up = 4 * batch * config.dim if config.tied else 0  # the head's reading has it already
    assert counts["bytes"] + norms + kept - looked_up == cost.bytes_per_step(
        config, "f32", context, batch, "f32"
    )


@given(config=configs(), context=st.integers(0, 4), tokens=st.integers(1, 5))
def test_a_prompt_does_the_work_that_is_said(config, context, tokens):
    """Products as the model makes them, the head for one token; attention to what is seen."""
    counts = {"flops": 0, "bytes": 0}
    plain = random(config, np.random.default_rng(0))
    wrap = lambda w: Counted(w, counts) if w.ndim == 2 else w  # noqa: E731
    layers = tuple(type(layer)(*map(wrap, layer)) for layer in plain.layers)
    params = Params(plain.embed_VD, layers, plain.norm_D, wrap(plain.head_VD))
    cache = new_cache(config, 1, context + tokens)
    if context:
        forward(params, config, np.zeros((1, context), int), cache)
    counts.update(flops=0, bytes=0)

    def tap(name, array):
        if name.endswith(".scores"):  # two products with H numbers for each that is not masked
            counts["flops"] += 4 * config.head_dim * int(np.isfinite(array).sum())

    forward(params, config, np.zeros((1, tokens), int), cache, tap=tap)
    assert counts["flops"] == cost.prefill_flops(config, tokens, context)


@given(config=configs(), context=st.integers(0, 99), a=st.integers(1, 99), b=st.integers(1, 99))
def test_a_prompt_in_two_parts_costs_one_head_more(config, context, a, b):
    one_head = 2 * config.vocab_size * config.dim
    parts = cost.prefill_flops(config, a, context) + cost.prefill_flops(config, b, context + a)
    assert cost.prefill_flops(config, a + b, context) + one_head == parts
    assert cost.prefill_flops(config, 1, context) == cost.flops_per_token(config, context)


# ---- what fits ---------------------------------------------------------------------------------

PRESET = st.sampled_from(list(PRESETS))
FORMAT = st.sampled_from(list(cost.FORMATS))
DTYPE = st.sampled_from(list(cost.CACHE_BYTES))


@given(name=PRESET, format=FORMAT, dtype=DTYPE, memory=st.integers(1, 10**12))
def test_the_longest_context_fits_and_one_more_does_not(name, format, dtype, memory):
    config = PRESETS[name]
    longest = cost.longest_context(config, format, memory, dtype)
    assert 0 <= longest <= config.context_length
    if longest:
        assert cost.memory(config, format, longest, 1, dtype) <= memory
    if longest < config.context_length:
        assert cost.memory(config, format, longest + 1, 1, dtype) > memory


@given(name=PRESET, gpus=st.sampled_from([1, 2, 4, 8]), format=FORMAT)
def test_the_shares_of_gpus_are_the_model_with_its_norms_in_each(name, gpus, format):
    config = PRESETS[name]
    assume(config.n_kv_heads % gpus == 0)
    part = cost.share(config, gpus)
    norms = cost.parameters(config)["norms"]
    parts = gpus * sum(cost.parameters(part).values())
    assert parts == sum(cost.parameters(config).values()) + (gpus - 1) * norms
    assert gpus * cost.cache_bytes_per_token(part, "f16") == cost.cache_bytes_per_token(
        config, "f16"
    )
    assert replace(cost.share(config, 1), vocab_size=config.vocab_size) == config


@given(name=PRESET, format=FORMAT, context=st.integers(0, 4096), batch=st.integers(1, 64))
def test_the_roofline_is_proportional_to_bandwidth_and_falls_with_context(
    name, format, context, batch
):
    config = PRESETS[name]
    speed = cost.roofline(config, format, context, batch, "f16", 50e9)
    assert cost.roofline(config, format, context, batch, "f16", 100e9) == pytest.approx(2 * speed)
    assert cost.roofline(config, format, context + 1, batch, "f16", 50e9) < speed
    assert cost.roofline(config, format, context, batch + 1, "f16", 50e9) > speed


def test_8b_in_bf16_at_50_gb_per_second_is_3_3_tokens_per_second():
    """15.01 GB of weights are read for a token: 16.06 GB less the embedding table."""
    speed = cost.roofline(PRESETS["llama3-8b"], "bf16", 0, 1, "f32", 50e9)
    assert speed == pytest.approx(50e9 / (16_060_522_496 - 2 * 128256 * 4096), rel=1e-5)


@pytest.mark.parametrize("gpus", [0, -1, 3, 16])
def test_gpus_must_divide_the_heads(gpus):
    with pytest.raises(InputError, match=f"divides n_kv_heads 8, found {gpus}$"):
        cost.share(PRESETS["llama3-8b"], gpus)


# ---- a CUDA device ------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("layers", [1, 3])
def test_a_decode_step_has_the_kernels_that_are_predicted(softcuda, layers):
    """Counted as they are launched one by one: the first step of a cache."""
    from llama3np.llm import Llama

    config = replace(PRESETS["llama3-8b"], dim=32, n_layers=layers, n_heads=4, n_kv_heads=2)
    config = replace(config, head_dim=8, ffn_dim=48, vocab_size=30)
    params = random(config, np.random.default_rng(0))
    llm = Llama(config, params, device="cuda", engine="cuda", max_seq_len=32)
    cache = llm.new_cache(1, 8)
    llm.forward([1, 2], cache)
    llm.forward([3], llm.new_cache(1, 8))  # tables of angles are made with the first step
    softcuda.reset()
    llm.forward([3], cache)
    kernels = {k: n for k, n in softcuda.stats()["kernels"].items() if not k.startswith("cupy_")}
    assert sum(kernels.values()) == cost.step_kernels(config)


def test_a_step_of_8b_is_predicted_from_its_bytes():
    """16.06 GB of weights less the table of the embedding, and 2.15 GB of keys and values."""
    step = cost.predicted_step(PRESETS["llama3-8b"], "bf16", 8192, "f32", 1e12)
    bytes_s = (16_060_522_496 - 128255 * 4096 * 2 + 8192 * 262144) / 1e12
    assert step == pytest.approx(bytes_s + 227 * 1.5e-6, rel=1e-6)


@given(configs(), st.sampled_from(["bf16", "q8_0"]), st.integers(1, 9999))
def test_a_prediction_is_above_the_roofline(config, format, context):
    step = cost.predicted_step(config, format, context, "f32", 1e12)
    assert 1 / step < cost.roofline(config, format, context, 1, "f32", 1e12)

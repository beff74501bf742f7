"""Traces for the tests of the cross-checker: of small models, right ones, changed ones, wrong ones.

A wrong forward pass is the spec with one edit of its text; the first tap that it spoils is known.
"""

import inspect
import types

import ml_dtypes
import numpy as np
import strategies
from hypothesis import strategies as st

from llama3np import model as spec
from llama3np.cache import new_cache
from llama3np.config import Config
from llama3np.crosscheck import measure, taps
from llama3np.crosscheck.taps import Trace
from llama3np.crosscheck.trace import record
from llama3np.llm import Llama

PROFILES = ("float32", "bf16-hf", "bf16-meta", "f16-hf")
STORED = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}

# text of model.py -> its wrong form, and the first tap that shows it
BUGS = {
    "eps": ("True) + eps)", "True) + eps + 0.1)", "attn_norm"),
    "q negated": ("ops.linear(x_BTD, layer.wq)", "-ops.linear(x_BTD, layer.wq)", "q"),
    "v from the stream": ("ops.linear(x_BTD, layer.wv)", "ops.linear(h_BTD, layer.wv)", "v"),
    "position off by one": (
        "positions_BT[:, :, None].a",
        "(1 + positions_BT[:, :, None]).a",
        "q_rope",
    ),
    "k not turned": ("turn(k_BTKH)", "k_BTKH", "k_rope"),
    "no scale": (" * H**-0.5", " * 1", "scores"),
    "no mask": ("xp.arange(S) <= ", "xp.arange(S) <= S + 0 * ", "scores"),
    "mask off by one": ("xp.arange(S) <= ", "xp.arange(S) <= 1 + ", "scores"),
    "softmax over queries": ("powers_BKGTS.sum(axis=-1", "powers_BKGTS.sum(axis=-2", "probs"),
    "residual lost": ('"h_mid", h_BTD + ', '"h_mid", x_BTD + ', "h_mid"),
    "the other norm": ("layer.mlp_norm_D", "layer.attn_norm_D", "mlp_norm"),
    "up for gate": ("swiglu(gate_BTF, up_BTF))", "swiglu(up_BTF, gate_BTF))", "act"),
    "stream of before": ("h_mid_BTD + see", "h_BTD + see", "h"),
    "final norm twice": ("params.norm_D, c", "params.norm_D * params.norm_D, c", "norm"),
    "embedding as head": ("params.head_VD", "params.embed_VD", "logits"),
}


@st.composite
def subjects(draw, **fixed):
    """(model, ids) in which every tap's mistakes can be seen: a few layers, heads and positions."""
    config = draw(
        strategies.configs(
            **{
                "dim": draw(st.integers(5, 12)),
                "n_layers": draw(st.integers(1, 3)),
                "head_dim": draw(st.sampled_from([4, 6])),
                "ffn_dim": draw(st.integers(5, 12)),
                "vocab_size": draw(st.integers(6, 16)),
                "norm_eps": 1e-5,
                "tied": False,
                **fixed,
            }
        )
    )
    model = strategies.Model(config, draw(strategies.seeds))
    V = config.vocab_size
    return model, draw(st.lists(st.integers(0, V - 1), min_size=3, max_size=6, unique=True))


def run(model, ids, profile="float64", prefill=None):
    """A right trace, in memory."""
    llm = Llama(model.config, model.params, dtype=profile, engine="numpy", threads=1)
    return record(llm, ids, prefill)


def reference(model, ids, prefill=None, profile="float64"):
    """A right trace with the measured errors of every profile in its metadata."""
    truth = run(model, ids, prefill=prefill)
    budgets = {name: errors(run(model, ids, name, prefill), truth) for name in PROFILES}
    shown = truth if profile == "float64" else run(model, ids, profile, prefill)
    return shown._replace(meta=shown.meta | {"budgets": budgets})


def errors(found, truth):
    """How far one trace is from another, each tap's error at least that of those before it."""
    far, root, budget = 0.0, 0.0, {}
    for name, expected in truth.arrays.items():
        size = np.abs(expected[np.isfinite(expected)]).max()
        far = max(far, measure.max_abs(found.arrays[name], expected) / size)
        root = max(root, measure.nmse(found.arrays[name], expected))
        budget[name] = {"max_abs": far * size, "nmse": root}
    return budget


def wrong(model, ids, bug, dtype="float64"):
    """The arrays of a forward pass with a mistake in it."""
    old, new, _ = BUGS[bug]
    text = inspect.getsource(spec)
    assert text.count(old) == 1, f"{bug}: the spec has {text.count(old)} times {old!r}"
    module = types.ModuleType("wrong")
    exec(compile(text.replace(old, new), "wrong", "exec"), module.__dict__)
    arrays, config = {}, model.config
    cache = new_cache(config, 1, len(ids), np.dtype(dtype))
    with np.errstate(all="ignore"):
        module.forward(
            model.params,
            config,
            np.array([ids]),
            cache,
            dtype=dtype,
            tap=lambda name, array: arrays.__setitem__(name, np.array(array[0])),
            last_only=False,
        )
    return Trace(arrays, {})


# ---- the same numbers in other names, shapes and orders ------------------------------------------


def halves(array):
    """RoPE pairs in halves, as Hugging Face's files have them."""
    return np.concatenate([array[..., 0::2], array[..., 1::2]], axis=-1)


def huggingface(trace, batch=True):
    """As hooks on transformers show it."""
    arrays = {}
    for name, array in trace.arrays.items():
        layer, kind = taps.parse(name)
        theirs, shown = HUGGING_FACE[kind].format(i=layer), array
        if kind in ("q", "k", "q_rope", "k_rope"):
            shown = halves(shown)
        if kind in ("q_rope", "k_rope"):
            shown = shown.swapaxes(0, 1)
        if kind in ("q", "k", "v", "attn"):
            shown = shown.reshape(len(shown), -1)
        arrays[theirs] = shown[None] if batch else shown
    return Trace(arrays, {})


HUGGING_FACE = {
    "embed": "model.embed_tokens",
    "attn_norm": "model.layers.{i}.input_layernorm.output",
    "q": "model.layers.{i}.self_attn.q_proj",
    "k": "model.layers.{i}.self_attn.k_proj.output",
    "v": "model.layers.{i}.self_attn.v_proj",
    "q_rope": "model.layers.{i}.self_attn.q_rope",
    "k_rope": "model.layers.{i}.self_attn.k_rope",
    "scores": "model.layers.{i}.self_attn.scores",
    "probs": "model.layers.{i}.self_attn.probs",
    "attn": "model.layers.{i}.self_attn.o_proj.input",
    "attn_out": "model.layers.{i}.self_attn.o_proj.output",
    "h_mid": "model.layers.{i}.post_attention_layernorm.input",
    "mlp_norm": "model.layers.{i}.post_attention_layernorm.output",
    "gate": "model.layers.{i}.mlp.gate_proj",
    "up": "model.layers.{i}.mlp.up_proj",
    "act": "model.layers.{i}.mlp.down_proj.input",
    "mlp_out": "model.layers.{i}.mlp.down_proj.output",
    "h": "model.layers.{i}.output",
    "norm": "model.norm",
    "logits": "lm_head",
}


def llama_cpp(trace, config, pad=3):
    """As llama.cpp's nodes show it: more keys than positions, scores before scale and mask."""
    arrays = {}
    for name, array in trace.arrays.items():
        layer, kind = taps.parse(name)
        shown = array
        if kind == "scores":
            seen = np.where(np.isfinite(array), array * config.head_dim**0.5, 0.25)
            shown = np.pad(seen, ((0, 0), (0, 0), (0, pad)), constant_values=7)
        if kind == "probs":
            shown = np.pad(array, ((0, 0), (0, 0), (0, pad)))
        if kind in ("q", "k", "attn"):
            shown = array.reshape(len(array), -1)
        arrays[LLAMA_CPP[kind].format(i=layer)] = shown
    return Trace(arrays, {})


LLAMA_CPP = {
    "embed": "inp_embd",
    "attn_norm": "attn_norm-{i}",
    "q": "Qcur-{i}",
    "k": "Kcur-{i}",
    "v": "Vcur-{i}",
    "q_rope": "Qcur_rope-{i}",
    "k_rope": "Kcur_rope-{i}",
    "scores": "kq-{i}",
    "probs": "kq_soft_max-{i}",
    "attn": "kqv_out-{i}",
    "attn_out": "attn_out-{i}",
    "h_mid": "ffn_inp-{i}",
    "mlp_norm": "ffn_norm-{i}",
    "gate": "ffn_gate-{i}",
    "up": "ffn_up-{i}",
    "act": "ffn_swiglu-{i}",
    "mlp_out": "ffn_out-{i}",
    "h": "l_out-{i}",
    "norm": "result_norm",
    "logits": "result_output",
}


def stored(trace, dtype):
    """The numbers rounded to a dtype once, as a file may keep them."""
    with np.errstate(over="ignore"):
        return Trace({name: a.astype(dtype) for name, a in trace.arrays.items()}, {})


EXAMPLE = strategies.Model(
    Config(dim=10, n_layers=2, n_heads=6, n_kv_heads=2, head_dim=4, ffn_dim=9, vocab_size=13), 5
)

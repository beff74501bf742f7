"""One table of tensor names, ours <-> Meta <-> Hugging Face <-> GGUF, and the order of q/k rows.

No other module knows a foreign tensor name. Ours are those of params.named_shapes.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np

from llama3np.config import PAIRINGS, Config
from llama3np.errors import CheckpointError, InputError
from llama3np.kernels import Blocks
from llama3np.load.lazy import Rows
from llama3np.params import Params, named_shapes

Shape = tuple[int, ...]
Reorder = Callable[[np.ndarray, int], np.ndarray]  # to_half or to_interleaved


class Row(NamedTuple):
    """One tensor's name in every layout; the others append ".weight" to it."""

    ours: str
    meta: str
    huggingface: str
    gguf: str


OF_MODEL = (
    Row("embed_VD", "tok_embeddings", "model.embed_tokens", "token_embd"),
    Row("norm_D", "norm", "model.norm", "output_norm"),
    Row("head_VD", "output", "lm_head", "output"),
)
LAYER_PREFIX = Row("layers.{i}.", "layers.{i}.", "model.layers.{i}.", "blk.{i}.")
OF_LAYER = (
    Row("attn_norm_D", "attention_norm", "input_layernorm", "attn_norm"),
    Row("wq", "attention.wq", "self_attn.q_proj", "attn_q"),
    Row("wk", "attention.wk", "self_attn.k_proj", "attn_k"),
    Row("wv", "attention.wv", "self_attn.v_proj", "attn_v"),
    Row("wo", "attention.wo", "self_attn.o_proj", "attn_output"),
    Row("mlp_norm_D", "ffn_norm", "post_attention_layernorm", "ffn_norm"),
    Row("w_gate", "feed_forward.w1", "mlp.gate_proj", "ffn_gate"),
    Row("w_up", "feed_forward.w3", "mlp.up_proj", "ffn_up"),
    Row("w_down", "feed_forward.w2", "mlp.down_proj", "ffn_down"),
)

# Tensors that say nothing the config does not: tables computed from theta.
TOLERATED = {
    "meta": re.compile(r"rope\.freqs"),
    "huggingface": re.compile(r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq"),
    "gguf": re.compile(r"rope_freqs\.weight"),  # read by load/gguf.py, into Config.rope_scaling
}
GGUF_ROPE_DIVISORS = "rope_freqs.weight"

_ROWS = {row.ours: row for row in OF_MODEL + OF_LAYER}


def foreign(ours: str, layout: str) -> str:
    """Our name -> the name in layout "meta", "huggingface" or "gguf".

    "layers.3.wq" -> "blk.3.attn_q.weight". Raises KeyError for what is no name of ours.
    """
    prefix, _, field = ours.rpartition(".")
    name = getattr(_ROWS[field], layout)
    if prefix:
        name = getattr(LAYER_PREFIX, layout).format(i=prefix.removeprefix("layers.")) + name
    return name + ".weight"


def matched(found: Mapping[str, Shape], config: Config, layout: str, source: str) -> dict[str, str]:
    """Our name -> the file's name of every tensor, once the file has exactly what `config` asks.

    `found` gives the shape of each tensor in the file. Raises CheckpointError, naming the tensors,
    for absent ones, extra ones (those of TOLERATED are not), and wrong shapes.
    """
    if config.n_layers > len(found):  # also keeps a senseless count from building a huge table
        raise CheckpointError(
            f"{source}: expected {config.n_layers} layers, found {len(found)} tensors in all"
        )
    ours_shapes = named_shapes(config)
    names = {ours: foreign(ours, layout) for ours in ours_shapes}
    expected = {names[ours]: shape for ours, shape in ours_shapes.items()}
    extra = (n for n in found if n not in expected and not TOLERATED[layout].fullmatch(n))
    _refuse(source, "tensors are missing", (n for n in expected if n not in found))
    _refuse(source, "tensors have no place in this Llama model", extra)
    wrong = (n for n, shape in expected.items() if tuple(found[n]) != shape)
    _refuse(
        source,
        "tensors have a wrong shape",
        (f"{n} (expected {expected[n]}, found {tuple(found[n])})" for n in wrong),
    )
    return names


def _refuse(source: str, what: str, culprits: Iterable[str]) -> None:
    some = list(culprits)
    if some:
        first = ", ".join(ascii(name)[1:-1] for name in some[:3])
        more = f" and {len(some) - 3} more" if len(some) > 3 else ""
        raise CheckpointError(f"{source}: {len(some)} {what}: {first}{more}")


# ---- the order of the rows of wq and wk ------------------------------------------------------

# RoPE turns pairs of a head's H numbers. Meta and GGUF store the two of a pair side by side
# (interleaved: 0 and 1, 2 and 3, ...), Hugging Face stores all firsts, then all seconds (half:
# 0 and H/2, 1 and H/2 + 1, ...). One is the other with each head's rows permuted. wk has K heads,
# not N: with N in its place the permutation runs across heads, and shows only after some tokens.


def to_half(w: np.ndarray, n_heads: int) -> np.ndarray:
    """Reorder interleaved rows to half; w is (n_heads * H, D), or any array of so many rows."""
    return w.reshape(n_heads, -1, 2, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def to_interleaved(w: np.ndarray, n_heads: int) -> np.ndarray:
    """Reorder half rows to interleaved: the inverse of to_half."""
    return w.reshape(n_heads, 2, -1, *w.shape[1:]).swapaxes(1, 2).reshape(w.shape)


def with_pairing(config: Config, params: Params, pairing: str) -> tuple[Config, Params]:
    """The same model with the rows of wq and wk in the other order (copied), or as it is."""
    if pairing not in PAIRINGS:
        raise InputError(f"pairing: expected one of {PAIRINGS}, found {pairing!r}")
    if pairing == config.rope_pairing:
        return config, params
    reorder = to_half if pairing == "half" else to_interleaved
    layers = tuple(
        layer._replace(
            wq=_reordered(layer.wq, config.n_heads, reorder),
            wk=_reordered(layer.wk, config.n_kv_heads, reorder),
        )
        for layer in params.layers
    )
    return replace(config, rope_pairing=pairing), params._replace(layers=layers)


def _reordered(w: Any, n_heads: int, reorder: Reorder) -> Any:
    if isinstance(w, Blocks):  # which lie along the rows: a row's bytes are its own
        return Blocks(w.type, reorder(w.stored, n_heads))
    return reorder(np.asarray(w), n_heads)


def turned(w: Any, n_heads: int, reorder: Reorder) -> Rows:
    """The matrix wq or wk with its rows in the other order, made as they are asked for.

    Neither order leaves a head: whole heads are read.
    """
    head_dim = w.shape[0] // n_heads

    def make(start: int, stop: int) -> np.ndarray:
        first, last = start // head_dim, -(-stop // head_dim)
        heads = reorder(np.asarray(w[first * head_dim : last * head_dim]), last - first)
        return heads[start - first * head_dim : stop - first * head_dim]

    return Rows(tuple(w.shape), w.dtype, make)

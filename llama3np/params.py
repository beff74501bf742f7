"""The weights as a tree of arrays, the table of their shapes, and a check against it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

from llama3np.config import Config
from llama3np.errors import InputError

# A weight is a plain array or a stored format of kernels/: anything with a shape and a dtype
# that x @ w.T accepts (and, for the embedding table, w[ids]).
Weight = Any
DTYPES = ("float32", "float16", "bfloat16", "float64")


class Layer(NamedTuple):
    """One block. Matrices are (out, in), as the checkpoint stores them."""

    attn_norm_D: Any
    wq: Weight
    wk: Weight
    wv: Weight
    wo: Weight
    mlp_norm_D: Any
    w_gate: Weight
    w_up: Weight
    w_down: Weight


class Params(NamedTuple):
    """The whole model. head_VD is the very object embed_VD when the two are tied."""

    embed_VD: Weight
    layers: tuple[Layer, ...]
    norm_D: Any
    head_VD: Weight


def layer_shapes(config: Config) -> Layer:
    """The shape of every tensor of one block, in a Layer of tuples."""
    D, F, H = config.dim, config.ffn_dim, config.head_dim
    NH, KH = config.n_heads * H, config.n_kv_heads * H
    return Layer((D,), (NH, D), (KH, D), (KH, D), (D, NH), (D,), (F, D), (F, D), (D, F))


def named_shapes(config: Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape of every tensor, in the order of the forward pass.

    The names are the fields of Params and Layer: "embed_VD", "layers.0.wq", ..., "norm_D", and
    "head_VD" unless it is tied.
    """
    V, D = config.vocab_size, config.dim
    shapes: dict[str, tuple[int, ...]] = {"embed_VD": (V, D)}
    for i in range(config.n_layers):
        for field, shape in layer_shapes(config)._asdict().items():
            shapes[f"layers.{i}.{field}"] = shape
    shapes["norm_D"] = (D,)
    if not config.tied:
        shapes["head_VD"] = (V, D)
    return shapes


def named(params: Params, tied: bool) -> dict[str, Weight]:
    """Name -> tensor, by the names of `named_shapes` and in its order."""
    tensors = {"embed_VD": params.embed_VD}
    for i, layer in enumerate(params.layers):
        tensors |= {f"layers.{i}.{field}": w for field, w in layer._asdict().items()}
    tensors["norm_D"] = params.norm_D
    return tensors if tied else tensors | {"head_VD": params.head_VD}


def from_named(tensors: dict[str, Weight], config: Config) -> Params:
    """The tree of named tensors: the inverse of `named`. Raises KeyError for a missing name."""
    layers = tuple(
        Layer(*(tensors[f"layers.{i}.{field}"] for field in Layer._fields))
        for i in range(config.n_layers)
    )
    embed_VD = tensors["embed_VD"]
    head_VD = embed_VD if config.tied else tensors["head_VD"]
    return Params(embed_VD, layers, tensors["norm_D"], head_VD)


def mapped(params: Params, change: Callable[[Weight], Weight]) -> Params:
    """The tree with every tensor changed; a tied head stays the embedding table itself."""
    embed_VD = change(params.embed_VD)
    head_VD = embed_VD if params.head_VD is params.embed_VD else change(params.head_VD)
    layers = tuple(Layer(*map(change, layer)) for layer in params.layers)
    return Params(embed_VD, layers, change(params.norm_D), head_VD)


def check(params: Params, config: Config) -> None:
    """Compare every tensor with the table of shapes, and its dtype with those that multiply.

    Raises InputError at the first difference.
    """
    if len(params.layers) != config.n_layers:
        raise InputError(f"params: expected {config.n_layers} layers, found {len(params.layers)}")
    if config.tied and params.head_VD is not params.embed_VD:
        raise InputError("params: head_VD is tied, but is not the embedding table itself")
    tensors = named(params, config.tied)
    for name, shape in named_shapes(config).items():
        found = tuple(tensors[name].shape)
        if found != shape:
            raise InputError(f"params: {name}: expected shape {shape}, found {found}")
        if str(tensors[name].dtype) not in DTYPES:
            expected = ", ".join(DTYPES)
            raise InputError(
                f"params: {name}: expected dtype {expected}, found {tensors[name].dtype}"
            )


def random(config: Config, rng: np.random.Generator, dtype: Any = np.float32) -> Params:
    """Random weights of the right shapes: matrices of variance 1/in, norms near 1.

    The scale keeps activations of order 1 at any depth, so a test on them can see an error.
    """
    tensors = {}
    for name, shape in named_shapes(config).items():
        noise = rng.standard_normal(shape, dtype=np.float32)
        scaled = 1 + 0.1 * noise if len(shape) == 1 else noise / np.sqrt(np.float32(shape[1]))
        tensors[name] = scaled.astype(dtype)
    return from_named(tensors, config)

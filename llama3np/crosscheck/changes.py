"""Mutations of the config, the weights, the order of the layers and the ids: see mutations.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np

from llama3np.config import Config, RopeScaling
from llama3np.crosscheck.mutations import Case, Mutation, Setting, configured, relayered
from llama3np.load.names import to_half, to_interleaved
from llama3np.params import Layer, mapped

# ---- the config ----------------------------------------------------------------------------------


def other_pairing(config: Config) -> Config:
    """The pairing that this checkpoint's rows are not made for."""
    return replace(
        config, rope_pairing="half" if config.rope_pairing == "interleaved" else "interleaved"
    )


def theta(value: float) -> Mutation:
    """Another base of the angles."""
    return configured(
        f"theta-{value:.0f}",
        f"RoPE's theta is {value:.0f}, which is not this checkpoint's",
        lambda config: replace(config, rope_theta=value),
    )


def eps(value: float, name: str) -> Mutation:
    """Another epsilon of the norms."""
    return configured(
        f"eps-{name}",
        f"RMSNorm's epsilon is {name}, which is not this checkpoint's",
        lambda config: replace(config, norm_eps=value),
    )


def factor(value: float, of: str) -> Mutation:
    """Another factor of the llama3 scaling, where there is one."""

    def change(config: Config) -> Config | None:
        if config.rope_scaling is None:
            return None
        return replace(config, rope_scaling=replace(config.rope_scaling, factor=value))

    return configured(
        f"rope-factor-{value:.0f}",
        f"RoPE's scaling has the factor {value:.0f} ({of}), which is not this checkpoint's",
        change,
    )


def scaling_added(run: Setting) -> Iterator[Case]:
    """The scaling of Llama 3.1 or 3.2 where there is none."""
    if run.config.rope_scaling is None:
        for value in (8.0, 32.0):
            scaling = RopeScaling(value, 1.0, 4.0, 8192)
            yield (
                f"factor {value:.0f}",
                run._replace(config=replace(run.config, rope_scaling=scaling)),
            )


CONFIG = (
    configured(
        "rope-pairing-swapped",
        "RoPE pairs (i, i + H/2) where this checkpoint pairs (2i, 2i + 1), or the reverse",
        other_pairing,
    ),
    theta(10000.0),
    theta(500000.0),
    configured(
        "rope-scaling-absent",
        "RoPE's scaling (llama3) of this checkpoint is not applied",
        lambda config: replace(config, rope_scaling=None),
    ),
    factor(8.0, "of 3.1 and 3.3"),
    factor(32.0, "of 3.2"),
    Mutation(
        "rope-scaling-added",
        "RoPE's scaling of Llama 3.1 or 3.2 is applied to a checkpoint that has none",
        scaling_added,
    ),
    eps(1e-6, "1e-6"),
    eps(1e-5, "1e-5"),
    eps(0.0, "0"),
)

# ---- the weights ---------------------------------------------------------------------------------


def reweighed(run: Setting, **changes: Callable[[np.ndarray], np.ndarray]) -> Setting:
    """The run with some matrices of every layer changed, by their field."""

    def changed(layer: Layer) -> Layer:
        return layer._replace(
            **{
                field: change(np.asarray(getattr(layer, field)))
                for field, change in changes.items()
            }
        )

    return run._replace(params=relayered(run.params, run.params.layers, changed))


def misread(w: np.ndarray) -> np.ndarray:
    """The same memory read column by column; of a square matrix this is the transpose."""
    return np.ascontiguousarray(w.reshape(w.shape[::-1]).T)


def transposed(*fields: str) -> Callable[[Setting], Iterable[Case]]:
    """Some matrices read column by column."""
    return lambda run: [("", reweighed(run, **dict.fromkeys(fields, misread)))]


def permuted(run: Setting, back: bool) -> Setting:
    """Rows of wq and wk moved to the other pairing's order, or the other way; RoPE's pairs stay."""
    config = run.config
    forth = to_half if (config.rope_pairing == "interleaved") != back else to_interleaved
    return reweighed(
        run,
        wq=lambda w: forth(w, config.n_heads),
        wk=lambda w: forth(w, config.n_kv_heads),
    )


def k_permuted(run: Setting) -> Iterator[Case]:
    """A right conversion to the other pairing, but for wk's number of heads."""
    config, N = run.config, run.config.n_heads
    if config.group == 1 or (config.n_kv_heads * config.head_dim) % (2 * N):
        return
    move = to_half if config.rope_pairing == "interleaved" else to_interleaved
    moved = reweighed(run, wq=lambda w: move(w, N), wk=lambda w: move(w, N))
    yield "", moved._replace(config=other_pairing(config))


def swapped(one: str, other: str) -> Callable[[Setting], Iterable[Case]]:
    """Two matrices of one shape in each other's place."""

    def change(layer: Layer) -> Layer:
        return layer._replace(**{one: getattr(layer, other), other: getattr(layer, one)})

    def cases(run: Setting) -> Iterator[Case]:
        yield "", run._replace(params=relayered(run.params, run.params.layers, change))

    return cases


def merged_wrong(w: np.ndarray, n: int, axis: int) -> np.ndarray:
    """N shards, cut along an axis, put together along the other; the memory then has w's shape."""
    return np.concatenate(np.split(w, n, axis), axis=1 - axis).reshape(w.shape)


def shards(run: Setting) -> Iterator[Case]:
    """What is cut along its input axis, merged along the output axis."""
    sizes = {"wo": run.config.n_heads * run.config.head_dim, "w_down": run.config.ffn_dim}
    for fields in (("wo",), ("w_down",), ("wo", "w_down")):
        for n in (2, 4, 8):
            if all(sizes[field] % n == 0 for field in fields):
                change = {field: lambda w, n=n: merged_wrong(w, n, 1) for field in fields}
                yield f"{' and '.join(fields)} of {n} shards", reweighed(run, **change)


def embedding_shards(run: Setting) -> Iterator[Case]:
    """Tables cut by rows or columns, and ways to look ids up wrongly."""
    (V, D), w, ids_T = run.params.embed_VD.shape, run.params.embed_VD, np.array(run.ids)
    for n in (2, 4, 8):
        if V % n == 0:
            shard_T, row_T = np.divmod(ids_T, V // n)
            yield f"{n} shards, each id in the first", embedded(run, w[row_T])
            other_T = (n - 1 - shard_T) * (V // n) + row_T
            yield f"{n} shards in reverse order", embedded(run, w[other_T])
        if D % n == 0:  # of n * V rows of D/n columns, n are read as one row
            part_TN = ids_T[:, None] * n + np.arange(n)
            parts_TNND = w[part_TN % V].reshape(len(ids_T), n, n, D // n)
            mixed_TND = np.take_along_axis(parts_TNND, (part_TN // V)[:, :, None, None], axis=2)
            form = f"{n} shards of columns, merged by rows"
            yield form, embedded(run, mixed_TND.reshape(len(ids_T), D))


def embedded(run: Setting, rows_TD: np.ndarray) -> Setting:
    """The run with other rows looked up for its ids; the head stays."""
    embed_VD = np.zeros(run.params.embed_VD.shape, rows_TD.dtype)  # untouched pages cost nothing
    embed_VD[list(run.ids)] = rows_TD
    return run._replace(params=run.params._replace(embed_VD=embed_VD))


def head_tied(run: Setting) -> Iterator[Case]:
    """The embedding in place of the head."""
    if not run.config.tied:
        yield "", run._replace(params=run.params._replace(head_VD=run.params.embed_VD))


def head_untied(run: Setting) -> Iterator[Case]:
    """A head of its own that no file fills."""
    if run.config.tied:
        zeros_VD = np.zeros(run.params.embed_VD.shape, np.float32)
        yield "", run._replace(params=run.params._replace(head_VD=zeros_VD))


def rounded(to: Callable[[np.ndarray], np.ndarray]) -> Callable[[Setting], Iterable[Case]]:
    """Every weight in fewer bits, computed with as before."""

    def change(w: Any) -> np.ndarray:
        wide = np.asarray(w)
        return to(wide.astype(np.float32)).astype(wide.dtype)

    def cases(run: Setting) -> Iterator[Case]:
        rest = mapped(run.params._replace(layers=()), change)
        params = relayered(rest, run.params.layers, lambda layer: Layer(*map(change, layer)))
        yield "", run._replace(params=params)

    return cases


def cut_bits(wide: np.ndarray) -> np.ndarray:
    """The upper 16 bits of float32: bfloat16 by truncation."""
    return (wide.view(np.uint32) & np.uint32(0xFFFF0000)).view(np.float32)


WEIGHTS = (
    Mutation(
        "qk-permuted",
        "Rows of wq and wk are in the other pairing's order (a conversion), RoPE's pairs are not",
        lambda run: [("", permuted(run, back=False))],
    ),
    Mutation(
        "qk-permuted-back",
        "Rows of wq and wk went through the inverse of the right permutation",
        lambda run: [("", permuted(run, back=True))],
    ),
    Mutation(
        "k-permuted-as-q",
        "wk was permuted to the other pairing with the query heads' number, which is not its own",
        k_permuted,
    ),
    Mutation("q-transposed", "wq is transposed: read column by column", transposed("wq")),
    Mutation("k-transposed", "wk is transposed: read column by column", transposed("wk")),
    Mutation("qk-transposed", "wq and wk are transposed", transposed("wq", "wk")),
    Mutation("wk-wv-swapped", "wk and wv are in each other's place", swapped("wk", "wv")),
    Mutation(
        "w-gate-up-swapped",
        "w_gate and w_up (w1 and w3) are in each other's place",
        swapped("w_gate", "w_up"),
    ),
    Mutation(
        "head-tied", "The embedding is used for the head; this checkpoint has both", head_tied
    ),
    Mutation(
        "head-untied",
        "The head is left at zeros, where this checkpoint's head is the embedding",
        head_untied,
    ),
    Mutation(
        "shard-axis",
        "Shards of a matrix (wo, w_down) are merged along the wrong axis",
        shards,
    ),
    Mutation(
        "embedding-shard-rows",
        "A sharded embedding gives the rows of other tokens",
        embedding_shards,
    ),
    Mutation(
        "weights-truncated",
        "Weights are cut to bfloat16, where they are rounded to the nearest or left alone",
        rounded(cut_bits),
    ),
    Mutation(
        "weights-bf16",
        "Weights are rounded to bfloat16, and multiplied in float32",
        rounded(lambda wide: wide.astype(ml_dtypes.bfloat16)),
    ),
    Mutation(
        "weights-f16",
        "Weights are rounded to float16, and multiplied in float32",
        rounded(lambda wide: wide.astype(np.float16)),
    ),
)

# ---- the layers, the ids -------------------------------------------------------------------------


def ordered(run: Setting, where: str, order: tuple[int, ...], by_weight: bool) -> Iterator[Case]:
    """Layers in another order; their taps called by their weights, by their step, or either."""
    if by_weight:
        yield where, run._replace(order=order, called=order)
    if order != tuple(range(len(order))):
        yield where, run._replace(order=order, called=tuple(range(len(order))))


def skipped(run: Setting) -> Iterator[Case]:
    """Every layer but one, for each."""
    layers = tuple(range(run.config.n_layers))
    for i in layers if run.order is None and len(layers) > 1 else ():
        yield from ordered(run, f"layer {i}", layers[:i] + layers[i + 1 :], True)


def repeated(run: Setting) -> Iterator[Case]:
    """One layer twice, for each."""
    layers = tuple(range(run.config.n_layers))
    for i in layers if run.order is None else ():
        yield from ordered(run, f"layer {i}", layers[: i + 1] + layers[i:], True)


def lexicographic(run: Setting) -> Iterator[Case]:
    """0, 1, 10, 11, ..., 2, 20, ...: the order of names."""
    order = tuple(sorted(range(run.config.n_layers), key=str))
    if run.order is None and len(order) > 10:
        yield from ordered(run, "", order, False)


def bos_missing(run: Setting) -> Iterator[Case]:
    """The ids from the second one on."""
    if len(run.ids) > 1 and run.bos_id in (None, run.ids[0]):
        yield "", run._replace(ids=run.ids[1:], prefill=max(run.prefill - 1, 1))


def bos_doubled(run: Setting) -> Iterator[Case]:
    """One BOS more than there should be."""
    bos = run.ids[0] if run.bos_id is None else run.bos_id
    yield "", run._replace(ids=(bos, *run.ids), prefill=run.prefill + 1)


ORDER = (
    Mutation("layer-skipped", "One of the layers is skipped", skipped),
    Mutation("layer-repeated", "One of the layers is run twice", repeated),
    Mutation(
        "layers-lexicographic",
        "Layers run in the order of their names: 0, 1, 10, 11, ..., 2, 20, ...",
        lexicographic,
    ),
    Mutation("bos-missing", "The beginning-of-sequence token is missing", bos_missing),
    Mutation("bos-doubled", "The beginning-of-sequence token stands there twice", bos_doubled),
)

TABLE = (*CONFIG, *WEIGHTS, *ORDER)

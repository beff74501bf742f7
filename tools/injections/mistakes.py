"""The list of the mistakes, each made in a running transformers model: what ports do wrong.

Written from what a mistake means, in torch; nothing here looks at how llama3np models it. A
mistake is a function that is given a Port and spoils it.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from torch import nn

from injections import attention, rope, stream, weights
from injections.parts import rows_of_halves, rows_of_meta
from injections.port import Port


class Mistake(NamedTuple):
    """What is done to a port, in which models, and whether tokens have to be decoded to see it."""

    make: Callable[[Port], None]
    models: tuple[str, ...] = ("stories260k", "made-up-8")
    decode: bool = False
    dtype: str = "float32"


SCALED_8, SCALED_32 = ("made-up-8",), ("made-up-32",)
REAL = ("stories260k", "smollm2")
OTHERS = ("made-up-8", "smollm2")
ALL = ("stories260k", "made-up-8", "smollm2")

ATTN, MLP = "self_attn.", "mlp."

# By the id that `llama3np diagnose` has for it; after "/" one of several ways to make it.
MISTAKES = {
    "rope-pairing-swapped": Mistake(rope.pairs_of_neighbours, ALL),
    "theta-10000": Mistake(partial(rope.rope_config, rope_theta=1e4), ("smollm2", "made-up-8")),
    "theta-500000": Mistake(partial(rope.rope_config, rope_theta=5e5), REAL),
    "rope-scaling-absent": Mistake(rope.scaling_absent, SCALED_8 + SCALED_32),
    "rope-scaling-added": Mistake(rope.scaling_added, REAL),
    "rope-scaling-linear": Mistake(rope.scaling_linear, ("stories260k", *SCALED_8, *SCALED_32)),
    "rope-factor-8": Mistake(partial(rope.rope_config, factor=8.0), SCALED_32),
    "rope-factor-32": Mistake(partial(rope.rope_config, factor=32.0), SCALED_8),
    "angles-bf16": Mistake(rope.angles_bf16),
    "rope-tables-bf16": Mistake(partial(rope.tables_changed, change=rope.tables_bf16)),
    "rope-backwards": Mistake(partial(rope.tables_changed, change=lambda cos, sin: (cos, -sin))),
    "positions-from-one": Mistake(partial(rope.positions, changed=lambda p, _: p + 1)),
    "positions-restart-at-decode/once": Mistake(
        partial(rope.positions, changed=rope.restarted), ALL, decode=True
    ),
    "positions-restart-at-decode/always": Mistake(
        partial(rope.positions, changed=rope.always_0), decode=True
    ),
    "positions-off-by-one-at-decode": Mistake(
        partial(rope.positions, changed=rope.one_too_far), decode=True
    ),
    "rope-missing": Mistake(partial(rope.rope_changed, change=lambda tq, tk, q, k: (q, k))),
    "rope-only-on-q": Mistake(partial(rope.rope_changed, change=lambda tq, tk, q, k: (tq, k))),
    "rope-only-on-k": Mistake(partial(rope.rope_changed, change=lambda tq, tk, q, k: (q, tk))),
    "rope-on-v": Mistake(rope.rope_on_v),
    "rope-twice-on-cached-keys": Mistake(rope.rope_after_caching_again),
    "eps-1e-6": Mistake(partial(stream.eps, value=1e-6), ALL),
    "eps-1e-5": Mistake(partial(stream.eps, value=1e-5), SCALED_32),
    "eps-0": Mistake(partial(stream.eps, value=0.0)),
    "norm-weight-before-cast": Mistake(
        partial(stream.norm_forward, weighted=stream.weight_before_cast), ALL, dtype="bfloat16"
    ),
    "norm-weight-missing": Mistake(partial(stream.norm_forward, weighted=stream.weight_missing)),
    "norm-weight-plus-one": Mistake(partial(stream.norm_forward, weighted=stream.weight_plus_one)),
    "f16-overflow": Mistake(stream.norm_squares_f16, ("smollm2",), dtype="float16"),
    "final-norm-missing": Mistake(stream.final_norm_missing, ALL),
    "residual-from-norm/both": Mistake(
        partial(stream.residual, first=stream.normed, second=stream.normed)
    ),
    "residual-from-norm/attention": Mistake(
        partial(stream.residual, first=stream.normed, second=stream.stream)
    ),
    "residual-missing/attention": Mistake(
        partial(stream.residual, first=stream.nothing, second=stream.stream)
    ),
    "residual-missing/mlp": Mistake(
        partial(stream.residual, first=stream.stream, second=stream.nothing)
    ),
    "scale-missing": Mistake(partial(attention.scale, factor=lambda H, D: 1.0)),
    # Not in stories260K: its D is H * H, so that both are the same number.
    "scale-by-width": Mistake(partial(attention.scale, factor=lambda H, D: D**-0.5), OTHERS),
    "scale-twice": Mistake(partial(attention.scale, factor=lambda H, D: 1 / H), OTHERS),
    "softmax-over-queries": Mistake(attention.softmax_axis),
    "mask-missing": Mistake(
        partial(attention.mask, visible=lambda query, key: query == query), ALL
    ),
    "mask-sees-next": Mistake(partial(attention.mask, visible=lambda query, key: key <= query + 1)),
    "mask-hides-self": Mistake(partial(attention.mask, visible=lambda query, key: key < query)),
    "mask-only-in-prefill": Mistake(attention.unmasked_static_cache, decode=True),
    "heads-tiled": Mistake(attention.heads_by_tile, ALL),
    "kv-swapped": Mistake(attention.k_v_mixed_up),
    "cache-hole/late": Mistake(partial(attention.slots, read=attention.late), ALL, decode=True),
    "cache-hole/lost": Mistake(partial(attention.slots, read=attention.lost), decode=True),
    "cache-overwritten": Mistake(partial(attention.slots, read=attention.early), ALL, decode=True),
    "cache-slot-stuck": Mistake(partial(attention.slots, read=attention.stuck), decode=True),
    "gate-up-swapped": Mistake(stream.gate_up_in_code, ALL),
    "gelu-exact": Mistake(partial(stream.activation, function=nn.GELU())),
    "gelu-tanh": Mistake(partial(stream.activation, function=nn.GELU("tanh"))),
    "relu": Mistake(partial(stream.activation, function=nn.ReLU())),
    "qk-permuted": Mistake(partial(weights.permuted, order=rows_of_meta), ALL),
    # The numbers of another pairing, but for where they stand in a head: the pairs are the same.
    "qk-permuted-back": Mistake(partial(weights.permuted, order=rows_of_halves)),
    "k-permuted-as-q": Mistake(weights.k_permuted_as_q, ("stories260k", "made-up-8")),
    "q-transposed": Mistake(
        partial(weights.reshaped, names=[ATTN + "q_proj"], change=weights.column_by_column)
    ),
    "k-transposed": Mistake(
        partial(weights.reshaped, names=[ATTN + "k_proj"], change=weights.column_by_column)
    ),
    "qk-transposed": Mistake(
        partial(
            weights.reshaped,
            names=[ATTN + "q_proj", ATTN + "k_proj"],
            change=weights.column_by_column,
        )
    ),
    "wk-wv-swapped": Mistake(
        partial(weights.swapped, part="self_attn", one="k_proj", other="v_proj")
    ),
    "w-gate-up-swapped": Mistake(
        partial(weights.swapped, part="mlp", one="gate_proj", other="up_proj")
    ),
    "head-tied": Mistake(weights.head_tied, SCALED_8 + SCALED_32),
    "head-untied": Mistake(weights.head_empty, REAL),
    "embedding-scaled": Mistake(weights.embedding_scaled),
    "shard-axis/wo": Mistake(
        partial(weights.reshaped, names=[ATTN + "o_proj"], change=weights.merged_on_other_axis)
    ),
    "shard-axis/w_down": Mistake(
        partial(weights.reshaped, names=[MLP + "down_proj"], change=weights.merged_on_other_axis)
    ),
    "embedding-shard-rows/first": Mistake(
        partial(weights.looked_up, row=lambda ids, V: ids % (V // 2))
    ),
    "embedding-shard-rows/order": Mistake(
        partial(weights.looked_up, row=lambda ids, V: (ids + V // 2) % V)
    ),
    "embedding-shard-rows/columns": Mistake(weights.columns_as_rows),
    "bf16-truncated": Mistake(weights.results_cut, ALL, dtype="bfloat16"),
    "weights-truncated": Mistake(partial(weights.changed, change=weights.cut)),
    "weights-bf16": Mistake(partial(weights.changed, change=lambda w: w.bfloat16().float())),
    "weights-f16": Mistake(partial(weights.changed, change=lambda w: w.half().float())),
    "layer-skipped/last": Mistake(partial(weights.layers, order=lambda L: range(L - 1))),
    "layer-skipped/2": Mistake(
        partial(weights.layers, order=lambda L: [i for i in range(L) if i != 2]), ALL
    ),
    "layer-repeated": Mistake(partial(weights.layers, order=lambda L: [0, *range(L)])),
    "layers-lexicographic": Mistake(
        partial(weights.layers, order=lambda L: sorted(range(L), key=str)), ("smollm2", "made-up-8")
    ),
    "bos-missing": Mistake(weights.bos_missing, ALL),
    "bos-doubled": Mistake(weights.bos_doubled),
}

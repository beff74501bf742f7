"""The mistakes, each made in a running transformers model: what a port does when it gets it wrong.

Written from what a mistake means, in torch; nothing here looks at how llama3np models it.
A function takes a Port and spoils it; MISTAKES at the end is the list.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from transformers.cache_utils import DynamicCache

from injections.parts import (
    Cutting,
    additive_mask,
    attend,
    rows_of_halves,
    rows_of_meta,
    tables,
    turned,
    turned_neighbours,
)
from injections.port import Port

# ---- RoPE ----------------------------------------------------------------------------------------


def pairs_of_neighbours(port):
    def rope(q, k, cos, sin, **_):
        return turned_neighbours(q, cos, sin), turned_neighbours(k, cos, sin)

    port.replace(port.code, "apply_rotary_pos_emb", rope)


def rope_config(port, **changes):
    """Another theta, or another scaling: the tables are made from a changed config."""
    config = copy.deepcopy(port.config)
    config.rope_parameters = {**config.rope_parameters, **changes}
    port.model.rotary_emb = port.code.LlamaRotaryEmbedding(config)


def scaling_linear(port):
    """Every wavelength stretched by one factor, as long-context versions of Llama 2 do."""
    factor = port.config.rope_parameters.get("factor", 4.0)
    port.model.rotary_emb.inv_freq = plain_frequencies(port) / factor


def plain_frequencies(port):
    H, theta = port.config.head_dim, port.config.rope_parameters["rope_theta"]
    return 1.0 / theta ** (torch.arange(0, H, 2).float() / H)


def scaling_absent(port):
    port.model.rotary_emb.inv_freq = plain_frequencies(port)


def scaling_added(port):
    """The scaling of Llama 3.1 in a model that has none."""
    bounds = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    old = {"original_max_position_embeddings": 8192}
    rope_config(port, rope_type="llama3", factor=8.0, **bounds, **old)


def tables_changed(port, change):
    """change(cos, sin) of RoPE's tables."""
    port.wrap(
        port.model.rotary_emb, "forward", lambda make, *args, **kw: change(*make(*args, **kw))
    )


def tables_bf16(cos, sin):
    return cos.bfloat16().to(cos.dtype), sin.bfloat16().to(sin.dtype)


def angles_bf16(port):
    rotary = port.model.rotary_emb

    def forward(x, position_ids):
        angles = position_ids[..., None].bfloat16() * rotary.inv_freq.bfloat16()
        angles = torch.cat((angles, angles), dim=-1).float()
        return angles.cos().to(x.dtype), angles.sin().to(x.dtype)

    port.replace(rotary, "forward", forward)


def positions(port, changed):
    """changed(position_ids, prefill): the positions that RoPE is told."""
    port.wrap(
        port.model.rotary_emb,
        "forward",
        lambda original, x, position_ids: original(x, changed(position_ids, port.prefill)),
    )


def restarted(position_ids, prefill):
    """Decoding counts from 0 again, and goes on from there."""
    return torch.where(position_ids >= prefill, position_ids - prefill, position_ids)


def always_0(position_ids, prefill):
    """Each call counts its own tokens only."""
    return position_ids - position_ids[:, :1]


def one_too_far(position_ids, prefill):
    return position_ids + (position_ids >= prefill)


def rope_changed(port, change):
    """change(turned q, turned k, q, k): what attention is given."""
    port.wrap(
        port.code,
        "apply_rotary_pos_emb",
        lambda turn, q, k, cos, sin: change(*turn(q, k, cos, sin), q, k),
    )


def rope_on_v(port):
    """Values are turned as keys are, on their way into the cache."""

    def update(original, self, k, v, layer):
        start = self.get_seq_length(layer)
        cos_sin = tables(port.model, range(start, start + v.shape[2]), v.dtype)
        return original(self, k, turned(v, *cos_sin), layer)

    port.wrap(DynamicCache, "update", update)


def rope_after_caching_again(port):
    """Keys are turned when they are stored, and all of them again when they are read."""

    def update(original, self, k, v, layer):
        keys, values = original(self, k, v, layer)
        return turned(keys, *tables(port.model, range(keys.shape[2]), keys.dtype)), values

    port.wrap(DynamicCache, "update", update)


# ---- norms ---------------------------------------------------------------------------------------


def eps(port, value):
    for norm in port.norms:
        norm.variance_epsilon = value


def norm_forward(port, weighted):
    """RMSNorm with weighted(normed float32, weight, dtype) as its last step."""

    def forward(self, x):
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return weighted(wide * scale, self.weight, x.dtype)

    port.replace(port.code.LlamaRMSNorm, "forward", forward)


def weight_before_cast(normed, weight, dtype):
    return (normed * weight.float()).to(dtype)


def weight_missing(normed, weight, dtype):
    return normed.to(dtype)


def weight_plus_one(normed, weight, dtype):
    return (1 + weight) * normed.to(dtype)


def final_norm_missing(port):
    port.replace(port.model.norm, "forward", lambda x: x)


def residual(port, first, second):
    """first(stream, normed) and second(stream, normed): what a block's two sums start from."""

    def forward(self, hidden_states, **options):
        x = self.input_layernorm(hidden_states)
        mid = first(hidden_states, x) + self.self_attn(hidden_states=x, **options)[0]
        y = self.post_attention_layernorm(mid)
        return second(mid, y) + self.mlp(y)

    port.replace(port.code.LlamaDecoderLayer, "forward", forward)


def stream(stream, normed):
    return stream


def normed(stream, normed):
    return normed


def nothing(stream, normed):
    return 0


def norm_squares_f16(port):
    """RMSNorm without the step to float32: squares beyond 65504 are infinite."""

    def forward(self, x):
        variance = x.half().pow(2).mean(-1, keepdim=True)
        return self.weight * (x * torch.rsqrt(variance.float() + self.variance_epsilon)).to(x.dtype)

    port.replace(port.code.LlamaRMSNorm, "forward", forward)


# ---- attention -----------------------------------------------------------------------------------


def scale(port, factor):
    """factor(H, D) in place of 1/sqrt(H)."""
    for layer in port.layers:
        layer.self_attn.scaling = factor(port.config.head_dim, port.config.hidden_size)


def softmax_axis(port):
    port.replace(port.code, "eager_attention_forward", partial(attend, softmax_axis=-2))


def mask(port, visible):
    """visible(query position, key position) in place of key <= query."""

    def create(config, inputs_embeds, past_key_values=None, **_):
        T = inputs_embeds.shape[1]
        S = T + past_key_values.get_seq_length()
        return additive_mask(T, S, visible, inputs_embeds.dtype)

    port.replace(port.code, "create_causal_mask", create)


def heads_by_tile(port):
    """Query head n reads key head n % K, as np.tile gives, not n // G."""
    port.replace(port.code, "repeat_kv", lambda x, groups: x.repeat(1, groups, 1, 1))


# ---- the cache -----------------------------------------------------------------------------------


def slots(port, read):
    """read(all keys so far, prefill) in decode steps: the slots as a step finds them."""

    def update(original, self, k, v, layer):
        found = original(self, k, v, layer)
        decoding = found[0].shape[2] > port.prefill
        return tuple(read(x, port.prefill) for x in found) if decoding else found

    port.wrap(DynamicCache, "update", update)


def empty(x, n=1):
    """N slots that nobody wrote."""
    return x.new_zeros((*x.shape[:2], n, x.shape[3]))


def late(x, prefill):
    """Written one slot too late: a hole after the prompt, and the newest is out of sight."""
    return torch.cat((x[:, :, :prefill], empty(x), x[:, :, prefill:-1]), dim=2)


def lost(x, prefill):
    """The first decoded token's key and value are never written."""
    return torch.cat((x[:, :, :prefill], empty(x), x[:, :, prefill + 1 :]), dim=2)


def early(x, prefill):
    """Written one slot too early: the first decoded token replaces the prompt's last."""
    return torch.cat((x[:, :, : prefill - 1], x[:, :, prefill:], empty(x)), dim=2)


def stuck(x, prefill):
    """Every decoded token goes to the slot after the prompt."""
    behind = x.shape[2] - prefill - 1
    return torch.cat((x[:, :, :prefill], x[:, :, -1:], empty(x, behind)), dim=2)


def unmasked_static_cache(port):
    """A cache of fixed size, its empty slots hidden from the prompt's queries only."""
    size = len(port.ids)
    slots(port, lambda x, _: torch.cat((x, empty(x, size - x.shape[2])), dim=2))

    def create(original, inputs_embeds, past_key_values, **options):
        usual = original(inputs_embeds=inputs_embeds, past_key_values=past_key_values, **options)
        T = inputs_embeds.shape[1]
        return torch.zeros(1, 1, T, size) if past_key_values.get_seq_length() else usual

    port.wrap(port.code, "create_causal_mask", create)


def k_v_mixed_up(port):
    """What the cache returns is unpacked in the wrong order."""
    port.wrap(DynamicCache, "update", lambda original, *args: original(*args)[::-1])


# ---- feed-forward --------------------------------------------------------------------------------


def activation(port, function):
    for layer in port.layers:
        layer.mlp.act_fn = function


def gate_up_in_code(port):
    port.replace(
        port.code.LlamaMLP,
        "forward",
        lambda self, x: self.down_proj(self.gate_proj(x) * self.act_fn(self.up_proj(x))),
    )


# ---- weights -------------------------------------------------------------------------------------


def swapped(port, part, one, other):
    """Two matrices of every layer change places."""
    for layer in port.layers:
        a, b = getattr(getattr(layer, part), one), getattr(getattr(layer, part), other)
        a.weight, b.weight = b.weight, a.weight


def permuted(port, order):
    """order(matrix, heads) of q's and k's rows, in code that pairs halves."""
    for attn in (layer.self_attn for layer in port.layers):
        attn.q_proj.weight.data = order(attn.q_proj.weight.data, port.config.num_attention_heads)
        attn.k_proj.weight.data = order(attn.k_proj.weight.data, port.config.num_key_value_heads)


def k_permuted_as_q(port):
    """Moved to Meta's order for code that pairs neighbours, k by the number of query heads."""
    heads = port.config.num_attention_heads
    permuted(port, lambda w, _: rows_of_meta(w, heads))
    pairs_of_neighbours(port)


def reshaped(port, names, change):
    """Every layer's matrices of these names become change(matrix), in the old shape."""
    for layer in port.layers:
        for name in names:
            w = layer.get_submodule(name).weight
            w.data = change(w.data).reshape(w.shape).contiguous()


def column_by_column(w):
    """The file's numbers, written row by row, read as if column by column."""
    return w.reshape(w.shape[::-1]).T


def merged_on_other_axis(w, n=2):
    """N shards of input columns, put together along the output rows."""
    return torch.cat(w.chunk(n, dim=1), dim=0)


def head_tied(port):
    port.llm.lm_head.weight = port.model.embed_tokens.weight


def head_empty(port):
    """A head of its own that no file filled."""
    port.llm.lm_head.weight = nn.Parameter(torch.zeros_like(port.llm.lm_head.weight))


def embedding_scaled(port):
    factor = port.config.hidden_size**0.5
    port.wrap(port.model.embed_tokens, "forward", lambda original, ids: original(ids) * factor)


def looked_up(port, row):
    """row(id, V): which row of the embedding an id is given."""
    V = port.config.vocab_size
    port.wrap(port.model.embed_tokens, "forward", lambda original, ids: original(row(ids, V)))


def columns_as_rows(port):
    """An embedding cut by columns into two shards, put together by rows."""
    old = port.model.embed_tokens.weight.data
    table = merged_on_other_axis(old).reshape(old.shape)
    port.replace(
        port.model.embed_tokens, "forward", lambda ids: nn.functional.embedding(ids, table)
    )


def weights(port, change):
    for w in port.llm.parameters():
        w.data = change(w.data)


def cut(x):
    """float32 to bfloat16's numbers by dropping 16 bits, not by rounding."""
    return (x.view(torch.int32) & -65536).view(torch.float32)


def results_cut(port):
    """Every operation of a bfloat16 model drops what does not fit."""
    port.enter_context(Cutting(cut))


# ---- layers --------------------------------------------------------------------------------------


def layers(port, order):
    """order(L): which layer stands in each place."""
    chosen = [copy.deepcopy(port.layers[i]) for i in order(len(port.layers))]
    for place, layer in enumerate(chosen):
        layer.self_attn.layer_idx = place
    port.model.layers = nn.ModuleList(chosen)
    port.config.num_hidden_layers = len(chosen)


# ---- ids -----------------------------------------------------------------------------------------


def bos_missing(port):
    port.ids = port.ids[1:]


def bos_doubled(port):
    port.ids = port.ids[:1] + port.ids


# ---- the list ------------------------------------------------------------------------------------


class Mistake(NamedTuple):
    """What is done to a port, in which models, and whether tokens have to be decoded to see it."""

    make: Callable[[Port], None]
    models: tuple[str, ...] = ("stories260k", "made-up-8")
    decode: bool = False
    dtype: str = "float32"


SCALED_8, SCALED_32 = ("made-up-8",), ("made-up-32",)
REAL = ("stories260k", "smollm2")
NOT_SQUARE = ("smollm2", "made-up-8")
ALL = ("stories260k", "made-up-8", "smollm2")

ATTN, MLP = "self_attn.", "mlp."

# By the id that `llama3np diagnose` has for it; after "/" one of several ways to make it.
MISTAKES = {
    "rope-pairing-swapped": Mistake(pairs_of_neighbours, ALL),
    "theta-10000": Mistake(partial(rope_config, rope_theta=1e4), ("smollm2", "made-up-8")),
    "theta-500000": Mistake(partial(rope_config, rope_theta=5e5), REAL),
    "rope-scaling-absent": Mistake(scaling_absent, SCALED_8 + SCALED_32),
    "rope-scaling-added": Mistake(scaling_added, REAL),
    "rope-scaling-linear": Mistake(scaling_linear, ("stories260k", *SCALED_8, *SCALED_32)),
    "rope-factor-8": Mistake(partial(rope_config, factor=8.0), SCALED_32),
    "rope-factor-32": Mistake(partial(rope_config, factor=32.0), SCALED_8),
    "angles-bf16": Mistake(angles_bf16),
    "rope-tables-bf16": Mistake(partial(tables_changed, change=tables_bf16)),
    "rope-backwards": Mistake(partial(tables_changed, change=lambda cos, sin: (cos, -sin))),
    "positions-from-one": Mistake(partial(positions, changed=lambda p, _: p + 1)),
    "positions-restart-at-decode/once": Mistake(
        partial(positions, changed=restarted), ALL, decode=True
    ),
    "positions-restart-at-decode/always": Mistake(
        partial(positions, changed=always_0), decode=True
    ),
    "positions-off-by-one-at-decode": Mistake(partial(positions, changed=one_too_far), decode=True),
    "rope-missing": Mistake(partial(rope_changed, change=lambda tq, tk, q, k: (q, k))),
    "rope-only-on-q": Mistake(partial(rope_changed, change=lambda tq, tk, q, k: (tq, k))),
    "rope-only-on-k": Mistake(partial(rope_changed, change=lambda tq, tk, q, k: (q, tk))),
    "rope-on-v": Mistake(rope_on_v),
    "rope-twice-on-cached-keys": Mistake(rope_after_caching_again),
    "eps-1e-6": Mistake(partial(eps, value=1e-6), ALL),
    "eps-1e-5": Mistake(partial(eps, value=1e-5), SCALED_32),
    "eps-0": Mistake(partial(eps, value=0.0)),
    "norm-weight-before-cast": Mistake(
        partial(norm_forward, weighted=weight_before_cast), ALL, dtype="bfloat16"
    ),
    "norm-weight-missing": Mistake(partial(norm_forward, weighted=weight_missing)),
    "norm-weight-plus-one": Mistake(partial(norm_forward, weighted=weight_plus_one)),
    "f16-overflow": Mistake(norm_squares_f16, ("smollm2",), dtype="float16"),
    "final-norm-missing": Mistake(final_norm_missing, ALL),
    "residual-from-norm/both": Mistake(partial(residual, first=normed, second=normed)),
    "residual-from-norm/attention": Mistake(partial(residual, first=normed, second=stream)),
    "residual-missing/attention": Mistake(partial(residual, first=nothing, second=stream)),
    "residual-missing/mlp": Mistake(partial(residual, first=stream, second=nothing)),
    "scale-missing": Mistake(partial(scale, factor=lambda H, D: 1.0)),
    # Not in stories260K: its D is H * H, so that both are the same number.
    "scale-by-width": Mistake(partial(scale, factor=lambda H, D: D**-0.5), NOT_SQUARE),
    "scale-twice": Mistake(partial(scale, factor=lambda H, D: 1 / H), NOT_SQUARE),
    "softmax-over-queries": Mistake(softmax_axis),
    "mask-missing": Mistake(partial(mask, visible=lambda query, key: query == query), ALL),
    "mask-sees-next": Mistake(partial(mask, visible=lambda query, key: key <= query + 1)),
    "mask-hides-self": Mistake(partial(mask, visible=lambda query, key: key < query)),
    "mask-only-in-prefill": Mistake(unmasked_static_cache, decode=True),
    "heads-tiled": Mistake(heads_by_tile, ALL),
    "kv-swapped": Mistake(k_v_mixed_up),
    "cache-hole/late": Mistake(partial(slots, read=late), ALL, decode=True),
    "cache-hole/lost": Mistake(partial(slots, read=lost), decode=True),
    "cache-overwritten": Mistake(partial(slots, read=early), ALL, decode=True),
    "cache-slot-stuck": Mistake(partial(slots, read=stuck), decode=True),
    "gate-up-swapped": Mistake(gate_up_in_code, ALL),
    "gelu-exact": Mistake(partial(activation, function=nn.GELU())),
    "gelu-tanh": Mistake(partial(activation, function=nn.GELU("tanh"))),
    "relu": Mistake(partial(activation, function=nn.ReLU())),
    "qk-permuted": Mistake(partial(permuted, order=rows_of_meta), ALL),
    "qk-permuted-back": Mistake(partial(permuted, order=rows_of_halves), ALL),
    "k-permuted-as-q": Mistake(k_permuted_as_q, ("stories260k", "made-up-8")),
    "q-transposed": Mistake(partial(reshaped, names=[ATTN + "q_proj"], change=column_by_column)),
    "k-transposed": Mistake(partial(reshaped, names=[ATTN + "k_proj"], change=column_by_column)),
    "qk-transposed": Mistake(
        partial(reshaped, names=[ATTN + "q_proj", ATTN + "k_proj"], change=column_by_column)
    ),
    "wk-wv-swapped": Mistake(partial(swapped, part="self_attn", one="k_proj", other="v_proj")),
    "w-gate-up-swapped": Mistake(partial(swapped, part="mlp", one="gate_proj", other="up_proj")),
    "head-tied": Mistake(head_tied, SCALED_8 + SCALED_32),
    "head-untied": Mistake(head_empty),
    "embedding-scaled": Mistake(embedding_scaled),
    "shard-axis/wo": Mistake(
        partial(reshaped, names=[ATTN + "o_proj"], change=merged_on_other_axis)
    ),
    "shard-axis/w_down": Mistake(
        partial(reshaped, names=[MLP + "down_proj"], change=merged_on_other_axis)
    ),
    "embedding-shard-rows/first": Mistake(partial(looked_up, row=lambda ids, V: ids % (V // 2))),
    "embedding-shard-rows/order": Mistake(
        partial(looked_up, row=lambda ids, V: (ids + V // 2) % V)
    ),
    "embedding-shard-rows/columns": Mistake(columns_as_rows),
    "bf16-truncated": Mistake(results_cut, ALL, dtype="bfloat16"),
    "weights-truncated": Mistake(partial(weights, change=cut)),
    "weights-bf16": Mistake(partial(weights, change=lambda w: w.bfloat16().float())),
    "weights-f16": Mistake(partial(weights, change=lambda w: w.half().float())),
    "layer-skipped/last": Mistake(partial(layers, order=lambda L: range(L - 1))),
    "layer-skipped/2": Mistake(
        partial(layers, order=lambda L: [i for i in range(L) if i != 2]), ALL
    ),
    "layer-repeated": Mistake(partial(layers, order=lambda L: [0, *range(L)])),
    "layers-lexicographic": Mistake(
        partial(layers, order=lambda L: sorted(range(L), key=str)), ("smollm2", "made-up-8")
    ),
    "bos-missing": Mistake(bos_missing, ALL),
    "bos-doubled": Mistake(bos_doubled),
}

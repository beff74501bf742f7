"""The mistakes, each made in a running transformers model: what a port does when it gets it wrong.

Written from what a mistake means, in torch; nothing here looks at how llama3np models it.
A function takes a Port and spoils it; MISTAKES at the end is the list.
"""

import copy
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from injections.parts import (
    additive_mask,
    attend,
    rows_of_meta,
    tables,
    turned,
    turned_neighbours,
)
from injections.port import Port
from torch import nn
from transformers.cache_utils import DynamicCache

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
    """Every wavelength stretched by the factor, as in the linear scaling of long-context Llama 2."""
    port.model.rotary_emb.inv_freq = plain_frequencies(port) / port.config.rope_parameters["factor"]


def plain_frequencies(port):
    H, theta = port.config.head_dim, port.config.rope_parameters["rope_theta"]
    return 1.0 / theta ** (torch.arange(0, H, 2).float() / H)


def scaling_absent(port):
    port.model.rotary_emb.inv_freq = plain_frequencies(port)


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
    """Each decoded token counts from 0 again."""
    return torch.where(position_ids >= prefill, position_ids - prefill, position_ids)


def rope_only_q(port):
    port.wrap(
        port.code,
        "apply_rotary_pos_emb",
        lambda original, q, k, *args: (original(q, k, *args)[0], k),
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


def residual_normed(port):
    """Both sums of a block start from what its norms made, not from the stream."""

    def forward(self, hidden_states, **options):
        x = self.input_layernorm(hidden_states)
        x = x + self.self_attn(hidden_states=x, **options)[0]
        y = self.post_attention_layernorm(x)
        return y + self.mlp(y)

    port.replace(port.code.LlamaDecoderLayer, "forward", forward)


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


def cache_hole(port):
    """The first decoded token's key and value are never written: its slot stays zero."""

    def update(original, self, k, v, layer):
        keys, values = original(self, k, v, layer)
        late = torch.arange(keys.shape[2])[:, None] != port.prefill
        return keys * late, values * late

    port.wrap(DynamicCache, "update", update)


def cache_overwritten(port):
    """Decoded tokens are stored one slot too early: the first one replaces the prompt's last."""

    def update(original, self, k, v, layer):
        keys, values = original(self, k, v, layer)
        if keys.shape[2] == port.prefill:
            return keys, values
        kept = torch.arange(keys.shape[2]) != port.prefill - 1
        zero = torch.zeros_like(keys[:, :, :1])
        keys, values = (torch.cat((x[:, :, kept], zero), dim=2) for x in (keys, values))
        return keys, values

    port.wrap(DynamicCache, "update", update)


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


def reshaped(port, names, change):
    """Every layer's attention matrices of these names become change(weight)."""
    for layer in port.layers:
        for name in names:
            w = getattr(layer.self_attn, name).weight
            w.data = change(w.data).reshape(w.shape).contiguous()


def unpermuted(port):
    """q and k rows in Meta's order, in code that pairs halves."""
    for layer in port.layers:
        attn = layer.self_attn
        for w, heads in (
            (attn.q_proj.weight, port.config.num_attention_heads),
            (attn.k_proj.weight, port.config.num_key_value_heads),
        ):
            w.data = rows_of_meta(w.data, heads)


def transposed(w):
    """The file's numbers read as (in, out)."""
    return w.T


def merged_on_other_axis(w, axis=1):
    """Two shards cut along `axis`, put together along the other one."""
    return torch.cat(w.chunk(2, dim=axis), dim=1 - axis)


def head_tied(port):
    port.llm.lm_head.weight = port.model.embed_tokens.weight


def embedding_scaled(port):
    factor = port.config.hidden_size**0.5
    port.wrap(port.model.embed_tokens, "forward", lambda original, ids: original(ids) * factor)


def embedding_rows(port):
    """Two shards of rows, and the second process's offset forgotten: it looks in the first one."""
    half = port.config.vocab_size // 2
    port.wrap(port.model.embed_tokens, "forward", lambda original, ids: original(ids % half))


def truncated_weights(port):
    """float32 weights made bfloat16 by dropping 16 bits, not by rounding."""
    for w in port.llm.parameters():
        w.data = (w.data.view(torch.int32) & -65536).view(torch.float32)


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
    models: tuple[str, ...] = ("stories260k", "smollm2")
    decode: bool = False
    dtype: str = "float32"


SCALED_8, SCALED_32 = ("made-up-8",), ("made-up-32",)

MISTAKES = {
    "rope_pairing": Mistake(pairs_of_neighbours),
    "rope_theta_10000": Mistake(partial(rope_config, rope_theta=1e4), ("smollm2", "made-up-8")),
    "rope_theta_500000": Mistake(partial(rope_config, rope_theta=5e5)),
    "rope_scaling_absent": Mistake(scaling_absent, SCALED_8 + SCALED_32),
    "rope_scaling_linear": Mistake(scaling_linear, SCALED_8 + SCALED_32),
    "rope_scaling_8": Mistake(partial(rope_config, factor=8.0), SCALED_32),
    "rope_scaling_32": Mistake(partial(rope_config, factor=32.0), SCALED_8),
    "rope_angles_bf16": Mistake(angles_bf16),
    "positions_from_1": Mistake(partial(positions, changed=lambda p, _: p + 1)),
    "positions_restart": Mistake(partial(positions, changed=restarted), decode=True),
    "rope_only_q": Mistake(rope_only_q),
    "rope_on_v": Mistake(rope_on_v),
    "rope_twice_on_k": Mistake(rope_after_caching_again),
    "eps_1e-6": Mistake(partial(eps, value=1e-6)),
    "eps_1e-5": Mistake(partial(eps, value=1e-5), SCALED_32),
    "eps_0": Mistake(partial(eps, value=0.0)),
    "norm_weight_before_cast": Mistake(
        partial(norm_forward, weighted=weight_before_cast), dtype="bfloat16"
    ),
    "norm_weight_missing": Mistake(partial(norm_forward, weighted=weight_missing)),
    "norm_weight_plus_one": Mistake(partial(norm_forward, weighted=weight_plus_one)),
    "final_norm_missing": Mistake(final_norm_missing),
    "residual_normed": Mistake(residual_normed),
    "scale_missing": Mistake(partial(scale, factor=lambda H, D: 1.0)),
    "scale_by_width": Mistake(partial(scale, factor=lambda H, D: D**-0.5)),
    "scale_twice": Mistake(partial(scale, factor=lambda H, D: 1 / H)),
    "softmax_axis": Mistake(softmax_axis),
    "mask_missing": Mistake(partial(mask, visible=lambda query, key: query == query)),
    "mask_off_by_one": Mistake(partial(mask, visible=lambda query, key: key <= query + 1)),
    "heads_by_tile": Mistake(heads_by_tile),
    "k_v_swapped": Mistake(partial(swapped, part="self_attn", one="k_proj", other="v_proj")),
    "cache_hole": Mistake(cache_hole, decode=True),
    "cache_overwritten": Mistake(cache_overwritten, decode=True),
    "gate_up_swapped": Mistake(partial(swapped, part="mlp", one="gate_proj", other="up_proj")),
    "gate_up_swapped_in_code": Mistake(gate_up_in_code),
    "gelu": Mistake(partial(activation, function=nn.GELU())),
    "relu": Mistake(partial(activation, function=nn.ReLU())),
    "q_transposed": Mistake(partial(reshaped, names=["q_proj"], change=transposed)),
    "qk_unpermuted": Mistake(unpermuted),
    "head_tied": Mistake(head_tied, SCALED_8 + SCALED_32),
    "bos_missing": Mistake(bos_missing),
    "bos_doubled": Mistake(bos_doubled),
    "embedding_scaled": Mistake(embedding_scaled),
    "embedding_rows": Mistake(embedding_rows),
    "bf16_truncated": Mistake(truncated_weights, dtype="bfloat16"),
    "layer_skipped": Mistake(partial(layers, order=lambda L: range(L - 1))),
    "layer_repeated": Mistake(partial(layers, order=lambda L: [0, *range(L)])),
    "layers_lexicographic": Mistake(
        partial(layers, order=lambda L: sorted(range(L), key=str)), ("smollm2", "made-up-8")
    ),
    "shard_axis": Mistake(partial(reshaped, names=["o_proj"], change=merged_on_other_axis)),
}

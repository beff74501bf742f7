"""Mistakes of RoPE and of positions."""

import copy

import torch
from transformers.cache_utils import DynamicCache

from injections.parts import tables, turned, turned_neighbours


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

"""Mistakes of attention and of the cache."""

from functools import partial

import torch
from transformers.cache_utils import DynamicCache

from injections.parts import additive_mask, attend

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

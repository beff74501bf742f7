"""Pieces that several mistakes are made of, in torch, as a port might have written them."""

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map


def turned(x, cos, sin):
    """Rotate (1, heads, T, H) by transformers' tables (1, T, H), pairs a half apart."""
    a, b = x.chunk(2, dim=-1)
    return x * cos[:, None] + torch.cat((-b, a), dim=-1) * sin[:, None]


def turned_neighbours(x, cos, sin):
    """The same with pairs of neighbours, (x0, x1), (x2, x3), ..., as Meta's code has them."""
    P = x.shape[-1] // 2
    cos, sin = cos[:, None, :, :P], sin[:, None, :, :P]
    a, b = x[..., 0::2], x[..., 1::2]
    return torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1).flatten(-2)


def tables(model, positions, dtype):
    """Cosines and sines (1, T, H) of a list of positions."""
    like = torch.zeros((), dtype=dtype)
    return model.rotary_emb(like, torch.as_tensor(positions)[None])


def rows_of_meta(w, heads):
    """Rows of a half-split q or k matrix in Meta's order: what a conversion forgot to permute."""
    out, width = w.shape
    return w.view(heads, 2, out // heads // 2, width).transpose(1, 2).reshape(out, width)


def rows_of_halves(w, heads):
    """The reverse: rows of a matrix in Meta's order to those that are paired by halves."""
    out, width = w.shape
    return w.view(heads, out // heads // 2, 2, width).transpose(1, 2).reshape(out, width)


def additive_mask(T, S, visible, dtype):
    """0 where visible(query position, key position), the lowest number elsewhere: (1, 1, T, S)."""
    query, key = torch.arange(S - T, S)[:, None], torch.arange(S)[None]
    seen = visible(query, key).expand(T, S)
    return torch.where(seen, 0.0, torch.finfo(dtype).min).to(dtype)[None, None]


def attend(module, query, key, value, attention_mask, scaling, softmax_axis=-1, **_):
    """Eager attention whose softmax may run along another axis."""
    key, value = (x.repeat_interleave(module.num_key_value_groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3) * scaling + attention_mask
    probs = nn.functional.softmax(scores, dim=softmax_axis, dtype=torch.float32).to(query.dtype)
    return (probs @ value).transpose(1, 2).contiguous(), probs


class Cutting(TorchDispatchMode):
    """A processor whose bfloat16 results are cut: computed in float32, then given to cut(x)."""

    def __init__(self, cut):
        super().__init__()
        self.cut = cut

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        seen_through = any(value.alias_info for value in func._schema.returns)  # a view
        if seen_through or not isinstance(out, torch.Tensor) or out.dtype != torch.bfloat16:
            return out
        if func is torch.ops.aten._to_copy.default:
            return self.cut(args[0].float()).bfloat16()
        wide = tree_map(lambda x: widened(x), args)
        return self.cut(func(*wide, **(kwargs or {})).float().contiguous()).bfloat16()


def widened(x):
    """A bfloat16 tensor in float32, anything else as it is."""
    return x.float() if isinstance(x, torch.Tensor) and x.dtype == torch.bfloat16 else x

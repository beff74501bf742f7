"""Mistakes of loading: weights, the order of layers, ids."""

import copy

import torch
from torch import nn

from injections.parts import Cutting, rows_of_meta
from injections.rope import pairs_of_neighbours

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


def changed(port, change):
    for w in port.llm.parameters():
        w.data = change(w.data)


def cut(x):
    """float32 to bfloat16's numbers by dropping 16 bits, not by rounding."""
    return (x.view(torch.int32) & -65536).view(torch.float32)


def results_cut(port):
    """Every operation of a bfloat16 model drops what does not fit; its weights are rounded."""
    port.round()
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

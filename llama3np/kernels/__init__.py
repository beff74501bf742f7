"""How a stored weight multiplies. Each format has the plain product as its oracle."""

from __future__ import annotations

from llama3np.kernels.half import Half
from llama3np.kernels.joined import Joined
from llama3np.params import Params, Weight

__all__ = ["Half", "Joined", "stored"]


def stored(params: Params) -> Params:
    """The same tree with every 16-bit matrix as a stored format; nothing is copied."""

    def wrap(w: Weight) -> Weight:
        return Half(w) if w.ndim == 2 and w.dtype.itemsize == 2 else w

    embed_VD = wrap(params.embed_VD)
    head_VD = embed_VD if params.head_VD is params.embed_VD else wrap(params.head_VD)
    layers = tuple(type(layer)(*map(wrap, layer)) for layer in params.layers)
    return Params(embed_VD, layers, params.norm_D, head_VD)

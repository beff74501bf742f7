"""How a stored weight multiplies. Each format has the plain product as its oracle."""

from __future__ import annotations

from collections.abc import Callable

from llama3np.kernels.blocks import Blocks
from llama3np.kernels.half import Half
from llama3np.kernels.joined import Joined
from llama3np.params import Params, Weight

__all__ = ["Blocks", "Half", "Joined", "stored", "unstored"]


def stored(params: Params) -> Params:
    """The same tree with every 16-bit matrix as a stored format; nothing is copied."""
    return _mapped(params, lambda w: Half(w) if w.ndim == 2 and w.dtype.itemsize == 2 else w)


def unstored(params: Params) -> Params:
    """The tree that `stored` was given: what is written to files. Nothing is copied."""
    return _mapped(params, lambda w: w.stored if isinstance(w, Half) else w)


def _mapped(params: Params, change: Callable[[Weight], Weight]) -> Params:
    """Every tensor changed; a tied head stays the embedding table itself."""
    embed_VD = change(params.embed_VD)
    head_VD = embed_VD if params.head_VD is params.embed_VD else change(params.head_VD)
    layers = tuple(type(layer)(*map(change, layer)) for layer in params.layers)
    return Params(embed_VD, layers, change(params.norm_D), head_VD)

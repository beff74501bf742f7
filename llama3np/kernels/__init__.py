"""How a stored weight multiplies. Each format has the plain product as its oracle."""

from __future__ import annotations

from llama3np.kernels.blocks import Blocks
from llama3np.kernels.half import Half
from llama3np.kernels.joined import Joined
from llama3np.params import Params, mapped

__all__ = ["Blocks", "Half", "Joined", "stored", "unstored"]


def stored(params: Params) -> Params:
    """The same tree with every 16-bit matrix as a stored format; nothing is copied."""
    return mapped(params, lambda w: Half(w) if w.ndim == 2 and w.dtype.itemsize == 2 else w)


def unstored(params: Params) -> Params:
    """The tree that `stored` was given: what is written to files. Nothing is copied."""
    return mapped(params, lambda w: w.stored if isinstance(w, Half) else w)

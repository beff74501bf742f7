"""The weights of a model as addresses, which compiled code can follow."""

from __future__ import annotations

from typing import Any

import numpy as np

from llama3np.config import Config
from llama3np.kernels.blocks import Blocks
from llama3np.kernels.cpu.step import TILE, Model
from llama3np.kernels.ggml import FORMATS
from llama3np.kernels.half import Half
from llama3np.kernels.joined import Joined
from llama3np.numerics import Profile
from llama3np.params import Params

# A unit of rows is large enough to be read at full speed and small enough that threads, of which
# each has UNITS in a phase, end together.
UNIT_BYTES, UNITS = 256 << 10, 16

_PLAIN = {form.dtype: form.number for form in FORMATS.values() if form.dtype is not None}
_MATRICES = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")


def described(params: Params, config: Config, profile: Profile, threads: int) -> Model | None:
    """The model as compiled code takes it, or None if it has a weight or profile of another kind.

    threads: how many will share a step; where matrices are cut depends on it, no number does.
    The addresses are those of params' own arrays, which must outlive it.
    """
    weights = [getattr(layer, name) for layer in params.layers for name in _MATRICES]
    matrices: list[tuple[int, ...]] = []
    parts: list[int] = []
    for w in (*weights, params.head_VD):
        if (found := parts_of(w)) is None or profile.dtype != "float32":
            return None
        code, arrays, axis = found
        row_bytes = arrays[0].strides[0]
        unit = min(UNIT_BYTES // row_bytes, -(-w.shape[0] // (UNITS * threads)))
        unit = max(TILE, unit // TILE * TILE)
        matrices.append((code, *w.shape, row_bytes, len(arrays), axis, len(parts), unit))
        parts += [array.__array_interface__["data"][0] for array in arrays]
    return Model(
        matrices_XF=np.array(matrices, np.int64),
        parts=np.array(parts, np.int64),
        attn_norm_LD=stacked(params, "attn_norm_D"),
        mlp_norm_LD=stacked(params, "mlp_norm_D"),
        norm_D=np.array(params.norm_D, np.float32),
        eps=np.float32(config.norm_eps),
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        head_dim=config.head_dim,
        interleaved=config.rope_pairing == "interleaved",
        rounded=profile.rounded,
    )


def stacked(params: Params, name: str) -> np.ndarray:
    """One norm vector of all layers, widened."""
    return np.stack([getattr(layer, name) for layer in params.layers]).astype(np.float32)


def parts_of(w: Any) -> tuple[int, tuple[np.ndarray, ...], int] | None:
    """(ggml's number of the format, the arrays, the axis along which they are joined)."""
    if isinstance(w, Half):
        w = w.stored
    if isinstance(w, Blocks):
        return FORMATS[w.type].number, (w.stored,), 0
    arrays, axis = (w.parts, w.axis) if isinstance(w, Joined) else ((w,), 0)
    whole_rows = all(a.strides[1] == a.itemsize and a.strides == arrays[0].strides for a in arrays)
    if w.dtype not in _PLAIN or not whole_rows:
        return None
    return _PLAIN[w.dtype], arrays, axis

"""The weights of a model as addresses, which compiled code can follow."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from llama3np.config import Config
from llama3np.kernels.blocks import Blocks
from llama3np.kernels.cpu.shared import address
from llama3np.kernels.cpu.step import MATRIX, MODEL, TILE
from llama3np.kernels.ggml import FORMATS, NAMES
from llama3np.kernels.half import Half
from llama3np.kernels.joined import Joined
from llama3np.numerics import Profile
from llama3np.params import Params

# A unit of rows is large enough to be read at full speed and small enough that threads, of which
# each has UNITS in a phase, end together.
UNIT_BYTES, UNITS = 256 << 10, 16

PLAIN = {form.dtype: form.number for form in FORMATS.values() if form.dtype is not None}
_MATRICES = ("wq", "wk", "wv", "wo", "w_gate", "w_up", "w_down")


class Described(NamedTuple):
    """A model as records of addresses, and the arrays that these are of."""

    record: np.ndarray  # MODEL (1)
    matrices: np.ndarray  # MATRIX (7 L + 1)
    arrays: tuple[Any, ...]  # what must live as long as the record is used


def described(params: Params, config: Config, profile: Profile, threads: int) -> Described | None:
    """The model as compiled code takes it, or None if it has a weight or profile of another kind.

    threads: how many will share a step; where matrices are cut depends on it, no number does.
    """
    weights = [getattr(layer, name) for layer in params.layers for name in _MATRICES]
    weights.append(params.head_VD)
    matrices, parts = np.zeros(len(weights), MATRIX), list[int]()
    for matrix, w in zip(matrices, weights, strict=True):
        if profile.dtype != "float32" or (found := parts_of(w)) is None:
            return None
        code, arrays, axis = found
        matrix["code"], (matrix["n_out"], matrix["n_in"]) = code, w.shape
        matrix["weights"] = FORMATS[NAMES[code]].weights
        matrix["row_bytes"], matrix["part_bytes"] = arrays[0].strides[0], arrays[0][0].nbytes
        matrix["parts"], matrix["axis"], matrix["first_part"] = len(arrays), axis, len(parts)
        matrix["unit"] = _unit(w.nbytes // w.shape[0], w.shape[0], threads)
        parts += [address(array) for array in arrays]
    parts_P = np.array(parts, np.int64)
    norms = {
        "attn_norm_LD": stacked(params, "attn_norm_D"),
        "mlp_norm_LD": stacked(params, "mlp_norm_D"),
        "norm_D": np.array(params.norm_D, np.float32),
    }
    record = np.zeros(1, MODEL)
    for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim", "vocab_size"):
        record[name] = getattr(config, name)
    record["interleaved"] = config.rope_pairing == "interleaved"
    record["rounded"], record["eps"] = profile.rounded, config.norm_eps
    record["matrices"], record["parts"] = address(matrices), address(parts_P)
    for name, norm in norms.items():
        record[name] = address(norm)
    return Described(record, matrices, (params, matrices, parts_P, norms))


def _unit(row_bytes: int, rows: int, threads: int) -> int:
    """Rows that a thread takes at a time: whole tiles, of UNIT_BYTES at most."""
    unit = min(UNIT_BYTES // row_bytes, -(-rows // (UNITS * threads)))
    return max(TILE, unit // TILE * TILE)


def stacked(params: Params, name: str) -> np.ndarray:
    """One norm vector of all layers, widened."""
    return np.stack([getattr(layer, name) for layer in params.layers]).astype(np.float32)


def parts_of(w: Any) -> tuple[int, tuple[np.ndarray, ...], int] | None:
    """(ggml's number of the format, the arrays, the axis along which they are joined).

    None for what compiled code cannot read: rows with gaps in them. Where the next row is does not
    matter: beyond a gap, before this one, or here.
    """
    w = w.stored if isinstance(w, Half) else w
    stored = w.stored if isinstance(w, Blocks) else w
    arrays, axis = (w.parts, w.axis) if isinstance(w, Joined) else ((stored,), 0)
    first = arrays[0]
    whole_rows = first.shape[1] == 1 or first.strides[1] == first.itemsize
    if not whole_rows or any(array.strides != first.strides for array in arrays):
        return None
    code = FORMATS[w.type].number if isinstance(w, Blocks) else PLAIN.get(w.dtype)
    return None if code is None else (code, arrays, axis)

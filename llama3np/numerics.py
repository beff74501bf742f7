"""Precision profiles: in which type the arithmetic is done, and where it rounds.

The profiles of 16 bits round where the code rounds that most checkpoints are run with; docs/
numerics.md has the table, operation by operation. Sums, the statistics of a norm, exponentials and
RoPE's angles are float32 in all of them; only float64 is float64 throughout.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from llama3np.backend import namespace, narrow
from llama3np.errors import InputError
from llama3np.model import PLAIN, Ops, rope
from llama3np.params import Params, mapped

TILE = 2**20  # numbers that are rounded at a time


class Profile(NamedTuple):
    """A named, stated way to compute: two runs of one profile agree whatever the storage."""

    name: str
    dtype: str  # of every activation, and of the cache unless it has its own
    rounded: bool = False  # activations to bf16 as they enter a product with a bf16 matrix
    narrow_tables: bool = False  # RoPE's cosines, sines and products in dtype, not in float32

    @property
    def short(self) -> bool:
        """Whether activations have 16 bits; weights are rounded to them too then."""
        return np.dtype(self.dtype).itemsize == 2

    @property
    def ops(self) -> Ops:
        """The five operations in plain array operations: the spec's, but for the tables."""
        return PLAIN._replace(rope=narrow_rope) if self.narrow_tables else PLAIN


PROFILES = {
    "float32": Profile("float32", "float32"),  # the default: weights exact in f32 however stored
    "float64": Profile("float64", "float64"),  # the oracle for error bars, angles included
    # Products of bf16 by bf16, summed in float32: what processors and GPUs have instructions for.
    "bf16-mm": Profile("bf16-mm", "float32", rounded=True),
    # As Meta's llama/model.py rounds, and as transformers' modeling_llama.py with eager attention.
    "bf16-meta": Profile("bf16-meta", "bfloat16"),
    "bf16-hf": Profile("bf16-hf", "bfloat16", narrow_tables=True),
    "f16-hf": Profile("f16-hf", "float16", narrow_tables=True),
}


def profile(name: str) -> Profile:
    """Look a profile up by its name; raise InputError for a name that is none."""
    if name not in PROFILES:
        raise InputError(f"dtype: expected one of {', '.join(PROFILES)}, found {name!r}")
    return PROFILES[name]


def narrow_rope(x_BTNH: Any, cos_BTP: Any, sin_BTP: Any, pairing: str) -> Any:
    """model.rope with its tables in the type of x, so that each product and sum is rounded too."""
    return rope(x_BTNH, narrow(cos_BTP, x_BTNH), narrow(sin_BTP, x_BTNH), pairing)


def short_params(params: Params, dtype: str) -> Params:
    """The same tree with every weight rounded to 16 bits, as torch's `tensor.to(dtype)` does.

    That goes by way of float32, which rounds float64 twice. What has the type already is not
    copied; blocks are widened first, some rows at a time.
    """
    kind = np.dtype(dtype)

    def rounded(w: Any) -> Any:
        if w.dtype == kind:
            return w
        out, step = np.empty(w.shape, kind), max(1, TILE // w.shape[-1])
        for start in range(0, len(out), step):
            rows = w[start : start + step]
            out[start : start + step] = rows.astype(np.float32, copy=False)
        return out

    with np.errstate(over="ignore"):  # float16 ends at 65504: infinity is what rounding gives
        return mapped(params, rounded)


# ---- distances -----------------------------------------------------------------------------------


def ulps(array: Any, expected: Any) -> Any:
    """How many numbers of their type lie between two arrays of one dtype, element by element.

    0 for equal ones (-0.0 and 0.0 are), 1 for neighbours, int64; the largest integer where one is
    NaN, and where there are even more, as between float64's ends. Of float16, bfloat16, float32
    and float64: numbers in the order of their bits. Raises ValueError for two dtypes.
    """
    if array.dtype != expected.dtype:
        raise ValueError(f"ulps: expected one dtype, found {array.dtype} and {expected.dtype}")
    xp, most = namespace(array), np.iinfo(np.int64).max
    one, other = _ordered(array, xp), _ordered(expected, xp)
    low, high = xp.minimum(one, other), xp.maximum(one, other)
    gap = high.view(np.uint64) - low.view(np.uint64)  # of int64, ends of float64 would overflow
    gap = xp.minimum(gap, np.uint64(most)).astype(np.int64)
    return xp.where((array != array) | (expected != expected), most, gap)


def _ordered(array: Any, xp: Any) -> Any:
    """Integers in the order of the numbers, one apart where these are neighbours."""
    bits = array.dtype.itemsize * 8
    whole = xp.ascontiguousarray(array).view(f"int{bits}").astype(np.int64).reshape(array.shape)
    return xp.where(whole < 0, -(whole & np.int64(2 ** (bits - 1) - 1)), whole)

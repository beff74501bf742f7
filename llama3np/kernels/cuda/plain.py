"""The engine "cupy": model.forward itself on device arrays, and the oracle of the fast engine.

Every operation is the spec's but two. A product widens its weight a tile of rows at a time, where
the spec's `x @ w.T` would widen the whole of a 16-bit weight at each call. Attention takes a block
of queries at a time, where the spec's would hold the scores of all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import cupy
import ml_dtypes
import numpy as np

from llama3np import cost, model
from llama3np.backend import Device, narrow, on, to_host, widen
from llama3np.cache import Cache
from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.kernels.cuda import gemm
from llama3np.numerics import Profile
from llama3np.params import Params


class CupyEngine:
    """CuPy alone. One thread at a time: CuPy's streams and memory are those of a thread.

    params: on the device (loading.device_params). What a tap is shown are device arrays, which
    backend.to_host copies; logits come back as host arrays.
    """

    name = "cupy"

    def __init__(self, params: Params, config: Config, profile: Profile, device: Device):
        self.params, self.config, self.profile, self.device = params, config, profile, device
        multiply = partial(product, rounded=profile.rounded)
        self.tapped = profile.ops._replace(linear=partial(linear, multiply=multiply))

    def untapped(self, cache: Cache) -> model.Ops:
        """The operations of a call without a tap."""
        by_blocks = partial(attention, longest=int(cache.lengths_B.max()))
        return self.tapped._replace(attention=by_blocks)

    def forward(
        self, ids_BT: Any, cache: Cache, new_B: Any = None, tap: Any = None, last_only: bool = True
    ) -> np.ndarray:
        """model.forward of this model: logits_BTV, on the host. A tap sees scores and probs whole.

        Raises InputError as model.forward does, and where the device's memory does not suffice.
        """
        ops = self.untapped(cache) if tap is None else self.tapped
        c, dtype = self.config, self.profile.dtype
        with working_on(self.device), gemm.exact():
            logits_BTV, _ = model.forward(
                self.params, c, ids_BT, cache, new_B, dtype, ops, tap, last_only
            )
            return to_host(logits_BTV)

    def chooser(self, cache: Cache) -> Any:
        """None: see Engine.chooser."""
        return None


@contextmanager
def working_on(device: Device) -> Iterator[None]:
    """Make a device the current one, as backend.on does, for a call of an engine.

    Raises InputError where an allocation fails that the plan of load has not foreseen.
    """
    try:
        with on(device):
            yield
    except MemoryError as error:  # CuPy's OutOfMemoryError is one
        raise InputError(
            f"device: {device} has no memory left for this call ({error}); fewer rows, fewer "
            "tokens at a time (--prefill-chunk) or a shorter --max-seq-len take less"
        ) from None


# ---- products ------------------------------------------------------------------------------------


def linear(x_BTD: Any, w: Any, *, multiply: Callable[[Any, Any], Any]) -> Any:
    """model.linear by another product of a weight and vectors."""
    y_MO = multiply(widen(x_BTD.reshape(-1, x_BTD.shape[-1])), w)
    return narrow(y_MO, x_BTD).reshape(*x_BTD.shape[:-1], w.shape[0])


def product(x_MK: Any, w: Any, rounded: bool = False) -> Any:
    """x_MK @ w.T as (M, N) in the type of x: weights exact, sums in that type.

    w: an array, or weights.DeviceBlocks, whose rows a kernel of ours widens.

    rounded: activations to bfloat16, for a bfloat16 weight, which then enters as it is stored.
    """
    if rounded:
        return gemm.product(x_MK.astype(ml_dtypes.bfloat16), w)
    if isinstance(w, cupy.ndarray) and w.dtype == x_MK.dtype:
        return gemm.product(x_MK, w)
    n_out, n_in = w.shape
    step = max(1, cost.TILE // n_in)
    y_MN = cupy.empty((len(x_MK), n_out), x_MK.dtype)
    for start in range(0, n_out, step):
        stop = min(start + step, n_out)
        gemm.multiply(x_MK, w[start:stop].astype(x_MK.dtype, copy=False), y_MN[:, start:stop])
    return y_MN


# ---- attention -----------------------------------------------------------------------------------


def attention(
    q_BTNH: Any, k_BKSH: Any, v_BKSH: Any, positions_BT: Any, see: Any, *, longest: int
) -> Any:
    """model.attention by blocks of queries, each against the keys that it may see.

    longest: the most tokens that a row of the cache held before this call. At no time are there
    more than cost.SCORES scores of one kind, or those of one query of one row.
    """
    (B, T, N, _), S = q_BTNH.shape, k_BKSH.shape[2]
    rows = max(1, min(B, cost.SCORES // (N * S)))
    queries = max(1, min(T, cost.SCORES // (rows * N * S)))
    if rows >= B and queries >= T:
        return model.attention(q_BTNH, k_BKSH, v_BKSH, positions_BT, see)
    attn_BTNH = cupy.empty_like(q_BTNH)
    for b in range(0, B, rows):
        some = slice(b, b + rows)
        for t in range(0, T, queries):
            block = some, slice(t, t + queries)
            seen = min(S, longest + t + queries)
            attn_BTNH[block] = model.attention(
                q_BTNH[block], k_BKSH[some, :, :seen], v_BKSH[some, :, :seen], positions_BT[block],
                see,
            )  # fmt: skip
    return attn_BTNH

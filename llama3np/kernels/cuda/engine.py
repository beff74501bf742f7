"""The engine "cuda": decode steps through our own kernels, all else over CuPy."""

from __future__ import annotations

from math import sqrt
from typing import Any
from weakref import WeakKeyDictionary

import cupy as cp
import numpy as np

from llama3np.backend import Device, host_ids, on
from llama3np.cache import Cache
from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.kernels.cuda import registry
from llama3np.kernels.cuda.launch import Strided, launch
from llama3np.kernels.cuda.plain import CupyEngine, working_on
from llama3np.kernels.cuda.step import MOST_ROWS, RECORDS, Model, Step
from llama3np.numerics import Profile
from llama3np.params import Params
from llama3np.sample import Sampling


class CudaEngine(CupyEngine):
    """Decode steps by our own kernels. One thread at a time.

    Calls of one token a row, for 8 rows at most, are a Step; others go by the plain operations,
    with attention block by block.
    params: on the device; matrices may be weights.DeviceBlocks.
    """

    name = "cuda"

    def __init__(self, params: Params, config: Config, profile: Profile, device: Device):
        super().__init__(params, config, profile, device)
        self.model: Model | None = None
        if profile.dtype == "float32":
            with on(device):
                self.model = Model(params, config, profile.rounded)
        # A step belongs to a cache, which it outlives by nothing: it holds its arrays, not itself.
        self._steps: WeakKeyDictionary[Cache, Step] = WeakKeyDictionary()

    def untapped(self, cache: Cache) -> Any:
        """The operations of a call without a tap."""
        if self.profile.dtype != "float32":
            return super().untapped(cache)
        return self.tapped._replace(attention=attention)

    def forward(
        self, ids_BT: Any, cache: Cache, new_B: Any = None, tap: Any = None, last_only: bool = True
    ) -> np.ndarray:
        """model.forward of this model: logits_BTV, on the host."""
        B, T = np.shape(ids_BT) if np.ndim(ids_BT) == 2 else (0, 0)
        if T != 1 or tap is not None or not self._steps_through(cache, B):
            return super().forward(ids_BT, cache, new_B, tap, last_only)
        ids_BT = host_ids(ids_BT, self.config.vocab_size)
        with working_on(self.device):
            cache.check(self.config, self.profile.dtype, cp)
            new_B = cache.room((B, 1), new_B)
            positions_B = np.where(new_B > 0, cache.lengths_B, -1)
            logits_BV = self._step(cache).forward(ids_BT[:, 0], positions_B)
            cache.lengths_B = cache.lengths_B + new_B
        return logits_BV[:, None]

    def greedy(self, ids_B: Any, cache: Cache, n: int) -> tuple[np.ndarray, np.ndarray]:
        """Feed one token a row, then n - 1 times the most probable one that followed.

        Returns the n tokens that followed, ids_nB, and their natural log-probabilities, float64;
        the last has been chosen but not fed. They are fewer where logits that are not finite
        follow: nobody may want what those would have chosen. The host waits once for RECORDS
        tokens. Raises InputError as forward does, for rows beyond 8, and for logits that are not
        finite at the first of the tokens.
        """
        with working_on(self.device):
            last_B = self._checked("greedy", ids_B, cache, n)
            found = []
            for start in range(0, n, RECORDS):
                size = min(RECORDS, n - start)
                tokens = self._step(cache).greedy(last_B, cache.lengths_B, size)
                good = self._good(*tokens)
                found.append([array_nB[:good] for array_nB in tokens])
                cache.lengths_B = cache.lengths_B + good
                if good < size:
                    _wipe(cache)
                    break
                last_B = found[-1][0][-1]
        ids_nB, logprobs_nB = (np.concatenate(each) for each in zip(*found, strict=True))
        if not len(ids_nB):
            raise InputError("logits: expected finite numbers: the weights are damaged")
        return ids_nB, logprobs_nB

    def _good(self, ids_nB: np.ndarray, logprobs_nB: np.ndarray) -> int:
        """How many tokens of every row were chosen from finite logits, before the first not."""
        bad_nB = ~np.isfinite(logprobs_nB) | (ids_nB >= self.config.vocab_size)
        return int((~bad_nB.any(axis=1)).cumprod().sum())

    def sample(
        self, ids_B: Any, cache: Cache, sampling: Sampling, numbers_B: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Feed one token a row; return the one that follows, drawn with the row's random number.

        ids_1B, and their natural log-probabilities under the model itself, float64; they have not
        been fed. Raises InputError as greedy does.
        """
        with working_on(self.device):
            last_B = self._checked("sample", ids_B, cache, 1)
            try:
                found = self._step(cache).sample(last_B, cache.lengths_B, sampling, numbers_B)
            except InputError:  # damaged logits, and so, perhaps, keys and values
                _wipe(cache)
                raise
            cache.lengths_B = cache.lengths_B + 1
        return found[0][None], found[1][None]

    def chooser(self, cache: Cache) -> Any:
        """Itself for caches that steps take: few bytes a row come back, and not all logits."""
        return self if self._steps_through(cache, cache.batch) else None

    def _checked(self, name: str, ids_B: Any, cache: Cache, n: int) -> np.ndarray:
        """The ids; raise InputError for what no step takes, or no room for n tokens."""
        ids_B1 = host_ids(np.asarray(ids_B)[:, None], self.config.vocab_size)
        if not self._steps_through(cache, len(ids_B1)):
            raise InputError(
                f"{name}: expected float32 and 1 to {MOST_ROWS} rows, found {len(ids_B1)}"
            )
        cache.check(self.config, self.profile.dtype, cp)
        cache.room((len(ids_B1), n), None)
        return ids_B1[:, 0]

    def _steps_through(self, cache: Cache, B: int) -> bool:
        whole = all(
            isinstance(a, cp.ndarray) and a.flags.c_contiguous for a in (*cache.k, *cache.v)
        )
        return self.model is not None and 1 <= B <= MOST_ROWS and cache.batch == B and whole

    def _step(self, cache: Cache) -> Step:
        """The step of this cache, made anew if its arrays are no longer those it had."""
        step = self._steps.get(cache)
        arrays = [*cache.k, *cache.v]
        if step is None or any(a is not b for a, b in zip(arrays, (*step.k, *step.v), strict=True)):
            assert self.model is not None
            step = self._steps[cache] = Step(self.model, list(cache.k), list(cache.v))
        return step


def _wipe(cache: Cache) -> None:
    """Put zeros where no token is held: a mask multiplies by zero, and 0 * NaN would be NaN."""
    for array_BKSH in (*cache.k, *cache.v):
        for array_KSH, length in zip(array_BKSH, cache.lengths_B, strict=True):
            array_KSH[:, length:] = 0


def attention(q_BTNH: Any, k_BKSH: Any, v_BKSH: Any, positions_BT: Any, see: Any) -> Any:
    """model.attention of float32 queries by one kernel that holds no scores but a block's.

    Positions rise along each row. see is not called: scores and probs are never there. Raises
    ValueError for keys and values that do not lie alike, as slots of whole caches do.
    """
    if k_BKSH.strides != v_BKSH.strides or k_BKSH.strides[0] != k_BKSH.strides[1] * k_BKSH.shape[1]:
        raise ValueError("expected keys and values of whole rows of a cache")
    (B, T, N, H), (K, S) = q_BTNH.shape, k_BKSH.shape[1:3]
    kernel = registry.prefill_kernel(H, k_BKSH.dtype)
    queries = dict(kernel.defines)["QUERIES"]
    y_BTNH = cp.empty((B, T, N, H), np.float32)
    launch(
        kernel, (-(-(T * N // K) // queries), K, B), queries * 4,
        q=cp.ascontiguousarray(q_BTNH), keys=Strided(k_BKSH), values=Strided(v_BKSH),
        positions=positions_BT, T=T, K=K, G=N // K, slots=S,
        step=k_BKSH.strides[1] // k_BKSH.itemsize, scale=1 / sqrt(H), y=y_BTNH,
    )  # fmt: skip
    return y_BTNH

"""The engine "numba": decode steps in one compiled function, prefill over compiled parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numba
import numpy as np

from llama3np.backend import host_ids
from llama3np.cache import Cache, Window
from llama3np.config import Config
from llama3np.kernels.attention import attention
from llama3np.kernels.cpu import gemm, gemm_bf16, gemv, tokens
from llama3np.kernels.cpu.dots import widen_rows as compiled_widen
from llama3np.kernels.cpu.layout import PLAIN, described, parts_of
from llama3np.kernels.cpu.shared import address, aligned, new_counters
from llama3np.kernels.cpu.softmax import soften
from llama3np.kernels.cpu.step import PHASES, SPLIT, STEP, own_floats, run
from llama3np.kernels.engine import Engine
from llama3np.kernels.linear import Products
from llama3np.kernels.product import widen_rows
from llama3np.kernels.rounded import round_bf16
from llama3np.model import rope_tables
from llama3np.numerics import Profile
from llama3np.params import Params
from llama3np.threads import Pool

MOST_TOKENS = 8  # of one step; more are faster as products of many rows


class CompiledEngine(Engine):
    """Calls of few tokens, as in decoding, are one compiled step; others go by the ops."""

    name = "numba"

    def __init__(self, params: Params, config: Config, profile: Profile, pool: Pool):
        super().__init__(params, config, profile, pool)
        self.model: Any = described(params, config, profile, pool.threads)
        self._spare: list[Room] = []  # room of finished steps, for the next one of its shape
        self._angles = Angles(config)

        if profile.dtype == "float32":
            self.ops = self.ops._replace(
                rms_norm=partial(tokens.rms_norm, pool=pool),
                rope=partial(tokens.rope, pool=pool),
                attention=partial(attention, pool=pool, soften=soften),
                swiglu=partial(tokens.swiglu, pool=pool),
            )

    @staticmethod
    def widen(w: Any, start: int, stop: int, out: np.ndarray) -> None:
        """product.widen_rows, compiled, for what compiled code can read in one piece."""
        found = parts_of(w)
        if found is None or len(found[1]) > 1 or out.dtype != np.float32:
            widen_rows(w, start, stop, out)
            return
        code, (stored,), _ = found
        row_bytes = stored.strides[0]
        first = address(stored) + start * row_bytes
        compiled_widen(code, first, row_bytes, stop - start, w.shape[1], address(out))

    def products(self) -> Products:
        """What computes x_MD @ w.T by the profile: our own kernels where the processor has them."""
        rounded, pool, blas = self.profile.rounded, self.pool, super().products()
        has_bf16 = rounded and gemm_bf16.supported()
        is_f32, has_avx512 = self.profile.dtype != "float64", gemm.supported()

        def multiply(x_MD: np.ndarray, weights: Sequence[Any]) -> list[np.ndarray]:
            if has_bf16 and all(isinstance(w.stored, np.ndarray) for w in weights):
                return gemm_bf16.products(x_MD, [w.stored for w in weights], pool)
            ours = gemv if len(x_MD) < gemm.FEWEST else gemm if has_avx512 else None
            if is_f32 and ours and all(map(gemm.takes, weights)):
                return ours.products(round_bf16(x_MD) if rounded else x_MD, weights, pool)
            return blas(x_MD, weights)

        return multiply

    def forward(
        self, ids_BT: Any, cache: Cache, new_B: Any = None, tap: Any = None, last_only: bool = True
    ) -> np.ndarray:
        """model.forward of this model: logits_BTV."""
        tokens = np.size(ids_BT) if new_B is None else int(np.sum(new_B))
        few = 1 <= tokens <= MOST_TOKENS and tap is None and self.model is not None
        # Compiled code is given addresses alone: of views it would read and write something else.
        if not few or not all(map(_is_whole, (*cache.k, *cache.v))):
            return super().forward(ids_BT, cache, new_B, tap, last_only)
        ids_BT = host_ids(ids_BT, self.config.vocab_size)
        cache.check(self.config, self.profile.dtype)
        return self._step(ids_BT, cache, cache.window(ids_BT.shape, new_B), last_only)

    def phase_ticks(self) -> np.ndarray | None:
        """The processor's clock at the beginning of the last step and the ends of its phases.

        Those are step.PHASES of each layer, and the logits. None if there was no such step, or
        the processor does not tell its clock.
        """
        ticks_P = self._spare[-1].arrays["ticks_P"].copy() if self._spare else np.zeros(1)
        return ticks_P if ticks_P.any() else None

    def _step(
        self, ids_BT: np.ndarray, cache: Cache, window: Window, last_only: bool
    ) -> np.ndarray:
        (B, T), V = ids_BT.shape, self.config.vocab_size
        rows_M, columns_M = window.rows_M, window.columns_M
        wanted_W = np.arange(len(rows_M))
        if last_only:  # each row's last token
            wanted_W = np.cumsum(window.new_B)[window.new_B > 0] - 1
        room = self._room(len(rows_M), len(wanted_W), window.size, cache)
        a = room.arrays
        a["h_MD"][...] = self.params.embed_VD[ids_BT[rows_M, columns_M]]
        a["cos_MP"][...], a["sin_MP"][...] = self._angles.at(window.slots_M)
        a["rows_M"][...], a["slots_M"][...], a["wanted_W"][...] = rows_M, window.slots_M, wanted_W
        a["cache_L2"][...] = [*zip(map(address, cache.k), map(address, cache.v), strict=True)]
        job = room.job(self, cache)
        try:
            self.pool.run(job)
        except BaseException:  # Ctrl-C: helpers may have begun, in memory that is the caller's
            job(0)
            raise
        cache.advance(window)
        logits_BTV = np.zeros((B, 1 if last_only else T, V), np.float32)
        logits_BTV[rows_M[wanted_W], 0 if last_only else columns_M] = a["logits_WV"]
        self._spare = [room]
        return logits_BTV

    def _room(self, tokens: int, wanted: int, size: int, cache: Cache) -> Room:
        """Room for a step of these sizes: that of the last step where it fits, else new."""
        stretches, stored = -(-size // SPLIT), cache.k[0].dtype
        sizes = tokens, wanted, stretches, stored, cache.max_seq_len
        try:
            room = self._spare.pop()  # one step: no other thread gets the same
        except IndexError:
            return Room(self, sizes)
        return room if room.sizes == sizes else Room(self, sizes)


def _is_whole(array: Any) -> bool:
    return isinstance(array, np.ndarray) and array.flags.carray


class Room:
    """What a step works in: its record and arrays, used again by the next one of equal sizes."""

    def __init__(self, engine: CompiledEngine, sizes: Any):
        M, W, X, stored, slots = self.sizes = sizes
        c, workers = engine.config, engine.pool.threads
        P, heads = c.head_dim // 2, c.n_heads * c.head_dim
        x, y, stride, own = own_floats(engine.model.record[0], engine.model.matrices, M)
        self.phases = c.n_layers * PHASES + 1
        self.arrays = {
            **{name: np.empty(M, np.int64) for name in ("rows_M", "slots_M")},
            "wanted_W": np.empty(W, np.int64),
            "cache_L2": np.empty((c.n_layers, 2), np.int64),
            **{name: np.empty((M, P), np.float32) for name in ("cos_MP", "sin_MP")},
            "h_MD": aligned(M, c.dim),
            "q_MX": aligned(M, heads),
            "parts_MKX": aligned(M * X * c.n_heads, c.head_dim + 2),
            "act_MF": aligned(M, c.ffn_dim),
            "logits_WV": aligned(W, c.vocab_size),
            "own": aligned(workers, own),
            "ticks_P": np.zeros(self.phases + 1, np.int64),
        }
        self.record = np.zeros(1, STEP)
        for name, array in self.arrays.items():
            self.record[name] = address(array)
        numbers = {
            **{"tokens": M, "wanted": W, "workers": workers, "stretches": X},
            **{"cache_slots": slots, "cache_code": PLAIN[stored], "cache_item": stored.itemsize},
            **{"own_bytes": 4 * own, "x_bytes": 4 * x, "y_bytes": 4 * y, "y_stride": 4 * stride},
        }
        for name, number in numbers.items():
            self.record[name] = number

    def job(self, engine: CompiledEngine, cache: Cache) -> Callable[[int], None]:
        """A step as Pool.run takes it, compiled before any thread can begin with it.

        Its counters are new: a thread that comes late to the step before finds the old ones, all
        done. For that thread's sake the job holds on to all that it may look at: weights, room and
        cache.
        """
        counters_PC = new_counters(self.phases, engine.pool.threads)
        record = self.record.copy()
        record["counters_PC"] = address(counters_PC)
        if not run.signatures:
            run.compile(tuple(map(numba.typeof, (0, engine.model.record, record))))
        kept = engine, self, counters_PC, *cache.k, *cache.v
        return partial(_share, kept, engine.model.record, record)


def _share(kept: Any, model: np.ndarray, step: np.ndarray, worker: int) -> None:
    run(worker, model, step)


class Angles:
    """model.rope_tables of positions from 0 on, kept from step to step."""

    def __init__(self, config: Config):
        self.config = config
        nothing_0P = np.empty((0, config.head_dim // 2), np.float32)
        self.tables = nothing_0P, nothing_0P  # one attribute: other threads see both or neither

    def at(self, positions_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """cos_MP and sin_MP."""
        cos_SP, sin_SP = self.tables
        if positions_M.max() >= len(cos_SP):
            size = 2 * int(positions_M.max()) + 256
            tables = rope_tables(self.config, np.arange(size)[None], "float32")
            cos_SP, sin_SP = self.tables = tables[0][0], tables[1][0]
        return cos_SP[positions_M], sin_SP[positions_M]

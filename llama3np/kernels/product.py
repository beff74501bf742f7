"""The NumPy engine's product: a weight of any format, read in place by all threads.

Rows of the weight are cut into chunks. Each is widened to float32 (or float64) into a scratch that
its thread keeps, and multiplied there by BLAS, at one thread. Chunks depend on sizes and on the
number of threads only, so equal weights give equal bits, however they are stored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from llama3np.kernels.blocks import Blocks
from llama3np.kernels.half import Half
from llama3np.kernels.joined import Joined
from llama3np.kernels.widening import from_half
from llama3np.threads import Pool

# widen(w, start, stop, out) fills `out`, a contiguous array of the product's dtype, with rows start
# to stop of w.
Widen = Callable[[Any, int, int, np.ndarray], None]

# Weights in a chunk when few vectors are multiplied: 4 MiB of float32. Measured: reading from
# memory is slow if the scratch fits into a core's own cache, and four times as many are too many.
CHUNK = 2**20
# Below this many a second thread gains less than it costs to wake.
SHARE = 2**17
# From so many vectors on, BLAS copies parts of both matrices to lay them out for itself. Larger
# tiles make fewer copies of the vectors: rows of a tile, and its weights at most (32 MiB).
PREFILL, TILE_ROWS, TILE = 32, 1024, 2**23


def product(x_MD: np.ndarray, w: Any, pool: Pool, widen: Widen | None = None) -> np.ndarray:
    """Multiply: x_MD @ w.T as (M, O), in the dtype of x_MD, float32 or float64.

    w: a plain array, Half, Joined or Blocks. The caller holds threads.single_threaded_blas(). Any
    number of threads may call at once. widen: for another way than NumPy's to widen rows.
    """
    return products(x_MD, (w,), pool, widen)[0]


def products(
    x_MD: np.ndarray, weights: Sequence[Any], pool: Pool, widen: Widen | None = None
) -> list[np.ndarray]:
    """Multiply several weights by one x_MD, as `product` does, with threads that wait only once."""
    y = [np.empty((len(x_MD), w.shape[0]), x_MD.dtype) for w in weights]
    steps = [_step(len(x_MD), w.shape, pool.threads) for w in weights]
    counts = [-(-w.shape[0] // step) for w, step in zip(weights, steps, strict=True)]
    ends = list(accumulate(counts))

    def task(i: int, _: int) -> None:
        which = next(j for j, end in enumerate(ends) if i < end)
        w, step = weights[which], steps[which]
        start = (i - ends[which] + counts[which]) * step
        _multiply(x_MD, w, start, min(start + step, w.shape[0]), y[which], widen or widen_rows)

    pool.map(task, ends[-1])
    return y


def _step(M: int, shape: tuple[int, int], threads: int) -> int:
    """Rows of a chunk: as many as are good for one product, and the same share for each thread."""
    n_out, n_in = shape
    most = max(1, CHUNK // n_in) if M < PREFILL else max(1, min(TILE_ROWS, TILE // n_in))
    chunks = -(-n_out // most)
    if M * n_out * n_in > SHARE * threads:
        chunks = -(-chunks // threads) * threads
    return max(1, -(-n_out // chunks))


def _multiply(
    x_MD: np.ndarray, w: Any, start: int, stop: int, y_MO: np.ndarray, widen: Widen
) -> None:
    """Multiply by rows start to stop; a plain array of the same dtype goes to BLAS as it is."""
    if isinstance(w, np.ndarray) and w.dtype == x_MD.dtype:
        rows = w[start:stop]
    else:
        rows = _scratch((stop - start, w.shape[1]), x_MD.dtype)
        widen(w, start, stop, rows)
    if len(x_MD) == 1:
        np.matmul(rows, x_MD[0], out=y_MO[0, start:stop])
    else:
        np.matmul(x_MD, rows.T, out=y_MO[:, start:stop])


_kept = threading.local()


def _scratch(shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """An array of this thread, whatever is in it; memory from the system is slow to touch first."""
    nbytes = shape[0] * shape[1] * dtype.itemsize
    if getattr(_kept, "bytes", None) is None or len(_kept.bytes) < nbytes:
        _kept.bytes = np.empty(nbytes, np.uint8)
    return _kept.bytes[:nbytes].view(dtype).reshape(shape)


# ---- widening ---------------------------------------------------------------------------------


def widen_rows(w: Any, start: int, stop: int, out: np.ndarray) -> None:
    """Fill `out` with rows start to stop of a weight, exactly: float32 or float64, contiguous."""
    stored = w.stored if isinstance(w, Half) else w
    if isinstance(stored, Blocks):
        _decode(stored, start, stop, out)
    elif isinstance(stored, Joined):
        for part, rows, columns, place in stored.within(start, stop):
            _widen(part[rows], out[place, columns])
    else:
        _widen(stored[start:stop], out)


def _decode(w: Blocks, start: int, stop: int, out: np.ndarray) -> None:
    if out.dtype == np.float32:
        w.decode_rows(start, stop, out)
    else:
        out[...] = w[start:stop]


def _widen(rows: np.ndarray, out: np.ndarray) -> None:
    if rows.dtype == np.float16 and out.dtype == np.float32:
        from_half(rows.view(np.int16), out)
    else:
        np.copyto(out, rows, casting="unsafe")  # widening only; ml_dtypes types are "unsafe"

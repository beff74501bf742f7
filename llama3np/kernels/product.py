"""The NumPy engine's product: a weight of any format, read in place by all threads.

Rows of the weight are cut into chunks. Each is widened to float32 (or float64) into a scratch that
its thread keeps, and multiplied there by BLAS, at one thread. Chunks depend on sizes and on the
number of threads only, so equal weights give equal bits, however they are stored.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llama3np.kernels.widening import widen as widen_array
from llama3np.threads import Pool

# widen(w, start, stop, out) fills `out`, a contiguous array of the product's dtype, with rows start
# to stop of w.
Widen = Callable[[Any, int, int, np.ndarray], None]

# Weights in a chunk when few vectors are multiplied: 4 MiB of float32. Measured: reading from
# memory is slow if the scratch fits into a core's own cache, and four times as many are too many.
CHUNK = 2**20
# Up to so many for each thread, over all weights of one x, a second one gains less than it costs to
# wake it.
SHARE = 2**18
# From so many vectors on, BLAS copies parts of both matrices to lay them out for itself. Larger
# tiles make fewer copies of the vectors: rows of a tile, its weights (32 MiB) and vectors at most.
PREFILL, TILE_ROWS, TILE, TILE_VECTORS = 32, 1024, 2**23, 1024
# Fewer vectors than this are multiplied one by one.
FEW = 4


def _keep_freed_memory() -> None:
    """Make glibc reuse the memory of large arrays, once for the process.

    It maps each of them anew, and the first touch of each page then costs as much as decoding what
    goes there, until it has seen an array of that size freed: then it keeps twice as much.
    Elsewhere this does nothing. The array itself is never touched, so it takes no memory.
    """
    np.empty(2**24, np.uint8)


_keep_freed_memory()


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
    M, y = len(x_MD), [np.empty((len(x_MD), w.shape[0]), x_MD.dtype) for w in weights]
    shared = M * sum(w.shape[0] * w.shape[1] for w in weights) > SHARE * pool.threads
    steps = [_step(M, w.shape, pool.threads if shared else 1) for w in weights]
    chunks = [(j, at) for j, w in enumerate(weights) for at in range(0, w.shape[0], steps[j])]
    x_PD, widen = _padded(x_MD), widen or widen_rows

    def task(i: int, _: int) -> None:
        j, start = chunks[i]
        _multiply(x_PD, weights[j], start, y[j][:, start : start + steps[j]], widen)

    if shared:
        pool.map(task, len(chunks))
    else:
        for i in range(len(chunks)):
            task(i, 0)
    return y


def _step(M: int, shape: tuple[int, int], threads: int) -> int:
    """Rows of a chunk: as many as are good for one product, and the same share for each thread."""
    n_out, n_in = shape
    most = max(1, CHUNK // n_in) if M < PREFILL else max(1, min(TILE_ROWS, TILE // n_in))
    chunks = -(-n_out // most)
    return -(-n_out // (-(-chunks // threads) * threads))


def _padded(x_MD: np.ndarray) -> np.ndarray:
    """Vectors of zeros added up to a power of 2, where that is faster than fewer: (P, D)."""
    M = len(x_MD)
    if not FEW < M < PREFILL:
        return x_MD
    x_PD = np.zeros((1 << (M - 1).bit_length(), x_MD.shape[1]), x_MD.dtype)
    x_PD[:M] = x_MD
    return x_PD


def _multiply(x_PD: np.ndarray, w: Any, start: int, y_MO: np.ndarray, widen: Widen) -> None:
    """Multiply by the rows from `start`; a plain array of the same dtype goes to BLAS as it is."""
    n_rows, dtype = y_MO.shape[1], x_PD.dtype
    if isinstance(w, np.ndarray) and w.dtype == dtype:
        _blas(x_PD, w[start : start + n_rows], y_MO)
    else:
        w_OD = _scratch((n_rows, w.shape[1]), dtype)
        widen(w, start, start + n_rows, w_OD)
        _blas(x_PD, w_OD, y_MO)


def _blas(x_PD: np.ndarray, w_OD: np.ndarray, y_MO: np.ndarray) -> None:
    """Fill y_MO with the first M rows of x_PD @ w_OD.T, in the way that is fastest for so many.

    With the weights as the left operand BLAS takes half the time for few vectors, and a tenth less
    for hundreds; the result is then turned by parts that fit the cache.
    """
    if len(y_MO) < FEW:
        for x_D, y_O in zip(x_PD, y_MO, strict=True):
            np.matmul(w_OD, x_D, out=y_O)
        return
    for m in range(0, len(y_MO), TILE_VECTORS):
        y_NO = y_MO[m : m + TILE_VECTORS]
        y_OP = np.matmul(w_OD, x_PD[m : m + TILE_VECTORS].T)
        step = max(16, 8192 // len(y_NO))
        for i in range(0, len(y_OP), step):
            y_NO[:, i : i + step] = y_OP[i : i + step, : len(y_NO)].T


_kept = threading.local()


def _scratch(shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """An array of this thread, whatever is in it; memory from the system is slow to touch first."""
    nbytes = shape[0] * shape[1] * dtype.itemsize
    if getattr(_kept, "bytes", None) is None or len(_kept.bytes) < nbytes:
        _kept.bytes = np.empty(nbytes, np.uint8)
    return _kept.bytes[:nbytes].view(dtype).reshape(shape)


def widen_rows(w: Any, start: int, stop: int, out: np.ndarray) -> None:
    """NumPy's way to fill `out`, float32 or float64 and contiguous, with rows start to stop."""
    if isinstance(w, np.ndarray):
        widen_array(w[start:stop], out)
    else:
        w.widen(start, stop, out)

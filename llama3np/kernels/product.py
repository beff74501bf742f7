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

from llama3np.kernels.blocks import Blocks
from llama3np.kernels.planes import PLANES, decode_columns, order
from llama3np.kernels.widening import widen as widen_array
from llama3np.threads import Pool

# widen(w, start, stop, out) fills `out`, a contiguous array of the product's dtype, with rows start
# to stop of w.
Widen = Callable[[Any, int, int, np.ndarray], None]

# Weights in a chunk when few vectors are multiplied: 4 MiB of float32. Measured: reading from
# memory is slow if the scratch fits into a core's own cache, and four times as many are too many.
CHUNK = 2**20
# Weights decoded at a time by columns. Threads that take short steps wait for the interpreter.
COLUMNS = 2**19
# Below this many a second thread gains less than it costs to wake.
SHARE = 2**17
# From so many vectors on, BLAS copies parts of both matrices to lay them out for itself. Larger
# tiles make fewer copies of the vectors: rows of a tile, its weights (32 MiB) and vectors at most.
PREFILL, TILE_ROWS, TILE, TILE_VECTORS = 32, 1024, 2**23, 1024
# Fewer vectors than this are multiplied one by one.
FEW = 4


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
    M = len(x_MD)
    y = [np.empty((M, w.shape[0]), x_MD.dtype) for w in weights]
    steps = [_step(M, w.shape, pool.threads) for w in weights]
    chunks = [(j, at) for j, w in enumerate(weights) for at in range(0, w.shape[0], steps[j])]
    x_PD = _padded(x_MD)

    def task(i: int, _: int) -> None:
        j, start = chunks[i]
        y_MO = y[j][:, start : start + steps[j]]
        _multiply(x_PD, weights[j], start, y_MO, widen)

    pool.map(task, len(chunks))
    return y


def _step(M: int, shape: tuple[int, int], threads: int) -> int:
    """Rows of a chunk: as many as are good for one product, and the same share for each thread."""
    n_out, n_in = shape
    most = max(1, CHUNK // n_in) if M < PREFILL else max(1, min(TILE_ROWS, TILE // n_in))
    chunks = -(-n_out // most)
    if M * n_out * n_in > SHARE * threads:
        chunks = -(-chunks // threads) * threads
    return -(-n_out // chunks)


def _padded(x_MD: np.ndarray) -> np.ndarray:
    """Vectors of zeros added up to a power of 2, where that is faster than fewer: (P, D)."""
    M = len(x_MD)
    if not FEW < M < PREFILL:
        return x_MD
    x_PD = np.zeros((1 << (M - 1).bit_length(), x_MD.shape[1]), x_MD.dtype)
    x_PD[:M] = x_MD
    return x_PD


def _multiply(x_PD: np.ndarray, w: Any, start: int, y_MO: np.ndarray, widen: Widen | None) -> None:
    """Multiply by the rows from `start`; a plain array of the same dtype goes to BLAS as it is."""
    n_rows, dtype = y_MO.shape[1], x_PD.dtype
    if widen is None and len(x_PD) < PREFILL and dtype == np.float32 and _in_planes(w):
        _multiply_columns(x_PD, w, start, y_MO)
    elif isinstance(w, np.ndarray) and w.dtype == dtype:
        _blas(x_PD, w[start : start + n_rows], y_MO)
    else:
        w_OD = _scratch((n_rows, w.shape[1]), dtype)
        (widen or widen_rows)(w, start, start + n_rows, w_OD)
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


def _in_planes(w: Any) -> bool:
    return isinstance(w, Blocks) and w.type in PLANES


def _multiply_columns(x_PD: np.ndarray, w: Blocks, start: int, y_MO: np.ndarray) -> None:
    """The same with the weights laid out as columns, some rows of them at a time."""
    (M, n_rows), n_in = y_MO.shape, w.shape[1]
    x_PK = x_PD[:, order(w.type, n_in)]
    step = -(-n_rows // -(-n_rows * n_in // COLUMNS))
    for i in range(0, n_rows, step):
        y_MS = y_MO[:, i : i + step]
        w_KS = _scratch((n_in, y_MS.shape[1]), x_PK.dtype)
        decode_columns(w, start + i, start + i + y_MS.shape[1], w_KS)
        if M < FEW:
            for x_K, y_S in zip(x_PK, y_MS, strict=True):
                np.matmul(x_K, w_KS, out=y_S)
        else:
            y_MS[...] = np.matmul(x_PK, w_KS)[:M]


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

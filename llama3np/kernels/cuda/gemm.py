"""cuBLAS by its one general product: 16-bit numbers in, float32 sums and results out.

CuPy's own `@` gives bfloat16 for bfloat16, rounding each sum to 8 bits, copies weights of products
with more than two dimensions, and takes TF32 (10 bits) where CUPY_TF32 is set. Here sums are
float32, nothing is copied, and the result may be columns of a wider matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import cupy
import ml_dtypes
import numpy as np
from cupy._core import _routines_linalg as linalg  # no public name tells the type of sums
from cupy.cuda import cublas, device, runtime

_SINGLE, _DOUBLE = np.dtype(np.float32), np.dtype(np.float64)
CODES = {
    np.dtype(np.float32): runtime.CUDA_R_32F,
    _DOUBLE: runtime.CUDA_R_64F,
    np.dtype(np.float16): runtime.CUDA_R_16F,
    np.dtype(ml_dtypes.bfloat16): runtime.CUDA_R_16BF,
}


def multiply(x_MK: Any, w_NK: Any, y_MN: Any) -> None:
    """Fill y_MN with x_MK @ w_NK.T; the sums are float32, or float64 if the operands are.

    Operands of one dtype, rows contiguous, rows of any distance; y float32, or float64 beside
    float64. Raises ValueError for anything else: cuBLAS is given addresses and would not notice.
    """
    (M, K), N = x_MK.shape, w_NK.shape[0]
    wide = np.float64 if x_MK.dtype == _DOUBLE else np.float32
    matching = x_MK.dtype == w_NK.dtype and y_MN.dtype == wide
    if not matching or w_NK.shape[1] != K or y_MN.shape != (M, N):
        told = " ".join(f"{a.dtype}{a.shape}" for a in (x_MK, w_NK, y_MN))
        raise ValueError(f"expected x_MK, w_NK and y_MN of matching types, found {told}")
    sums = cublas.CUBLAS_COMPUTE_64F if wide is np.float64 else cublas.CUBLAS_COMPUTE_32F
    one, zero = np.ones(1, wide), np.zeros(1, wide)
    # To cuBLAS, which reads columns first, each matrix is its own transpose: y.T = w @ x.T.
    cublas.gemmEx(
        device.get_cublas_handle(),
        cublas.CUBLAS_OP_T,
        cublas.CUBLAS_OP_N,
        *(N, M, K, one.ctypes.data),
        *(w_NK.data.ptr, CODES[w_NK.dtype], _stride(w_NK)),
        *(x_MK.data.ptr, CODES[x_MK.dtype], _stride(x_MK)),
        *(zero.ctypes.data, y_MN.data.ptr, CODES[y_MN.dtype], _stride(y_MN)),
        *(sums, cublas.CUBLAS_GEMM_DEFAULT),
    )


def _stride(a_RC: Any) -> int:
    """Numbers from one row to the next."""
    rows, columns = a_RC.shape
    if columns > 1 and a_RC.strides[1] != a_RC.itemsize:
        raise ValueError("expected contiguous rows")
    return a_RC.strides[0] // a_RC.itemsize if rows > 1 else columns


@contextmanager
def exact() -> Iterator[None]:
    """Let CuPy's own `@` compute float32 as float32 in a block, whatever CUPY_TF32 says."""
    chosen = linalg.get_compute_type(_SINGLE)
    linalg.set_compute_type(_SINGLE, linalg.COMPUTE_TYPE_FP32)
    try:
        yield
    finally:
        linalg.set_compute_type(_SINGLE, chosen)


def product(x_MK: Any, w_NK: Any) -> Any:
    """x_MK @ w_NK.T in a new array, as `multiply` computes it."""
    wide = np.float64 if x_MK.dtype == _DOUBLE else np.float32
    y_MN = cupy.empty((len(x_MK), w_NK.shape[0]), wide)
    multiply(x_MK, w_NK, y_MN)
    return y_MN

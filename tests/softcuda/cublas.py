"""Stand-in for cupy_backends.cuda.libs.cublas: matrix products on the software device, by NumPy.

float32, float16 and bfloat16 are accumulated in float32 and rounded to the output's type at the
end, as CUBLAS_COMPUTE_32F does; in which order cuBLAS adds cannot be known without a GPU. As in
CuPy 14.2, every call is refused while the current stream is capturing.
"""

import types
from functools import partial
from typing import Any

import _softcuda
import ml_dtypes
import numpy as np

from softcuda.memory import current_stream, view


class CUBLASError(RuntimeError):
    """What CuPy raises for a cuBLAS status other than success."""


module: Any = types.ModuleType("cupy_backends.cuda.libs.cublas")
module.CUBLASError = CUBLASError
module.__dict__.update(
    CUBLAS_OP_N=0,
    CUBLAS_OP_T=1,
    CUBLAS_OP_C=2,
    CUBLAS_POINTER_MODE_HOST=0,
    CUBLAS_POINTER_MODE_DEVICE=1,
    CUBLAS_SIDE_LEFT=0,
    CUBLAS_SIDE_RIGHT=1,
    CUBLAS_FILL_MODE_LOWER=0,
    CUBLAS_FILL_MODE_UPPER=1,
    CUBLAS_DIAG_NON_UNIT=0,
    CUBLAS_DIAG_UNIT=1,
    CUBLAS_GEMM_DEFAULT=-1,
    CUBLAS_GEMM_DEFAULT_TENSOR_OP=99,
    CUBLAS_GEMM_DFALT=-1,
    CUBLAS_GEMM_DFALT_TENSOR_OP=99,
    CUBLAS_DEFAULT_MATH=0,
    CUBLAS_TENSOR_OP_MATH=1,
    CUBLAS_COMPUTE_16F=64,
    CUBLAS_COMPUTE_16F_PEDANTIC=65,
    CUBLAS_COMPUTE_32F=68,
    CUBLAS_COMPUTE_32F_PEDANTIC=69,
    CUBLAS_COMPUTE_32F_FAST_16F=74,
    CUBLAS_COMPUTE_32F_FAST_16BF=75,
    CUBLAS_COMPUTE_32F_FAST_TF32=77,
    CUBLAS_COMPUTE_64F=70,
    CUBLAS_COMPUTE_64F_PEDANTIC=71,
)

F32, F64, F16, C64, C128, BF16 = 0, 1, 2, 4, 5, 14  # cudaDataType
DTYPES = {
    F32: np.dtype(np.float32),
    F64: np.dtype(np.float64),
    F16: np.dtype(np.float16),
    C64: np.dtype(np.complex64),
    C128: np.dtype(np.complex128),
    BF16: np.dtype(ml_dtypes.bfloat16),
}
# The table of cublasGemmEx in its manual: compute type -> types of A, B and C that it takes.
_OF_32F = {
    (BF16, BF16, BF16),
    (BF16, BF16, F32),
    (F16, F16, F16),
    (F16, F16, F32),
    (F32, F32, F32),
    (C64, C64, C64),
}
_OF_64F = {(F64, F64, F64), (C128, C128, C128)}
SUPPORTED = {
    64: {(F16, F16, F16)},
    65: {(F16, F16, F16)},
    68: _OF_32F,
    69: _OF_32F,
    70: _OF_64F,
    71: _OF_64F,
    74: {(F32, F32, F32)},
    75: {(F32, F32, F32)},
    77: {(F32, F32, F32), (C64, C64, C64)},
}
# What the old interface gives in place of a compute type: the type of C.
_COMPUTE_OF = {F32: 68, F64: 70, F16: 64, C64: 68, C128: 70}
calls: list[tuple] = []  # (name, transA, transB, m, n, k, dtypes of A, B, C) of every product


def _matrix(operand, rows, columns):
    """A column-major matrix; operand is (address, dtype, leading dimension)."""
    address, dtype, ld = operand
    if ld < max(1, rows):
        raise CUBLASError(f"CUBLAS_STATUS_INVALID_VALUE (leading dimension {ld} of {rows} rows)")
    count = ld * (columns - 1) + rows if columns and rows else 0
    if count and not _softcuda.holds(address, count * dtype.itemsize):
        raise RuntimeError("softcuda: a cuBLAS operand is not (fully) inside a device allocation")
    strides = (dtype.itemsize, ld * dtype.itemsize)
    return np.lib.stride_tricks.as_strided(view(address, count, dtype), (rows, columns), strides)


def set_stream(handle, stream):
    """cublasSetStream, which every wrapper of CuPy calls first: refused in a capture."""
    from cupy_backends.cuda.api import runtime

    if runtime.streamIsCapturing(stream):
        raise NotImplementedError(
            "calling cuBLAS API during stream capture is currently unsupported"
        )


def _arithmetic(compute, types_ABC):
    """(type of the accumulation, type of alpha and beta). Raises CUBLASError if there is none."""
    compute = _COMPUTE_OF.get(compute, compute)
    if types_ABC not in SUPPORTED.get(compute, ()):
        raise CUBLASError("CUBLAS_STATUS_NOT_SUPPORTED")
    if types_ABC[2] in (C64, C128):
        return DTYPES[types_ABC[2]], DTYPES[types_ABC[2]]
    if compute in (70, 71):
        return np.dtype(np.float64), np.dtype(np.float64)
    return np.dtype(np.float32), np.dtype(np.float16 if compute in (64, 65) else np.float32)


def _oriented(operand, operation, rows, columns):
    """op(X) of that shape: X itself, its transpose, or its conjugate transpose."""
    if operation == module.CUBLAS_OP_N:
        return _matrix(operand, rows, columns)
    transposed = _matrix(operand, columns, rows).T
    return transposed.conj() if operation == module.CUBLAS_OP_C else transposed


def _product(name, operations, sizes, alpha, a, b, beta, c, accumulator):
    """C = alpha op(A) op(B) + beta C."""
    (op_a, op_b), (m, n, k) = operations, sizes
    a_MK, b_KN = _oriented(a, op_a, m, k), _oriented(b, op_b, k, n)
    result_MN = alpha * (a_MK.astype(accumulator) @ b_KN.astype(accumulator))
    c_MN = _matrix(c, m, n)
    if beta:
        result_MN = result_MN + beta * c_MN.astype(accumulator)
    c_MN[...] = result_MN.astype(c[1])
    calls.append((name, op_a, op_b, m, n, k, *(operand[1].name for operand in (a, b, c))))


def _scalars(alpha, beta, scale, accumulator):
    """alpha and beta, which lie in host memory (pointer mode host)."""
    return (view(address, 1, scale)[0].astype(accumulator) for address in (alpha, beta))


def gemm_ex(h, ta, tb, m, n, k, alpha, A, At, lda, B, Bt, ldb, beta, C, Ct, ldc, compute, algo):
    """cublasGemmEx."""
    strided_batched("gemmEx", h, ta, tb, m, n, k, alpha, A, At, lda, 0, B, Bt, ldb, 0, beta,
                    C, Ct, ldc, 0, 1, compute, algo)  # fmt: skip


def strided_batched(
    name, h, ta, tb, m, n, k, alpha, A, At, lda, sA, B, Bt, ldb, sB, beta, C, Ct, ldc, sC, batch,
    compute, algo,
):  # fmt: skip
    """cublasGemmStridedBatchedEx; strides are in elements."""
    stream = current_stream()
    set_stream(h, stream)
    accumulator, scale = _arithmetic(compute, (At, Bt, Ct))
    alpha, beta = _scalars(alpha, beta, scale, accumulator)

    def operand(address, kind, ld, stride, i):
        return address + i * stride * DTYPES[kind].itemsize, DTYPES[kind], ld

    def run():
        for i in range(batch):
            a, b = operand(A, At, lda, sA, i), operand(B, Bt, ldb, sB, i)
            c = operand(C, Ct, ldc, sC, i)
            _product(name, (ta, tb), (m, n, k), alpha, a, b, beta, c, accumulator)

    _softcuda.call(stream, f"cublas::{name}", run)


def batched(dtype, name, h, ta, tb, m, n, k, alpha, A, lda, B, ldb, beta, C, ldc, batch):
    """cublasSgemmBatched and its sisters: A, B, C are arrays of addresses in device memory."""
    stream = current_stream()
    set_stream(h, stream)
    alpha, beta = _scalars(alpha, beta, dtype, dtype)

    def run():
        addresses = (view(each, batch, np.uintp).tolist() for each in (A, B, C))
        for a, b, c in zip(*addresses, strict=True):
            operands = (a, dtype, lda), (b, dtype, ldb), (c, dtype, ldc)
            _product(name, (ta, tb), (m, n, k), alpha, *operands[:2], beta, operands[2], dtype)

    _softcuda.call(stream, f"cublas::{name}", run)


def sgemm_ex(h, ta, tb, m, n, k, alpha, A, At, lda, B, Bt, ldb, beta, C, Ct, ldc):
    """cublasSgemmEx."""
    gemm_ex(h, ta, tb, m, n, k, alpha, A, At, lda, B, Bt, ldb, beta, C, Ct, ldc, 68, -1)


def gemm(kind, compute, h, ta, tb, m, n, k, alpha, A, lda, B, ldb, beta, C, ldc):
    """cublasSgemm and cublasDgemm."""
    gemm_ex(h, ta, tb, m, n, k, alpha, A, kind, lda, B, kind, ldb, beta, C, kind, ldc, compute, -1)


def _not_emulated(name):
    """Every other function of cuBLAS is there, and says so when it is called."""
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args, **kwargs):
        raise NotImplementedError(f"softcuda: cuBLAS's {name} is not emulated")

    return missing


module.gemmEx, module.sgemmEx, module.setStream = gemm_ex, sgemm_ex, set_stream
module.gemmStridedBatchedEx = partial(strided_batched, "gemmStridedBatchedEx")
module.sgemm, module.dgemm = partial(gemm, F32, 68), partial(gemm, F64, 70)
for _letter, _kind in {"s": F32, "d": F64, "c": C64, "z": C128}.items():
    _name = f"{_letter}gemmBatched"
    setattr(module, _name, partial(batched, DTYPES[_kind], _name))
module.create = lambda: 4242  # any number: a handle that nothing looks into
module.destroy = module.setMathMode = module.setPointerMode = lambda *args: None
module.getVersion = lambda handle: 130000
module.getStream = module.getMathMode = module.getPointerMode = lambda handle: 0
module.__getattr__ = _not_emulated

"""What the tests of the CUDA kernels share: strict memory, and weights of every format."""

import contextlib

import devices
import ml_dtypes
import numpy as np

BLOCK = {"Q8_0": 32, "Q4_0": 32, "Q4_1": 32, "Q5_0": 32, "Q5_1": 32}  # others: 256
PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}


@contextlib.contextmanager
def strict(**options):
    """On the software device every array is its own allocation between guard pages, full of NaN.

    options: of softcuda.config besides, such as sched.
    """
    if devices.kind != devices.SOFT:
        yield
        return
    import softcuda

    cp = devices.cupy
    pooled = cp.cuda.get_allocator()
    softcuda.config(guard=True, **options)
    cp.cuda.set_allocator(None)
    try:
        yield
    finally:
        cp.cuda.set_allocator(pooled)
        softcuda.config(**softcuda.DEFAULTS)


def random_weight(format, N, K, rng):
    """(what a loader hands over, its float32 values)."""
    from llama3np.kernels.cuda.checks.measures import matrix  # which needs CuPy

    w = matrix(format, (N, K), rng)
    return w, w[:].astype(np.float32)


def widths(format):
    """Numbers of which a row of this format has a whole multiple."""
    return 1 if format in PLAIN else BLOCK.get(format, 256)

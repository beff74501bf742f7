"""What the tests of the CUDA kernels share: weights of every format, launches, and error bounds."""

import contextlib
from math import sqrt

import devices
import ml_dtypes
import numpy as np

from llama3np.kernels import ggml
from llama3np.kernels.blocks import Blocks
from llama3np.kernels.ggml import SCALES

ULP = 2.0**-24  # half a unit in the last place of a float32 near 1: what one rounding may add
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
    """(what a loader hands over, its float32 values) of random numbers of order 1 / sqrt(K)."""
    if format in PLAIN:
        w_NK = (rng.standard_normal((N, K)) / sqrt(K)).astype(PLAIN[format])
        return w_NK, w_NK.astype(np.float32)
    form = ggml.FORMATS[format]
    blocks_RC = rng.integers(0, 256, (N * K // form.weights, form.nbytes), np.uint8)
    for at in SCALES[format]:
        scales_R = rng.uniform(-2.0, 2.0, len(blocks_RC)) * 2.0**-6 / sqrt(K)
        blocks_RC[:, at : at + 2] = scales_R.astype(np.float16)[:, None].view(np.uint8)
    w = Blocks(format, blocks_RC.reshape(N, -1))
    return w, w[:]


def widths(format):
    """Numbers of which a row of this format has a whole multiple."""
    return 1 if format in PLAIN else BLOCK.get(format, 256)


def assert_within(found, expected, bound, what):
    """No element farther from the expected one than its own bound; NaN is."""
    error = np.abs(np.asarray(found, np.float64) - expected)
    wrong = ~(error <= bound)
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        raise AssertionError(
            f"{what}{list(map(int, at))}: {found[at]!r}, expected {expected[at]!r}; the difference "
            f"{error[at]:.3g} is above {np.broadcast_to(bound, error.shape)[at]:.3g}"
        )

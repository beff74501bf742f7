"""Stand-in for cupy.cuda.thrust, which is compiled CUDA: NumPy's stable sorts."""

import types
from typing import Any

import numpy as np

from softcuda.memory import call, view

module: Any = types.ModuleType("cupy.cuda.thrust")
module.available = True
module.get_build_version = lambda: 300102


def sort(dtype, data, keys, shape):
    """Sort the last axis in place."""
    values = view(data, tuple(shape), dtype)

    def run():
        values[...] = np.sort(values, axis=-1, kind="stable")

    call("thrust::sort", run)


def argsort(dtype, indices, data, keys, shape):
    """Put the order of the last axis into indices; the data are sorted too, as thrust does."""
    values, order = view(data, tuple(shape), dtype), view(indices, tuple(shape), np.intp)

    def run():
        order[...] = np.argsort(values, axis=-1, kind="stable")
        values[...] = np.take_along_axis(values, order, -1)

    call("thrust::argsort", run)


def lexsort(dtype, indices, keys, k, n):
    """numpy.lexsort of k keys of length n."""
    values, order = view(keys, (k, n), dtype), view(indices, n, np.intp)

    def run():
        order[...] = np.lexsort(values)

    call("thrust::lexsort", run)


module.sort, module.argsort, module.lexsort = sort, argsort, lexsort

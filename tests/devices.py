"""The array modules that tests run on: NumPy, and CuPy on the software device or on a real GPU.

Tests take the parameter `xp` (see conftest.py) and move their data with `on` and `to_host`.
"""

import os

import numpy as np
import pytest

from llama3np.kernels.engine import CUDA_ENGINES

GPU = "gpu"
SOFT = "softcuda"

MARKS = (pytest.mark.cuda, pytest.mark.gpu)
ENGINES_THERE = [pytest.param(name, marks=MARKS) for name in CUDA_ENGINES]
# Where a whole model is run: on the CPU, or on the device by one of its engines.
PLACES = ["cpu", *ENGINES_THERE]
LONG = os.environ.get("LLAMA3NP_LONG") == "1"

cupy = None  # the module, once `start` has run and there is a device for it
kind = None  # GPU or SOFT
missing = "conftest.py has not chosen a device"  # why there is no cupy


def start(wants_gpu):
    """Make CuPy ready, before any test imports it: on a GPU if wanted, else on softcuda."""
    global cupy, kind, missing
    kind, missing = (GPU if wants_gpu else SOFT), None
    try:
        cupy = _real_cupy() if wants_gpu else _soft_cupy()
    except ImportError as error:
        missing = str(error)


def wants_gpu(marks):
    """Whether `-m gpu` or LLAMA3NP_GPU=1 asks for a real device."""
    return os.environ.get("LLAMA3NP_GPU") == "1" or marks.strip() == "gpu"


def _real_cupy():
    try:
        import cupy
    except ImportError as error:
        raise ImportError(f"no GPU: CuPy cannot be imported ({error})") from None
    if not cupy.cuda.is_available():
        raise ImportError("no GPU: CuPy finds no device")
    return cupy


def _soft_cupy():
    import softcuda

    return softcuda.install()


def describe():
    """One line for the head of a test report."""
    if missing is not None:
        return f"cuda: none, {missing}"
    if kind == GPU:
        name = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
        return f"cuda: {name}, CuPy {cupy.__version__}"
    import softcuda

    return (
        f"cuda: software device, CuPy {cupy.__version__}, executor {softcuda.executor}, "
        f"schedule {softcuda.DEFAULTS['sched']}, cache {softcuda.cache()}"
    )


def on(xp, tree):
    """An array, or a tuple of them however deep (so all params), as arrays of that module.

    One array that stands in two places stays one, as tied weights must; what is no array stays.
    """
    moved = {}

    def move(node):
        if isinstance(node, tuple):
            return rebuilt(node, map(move, node))
        if xp is np or not isinstance(node, np.ndarray):
            return node
        if id(node) not in moved:
            moved[id(node)] = xp.asarray(node)
        return moved[id(node)]

    return move(tree)


def to_host(tree):
    """An array of either module, or a tuple of them, as NumPy arrays."""
    if isinstance(tree, tuple):
        return rebuilt(tree, map(to_host, tree))
    return tree.get() if cupy is not None and isinstance(tree, cupy.ndarray) else tree


def rebuilt(old, members):
    """A tuple, or named tuple, like the old one."""
    return type(old)(*members) if hasattr(old, "_fields") else tuple(members)


def placed(where):
    """What to give Llama, or load, for a model to be run at one of PLACES."""
    return {} if where == "cpu" else {"device": "cuda", "engine": where}


def is_soft(llm):
    """Whether this model is run by the software device, which takes long."""
    return llm.device.kind == "cuda" and kind == SOFT


def skip_if_long(llm):
    """Leave to `make test-cuda` what takes the software device minutes."""
    if is_soft(llm) and not LONG:
        pytest.skip("the software device takes long for it (LLAMA3NP_LONG=1, make test-cuda)")


def apply(xp, function, *args):
    """What a function makes of these arguments on that module: NumPy in, NumPy out."""
    return to_host(function(*on(xp, args)))

"""The one way in which kernels are launched: every argument checked against the C prototype.

CuPy checks nothing: it passes a Python float as 8 bytes, of which a float parameter reads the
wrong 4, and any array as its address, whatever its dtype and strides are.
"""

from __future__ import annotations

from functools import cache
from numbers import Integral, Real
from typing import Any, NamedTuple

import cupy as cp
import numpy as np

from llama3np.kernels.cuda.registry import Kernel, Parameter


class Strided(NamedTuple):
    """An array of which only the last axis must be contiguous: the kernel is told its strides."""

    array: Any


@cache
def compiled(kernel: Kernel) -> Any:
    return cp.RawKernel(kernel.source, kernel.entry, kernel.options)


def launch(kernel: Kernel, grid: tuple[int, ...], threads: int, **arguments: Any) -> None:
    """Start a kernel on the current stream, its arguments by the names of its parameters.

    grid: blocks along x, y, z. Numbers are converted to the parameter's type, arrays must have
    it. Raises TypeError, naming kernel and parameter, for an argument that is missing, unknown,
    of another type or dtype, not contiguous, or not on the device.
    """
    names = [parameter.name for parameter in kernel.parameters]
    if wrong := sorted(set(names) ^ set(arguments)):
        raise TypeError(f"{kernel.entry}: {wrong[0]}: expected parameters {', '.join(names)}")
    values = tuple(
        _array(kernel, p, arguments[p.name]) if p.array else _number(kernel, p, arguments[p.name])
        for p in kernel.parameters
    )
    compiled(kernel)(grid, (threads,), values)


def _number(kernel: Kernel, parameter: Parameter, value: Any) -> np.generic:
    kind, words = (Integral, "an integer") if parameter.dtype.kind == "i" else (Real, "a number")
    fits = isinstance(value, kind) and not isinstance(value, bool)
    if fits and kind is Integral:
        fits = -(2**31) <= int(value) < 2**31
    if not fits:
        raise TypeError(
            f"{kernel.entry}: {parameter.name}: expected {words} ({parameter.dtype}), found {value!r}"
        )
    return parameter.dtype.type(value)


def _array(kernel: Kernel, parameter: Parameter, value: Any) -> Any:
    array = value.array if isinstance(value, Strided) else value
    if not isinstance(array, cp.ndarray):
        found = type(array).__name__
    elif array.dtype != parameter.dtype:
        found = f"an array of {array.dtype}"
    elif not isinstance(value, Strided) and not array.flags.c_contiguous:
        found = "one with gaps"
    elif isinstance(value, Strided) and array.strides[-1] != array.itemsize:
        found = "one with gaps in its last axis"
    else:
        return array
    raise TypeError(
        f"{kernel.entry}: {parameter.name}: expected a contiguous device array of "
        f"{parameter.dtype}, found {found}"
    )

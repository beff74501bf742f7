"""What compiled threads share: memory by its address, and counters that all of them change."""

from __future__ import annotations

import math
import platform
import sys
from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from llama3np.kernels.cpu.compiler import jit

I32, I64 = ir.IntType(32), ir.IntType(64)
LINE = 8  # int64 numbers in a cache line: counters in one line would slow each other down

# ---- memory by its address ---------------------------------------------------------------------


def address(array: np.ndarray) -> int:
    """Where an array's first number lies."""
    return array.__array_interface__["data"][0]


def aligned(*shape: int, dtype: Any = np.float32) -> np.ndarray:
    """An array, not filled, that begins where a cache line does.

    A vector that lies across two lines costs double; reading is up to a third faster without.
    """
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    raw = np.empty(nbytes + 8 * LINE, np.uint8)
    skipped = -address(raw) % (8 * LINE)
    return raw[skipped : skipped + nbytes].view(dtype).reshape(shape)


@intrinsic
def _pointer(typing: Any, address: Any) -> Any:
    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.inttoptr(args[0], ir.IntType(8).as_pointer())

    return types.voidptr(types.intp), generate


@jit
def floats(address, n):
    """An array of n float32 numbers at an address."""
    return carray(_pointer(address), n, np.float32)


@jit
def integers(address, n):
    """An array of n int64 numbers at an address."""
    return carray(_pointer(address), n, np.int64)


@jit
def words(address, n):
    """An array of n patterns of 32 bits at an address."""
    return carray(_pointer(address), n, np.uint32)


@jit
def records(address, n, kind):
    """An array of n records of a dtype at an address."""
    return carray(_pointer(address), n, kind)


@jit
def copy_bytes(source, target, n):
    """Copy n bytes from one address to another."""
    target_N, source_N = (
        carray(_pointer(target), n, np.uint8),
        carray(_pointer(source), n, np.uint8),
    )
    for i in range(n):
        target_N[i] = source_N[i]


# ---- counters ----------------------------------------------------------------------------------


def _at(b: Any, address: Any) -> Any:
    return b.inttoptr(address, I64.as_pointer())


@intrinsic
def take(typing: Any, address: Any) -> Any:
    """Add 1 to the counter at an address, undivided by other threads; return what it was."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.atomic_rmw("add", _at(b, args[0]), ir.Constant(I64, 1), "seq_cst")

    return types.int64(types.intp), generate


@intrinsic
def look(typing: Any, address: Any) -> Any:
    """The counter at an address; what other threads wrote before they raised it is seen after."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        return b.load_atomic(_at(b, args[0]), "acquire", 8)

    return types.int64(types.intp), generate


# ---- waiting -----------------------------------------------------------------------------------

_PAUSE: dict[str, tuple[str, list[int]]] = {
    "x86_64": ("llvm.x86.sse2.pause", []),
    "amd64": ("llvm.x86.sse2.pause", []),
}
_PAUSE |= dict.fromkeys(("aarch64", "arm64"), ("llvm.aarch64.hint", [1]))


def _call(b: Any, name: str, result: Any, values: list[int]) -> Any:
    kind = ir.FunctionType(result, [I32] * len(values))
    function = b.module.globals.get(name) or ir.Function(b.module, kind, name)
    return b.call(function, [ir.Constant(I32, value) for value in values])


@intrinsic
def pause(typing: Any) -> Any:
    """Tell the processor that this is a waiting loop."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if (name := platform.machine().lower()) in _PAUSE:
            _call(b, _PAUSE[name][0], ir.VoidType(), _PAUSE[name][1])
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic
def give_way(typing: Any) -> Any:
    """Let the operating system run another thread on this core."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        _call(b, "SwitchToThread" if sys.platform == "win32" else "sched_yield", I32, [])
        return context.get_dummy_value()

    return types.none(), generate


@intrinsic
def ticks(typing: Any) -> Any:
    """The processor's own clock, in units of its choice; 0 where programs may not read it."""

    def generate(context: Any, b: Any, signature: Any, args: Any) -> Any:
        if platform.machine().lower() not in ("x86_64", "amd64"):
            return ir.Constant(I64, 0)
        kind = ir.FunctionType(I64, [])
        name = "llvm.readcyclecounter"
        return b.call(b.module.globals.get(name) or ir.Function(b.module, kind, name), [])

    return types.int64(), generate


# ---- phases ------------------------------------------------------------------------------------
# The units of a phase are divided among the workers, a stretch each, and whoever has done his own
# helps with the others': so each reads memory in order, which is a quarter faster than taking
# turns, and all end together. Each phase has a row of counters, at an address: the units done and
# then, a cache line each, those taken of every worker's stretch.

SPINS = 4000  # pauses, some 50 microseconds, before others get the core


def new_counters(phases: int, workers: int) -> np.ndarray:
    """Counters of a job, counters_PC: nothing is taken, nothing done."""
    return np.zeros((phases, LINE * (1 + workers)), np.int64)


@jit
def take_unit(counters, worker, workers, units):
    """The next unit of a phase for this worker; `units` if none is left."""
    for i in range(workers):
        owner = (worker + i) % workers
        first, stop = units * owner // workers, units * (owner + 1) // workers
        taken = counters + 8 * LINE * (1 + owner)
        if look(taken) < stop - first:  # taking beyond would do no harm, but slow the owner
            unit = first + take(taken)
            if unit < stop:
                return unit
    return units


@jit
def finish_unit(counters):
    """Count a unit as done, and all that was written for it."""
    take(counters)


@jit
def each_unit(counters, worker, workers, units):
    """The units of a phase for this worker, one after the other; each is done when it returns."""
    unit = take_unit(counters, worker, workers, units)
    while unit < units:
        yield unit
        finish_unit(counters)
        unit = take_unit(counters, worker, workers, units)


@jit
def all_done(counters, units):
    """Whether every unit of a phase is done, and all that was written for them can be seen."""
    return look(counters) == units


@jit
def wait_for(counters, units):
    """Wait until all units of a phase are done, whoever does them."""
    spins = 0
    while not all_done(counters, units):
        spins += 1
        pause()
        if spins > SPINS:
            give_way()

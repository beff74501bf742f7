"""The array module, NumPy or CuPy: every difference between the two lives here."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

from llama3np.errors import InputError

INSTALL = 'pip install "llama3np[cuda13]"'
# CUDA 12's drivers (525 and up) need the other wheel; it is the same CuPy.
OLDER = '"llama3np[cuda12]" for drivers below 580'

# ---- arrays --------------------------------------------------------------------------------------


def namespace(array: Any) -> Any:
    """Return the module whose functions take this array: numpy, or cupy for a device array."""
    if isinstance(array, np.ndarray):
        return np
    import cupy

    return cupy.get_array_module(array)


def widen(array: Any) -> Any:
    """Return 16-bit floats as float32 and anything else as it is."""
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array


def narrow(array: Any, like: Any) -> Any:
    """Return an array in the dtype of another: what was widened to compute is rounded once.

    To the nearest, ties to even, as processors and GPUs round. Of float32 and float64 nothing
    happens, and nothing is copied.
    """
    return array.astype(like.dtype, copy=False)


def to_host(array: Any) -> np.ndarray:
    """The numbers of an array of either module in a NumPy array; a host array is returned as is.

    Of a device array this waits until they are computed, and copies them.
    """
    return np.asarray(off_device(array))


def off_device(found: Any) -> Any:
    """A device array as a host array; anything else, such as a list, as it is."""
    cupy = sys.modules.get("cupy")  # without it there are no device arrays
    on_device = cupy is not None and isinstance(found, cupy.ndarray)
    return found.get() if on_device else found


def host_ids(ids: Any, vocab_size: int) -> np.ndarray:
    """Return token ids as a (B, T) host array, every one of them checked.

    The check is on the host because neither array module does it: NumPy takes a negative index
    from the end, and CuPy wraps any index silently, so a bad id would read another token's row.
    Raises InputError for an empty or unshaped array, a dtype that is not integer, and an id
    outside 0 <= id < vocab_size.
    """
    try:
        ids_BT = to_host(ids)
    except ValueError:  # NumPy's own words for a ragged list
        raise InputError("token ids: expected rows of one length, found a ragged list") from None
    if ids_BT.ndim != 2 or ids_BT.size == 0:
        raise InputError(f"token ids: expected shape (B, T) and no empty row, found {ids_BT.shape}")
    if not np.issubdtype(ids_BT.dtype, np.integer):
        raise InputError(f"token ids: expected integers, found {ids_BT.dtype}")
    wrong = (ids_BT < 0) | (ids_BT >= vocab_size)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise InputError(
            f"token ids: expected 0 <= id < {vocab_size} (the vocabulary), found "
            f"{ids_BT[row, column]} at row {row}, position {column}"
        )
    return ids_BT


# ---- devices -------------------------------------------------------------------------------------


class Device(NamedTuple):
    """Where to compute: the processor, or a CUDA device by its number in this machine."""

    kind: str  # "cpu" or "cuda"
    number: int = 0

    def __str__(self) -> str:
        return self.kind if self.kind == "cpu" else f"cuda:{self.number}"


CPU = Device("cpu")


def parse_device(name: str) -> Device:
    """The device of "cpu", "cuda" (the first one) or "cuda:N"; raise InputError for another name.

    Nothing is imported, and nothing is asked of the device: see `use`.
    """
    match = re.fullmatch(r"cpu|cuda(?::([0-9]{1,4}))?", name) if isinstance(name, str) else None
    if match is None:
        raise InputError(f"device: expected cpu, cuda or cuda:N, found {name!r}")
    return Device(name.partition(":")[0], int(match[1] or 0))


@contextmanager
def on(device: Device) -> Iterator[Any]:
    """Make a device this thread's current one while a block runs; yield its array module.

    Arrays are made, and kernels run, on the current device, and each thread has its own.
    """
    if device.kind == "cpu":
        yield np
        return
    cupy = cupy_module()
    with cupy.cuda.Device(device.number):
        yield cupy


def device_of(array: Any) -> Device:
    """Where an array of either module lies."""
    return CPU if isinstance(array, np.ndarray) else Device("cuda", array.device.id)


def current(xp: Any) -> Device:
    """Where this thread makes the arrays of a module: see `on`."""
    return CPU if xp is np else Device("cuda", xp.cuda.Device().id)


def cupy_module() -> Any:
    """CuPy. Raises InputError, with the command that installs it, where it cannot be imported."""
    try:
        import cupy
    except ImportError as error:
        said = str(error).strip().partition("\n")[0]
        raise InputError(f"device: cuda needs CuPy ({said}): {INSTALL} ({OLDER})") from None
    return cupy


def use(device: Device) -> Any:
    """Return the array module of a device that has been tried: it computes, products included.

    Raises InputError, in one sentence that says what to do, without CuPy, without a driver or a
    GPU, for a number that no GPU has, and without the parts of CUDA's toolkit that CuPy needs: its
    run-time compiler (NVRTC), its headers and cuBLAS.
    """
    if device.kind == "cpu":
        return np
    cupy = cupy_module()
    if not cupy.cuda.is_available():
        raise InputError(f"device: {_what_is_missing(cupy)}; --device cpu computes without")
    count = cupy.cuda.runtime.getDeviceCount()
    if device.number >= count:
        last = f"cuda:{count - 1}"
        expected = last if count == 1 else f"cuda:0 to {last}"
        raise InputError(f"device: expected {expected} (there are {count}), found {device}")
    try:
        _compute_a_little(device)
    except Exception as error:  # each missing part has its own type: ImportError, RuntimeError ...
        said = " ".join(str(error).split())[:200]
        raise InputError(
            f"device: {device} does not compute ({type(error).__name__}: {said}); "
            f"{INSTALL} brings all of CUDA that CuPy needs ({OLDER})"
        ) from None
    return cupy


def _what_is_missing(cupy: Any) -> str:
    """Why CuPy has no device: a driver older than its CUDA, or none, or no GPU."""
    driver, own = cupy.cuda.runtime.driverGetVersion(), cupy.cuda.runtime.runtimeGetVersion()
    if 0 < driver // 1000 < own // 1000:  # 12040 is CUDA 12.4; 0 means no driver
        return (
            f"the driver knows CUDA {driver // 1000}.{driver % 1000 // 10} and this CuPy needs "
            f"{own // 1000}: a newer driver, or pip install {OLDER}"
        )
    return (
        "CuPy finds no CUDA driver or no GPU (nvidia-smi shows what there is), which it needs "
        f"beside {INSTALL} ({OLDER})"
    )


def _compute_a_little(device: Device) -> None:
    """Something that needs the compiler, the headers and cuBLAS."""
    with on(device) as cupy:
        one_11 = cupy.zeros((1, 1), np.float32) + 1
        to_host(one_11 @ one_11)


def free_memory(device: Device) -> tuple[int, int]:
    """Bytes of the device's memory that could be had now, and of all of it.

    Memory that CuPy's pool keeps without using it is counted as free.
    """
    with on(device) as cupy:
        free, total = cupy.cuda.runtime.memGetInfo()
        return free + cupy.get_default_memory_pool().free_bytes(), total

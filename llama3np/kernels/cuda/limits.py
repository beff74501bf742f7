"""What a device can do at best: how fast it reads its memory, multiplies, and starts a kernel."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import cupy
import numpy as np

from llama3np.backend import Device, free_memory, on
from llama3np.kernels.cuda import gemm

READ = 1 << 30  # bytes: many times what any cache holds
SQUARE = 4096  # rows of the matrices of a product
LAUNCHES = 1000
TRIES = 5


class DeviceLimits:
    """The rates of a device, measured anew at each call, as machine.Limits are those of a CPU.

    Holds a gigabyte of the device's memory, or a quarter of what is free.
    """

    def __init__(self, device: Device):
        self.device = device
        nbytes = min(READ, free_memory(device)[0] // 4)
        with on(device):
            self._from_X, self._to_X = (cupy.zeros(nbytes // 8, np.float32) for _ in "ab")
            self._a_MK, self._b_NK = (cupy.ones((SQUARE, SQUARE), np.float32) for _ in "ab")
            self._c_MN = cupy.empty((SQUARE, SQUARE), np.float32)
        self.read_gb_s()  # kernels are compiled at their first run
        self.sgemm_gflop_s()

    def read_gb_s(self) -> float:
        """Gigabytes (10^9) a second: the faster one of reading, and of copying, which is both."""
        nbytes = self._from_X.nbytes
        with on(self.device):
            read = nbytes / best(lambda: self._from_X.max())
            copied = 2 * nbytes / best(lambda: cupy.copyto(self._to_X, self._from_X))
        return max(read, copied) / 1e9

    def sgemm_gflop_s(self) -> float:
        """10^9 operations a second of a float32 product."""
        with on(self.device):
            took = best(lambda: gemm.multiply(self._a_MK, self._b_NK, self._c_MN))
        return 2 * SQUARE**3 / took / 1e9

    def launch_us(self) -> float:
        """Microseconds of the host, and of the device where that is more, for one small kernel."""
        with on(self.device):
            small = cupy.zeros(1, np.float32)
            cupy.cuda.Device().synchronize()
            start = time.perf_counter()
            for _ in range(LAUNCHES):
                cupy.negative(small, out=small)
            cupy.cuda.Device().synchronize()
        return (time.perf_counter() - start) / LAUNCHES * 1e6


def best(work: Callable[[], Any]) -> float:
    """Seconds of the shortest of a few tries, by the device's own clock."""
    times = []
    for _ in range(TRIES):
        start, end = cupy.cuda.Event(), cupy.cuda.Event()
        start.record()
        work()
        end.record()
        end.synchronize()
        times.append(cupy.cuda.get_elapsed_time(start, end) / 1e3)
    return min(times)


def describe(device: Device) -> dict[str, Any]:
    """The device, its driver and the libraries in use, for reports."""
    with on(device):
        facts = cupy.cuda.runtime.getDeviceProperties(device.number)
        name = facts["name"]
        free, total = free_memory(device)
        return {
            "name": name.decode() if isinstance(name, bytes) else str(name),
            "compute_capability": f"{facts['major']}.{facts['minor']}",
            "multiprocessors": facts["multiProcessorCount"],
            "memory_total": total,
            "memory_free": free,
            "driver": cupy.cuda.runtime.driverGetVersion(),
            "runtime": cupy.cuda.runtime.runtimeGetVersion(),
            "cupy": cupy.__version__,
            "accelerators": [str(each) for each in cupy._core.get_routine_accelerators()],
        }

"""What this machine can do at best, and what it is doing besides: the measure of a benchmark.

Two rates bound a model on a CPU: how fast all threads together read memory, which decoding needs,
and how fast they multiply float32 matrices, which prefill needs. Both wander while a machine runs
(memory of one machine was seen to change between 45 and 70 GB/s within tens of seconds), so they
are measured again and again, beside the work they are compared with.
"""

from __future__ import annotations

import os
import platform
import threading
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from threadpoolctl import threadpool_info, threadpool_limits

from llama3np.threads import Pool, single_threaded_blas

PARTS = 8  # of each thread's share of the memory, so that one who comes late does not hold all up
TRIES = 3  # of each measurement of a limit, 50 milliseconds or less each
SQUARE = 2048  # rows of the matrices: large enough that another size is not faster

# ---- limits -----------------------------------------------------------------------------------


class Limits:
    """The rates that this pool's threads reach, measured anew at each call.

    Holds at least 1 GiB of memory, more where the caches of all processors come near to that.
    """

    def __init__(self, pool: Pool):
        self.pool = pool
        parts = PARTS * pool.threads
        size = max(1 << 30, 4 * _cache_bytes()) // 4 // parts
        self._parts = [np.empty(size, np.int32) for _ in range(parts)]
        self._a_MK, self._b_NK = (np.ones((SQUARE, SQUARE), np.float32) for _ in "ab")
        self._c_MN = np.empty((SQUARE, SQUARE), np.float32)
        pool.map(lambda i, _: self._parts[i].fill(i), parts)  # the page faults, untimed
        self.read_gb_s()
        self.sgemm_gflop_s()

    def read_gb_s(self) -> float:
        """Gigabytes (10^9) a second, each byte read once, all threads in memory of their own.

        The largest of many integers is what NumPy looks for at the speed of memory: measured, as
        fast as a loop of vector loads in C, where a float32 product with itself reaches 0.75.
        """
        took = best(lambda: self.pool.map(lambda i, _: self._parts[i].max(), len(self._parts)))
        return sum(part.nbytes for part in self._parts) / took / 1e9

    def sgemm_gflop_s(self) -> float:
        """10^9 operations a second of a float32 product, shared out by us or by BLAS itself.

        Both are tried, and the faster one is the limit.
        """
        with single_threaded_blas():
            ours = best(lambda: self.pool.map(self._multiply_part, self.pool.threads))
        with threadpool_limits(self.pool.threads, "blas"):
            its_own = best(lambda: np.matmul(self._a_MK, self._b_NK.T, out=self._c_MN))
        return 2 * SQUARE**3 / min(ours, its_own) / 1e9

    def _multiply_part(self, i: int, _: int) -> None:
        rows = slice(i * SQUARE // self.pool.threads, (i + 1) * SQUARE // self.pool.threads)
        np.matmul(self._a_MK[rows], self._b_NK.T, out=self._c_MN[rows])


def _cache_bytes() -> int:
    """Bytes of the last-level caches of all processors; 0 if the system does not tell."""
    sizes = {}
    for cache in Path("/sys/devices/system/cpu").glob("cpu[0-9]*/cache/index3"):
        try:
            shared_by = (cache / "shared_cpu_list").read_text()
            sizes[shared_by] = int((cache / "size").read_text().strip().removesuffix("K")) << 10
        except (OSError, ValueError):
            continue
    return sum(sizes.values())


def best(work: Callable[[], Any]) -> float:
    """Seconds of the shortest of a few tries: of a limit, what disturbs for a moment is no part."""
    return min(seconds(work) for _ in range(TRIES))


def seconds(work: Callable[[], Any]) -> float:
    """How long it takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


# ---- what else goes on ------------------------------------------------------------------------


class Elsewhere:
    """How many processors other processes keep busy, from here on."""

    def __init__(self) -> None:
        self._start = _busy_seconds()

    def cores(self) -> float | None:
        """Their mean number since the beginning; None where the system does not tell (not Linux).

        The system counts in hundredths of a second, so a stretch of some seconds is needed.
        """
        start, now = self._start, _busy_seconds()
        if start is None or now is None:
            return None
        machine, own, clock = (after - before for before, after in zip(start, now, strict=True))
        return max(0.0, machine - own) / max(clock, 1e-3)


def _busy_seconds() -> tuple[float, float, float] | None:
    """Processor seconds of the whole machine, those of this process, and the clock."""
    try:
        line = Path("/proc/stat").read_text().partition("\n")[0]
    except OSError:
        return None
    user, nice, system, _, _, irq, softirq, steal = map(int, line.split()[1:9])
    ticks = user + nice + system + irq + softirq + steal
    own = os.times()
    return ticks / os.sysconf("SC_CLK_TCK"), own.user + own.system, time.perf_counter()


# ---- memory -----------------------------------------------------------------------------------


def resident(kind: str) -> int | None:
    """RssAnon, RssFile or VmHWM (the peak of all) of this process in bytes; None if not Linux.

    RssAnon is what only this process has, and RssFile what it has mapped of files.
    """
    return _kilobytes("/proc/self/status", kind)


def available() -> int | None:
    """Bytes of memory that the system could still give; None if it does not tell."""
    return _kilobytes("/proc/meminfo", "MemAvailable")


def _kilobytes(path: str, key: str) -> int | None:
    try:
        lines = Path(path).read_text().splitlines()
    except OSError:
        return None
    values = [line.split()[1] for line in lines if line.startswith(key + ":")]
    return 1024 * int(values[0]) if values else None


class Peak:
    """`nbytes`: the largest RssAnon while a block runs, or None if the system does not tell."""

    def __enter__(self) -> Peak:
        self.nbytes, self._done = resident("RssAnon"), threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while self.nbytes is not None and not self._done.wait(0.02):  # seconds
            self.nbytes = max(self.nbytes, resident("RssAnon") or 0)

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._thread.join()


# ---- names ------------------------------------------------------------------------------------


def processor() -> str:
    """The processor's name, and how many of them the system shows."""
    name = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return f"{models[0] if models else name}, {os.cpu_count()} processors"


def versions() -> dict[str, str]:
    """What was measured with: this package, Python, NumPy and its BLAS, numba if installed."""
    found = {"python": platform.python_version(), "blas": _blas()}
    for package in ("llama3np", "numpy", "numba", "ml_dtypes"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def _blas() -> str:
    """The name, version and kernel of NumPy's BLAS: "openblas 0.3.31 SkylakeX"."""
    for library in threadpool_info():
        if library["user_api"] == "blas":
            parts = (library.get(key) for key in ("internal_api", "version", "architecture"))
            return " ".join(str(part) for part in parts if part)
    return "unknown"

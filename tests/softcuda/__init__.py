"""A CUDA device in software: the real, unmodified CuPy wheel on a machine without a GPU.

    import softcuda
    softcuda.install()                              # before anything imports cupy
    import cupy as cp
    cp.arange(6.0).reshape(2, 3) @ cp.ones((3, 4))

Real are CuPy's own Python and Cython: dtypes, broadcasting, indexing, code generation, memory pool,
streams, graph capture, messages. Soft are the entry points of cudart and the driver (device.cpp),
the compiler's target (a shared object in place of a cubin), cuBLAS, cuRAND and thrust (NumPy).
README.md tells what it finds, what it cannot find, and what was tried.
"""

import importlib.machinery
import importlib.util
import os
import sys
import sysconfig
from pathlib import Path
from typing import Any

from softcuda.build import HERE, default_cache, refusal, shared_object

# "src": CUDA source -> g++. "ptx": CUDA source -> NVRTC -> PTX -> C++ with checked accesses -> g++.
executor = "src"
ptx_arch = "80"
# Architectures, such as ("75", "90"), that NVRTC must compile every source for too.
nvrtc_check: tuple[str, ...] = ()
# (kernel names, seconds) of every source that was not in CuPy's cache.
compiled: list[tuple[list[str], float]] = []
# (kernel names, why) of PTX that could not be translated: these are run as "src".
fallbacks: list[tuple[list[str], str]] = []

EXECUTORS = ("src", "ptx")
DEFAULTS = {
    "guard": False,
    "deferred": False,
    "trace": False,
    "sched": 0,
    "poison": True,
    "strict": True,
    "touch": False,
    "memory": 80 << 30,
}
SCHEDULES = (0, 1, 2)
_extension: Any = None
_cache: Any = None  # a Path, once the device is installed


class Unavailable(ImportError):  # noqa: N818 - what it says of the device
    """This machine lacks what the software device needs; the message says what."""


# ---- what a test uses ---------------------------------------------------------------------------


def config(**options):
    """Set the options that are given; the others stay as they are (at first DEFAULTS).

    guard: an inaccessible page on both sides of each allocation.
    deferred: a stream's work runs only when something waits for it, so a missing wait shows.
    sched: 0 blocks and threads as numbered, 1 reversed, 2 random; a result that differs is a race.
    poison: new memory is full of NaN.       trace: keep the names of launches, copies, waits.
    strict: a barrier after a thread of the block has returned is an error (not in CuPy's kernels).
    touch: count the 32-byte sectors that each launch touches (executor "ptx").
    memory: bytes of the device; an allocation beyond is cudaErrorMemoryAllocation.
    """
    _extension.config(**options)


def stats():
    """What happened since reset, as a dict.

    launches, graph_launches, mallocs, frees, memsets, syncs, h2d, d2h, d2d: numbers of calls;
    h2d_bytes, d2h_bytes, d2d_bytes; live_bytes (now), peak_bytes;
    read_bytes, written_bytes: what kernels asked for, cached or not (executor "ptx" only);
    touched_bytes: distinct sectors of each launch, added up (with config(touch=True));
    kernels, touched: launches and touched bytes by kernel;  trace: names in order;
    unchecked: runs by kernel of those that were not translated from PTX.
    """
    return _extension.stats()


def reset():
    """Start counting anew."""
    _extension.reset()


def flush():
    """Run all work that is waiting in streams."""
    _extension.flush()


def cache():
    """The folder of what is compiled."""
    return _cache


# ---- installation -------------------------------------------------------------------------------


def install(cc=(8, 0), cache_dir=None):
    """Put the software device under CuPy, and return cupy. Once a process; again does nothing.

    cc: the compute capability to report. cache_dir: where compiled files are kept, by default
    SOFTCUDA_CACHE or a folder of the user's caches. SOFTCUDA_EXECUTOR chooses the executor, and
    SOFTCUDA_SCHED the schedule.
    Raises Unavailable if the machine lacks a part, ImportError if cupy was imported before or has
    other C signatures than those known here.
    """
    global _extension, _cache, executor
    if _extension is not None:
        return sys.modules["cupy"]
    check_machine()
    _cache = Path(cache_dir or default_cache()).resolve()
    os.environ["CUPY_CACHE_DIR"] = str(_cache / "cupy")  # never among kernels of a real device
    os.environ["CUPY_ACCELERATORS"] = (
        ""  # CUB is compiled CUDA: its results would be silently wrong
    )
    extension = _load_extension()
    _replace_runtime(extension, cc)
    _extension = extension
    cupy = _import_cupy()
    executor = chosen_executor()
    DEFAULTS["sched"] = chosen_schedule()
    config(**DEFAULTS)
    from softcuda.compiler import hook

    hook(cupy.cuda.compiler, cc)
    return cupy


def check_machine():
    """Raise Unavailable, saying what is missing, or ImportError if cupy was imported too early."""
    if (why := refusal()) is not None:
        raise Unavailable(why)
    if importlib.util.find_spec("cupy") is None:
        raise Unavailable("CuPy is not installed (pip install -e '.[test-cuda]')")
    bound = ("cupy.", "cupyx", "cupy_backends.cuda.stream", "cupy_backends.cuda.libs")
    if early := sorted(name for name in sys.modules if name.startswith(bound)):
        raise ImportError(f"softcuda.install() must come before the import of {early[0]}")


def chosen_executor():
    """SOFTCUDA_EXECUTOR, or "src"."""
    chosen = os.environ.get("SOFTCUDA_EXECUTOR") or "src"
    if chosen not in EXECUTORS:
        raise ValueError(f"SOFTCUDA_EXECUTOR: expected {' or '.join(EXECUTORS)}, found {chosen!r}")
    if chosen == "ptx" and not has_nvrtc():
        raise Unavailable("the executor ptx needs NVRTC (pip install -e '.[test-cuda]')")
    return chosen


def chosen_schedule():
    """SOFTCUDA_SCHED, or 0."""
    chosen = os.environ.get("SOFTCUDA_SCHED") or "0"
    if chosen not in map(str, SCHEDULES):
        raise ValueError(f"SOFTCUDA_SCHED: expected one of {SCHEDULES}, found {chosen!r}")
    return int(chosen)


def has_nvrtc():
    """Whether NVIDIA's compiler library can be loaded. It needs no GPU and no driver."""
    from cupy_backends.cuda.libs import nvrtc

    try:
        nvrtc.getVersion()
    except Exception:  # the loader's own kinds of error, which differ by version
        return False
    return True


def _load_extension():
    """Compile device.cpp, if that was not done before, and import it as _softcuda."""
    include = sysconfig.get_paths()["include"]
    flags = ["-O1", "-std=gnu++17", "-w", "-fPIC", f"-I{include}"]
    tag = sysconfig.get_config_var("SOABI")
    source = (HERE / "device.cpp").read_text(encoding="utf-8")
    made = shared_object(source, flags, _cache, f"device-{tag}")
    loader = importlib.machinery.ExtensionFileLoader("_softcuda", str(made))
    spec = importlib.machinery.ModuleSpec("_softcuda", loader, origin=str(made))
    extension = importlib.util.module_from_spec(spec)
    loader.exec_module(extension)
    sys.modules["_softcuda"] = extension
    return extension


def _replace_runtime(extension, cc):
    """Exchange the C functions of cudart and the driver, and what Python code calls of them."""
    from cupy_backends.cuda.api import driver, runtime

    from softcuda.pythonlevel import device_properties, expose

    replaced = extension.install(
        runtime.__pyx_capi__,
        driver.__pyx_capi__,
        lambda device: device_properties(cc, extension),
        runtime.PointerAttributes,
        runtime.CUDARuntimeError,
    )
    extension.config(cc_major=cc[0], cc_minor=cc[1])
    expose({"r": runtime, "d": driver}, replaced)


def _import_cupy():
    """Put the stand-ins where CuPy looks for compiled CUDA libraries, then import it."""
    from softcuda import cublas, curand, thrust

    sys.modules["cupy_backends.cuda.libs.cublas"] = cublas.module
    sys.modules["cupy_backends.cuda.libs.curand"] = curand.module
    sys.modules["cupy.cuda.thrust"] = thrust.module
    import cupy_backends.cuda.libs

    cupy_backends.cuda.libs.cublas = cublas.module
    cupy_backends.cuda.libs.curand = curand.module
    import cupy

    cupy.cuda.thrust = thrust.module
    return cupy

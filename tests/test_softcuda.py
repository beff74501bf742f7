"""The software device itself: that it counts, and that it sees each mistake it is there to see."""

import ctypes
import os
import subprocess
import sys
import time

import devices
import ml_dtypes
import numpy as np
import pytest
from checks import assert_close, assert_same
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

pytestmark = pytest.mark.cuda

BF16 = np.dtype(ml_dtypes.bfloat16)
OUT_OF_BOUNDS = "out-of-bounds global"


def launch(code, block, *args, grid=1, **options):
    """Compile and run the one kernel of the code, `void k(...)`, in one block."""
    source = 'extern "C" __global__ ' + code
    devices.cupy.RawKernel(source, "k")((grid,), (block,), args, **options)


def floats(*shape):
    return devices.cupy.ones(shape, np.float32)


# ---- counting -----------------------------------------------------------------------------------


def test_launches_copies_and_allocations_are_counted(softcuda):
    import cupy as cp

    host = np.arange(1000, dtype=np.float32)
    cp.get_default_memory_pool().free_all_blocks()
    softcuda.reset()
    x = cp.asarray(host)
    y = x * 2 + x
    z = cp.empty_like(y)
    z.data.copy_from_device(y.data, y.nbytes)
    z.get()
    found = softcuda.stats()
    assert (found["launches"], found["h2d"], found["d2h"], found["d2d"]) == (2, 1, 1, 1)
    assert (found["h2d_bytes"], found["d2h_bytes"], found["d2d_bytes"]) == (4000, 4000, 4000)
    assert found["kernels"] == {
        "cupy_multiply__float32_float_float32": 1,
        "cupy_add__float32_float32_float32": 1,
    }
    assert found["mallocs"] == 3  # x, 2 x, y; z gets the memory of 2 x from the pool


def test_reset_starts_all_counts_anew(softcuda):
    floats(3).sum().get()
    assert softcuda.stats()["launches"] > 0
    softcuda.reset()
    found = softcuda.stats()
    assert {name for name, value in found.items() if value} <= {"live_bytes", "peak_bytes"}


def test_the_trace_is_in_order(softcuda):
    import cupy as cp

    softcuda.config(trace=True)
    x = cp.asarray(np.ones(4, np.float32))
    cp.negative(x).get()
    cp.cuda.Device().synchronize()
    names = [name for name in softcuda.stats()["trace"] if name != "streamSynchronize"]
    expected = ["memcpyH2D", "cupy_negative__float32_float32", "memcpyD2H", "deviceSynchronize"]
    assert names == expected


def test_products_are_counted_with_their_shapes(softcuda):
    from softcuda import cublas

    del cublas.calls[:]
    floats(5, 7) @ floats(3, 7).T
    assert softcuda.stats()["kernels"]["cublas::gemmEx"] == 1
    ((name, *_, m, n, k, of_a, of_b, of_c),) = cublas.calls
    assert (name, {m, n}, k) == ("gemmEx", {3, 5}, 7)
    assert {of_a, of_b, of_c} == {"float32"}


TWICE = "void k(const float* x, float* y) { int t = threadIdx.x; y[t] = x[0] + x[t]; }"


def test_bytes_are_counted_as_asked_for_and_as_touched(checked):
    """Each of the 64 threads reads x[0] too: that is asked for, but no new sector."""
    x, y = floats(64), floats(64)
    checked.config(touch=True)
    checked.reset()
    launch(TWICE, 64, x, y)
    found = checked.stats()
    assert (found["read_bytes"], found["written_bytes"]) == (2 * 256, 256)
    assert found["touched_bytes"] == found["touched"]["k"] == 256 + 256
    launch(TWICE, 64, x, y)
    assert checked.stats()["touched_bytes"] == 2 * 512  # no launch finds what another has touched


# ---- memory -------------------------------------------------------------------------------------


def test_new_memory_is_full_of_nan(softcuda):
    import cupy as cp

    cp.get_default_memory_pool().free_all_blocks()
    assert np.isnan(cp.empty(1000, np.float32).get()).all()


def test_a_full_device_is_out_of_memory(softcuda):
    import cupy as cp

    cp.get_default_memory_pool().free_all_blocks()
    live = softcuda.stats()["live_bytes"]
    softcuda.config(memory=live + 1_000_000)
    assert cp.cuda.runtime.memGetInfo() == (1_000_000, live + 1_000_000)
    kept = cp.empty(900_000, np.uint8)
    with pytest.raises(cp.cuda.memory.OutOfMemoryError):
        cp.empty(200_000, np.uint8)
    del kept
    cp.empty(950_000, np.uint8)  # the pool gives its blocks back and tries again


WRONG_ACCESSES = {
    "one past the end": (
        "void k(float* x, int n) { int t = threadIdx.x; if (t <= n) x[t] = 1; }",
        lambda: (floats(64), np.int32(64)),
        f"{OUT_OF_BOUNDS} store.*thread 64",
    ),
    "before the start": (
        "void k(float* x) { int t = threadIdx.x; x[t] = x[t - 1]; }",
        lambda: (floats(64),),
        f"{OUT_OF_BOUNDS} load.*thread 0",
    ),
    "half of a vector": (
        "void k(float4* x, float* y) { float4 v = x[1]; y[0] = v.x + v.y + v.z + v.w; }",
        lambda: (floats(6), floats(1)),
        f"{OUT_OF_BOUNDS} load",
    ),
    "misaligned": (
        "void k(float* x) { float4 v = *(float4*)(x + 1); x[0] = v.x + v.y + v.z + v.w; }",
        lambda: (floats(64),),
        "misaligned vector access",
    ),
    "after free": (
        "void k(float* x) { x[0] = 1; }",
        lambda: (np.int64(floats(1 << 16).data.ptr),),
        f"{OUT_OF_BOUNDS} store",
    ),
    "host memory": (
        "void k(float* x) { x[0] = 1; }",
        lambda: (np.int64(HOST.ctypes.data),),
        f"{OUT_OF_BOUNDS} store",
    ),
    "static shared overrun": (
        """void k(float* x) {
             __shared__ float s[32]; int t = threadIdx.x;
             s[t] = x[t]; __syncthreads(); x[t] = s[t]; }""",
        lambda: (floats(64),),
        "bad shared store.*thread (3[2-9]|[456])",
    ),
    "dynamic shared overrun": (
        """void k(float* x) {
             extern __shared__ float s[]; int t = threadIdx.x;
             s[t] = x[t]; __syncthreads(); x[t] = s[63 - t]; }""",
        lambda: (floats(64),),
        "bad shared store.*thread (3[2-9]|[456])",
    ),
}
HOST = np.ones(4, np.float32)


@pytest.mark.parametrize("case", WRONG_ACCESSES)
def test_a_wrong_access_is_reported(checked, case):
    code, make_args, said = WRONG_ACCESSES[case]
    options = {"shared_mem": 128} if "extern" in code else {}
    with pytest.raises(RuntimeError, match=f"kernel k: {said}"):
        launch(code, 128 if "n)" in code else 64, *make_args(), **options)


def test_a_right_kernel_is_not_reported(checked):
    """The same accesses within bounds: dynamic and static shared memory, vectors, the last byte."""
    code = """void k(float4* x, int n) {
      __shared__ float4 s[16]; extern __shared__ float d[]; int t = threadIdx.x;
      if (t < n) { s[t] = x[t]; d[t] = s[t].w; }
      __syncthreads();
      if (t < n) x[t].x = d[n - 1 - t] + s[n - 1 - t].y; }"""
    x = devices.cupy.arange(64, dtype=np.float32).reshape(16, 4)
    launch(code, 64, x, np.int32(16), shared_mem=64)
    expected = np.arange(64, dtype=np.float32).reshape(16, 4)
    expected[:, 0] = (expected[:, 3] + expected[:, 1])[::-1]
    assert_same(x.get(), expected, "x")


def test_copies_beyond_an_allocation_are_reported(checked):
    x, y = floats(4), floats(8)
    with pytest.raises(RuntimeError, match="memcpy destination"):
        x.data.copy_from_device(y.data, 32)
    with pytest.raises(RuntimeError, match="memcpy source"):
        y.data.copy_from_device(x.data, 32)
    with pytest.raises(RuntimeError, match="memset"):
        x.data.memset(0, 17)


def test_products_beyond_an_allocation_are_reported(checked):
    """A view that was made longer than its memory: as wrong shapes in a call of gemmEx would."""
    import cupy as cp

    short = floats(3, 4)
    longer = cp.ndarray((4, 4), np.float32, short.data)
    with pytest.raises(RuntimeError, match="cuBLAS operand"):
        floats(4, 4) @ longer


def test_variables_of_the_module_are_its_own_memory(checked):
    """The sine of a large number reads a table that lies in the module."""
    x = devices.cupy.asarray(np.array([1e6, 1e9], np.float32))
    launch("void k(float* x) { x[threadIdx.x] = sinf(x[threadIdx.x]); }", 2, x)
    assert_close(x.get(), np.sin(np.array([1e6, 1e9])), 1e-6, "sine")


# ---- barriers, shuffles, races ------------------------------------------------------------------

WRONG_WAITS = {
    "barrier in one branch": (
        "void k(float* x) { if (threadIdx.x < 32) __syncthreads(); x[threadIdx.x] = 1; }",
        "__syncthreads after some threads of the block returned",
    ),
    "return before a barrier": (
        "void k(float* x) { if (threadIdx.x >= 50) return; __syncthreads(); x[threadIdx.x] = 1; }",
        "__syncthreads after some threads of the block returned",
    ),
    "shuffle with lanes that returned": (
        """void k(float* x) { int t = threadIdx.x; if (t >= 50) return;
           x[t] = __shfl_xor_sync(0xffffffffu, x[t], 16); }""",
        "mask names a lane that exited",
    ),
    "shuffle from a lane outside the mask": (
        """void k(float* x) { int t = threadIdx.x;
           if ((t & 31) < 16) x[t] = __shfl_sync(0x0000ffffu, x[t], 20); }""",
        "source lane is outside the mask",
    ),
    "a lane that is not in its own mask": (
        "void k(float* x) { x[threadIdx.x] = __shfl_xor_sync(0x0000ffffu, x[threadIdx.x], 1); }",
        "not in its own mask",
    ),
}


@pytest.mark.parametrize("executor", ["src", "ptx"])
@pytest.mark.parametrize("case", WRONG_WAITS)
def test_a_wrong_barrier_or_shuffle_is_reported(checked, case, executor):
    code, said = WRONG_WAITS[case]
    checked.executor = executor
    with pytest.raises(RuntimeError, match=said):
        launch(code, 64, floats(64))


def test_too_many_threads_are_refused(softcuda):
    with pytest.raises(RuntimeError, match="invalid launch"):
        launch("void k(float* x) { x[0] = 1; }", 2048, floats(1))


# Threads write one half of the block's memory and read the other, with a barrier between or not.
REVERSED = """void k(float* x) {
  __shared__ float s[64]; int t = threadIdx.x; s[t] = x[t]; BARRIER; x[t] = s[63 - t]; }"""


def test_a_race_differs_by_the_schedule(checked):
    """Unknown to the memory check, because it is between threads of one warp."""
    racing = """void k(float* x) {
      __shared__ float s[32]; int t = threadIdx.x; s[t] = x[t]; x[t] = s[31 - t]; }"""
    found = []
    for sched in (0, 1, 2):
        checked.config(sched=sched, strict=False)
        x = devices.cupy.arange(32, dtype=np.float32)
        launch(racing, 32, x)
        found.append(x.get())
    assert not np.array_equal(found[0], found[1], equal_nan=True)
    assert not np.array_equal(found[0], found[2], equal_nan=True)


@pytest.mark.parametrize("sched", [0, 1, 2])
def test_a_race_between_warps_is_reported_in_every_schedule(checked, sched):
    checked.config(sched=sched)
    with pytest.raises(RuntimeError, match="race: another warp"):
        launch(REVERSED.replace("BARRIER", "__syncwarp()"), 64, floats(64))


@pytest.mark.parametrize("sched", [0, 1, 2])
def test_with_its_barrier_there_is_no_race(checked, sched):
    checked.config(sched=sched)
    x = devices.cupy.arange(64, dtype=np.float32)
    launch(REVERSED.replace("BARRIER", "__syncthreads()"), 64, x)
    assert_same(x.get(), np.arange(64, dtype=np.float32)[::-1], "x")


@pytest.mark.parametrize("executor", ["src", "ptx"])
def test_shared_memory_that_nobody_wrote_is_nan(checked, executor):
    checked.executor, x = executor, floats(64)
    code = """void k(float* x) { __shared__ float s[64]; int t = threadIdx.x;
              if (t < 32) s[t] = 1; __syncthreads(); x[t] = s[t]; }"""
    launch(code, 64, x)
    assert_same(np.isnan(x.get()), np.arange(64) >= 32, "nan")


# ---- arguments ----------------------------------------------------------------------------------


@pytest.mark.parametrize("executor", ["src", "ptx"])
def test_a_python_float_is_not_what_a_float_parameter_reads(checked, executor):
    """CuPy passes 8 bytes, of which the kernel reads the lower 4: as on a GPU, without an error."""
    checked.executor, x = executor, floats(2)
    code = "void k(float* x, float v, int i) { x[i] = v; }"
    launch(code, 1, x, 1.5, np.int32(0))
    launch(code, 1, x, np.float32(1.5), np.int32(1))
    assert_same(x.get(), np.array([0, 1.5], np.float32), "x")


# ---- streams ------------------------------------------------------------------------------------


@pytest.fixture
def deferred(softcuda):
    """Work of streams waits until somebody waits for it."""
    import cupy as cp

    softcuda.config(deferred=True)
    return cp.cuda.Stream(non_blocking=True)


def test_a_copy_is_not_there_before_somebody_waits(deferred):
    import cupy as cp
    import cupyx

    pinned = cupyx.zeros_pinned((4,), np.float32)
    with deferred:
        x = cp.full(4, 7, np.float32)
        x.get(stream=deferred, out=pinned, blocking=False)
        assert_same(pinned, np.zeros(4, np.float32), "before synchronize")
        deferred.synchronize()
    assert_same(pinned, np.full(4, 7, np.float32), "after")


def test_another_stream_needs_an_event(deferred):
    import cupy as cp

    with deferred:
        y = cp.full(4, 11, np.float32)
    assert not np.array_equal((y + 1).get(), np.full(4, 12, np.float32))
    with deferred:
        y = cp.full(4, 22, np.float32)
        event = deferred.record()
    cp.cuda.get_current_stream().wait_event(event)
    assert_same((y + 1).get(), np.full(4, 23, np.float32), "y")


def test_the_default_stream_waits_for_blocking_streams_and_they_for_it(deferred):
    import cupy as cp

    blocking = cp.cuda.Stream()
    with blocking:
        y = cp.full(4, 7, np.float32)
    z = y + 1
    with blocking:
        w = z * 2
        assert_same(w.get(), np.full(4, 16, np.float32), "w")


def test_products_take_their_turn_in_a_stream(deferred):
    import cupy as cp

    with deferred:
        x = cp.full((2, 2), 3, np.float32)
        y = x @ x
        x += 1
        assert_same(y.get(), np.full((2, 2), 18, np.float32), "y")


@pytest.mark.parametrize("pinned", [False, True])
def test_only_pinned_memory_is_read_when_the_stream_gets_there(deferred, pinned):
    import cupy as cp
    import cupyx

    host = cupyx.zeros_pinned((4,), np.float32) if pinned else np.zeros(4, np.float32)
    with deferred:
        x = cp.empty(4, np.float32)
        x.set(host, stream=deferred)
        host[:] = 99
        found = x.get()
    assert_same(found, np.full(4, 99 if pinned else 0, np.float32), "x")


# ---- graphs -------------------------------------------------------------------------------------


@pytest.fixture
def capturing(softcuda):
    """A stream to capture in."""
    import cupy as cp

    stream = cp.cuda.Stream(non_blocking=True)
    with stream:
        yield stream


def test_a_graph_does_again_what_was_captured(capturing, softcuda):
    import cupy as cp

    x, y = cp.arange(4, dtype=np.float32), cp.zeros(4, np.float32)
    double = cp.ElementwiseKernel("float32 x", "float32 y", "y = 2 * x", "double_it")
    double(x, y)  # compiled before the capture
    capturing.begin_capture()
    double(x, y)
    graph = capturing.end_capture()
    x += 1
    softcuda.reset()
    graph.launch(capturing)
    graph.launch(capturing)
    assert_same(y.get(), 2 * np.arange(1, 5, dtype=np.float32), "y")
    found = softcuda.stats()
    assert (found["graph_launches"], found["launches"], found["mallocs"]) == (2, 0, 0)


REFUSED = {
    "upload": lambda cp, x: cp.asarray(np.ones(2)),
    "download": lambda cp, x: x.get(),
    "scalar": lambda cp, x: float(x[0]),
    "list index": lambda cp, x: x[[0, 1]],
    "mask": lambda cp, x: x[x > 1],
    "product": lambda cp, x: x.reshape(2, 2) @ x.reshape(2, 2),
    "sort": lambda cp, x: cp.sort(x),
    "wait": lambda cp, x: cp.cuda.get_current_stream().synchronize(),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_captured_is_refused(capturing, case):
    import cupy as cp

    x, operation = cp.arange(4, dtype=np.float32), REFUSED[case]
    operation(cp, x)
    capturing.begin_capture()
    try:
        with pytest.raises((RuntimeError, NotImplementedError)):
            operation(cp, x)
    finally:
        capturing.end_capture()


def test_a_graph_that_outlives_its_memory_is_seen(checked):
    """A GPU would write into what others own by then, and say nothing."""
    import cupy as cp

    stream, x = cp.cuda.Stream(non_blocking=True), floats(4)
    code = "void k(float* x) { x[threadIdx.x] += 1; }"
    with stream:
        launch(code, 4, x)
        stream.begin_capture()
        launch(code, 4, x)
        graph = stream.end_capture()
        graph.launch(stream)
        assert x.get().tolist() == [3, 3, 3, 3]
        del x
        with pytest.raises(RuntimeError, match=f"{OUT_OF_BOUNDS} load"):
            graph.launch(stream)


# ---- libraries ----------------------------------------------------------------------------------


def gemm_ex(a_MK, w_NK, out_dtype):
    """A W^T with an output of another type than the inputs': what only gemmEx can do."""
    import cupy as cp
    from cupy.cuda import cublas, device

    codes = {BF16: 14, np.dtype(np.float16): 2, np.dtype(np.float32): 0}
    (m, k), n = a_MK.shape, len(w_NK)
    out_MN = cp.empty((m, n), out_dtype)
    one, zero = np.array(1, np.float32), np.array(0, np.float32)
    cublas.gemmEx(
        device.get_cublas_handle(), cublas.CUBLAS_OP_T, cublas.CUBLAS_OP_N, n, m, k,
        one.ctypes.data, w_NK.data.ptr, codes[w_NK.dtype], k, a_MK.data.ptr, codes[a_MK.dtype], k,
        zero.ctypes.data, out_MN.data.ptr, codes[out_MN.dtype], n,
        cublas.CUBLAS_COMPUTE_32F, cublas.CUBLAS_GEMM_DEFAULT,
    )  # fmt: skip
    return out_MN.get()


@pytest.mark.parametrize("stored", [BF16, np.dtype(np.float16)])
def test_products_of_halves_are_accumulated_in_float32(softcuda, stored):
    rng = np.random.default_rng(0)
    a_MK, w_NK = (rng.standard_normal(shape).astype(stored) for shape in ((3, 70), (5, 70)))
    exact_MN = a_MK.astype(np.float64) @ w_NK.astype(np.float64).T
    on_device = [devices.cupy.asarray(array) for array in (a_MK, w_NK)]
    assert_close(gemm_ex(*on_device, np.float32), exact_MN, 70 * 2.0**-24, "float32 out")
    found = gemm_ex(*on_device, stored)
    assert found.dtype == stored
    assert_close(found, exact_MN, 2.0**-8, "rounded once")


def test_types_that_cublas_does_not_take_are_refused(softcuda):
    from softcuda.cublas import CUBLASError

    a_MK = devices.cupy.ones((2, 2), np.float32)
    with pytest.raises(CUBLASError, match="NOT_SUPPORTED"):
        gemm_ex(a_MK, a_MK.astype(BF16), np.float32)


def test_functions_that_are_not_emulated_say_so(softcuda):
    from cupy.cuda import cublas

    with pytest.raises(NotImplementedError, match="strsm is not emulated"):
        cublas.strsm(0)


# ---- compilation --------------------------------------------------------------------------------


def test_sources_can_be_shown_to_the_real_compiler_too(checked):
    """INFINITY is a macro of the host's headers, which NVRTC does not have."""
    from cupy.cuda.compiler import CompileException

    checked.executor, checked.nvrtc_check = "src", ("75", "90")
    try:
        with pytest.raises(CompileException, match="INFINITY"):
            launch("void k(float* x) { x[0] = -INFINITY; }", 1, floats(1))
        launch("void k(float* x) { x[0] = -1.0f; }", 1, floats(1))
    finally:
        checked.nvrtc_check = ()


@pytest.mark.parametrize("executor", ["src", "ptx"])
def test_instances_of_templates_are_found_by_their_expressions(checked, executor):
    checked.executor, instance = executor, "put<float, int>"
    code = "template <class T, class U> __global__ void put(T* x, U value) { x[0] = (T)value; }"
    module = devices.cupy.RawModule(code=code, name_expressions=[instance])
    x = floats(1)
    module.get_function(instance)((1,), (1,), (x, np.int32(7)))
    assert x.get().tolist() == [7]


def test_ptx_that_is_not_known_falls_back_to_the_source(checked):
    """And that is told: when it is compiled, and at every run."""
    before, x = len(checked.fallbacks), floats(1)
    checked.reset()
    code = f"""__device__ __noinline__ float f(float x) {{ return x + 1; }} // {time.time_ns()}
      extern "C" __global__ void calls(float* x) {{ x[0] = f(f(x[0])); }}"""
    devices.cupy.RawKernel(code, "calls")((1,), (1,), (x,))
    assert x.get().tolist() == [3]
    assert checked.fallbacks[before:] == [(["calls"], ".func")]
    assert checked.stats()["unchecked"] == {"calls": 1}


BITS = r"""void k(const unsigned* a, const unsigned* b, const unsigned* c, unsigned* y) {
  int t = threadIdx.x, n = blockDim.x; unsigned p = a[t], q = b[t], r = c[t];
  int s = p, u = q; unsigned* at = y + t;
  at[0] = p + q; at[n] = p * q; at[2 * n] = __umulhi(p, q); at[3 * n] = __mulhi(s, u);
  at[4 * n] = p / (q | 1); at[5 * n] = s % (u | 1); at[6 * n] = s >> (q & 31);
  at[7 * n] = p << (q & 31); at[8 * n] = __popc(p); at[9 * n] = __clz(s);
  at[10 * n] = __byte_perm(p, q, r & 0x7777); at[11 * n] = __dp4a(s, u, (int)r);
  at[12 * n] = __funnelshift_l(p, q, r); at[13 * n] = (p & q) ^ (~p & r);
  at[14 * n] = (p >> 7) & 0x1ff; at[15 * n] = (unsigned)max(s, u); at[16 * n] = min(p, q); }"""


def bits_expected(a, b, c):
    """The same in Python's integers, which have no width to go wrong."""
    s, u = (x - (x >> 31 << 32) for x in (a, b))
    odd, joined = u | 1, (b << 32) | a
    quotient = abs(s) // abs(odd) * (1 if s * odd >= 0 else -1)
    signed_bytes = (
        (x >> i & 255) - (x >> (i + 7) & 1) * 256 for x in (a, b) for i in (0, 8, 16, 24)
    )
    w = list(signed_bytes)
    permuted = sum((joined >> 8 * (c >> 4 * i & 7) & 255) << 8 * i for i in range(4))
    values = [
        a + b, a * b, a * b >> 32, s * u >> 32, a // (b | 1), s - quotient * odd, s >> (b & 31),
        a << (b & 31), a.bit_count(), 32 - a.bit_length(), permuted,
        c + sum(x * y for x, y in zip(w[:4], w[4:], strict=True)), joined << (c & 31) >> 32,
        (a & b) ^ (~a & c), a >> 7 & 0x1FF, max(s, u), min(a, b),
    ]  # fmt: skip
    return [value & 0xFFFFFFFF for value in values]


words = st.one_of(st.integers(0, 2**32 - 1), st.sampled_from([0, 1, 2**31 - 1, 2**31, 2**32 - 1]))


@given(st.lists(st.tuples(words, words, words), min_size=1, max_size=32))
def test_integers_of_translated_ptx_are_exact(triples):
    import cupy as cp
    import softcuda

    if not softcuda.has_nvrtc():
        pytest.skip("NVRTC is not installed (pip install -e '.[test-cuda]')")
    chosen, softcuda.executor = softcuda.executor, "ptx"
    try:
        y = cp.zeros((17, len(triples)), np.uint32)
        columns = (cp.asarray(np.array(column, np.uint32)) for column in zip(*triples, strict=True))
        launch(BITS, len(triples), *columns, y)
    finally:
        softcuda.executor = chosen
    expected = np.array([bits_expected(*triple) for triple in triples], np.uint32).T
    assert_same(y.get(), expected, "y")


FLOATS = r"""void k(const float* a, const float* b, float* y) {
  int t = threadIdx.x, n = blockDim.x; float p = a[t], q = b[t]; float* at = y + t;
  at[0] = p + q; at[n] = p * q; at[2 * n] = p / q; at[3 * n] = sqrtf(fabsf(p));
  at[4 * n] = fmaxf(p, q); at[5 * n] = fmaf(p, q, p); at[6 * n] = (float)(int)p;
  at[7 * n] = rintf(p); at[8 * n] = p < q ? 1 : 0; at[9 * n] = !(p >= q) ? 1 : 0;
  at[10 * n] = -p; at[11 * n] = copysignf(p, q); }"""


@given(seeds)
def test_floats_of_translated_ptx_are_ieees(seed):
    """NaN and infinity among them; fmaf against the sum in float64, which is exact but for it."""
    import cupy as cp
    import softcuda

    if not softcuda.has_nvrtc():
        pytest.skip("NVRTC is not installed (pip install -e '.[test-cuda]')")
    rng = np.random.default_rng(seed)
    a, b = (rng.standard_normal(64).astype(np.float32) * 100 for _ in range(2))
    a[:3], b[1:4] = (np.nan, np.inf, 0), (np.nan, -np.inf, 0)
    chosen, softcuda.executor = softcuda.executor, "ptx"
    try:
        y = cp.zeros((12, 64), np.float32)
        cp.RawKernel('extern "C" __global__ ' + FLOATS, "k", options=("-fmad=false",))(
            (1,), (64,), (cp.asarray(a), cp.asarray(b), y)
        )
    finally:
        softcuda.executor = chosen
    with np.errstate(all="ignore"):
        wide = a.astype(np.float64) * b + a
        whole = np.where(np.isnan(a), 0, np.clip(np.trunc(a), -(2.0**31), 2.0**31 - 1))
        expected = [
            a + b, a * b, a / b, np.sqrt(np.abs(a)), np.fmax(a, b), wide, whole,
            np.rint(a), a < b, ~(a >= b), -a, np.copysign(a, b),
        ]  # fmt: skip
    np.testing.assert_array_equal(y.get(), np.array(expected).astype(np.float32))


# ---- installation -------------------------------------------------------------------------------


def capsule(name):
    """A PyCapsule of that name, like those by which Cython modules share functions."""
    new = ctypes.pythonapi.PyCapsule_New
    new.restype, new.argtypes = (
        ctypes.py_object,
        [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p],
    )
    return new(1, name, None)


def test_another_c_signature_is_an_import_error_and_changes_nothing(softcuda):
    import _softcuda

    fine, changed = capsule(b"int (int __pyx_skip_dispatch)"), capsule(b"intptr_t (int, int)")
    table = {"getDevice": fine, "malloc": changed}
    with pytest.raises(ImportError, match=r"malloc has another C signature.*intptr_t \(int, int\)"):
        _softcuda.install(table, {}, None, None, None)
    assert table == {"getDevice": fine, "malloc": changed}


def in_a_process(code, **environment):
    """The exit status and the last line of Python code in a process of its own."""
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": path, **environment},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    return done.returncode, (done.stderr or done.stdout).strip().splitlines()[-1]


def test_a_cupy_imported_before_is_an_import_error(softcuda):
    status, said = in_a_process("import cupy, softcuda; softcuda.install()")
    assert status == 1
    assert "ImportError: softcuda.install() must come before the import of cupy" in said


def test_without_a_compiler_the_reason_is_one_sentence(softcuda):
    status, said = in_a_process("import softcuda; softcuda.install()", PATH="/nowhere")
    assert (status, said) == (1, "softcuda.Unavailable: the software device needs g++")


def test_an_executor_that_does_not_exist_is_named(softcuda):
    code = "import softcuda; softcuda.install()"
    status, said = in_a_process(code, SOFTCUDA_EXECUTOR="gpu")
    assert (status, said) == (1, "ValueError: SOFTCUDA_EXECUTOR: expected src or ptx, found 'gpu'")


def test_nothing_compiled_lies_in_the_repository(softcuda):
    from paths import REPOSITORY

    assert REPOSITORY not in softcuda.cache().parents
    assert os.environ["CUPY_CACHE_DIR"].startswith(str(softcuda.cache()))

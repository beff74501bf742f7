"""The real compiler takes every kernel for every architecture, and finds registers for it.

NVRTC needs no GPU. Asked for it, ptxas logs what a thread takes: registers, and bytes of local
memory on the stack or for what did not fit (spills), which are as slow as any other memory.
"""

import os
import re

import pytest

pytest.importorskip("cupy")
nvrtc = pytest.importorskip("cupy_backends.cuda.libs.nvrtc")

from llama3np.kernels.cuda import registry  # noqa: E402

pytestmark = pytest.mark.cuda

ARCHITECTURES = ("75", "80", "86", "89", "90", "100", "120")
FLAGS = ("-ftz=true", "--device-as-default-execution-space", "--ptxas-options=-v")
REPORT = re.compile(
    r"Compiling entry function '(?P<entry>\w+)' for.*\n.*\n"
    r"\D*(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads\n.*?Used (?P<registers>\d+) registers"
)
SHARED = re.compile(r"Compiling entry function '(\w+)' for(?:.*\n){3}.*?(\d+) bytes smem")


def modules():
    """Kernels by their source and options: what is compiled together."""
    found = {}
    for kernel in registry.every_kernel():
        found.setdefault((kernel.source, kernel.options), []).append(kernel)
    return list(found.values())


def heavy(kernels):
    """Those that need most of a thread, of each file: enough for every run of the suite."""
    kernel = kernels[0]
    defines = dict(kernel.defines)
    if "BATCH" in defines:
        name = registry.FORMATS[defines["FORMAT"]]
        return name in ("BF16", "Q4_K", "Q6_K") and defines["BATCH"] == 1 and not defines["SCALAR"]
    if "FORMAT" in defines:
        return registry.FORMATS[defines["FORMAT"]] == "Q6_K"
    return defines.get("HEAD", 128) == 128 and defines.get("CACHED", 2) == 2


def compiled(kernel, architecture):
    """ptxas's log. Raises NVRTCError with the compiler's."""
    program = nvrtc.createProgram(kernel.source, f"{kernel.files[-1]}", (), ())
    try:
        try:
            flags = (*kernel.options, f"-arch=sm_{architecture}", *FLAGS)
            nvrtc.compileProgram(program, flags)
        except nvrtc.NVRTCError:
            raise AssertionError(f"{kernel.name}: {nvrtc.getProgramLog(program)}") from None
        return nvrtc.getProgramLog(program)
    finally:
        nvrtc.destroyProgram(program)


def check(kernels, architecture):
    log = compiled(kernels[0], architecture)
    reports = {match["entry"]: match for match in REPORT.finditer(log)}
    shared = {entry: int(size) for entry, size in SHARED.findall(log)}
    for kernel in kernels:
        found, where = reports[kernel.entry], f"sm_{architecture}, {kernel.name}"
        spilled = [int(found[name]) for name in ("stack", "stores", "loads")]
        assert spilled == [0, 0, 0], f"{where}: stack, spill stores and loads {spilled}"
        assert int(found["registers"]) <= kernel.registers, f"{where}: {found['registers']}"
        assert shared.get(kernel.entry, 0) <= 48 * 1024, where


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_heavy_kernels_compile_without_spills(architecture):
    chosen = [kernels for kernels in modules() if heavy(kernels)]
    assert {file for kernels in chosen for file in kernels[0].files} == {
        "formats.cu", "pieces.cu", "product.cu", "rows.cu", "attend.cu", "tokens.cu", "prefill.cu",
    }  # fmt: skip
    for kernels in chosen:
        check(kernels, architecture)


@pytest.mark.skipif(
    not os.environ.get("LLAMA3NP_GATE"), reason="make test-cuda compiles all kernels"
)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.timeout(3000)
def test_every_kernel_compiles_without_spills(architecture):
    for kernels in modules():
        check(kernels, architecture)


def test_the_sources_need_no_header():
    for kernel in registry.every_kernel():
        assert not re.search(r"^\s*#\s*include|\bINFINITY\b|\basm\b", kernel.source, re.MULTILINE)


def test_the_log_of_a_kernel_that_spills_says_so(monkeypatch):
    """The gate's own check: an array that is indexed by a variable lies on the stack."""
    source = """extern "C" __global__ void widen(float* x, int n) {
      float own[400];
      for (int i = 0; i < 400; i++) own[i] = x[i];
      for (int i = 0; i < n; i++) own[(i * n) % 400] += own[(i + n) % 400];
      for (int i = 0; i < 400; i++) x[i] = own[i];
    }"""
    monkeypatch.setattr(registry.Kernel, "source", property(lambda kernel: source))
    with pytest.raises(AssertionError, match="stack, spill stores and loads"):
        check([registry.row_kernel("widen", "F32")], "80")

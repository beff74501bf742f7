"""CUDA C++ into what the software device calls a cubin: a shared object of the host.

CuPy compiles every kernel, its own and the user's, through one function of cupy.cuda.compiler;
`hook` takes its place.
"""

import re
import time

from cupy.cuda.compiler import CompileException

import softcuda
from softcuda.build import COMMON, EMULATOR, HEADERS, CompileError, compiler_digest, shared_object
from softcuda.ptx import Unsupported, translate

# What makes a kernel need fibers; a kernel without any of these runs its threads one by one.
BARRIERS = re.compile(r"__sync|__shfl|__ballot|__any_sync|__all_sync|cooperative_groups")
_BOUNDS = r"(?:__launch_bounds__\s*\([^)]*\)\s*)?"
KERNEL = re.compile(rf"__global__\s+{_BOUNDS}void\s+{_BOUNDS}([A-Za-z_]\w*)\s*\(")
TEMPLATE = r"template\s*<[^;{}]*>\s*__global__[^;{}]*\b"
DYNAMIC_SHARED = re.compile(
    r"extern\s+__shared__\s+(?:__align__\s*\(\s*\d+\s*\)\s*)?([\w:<> ]+?)\s+(\w+)\s*\[\s*\]\s*;"
)


# ---- from the source ----------------------------------------------------------------------------


def host_source(code, instances):
    """CUDA source as C++ with an entry point for every kernel, and the names of the kernels.

    instances: {template instance: name of its entry point}.
    """
    names = KERNEL.findall(code)
    direct = "false" if BARRIERS.search(code) else "true"
    body = DYNAMIC_SHARED.sub(r"\1* \2 = (\1*)emu::C.dyn;", code)
    entries = {name: name for name in names if not re.search(TEMPLATE + name, code)} | instances
    exports = [f"EMU_EXPORT({symbol}, {direct}, {name})" for name, symbol in entries.items()]
    return "\n".join([body, *exports, ""]), names


def build_source(code, options, instances):
    """The shared object of CUDA source, and the names of its kernels. Raises CompileError."""
    source, names = host_source(code, instances)
    # The toolkit's own headers are for NVRTC; ours stand in for them.
    ours = [o for o in options if o.startswith(("-D", "-I")) and not re.search("_cccl|nvidia", o)]
    flags = [*COMMON, "-O1", "-ffp-contract=fast", f"-I{HEADERS}", "-D__CUDACC_VER_MAJOR__=13"]
    includes = (f'"{EMULATOR / "cudaemu.h"}"', *leading_includes(code))
    folder = softcuda.cache() / "kernels"
    return shared_object(source, [*flags, *ours], folder, "source", includes), names


def leading_includes(code):
    """CuPy's headers, with which all of its own kernels begin."""
    leading = re.split(r"^(?!#include <cupy/.*>$)", code, maxsplit=1, flags=re.MULTILINE)[0]
    return tuple(re.findall("<.*>", leading))


def symbols(expressions):
    """{template instance: name of its entry point}, e.g. k<float> -> instance0_k_float_."""
    return {e: f"instance{i}_" + re.sub(r"\W+", "_", e) for i, e in enumerate(expressions or ())}


# ---- from the PTX -------------------------------------------------------------------------------


def ptx_of(code, options, expressions):
    """What the real NVRTC makes of CUDA source: PTX, and {template instance: its name there}."""
    from cupy_backends.cuda.libs import nvrtc

    flags = [option for option in options if not option.startswith("-arch")]
    flags += [f"-arch=compute_{softcuda.ptx_arch}", "--device-as-default-execution-space"]
    program = nvrtc.createProgram(code, "kernel.cu", (), ())
    try:
        for expression in expressions or ():
            nvrtc.addNameExpression(program, expression)
        nvrtc.compileProgram(program, tuple(flags))
        ptx = nvrtc.getPTX(program)
        names = {e: nvrtc.getLoweredName(program, e) for e in expressions or ()}
        return ptx.decode() if isinstance(ptx, bytes) else ptx, names
    except nvrtc.NVRTCError:
        log = nvrtc.getProgramLog(program)
        raise CompileException(log, code, "kernel.cu", options) from None
    finally:
        nvrtc.destroyProgram(program)


def build_ptx(ptx):
    """The shared object of translated PTX, and its kernels. Raises Unsupported, CompileError."""
    source, names = translate(ptx)
    flags, includes = [*COMMON, "-O1", "-ffp-contract=off"], (f'"{EMULATOR / "ptx_prelude.h"}"',)
    return shared_object(source, flags, softcuda.cache() / "kernels", "ptx", includes), names


# ---- in CuPy's place ----------------------------------------------------------------------------


def compile_kernel(code, options, expressions):
    """(bytes of a shared object, {template instance: its name}) by the executor that is set.

    Raises CuPy's CompileException, as for a source that NVRTC refuses.
    """
    start = time.perf_counter()
    if softcuda.executor == "ptx":
        ptx, mapping = ptx_of(code, options, expressions)
        try:
            made, names = build_ptx(ptx)
            softcuda.compiled.append((names, time.perf_counter() - start))
            return made.read_bytes(), mapping or None
        except (Unsupported, CompileError) as error:
            softcuda.fallbacks.append((KERNEL.findall(code), str(error)[:200]))
    mapping = symbols(expressions)
    try:
        made, names = build_source(code, options, mapping)
    except CompileError as error:
        raise CompileException(str(error), code, "kernel.cu", options) from None
    softcuda.compiled.append((names, time.perf_counter() - start))
    return made.read_bytes(), mapping or None


def hook(compiler, cc):
    """Put compile_kernel under cupy.cuda.compiler, for a device of that compute capability."""
    from cupy_backends.cuda.libs import nvrtc

    real, own = compiler._compile_using_nvrtc_no_warning, "{}{}".format(*cc)
    digest = compiler_digest()

    def check(code, options, *rest):
        """Let the real NVRTC compile it too, for the architectures of softcuda.nvrtc_check."""
        soft, compiler._get_nvrtc_version = compiler._get_nvrtc_version, nvrtc.getVersion
        try:
            for arch in softcuda.nvrtc_check:
                real(code, options, arch, *rest)
        finally:
            compiler._get_nvrtc_version = soft

    def compile_using_softcuda(
        source, options=(), arch=None, filename="kernel.cu", name_expressions=None,
        log_stream=None, cache_in_memory=False, jitify=None, method=None,
    ):  # fmt: skip
        rest = (filename, name_expressions, log_stream, cache_in_memory, jitify, method)
        check(source, options, *rest)
        return compile_kernel(source, options, name_expressions)

    compiler._compile_using_nvrtc_no_warning = compile_using_softcuda
    compiler._get_arch = lambda: own
    compiler._get_arch_for_options_for_nvrtc = lambda arch=None: (
        f"-arch=sm_{arch or own}",
        "cubin",
    )
    compiler._get_nvrtc_version = lambda: (13, 0)
    # CuPy's own cache names a kernel by this text, for which it runs NVRTC's preprocessor.
    compiler._preprocess = lambda *args, **options: (
        f"{softcuda.executor} {softcuda.ptx_arch} {softcuda.nvrtc_check} {digest}"
    )

"""Where compiled files are kept, and how g++ is called: once for each source."""

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
EMULATOR = HERE / "emulator"  # what a kernel stands on: the headers of the fiber engine
HEADERS = HERE / "headers"  # stand-ins for the headers of the CUDA toolkit

# Products are contracted as NVRTC contracts them; CuPy's kernels alias types.
COMMON = ["-std=gnu++17", "-w", "-mfma", "-mavx2", "-fno-strict-aliasing", "-fPIC"]


class CompileError(RuntimeError):
    """A source that g++ refuses."""


def default_cache() -> Path:
    """SOFTCUDA_CACHE, or a folder among the user's caches: never inside the repository.

    Not the temporary folder, which others can write to: what is read from the cache is run.
    """
    if given := os.environ.get("SOFTCUDA_CACHE"):
        return Path(given)
    own = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own) / "llama3np-softcuda"


def refusal() -> str | None:
    """Why nothing can be compiled for this machine; None if it can."""
    if platform.system() != "Linux" or platform.machine() != "x86_64":
        return f"the software device needs Linux on x86-64, this is {platform.platform()}"
    if shutil.which("g++") is None:
        return "the software device needs g++"
    flags = set(Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore").split())
    if missing := sorted({"avx2", "fma"} - flags):
        return f"the software device needs a processor with {' and '.join(missing)}"
    return None


def digest_of(*parts: str | bytes) -> str:
    """Name for what is made of these parts."""
    total = hashlib.sha256()
    for part in parts:
        total.update(part.encode() if isinstance(part, str) else part)
        total.update(b"\0")
    return total.hexdigest()[:32]


@cache
def headers_digest() -> str:
    """A digest of what every kernel includes."""
    return digest_of(*(path.read_bytes() for path in sorted(HERE.rglob("*.h"))))


def compiler_digest() -> str:
    """A digest of all that decides what becomes of a kernel's source."""
    parts = [HERE / f"{name}.py" for name in ("build", "compiler", "ptx")]
    return digest_of(headers_digest(), *(path.read_bytes() for path in parts))


def shared_object(
    source: str, flags: list[str], folder: Path, name: str = "kernel", includes: tuple = ()
) -> Path:
    """Compile C++ into a shared object of the folder, unless that was done before.

    includes: what to put in front, `<...>` or paths, which is compiled once for all sources.
    Raises CompileError with the compiler's words; the source is then kept beside the others.
    """
    made = folder / f"{name}-{digest_of(headers_digest(), source, *flags, *includes)}.so"
    if made.exists():
        return made
    front = ["-include", str(precompiled(includes, flags, folder))] if includes else []
    with tempfile.NamedTemporaryFile("w", suffix=".cpp", dir=_made(folder), delete=False) as file:
        file.write(source)
    unfinished = made.with_suffix(f".{os.getpid()}.tmp")
    run_compiler([*flags, "-shared", *front, "-o", str(unfinished), file.name])
    unfinished.replace(made)  # atomic: several test processes may compile the same
    Path(file.name).unlink()
    return made


def precompiled(includes: tuple, flags: list[str], folder: Path) -> Path:
    """A header that includes these, parsed once: that halves the time that a kernel takes."""
    made = folder / f"headers-{digest_of(headers_digest(), *includes, *flags)}"
    header = made / "all.h"
    if header.exists():
        return header
    with tempfile.TemporaryDirectory(dir=_made(folder)) as unfinished:
        text = "".join(f"#include {each}\n" for each in includes)
        (Path(unfinished) / "all.h").write_text(text, encoding="utf-8")
        names = ["-o", f"{unfinished}/all.h.gch", f"{unfinished}/all.h"]
        run_compiler(["-x", "c++-header", *flags, *names])
        with contextlib.suppress(OSError):  # another process was first
            Path(unfinished).rename(made)
            Path(unfinished).mkdir()  # for TemporaryDirectory to remove
    return header


def run_compiler(arguments: list[str]) -> None:
    """Call g++; raise CompileError if it fails."""
    done = subprocess.run(["g++", *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise CompileError(f"g++ failed:\n{done.stderr[:4000]}\nsource kept: {arguments[-1]}")


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return folder

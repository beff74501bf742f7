"""How kernels are compiled: once, into a folder of the user's cache, named by what they are."""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llvmlite
import numba
import numba.core.config
import platformdirs
from numba.core.caching import NullCache

from llama3np.errors import warn_once
from llama3np.kernels import ggml

# Sums may be reordered, products contracted. Not "nnan" and "ninf": those would let the compiler
# assume that damaged weights cannot happen, and a nan must come out as a nan. Not "arcp": vectors
# of quotients would then be estimates, and have other bits than a quotient alone.
FAST = {"reassoc", "contract", "nsz"}

UNUSED = 60  # days after which a folder of another version is removed

_SETTINGS = numba.core.config  # numba's, of the whole process
if _SETTINGS.DISABLE_JIT:  # addresses mean nothing to the interpreter
    raise ImportError("NUMBA_DISABLE_JIT is set")


def cache_folder() -> Path:
    """The folder of compiled kernels, one for each state of their sources.

    numba looks at the file of a function alone, not at those of the functions it calls, so a
    change of one of them would go unseen: the folder's name is a digest of all. It is in
    NUMBA_CACHE_DIR if that is set, else in the user's cache folder.
    """
    digest = hashlib.sha256(f"{numba.__version__} {llvmlite.__version__}".encode())
    for source in (*sorted(Path(__file__).parent.glob("*.py")), Path(ggml.__file__)):
        digest.update(source.read_bytes())
    return (_given_folder() or _user_folder()) / f"kernels-{digest.hexdigest()[:16]}"


def _given_folder() -> Path | None:
    return Path(_SETTINGS.CACHE_DIR) if _SETTINGS.CACHE_DIR else None


def _user_folder() -> Path:
    try:
        return Path(platformdirs.user_cache_dir("llama3np"))
    except RuntimeError:  # a user without a home, as in a container
        return _temporary_folder()


def _temporary_folder() -> Path:
    """A folder for this user's kernels among temporary files, or a path that nothing can be in.

    What is read from it is run, so it must be one that no other user can write to.
    """
    folder = Path(tempfile.gettempdir()) / f"llama3np-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    about = folder.lstat()
    ours = about.st_uid == os.getuid() and stat.S_ISDIR(about.st_mode) and not about.st_mode & 0o077
    return folder if ours else Path(os.devnull)


def mark_used(folder: Path) -> None:
    """Note that a folder is in use; where it is new, remove those of other versions that are not.

    Those are the ones that nobody used for UNUSED days. What cannot be removed stays.
    """
    with contextlib.suppress(OSError):
        if folder.exists():
            os.utime(folder)
            return
        for other in folder.parent.glob("kernels-" + 16 * "[0-9a-f]"):
            if time.time() - other.stat().st_mtime > UNUSED * 24 * 60 * 60:
                shutil.rmtree(other, ignore_errors=True)


CACHE = cache_folder()
mark_used(CACHE)


def jit(function: Callable) -> Any:
    """Compile a function at its first call, to run without the interpreter's lock."""
    compiled = numba.njit(nogil=True, fastmath=FAST, error_model="numpy")(function)
    own = _SETTINGS.CACHE_DIR
    _SETTINGS.CACHE_DIR = str(CACHE)
    with contextlib.suppress(RuntimeError):  # nowhere can be written
        compiled.enable_caching()
    _SETTINGS.CACHE_DIR = own  # not ours to change for others
    cache = compiled._cache
    if not str(cache.cache_path).startswith(str(CACHE)):  # numba's next choice has no digest
        cache = compiled._cache = NullCache()
    cache.load_overload, cache.save_overload = _loading(cache), _saving(cache)
    return compiled


# ---- a cache that cannot be used is none --------------------------------------------------------


def _loading(cache: Any) -> Callable:
    load = cache.load_overload

    def load_or_compile(*args: Any) -> Any:
        try:
            found = load(*args)
        except Exception as error:  # a file that was cut off holds anything
            warn_once(f"{CACHE} has a damaged file ({error!r}), which is made again")
            found = None
            with contextlib.suppress(OSError):
                cache.flush()  # its table of contents: what it says may be wrong as well
        if found is None:
            kept = f"kept in {CACHE}" if CACHE.exists() else f"{CACHE} cannot be written to"
            warn_once(f"compiling kernels for this processor, some 20 seconds in all; {kept}")
        return found

    return load_or_compile


def _saving(cache: Any) -> Callable:
    save = cache.save_overload

    def save_if_possible(*args: Any) -> None:
        try:
            save(*args)
        except OSError as error:  # a full disk
            warn_once(f"compiled kernels cannot be kept in {CACHE}: {error.strerror}")

    return save_if_possible

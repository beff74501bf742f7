"""How kernels are compiled: once, into a folder of the user's cache, named by what they are."""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numba
import numba.core.config
import platformdirs

# Sums may be reordered, products contracted. Not "nnan" and "ninf": those would let the compiler
# assume that damaged weights cannot happen, and a nan must come out as a nan.
FAST = {"reassoc", "contract", "arcp", "nsz"}


def cache_folder() -> Path:
    """The folder of compiled kernels, one for each state of their sources.

    numba looks at the file of a function alone, not at those of the functions it calls, so a
    change of one of them would go unseen: the folder's name is a digest of all.
    """
    digest = hashlib.sha256(numba.__version__.encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return Path(platformdirs.user_cache_dir("llama3np")) / f"kernels-{digest.hexdigest()[:16]}"


_SETTINGS: Any = numba.core.config  # numba's, of the whole process
CACHE = Path(_SETTINGS.CACHE_DIR or cache_folder())


def announce() -> None:
    """Say, in the log, that kernels are about to be compiled, if they have not been."""
    if not any(CACHE.rglob("*.nbi")):
        logging.getLogger("llama3np").warning(
            "llama3np: compiling kernels for this processor, once, some 20 seconds; kept in %s",
            CACHE,
        )


def jit(function: Callable) -> Any:
    """Compile a function at its first call, to run without the interpreter's lock."""
    own = _SETTINGS.CACHE_DIR
    _SETTINGS.CACHE_DIR = str(CACHE)
    compiled = numba.njit(nogil=True, fastmath=FAST, error_model="numpy")(function)
    with contextlib.suppress(RuntimeError):  # no folder can be written to: compile each time
        compiled.enable_caching()
    _SETTINGS.CACHE_DIR = own  # not ours to change for others
    return compiled

"""One process at a time trains in a directory."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from llama3np.errors import InputError
from llama3np.train import durable

try:
    import fcntl
except ImportError:  # Windows, where nothing is locked
    fcntl = None  # type: ignore[assignment]

FILE = "training/lock"


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Hold the lock of the training in OUT: that of a file, made if there is none, and left there.

    The system lets go of it when the process ends, however it ends, so no lock is left behind.
    Raises InputError if another process has it.
    """
    with durable.told(out / FILE):
        file = (out / FILE).open("ab")
    with file:
        if not _locked(file):
            raise InputError(f"{out}: another process is training there; expected one at a time")
        yield


def _locked(file: BinaryIO) -> bool:
    """Whether the lock could be had; True where the system has none."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(file.fileno(), fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True

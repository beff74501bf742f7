"""Files that a crash, a kill or a full disk leaves as they were: the old one or the new, whole."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from llama3np.errors import InputError

PARTIAL = ".partial"  # one name for each file, so what a kill leaves is replaced by the next


@contextmanager
def told(path: Path, consequence: str = "") -> Iterator[None]:
    """Raise what the system refuses within the block as an InputError of one sentence."""
    try:
        yield
    except OSError as error:
        said = f"{path}: cannot be written: {error.strerror or error}{consequence}"
        raise InputError(said) from None


def replace_file(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Put what write(file) writes in place of a file, or of nothing.

    It is written under another name, sent to the disk (fsync), and renamed: whoever opens `path`
    at any time finds a whole file. The rename is sent to the disk as well, so the order of two
    replacements survives a power cut. Raises InputError for a full disk and the like; the old file
    is as it was then.
    """
    temporary = path.with_name(path.name + PARTIAL)
    with told(path, "; what was there before is kept"):
        try:
            with open_new(temporary) as file:
                write(file)
                sync(file)
            temporary.replace(path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_directory(path.parent)


def open_new(path: Path) -> BinaryIO:
    """An empty file to be written to."""
    return path.open("wb")


def open_end(path: Path) -> BinaryIO:
    """A file to which is added."""
    return path.open("ab")


def sync(file: BinaryIO) -> None:
    """Return when all that was written to a file is on the disk."""
    file.flush()
    os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    """Return when the names in a directory are on the disk; nothing where that is unknown."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows
        return
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sha256(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()

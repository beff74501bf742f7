"""Files as every reader here needs them: mapped, checked for JSON, written whole or not at all."""

from __future__ import annotations

import json
import math
import mmap
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from llama3np.errors import CheckpointError, InputError

# Parsed, JSON takes up to thirty times its bytes. The index of 405B, the longest, has 0.1 MB.
MAX_JSON = 1 << 22


def map_file(path: Path) -> mmap.mmap:
    """Map a file for reading; its pages are read when touched, and nothing is copied.

    Raises CheckpointError for a path that cannot be opened and for an empty file.
    """
    refuse_special(path)
    try:
        with path.open("rb") as file:
            if path.stat().st_size == 0:
                raise CheckpointError(f"{path}: the file is empty")
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def view(data: mmap.mmap, dtype: Any, shape: tuple[int, ...], offset: int) -> np.ndarray:
    """See part of a map as a read-only array, at any alignment; the array keeps the map open."""
    if math.prod(shape) == 0:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, buffer=data, offset=offset)


def refuse_special(path: Path) -> None:
    """Raise CheckpointError for a pipe, a device or a directory: reading one may never end."""
    try:
        if path.exists() and not path.is_file():
            raise CheckpointError(f"{path}: expected a file, found something else")
    except OSError as error:  # a name that is too long, a loop of links
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Read a file that holds one JSON object. Raises CheckpointError if it does not."""
    refuse_special(path)
    try:
        if (size := path.stat().st_size) > MAX_JSON:
            raise CheckpointError(f"{path}: expected at most {MAX_JSON} bytes, found {size}")
        return parse_json(path.read_bytes(), str(path))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None


def parse_json(text: bytes, source: str) -> dict[str, Any]:
    """Parse one JSON object without a repeated key. Raises CheckpointError naming `source`."""
    value = parse_value(text, source)
    if not isinstance(value, dict):
        raise CheckpointError(f"{source}: expected a JSON object, found {type(value).__name__}")
    return value


def parse_value(text: bytes | str, source: str) -> Any:
    """Parse JSON of any kind, its objects without repeated keys. Raises as parse_json does."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        seen = dict(pairs)
        if len(seen) < len(pairs):
            keys = [key for key, _ in pairs]
            twice = next(key for key in keys if keys.count(key) > 1)
            raise CheckpointError(f"{source}: the key {twice!r} stands twice in one object")
        return seen

    try:
        return json.loads(text, object_pairs_hook=once)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # not UTF-8, not JSON, or nested without end
        raise CheckpointError(f"{source}: expected JSON, found something else ({error})") from None


def refuse_existing(path: Path) -> None:
    """Raise InputError if there is anything at `path`: nothing here overwrites."""
    try:
        if path.exists() or path.is_symlink():
            raise InputError(f"{path}: exists already, and is not overwritten")
    except OSError as error:  # a name that is too long, a loop of links
        raise InputError(f"{path}: cannot be written: {error.strerror}") from None


@contextmanager
def new_directory(directory: Path) -> Iterator[Path]:
    """Yield a temporary directory, renamed to this one if the block ends well, else removed.

    Raises InputError if there is anything at `directory` but an empty directory, and for whatever
    the system refuses within the block: a full disk, for example.
    """
    if not _is_empty(directory):
        refuse_existing(directory)
    with _removed_on_failure(directory) as temporary:
        temporary.mkdir()
        yield temporary
        if _is_empty(directory):
            directory.rmdir()
        refuse_existing(directory)
        temporary.rename(directory)


def _is_empty(directory: Path) -> bool:
    """Whether there is an empty directory, not a link to one, which no rename replaces."""
    try:
        return not directory.is_symlink() and directory.is_dir() and not any(directory.iterdir())
    except OSError:
        return False


@contextmanager
def new_file(path: Path) -> Iterator[Path]:
    """Yield a temporary name beside `path`, renamed to it if the block ends well, else removed.

    Raises InputError as new_directory does.
    """
    refuse_existing(path)
    with _removed_on_failure(path) as temporary:
        yield temporary
        refuse_existing(path)
        temporary.rename(path)


@contextmanager
def _removed_on_failure(path: Path) -> Iterator[Path]:
    """Yield a name beside `path` that nobody else has; what bears it at the end is removed.

    Directories above that do not exist are made, and removed as well if nothing came into them.
    """
    if path.name in ("", ".."):
        raise InputError(f"{path}: expected a name for what is to be made, found none")
    # Systems take names of 255 bytes, and a character has up to four.
    temporary = path.with_name(f"{path.name[:50]}.{secrets.token_hex(8)}.partial")
    absent = [parent for parent in path.parents if not parent.exists()]
    for above in path.parents[len(absent) :][:1]:
        if not above.is_dir():
            raise InputError(f"{path}: cannot be written: {above} is no directory")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
    except OSError as error:
        raise InputError(f"{path}: cannot be written: {error.strerror or error}") from None
    except InputError as error:  # of what was written inside: told by the name that was asked for
        raise type(error)(str(error).replace(str(temporary), str(path))) from None
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary, ignore_errors=True)
        with suppress(OSError):
            temporary.unlink(missing_ok=True)
        for parent in absent:
            with suppress(OSError):  # not empty
                parent.rmdir()

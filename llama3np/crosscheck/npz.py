"""NumPy's .npz files of arrays: read without unpickling anything, written one array at a time.

Format: a zip archive of .npy members, numpy/lib/format.py.
"""

from __future__ import annotations

import math
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

import numpy as np
from numpy.lib import format as npy

from llama3np.crosscheck.stored import FLOATS, Entry
from llama3np.errors import CheckpointError
from llama3np.load import zipped

NPY = ".npy"
_BF16 = np.dtype("V2")  # as which NumPy writes a bfloat16 array
# What zipfile, zlib and NumPy raise for bytes that are not right.
_DAMAGE = (
    *(zipfile.BadZipFile, zlib.error, EOFError, OSError, struct.error, MemoryError),
    *(NotImplementedError, RuntimeError),  # another way to compress; encryption
    *(ValueError, SyntaxError, TypeError, KeyError, tokenize.TokenError),  # of a header
)


def read(path: Path) -> dict[str, Entry]:
    """Name -> array; its header has been read, its numbers are when it is touched.

    Raises CheckpointError, here or when an array is touched, for a damaged archive, for a member
    that is no array, and for an array of Python objects, which only unpickling would make.
    """
    with _damage(path, "expected a zip archive of .npy members"):
        archive = zipfile.ZipFile(path)  # open as long as there is an entry of it
    found: dict[str, Entry] = {}
    for info in archive.infolist():
        if (name := info.filename.removesuffix(NPY)) in found:
            raise CheckpointError(f"{path}: the member {info.filename[:200]!r} is there twice")
        found[name] = _entry(archive, info, path)
    return found


@contextmanager
def _damage(path: Path, what: str) -> Iterator[None]:
    try:
        yield
    except CheckpointError:
        raise
    except _DAMAGE as error:
        said = " ".join(str(error).split())[:200] or type(error).__name__
        raise CheckpointError(f"{path}: {what}: {said}") from None


def _entry(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> Entry:
    """A member whose header says what its size says too."""
    what = f"the member {info.filename[:200]!r}"
    if not info.filename.endswith(NPY):
        raise CheckpointError(f"{path}: {what}: expected an array (.npy), found something else")
    with _damage(path, what), archive.open(info) as member:
        shape, dtype = _header(member)
        found, expected = info.file_size - member.tell(), math.prod(shape) * dtype.itemsize
    if dtype.hasobject:
        raise CheckpointError(f"{path}: {what}: holds Python objects, which are not unpickled")
    if found != expected:
        raise CheckpointError(
            f"{path}: {what}: expected {expected} bytes of numbers, found {found}"
        )
    return Entry(_meant(dtype), lambda: _array(archive, info, path))


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype]:
    version = npy.read_magic(member)
    if version not in ((1, 0), (2, 0)):  # 3.0 is for arrays of records
        raise ValueError(f"version {version} of .npy")
    read = npy.read_array_header_1_0 if version == (1, 0) else npy.read_array_header_2_0
    shape, _, dtype = read(member)
    return shape, dtype


def _meant(dtype: np.dtype) -> np.dtype:
    return FLOATS["bf16"] if dtype == _BF16 else dtype.newbyteorder("<")


def _array(archive: zipfile.ZipFile, info: zipfile.ZipInfo, path: Path) -> np.ndarray:
    with _damage(path, f"the member {info.filename[:200]!r}"), archive.open(info) as member:
        array = npy.read_array(member, allow_pickle=False)
        if array.dtype == _BF16:
            return array.view(FLOATS["bf16"])
        return array.astype(_meant(array.dtype), copy=False)


def write(file: BinaryIO, arrays: Iterable[tuple[str, np.ndarray]]) -> None:
    """Write named arrays as stored members, each aligned, so that a reader may map them."""
    with zipfile.ZipFile(file, "w") as archive:
        for name, array in arrays:
            room = array.nbytes + 1024  # and the header
            with zipped.new_member(archive, file, name + NPY, room) as member:
                npy.write_array(member, array, allow_pickle=False)

"""Safetensors files, mapped: 8 bytes of header length, a JSON header, then the tensors' bytes.

The library's own NumPy reader copies each tensor; here they stay in the file until touched.
Format: the README of the safetensors project.
"""

from __future__ import annotations

import json
import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

import numpy as np

from llama3np.errors import CheckpointError, InputError
from llama3np.load.checkpoint import DTYPES
from llama3np.load.files import MAX_JSON, map_file, new_file, parse_json, view
from llama3np.load.lazy import write_tensor

SUPPORTED = {name.upper(): dtype for name, dtype in DTYPES.items()}


class _Entry(NamedTuple):
    """A tensor's place: its bytes are data[start:stop], counted from the end of the header."""

    dtype: np.dtype
    shape: tuple[int, ...]
    start: int
    stop: int


def read(path: Path) -> dict[str, np.ndarray]:
    """Name -> read-only array over the mapped file, float32, float16 or bfloat16.

    Raises CheckpointError for anything the format forbids, a file cut short, and other dtypes.
    """
    return read_annotated(path, SUPPORTED)[0]


def read_annotated(
    path: Path, dtypes: Mapping[str, np.dtype]
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays as `read` has them, of these dtypes by the format's codes, and the annotations.

    The annotations are what stands under __metadata__: text by a key.
    """
    data = map_file(path)
    header, data_start = _header(data, path)
    annotations = header.pop("__metadata__", None)
    entries = {name: _entry(name, value, path, dtypes) for name, value in header.items()}
    _check_places(entries, len(data) - data_start, path)
    arrays = {
        name: view(data, entry.dtype, entry.shape, data_start + entry.start)
        for name, entry in entries.items()
    }
    return arrays, annotations if isinstance(annotations, dict) else {}


def _header(data: mmap.mmap, path: Path) -> tuple[dict[str, Any], int]:
    """The header, and where the data begin."""
    if len(data) < 8:
        raise CheckpointError(
            f"{path}: expected a safetensors header of 8 bytes, found {len(data)}"
        )
    (length,) = struct.unpack_from("<Q", data)
    if length > min(MAX_JSON, len(data) - 8):
        raise CheckpointError(
            f"{path}: the safetensors header's length is {length}, but the file has "
            f"{len(data) - 8} bytes after it and the limit is {MAX_JSON}"
        )
    header = parse_json(data[8 : 8 + length], f"{path}: safetensors header")
    return header, 8 + length


def _entry(name: str, value: Any, path: Path, dtypes: Mapping[str, np.dtype]) -> _Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(
            f"{path}: tensor {name!r}: expected dtype, shape and data_offsets, found {short(value)}"
        )
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in dtypes:
        raise CheckpointError(
            f"{path}: tensor {name!r}: expected dtype {', '.join(dtypes)}, found {short(dtype)}"
        )
    if not counts(shape) or not counts(offsets) or len(offsets) != 2:
        raise CheckpointError(
            f"{path}: tensor {name!r}: expected whole numbers as shape and two as data_offsets, "
            f"found {short(shape)} and {short(offsets)}"
        )
    entry = _Entry(dtypes[dtype], tuple(shape), *offsets)
    expected = math.prod(shape) * entry.dtype.itemsize
    if entry.stop - entry.start != expected:
        raise CheckpointError(
            f"{path}: tensor {name!r}: {dtype} of shape {short(shape)} takes {expected} bytes, "
            f"but data_offsets {short(offsets)} give {entry.stop - entry.start}"
        )
    return entry


def counts(values: Any) -> bool:
    """Whether this is a list of whole numbers >= 0, few and small enough for an array's shape."""
    if not isinstance(values, list) or len(values) > 32:
        return False
    return all(type(value) is int and 0 <= value < 2**48 for value in values)


def _check_places(entries: Mapping[str, _Entry], size: int, path: Path) -> None:
    """The tensors must fill the file after the header: no overlap, no hole, nothing cut off."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != end:
            raise CheckpointError(
                f"{path}: tensor {name!r}: expected its data at byte {end}, where the tensor "
                f"before it ends, found data_offsets [{entry.start}, {entry.stop}]"
            )
        end = entry.stop
    if end != size:
        raise CheckpointError(
            f"{path}: expected {end} bytes after the header, found {size} (is the file complete?)"
        )


def write(path: Path, tensors: Mapping[str, Any]) -> None:
    """Write float32, float16 or bfloat16 tensors to a new file, one chunk in memory at a time.

    tensors: name -> what lazy.chunks_of takes.
    They stand in the order given, but for those of more bytes a number, which come first: so each
    lies aligned, as the library lays them out. Raises InputError for other dtypes, and if there is
    something at `path`.
    """
    ordered = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
    annotations = {"format": "pt"}  # transformers asks for it
    with new_file(path) as temporary, temporary.open("wb") as file:
        file.write(encoded_header(ordered, path, annotations, SUPPORTED))
        for name, w in ordered.items():
            write_tensor(file, name, w)


def encoded_header(
    tensors: Mapping[str, Any],
    path: Path,
    annotations: Mapping[str, str],
    dtypes: Mapping[str, np.dtype],
) -> bytes:
    """The length and the header; spaces fill it up so that the data begin at a multiple of 8.

    tensors: name -> what has a shape, a dtype and nbytes, one after the other in the file.
    """
    code_of = {dtype: code for code, dtype in dtypes.items()}
    header: dict[str, Any] = {"__metadata__": annotations}
    end = 0
    for name, w in tensors.items():
        if w.dtype not in code_of:
            found = f"expected dtype {', '.join(dtypes)}, found {w.dtype}"
            raise InputError(f"{path}: tensor {name!r}: {found}")
        start, end = end, end + w.nbytes
        header[name] = {
            "dtype": code_of[w.dtype],
            "shape": list(w.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text

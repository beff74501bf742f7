"""Traces onto the disk: filled in place while the model runs, whole at the end or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from llama3np.crosscheck import npz
from llama3np.crosscheck.files import FLOAT_CODES, KEY, MANIFEST, META
from llama3np.crosscheck.stored import FLOATS, Arrays, Entry, Spec
from llama3np.crosscheck.taps import FORMAT
from llama3np.errors import InputError
from llama3np.load import safetensors
from llama3np.load.files import new_directory, new_file, refuse_existing

Writing = AbstractContextManager[Mapping[str, np.ndarray]]


def new_trace(path: str | Path, specs: Mapping[str, Spec], meta: Mapping[str, Any]) -> Writing:
    """A context that yields name -> writable array, of those shapes and dtypes, on the disk.

    Filled in while the block runs, in any order, they appear whole under `path` if it ends well,
    and not at all if it does not. They are mapped anew whenever they are asked for.
    specs: in execution order, float32 or float64.
    Raises InputError as `form` does, and if the disk has not the room.
    """
    return form(path)(Path(path), specs, json.dumps(dict(meta)))


def form(path: str | Path) -> Callable[..., Writing]:
    """What writes the form that the name asks for: .safetensors, .npz, or no ending: a directory.

    Raises InputError for another ending, and if there is something at `path` already.
    """
    path = Path(path)
    writers = {".safetensors": _new_safetensors, ".npz": _new_npz, "": _new_directory}
    if (suffix := path.suffix.lower()) not in writers:
        raise InputError(
            f"{path}: expected a name that ends in .safetensors or .npz, or in neither for a "
            f"directory, found {path.suffix}"
        )
    if suffix or not path.is_dir() or any(path.iterdir()):
        refuse_existing(path)
    return writers[suffix]


def room_for(path: str | Path, specs: Mapping[str, Spec]) -> int:
    """The bytes of a trace's numbers. Raises InputError if the disk has not the room for them.

    An .npz file takes it twice while it is written: zip archives grow at their end alone, but a
    trace with decode steps grows within every array.
    """
    path, size = Path(path), sum(spec.nbytes for spec in specs.values())
    needed = size * (2 if path.suffix.lower() == ".npz" else 1)
    place = next(parent for parent in path.absolute().parents if parent.is_dir())
    if (free := shutil.disk_usage(place).free) < needed:
        raise InputError(
            f"{path}: needs {needed:,} bytes, but {place} has {free:,} free (--layers, --positions "
            "and --taps bound the size)"
        )
    return size


def _places(file: Any, specs: Mapping[str, Spec], start: int, where: Any = None) -> Arrays:
    """Room for the arrays in a file, from byte `start` on, one after the other.

    where: what to map, `file` itself if None. Each is mapped when it is asked for, and no longer,
    so that what was written does not stay in memory. The room is reserved first: a map of a file
    with holes kills the process where the disk is full.
    """
    offsets = np.cumsum([start, *(spec.nbytes for spec in specs.values())]).tolist()
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, offsets[-1])
    file.truncate(offsets[-1])
    where = file if where is None else where
    return Arrays(
        {
            name: Entry(spec.dtype, partial(np.memmap, where, spec.dtype, "r+", offset, spec.shape))
            for (name, spec), offset in zip(specs.items(), offsets[:-1], strict=True)
        }
    )


@contextmanager
def _new_safetensors(path: Path, specs: Mapping[str, Spec], meta: str) -> Iterator[Any]:
    header = safetensors.encoded_header(specs, path, {KEY: meta}, FLOAT_CODES)
    with new_file(path) as temporary, temporary.open("w+b") as file:
        file.write(header)
        file.flush()
        yield _places(file, specs, len(header))


@contextmanager
def _new_npz(path: Path, specs: Mapping[str, Spec], meta: str) -> Iterator[Any]:
    with new_file(path) as temporary, tempfile.TemporaryFile(dir=path.parent) as raw:
        arrays = _places(raw, specs, 0)
        yield arrays
        metadata = META, np.frombuffer(meta.encode(), np.uint8)
        with temporary.open("wb") as file:
            npz.write(file, chain(arrays.items(), [metadata]))


@contextmanager
def _new_directory(path: Path, specs: Mapping[str, Spec], meta: str) -> Iterator[Any]:
    code = {dtype: name for name, dtype in FLOATS.items()}
    file_of = {name: f"{name}.{code[spec.dtype]}" for name, spec in specs.items()}
    items = [
        {"name": name, "file": file_of[name], "shape": spec.shape, "dtype": code[spec.dtype]}
        for name, spec in specs.items()
    ]
    with new_directory(path) as temporary:
        found: dict[str, Entry] = {}
        for name, spec in specs.items():
            with (own := temporary / file_of[name]).open("w+b") as file:
                found |= _places(file, {name: spec}, 0, own).entries
        yield Arrays(found)
        lines = ",\n".join(map(json.dumps, items))  # one a line: some readers have no JSON
        text = f'{{"format": "{FORMAT}", "metadata": {meta},\n"arrays": [\n{lines}\n]}}\n'
        (temporary / MANIFEST).write_text(text, encoding="utf-8")

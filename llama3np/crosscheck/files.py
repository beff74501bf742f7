"""Trace files: .safetensors, .npz, or a directory of raw numbers with a manifest.

| form         | numbers                                         | metadata, one JSON object       |
|--------------|-------------------------------------------------|---------------------------------|
| .safetensors | the taps in execution order                     | __metadata__, under "llama3np"  |
| .npz         | one member a tap, not compressed                | the uint8 array __metadata__    |
| a directory  | raw little-endian .f32 files (.f64 for float64) | manifest.json, under "metadata" |

output.py writes them. Other people's files are read too: any names, any float dtype, with or
without metadata.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np

from llama3np.crosscheck import npz
from llama3np.crosscheck.stored import FLOATS, Arrays, Entry, Spec, entries
from llama3np.crosscheck.taps import Trace
from llama3np.errors import CheckpointError
from llama3np.load import safetensors, zipped
from llama3np.load.files import map_file, parse_json, read_json, view

MANIFEST = "manifest.json"
META = "__metadata__"  # the array of an .npz file
_ERRORS = ("max_abs", "nmse")  # of each profile and tap, in budgets
KEY = "llama3np"  # among the annotations of a .safetensors file

FLOAT_CODES = {name.upper(): dtype for name, dtype in FLOATS.items()}
# Whole numbers may stand beside taps: ids and positions are taken, others left out.
_CODES = {f"{kind.upper()}{8 * n}": np.dtype(f"<{kind}{n}") for kind in "iu" for n in (1, 2, 4, 8)}
_CODES |= {"BOOL": np.dtype(bool), **FLOAT_CODES}
_MEANT = {"ids": "ids", "input_ids": "ids", "positions": "positions", "position_ids": "positions"}

# What compare and diagnose build on, where it is there; null is as good as absent.
_EXPECTED = {
    **dict.fromkeys(("ids", "positions"), "a list of whole numbers"),
    **dict.fromkeys(("config", "files", "budgets"), "an object"),
    **dict.fromkeys(("profile", "dtype"), "text"),
    "prefill": "a whole number from 1 on",
}
_RIGHT: dict[str, Callable[[Any], bool]] = {
    "a list of whole numbers": lambda value: isinstance(value, list) and all(map(_whole, value)),
    "an object": lambda value: isinstance(value, dict),
    "text": lambda value: isinstance(value, str),
    "a whole number from 1 on": lambda value: _whole(value) and value > 0,
}

# ---- reading -------------------------------------------------------------------------------------


def read(path: str | Path) -> Trace:
    """Open a trace of any of the three forms, told by its content; numbers are read when touched.

    Arrays keep their names, shapes and float dtypes (bfloat16 as NumPy writes it, V2, is bfloat16
    again). Whole numbers named ids, input_ids, positions or position_ids stand in for metadata
    that is absent, or null; the names of all others come into meta["left_out"].
    Raises InputError, in one sentence with the file's name, for what is none of the forms, damaged,
    cut short, or would have to be unpickled; some damage of an .npz file shows only when touched.
    """
    path = Path(path)
    found, meta = opened(path)
    floats = {name: entry for name, entry in found.items() if entry.dtype in FLOATS.values()}
    others = [name for name in found if name not in floats]
    meta = {key: value for key, value in meta.items() if value is not None}
    for name in others:
        if name in _MEANT and found[name].dtype.kind in "iu":
            meta.setdefault(_MEANT[name], found[name].read().reshape(-1).tolist())
    if left_out := [name for name in others if name not in _MEANT]:
        meta["left_out"] = left_out
    _check(meta, path)
    return Trace(Arrays(floats), meta)


def opened(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    """Every array, of any dtype, and the metadata as they stand there; InputError as of `read`."""
    if path.is_dir():
        return _read_directory(path)
    data = map_file(path)
    if data[:4] == zipped.MAGIC:
        return _read_npz(path)
    if data[8:9] == b"{":
        return _read_safetensors(path)
    raise CheckpointError(
        f"{path}: expected a .safetensors or .npz file, or a directory with {MANIFEST}, found a "
        f"file that begins with {data[:8]!r}"
    )


def _check(meta: dict[str, Any], path: Path) -> None:
    for key in sorted(_EXPECTED.keys() & meta.keys()):
        if not _RIGHT[expected := _EXPECTED[key]](meta[key]):
            found = f"expected {expected}, found {short(meta[key])}"
            raise CheckpointError(f"{path}: metadata: {key}: {found}")
    _check_budgets(meta.get("budgets", {}), path)


def _check_budgets(budgets: dict[str, Any], path: Path) -> None:
    for profile, taps in budgets.items():
        for tap, errors in taps.items() if isinstance(taps, dict) else ((short(taps), None),):
            values = [errors.get(key) for key in _ERRORS] if isinstance(errors, dict) else [None]
            if not all(isinstance(value, (int, float)) for value in values):
                found = f"expected {' and '.join(_ERRORS)} of {profile}, found {short(errors)}"
                raise CheckpointError(f"{path}: metadata: budgets: {tap}: {found}")


def _whole(value: Any) -> bool:
    return type(value) is int  # which excludes true and false


def _read_safetensors(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    arrays, annotations = safetensors.read_annotated(path, _CODES)
    where, text = f"{path}: metadata ({KEY})", annotations.get(KEY, "{}")
    if not isinstance(text, str):
        raise CheckpointError(f"{where}: expected text, found {type(text).__name__}")
    return entries(arrays), parse_json(text.encode("utf-8", "surrogatepass"), where)


def _read_npz(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    found = npz.read(path)
    text = found.pop(META).read().tobytes() if META in found else b"{}"
    return found, parse_json(text, f"{path}: metadata ({META})")


def _read_directory(path: Path) -> tuple[dict[str, Entry], dict[str, Any]]:
    if not (path / MANIFEST).exists():
        raise CheckpointError(f"{path}: expected a directory with {MANIFEST}, found none in it")
    manifest = read_json(path / MANIFEST)
    listed, meta = manifest.get("arrays"), manifest.get("metadata", {})
    if not isinstance(listed, list) or not isinstance(meta, dict):
        raise CheckpointError(
            f"{path / MANIFEST}: expected a list of arrays, and metadata to be an object, found "
            f"{short(listed)} and {short(meta)}"
        )
    arrays: dict[str, np.ndarray] = {}
    for item in listed:
        name, array = _raw(path, item)
        if name in arrays:
            raise CheckpointError(f"{path / MANIFEST}: the array {name!r} is there twice")
        arrays[name] = array
    return entries(arrays), meta


def _raw(directory: Path, item: Any) -> tuple[str, np.ndarray]:
    """The array of one item of a manifest, over its mapped file."""
    manifest, item = directory / MANIFEST, item if isinstance(item, dict) else {"name": item}
    name, file, shape, dtype = map(item.get, ("name", "file", "shape", "dtype"))
    texts = isinstance(name, str) and isinstance(file, str) and isinstance(dtype, str)
    if not (texts and safetensors.counts(shape) and dtype in FLOATS):
        raise CheckpointError(
            f"{manifest}: the array {short(name)}: expected name, file, shape, and a dtype of "
            f"{', '.join(FLOATS)}, found {short(item)}"
        )
    if Path(file).name != file:
        raise CheckpointError(
            f"{manifest}: the array {name!r}: expected a file beside it, found {file!r}"
        )
    expected = Spec(tuple(shape), FLOATS[dtype])
    data = map_file(directory / file)
    if len(data) != expected.nbytes:
        raise CheckpointError(
            f"{directory / file}: {dtype} of shape {tuple(shape)} takes {expected.nbytes} bytes, "
            f"found {len(data)}"
        )
    return name, view(data, expected.dtype, expected.shape, 0)

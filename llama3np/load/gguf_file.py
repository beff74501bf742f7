"""The GGUF file format, versions 2 and 3: read over a map, and written.

Header, key/value pairs, tensor infos, then the tensors, each at an aligned offset. Every length
in the file is checked before it is used. Format: docs/gguf.md of ggml.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from llama3np.errors import CheckpointError, InputError
from llama3np.kernels.ggml import FORMATS, NAMES, OTHER_TYPES
from llama3np.load.files import map_file, new_file, view
from llama3np.load.lazy import Lazy, Progress, Rows, told, write_tensor

MAGIC = b"GGUF"
DEFAULT_ALIGNMENT = 32
MAX_DIMS = 4
# As Python objects, metadata take about ten times their bytes, so there is an end to them. The
# largest vocabularies have half a million merges; a model of 126 layers has 1,137 tensors.
MAX_VALUES = 1 << 21
MAX_ENTRIES = 1 << 16

# The number of a value's type -> its struct code. 8 is a string and 9 an array.
_CODES = "BbHhIif?saQqd"
_STRING, _ARRAY = _CODES.index("s"), _CODES.index("a")
_SCALARS = {
    number: struct.Struct("<" + code)
    for number, code in enumerate(_CODES)
    if number not in (_STRING, _ARRAY)
}
_U32, _U64 = struct.Struct("<I"), struct.Struct("<Q")
_INT_RANGES = {"I": (0, 2**32 - 1), "i": (-(2**31), 2**31 - 1)}
_INT_RANGES |= {"Q": (0, 2**64 - 1), "q": (-(2**63), 2**63 - 1)}


class TensorInfo(NamedTuple):
    """One tensor's place in the file."""

    shape: tuple[int, ...]  # in NumPy's order, the reverse of the file's
    type: str  # "Q4_1", a key of ggml.FORMATS
    offset: int  # from the beginning of the file
    nbytes: int


class GGUF(NamedTuple):
    """A whole file: plain Python values, and the tensors' bytes under the map."""

    version: int
    metadata: dict[str, Any]
    tensors: dict[str, TensorInfo]
    data: mmap.mmap

    def stored(self, name: str) -> np.ndarray:
        """A tensor's bytes as they are, (rows..., bytes of a row) uint8; no copy."""
        info = self.tensors[name]
        rows = info.shape[:-1]
        return view(self.data, np.uint8, (*rows, info.nbytes // math.prod(rows)), info.offset)


class Raw(NamedTuple):
    """A tensor to be written whose bytes are already in a ggml type's format."""

    type: str
    shape: tuple[int, ...]
    blocks: np.ndarray | Lazy | Rows  # of any dtype and shape that has those bytes


def _shortest(value: float) -> float:
    """The shortest decimal whose float32 is that of `value`."""
    with np.errstate(over="ignore"):
        return float(str(np.float32(value)))


# ---- the cursor ------------------------------------------------------------------------------


class _Cursor:
    """A place in bytes that are not trusted; reading past the end is a CheckpointError."""

    def __init__(self, data: mmap.mmap, source: Path):
        self.data, self.source, self.at = data, source, 0
        self.values = 0  # read so far

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.source}: {what}")

    def need(self, nbytes: int, what: str) -> None:
        left = len(self.data) - self.at
        if nbytes > left:
            raise self.fail(f"{what}: expected {nbytes} more bytes, found {left} (cut short?)")

    def count(self, values: int, what: str) -> None:
        self.values += values
        if self.values > MAX_VALUES:
            raise self.fail(f"{what}: expected at most {MAX_VALUES} values in all, found more")

    def entries(self, count: int, least: int, what: str) -> None:
        """Check that there may be `count` entries of at least so many bytes."""
        self.need(count * least, f"{count} {what}")
        if count > MAX_ENTRIES:
            raise self.fail(f"expected at most {MAX_ENTRIES} {what}, found {count}")

    def scalar(self, code: struct.Struct, what: str) -> Any:
        self.need(code.size, what)
        (value,) = code.unpack_from(self.data, self.at)
        self.at += code.size
        return value

    def strings(self, count: int, what: str) -> list[str]:
        """`count` strings, each 8 bytes of length and UTF-8: one tight loop, for vocabularies."""
        self.need(8 * count, what)
        self.count(count, what)
        data, size, start, found = self.data, len(self.data), self.at, []
        length_at = _U64.unpack_from
        try:
            for _ in range(count):
                end = start + 8 + length_at(data, start)[0]
                if end > size:
                    raise self.fail(f"{what}: a string of {end - start - 8} bytes is cut short")
                found.append(str(data[start + 8 : end], "utf-8"))
                start = end
        except struct.error:
            raise self.fail(
                f"{what}: the file ends after {len(found)} of {count} strings"
            ) from None
        except UnicodeDecodeError:
            raise self.fail(f"{what}: expected UTF-8, found other bytes") from None
        self.at = start
        return found

    def string(self, what: str) -> str:
        return self.strings(1, what)[0]

    def numbers(self, code: struct.Struct, count: int, what: str) -> list[Any]:
        self.need(code.size * count, what)
        self.count(count, what)
        values = np.frombuffer(self.data, code.format, count, self.at)
        self.at += code.size * count
        if values.dtype == np.float32:
            return [float(text) for text in values.astype(str)]  # as _shortest, all at once
        return values.tolist()


# ---- reading ---------------------------------------------------------------------------------


def read(path: str | Path) -> GGUF:
    """Read a GGUF file's header over a map of it; no tensor is touched.

    A float32 number of the metadata is given as the shortest decimal that means it: 1e-05, which
    the converter was given, not 9.999999747378752e-06. Raises CheckpointError for what is not GGUF
    2 or 3, lengths and offsets that do not fit the file, and tensor types not in FORMATS.
    """
    path = Path(path)
    cursor = _Cursor(map_file(path), path)
    version = _version(cursor)
    n_tensors = cursor.scalar(_U64, "the number of tensors")
    n_pairs = cursor.scalar(_U64, "the number of metadata pairs")
    metadata = _metadata(cursor, n_pairs)
    tensors = _tensors(cursor, n_tensors, _alignment(metadata, path))
    return GGUF(version, metadata, tensors, cursor.data)


def _version(cursor: _Cursor) -> int:
    cursor.need(8, "the header")
    magic, version = struct.unpack_from("<4sI", cursor.data)
    cursor.at = 8
    if magic != MAGIC:
        raise cursor.fail(f"expected a GGUF file, found one that begins with {magic!r}")
    if version & 0xFFFF == 0 and version:
        raise cursor.fail("expected a little-endian GGUF file, found a big-endian one")
    if version not in (2, 3):
        raise cursor.fail(f"expected GGUF version 2 or 3, found {version}")
    return version


def _metadata(cursor: _Cursor, count: int) -> dict[str, Any]:
    cursor.entries(count, 13, "metadata pairs")  # key length, type, one byte of value
    metadata: dict[str, Any] = {}
    for i in range(count):
        key = cursor.string(f"metadata key {i}")
        if key in metadata:
            raise cursor.fail(f"the metadata key {key!r} stands twice")
        metadata[key] = _value(cursor, f"metadata {key!r}")
    return metadata


def _value(cursor: _Cursor, what: str) -> Any:
    kind = cursor.scalar(_U32, what)
    if kind == _STRING:
        return cursor.string(what)
    if kind == _ARRAY:
        return _array(cursor, what)
    if kind not in _SCALARS:
        raise cursor.fail(f"{what}: expected a value type from 0 to 12, found {kind}")
    value = cursor.scalar(_SCALARS[kind], what)
    return _shortest(value) if _CODES[kind] == "f" else value


def _array(cursor: _Cursor, what: str) -> list[Any]:
    kind, count = cursor.scalar(_U32, what), cursor.scalar(_U64, what)
    if kind == _STRING:
        return cursor.strings(count, what)
    if kind not in _SCALARS:
        raise cursor.fail(f"{what}: expected an array of numbers or strings, found type {kind}")
    return cursor.numbers(_SCALARS[kind], count, what)


def _alignment(metadata: Mapping[str, Any], path: Path) -> int:
    alignment = metadata.get("general.alignment", DEFAULT_ALIGNMENT)
    if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment.bit_count() > 1:
        raise CheckpointError(
            f"{path}: general.alignment: expected a power of 2, found {short(alignment)}"
        )
    return alignment


def _tensors(cursor: _Cursor, count: int, alignment: int) -> dict[str, TensorInfo]:
    cursor.entries(count, 32, "tensor infos")  # name length, dims, one dim, type, offset
    relative: dict[str, TensorInfo] = {}
    for i in range(count):
        name = cursor.string(f"the name of tensor {i}")
        if name in relative:
            raise cursor.fail(f"the tensor {name!r} stands twice")
        relative[name] = _tensor_info(cursor, f"tensor {name!r}", alignment)
    data_start = -(-cursor.at // alignment) * alignment
    tensors = {n: t._replace(offset=data_start + t.offset) for n, t in relative.items()}
    _check_places(cursor, tensors)
    return tensors


def _tensor_info(cursor: _Cursor, what: str, alignment: int) -> TensorInfo:
    n_dims = cursor.scalar(_U32, what)
    if not 1 <= n_dims <= MAX_DIMS:
        raise cursor.fail(f"{what}: expected 1 to {MAX_DIMS} dimensions, found {n_dims}")
    dims = [cursor.scalar(_U64, what) for _ in range(n_dims)]
    number, offset = cursor.scalar(_U32, what), cursor.scalar(_U64, what)
    if number not in NAMES:
        other = OTHER_TYPES.get(number, f"number {number}")
        raise cursor.fail(f"{what}: expected a type of {', '.join(FORMATS)}, found {other}")
    form = FORMATS[NAMES[number]]
    if 0 in dims or dims[0] % form.weights:
        raise cursor.fail(
            f"{what}: expected dimensions >= 1, the first a multiple of {form.weights} for "
            f"{NAMES[number]}, found {dims}"
        )
    if offset % alignment:
        raise cursor.fail(f"{what}: expected an offset aligned to {alignment}, found {offset}")
    nbytes = math.prod(dims) // form.weights * form.nbytes
    return TensorInfo(tuple(reversed(dims)), NAMES[number], offset, nbytes)


def _check_places(cursor: _Cursor, tensors: Mapping[str, TensorInfo]) -> None:
    """No two tensors may overlap, and none may end beyond the file."""
    end = 0
    for name, info in sorted(tensors.items(), key=lambda item: item[1].offset):
        if info.offset < end:
            raise cursor.fail(f"tensor {name!r}: its data begin inside the tensor before it")
        end = info.offset + info.nbytes
        if end > len(cursor.data):
            raise cursor.fail(
                f"tensor {name!r}: its data end at byte {end}, but the file has "
                f"{len(cursor.data)} (is it complete?)"
            )


# ---- writing ---------------------------------------------------------------------------------


def write(
    path: str | Path,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Any],
    version: int = 3,
    progress: Progress | None = None,
) -> None:
    """Write a GGUF file of float32, float16 or bfloat16 tensors and ready-made blocks.

    tensors: name -> Raw, or what lazy.chunks_of takes; one chunk is in memory at a time, and
    progress(done, total, name) is told of each.
    Metadata values are bool, int, float, str, or lists of one of these. A number takes the
    smallest of uint32, int32, uint64, int64 that holds it (in a list: of int32, int64), and
    float32 if that keeps its decimal, else float64; an empty list is one of strings. Raises
    InputError for anything else, and if there is something at `path`.
    """
    path = Path(path)
    if version not in (2, 3):
        raise InputError(f"{path}: expected GGUF version 2 or 3, found {version}")
    alignment = _alignment(metadata, path)
    raws = {name: w if isinstance(w, Raw) else _raw(name, w) for name, w in tensors.items()}
    pairs = [_string(key) + _encoded(key, value) for key, value in metadata.items()]
    infos, offset = [], 0
    for name, raw in raws.items():
        infos.append(_encoded_info(name, raw, offset))
        offset += -(-raw.blocks.nbytes // alignment) * alignment
    start = struct.pack("<4sIQQ", MAGIC, version, len(raws), len(pairs))
    (blocks,) = told([{name: raw.blocks for name, raw in raws.items()}], progress)
    with new_file(path) as temporary, temporary.open("wb") as file:
        file.write(b"".join([start, *pairs, *infos]))
        for name, w in blocks.items():
            _pad(file, alignment)
            write_tensor(file, name, w)
        _pad(file, alignment)


def _pad(file: BinaryIO, alignment: int) -> None:
    file.write(bytes(-file.tell() % alignment))


def _raw(name: str, w: Any) -> Raw:
    for type_name, form in FORMATS.items():
        if form.dtype is not None and form.dtype == w.dtype:
            return Raw(type_name, w.shape, w)
    raise InputError(f"tensor {name!r}: expected float32, float16 or bfloat16, found {w.dtype}")


def _encoded_info(name: str, raw: Raw, offset: int) -> bytes:
    form = FORMATS[raw.type]
    expected = math.prod(raw.shape) // form.weights * form.nbytes
    if raw.shape[-1] % form.weights or raw.blocks.nbytes != expected:
        raise InputError(
            f"tensor {name!r}: {raw.type} of shape {raw.shape} takes {expected} bytes in whole "
            f"blocks of {form.weights} weights, found {raw.blocks.nbytes}"
        )
    dims = struct.pack(f"<I{len(raw.shape)}Q", len(raw.shape), *reversed(raw.shape))
    return _string(name) + dims + struct.pack("<IQ", form.number, offset)


def _string(text: str) -> bytes:
    utf8 = text.encode("utf-8")
    return _U64.pack(len(utf8)) + utf8


def _encoded(key: str, value: Any) -> bytes:
    """A value with the number of its type before it."""
    if not isinstance(value, list):
        code = _code(key, [value], "IiQq")
        return _U32.pack(_CODES.index(code)) + _packed(code, [value])
    code = _code(key, value, "iq")
    head = struct.pack("<IIQ", _ARRAY, _CODES.index(code), len(value))
    return head + _packed(code, value)


def _packed(code: str, values: list[Any]) -> bytes:
    if code == "s":
        return b"".join(map(_string, values))
    return struct.pack(f"<{len(values)}{code}", *values)


def _code(key: str, values: list[Any], int_codes: str) -> str:
    """The struct code, or s, of the first type that holds all the values without loss."""
    if not values:  # only strings are looked for: llama.cpp refuses no merges of another type
        return "s"
    types = {type(value) for value in values}
    if types <= {int}:
        for code in int_codes:
            low, high = _INT_RANGES[code]
            if all(low <= value <= high for value in values):
                return code
    if types == {float}:
        return "f" if all(_shortest(value) == value for value in values) else "d"
    if types in ({bool}, {str}):
        return "?" if types == {bool} else "s"
    raise InputError(f"metadata {key!r}: expected bool, int, float, str or a list of one of them")

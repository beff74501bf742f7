"""PyTorch's .pth files without PyTorch: a zip archive with a pickle and the storages it names.

    root/data.pkl    the table: name -> view (offset, shape, strides) of a storage
    root/data/KEY    the numbers of one storage, stored as they are
    root/byteorder   "little"; absent in older files

Tensors are views of the mapped file, whatever their strides. Source: torch/serialization.py.
"""

from __future__ import annotations

import math
import mmap
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama3np.errors import CheckpointError, InputError
from llama3np.load import pickled, zipped
from llama3np.load.checkpoint import DTYPES
from llama3np.load.files import map_file, new_file
from llama3np.load.lazy import write_tensor
from llama3np.load.pickled import Tensor
from llama3np.load.zipped import Member

_KINDS = {"f32": "FloatStorage", "f16": "HalfStorage", "bf16": "BFloat16Storage"}
_DTYPE_OF = {kind: DTYPES[name] for name, kind in _KINDS.items()}
_KIND_OF = {dtype: kind for kind, dtype in _DTYPE_OF.items()}

_PICKLE = "/data.pkl"
_MAX_DIMS = 8
_LARGEST = 1 << 48  # no offset, size or stride of an array is larger

# ---- reading ---------------------------------------------------------------------------------


def read(path: Path) -> dict[str, np.ndarray]:
    """Name -> read-only array over the mapped file, float32, float16 or bfloat16; nothing copied.

    Raises CheckpointError for a file that is cut short or damaged, for a pickle that asks for
    anything but tensors, for views that leave or repeat their storage, and for other dtypes.
    """
    file = _open(path)
    start, stop = file.members[file.root + _PICKLE]
    table = pickled.load(file.data[start:stop], f"{path}: data.pkl")
    if type(table) is not dict:
        raise CheckpointError(f"{path}: expected a table of tensors, found {type(table).__name__}")
    return {name: _array(file, name, value) for name, value in table.items()}


class _Opened(NamedTuple):
    path: Path
    data: mmap.mmap
    members: dict[str, Member]
    root: str  # the folder that all members are in


def _open(path: Path) -> _Opened:
    data = map_file(path)
    if data[:4] != zipped.MAGIC:
        what = f"one that begins with {data[:8]!r}"
        if data[:1] == b"\x80":
            what = "a bare pickle, as PyTorch wrote before 1.6 (load and save it there)"
        raise CheckpointError(f"{path}: expected a zip archive of PyTorch's, found {what}")
    members = zipped.members(data, path)
    roots = [name.removesuffix(_PICKLE) for name in members if name.endswith(_PICKLE)]
    if len(roots) != 1 or "/" in roots[0]:
        raise CheckpointError(f"{path}: expected one data.pkl in a folder, found {len(roots)}")
    _check_byte_order(data, members.get(f"{roots[0]}/byteorder"), path)
    return _Opened(path, data, members, roots[0])


def _check_byte_order(data: mmap.mmap, member: Member | None, path: Path) -> None:
    order = data[member.start : min(member.stop, member.start + 20)] if member else b"little"
    if order != b"little":
        raise CheckpointError(f"{path}: byteorder: expected b'little', found {order!r}")


def _array(file: _Opened, name: str, value: Any) -> np.ndarray:
    """The view of the map that a Tensor describes, once every number of it has been checked."""
    where = f"{file.path}: tensor {name[:200]!r}"
    if type(value) is not Tensor:
        raise CheckpointError(f"{where}: expected a tensor, found {type(value).__name__}")
    storage = value.storage
    if storage.kind not in _DTYPE_OF:
        known = ", ".join(_DTYPE_OF)
        raise CheckpointError(f"{where}: expected {known}, found {storage.kind}")
    dtype = _DTYPE_OF[storage.kind]
    member = file.members.get(f"{file.root}/data/{storage.key}")
    if member is None:
        raise CheckpointError(f"{where}: its storage {storage.key!r} is not in the file")
    _check_view(value, (member.stop - member.start) // dtype.itemsize, where)
    if 0 in value.shape:
        return np.empty(value.shape, dtype)
    start = member.start + value.offset * dtype.itemsize
    strides = [stride * dtype.itemsize for stride in value.strides]
    return np.ndarray(value.shape, dtype, file.data, start, strides)


def _check_view(tensor: Tensor, available: int, where: str) -> None:
    """Offset, shape and strides must be counts, and stay inside the storage, using no number twice.

    A shape of more numbers than the storage has would be as cheap to write as it is costly to copy.
    """
    shape, strides, size = tensor.shape, tensor.strides, tensor.storage.size
    if not (_counts(shape) and _counts(strides) and _counts((tensor.offset, size))):
        raise CheckpointError(f"{where}: expected an offset, a shape and strides of whole numbers")
    if len(shape) != len(strides):
        raise CheckpointError(f"{where}: {len(shape)} dimensions, but {len(strides)} strides")
    if size > available:
        raise CheckpointError(f"{where}: its storage has {size} numbers, the file {available}")
    reach = sum((n - 1) * stride for n, stride in zip(shape, strides, strict=True))
    if math.prod(shape) > size or (0 not in shape and tensor.offset + reach >= size):
        raise CheckpointError(
            f"{where}: shape {shape} with strides {strides} at {tensor.offset} does not fit a "
            f"storage of {size} numbers"
        )


def _counts(values: Any) -> bool:
    if type(values) is not tuple or len(values) > _MAX_DIMS:
        return False
    return all(type(value) is int and 0 <= value < _LARGEST for value in values)


# ---- writing ---------------------------------------------------------------------------------


def save_pth(path: str | Path, tensors: Mapping[str, Any]) -> None:
    """Write a file that torch.load opens, float32, float16 and bfloat16 tensors as they are.

    tensors: name -> what lazy.chunks_of takes; one chunk is in memory at a time. Each has a
    storage of its own. Raises InputError for other dtypes, and if there is something at `path`.
    """
    wrong = [name for name, w in tensors.items() if w.dtype not in _KIND_OF]
    if wrong:
        found = tensors[wrong[0]].dtype
        raise InputError(
            f"{path}: tensor {wrong[0]!r}: expected {', '.join(DTYPES)}, found {found}"
        )
    small = {"data.pkl": _pickle(tensors), "byteorder": b"little", "version": b"3\n"}
    with (
        new_file(Path(path)) as temporary,
        temporary.open("wb") as file,
        zipfile.ZipFile(file, "w") as archive,
    ):
        for name, content in small.items():
            with zipped.new_member(archive, file, f"archive/{name}", len(content)) as member:
                member.write(content)
        for key, (name, w) in enumerate(tensors.items()):
            with zipped.new_member(archive, file, f"archive/data/{key}", w.nbytes) as member:
                write_tensor(member, name, w)


def _pickle(tensors: Mapping[str, Any]) -> bytes:
    """What torch.save would write for this table, without its memo."""
    items = [_text(name) + _tensor(str(key), w) for key, (name, w) in enumerate(tensors.items())]
    return b"\x80\x02}(" + b"".join(items) + b"u."


def _tensor(key: str, w: Any) -> bytes:
    """The call _rebuild_tensor_v2(storage, 0, shape, strides, False, OrderedDict())."""
    kind = f"ctorch\n{_KIND_OF[np.dtype(w.dtype)]}\n".encode()
    size = math.prod(w.shape)
    strides = [math.prod(w.shape[i + 1 :]) for i in range(len(w.shape))]
    storage = b"(" + _text("storage") + kind + _text(key) + _text("cpu") + _int(size) + b"tQ"
    no_hooks = b"ccollections\nOrderedDict\n)R"
    view = _int(0) + _tuple(w.shape) + _tuple(strides) + b"\x89" + no_hooks
    return b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + view + b"tR"


def _text(text: str) -> bytes:
    utf8 = text.encode("utf-8")
    return b"X" + len(utf8).to_bytes(4, "little") + utf8


def _int(value: int) -> bytes:
    """LONG1: the bytes of a signed number, any size."""
    size = value.bit_length() // 8 + 1
    return b"\x8a" + bytes([size]) + value.to_bytes(size, "little", signed=True)


def _tuple(values: Any) -> bytes:
    return b"(" + b"".join(map(_int, values)) + b"t"

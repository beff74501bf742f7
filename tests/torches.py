"""PyTorch's .pth files made by Python's own pickle and zip modules, from arrays and their views.

The names that PyTorch's pickles hold exist here for as long as a file is written: the modules are
stand-ins with nothing in them.
"""

import io
import pickle
import sys
import types
import zipfile
from collections import OrderedDict
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np

KINDS = {"float32": "FloatStorage", "float16": "HalfStorage", "bfloat16": "BFloat16Storage"}


class Storage(NamedTuple):
    key: str
    numbers: np.ndarray  # one dimension
    kind: str | None = None  # another than that of the numbers
    size: int | None = None


class View:
    """What torch.Tensor is to the pickle: a storage, an offset, a shape and strides."""

    def __init__(self, storage, offset, shape, strides, parameter=False, hooks=None, more=()):
        self.storage, self.parameter = storage, parameter
        self.call = (storage, offset, tuple(shape), tuple(strides), False, OrderedDict(), *more)

    def __reduce__(self):
        rebuild = sys.modules["torch._utils"]
        if self.parameter:
            inner = View.__new__(View)
            inner.parameter, inner.call = False, self.call
            return rebuild._rebuild_parameter, (inner, True, OrderedDict())
        return rebuild._rebuild_tensor_v2, self.call


def plain(tensors):
    """Each array as a whole view of a storage of its own."""
    views = {}
    for key, (name, w) in enumerate(tensors.items()):
        strides = [int(np.prod(w.shape[i + 1 :])) for i in range(w.ndim)]
        views[name] = View(Storage(str(key), w.reshape(-1)), 0, w.shape, strides)
    return views


@contextmanager
def torch_stand_in():
    torch, utils = types.ModuleType("torch"), types.ModuleType("torch._utils")
    kinds = (*KINDS.values(), "DoubleStorage", "ByteStorage")
    for kind in kinds:
        setattr(torch, kind, type(kind, (), {"__module__": "torch"}))
    for name in ("_rebuild_tensor_v2", "_rebuild_parameter"):
        function = types.FunctionType((lambda: None).__code__, {}, name)
        function.__module__, function.__qualname__ = "torch._utils", name
        setattr(utils, name, function)
    before = {name: sys.modules.get(name) for name in ("torch", "torch._utils")}
    sys.modules |= {"torch": torch, "torch._utils": utils}
    try:
        yield torch
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


def pickled(table: Any, protocol=2):
    """The bytes of data.pkl, and the storages that it names."""
    storages, file = {}, io.BytesIO()
    with torch_stand_in() as torch:

        class Pickler(pickle.Pickler):
            def persistent_id(self, value):
                if not isinstance(value, Storage):
                    return None
                storages[value.key] = value.numbers
                kind = value.kind or KINDS[str(value.numbers.dtype)]
                size = len(value.numbers) if value.size is None else value.size
                return "storage", getattr(torch, kind), value.key, "cpu", size

        Pickler(file, protocol).dump(table)
    return file.getvalue(), storages


def archive(path, members, compression=zipfile.ZIP_STORED):
    with zipfile.ZipFile(path, "w", compression) as file:
        for name, content in members.items():
            file.writestr(name, content)


def members(table, protocol=2, root="archive"):
    """Name -> bytes of every member of the archive."""
    content, storages = pickled(table, protocol)
    named = {f"{root}/data.pkl": content, f"{root}/byteorder": b"little"}
    named |= {f"{root}/data/{key}": numbers.tobytes() for key, numbers in storages.items()}
    return named | {f"{root}/version": b"3\n"}


def save(path, table, protocol=2):
    archive(path, members(table, protocol))

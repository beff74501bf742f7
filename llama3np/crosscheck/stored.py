"""What trace files are made of: types of numbers, and arrays that are read when touched."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import ml_dtypes
import numpy as np

# Little-endian, as all three forms store them.
FLOATS = {
    "f32": np.dtype("<f4"),
    "f64": np.dtype("<f8"),
    "f16": np.dtype("<f2"),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}


class Spec(NamedTuple):
    """An array to be written: what is known of it before there are numbers."""

    shape: tuple[int, ...]
    dtype: np.dtype

    @property
    def nbytes(self) -> int:
        """Its bytes, as an array's."""
        return math.prod(self.shape) * self.dtype.itemsize


class Entry(NamedTuple):
    """An array in a file."""

    dtype: np.dtype
    read: Callable[[], np.ndarray]


def entries(arrays: Mapping[str, np.ndarray]) -> dict[str, Entry]:
    """Arrays that are there already, mapped or not, as entries."""
    return {name: Entry(array.dtype, lambda a=array: a) for name, array in arrays.items()}  # type: ignore[misc]


class Arrays(Mapping[str, np.ndarray]):
    """Name -> array, in the order of the file; each is read anew whenever it is asked for."""

    def __init__(self, found: Mapping[str, Entry]):
        self.entries = found

    def __getitem__(self, name: str) -> np.ndarray:
        return self.entries[name].read()

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)

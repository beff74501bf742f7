"""All tensors of one kind, parameters, gradients or moments, in one vector.

So a step of the optimizer, a norm or a sum is a handful of array operations for the whole model,
and what belongs together lies together.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import numpy as np

from llama3np.backend import namespace
from llama3np.config import Config
from llama3np.params import Params, from_named

Shapes = Mapping[str, tuple[int, ...]]


class Flat:
    """Named tensors as views of one vector: matrices first, then the vectors (norms).

    vector: all numbers, one dimension. tensors: name -> view of it, writable.
    matrices: how many numbers at its beginning belong to matrices, which alone decay.
    """

    def __init__(self, vector: Any, shapes: Shapes):
        self.vector, self.shapes = vector, dict(shapes)
        ordered = sorted(shapes, key=lambda name: len(shapes[name]) == 1)  # stable
        self.matrices = sum(prod(shape) for shape in shapes.values() if len(shape) == 2)
        self.tensors: dict[str, Any] = {}
        start = 0
        for name in ordered:
            stop = start + prod(shapes[name])
            self.tensors[name] = vector[start:stop].reshape(shapes[name])
            start = stop
        if vector.shape != (start,):
            raise ValueError(f"Flat: expected a vector of {start} numbers, found {vector.shape}")

    @classmethod
    def zeros(cls, shapes: Shapes, dtype: Any = np.float32, xp: Any = np) -> Flat:
        """Zeros of the given shapes, on the current device of the array module xp."""
        return cls(xp.zeros(sum(map(prod, shapes.values())), dtype), shapes)

    @classmethod
    def of(cls, tensors: Mapping[str, Any], dtype: Any = np.float32, xp: Any = np) -> Flat:
        """A copy of named tensors, in one dtype, on the current device of xp."""
        flat = cls.zeros({name: tuple(w.shape) for name, w in tensors.items()}, dtype, xp)
        for name, w in tensors.items():
            flat.tensors[name][...] = xp.asarray(w)
        return flat

    def like(self) -> Flat:
        """Zeros of the same shapes, dtype and device."""
        return Flat(namespace(self.vector).zeros_like(self.vector), self.shapes)

    def params(self, config: Config) -> Params:
        """The model whose tensors these are, views as well. Raises KeyError for a missing one."""
        return from_named(self.tensors, config)

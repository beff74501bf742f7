"""Where the backward pass puts the gradients of weights."""

from __future__ import annotations

from typing import Any

from llama3np.backend import namespace
from llama3np.train.flat import Flat


class Sums:
    """Gradients of all weights, added up in a Flat of the same names and shapes."""

    def __init__(self, flat: Flat):
        self.flat = flat

    def product(self, name: str, d_y_MO: Any, x_MI: Any) -> None:
        """Of a matrix W in y = W x: d_y^T @ x, shape (O, I)."""
        self.flat.tensors[name] += d_y_MO.T @ x_MI

    def rows(self, name: str, ids_M: Any, d_y_MD: Any) -> None:
        """Of a table whose rows ids_M were taken: to each, all d_y of where it was taken."""
        namespace(d_y_MD).add.at(self.flat.tensors[name], ids_M, d_y_MD)

    def vector(self, name: str, d_w_D: Any) -> None:
        """Of the weight of a norm."""
        self.flat.tensors[name] += d_w_D

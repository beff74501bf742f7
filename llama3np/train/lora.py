"""Low-rank adapters: each matrix is frozen, and a product of two thin ones learns beside it.

    y = W x + s B A x      W (O, I), A (R, I), B (O, R), s = alpha / R        Hu et al. 2021

With d_y what reaches y, for rows y = x W^T + s (x A^T) B^T:
    d_B = s d_y^T (x A^T)      d_A = s (d_y B)^T x      d_x = d_y W + s (d_y B) A
so W's own gradient, of its size, is never made, and the optimizer keeps moments of A and B alone.

All seven matrices of every block have adapters: of the choices that Dettmers et al. 2023 (QLoRA)
compare, it is the one that reaches full fine-tuning. Norms, embedding table and head are frozen.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np

from llama3np.backend import to_host
from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.kernels import stored
from llama3np.kernels.adapted import Adapted
from llama3np.load.adapters import matrices
from llama3np.params import Params, from_named, mapped, named
from llama3np.train.flat import Flat, Shapes

# alpha is 2 R, as is common practice: s, and a good learning rate with it, is the same for all R.
SCALE = 2.0


def shapes(config: Config, rank: int) -> Shapes:
    """Name -> shape of what is trained: "layers.0.wq.A" is (R, I), "layers.0.wq.B" is (O, R).

    Raises InputError for a rank below 1 or above the smallest side of a matrix: B A has no higher.
    """
    sides = matrices(config)
    most = min(side for shape in sides.values() for side in shape)
    if not 1 <= rank <= most:
        raise InputError(f"lora: expected a rank from 1 to {most}, found {rank}")
    pairs = ({f"{n}.A": (rank, i), f"{n}.B": (o, rank)} for n, (o, i) in sides.items())
    return {name: shape for pair in pairs for name, shape in pair.items()}


def initial(config: Config, rank: int, seed: int, dtype: Any = np.float32) -> Flat:
    """The adapters that training begins with: B is 0, so the model is the frozen one.

    A is uniform within +-1 / sqrt(I), as in PEFT: He et al. 2015 with a = sqrt(5). A function of
    its arguments. Raises InputError as `shapes` does.
    """
    rng, flat = np.random.default_rng(seed), Flat.zeros(shapes(config, rank), dtype)
    for name, w in flat.tensors.items():
        if name.endswith(".A"):
            w[...] = rng.uniform(-1, 1, w.shape) / sqrt(w.shape[1])
    return flat


class Lora:
    """The adapters of a frozen model, as train.trained.Trained has it.

    base: its weights in host memory, in any format that load_checkpoint gives. On the CPU they stay
    as they are, mapped in their file if they were; what is not float32 is widened a few rows at a
    time, by each product. frozen: the model on the device, if it is another one. scale: s.
    """

    def __init__(
        self, base: Params, config: Config, frozen: Params | None = None, scale: float = SCALE
    ):
        self.config, self.base, self.scale = config, stored(base), scale
        self.frozen = frozen or self.base

    def params(self, flat: Flat) -> Params:
        """The frozen model with the adapters of `flat`."""
        return adapted(self.frozen, self.config, flat.tensors, self.scale)

    def on_host(self, flat: Flat) -> Params:
        """The same in host memory; np.asarray of a matrix, or rows of it, are W + s B A."""
        here = {name: to_host(w) for name, w in flat.tensors.items()}
        return adapted(self.base, self.config, here, self.scale)

    def sums(self, flat: Flat, grad: Flat) -> AdapterSums:
        """What adds gradients of A and B to `grad`."""
        return AdapterSums(flat.tensors, grad.tensors, self.scale)


def adapted(base: Params, config: Config, pairs: dict[str, Any], scale: float) -> Params:
    """The model W + scale B A, with no matrix made; pairs has A and B as `shapes` names them.

    A matrix without a pair is left as it is.
    """
    tensors = {
        name: Adapted(w, pairs[f"{name}.A"], pairs[f"{name}.B"], scale)
        if f"{name}.A" in pairs
        else w
        for name, w in named(base, config.tied).items()
    }
    return from_named(tensors, config)


def merged(params: Params) -> Params:
    """The model with every W + scale B A made, float32; all else as it is."""
    return mapped(params, lambda w: np.asarray(w) if isinstance(w, Adapted) else w)


class AdapterSums:
    """Gradients of adapters, added up under their names; none of frozen weights is computed."""

    def __init__(self, pairs: dict[str, Any], grads: dict[str, Any], scale: float):
        self.pairs, self.grads, self.scale = pairs, grads, scale

    def product(self, name: str, d_y_MO: Any, x_MI: Any) -> None:
        """d_B = s d_y^T (x A^T) and d_A = s (d_y B)^T x of a matrix with an adapter."""
        if f"{name}.A" not in self.pairs:
            return
        a_RI, b_OR = self.pairs[f"{name}.A"], self.pairs[f"{name}.B"]
        self.grads[f"{name}.B"] += d_y_MO.T @ (x_MI @ a_RI.T * self.scale)
        self.grads[f"{name}.A"] += (d_y_MO @ b_OR * self.scale).T @ x_MI

    def rows(self, name: str, ids_M: Any, d_y_MD: Any) -> None:
        """Tables are frozen."""

    def vector(self, name: str, d_w_D: Any) -> None:
        """Norms are frozen."""


def on_device(params: Params, xp: Any) -> Params:
    """The model in float32 on the current device of xp, one matrix at a time."""
    return mapped(params, lambda w: xp.asarray(np.asarray(w).astype(np.float32)))

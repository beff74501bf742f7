"""What of a model is trained: all of its weights here, low-rank adapters in lora.py."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from llama3np.backend import to_host
from llama3np.config import Config
from llama3np.params import Params, mapped
from llama3np.train.backward import Gradients
from llama3np.train.flat import Flat
from llama3np.train.gradients import Sums


class Trained(Protocol):
    """How the numbers that the optimizer changes, and their gradients, belong to a model."""

    def params(self, flat: Flat) -> Params:
        """The model of these numbers, where they lie; it changes with them."""

    def on_host(self, flat: Flat) -> Params:
        """The model of these numbers in host memory, for writers and for Llama."""

    def sums(self, flat: Flat, grad: Flat) -> Gradients:
        """What adds gradients to `grad`, those of the model of `flat`."""


class Whole(NamedTuple):
    """All weights are trained."""

    config: Config

    def params(self, flat: Flat) -> Params:
        """Views of the numbers."""
        return flat.params(self.config)

    def on_host(self, flat: Flat) -> Params:
        """Views, or copies of what is on a device."""
        return mapped(self.params(flat), to_host)

    def sums(self, flat: Flat, grad: Flat) -> Any:
        """Each weight's gradient under its name."""
        return Sums(grad)

"""The table of taps: their names, their order in a forward pass, and their shapes."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np

from llama3np.config import Config

# Dimensions of one sequence's taps: T positions traced, S positions there are (see DESIGN.md).
BEFORE = {"embed": "TD"}
LAYER = {
    "attn_norm": "TD", "q": "TNH", "k": "TKH", "v": "TKH", "q_rope": "TNH", "k_rope": "TKH",
    "scores": "NTS", "probs": "NTS", "attn": "TNH", "attn_out": "TD", "h_mid": "TD",
    "mlp_norm": "TD", "gate": "TF", "up": "TF", "act": "TF", "mlp_out": "TD", "h": "TD",
}  # fmt: skip
AFTER = {"norm": "TD", "logits": "TV"}
DIMS = BEFORE | LAYER | AFTER

FORMAT = "llama3np-trace-1"


class Trace(NamedTuple):
    """What a forward pass showed of one sequence: arrays by tap name, and what they are of.

    meta: "format", "config", "ids", "positions" (those of the T axis), "profile" and more, as
    docs/crosscheck.md lists them; of another implementation's file any part may be missing.
    """

    arrays: Mapping[str, np.ndarray]
    meta: dict[str, Any]


def order(n_layers: int) -> list[str]:
    """Every tap's name, in the order in which a forward pass shows them."""
    layers = (f"layers.{i}.{tap}" for i in range(n_layers) for tap in LAYER)
    return [*BEFORE, *layers, *AFTER]


def parse(name: str) -> tuple[int | None, str]:
    """(layer, tap) of a name; the layer is None before and after them. KeyError for no tap."""
    match = re.fullmatch(r"layers\.(\d+)\.(\w+)", name)
    layer, tap = (int(match[1]), match[2]) if match else (None, name)
    if tap not in (LAYER if match else BEFORE | AFTER):
        raise KeyError(name)
    return layer, tap


def shape(name: str, config: Config, T: int, S: int) -> tuple[int, ...]:
    """The shape of a tap of T traced positions out of S."""
    c = config
    sizes = {"T": T, "S": S, "D": c.dim, "N": c.n_heads, "K": c.n_kv_heads, "H": c.head_dim}
    sizes |= {"F": c.ffn_dim, "V": c.vocab_size}
    return tuple(sizes[letter] for letter in DIMS[parse(name)[1]])

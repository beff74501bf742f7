"""Precision profiles: in which type the arithmetic is done, and where it rounds."""

from __future__ import annotations

from typing import NamedTuple

from llama3np.errors import InputError


class Profile(NamedTuple):
    """A named, stated way to compute: two runs of one profile agree whatever the storage."""

    name: str
    dtype: str  # of every activation and RoPE table, and of the cache unless it has its own
    rounded: bool = False  # activations to bf16 as they enter a product with a bf16 matrix


PROFILES = {
    "float32": Profile("float32", "float32"),  # the default: weights exact in f32 however stored
    "float64": Profile("float64", "float64"),  # the oracle for error bars, angles included
    # Products of bf16 by bf16, summed in float32: what processors and GPUs have instructions for.
    "bf16-mm": Profile("bf16-mm", "float32", rounded=True),
}


def profile(name: str) -> Profile:
    """Look a profile up by its name; raise InputError for a name that is none."""
    if name not in PROFILES:
        raise InputError(f"dtype: expected one of {', '.join(PROFILES)}, found {name!r}")
    return PROFILES[name]

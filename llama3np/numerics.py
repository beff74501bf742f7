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

# What a cache may store keys and values as, by the names of the command line.
CACHE_DTYPES = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}


def profile(name: str) -> Profile:
    """Look a profile up by its name; raise InputError for a name that is none."""
    if name not in PROFILES:
        raise InputError(f"dtype: expected one of {', '.join(PROFILES)}, found {name!r}")
    return PROFILES[name]


def cache_dtype(name: str | None, profile: Profile) -> str:
    """The dtype of a cache: the profile's own, or a shorter one by its name in CACHE_DTYPES.

    Raises InputError for a name that is none, and for any with float64, the oracle.
    """
    if name is None:
        return profile.dtype
    if name not in CACHE_DTYPES or profile.dtype != "float32":
        expected = ", ".join(CACHE_DTYPES) if profile.dtype == "float32" else "none"
        raise InputError(f"kv_dtype: expected {expected} with {profile.name}, found {name!r}")
    return CACHE_DTYPES[name]

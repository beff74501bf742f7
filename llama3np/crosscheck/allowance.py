"""How far a right candidate may be from the reference: measured errors, times a stated factor.

The reference's metadata holds, for each profile, how far that profile's own run is from float64,
tap by tap. A candidate of that precision may be FACTOR times as far. What the reference itself is
from float64, if it is no float64 trace, comes on top.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama3np.crosscheck import measure
from llama3np.crosscheck.layouts import MASKED
from llama3np.errors import InputError
from llama3np.numerics import PROFILES

FACTOR = 3
# By the candidate's dtype: the profiles whose larger error is taken. float64 is held to float32.
MATCHING = {
    "float64": ("float32",),
    "float32": ("float32",),
    "bfloat16": ("bf16-hf", "bf16-meta"),
    "float16": ("f16-hf",),
}
_ALIASES = {"half": "float16", "bf16": "bfloat16", "f16": "float16", "fp16": "float16"}
_ALIASES |= {"float": "float32", "f32": "float32", "fp32": "float32", "double": "float64"}
_ALIASES |= {"f64": "float64", "fp64": "float64"}

Budgets = Mapping[str, Mapping[str, Mapping[str, float]]]  # profile -> tap -> measure -> error


class Precision(NamedTuple):
    """In which type a candidate computes, by which profiles it is judged, and how that is known."""

    dtype: str
    profiles: tuple[str, ...]
    why: str


class Allowed(NamedTuple):
    """The most that one tap may be off."""

    max_abs: float
    nmse: float


NOTHING = Allowed(0, 0)


# ---- the candidate's precision -------------------------------------------------------------------


def precision(
    meta: Mapping[str, Any], arrays: Mapping[str, np.ndarray], named: str | None = None
) -> Precision:
    """By the profile that the user names, by the candidate's metadata, or by its values.

    Values that are all numbers of a 16-bit type were rounded to it.
    Raises InputError for a profile that is none.
    """
    if named is not None:
        if named not in PROFILES:
            raise InputError(f"--profile: expected one of {', '.join(PROFILES)}, found {named!r}")
        return Precision(PROFILES[named].dtype, (named,), "as told")
    if meta.get("profile") in PROFILES:
        profile = PROFILES[meta["profile"]]
        profiles = MATCHING[profile.dtype] if not profile.rounded else (profile.name,)
        return Precision(profile.dtype, profiles, "by its metadata")
    told = str(meta.get("dtype", "")).removeprefix("torch.").lower()
    told = _ALIASES.get(told, told)
    if told in MATCHING:
        return Precision(told, MATCHING[told], "by its metadata")
    dtype = _by_values(list(arrays.values()))
    why = f"by its values: there is no budget of {told!r}" if told else "by its values"
    return Precision(dtype, MATCHING[dtype], why)


def _by_values(arrays: list[np.ndarray]) -> str:
    for dtype in ("bfloat16", "float16"):
        if arrays and all(representable(array, dtype) for array in arrays):
            return dtype
    wide = any(array.dtype == np.float64 for array in arrays)
    return "float32" if not wide or all(representable(a, "float32") for a in arrays) else "float64"


def representable(array: np.ndarray, dtype: str) -> bool:
    """Whether every finite number of the array is one of that type too."""
    if array.dtype == dtype:
        return True
    kind = ml_dtypes.bfloat16 if dtype == "bfloat16" else np.dtype(dtype)
    with np.errstate(over="ignore", invalid="ignore"):
        return bool(((array.astype(kind).astype(array.dtype) == array) | ~np.isfinite(array)).all())


# ---- the allowance -------------------------------------------------------------------------------


class Allowance:
    """The error that each tap is allowed, of a candidate of some precision."""

    def __init__(
        self, budgets: Budgets, precision: Precision, reference: str, factor: float = FACTOR
    ):
        """reference: the profile of the trace that is compared with."""
        own = () if reference == "float64" else (reference,)
        for profile in (*precision.profiles, *own):
            if profile not in budgets:
                known = ", ".join(budgets) or "none"
                raise InputError(
                    f"budget: expected the measured error of {profile}, found {known}: give "
                    f"--model, or trace the reference with --budgets"
                )
        self._candidate = [budgets[profile] for profile in precision.profiles]
        self._own = [budgets[profile] for profile in own]
        self._step = float(ml_dtypes.finfo(precision.dtype).eps) / 2
        self.precision, self.reference, self.factor = precision, reference, factor

    def __call__(self, name: str, expected: np.ndarray) -> Allowed:
        """What a tap may be off from these expected values.

        Never less than what rounding them once costs: of a tap that is only copied, the embedding,
        no error can be measured.
        """
        finite = np.abs(expected[np.isfinite(expected)])
        once = Allowed(self._step * float(finite.max(initial=0)), self._step**2)
        far, own = largest(self._candidate, name, once), largest(self._own, name, NOTHING)
        # Budgets are relative to the size of the truth; of a rounded reference it may be less.
        size = max(1 - own.nmse**0.5, 0.5)
        root = (self.factor * far.nmse**0.5 + own.nmse**0.5) / size
        return Allowed(self.factor * far.max_abs + own.max_abs, root**2)

    def within(self, name: str, found: np.ndarray, expected: np.ndarray) -> bool:
        """Whether no number of a tap leaves its allowance, and all of them together do not."""
        allowed = self(name, expected)
        if beyond(found, expected, allowed).any():
            return False
        return measure.nmse(found, expected) <= allowed.nmse


def largest(budgets: list[Mapping[str, Mapping[str, float]]], name: str, least: Allowed) -> Allowed:
    """The largest measured error of a tap. Raises InputError without one, and for an overflow."""
    if any(name not in budget for budget in budgets):
        raise InputError(f"budget: expected a measured error of {name!r}, found none")
    errors = [Allowed(budget[name]["max_abs"], budget[name]["nmse"]) for budget in budgets]
    if not all(np.isfinite(error).all() for error in errors):
        raise InputError(f"budget: the profile itself overflows at {name!r}: choose another one")
    return Allowed(*(float(max(each)) for each in zip(least, *errors, strict=True)))


def beyond(found: np.ndarray, expected: np.ndarray, allowed: Allowed) -> np.ndarray:
    """Where a tap leaves its allowance by one number: too far, not finite, or another mask.

    A score that is -inf in the reference may be anything from MASKED down.
    """
    with np.errstate(invalid="ignore"):
        error = np.abs(found.astype(np.float64) - expected.astype(np.float64))
    near = ((error <= allowed.max_abs) & np.isfinite(error)) | (found == expected)
    masked = (expected == -np.inf) & (found <= MASKED)
    return ~(near | masked | ((found != found) & (expected != expected)))

"""Compare a candidate's trace with a reference: what is off, by how much, and where it begins."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from llama3np.crosscheck import measure, taps
from llama3np.crosscheck.align import Aligned, Alignment, align, sizes
from llama3np.crosscheck.allowance import (
    MASKED,
    Allowance,
    Allowed,
    Budgets,
    Precision,
    beyond,
    precision,
)
from llama3np.crosscheck.recognise import head_axis
from llama3np.crosscheck.schemes import meaning
from llama3np.crosscheck.taps import Trace
from llama3np.errors import InputError

MANDATORY = "logits"  # what every candidate has to show, unless told that it is partial


class Row(NamedTuple):
    """One tap's distances; those of an array whose shape cannot be read are None."""

    name: str
    source: str  # the candidate's name of it
    agrees: bool
    allowed: Allowed | None = None
    max_abs: float | None = None
    nmse: float | None = None
    cosine: float | None = None
    ulps: measure.Ulps | None = None  # at the candidate's dtype
    kl: tuple[float, float] | None = None  # mean and largest over the positions, of logits


@dataclass(frozen=True)
class Divergence:
    """Where a tap leaves its budget: its first position that does, and the worst number there."""

    tap: str
    why: str
    layer: int | None = None
    position: int | None = None
    head: int | None = None
    index: int | None = None  # in the last axis: a channel, a key's position or a token's id
    expected: float | None = None
    found: float | None = None
    allowed: float | None = None  # largest difference that is


class Flip(NamedTuple):
    """A position where another token is the likeliest. A tie if the budget is able to do that."""

    position: int
    expected: int
    found: int
    margin: float  # of the reference's own token over the found one, in its logits
    budgets: float  # the same, in units of the budget
    tie: bool


class Comparison(NamedTuple):
    """The result. verdict: "agree", "diverge", or "incomplete" if only something is missing."""

    verdict: str
    first_divergence: Divergence | None
    rows: list[Row]
    recognised: dict[str, list[str]]
    missing: list[str]
    unused: list[str]
    flips: list[Flip]
    notes: list[str]
    precision: Precision
    factor: float


def compare(
    reference: Trace,
    candidate: Trace,
    names: Mapping[str, str] | None = None,
    *,
    partial: bool = False,
    profile: str | None = None,
    budgets: Budgets | None = None,
) -> Comparison:
    """Compare every tap of the reference that the candidate has, in execution order.

    reference: a trace of ours. candidate: anybody's; any names that schemes.py or `names` know,
    float dtypes and shapes. partial: no logits are needed. profile: by whose error the candidate is
    judged, in place of what its metadata or values tell. budgets: {profile: {tap: {"max_abs",
    "nmse"}}} in place of those in the reference's metadata.
    Raises InputError if nothing can be compared: another text, no tap that is known, no budget.
    """
    allowance = allowance_of(reference, candidate, names, profile, budgets)
    alignment = align(reference, candidate, allowance.within, names)
    if not alignment.taps:
        raise InputError(
            f"the candidate: expected an array that is a tap of the reference, found "
            f"{', '.join(map(repr, alignment.unused[:3])) or 'none'}; --map tells what is what"
        )
    result = judged(reference, alignment, allowance, partial)
    return result._replace(notes=result.notes + calls_differ(reference.meta, candidate.meta))


def calls_differ(reference: Mapping[str, Any], candidate: Mapping[str, Any]) -> list[str]:
    """A note if both tell how many ids went into their first call, and not the same."""
    ours, theirs = reference.get("prefill"), candidate.get("prefill")
    if None in (ours, theirs) or ours == theirs:
        return []
    return [
        f"the first call (prefill) took {ours} ids of the reference and {theirs} of the candidate: "
        f"mistakes of the cache show in what was decoded after it"
    ]


def allowance_of(
    reference: Trace,
    candidate: Trace,
    names: Mapping[str, str] | None = None,
    profile: str | None = None,
    budgets: Budgets | None = None,
) -> Allowance:
    """What `compare` allows each tap to be off; raises InputError without a budget for it."""
    n_layers = sizes(reference)["L"]
    known = [name for name in candidate.arrays if meaning(name, n_layers, names)]
    kind = precision(candidate.meta, {name: candidate.arrays[name] for name in known}, profile)
    given = reference.meta.get("budgets", {}) if budgets is None else budgets
    return Allowance(given, kind, str(reference.meta.get("profile", "float32")))


def judged(
    reference: Trace, alignment: Alignment, allowance: Allowance, partial: bool
) -> Comparison:
    """Measure what is aligned, and come to a verdict."""
    rows = [row(tap, allowance) for tap in alignment.taps.values()]
    wrong = next((each.name for each in rows if not each.agrees), None)
    first = locate(alignment.taps[wrong], allowance) if wrong else None
    missing = [name for name in taps.order(sizes(reference)["L"]) if name in reference.arrays]
    missing = [name for name in missing if name not in alignment.taps]
    verdict = "incomplete" if MANDATORY in missing and not partial else "agree"
    own = allowance.reference
    itself = f"the reference is itself a {own} trace: its own error is allowed too"
    return Comparison(
        "diverge" if first else verdict,
        first,
        rows,
        alignment.recognised,
        missing,
        alignment.unused,
        flips(alignment.taps.get("logits"), allowance),
        [itself] * (own != "float64") + alignment.notes,
        allowance.precision,
        allowance.factor,
    )


def row(tap: Aligned, allowance: Allowance) -> Row:
    """All distances of one tap."""
    if tap.found is None:
        return Row(tap.name, tap.source, agrees=False)
    found, expected = tap.found, tap.expected
    allowed = allowance(tap.name, expected)
    kl_T = measure.kl(found, expected) if tap.name == "logits" else None
    return Row(
        tap.name,
        tap.source,
        allowance.within(tap.name, found, expected),
        allowed,
        measure.max_abs(found, expected),
        measure.nmse(found, expected),
        measure.cosine(found, expected),
        measure.ulps(found, expected, allowance.precision.dtype),
        None if kl_T is None else (float(kl_T.mean()), float(kl_T.max())),
    )


# ---- where ---------------------------------------------------------------------------------------


def locate(tap: Aligned, allowance: Allowance) -> Divergence:
    """The first position at which a tap leaves its budget, and the number there that is worst.

    If no single number does, but all of them together: the worst one of all.
    """
    layer, kind = taps.parse(tap.name)
    dims = taps.DIMS[kind]
    if tap.found is None:
        return Divergence(tap.name, unreadable(tap), layer)
    at, single = worst(tap, allowance(tap.name, tap.expected))
    heads = head_axis(dims)
    expected, found = float(tap.expected[at]), float(tap.found[at])
    return Divergence(
        tap.name,
        reason(expected, found, single),
        layer,
        tap.positions[at[dims.index("T")]],
        None if heads is None else at[heads],
        at[-1],
        expected,
        found,
        allowance(tap.name, tap.expected).max_abs,
    )


def worst(tap: Aligned, allowed: Allowed) -> tuple[tuple[int, ...], bool]:
    """The index that `locate` tells, and whether that number alone is beyond what is allowed."""
    assert tap.found is not None
    wrong = beyond(tap.found, tap.expected, allowed)
    T = taps.DIMS[taps.parse(tap.name)[1]].index("T")
    where = first_of(wrong, T) if wrong.any() else np.isfinite(tap.expected)
    with np.errstate(invalid="ignore"):
        error = np.abs(tap.found.astype(np.float64) - tap.expected.astype(np.float64))
    error = np.where(where, np.nan_to_num(error, nan=np.inf), -1)
    at = np.unravel_index(int(error.argmax()), error.shape)
    return tuple(map(int, at)), bool(wrong.any())


def first_of(wrong: np.ndarray, axis: int) -> np.ndarray:
    """Of what is true, that which is first along an axis."""
    rows = np.moveaxis(wrong, axis, 0)
    found = np.zeros_like(wrong)
    first = int(rows.reshape(len(rows), -1).any(axis=1).argmax())
    np.moveaxis(found, axis, 0)[first] = rows[first]
    return found


def unreadable(tap: Aligned) -> str:
    """What is wrong with a shape, or with the positions that its rows are of."""
    dims, total = taps.DIMS[taps.parse(tap.name)[1]], tap.expected.shape
    T = dims.index("T")
    rows, rest = divmod(math.prod(tap.shape), math.prod(total) // total[T])
    if not rest and rows in (tap.shape[T : T + 1] if len(tap.shape) == len(dims) else tap.shape):
        return f"expected positions in its metadata that say which of ours its {rows} rows are"
    return f"shape {tap.shape} cannot be read as ({', '.join(dims)}) = {total}"


def reason(expected: float, found: float, single: bool) -> str:
    """What is wrong with a number."""
    if not single:
        return "each number is within the budget, all of them together (NMSE) are not"
    if np.isnan(found) or np.isposinf(found):
        return "not a finite number"
    if expected == -np.inf:
        return "masked in the reference, not in the candidate"
    if found <= MASKED and expected > MASKED:
        return "masked in the candidate, not in the reference"
    return "beyond the budget"


# ---- the likeliest token -------------------------------------------------------------------------


def flips(tap: Aligned | None, allowance: Allowance) -> list[Flip]:
    """Every position at which the candidate's likeliest token is another one.

    A budget b moves two logits by up to 2 b against each other: a margin of no more is a tie.
    """
    if tap is None or tap.found is None:
        return []
    budget = allowance(tap.name, tap.expected).max_abs
    expected_T, found_T = tap.expected.argmax(axis=-1), tap.found.argmax(axis=-1)
    found = []
    for i in np.flatnonzero(expected_T != found_T):
        own, other = int(expected_T[i]), int(found_T[i])
        margin = float(tap.expected[i, own]) - float(tap.expected[i, other])
        budgets = margin / budget if budget else np.inf
        found.append(Flip(tap.positions[i], own, other, margin, budgets, margin <= 2 * budget))
    return found

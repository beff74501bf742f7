"""Which reading of an array is meant: what its shape leaves open, its values tell.

A tap may be kept in another shape (layouts.py), with its RoPE pairs in halves, or with its heads in
another order. A reading tells in a layer if it brings the array within its allowance, or, where
none does, a hundred times nearer than another one. One reading is taken in all layers: that which
tells wherever any of them does, so that a mistake in some of the layers is not taken for a way to
store numbers. A rearrangement that is itself the mistake shows in the next tap.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llama3np.crosscheck import measure, taps
from llama3np.crosscheck.layouts import Layout, layouts

PAIRED = ("q", "k", "q_rope", "k_rope")  # whose heads are made of RoPE pairs
NEAR = 1e-4  # of another reading's NMSE: a hundredth of its error


Within = Callable[[str, np.ndarray, np.ndarray], bool]  # name, found, expected: is it right?


class Case(NamedTuple):
    """One tap of one layer, as the candidate has it."""

    name: str
    source: str
    array: np.ndarray
    expected: np.ndarray  # the reference's, at all its positions
    raw: bool  # scores neither scaled nor masked


class Reading(NamedTuple):
    """A way to read a tap: its shape, its RoPE pairs, the order of its heads."""

    layout: Layout
    halves: bool = False
    heads: tuple[int, ...] | None = None  # which of its heads is our first, second ...


class Pair(NamedTuple):
    """A tap as it is read, and the reference's at the same positions."""

    found: np.ndarray
    expected: np.ndarray
    positions: list[int]


class Choice(NamedTuple):
    """The reading of a tap in all layers, how many of them tell it, and those that contradict."""

    reading: Reading
    told: int
    contradicted: list[str]  # names of taps that only another reading brings near


class Fit(NamedTuple):
    """How well a reading does in one layer."""

    within: bool
    nmse: float


class Frame(NamedTuple):
    """What both traces are of."""

    sizes: Mapping[str, int]  # of every dimension letter but T
    positions: Positions
    within: Within


class Positions:
    """Which positions the T axes of reference and candidate stand for."""

    def __init__(self, reference: Mapping[str, Any], candidate: Mapping[str, Any]):
        self.total = len(reference["ids"])
        self.ours: list[int] = list(reference.get("positions") or range(self.total))
        self.theirs: list[int] | None = candidate.get("positions") or None

    def rows(self, count: int) -> tuple[list[int], list[int]] | None:
        """Rows of ours and of theirs that are the same positions; None if there are none.

        Of a candidate that does not tell its positions: as many rows as ours are the same ones, as
        many as there are ids are all of them, and a single one is the last.
        """
        given = self.ours if self.theirs is None else self.theirs
        last = self.total - 1 if self.theirs is None else self.theirs[-1]
        known = {1: [last], self.total: list(range(self.total)), len(given): given}
        row = {position: i for i, position in enumerate(known.get(count, []))}
        both = [(i, row[position]) for i, position in enumerate(self.ours) if position in row]
        return ([i for i, _ in both], [i for _, i in both]) if both else None


# ---- one reading ---------------------------------------------------------------------------------


def apply(reading: Reading, case: Case, frame: Frame) -> Pair | None:
    """The array as it is read, beside the reference's; None where it cannot be read so."""
    layout = reading.layout
    count = layout.count(case.array.shape)
    rows = None if count is None else frame.positions.rows(count)
    ours = layout.read(case.array, case.raw) if rows else None
    if rows is None or ours is None:
        return None
    axis = layout.dims.index("T")
    found, expected = taken(ours, rows[1], axis), taken(case.expected, rows[0], axis)
    if reading.halves:
        found = found.reshape(*found.shape[:-1], 2, -1).swapaxes(-1, -2).reshape(found.shape)
    if reading.heads:
        found = found.take(reading.heads, axis=head_axis(layout.dims))
    if case.raw:
        scaled = found / np.sqrt(frame.sizes["H"]).astype(found.dtype)
        found = np.where(expected == -np.inf, expected, scaled)
    return Pair(found, expected, [frame.positions.ours[i] for i in rows[0]])


def taken(array: np.ndarray, rows: Sequence[int], axis: int) -> np.ndarray:
    """Some rows of an axis; the array itself, uncopied, for all of them in order."""
    return array if list(rows) == list(range(array.shape[axis])) else array.take(rows, axis)


def head_axis(dims: str) -> int | None:
    """Where the heads are: the axis N or K."""
    return next((axis for axis, letter in enumerate(dims) if letter in "NK"), None)


def changes(reading: Reading, case: Case) -> list[str]:
    """What is done to an array for it to be ours, in words."""
    found = reading.layout.changes(case.array.shape)
    if reading.halves:
        found.append("RoPE pairs in halves (x[i], x[i + H/2]), read as interleaved")
    if reading.heads:
        found.append(f"heads in the order {', '.join(map(str, np.argsort(reading.heads)))}")
    if case.raw:
        found.append("scores before scale and mask, scaled by 1/sqrt(H), ours masked too")
    return found


# ---- the choice ----------------------------------------------------------------------------------


def choose(
    kind: str, cases: Sequence[Case], frame: Frame, halves: bool | None = None
) -> Choice | None:
    """The reading of a tap in all its layers; None if no shape can be read.

    halves: how the RoPE pairs of the tap's siblings are kept, taken where nothing else tells.
    """
    options = readings(kind, cases, frame)
    if not options:
        return None
    first = [fit(options[0], case, frame) for case in cases]
    if all(each.within for each in first):
        return Choice(options[0], len(cases), [])
    options += reordered(options, cases, frame)
    fits = [first, *([fit(option, case, frame) for case in cases] for option in options[1:])]
    telling = told(fits)
    layers = [i for i in range(len(cases)) if telling[:, i].any()]
    if not layers:
        return Choice(_untold(options, fits, halves), 0, [])
    steady = [i for i, tells in enumerate(telling) if tells[layers].all()]
    # Where no reading does everywhere, that of the first layer counts: the others are wrong.
    best = steady[0] if steady else int(telling[:, layers[0]].argmax())
    wrong = [cases[i].name for i in layers if not telling[best, i]]
    return Choice(options[best], int(telling[best].sum()), wrong)


def readings(kind: str, cases: Sequence[Case], frame: Frame) -> list[Reading]:
    """All that the shapes allow, likely ones first; heads in their own order."""
    options: list[Reading] = []
    for case in cases:
        for layout in layouts(taps.DIMS[kind], case.array.shape, frame.sizes):
            pairs = (False, True) if kind in PAIRED else (False,)
            found = [Reading(layout, halves) for halves in pairs]
            new = Reading(layout) not in options
            options += found if new and apply(found[0], case, frame) else []
    return sorted(options, key=lambda option: option.halves)


def fit(reading: Reading, case: Case, frame: Frame) -> Fit:
    """How well a reading does in one layer."""
    pair = apply(reading, case, frame)
    if pair is None:
        return Fit(False, np.inf)
    nmse = measure.nmse(pair.found, pair.expected)
    return Fit(frame.within(case.name, pair.found, pair.expected), nmse)


def told(fits: Sequence[Sequence[Fit]]) -> np.ndarray:
    """Whether each reading tells in each layer, as (readings, layers).

    Where none is within its allowance, those that are much nearer than another. The errors of wrong
    readings count as 1 at most: numbers that fill masked places may stand anywhere in them.
    """
    nmse = np.array([[each.nmse for each in row] for row in fits])
    within = np.array([[each.within for each in row] for row in fits])
    near = nmse <= NEAR * nmse.max(axis=0).clip(max=1)
    return np.where(within.any(axis=0), within, near)


def _untold(options: list[Reading], fits: list[list[Fit]], halves: bool | None) -> Reading:
    """Where every layer is wrong in every reading: as its siblings, then what is nearest at first.

    The tap leaves its allowance in either case; this is about where it is said to do so.
    """
    kept = [i for i, option in enumerate(options) if option.heads is None]
    alike = [i for i in kept if halves is None or options[i].halves == halves]
    return options[min(alike or kept, key=lambda i: fits[i][0].nmse)]


def reordered(options: Sequence[Reading], cases: Sequence[Case], frame: Frame) -> list[Reading]:
    """Each reading with its heads in the order in which they are nearest ours, where it differs."""
    found = []
    for option in options:
        pair = apply(option, cases[0], frame)
        heads = pair and matching(pair, head_axis(option.layout.dims))
        if heads:
            found.append(option._replace(heads=heads))
    return found


def matching(pair: Pair, axis: int | None) -> tuple[int, ...] | None:
    """For each head of ours the nearest of theirs, if that is a new order of all of them."""
    if axis is None:
        return None
    keep = np.isfinite(pair.found) & np.isfinite(pair.expected)
    found_NM, expected_NM = (
        np.moveaxis(np.where(keep, x, 0), axis, 0).reshape(x.shape[axis], -1).astype(np.float64)
        for x in (pair.found, pair.expected)
    )
    squares_N = (found_NM * found_NM).sum(axis=1)
    order = (squares_N - 2 * expected_NM @ found_NM.T).argmin(axis=1)
    new = len(set(order)) == len(order) and (order != np.arange(len(order))).any()
    return tuple(map(int, order)) if new else None

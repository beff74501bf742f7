"""Bring another implementation's arrays into our names, shapes and orders; say what was done."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from llama3np.crosscheck import taps
from llama3np.crosscheck.recognise import (
    Case,
    Choice,
    Frame,
    Positions,
    Within,
    apply,
    changes,
    choose,
)
from llama3np.crosscheck.schemes import OURS, Meaning, meaning
from llama3np.crosscheck.taps import Trace
from llama3np.errors import InputError

# Whose RoPE pairs are kept as those of which other tap, where its own values do not tell.
SIBLINGS = {"k": ("q",), "q_rope": ("q", "k"), "k_rope": ("k", "q_rope", "q")}


class Aligned(NamedTuple):
    """One tap of the candidate beside the reference's, in our dimensions."""

    name: str
    source: str  # what the candidate calls it
    found: np.ndarray | None  # None if its shape cannot be read as ours
    expected: np.ndarray  # the reference's, at the same positions
    positions: list[int]
    shape: tuple[int, ...]  # as the candidate keeps it


class Alignment(NamedTuple):
    """All taps that both traces have, in execution order, and what had to be done for it."""

    taps: dict[str, Aligned]
    recognised: dict[str, list[str]]  # what was done, and to which: "q" is that of every layer
    unused: list[str]  # names of the candidate that mean no tap of the reference
    notes: list[str]


class Source(NamedTuple):
    """Where the candidate keeps a tap."""

    name: str
    meaning: Meaning


def align(
    reference: Trace, candidate: Trace, within: Within, names: Mapping[str, str] | None = None
) -> Alignment:
    """Find, for every tap of the reference, the candidate's array and how it is to be read.

    within(name, found, expected) says whether a tap is right, arrays in our dimensions; names is
    the user's own map, of schemes.read_map. Heads come in our order, RoPE pairs interleaved, and
    of positions those that both traces have.
    Raises InputError for a reference without config and ids, and for a candidate of other ids.
    """
    measured = sizes(reference)
    check_ids(reference.meta, candidate.meta)
    frame = Frame(measured, Positions(reference.meta, candidate.meta), within)
    sources, unused = sources_of(reference, candidate, frame, names)
    result = Alignment({}, {}, unused, [])
    halves: dict[str, bool] = {}
    for kind in taps.DIMS:
        cases = cases_of(kind, sources, reference, candidate)
        known = [halves[other] for other in SIBLINGS.get(kind, ()) if other in halves]
        choice = choose(kind, cases, frame, *known[:1])
        if choice and choice.told:
            halves[kind] = choice.reading.halves
        for case in cases:
            result.taps[case.name] = aligned(case, choice, frame)
        tell(result, kind, cases, choice, sources)
    order = [name for name in taps.order(measured["L"]) if name in result.taps]
    return result._replace(taps={name: result.taps[name] for name in order})


def aligned(case: Case, choice: Choice | None, frame: Frame) -> Aligned:
    """One tap as the choice reads it."""
    pair = apply(choice.reading, case, frame) if choice else None
    if pair is None:
        return Aligned(case.name, case.source, None, case.expected, [], case.array.shape)
    return Aligned(case.name, case.source, *pair, case.array.shape)


def tell(
    result: Alignment,
    kind: str,
    cases: Sequence[Case],
    choice: Choice | None,
    sources: Mapping[str, Source],
) -> None:
    """Add to the result what was done to a tap, and what contradicts it."""
    if not choice:
        return
    scheme = sources[cases[0].name].meaning.scheme
    shown = [] if scheme == OURS else [f"names: {scheme}"]
    kept, expected = result.taps[cases[0].name].positions, cases[0].expected
    total = expected.shape[taps.DIMS[kind].index("T")]
    if 0 < len(kept) < total:
        shown.append(f"{len(kept)} of the reference's {total} positions")
    for words in shown + changes(choice.reading, cases[0]):
        result.recognised.setdefault(words, []).append(kind)
    for name in choice.contradicted:
        result.notes.append(
            f"{name} comes near only if it is read otherwise than {cases[0].name}; one of the two "
            f"is stored, or computed, differently"
        )


# ---- what both traces are of ---------------------------------------------------------------------


def sizes(reference: Trace) -> dict[str, int]:
    """The size of every dimension letter but T, from a reference's metadata; L is of its layers.

    S are the positions of the whole run, as many as there are ids. Raises InputError without them.
    """
    keys = {"D": "dim", "F": "ffn_dim", "V": "vocab_size", "H": "head_dim", "K": "n_kv_heads"}
    keys |= {"N": "n_heads", "L": "n_layers"}
    config, ids = reference.meta.get("config"), reference.meta.get("ids")
    try:
        found = {letter: int(config[key]) for letter, key in keys.items()}  # type: ignore[index]
        return {**found, "G": found["N"] // found["K"], "S": len(ids)}  # type: ignore[arg-type]
    except (KeyError, TypeError, ValueError, ZeroDivisionError):
        raise InputError(
            "the reference: expected a trace that llama3np made, with config and ids in its "
            "metadata, found none (REF comes before CAND)"
        ) from None


def check_ids(reference: Mapping[str, Any], candidate: Mapping[str, Any]) -> None:
    """Raise InputError if the candidate tells that it is of other ids."""
    ours, theirs = list(reference["ids"]), candidate.get("ids")
    if theirs is None or list(theirs) == ours:
        return
    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), None)
    expected, found, where = len(ours), len(theirs), "in all"
    if at is not None:
        expected, found, where = ours[at], theirs[at], f"at position {at}"
    raise InputError(f"ids: expected {expected} {where}, found {found}: these are two other texts")


# ---- which array is which tap --------------------------------------------------------------------


def cases_of(
    kind: str, sources: Mapping[str, Source], reference: Trace, candidate: Trace
) -> list[Case]:
    """A tap in every layer in which both traces have it, in order."""
    found = []
    for name in reference.arrays:
        if name in sources and taps.parse(name)[1] == kind:
            source, meant = sources[name]
            array, expected = candidate.arrays[source], reference.arrays[name]
            found.append(Case(name, source, array, expected, meant.raw))
    return sorted(found, key=lambda case: taps.parse(case.name)[0] or 0)


def sources_of(
    reference: Trace, candidate: Trace, frame: Frame, names: Mapping[str, str] | None
) -> tuple[dict[str, Source], list[str]]:
    """The candidate's array for each tap of the reference, and its names that are not needed."""
    found: dict[str, Source] = {}
    unsure: dict[tuple[str, ...], list[Source]] = {}
    for name in candidate.arrays:
        meant = meaning(name, frame.sizes["L"], names)
        if meant and len(meant.kinds) > 1:
            unsure.setdefault(meant.kinds, []).append(Source(name, meant))
        elif meant:
            add(found, meant.kinds[0], Source(name, meant))
    for kinds, sources in unsure.items():
        kind = settled(kinds, sources, found, (reference, candidate), frame)
        for source in sources:
            add(found, kind, source)
    found = {name: source for name, source in found.items() if name in reference.arrays}
    used = {source.name for source in found.values()}
    return found, [name for name in candidate.arrays if name not in used]


def add(found: dict[str, Source], kind: str, source: Source) -> None:
    """Let a source stand for a tap, if there is none that the scheme names before it."""
    layer = source.meaning.layer
    tap = kind if layer is None else f"layers.{layer}.{kind}"
    if tap not in found or source.meaning.rank < found[tap].meaning.rank:
        found[tap] = source


def settled(
    kinds: Sequence[str],
    sources: Sequence[Source],
    found: Mapping[str, Source],
    traces: tuple[Trace, Trace],
    frame: Frame,
) -> str:
    """Which of two taps a name means that its scheme gives to both.

    That of which the candidate has no other array; else that to which the values are near in more
    layers.
    """
    taken = {taps.parse(name)[1] for name in found}
    told = {}
    for kind in kinds:
        trial: dict[str, Source] = {}
        for source in sources:
            add(trial, kind, source)
        choice = choose(kind, cases_of(kind, trial, *traces), frame)
        told[kind] = (kind not in taken, choice.told if choice else 0)
    return max(kinds, key=lambda kind: told[kind])

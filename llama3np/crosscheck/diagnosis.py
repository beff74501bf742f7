"""A diagnosis as one JSON object, and in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np

from llama3np.crosscheck import mutant, taps
from llama3np.crosscheck.align import Aligned
from llama3np.crosscheck.allowance import Allowed
from llama3np.crosscheck.compare import Divergence, locate, unreadable
from llama3np.crosscheck.diagnose import HELPFUL, Diagnosis
from llama3np.crosscheck.evidence import Candidate, Unit, calls
from llama3np.crosscheck.judge import Judge, Trial, divergence, evidence, score
from llama3np.crosscheck.mutations import table
from llama3np.crosscheck.report import divergence_line, plain, recognised_lines, some

SHOWN = 5  # of the ranked mutations, for people


# ---- as one object -------------------------------------------------------------------------------


def described(found: Diagnosis) -> dict[str, Any]:
    """What --json prints: JSON's own types, errors in units of the budget."""
    best = found.explaining[0] if found.explaining else None
    ratios = found.plain.ratios(found.judge.wide)
    before, after = (score(ratios.values()), None) if best is None else errors(best, found)
    ratios = ratios if best is None else found.plain.ratios(found.judge.budget)
    worst = max(ratios, key=ratios.__getitem__)
    call, first = first_divergence(found)
    return {
        "verdict": best.id if best else None,
        "status": found.status,
        "explanation": explanation(found),
        "where": best.where if best else None,
        "changed_lines": changed_lines(best) if best else [],
        "also": alike(found),
        "error_before": rounded(before),
        "error_after": None if after is None else rounded(after),
        "worst": {"tap": worst[1], "call": worst[0], "error": rounded(ratios[worst])},
        "profile": found.judge.runner.profile.name,
        "ranked": [entry(trial, found) for trial in best_forms(found.ranked)],
        "invisible": found.invisible,
        "inapplicable": found.inapplicable,
        "first_divergence": None if first is None else plain(asdict(first) | {"call": call}),
        "notes": list(notes(found.judge.candidate)),
    }


def best_forms(ranked: list[Trial]) -> list[Trial]:
    """The best form of each mutation, which is the first of it, in the order of these."""
    found: dict[str, Trial] = {}
    for trial in ranked:
        found.setdefault(trial.id, trial)
    return list(found.values())


def entry(trial: Trial, found: Diagnosis) -> dict[str, Any]:
    """One mutation among the ranked ones. Its errors are over as many taps as its run came to."""
    before, after = errors(trial, found)
    first = divergence(trial.outcome, found.judge)
    return {
        "id": trial.id,
        "where": trial.where,
        "error_before": rounded(before),
        "error_after": rounded(after),
        "diverges_at": None if first is None else spoken(first),
    }


def errors(trial: Trial, found: Diagnosis) -> tuple[float, float]:
    """The error before and after a mutation."""
    return evidence(trial, found.plain, found.judge)


def rounded(value: float) -> float:
    """Three digits tell all there is to know."""
    return float(f"{value:.3g}")


def changed_lines(trial: Trial) -> list[dict[str, str]]:
    """The spec's lines that a mutation changes, if it is one of the source."""
    pairs = mutant.lines(trial.setting.edits)
    return [{"spec": before, "candidate": after} for before, after in pairs]


def alike(found: Diagnosis) -> list[str]:
    """Other mutations that explain the candidate too."""
    ids = dict.fromkeys(trial.id for trial in found.explaining)
    return list(ids)[1:]


def spoken(unit: Unit) -> str:
    """A unit in words."""
    call, name = unit
    return name if call == 0 else f"{name} of decode step {call}"


def first_divergence(found: Diagnosis) -> tuple[int, Divergence | None]:
    """In which call (0 is the prompt, 1 a decode step), and where, the spec is left first."""
    if found.status == "agrees":  # in 16 bits a right candidate leaves the finer budget
        return 0, None
    judge, number = found.judge, found.number
    unit = divergence(found.plain, judge)
    told = judge.agrees and not found.explaining
    if number and (unit is None or told or judge.order[0, number.tap] < judge.order[unit]):
        return call_of(number, judge), number
    return (0, None) if unit is None else (unit[0], place(unit, judge))


def call_of(number: Divergence, judge: Judge) -> int:
    """The call that computed a number."""
    starts = (start for start, _ in calls(judge.base)[1:])
    return sum(number.position is not None and start <= number.position for start in starts)


def place(unit: Unit, judge: Judge) -> Divergence:
    """The first number of a unit, in the order of positions, that is beyond the judge's budget."""
    call, name = unit
    part = of_call(judge.candidate.taps[name], *calls(judge.base)[call])
    finite = np.abs(part.expected[np.isfinite(part.expected)]).astype(np.float64)
    most = judge.budget[unit] * float(finite.max(initial=0))
    return locate(part, lambda *_: Allowed(most, judge.budget[unit] ** 2))  # type: ignore[arg-type]


def of_call(tap: Aligned, start: int, stop: int) -> Aligned:
    """The part of a tap that one call computed."""
    axis = taps.DIMS[taps.parse(tap.name)[1]].index("T")
    kept = [i for i, position in enumerate(tap.positions) if start <= position < stop]
    assert tap.found is not None
    return tap._replace(
        found=tap.found.take(kept, axis),
        expected=tap.expected.take(kept, axis),
        positions=[tap.positions[i] for i in kept],
    )


def notes(candidate: Candidate) -> Iterator[str]:
    """How the candidate was read, and what of it was not."""
    read = candidate.alignment
    yield from recognised_lines(read.recognised, candidate.taps)
    yield from read.notes
    for name in candidate.unreadable:
        yield f"not compared: {name}: {unreadable(read.taps[name])}"
    if read.unused:
        yield f"not compared, as no tap of the model: {some(read.unused)}"


# ---- in words ------------------------------------------------------------------------------------


def explanation(found: Diagnosis) -> str:
    """One sentence for a porter."""
    if found.status == "agrees":
        return "Nothing is wrong: the candidate is as near to the spec as honest rounding allows"
    if found.status == "unexplained" and found.judge.agrees and found.number:
        return f"Taken as a whole, what can be read is right, but {found.number.tap} is not"
    if found.status == "unexplained":
        return "No mutation, and no pair of them, explains the candidate"
    best, known = found.explaining[0], table()
    sentence = "; and ".join(known[id].sentence for id in best.id.split("+"))
    return f"{sentence} ({best.where})" if best.where else sentence


def lines(found: Diagnosis) -> Iterator[str]:
    """The report."""
    told = described(found)
    yield f"{told['verdict'] or found.status}: {told['explanation']}"
    for change in told["changed_lines"]:
        yield f"  the spec:      {change['spec']}"
        yield f"  the candidate: {change['candidate']}"
    yield evidence_line(told)
    if told["also"]:
        yield f"as well explained by: {', '.join(told['also'])}"
    _, first = first_divergence(found)
    if first:
        yield f"first divergence: {divergence_line(first)}"
    if found.status == "unexplained":
        yield from nearest(told["ranked"])
    if told["invisible"]:
        yield f"cannot be seen in what the candidate holds: {', '.join(told['invisible'])}"
    yield from told["notes"]


def nearest(ranked: list[dict[str, Any]]) -> Iterator[str]:
    """The first of the mutations to which the candidate is nearer, over the same taps."""
    helping = [one for one in ranked if one["error_after"] < HELPFUL * one["error_before"]]
    if helping:
        yield "the nearest:"
    for each in helping[:SHOWN]:
        form = f" ({each['where']})" if each["where"] else ""
        change = f"{each['error_before']:g} -> {each['error_after']:g}"
        yield f"  {each['id']}{form}: {change}, diverges at {each['diverges_at']}"


def evidence_line(told: dict[str, Any]) -> str:
    """How far the candidate is, before and after, and where it is furthest."""
    worst = told["worst"]
    most = f" ({worst['error']:g} at {spoken((worst['call'], worst['tap']))})"
    after = "" if told["error_after"] is None else f", {told['error_after']:g} with this change"
    return (
        f"error: {told['error_before']:g} times the budget of {told['profile']} against the spec"
        f"{most if worst['error'] > 1 else ''}{after} (1: within it)"
    )

"""A diagnosis as one JSON object, and in words."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from math import isfinite
from typing import Any

import numpy as np

from llama3np.crosscheck import mutant, taps
from llama3np.crosscheck.align import Aligned
from llama3np.crosscheck.allowance import Allowed
from llama3np.crosscheck.compare import locate
from llama3np.crosscheck.diagnose import Diagnosis
from llama3np.crosscheck.evidence import Unit, calls
from llama3np.crosscheck.judge import Judge, Trial, divergence, evidence, score
from llama3np.crosscheck.mutations import table

SHOWN = 5  # of the ranked mutations, for people


# ---- as one object -------------------------------------------------------------------------------


def described(found: Diagnosis) -> dict[str, Any]:
    """What --json prints: JSON's own types, errors in units of the budget."""
    best = found.explaining[0] if found.explaining else None
    ratios = found.plain.ratios(found.judge.wide).values()
    before, after = (score(ratios), None) if best is None else errors(best, found)
    # Of a right candidate in 16 bits that is only where its sums are in another order.
    first = None if found.status == "agrees" else divergence(found.plain, found.judge)
    return {
        "verdict": best.id if best else None,
        "status": found.status,
        "explanation": explanation(found),
        "where": best.where if best else None,
        "changed_lines": changed_lines(best) if best else [],
        "also": alike(found),
        "error_before": rounded(before),
        "error_after": None if after is None else rounded(after),
        "profile": found.judge.runner.profile.name,
        "ranked": [entry(trial, found) for trial in best_forms(found.ranked)],
        "invisible": found.invisible,
        "inapplicable": found.inapplicable,
        "first_divergence": None if first is None else place(first, found.judge),
        "notes": found.judge.candidate.notes,
    }


def best_forms(ranked: list[Trial]) -> list[Trial]:
    """The first, that is the best, form of each mutation."""
    return list({trial.id: trial for trial in reversed(ranked)}.values())[::-1]


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


def place(unit: Unit, judge: Judge) -> dict[str, Any]:
    """Where the candidate leaves the unmutated spec: the first number, in the order of execution.

    The keys are those of compare.Divergence; "call" is 0 for the prompt, 1 for a decode step.
    """
    call, name = unit
    tap = judge.candidate.taps[name]
    part = of_call(tap, *calls(judge.base)[call])
    finite = np.abs(part.expected[np.isfinite(part.expected)]).astype(np.float64)
    most = judge.budget[unit] * float(finite.max(initial=0))
    found = locate(part, lambda *_: Allowed(most, judge.budget[unit] ** 2))  # type: ignore[arg-type]
    numbers = asdict(found) | {"call": call}
    return {key: json_number(value) for key, value in numbers.items()}


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


def json_number(value: Any) -> Any:
    """JSON has no infinities: they are words."""
    return str(value) if isinstance(value, float) and not isfinite(value) else value


# ---- in words ------------------------------------------------------------------------------------


def explanation(found: Diagnosis) -> str:
    """One sentence for a porter."""
    if found.status == "agrees":
        return "Nothing is wrong: the candidate is as near to the spec as honest rounding allows"
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
    if told["first_divergence"]:
        yield first_line(told["first_divergence"])
    if found.status == "unexplained":
        yield "the nearest:"
        for each in told["ranked"][:SHOWN]:
            form = f" ({each['where']})" if each["where"] else ""
            change = f"{each['error_before']:g} -> {each['error_after']:g}"
            yield f"  {each['id']}{form}: {change}, diverges at {each['diverges_at']}"
    if told["invisible"]:
        yield f"cannot be seen in what the candidate holds: {', '.join(told['invisible'])}"
    yield from told["notes"]


def evidence_line(told: dict[str, Any]) -> str:
    """How far the candidate is, before and after."""
    after = "" if told["error_after"] is None else f", {told['error_after']:g} with this change"
    return (
        f"error: {told['error_before']:g} times the budget of {told['profile']} against the spec"
        f"{after} (1: within it)"
    )


def first_line(first: dict[str, Any]) -> str:
    """Where the candidate first leaves the spec."""
    where = "".join(
        f", {name} {first[name]}"
        for name in ("position", "head", "index")
        if first[name] is not None
    )
    return (
        f"first divergence: {first['tap']}{where}: expected {first['expected']}, "
        f"found {first['found']} ({first['why']})"
    )

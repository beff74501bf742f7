"""Prepare for a diagnosis: the run that a candidate should have been, and its judges."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from llama3np.crosscheck import budget
from llama3np.crosscheck.agreement import Numbers
from llama3np.crosscheck.align import align
from llama3np.crosscheck.allowance import precision
from llama3np.crosscheck.evidence import Candidate, Runner, Weights, error
from llama3np.crosscheck.judge import Judge, Outcome, explained, score
from llama3np.crosscheck.mutations import Setting, table
from llama3np.crosscheck.taps import Trace
from llama3np.errors import InputError
from llama3np.llm import Llama
from llama3np.numerics import PROFILES


def setting_of(
    llm: Llama, candidate: Trace, ids: Sequence[int] | None, prefill: int | None
) -> Setting:
    """The run that the candidate should have been."""
    if llm.profile.name != "float32":
        raise InputError(f"diagnose: expected the model in float32, found {llm.profile.name}")
    ids = candidate.meta.get("ids") if ids is None else ids
    if ids is None:
        raise InputError("diagnose: the candidate has no ids in its metadata: give --prompt-ids")
    ids = tuple(llm.encode(ids))
    prefill = candidate.meta.get("prefill", len(ids)) if prefill is None else prefill
    if not 1 <= prefill <= len(ids):
        raise InputError(f"prefill: expected 1 to {len(ids)} tokens, found {prefill}")
    bos_id = llm.tokenizer.bos_id if llm.tokenizer else None
    return Setting(llm.config, llm.params, ids, prefill, bos_id)


def judges(
    llm: Llama,
    base: Setting,
    trace: Trace,
    names: Mapping[str, str] | None,
    profile: str | None = None,
) -> tuple[list[tuple[Judge, Outcome]], Numbers]:
    """A judge of each profile of the candidate's precision, that first to which it is nearest.

    And what checks single numbers, for all of them alike.
    """
    if profile is not None:
        budget.checked([profile])
    kind = precision(trace.meta, {n: a for n, a in trace.arrays.items() if n != "embed"}, profile)
    weights = Weights(llm)
    truth = Runner(llm, PROFILES["float64"], weights).record(base)
    found = []
    for name in kind.profiles:
        runner = Runner(llm, PROFILES[name], weights)
        plain = runner.record(base)
        candidate = aligned(runner, base, plain, trace, names)
        judge = Judge(runner, base, plain, candidate, truth)
        outcome = judge.outcome(base)
        distance = score(outcome.ratios(judge.fine).values())
        judge.agrees = explained(outcome, judge.wide)
        found.append((distance, judge, outcome))
    found.sort(key=lambda one: one[0])
    runs = {judge.runner.profile.name: judge.plain for _, judge, _ in found}
    return [(judge, outcome) for _, judge, outcome in found], Numbers(kind, base, truth, runs)


def aligned(
    runner: Runner,
    base: Setting,
    plain: Mapping[str, np.ndarray],
    trace: Trace,
    names: Mapping[str, str] | None,
) -> Candidate:
    """The candidate in our dimensions: beside the run whose length is that of its own.

    Ids that are a BOS too few or too many are a mistake to be named, so they may be another run's.
    """
    most: Candidate | None = None
    bos = (table()[id].cases(base) for id in ("bos-missing", "bos-doubled"))
    for setting in (base, *(setting for cases in bos for _, setting in cases)):
        if tuple(trace.meta.get("ids", setting.ids)) != setting.ids:
            continue
        arrays = plain if setting is base else runner.record(setting)
        meta = {"config": base.config.__dict__, "ids": setting.ids}
        found = align(Trace(arrays, meta), trace, near, names)
        candidate = Candidate(found, setting)
        if candidate.taps and not candidate.unreadable:
            return candidate
        if candidate.taps and most is None:
            most = candidate
    if most is not None:
        return most
    raise InputError(
        f"the candidate: expected taps of {len(base.ids)} positions (or of the last one), found "
        f"none: its names, shapes or ids are of another run"
    )


def near(name: str, found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether a tap is right, for the recognition of layouts."""
    return error(name, found, expected) < 1e-3

"""Say what is wrong with a candidate: run the spec with each mutation, and see which explains it.

The unmutated spec comes first: if the candidate is as near to it as honest noise allows, nothing
is wrong. A mutation explains the candidate if its run is as near at every tap of every call, so
that the damage which a mistake does downstream is no evidence for or against anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import exp, log
from typing import Any, NamedTuple

import numpy as np

from llama3np.crosscheck import mutant
from llama3np.crosscheck.align import align
from llama3np.crosscheck.allowance import precision
from llama3np.crosscheck.evidence import (
    FLIPS,
    Candidate,
    Runner,
    Unit,
    calls,
    error,
    noise,
    profiles,
    rows,
    tolerances,
    units,
)
from llama3np.crosscheck.mutations import Mutation, Setting, table
from llama3np.crosscheck.taps import Trace
from llama3np.errors import InputError
from llama3np.llm import Llama
from llama3np.numerics import PROFILES

MOST = 1e9  # times the budget: further away is not worse
PAIRED_WITH = 4  # of the mutations that help, so many are tried together with others
SURE = 3  # times the finer budget: what the spec must be off before a 16-bit mistake is believed


# ---- one run against the candidate ---------------------------------------------------------------


class Outcome(NamedTuple):
    """How far the candidate is from one run, by unit, as far as the run went."""

    errors: dict[Unit, float]
    visible: bool  # whether the run differs from the unmutated one where the candidate looks
    whole: bool  # False: given up, because it could not be the explanation any more

    def ratios(self, budget: Mapping[Unit, float]) -> dict[Unit, float]:
        """The errors in units of a budget."""
        return {unit: min(value / budget[unit], MOST) for unit, value in self.errors.items()}


class Trial(NamedTuple):
    """One form of a mutation, and what came of it."""

    id: str  # of a pair "a+b"
    where: str
    setting: Setting
    outcome: Outcome


class Enough(Exception):  # noqa: N818
    """A run is given up."""


class Judge:
    """Runs of one profile against one candidate."""

    def __init__(self, runner: Runner, base: Setting, plain: Mapping[str, np.ndarray]):
        self.runner, self.base, self.plain = runner, base, plain
        self.order = {unit: i for i, (unit, _) in enumerate(units(base, plain))}
        self.budget: dict[Unit, float] = {}
        self.fine: dict[Unit, float] = {}  # of two runs of one 16-bit profile; else the same
        self.candidate: Candidate | None = None

    def measure(self, truth: Mapping[str, np.ndarray]) -> None:
        """Measure the budgets: against float64, and against sums in the opposite order."""
        other = self.runner.record(self.base, self.runner.backwards)
        dtype = self.runner.profile.dtype
        self.budget = tolerances(noise(self.base, truth, (self.plain, other)), dtype, 1)
        self.fine = self.budget
        if self.runner.profile.short:
            self.fine = tolerances(noise(self.base, self.plain, (other,)), dtype, FLIPS)

    def outcome(self, setting: Setting, last: int = -1) -> Outcome:
        """Run, and compare unit by unit.

        A run that is visibly another one than the unmutated, and diverges not after the unit of
        number `last` in the order of execution, is given up.
        """
        watch = Watch(self, setting, last)
        try:
            self.runner.run(setting, watch.see)
        except Enough:
            return Outcome(watch.errors, True, False)
        return Outcome(watch.errors, watch.visible, True)


class Watch:
    """Sees the taps of one run."""

    def __init__(self, judge: Judge, setting: Setting, last: int):
        assert judge.candidate is not None
        self.judge, self.setting, self.candidate = judge, setting, judge.candidate
        self.distance = judge.candidate.units(setting)
        self.shift = len(setting.ids) - judge.candidate.total
        self.last = last
        self.errors: dict[Unit, float] = {}
        self.early: set[Unit] = set()  # diverging, not after the last
        self.visible = setting.ids != judge.base.ids

    def see(self, start: int, name: str, array: np.ndarray) -> None:
        """Compare one unit; raise Enough if the run is given up."""
        judge, unit = self.judge, (start and start - self.setting.prefill + 1, name)
        far = self.distance(start, name, array)
        if far is None or unit not in judge.budget:
            return
        self.errors[unit] = far
        if judge.order[unit] <= self.last:
            if far > judge.budget[unit]:
                self.early.add(unit)
            else:  # of a layer that runs twice the second time counts
                self.early.discard(unit)
        self.visible = self.visible or self.differs(unit, start, name, array)
        if self.early and self.visible:
            raise Enough

    def differs(self, unit: Unit, start: int, name: str, array: np.ndarray) -> bool:
        """Whether this unit is another one than the unmutated run's, where the candidate looks."""
        whole = rows(name, self.judge.plain[name], *calls(self.judge.base)[unit[0]])
        kept = self.candidate.pick(self.shift, start, name, array)
        plain = self.candidate.pick(self.shift, start, name, whole)
        return error(name, kept[1], plain[1]) > self.judge.fine[unit]


# ---- evidence ------------------------------------------------------------------------------------


def score(ratios: Iterable[float]) -> float:
    """The geometric mean of errors in units of their budget, 1 for what is within it."""
    logs = [log(max(ratio, 1.0)) for ratio in ratios]
    return exp(sum(logs) / len(logs)) if logs else 1.0


def explained(outcome: Outcome, budget: Mapping[Unit, float]) -> bool:
    """Whether the candidate is as near to a run as honest noise allows, at every unit."""
    fits = all(value <= budget[unit] for unit, value in outcome.errors.items())
    return outcome.whole and bool(outcome.errors) and fits


def divergence(outcome: Outcome, judge: Judge) -> Unit | None:
    """The first unit, in the order of execution, that is beyond the budget."""
    wrong = [unit for unit, value in outcome.errors.items() if value > judge.budget[unit]]
    return min(wrong, key=judge.order.__getitem__, default=None)


def evidence(trial: Trial, plain: Outcome, judge: Judge) -> tuple[float, float]:
    """The error before and after a mutation, over the units that its run came to."""
    after = trial.outcome.ratios(judge.budget)
    before = plain.ratios(judge.budget)
    return score(before[unit] for unit in after if unit in before), score(after.values())


def rank(trial: Trial, judge: Judge) -> tuple[float, ...]:
    """What sorts trials: those that explain, then those that diverge later, then by error."""
    first = divergence(trial.outcome, judge)
    later = len(judge.order) if first is None else judge.order[first]
    return -later, not trial.outcome.whole, score(trial.outcome.ratios(judge.budget).values())


def likeliest(trials: Sequence[Trial], budget: Mapping[Unit, float]) -> list[Trial]:
    """Of trials that explain the nearest ones, the table's order among those alike in that."""

    def nearness(trial: Trial) -> float:
        ratios = trial.outcome.ratios(budget).values()
        return sum(log(max(ratio, 1e-3)) for ratio in ratios) / len(ratios)

    best = min(map(nearness, trials))
    alike = [trial for trial in trials if nearness(trial) <= best + log(2)]
    return alike + [trial for trial in trials if trial not in alike]


# ---- sweeps --------------------------------------------------------------------------------------


def sweep(
    judge: Judge, run: Setting, known: Outcome, mutations: Iterable[Mutation]
) -> Iterator[Trial]:
    """A trial of every form of every mutation of a run, whose own outcome is known.

    What does not come further than that run is of no interest, unless it may yet be seen that the
    rounding of 16 bits is another one.
    """
    first, last = divergence(known, judge), len(judge.order)
    if first is not None:
        last = judge.order[first]
    elif not explained(known, judge.fine):
        last = -1
    for mutation in mutations:
        for where, setting in forms(mutation, run):
            yield Trial(mutation.id, where, setting, judge.outcome(setting, last))


def forms(mutation: Mutation, run: Setting) -> Iterator[tuple[str, Setting]]:
    """Those forms of a mutation that can be run: of a pair, edits may want the same passage."""
    for where, setting in mutation.cases(run):
        try:
            for module in mutant.SOURCES:
                mutant.source(module, setting.edits)
        except ValueError:
            continue
        yield where, setting


def pairs(judge: Judge, plain: Outcome, trials: Sequence[Trial]) -> Iterator[Trial]:
    """Trials of two mutations: one that helps by itself, and any other that helps the more.

    Where a candidate holds hardly more than its logits, the other one must help by itself too.
    """
    helping = sorted((t for t in trials if helps(t, plain, judge)), key=lambda t: rank(t, judge))
    known = table()
    others = [known[id] for id in dict.fromkeys(trial.id for trial in helping)][: 2 * PAIRED_WITH]
    inner = any(name.startswith("layers.") for _, name in plain.errors)
    for one in helping[:PAIRED_WITH]:
        wanted = known.values() if inner else others
        for two in sweep(judge, one.setting, one.outcome, (m for m in wanted if m.id != one.id)):
            where = ", ".join(filter(None, (one.where, two.where)))
            yield Trial(f"{one.id}+{two.id}", where, two.setting, two.outcome)


def helps(trial: Trial, plain: Outcome, judge: Judge) -> bool:
    """Whether a mutation alone makes the candidate diverge later, or less."""
    before, after = evidence(trial, plain, judge)
    mine, first = divergence(trial.outcome, judge), divergence(plain, judge)
    if not trial.outcome.visible or mine is None or first is None:
        return False
    return judge.order[mine] > judge.order[first] or after < 0.8 * before


# ---- the diagnosis -------------------------------------------------------------------------------


class Diagnosis(NamedTuple):
    """The result. status: "agrees", "explained" or "unexplained"."""

    status: str
    verdict: str | None  # an id, or "a+b"; None unless explained
    where: str  # which form of it
    alike: list[str]  # what explains the candidate as well
    before: float  # the candidate's error against the unmutated spec, in units of the budget
    after: float  # the same against the explanation
    ranked: list[Trial]
    invisible: list[str]
    inapplicable: list[str]
    first_divergence: Unit | None
    judge: Judge
    plain: Outcome


def diagnose(
    llm: Llama,
    candidate: Trace,
    ids: Sequence[int] | None = None,
    prefill: int | None = None,
    names: Mapping[str, str] | None = None,
    progress: Callable[[str], None] | None = None,
) -> Diagnosis:
    """Find the mutation, or the pair, that explains a candidate.

    llm: the model in float32. candidate: any of its taps, as files.read gives them. ids, prefill:
    what it should have been run on; those of its metadata if None. names: as in align.
    Raises InputError without ids, and for a candidate that holds no tap.
    """
    base = setting_of(llm, candidate, ids, prefill)
    judge, plain = chosen(llm, base, candidate, names)
    trials: list[Trial] = []
    for mutation in table().values():
        if progress:
            progress(mutation.id)
        trials += sweep(judge, base, plain, [mutation])
    return concluded(judge, plain, trials)


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


def chosen(
    llm: Llama, base: Setting, trace: Trace, names: Mapping[str, str] | None
) -> tuple[Judge, Outcome]:
    """The judge of that profile of the candidate's precision to which it is nearest."""
    kind = precision(trace.meta, {n: a for n, a in trace.arrays.items() if n != "embed"})
    truth = Runner(llm, PROFILES["float64"]).record(base)
    found = []
    for profile in profiles(kind.profiles):
        runner = Runner(llm, profile)
        judge = Judge(runner, base, runner.record(base))
        judge.measure(truth)
        judge.candidate = aligned(judge, trace, names)
        outcome = judge.outcome(base)
        found.append((score(outcome.ratios(judge.fine).values()), judge, outcome))
    _, judge, outcome = min(found, key=lambda one: one[0])
    return judge, outcome


def aligned(judge: Judge, trace: Trace, names: Mapping[str, str] | None) -> Candidate:
    """The candidate in our dimensions: beside the run whose length is that of its own.

    Ids that are a BOS too few or too many are a mistake to be named, so they may be another run's.
    """
    base = judge.base
    bos = (table()[id].cases(base) for id in ("bos-missing", "bos-doubled"))
    for setting in (base, *(setting for cases in bos for _, setting in cases)):
        if tuple(trace.meta.get("ids", setting.ids)) != setting.ids:
            continue
        arrays = judge.plain if setting is base else judge.runner.record(setting)
        meta = {"config": base.config.__dict__, "ids": setting.ids}
        found = align(Trace(arrays, meta), trace, near, names)
        candidate = Candidate(found, setting)
        if candidate.taps:
            return candidate
    raise InputError(
        f"the candidate: expected taps of {len(base.ids)} positions (or of the last one), found "
        f"none: its names, shapes or ids are of another run"
    )


def near(name: str, found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether a tap is right, for the recognition of layouts."""
    return error(name, found, expected) < 1e-3


def concluded(judge: Judge, plain: Outcome, trials: list[Trial]) -> Diagnosis:
    """The verdict over a sweep; pairs are tried if it comes to none."""
    agrees = explained(plain, judge.budget)
    seen = [trial for trial in trials if trial.outcome.visible]
    budget, verdicts = judge.fine, [] if explained(plain, judge.fine) else fitting(seen, judge.fine)
    if verdicts and agrees and max(plain.ratios(judge.fine).values()) < SURE:
        verdicts = []
    if not verdicts and not agrees:
        budget, verdicts = judge.budget, fitting(seen, judge.budget)
    if not verdicts and not agrees:
        trials = trials + [two for two in pairs(judge, plain, trials) if two.outcome.visible]
        verdicts = fitting(trials[len(seen) :], judge.budget)
    best = likeliest(verdicts, budget) if verdicts else []
    before, after = evidence(best[0], plain, judge) if best else (score(plain.ratios(judge.budget).values()),) * 2
    ids = dict.fromkeys(trial.id for trial in trials)
    visible = {trial.id for trial in trials if trial.outcome.visible}
    return Diagnosis(
        "explained" if best else "agrees" if agrees else "unexplained",
        best[0].id if best else None,
        best[0].where if best else "",
        [trial.id for trial in best[1:] if trial.id != best[0].id],
        before,
        after,
        sorted((t for t in trials if t.outcome.visible), key=lambda t: rank(t, judge)),
        [id for id in ids if id not in visible],
        [id for id in table() if id not in ids],
        divergence(plain, judge),
        judge,
        plain,
    )


def fitting(trials: Iterable[Trial], budget: Mapping[Unit, float]) -> list[Trial]:
    """The trials that explain the candidate."""
    return [trial for trial in trials if explained(trial.outcome, budget)]

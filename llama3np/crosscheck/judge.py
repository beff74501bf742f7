"""Runs of the spec against one candidate: how far it is from each, and what that is evidence of."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from math import exp, inf, log
from typing import NamedTuple

import numpy as np

from llama3np.crosscheck import taps
from llama3np.crosscheck.evidence import (
    FLIPS,
    Candidate,
    Runner,
    Unit,
    calls,
    error,
    noise,
    rows,
    tolerances,
    units,
)
from llama3np.crosscheck.mutations import Setting

MOST = 1e9  # times the budget: further away is not worse

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

    def __init__(
        self,
        runner: Runner,
        base: Setting,
        plain: Mapping[str, np.ndarray],
        candidate: Candidate,
        truth: Mapping[str, np.ndarray],
    ):
        self.runner, self.base, self.plain, self.candidate = runner, base, plain, candidate
        self.order = {unit: i for i, (unit, _) in enumerate(units(base, plain))}
        self.held = self._held()  # what every run has to show
        self.wide: dict[Unit, float] = {}  # how far the profile is from float64
        self.fine: dict[Unit, float] = {}  # two runs of a 16-bit profile from each other; else wide
        self.agrees = False  # within the wide budget, so what may be wrong shows in the fine one
        self._measure(truth)

    @property
    def budget(self) -> dict[Unit, float]:
        """What every unit of an explanation may be off."""
        return self.fine if self.agrees else self.wide

    def _held(self) -> set[Unit]:
        """The units of the unmutated run that the candidate has something of."""
        shift, spans = len(self.base.ids) - self.candidate.total, calls(self.base)
        return {
            (call, name)
            for (call, name), array in units(self.base, self.plain)
            if self.candidate.pick(shift, spans[call][0], name, array) is not None
        }

    def _measure(self, truth: Mapping[str, np.ndarray]) -> None:
        """Measure the budgets: against float64, and against sums in the opposite order."""
        other = self.runner.record(self.base, self.runner.halves)
        dtype = self.runner.profile.dtype
        self.wide = tolerances(noise(self.base, truth, (self.plain, other)), dtype, 1)
        self.fine = self.wide
        if self.runner.profile.short:
            self.fine = tolerances(noise(self.base, self.plain, (other,)), dtype, FLIPS)

    def allowed(self, setting: Setting) -> dict[Unit, float]:
        """The budget of another run: a mistake may make noise grow that the right spec dampens."""
        one, other = (self.runner.record(setting, p) for p in (None, self.runner.halves))
        own = tolerances(noise(setting, one, (other,)), self.runner.profile.dtype, 0)
        return {unit: max(most, own.get(unit, 0)) for unit, most in self.budget.items()}

    def outcome(
        self, setting: Setting, known: Outcome | None = None, seen: bool = False
    ) -> Outcome:
        """Run, and compare unit by unit.

        known: of the unmutated run; one that diverges not after it is given up, once it is visibly
        another one (seen: that need not be shown any more).
        """
        first = None if known is None else divergence(known, self)
        last = -1 if known is None else len(self.order) if first is None else self.order[first]
        watch = Watch(self, setting, last, seen)
        try:
            self.runner.run(self.resumed(setting, known, watch), watch.see)
        except Enough:
            return Outcome(watch.errors, True, False)
        watch.miss(len(calls(setting)))
        return Outcome(watch.errors, watch.visible, True)

    def resumed(self, setting: Setting, known: Outcome | None, watch: Watch) -> Setting:
        """The run from the first layer on that is not the unmutated run's; its errors are known.

        The stream before that layer is looked up as if it were an embedding.
        """
        steps = enumerate(setting.order or ())
        shared = next((step for step, layer in steps if step != layer), 0)
        same = all(a is b for a, b in zip(setting[:-2], self.base[:-2], strict=True))  # but order
        if known is None or not (shared and same and known.whole):
            return setting
        T = len(setting.ids)
        watch.known = {
            unit: far for unit, far in known.errors.items() if before(unit[1], shared)
        } | {(call, "embed"): 0.0 for call in range(T)}
        for unit in watch.known.keys() & known.errors.keys():
            watch.note(unit, known.errors[unit])
        assert setting.order is not None
        assert setting.called is not None
        return setting._replace(
            config=replace(setting.config, vocab_size=max(setting.config.vocab_size, T)),
            params=setting.params._replace(embed_VD=self.plain[f"layers.{shared - 1}.h"]),
            ids=tuple(range(T)),
            order=setting.order[shared:],
            called=setting.called[shared:],
        )


def before(name: str, layer: int) -> bool:
    """Whether a tap comes before a layer."""
    of = taps.parse(name)[0]
    return name == "embed" or (of is not None and of < layer)


class Watch:
    """Sees the taps of one run."""

    def __init__(self, judge: Judge, setting: Setting, last: int, seen: bool):
        self.judge, self.candidate, self.last = judge, judge.candidate, last
        self.distance = judge.candidate.units(setting)
        self.shift, self.prefill = len(setting.ids) - judge.candidate.total, setting.prefill
        self.errors: dict[Unit, float] = {}
        self.known: dict[Unit, float] = {}  # units that are not run again
        self.early: set[Unit] = set()  # diverging, not after the last
        self.visible = seen or setting.ids != judge.base.ids

    def see(self, start: int, name: str, array: np.ndarray) -> None:
        """Compare one unit; raise Enough if the run is given up."""
        judge, unit = self.judge, (start and start - self.prefill + 1, name)
        far = None if unit in self.known else self.distance(start, name, array)
        if far is None or unit not in judge.budget:
            return
        self.visible = self.visible or self.differs(unit, start, name, array)
        self.note(unit, far)

    def note(self, unit: Unit, far: float) -> None:
        """Keep an error; raise Enough if it is too large too early."""
        self.errors[unit] = far
        if self.judge.order[unit] <= self.last:
            if far > self.judge.budget[unit]:
                self.early.add(unit)
            else:  # of a layer that runs twice the second time counts
                self.early.discard(unit)
        if self.early and self.visible:
            raise Enough

    def miss(self, n_calls: int) -> None:
        """What the candidate holds and a run of n_calls never showed is infinitely far from it.

        A layer that the run skips, or calls otherwise, is a layer that the candidate did run.
        """
        missing = {unit for unit in self.judge.held - self.errors.keys() if unit[0] < n_calls}
        self.errors |= dict.fromkeys(missing, inf)
        self.visible = self.visible or bool(missing)

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
    before, after = plain.ratios(judge.budget), trial.outcome.ratios(judge.budget)
    both = [unit for unit in after if unit in before]
    return score(before[unit] for unit in both), score(after[unit] for unit in both)


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

"""Whether a candidate agrees number by number, as `compare` with a trace of the model judges it.

A judge weighs all numbers of a tap together, and so may pass one that is far off among many.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite

import numpy as np

from llama3np.crosscheck import taps
from llama3np.crosscheck.align import Aligned
from llama3np.crosscheck.allowance import Allowance, Precision
from llama3np.crosscheck.budget import Sums, handed_on
from llama3np.crosscheck.compare import Divergence, locate, unreadable
from llama3np.crosscheck.judge import Judge, Trial
from llama3np.crosscheck.mutations import Setting

Arrays = Mapping[str, np.ndarray]


class Numbers:
    """Checks of single numbers, by the budgets that `trace` would measure of these runs."""

    def __init__(self, kind: Precision, base: Setting, truth: Arrays, runs: Mapping[str, Arrays]):
        """truth: the run in float64; runs: those in each of the precision's profiles."""
        self.kind, self.base = kind, base
        self.sums = {
            profile: {name: Sums().plus(array, truth[name]) for name, array in run.items()}
            for profile, run in runs.items()
        }
        # What compare is given is a float32 trace; of 16 bits, whether it is float64 is all one.
        self.name, self.arrays = "float64", truth
        if "float32" in runs:
            self.name, self.arrays = "float32", runs["float32"]

    def wrong(self, judge: Judge) -> Divergence | None:
        """The first tap of a candidate that compare would not pass.

        Where the judge does not either, only of those whose shape cannot be read.
        """
        taps_of = judge.candidate.alignment.taps
        if judge.agrees and self.measured and judge.candidate.total == len(self.base.ids):
            return self._first(judge, self.arrays, self.name)
        return next((shapeless(taps_of[name]) for name in judge.candidate.unreadable), None)

    def right(self, judge: Judge, trial: Trial) -> bool:
        """Whether every number of the candidate is that of a mutated run."""
        run = trial.setting
        if run.order is not None or len(run.ids) != judge.candidate.total:
            return False
        return self._first(judge, judge.runner.record(run), judge.runner.profile.name) is None

    @property
    def measured(self) -> bool:
        """Whether no profile overflows: such a one has no budget."""
        return all(isfinite(tap.error2) for sums in self.sums.values() for tap in sums.values())

    def _first(self, judge: Judge, arrays: Arrays, profile: str) -> Divergence | None:
        """The first tap that is further from a run than a profile's budget allows."""
        budgets = {name: handed_on(sums) for name, sums in self.sums.items()}
        allowance = Allowance(budgets, self.kind, profile)
        for name, tap in judge.candidate.alignment.taps.items():
            if tap.found is None:
                return shapeless(tap)
            axis = taps.DIMS[taps.parse(name)[1]].index("T")
            beside = tap._replace(expected=arrays[name].take(tap.positions, axis))
            if not allowance.within(name, tap.found, beside.expected):
                return locate(beside, allowance)
        return None


def shapeless(tap: Aligned) -> Divergence:
    """What is said of a tap whose shape cannot be read."""
    return Divergence(tap.name, unreadable(tap), taps.parse(tap.name)[0])

"""Say what is wrong with a candidate: run the spec with each mutation, and see which explains it.

The unmutated spec comes first: if the candidate is as near to it as honest noise allows, nothing
is wrong. A mutation explains the candidate if its run is as near at every tap of every call, so
that the damage which a mistake does downstream is no evidence for or against anything.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from math import inf
from typing import NamedTuple

from llama3np.crosscheck import mutant
from llama3np.crosscheck.agreement import Numbers
from llama3np.crosscheck.compare import Divergence
from llama3np.crosscheck.judge import (
    Judge,
    Outcome,
    Trial,
    divergence,
    evidence,
    explained,
    likeliest,
    rank,
)
from llama3np.crosscheck.judging import judges, setting_of
from llama3np.crosscheck.mutations import Mutation, Setting, table
from llama3np.crosscheck.taps import Trace
from llama3np.llm import Llama
from llama3np.threads import single_threaded_blas

PAIRED_WITH = 4  # of the mutations that help, so many are tried together with others
HELPFUL = 0.8  # of the error: what a mutation that helps leaves at most
UNDONE = 1000  # a mistake named though noise grew leaves one such part of the first error
ALIKE = 0.25  # of a tap's size: no further off may any be where noise grew
SURE = 3  # times the finer budget: what the spec must be off before a 16-bit mistake is believed

# ---- sweeps --------------------------------------------------------------------------------------


def sweep(
    judge: Judge, run: Setting, known: Outcome, mutations: Iterable[Mutation]
) -> Iterator[Trial]:
    """A trial of every form of every mutation of a run, whose own outcome is known."""
    nothing_wrong = explained(known, judge.budget)  # then one visible form of each tells enough
    for mutation in mutations:
        seen = False
        for where, setting in forms(mutation, run):
            if nothing_wrong and seen:
                break
            if setting.called != setting.order and seen and not judge.candidate.layered:
                continue  # the same run, its layers called otherwise
            outcome = judge.outcome(setting, known, seen)
            seen = seen or outcome.visible
            yield Trial(mutation.id, where, setting, outcome)


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
    for one in helping[:PAIRED_WITH]:
        wanted = known.values() if judge.candidate.layered else others
        for two in sweep(judge, one.setting, one.outcome, (m for m in wanted if m.id != one.id)):
            where = ", ".join(filter(None, (one.where, two.where)))
            yield Trial(f"{one.id}+{two.id}", where, two.setting, two.outcome)


def helps(trial: Trial, plain: Outcome, judge: Judge) -> bool:
    """Whether a mutation alone makes the candidate diverge later, or less."""
    before, after = evidence(trial, plain, judge)
    mine, first = divergence(trial.outcome, judge), divergence(plain, judge)
    if not trial.outcome.visible or mine is None or first is None:
        return False
    return judge.order[mine] > judge.order[first] or after < HELPFUL * before


# ---- the diagnosis -------------------------------------------------------------------------------


class Diagnosis(NamedTuple):
    """The result; errors are in units of the budget, 1 for what is within it."""

    status: str  # "agrees", "explained" or "unexplained"
    explaining: list[Trial]  # the likeliest first
    ranked: list[Trial]  # all that change what the candidate holds: those first, then the nearest
    invisible: list[str]  # ids of those that do not
    inapplicable: list[str]  # ids of those that cannot be made of this model and run
    plain: Outcome  # of the unmutated spec
    judge: Judge
    number: Divergence | None  # of a tap that compare would not pass, where the judge would


def diagnose(
    llm: Llama,
    candidate: Trace,
    ids: Sequence[int] | None = None,
    prefill: int | None = None,
    names: Mapping[str, str] | None = None,
    progress: Callable[[str], None] | None = None,
    profile: str | None = None,
) -> Diagnosis:
    """Find the mutation, or the pair, that explains a candidate.

    llm: the model in float32. candidate: any of its taps, as files.read gives them. ids, prefill:
    what it should have been run on; those of its metadata if None. names: as in align. profile:
    the one that the candidate is of, in place of what its metadata or values tell.
    Raises InputError without ids, for a candidate that holds no tap, and for the profile float64.
    """
    base = setting_of(llm, candidate, ids, prefill)
    with single_threaded_blas():  # its threads wait longer for each other than they work
        found = []
        ready, numbers = judges(llm, base, candidate, names, profile)
        for judge, plain in ready:
            trials: list[Trial] = []
            for mutation in table().values():
                if progress:
                    progress(mutation.id)
                trials += sweep(judge, base, plain, [mutation])
            found.append(concluded(judge, plain, trials, numbers))
            if settled(found[-1]):
                return found[-1]
        return found[0]


def settled(found: Diagnosis) -> bool:
    """Whether no other profile of the same precision need be asked.

    What a mistake does to 16 bits may hide whose rounding the candidate has.
    """
    beyond = max(found.plain.ratios(found.judge.budget).values())
    return found.status == "explained" or (found.status == "agrees" and beyond <= SURE)


def concluded(judge: Judge, plain: Outcome, trials: list[Trial], numbers: Numbers) -> Diagnosis:
    """The verdict over a sweep; pairs are tried if it comes to none."""
    seen = [trial for trial in trials if trial.outcome.visible]
    number = numbers.wrong(judge)
    explaining: list[Trial] = []
    if max(plain.ratios(judge.budget).values()) > (SURE if judge.agrees else 1):
        explaining = fitting(seen, judge) or noisier(seen, plain, judge)
    elif number:
        explaining = [trial for trial in fitting(seen, judge) if numbers.right(judge, trial)]
    if not judge.agrees and not explaining:
        two = [trial for trial in pairs(judge, plain, seen) if trial.outcome.visible]
        explaining, seen = fitting(two, judge), seen + two
    visible = {trial.id for trial in seen}
    ids = dict.fromkeys(trial.id for trial in trials)
    agrees = judge.agrees and number is None
    return Diagnosis(
        "explained" if explaining else "agrees" if agrees else "unexplained",
        explaining,
        in_order(explaining, seen, judge),
        [id for id in ids if id not in visible],
        [id for id in table() if id not in ids],
        plain,
        judge,
        number,
    )


def in_order(explaining: list[Trial], seen: list[Trial], judge: Judge) -> list[Trial]:
    """Those that explain the candidate as they are ranked among themselves, then all others."""
    others = [trial for trial in seen if all(trial.setting is not e.setting for e in explaining)]
    return explaining + sorted(others, key=lambda trial: rank(trial, judge))


def fitting(trials: Iterable[Trial], judge: Judge) -> list[Trial]:
    """The trials that explain the candidate, the likeliest first."""
    found = [trial for trial in trials if explained(trial.outcome, judge.budget)]
    return likeliest(found, judge.budget) if found else []


def noisier(trials: Iterable[Trial], plain: Outcome, judge: Judge) -> list[Trial]:
    """The best trial that undoes what is wrong first, if the noise of its own run tells the rest.

    A mistake may make noise grow that the right spec dampens.
    """
    first = divergence(plain, judge)
    if first is None:
        return []
    enough = max(judge.budget[first], plain.errors[first] / UNDONE)
    undoing = [
        trial
        for trial in trials
        if trial.outcome.errors.get(first, inf) <= enough
        and len(trial.setting.ids) == len(judge.base.ids)
        and len(trial.setting.order or trial.setting.params.layers) >= judge.base.config.n_layers
    ]
    best = min(undoing, key=lambda trial: rank(trial, judge), default=None)
    if best is None:
        return []
    whole = best._replace(outcome=judge.outcome(best.setting))
    alike = max(whole.outcome.errors.values()) < ALIKE
    return [whole] if alike and explained(whole.outcome, judge.allowed(best.setting)) else []

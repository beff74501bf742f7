"""Error budgets, measured: how far each profile's own run is from float64, tap by tap.

A right implementation of a profile may be about so far from the truth, for this model and these
ids; compare allows three times as much. The runs go in lock-step: every profile shows one tap, all
are compared with float64, and all go on. So no more than that tap is held of any of them.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from decimal import ROUND_CEILING, Context
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama3np.crosscheck.measure import finite
from llama3np.crosscheck.taps import order
from llama3np.crosscheck.trace import calls, run
from llama3np.errors import InputError, warn_once
from llama3np.kernels import unstored
from llama3np.llm import Llama, load
from llama3np.numerics import PROFILES, profile, short_params
from llama3np.params import Params, named

DEFAULT = ("float32", "bf16-hf", "bf16-meta", "f16-hf")
ROOM = 4_000_000_000  # bytes of weights rounded to 16 bits that are made without being asked for
# Four digits of a budget, for there are thousands of them in a trace's metadata; rounded up: what
# was measured stays within it.
SHORT = Context(prec=4, rounding=ROUND_CEILING)

Budgets = dict[str, dict[str, dict[str, float]]]  # profile -> tap -> "nmse", "max_abs"
Progress = Callable[[int, int, str], None]  # taps done, taps in all, the tap's name


def measure(
    source: Llama | str | Path,
    ids: Sequence[int],
    profiles: Iterable[str] | None = None,
    prefill: int | None = None,
    progress: Progress | None = None,
) -> Budgets:
    """The error of each profile's run against float64's: {profile: {tap: {"nmse", "max_abs"}}}.

    source: a model on the CPU whose weights are not rounded, or where to load it. profiles: those
    of `affordable` if None. prefill: as in trace.run.
    nmse: the sum of squared errors over that of squared values, over what is finite in float64, of
    all positions. Errors are handed on: relative to a tap's size, none is below that of a tap
    before it, which rounding may have hit luckily; max_abs is the handed-on largest error times the
    tap's largest value. A profile that overflows has no budget; the log says so.
    Raises InputError for an unknown profile, for float64 itself, and as trace.run does.
    """
    llm = source if isinstance(source, Llama) else load(source)
    wanted = affordable(llm) if profiles is None else checked(profiles)
    if not wanted:
        return {}
    total = len(calls(len(ids), prefill)) * len(order(llm.config.n_layers))
    meter = _Meter(wanted, total, progress)
    _together(_twins(llm, ["float64", *wanted]), ids, prefill, meter.look)
    return meter.budgets()


# ---- which profiles ------------------------------------------------------------------------------


def checked(profiles: Iterable[str]) -> list[str]:
    """The profiles, each once. Raises InputError for one that is none, and for float64."""
    wanted = list(dict.fromkeys(profiles))
    for name in wanted:
        if name not in PROFILES:
            known = ", ".join(known for known in PROFILES if known != "float64")
            raise InputError(f"--budgets: expected some of {known}, found {name!r}")
        if profile(name).dtype == "float64":
            raise InputError("budgets: float64 is what the others are measured against")
    return wanted


def affordable(llm: Llama) -> list[str]:
    """DEFAULT and the model's own, but for those whose rounded weights would exceed ROOM in all."""
    own = llm.profile.name
    candidates = dict.fromkeys((*DEFAULT, own) if own != "float64" else DEFAULT)
    chosen: list[str] = []
    rounded: dict[str, int] = {}
    for name in candidates:
        dtype = profile(name).dtype
        cost = _rounded_bytes(llm, dtype) if profile(name).short else 0
        if sum((rounded | {dtype: cost}).values()) <= ROOM:
            chosen.append(name)
            rounded[dtype] = cost
    return chosen


def _rounded_bytes(llm: Llama, dtype: str) -> int:
    """What short_params would take: nothing for weights of that type."""
    weights = named(llm.params, llm.config.tied).values()
    return sum(2 * math.prod(w.shape) for w in weights if w.dtype != np.dtype(dtype))


def usable(llm: Llama) -> bool:
    """Whether a model's weights are on the CPU, and as their files have them."""
    return llm.device.kind == "cpu" and not llm.profile.short


def _twins(llm: Llama, profiles: Sequence[str]) -> list[Llama]:
    """The same weights in these profiles; those of 16 bits share one rounded copy for each type."""
    if not usable(llm):
        raise ValueError("budgets: expected weights on the CPU that are not rounded")
    params: dict[str, Params] = {"float32": unstored(llm.params)}
    params["float64"] = params["float32"]
    made = []
    for name in profiles:
        dtype = profile(name).dtype
        if dtype not in params:
            params[dtype] = short_params(params["float32"], dtype)
        made.append(Llama(llm.config, params[dtype], dtype=name, engine=llm.engine.name))
    return made


# ---- running together ----------------------------------------------------------------------------

Look = Callable[[str, Sequence[Any]], None]  # a tap's name, and what each model showed


def _together(llms: Sequence[Llama], ids: Sequence[int], prefill: int | None, look: Look) -> None:
    """Run all models at once; look(name, arrays) is called when the last of them shows a tap.

    Each runs in a thread of its own and waits there for the others. If one fails, all end.
    """
    shown: list[Any] = [None] * len(llms)
    barrier = threading.Barrier(len(llms), lambda: look(shown[0][0], [array for _, array in shown]))

    def follow(i: int) -> None:
        def tap(name: str, _: int, array: Any) -> None:
            shown[i] = name, array
            barrier.wait()

        try:
            run(llms[i], ids, prefill, tap)
        except BaseException:
            barrier.abort()
            raise

    with ThreadPoolExecutor(len(llms) - 1) as pool:
        others = [pool.submit(follow, i) for i in range(1, len(llms))]
        with suppress(threading.BrokenBarrierError):  # it is another one's error that ended this
            follow(0)  # here, where Ctrl-C arrives
    for error in (other.exception() for other in others):
        if error is not None and not isinstance(error, threading.BrokenBarrierError):
            raise error


# ---- measuring -----------------------------------------------------------------------------------


class Sums(NamedTuple):
    """What is known of the errors of one tap, over the calls so far."""

    error2: float = 0.0
    truth2: float = 0.0
    error: float = 0.0  # the largest
    truth: float = 0.0

    def plus(self, found: Any, truth: np.ndarray) -> Sums:
        """With those of one more call."""
        found_M, truth_M = finite(np.asarray(found), truth)
        with np.errstate(invalid="ignore", over="ignore"):
            error_M = np.abs(found_M - truth_M)
            squares = float(error_M @ error_M), float(truth_M @ truth_M)
        worst = error_M.max(initial=self.error), np.abs(truth_M).max(initial=self.truth)
        return Sums(self.error2 + squares[0], self.truth2 + squares[1], *map(float, worst))


class _Meter:
    """The sums of every profile, tap by tap."""

    def __init__(self, profiles: Iterable[str], total: int, progress: Progress | None):
        self.sums: dict[str, dict[str, Sums]] = {name: {} for name in profiles}
        self.done, self.total, self.progress = 0, total, progress

    def look(self, name: str, shown: Sequence[Any]) -> None:
        """One tap of one call, float64's first."""
        truth, *others = shown
        for sums, found in zip(self.sums.values(), others, strict=True):
            sums[name] = sums.get(name, Sums()).plus(found, truth)
        self.done += 1
        if self.progress is not None:
            self.progress(self.done, self.total, name)

    def budgets(self) -> Budgets:
        """What `measure` returns."""
        found = {}
        for name, sums in self.sums.items():
            lost = [tap for tap, each in sums.items() if not math.isfinite(each.error2)]
            if lost:
                warn_once(f"budgets: {name} overflows at {lost[0]}, so it has none")
            else:
                found[name] = handed_on(sums)
        return found


def handed_on(sums: Mapping[str, Sums]) -> dict[str, dict[str, float]]:
    """Errors that never fall in the order of execution, each relative to the size of its tap."""
    nmse = relative = 0.0
    found = {}
    for name, (error2, truth2, error, truth) in sums.items():
        nmse = max(nmse, error2 / truth2 if truth2 else 0.0)
        relative = max(relative, error / truth if truth else 0.0)
        budget = {"nmse": nmse, "max_abs": relative * truth}
        found[name] = {
            key: float(SHORT.create_decimal(repr(value))) for key, value in budget.items()
        }
    return found

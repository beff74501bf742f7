"""What a candidate's numbers say of a run: how far each of them is, in units of honest noise.

Numbers are compared unit by unit: one tap of one call (the prompt, or one decode step), in the
order of execution. A unit's error is the root of its NMSE; what is honest is measured, by runs of
the unmutated spec: against float64, and with sums in another order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from itertools import pairwise
from math import inf
from typing import Any

import ml_dtypes
import numpy as np

from llama3np.backend import widen
from llama3np.crosscheck import measure, mutant, taps
from llama3np.crosscheck.align import Alignment
from llama3np.crosscheck.allowance import FACTOR
from llama3np.crosscheck.layouts import MASKED
from llama3np.crosscheck.mutations import Setting, relayered
from llama3np.crosscheck.recognise import PAIRED
from llama3np.crosscheck.trace import into, planned
from llama3np.llm import Llama
from llama3np.numerics import Profile
from llama3np.params import Layer, Params, mapped, named
from llama3np.threads import single_threaded_blas

# Of the rounding unit: a sum in another order may round so many numbers of a tap to a neighbour.
FLIPS = 1 / 16
WIDENED = 4e9  # bytes of weights up to which they are held in float32, which multiplies faster

Unit = tuple[int, str]  # which call, which tap


# ---- running -------------------------------------------------------------------------------------


class Weights:
    """The weights of a model as runs hold them, made once for all profiles of one width.

    Matrices are widened to float32, which multiplies faster, where there is room for that.
    """

    def __init__(self, llm: Llama):
        base = named(llm.params, llm.config.tied).values()
        self.roomy = 4 * sum(w.size for w in base) < WIDENED
        self._base = {id(w): w for w in base}
        self._made: dict[tuple[int, str], Any] = {}

    def __call__(self, w: Any, profile: Profile) -> Any:
        """One weight, of the model or of a mutation; only the model's are kept."""
        key = id(w), profile.dtype if profile.short else ""
        if key[0] not in self._base:
            return self._prepared(w, profile)
        if key not in self._made:
            self._made[key] = self._prepared(w, profile)
        return self._made[key]

    def _prepared(self, w: Any, profile: Profile) -> Any:
        """Rounded to 16 bits, if so; matrices of them are widened again."""
        if profile.short:
            with np.errstate(over="ignore"):
                w = np.asarray(w, dtype=np.float32).astype(profile.dtype)
        if w.ndim == 2 and self.roomy:
            return np.ascontiguousarray(np.asarray(w, dtype=np.float32))
        return w


class Runner:
    """Runs settings in one profile, with the products of an engine."""

    def __init__(self, llm: Llama, profile: Profile, weights: Weights | None = None):
        self.profile, self.products = profile, llm.engine.ops.linear.products
        self.weights = Weights(llm) if weights is None else weights

    def product(self, x_MD: np.ndarray, w: Any) -> np.ndarray:
        """x_MD @ w.T by the engine."""
        return self.products(x_MD, (w,))[0]

    def halves(self, x_MD: np.ndarray, w: Any) -> np.ndarray:
        """The same, each sum computed as the sum of two halves: rounded otherwise."""
        w, half = np.asarray(w), x_MD.shape[1] // 2
        return self.product(x_MD[:, :half], w[:, :half]) + self.product(x_MD[:, half:], w[:, half:])

    def run(self, setting: Setting, see: mutant.See, product: Any = None) -> None:
        """mutant.run in this profile."""
        held = setting._replace(params=self.held(setting.params))
        with single_threaded_blas():
            mutant.run(held, self.profile, product or self.product, see)

    def held(self, params: Params) -> Params:
        """The weights as this profile holds them; a layer's when it is run."""
        hold = partial(self.weights, profile=self.profile)
        rest = mapped(params._replace(layers=()), hold)
        return relayered(rest, params.layers, lambda layer: Layer(*map(hold, layer)))

    def record(self, setting: Setting, product: Any = None) -> dict[str, np.ndarray]:
        """All taps of a run, as in a trace of it."""
        dtype = np.float64 if self.profile.dtype == "float64" else np.float32
        plan = planned(setting.config, len(setting.ids), dtype=dtype)
        arrays = {name: np.empty(*spec) for name, spec in plan.specs.items()}
        put = into(arrays, plan.positions)
        self.run(setting, lambda start, name, array: put(name, start, widen(array)), product)
        return arrays


def calls(setting: Setting) -> list[tuple[int, int]]:
    """First position and end of every call."""
    edges = [0, *range(setting.prefill, len(setting.ids) + 1)]
    return list(pairwise(edges))


def rows(name: str, array: np.ndarray, start: int, stop: int) -> np.ndarray:
    """The part of a tap that one call computed; of scores, with the keys that there were."""
    kind = taps.parse(name)[1]
    if taps.DIMS[kind].endswith("S"):
        return array[:, start:stop, :stop]
    return array[start:stop]


def units(setting: Setting, arrays: Mapping[str, np.ndarray]) -> Iterator[tuple[Unit, np.ndarray]]:
    """Every unit of a recorded run, in order."""
    for call, (start, stop) in enumerate(calls(setting)):
        for name, array in arrays.items():
            yield (call, name), rows(name, array, start, stop)


# ---- distances -----------------------------------------------------------------------------------


def error(name: str, found: np.ndarray, expected: np.ndarray) -> float:
    """The root of the NMSE; infinite for another shape, another mask, or NaN in one of the two.

    Scores that are not masked at all may have been taken before the mask: then only those that are
    visible count.
    """
    if found.shape != expected.shape:
        return inf
    if name.endswith(".scores"):
        hidden, masked = found <= MASKED, expected <= MASKED
        if hidden.any() and not np.array_equal(hidden, masked):
            return inf
        seen = ~(hidden | masked)
        found, expected = found[seen], expected[seen]
    if not np.array_equal(np.isfinite(found), np.isfinite(expected)):
        return inf
    return float(np.sqrt(measure.nmse(found, expected)))


def noise(
    setting: Setting, one: Mapping[str, np.ndarray], others: Sequence[Mapping[str, np.ndarray]]
) -> dict[Unit, float]:
    """How far honest runs are from one of them, by unit, never less than in any unit before."""
    floors, most = {}, 0.0
    streams = [units(setting, arrays) for arrays in (one, *others)]
    for (unit, expected), *rest in zip(*streams, strict=True):
        errors = (error(unit[1], found, expected) for _, found in rest)
        most = max(most, *(value for value in errors if value < inf))
        floors[unit] = most
    return floors


def tolerances(floors: Mapping[Unit, float], dtype: str, share: float) -> dict[Unit, float]:
    """What each unit may be off: the noise, or a share of the rounding unit, times FACTOR."""
    least = share * float(ml_dtypes.finfo(dtype).eps) / 2
    return {unit: FACTOR * max(floor, least) for unit, floor in floors.items()}


# ---- the candidate -------------------------------------------------------------------------------


class Candidate:
    """The candidate's numbers in our dimensions, unit by unit of any run."""

    def __init__(self, alignment: Alignment, setting: Setting):
        self.total = len(setting.ids)  # positions of the candidate's own run
        self.layered = any(name.startswith("layers.") for name in alignment.taps)
        self.alignment = alignment
        self.taps = {n: tap for n, tap in alignment.taps.items() if tap.found is not None}
        self._readings = {n: list(readings(n, tap.found)) for n, tap in self.taps.items()}

    @property
    def unreadable(self) -> list[str]:
        """Its taps whose shape cannot be read as ours, in the order of execution."""
        return [name for name in self.alignment.taps if name not in self.taps]

    def units(self, setting: Setting) -> Callable[[int, str, np.ndarray], float | None]:
        """error(start, name, array) of a run's units; None for what the candidate does not hold.

        A run of more or fewer ids (a BOS more) is laid along the candidate's from the end.
        """
        return partial(self._error, len(setting.ids) - self.total)

    def _error(self, shift: int, start: int, name: str, array: np.ndarray) -> float | None:
        kept = self.pick(shift, start, name, array)
        if kept is None:
            return None
        places, expected = kept
        found = (self._rows(reading, name, places, expected) for reading in self._readings[name])
        return min(error(name, each, expected) for each in found)

    def pick(self, shift: int, start: int, name: str, array: np.ndarray) -> Any:
        """(rows of the candidate's array, the same rows of a run's), or None if there are none."""
        if name not in self.taps or (shift and name.endswith((".scores", ".probs"))):
            return None
        axis = taps.DIMS[taps.parse(name)[1]].index("T")
        stop = start + array.shape[axis]
        places = [
            (i, position + shift - start)
            for i, position in enumerate(self.taps[name].positions)
            if start <= position + shift < stop
        ]
        if not places:
            return None
        return [i for i, _ in places], widen(array).take([row for _, row in places], axis)

    @staticmethod
    def _rows(array: np.ndarray, name: str, places: list[int], like: np.ndarray) -> np.ndarray:
        dims = taps.DIMS[taps.parse(name)[1]]
        taken = array.take(places, dims.index("T"))
        return taken[..., : like.shape[-1]] if dims.endswith("S") else taken


def readings(name: str, found: Any) -> Iterable[np.ndarray]:
    """The array, and of what has RoPE pairs the array with them in the other order.

    How rows are stored is no mistake, and a pairing that is one shows in the scores.
    """
    yield found
    if taps.parse(name)[1] in PAIRED:
        split = (*found.shape[:-1], 2, -1)
        yield found.reshape(split).swapaxes(-1, -2).reshape(found.shape)
        joined = (*found.shape[:-1], -1, 2)
        yield found.reshape(joined).swapaxes(-1, -2).reshape(found.shape)

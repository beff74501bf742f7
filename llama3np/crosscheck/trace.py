"""Record a run: every tap of one sequence, in memory or written as it comes."""

from __future__ import annotations

import platform
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib import metadata
from math import inf
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama3np import __version__
from llama3np.backend import to_host
from llama3np.config import Config
from llama3np.crosscheck import taps as table
from llama3np.crosscheck.output import new_trace
from llama3np.crosscheck.stored import FLOATS, Spec
from llama3np.crosscheck.taps import DIMS, FORMAT, Trace
from llama3np.errors import InputError
from llama3np.llm import Llama

UNSEEN = {"scores": -inf, "probs": 0.0}  # of a key that comes after the query

# ---- what is recorded ----------------------------------------------------------------------------


class Plan(NamedTuple):
    """What a trace will hold: known before anything is computed."""

    specs: dict[str, Spec]  # by tap name, in the order of execution
    positions: np.ndarray  # those of the T axis, ascending
    S: int  # all positions of the run

    @property
    def nbytes(self) -> int:
        """The bytes of all its numbers."""
        return sum(spec.nbytes for spec in self.specs.values())


def planned(
    config: Config,
    n_tokens: int,
    layers: Collection[int] | None = None,
    positions: Collection[int] | None = None,
    taps: Collection[str] | None = None,
    dtype: Any = np.float32,
) -> Plan:
    """The names, shapes and bytes of a trace of n_tokens ids; None stands for all of a kind.

    layers: of the taps inside of layers; the others (embed, norm, logits) are not affected.
    positions: the rows of the T axis; keys and their scores stay whole. taps: names without the
    layer, such as "q_rope". Raises InputError for what is not there, and if nothing is left.
    """
    chosen = _chosen("layers", layers, config.n_layers)
    rows = np.array(_chosen("positions", positions, n_tokens))
    kinds = set(DIMS if taps is None else taps)
    if unknown := sorted(kinds - DIMS.keys()):
        raise InputError(f"taps: expected some of {', '.join(DIMS)}, found {unknown[0]!r}")
    specs = {}
    for name in table.order(config.n_layers):
        layer, tap = table.parse(name)
        if tap in kinds and (layer is None or layer in chosen):
            specs[name] = Spec(table.shape(name, config, len(rows), n_tokens), np.dtype(dtype))
    if not (specs and len(rows)):
        raise InputError("trace: expected at least one tap at one position, found none selected")
    return Plan(specs, rows, n_tokens)


def _chosen(what: str, given: Collection[int] | None, count: int) -> list[int]:
    for number in given or ():
        if not 0 <= number < count:
            raise InputError(f"{what}: expected numbers from 0 to {count - 1}, found {number}")
    return list(range(count)) if given is None else sorted(set(given))


# ---- running -------------------------------------------------------------------------------------

Tap = Callable[[str, int, Any], None]  # name, position of the first row, the array without B


def run(llm: Llama, ids: Sequence[int], prefill: int | None, tap: Tap) -> None:
    """Feed ids[:prefill] in one call (all of them if None), then one at a time through the cache.

    tap(name, start, array) is shown each tap of each call, its rows at positions start, start + 1,
    ..., where the model computes (backend.to_host copies it from a device).
    Raises InputError for a prefill that is not in 1..len(ids).
    """
    at = calls(len(ids), prefill)
    cache = llm.new_cache(1, len(ids))
    for start, stop in at:
        llm.forward(ids[start:stop], cache, partial(_unbatched, tap, start))


def _unbatched(tap: Tap, start: int, name: str, array_B: Any) -> None:
    tap(name, start, array_B[0])


def calls(n_tokens: int, prefill: int | None) -> list[tuple[int, int]]:
    """The first and last position (exclusive) of each call. Raises InputError as `run` does."""
    first = n_tokens if prefill is None else prefill
    if not 1 <= first <= n_tokens:
        raise InputError(f"prefill: expected 1 to {n_tokens} tokens, found {prefill}")
    return [(0, first), *((at, at + 1) for at in range(first, n_tokens))]


def into(out: Mapping[str, np.ndarray], positions: np.ndarray) -> Tap:
    """A tap that puts the rows at these positions into their place in the arrays of `out`.

    Scores and probabilities of a call end at its last key; those of later keys are filled in.
    """

    def tap(name: str, start: int, array: Any) -> None:
        if name not in out:
            return
        kind = table.parse(name)[1]
        axis = DIMS[kind].index("T")
        lo, hi = np.searchsorted(positions, (start, start + array.shape[axis]))
        if lo == hi:
            return
        ahead = (slice(None),) * axis
        rows, place = (*ahead, _index(positions[lo:hi] - start)), (*ahead, slice(lo, hi))
        shown, room = to_host(array[rows]), out[name][place]
        if kind in UNSEEN:
            room[..., shown.shape[-1] :] = UNSEEN[kind]
            room = room[..., : shown.shape[-1]]
        room[...] = shown

    return tap


def _index(rows: np.ndarray) -> Any:
    """Rows as a slice where they are consecutive, which makes no copy."""
    consecutive = rows[-1] - rows[0] + 1 == len(rows)
    return slice(int(rows[0]), int(rows[-1]) + 1) if consecutive else rows


# ---- recording -----------------------------------------------------------------------------------


def record(
    llm: Llama,
    ids: Sequence[int],
    prefill: int | None = None,
    layers: Collection[int] | None = None,
    positions: Collection[int] | None = None,
    taps: Collection[str] | None = None,
) -> Trace:
    """The taps of one sequence, in memory: float32, or float64 of the profile float64.

    ids: the tokens, at positions 0, 1, ...; prefill: as in `run`; the others as in `planned`.
    Arrays have the dimensions of taps.DIMS, heads in interleaved order. Raises InputError for ids
    outside the vocabulary, and as `planned` and `run` do.
    """
    ids = llm.encode(ids)
    plan = planned(llm.config, len(ids), layers, positions, taps, dtype_of(llm))
    arrays = {name: np.empty(*spec) for name, spec in plan.specs.items()}
    run(llm, ids, prefill, into(arrays, plan.positions))
    return Trace(arrays, described(llm, ids, plan, prefill))


def write(
    path: str | Path,
    llm: Llama,
    ids: Sequence[int],
    prefill: int | None = None,
    layers: Collection[int] | None = None,
    positions: Collection[int] | None = None,
    taps: Collection[str] | None = None,
    facts: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """`record` into a file or directory, one tap of one call in memory at a time; its metadata.

    path: its ending says the form (see output.form). facts: more metadata, such as budgets.
    Raises InputError as `record` and output.new_trace do; then nothing is left there.
    """
    ids = llm.encode(ids)
    plan = planned(llm.config, len(ids), layers, positions, taps, dtype_of(llm))
    meta = described(llm, ids, plan, prefill) | dict(facts or {})
    with new_trace(path, plan.specs, meta) as arrays:
        run(llm, ids, prefill, into(arrays, plan.positions))
    return meta


def dtype_of(llm: Llama) -> np.dtype:
    """What the numbers are written as: float32, which holds those of 16 bits, or float64."""
    return FLOATS["f64" if llm.profile.dtype == "float64" else "f32"]


def described(
    llm: Llama, ids: Sequence[int], plan: Plan, prefill: int | None = None
) -> dict[str, Any]:
    """The metadata that a run knows of itself; docs/crosscheck.md has the table."""
    return {
        "format": FORMAT,
        "config": asdict(llm.config),
        "ids": list(ids),
        "positions": plan.positions.tolist(),
        "prefill": len(ids) if prefill is None else prefill,
        "profile": llm.profile.name,
        "engine": llm.engine.name,
        "device": str(llm.device),
        "versions": versions(llm.engine.name),
    }


def versions(engine: str) -> dict[str, str]:
    """What computed: the package, Python, NumPy, and what the engine needs beside them."""
    found = {"llama3np": __version__, "python": platform.python_version(), "numpy": np.__version__}
    extra = {"numba": "numba", "cupy": "cupy", "cuda": "cupy"}.get(engine)
    if extra == "numba":
        found["numba"] = metadata.version("numba")
    if extra == "cupy":
        import cupy

        found["cupy"] = cupy.__version__
    return found

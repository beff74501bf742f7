"""Run the spec with a mutation: its edited source compiled afresh, its taps shown as they come."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial
from types import ModuleType
from typing import Any

import numpy as np

import llama3np.cache
import llama3np.model
from llama3np.backend import narrow
from llama3np.crosscheck.changes import cut_bits
from llama3np.crosscheck.mutations import Edit, Setting, relayered
from llama3np.numerics import Profile

SOURCES = {"model": llama3np.model, "cache": llama3np.cache}
See = Callable[[int, str, np.ndarray], None]  # the first position of the call, tap, array

Product = Callable[[np.ndarray, Any], np.ndarray]


def source(module: str, edits: tuple[Edit, ...]) -> str:
    """The text of a module with the edits that are of it.

    Raises ValueError for a passage that does not stand there exactly once.
    """
    text = inspect.getsource(SOURCES[module])
    for old, new, of in edits:
        if of == module:
            if text.count(old) != 1:
                raise ValueError(
                    f"{module}.py: expected once, found {text.count(old)} times: {old}"
                )
            text = text.replace(old, new)
    return text


@lru_cache(maxsize=256)
def compiled(module: str, edits: tuple[Edit, ...]) -> ModuleType:
    """A module of the spec with edits; the module itself if none are of it."""
    if not any(edit.module == module for edit in edits):
        return SOURCES[module]
    name = f"{SOURCES[module].__name__} as mutated"
    made = ModuleType(name)
    exec(compile(source(module, edits), name, "exec"), made.__dict__)
    return made


def lines(edits: tuple[Edit, ...]) -> list[tuple[str, str]]:
    """(the spec's line, the line as it would have to read) of every edit, without indentation."""
    found = []
    for edit in edits:
        before = source(edit.module, ())
        start = before.index(edit.old)
        first, last = before.rfind("\n", 0, start) + 1, before.find("\n", start + len(edit.old))
        line = before[first:last]
        found.append((line.strip(), line.replace(edit.old, edit.new).strip()))
    return found


def cut(array: Any, like: Any) -> Any:
    """backend.narrow that cuts to bfloat16 what it should round; other types as it does."""
    if like.dtype != "bfloat16" or array.dtype.itemsize == 2:
        return narrow(array, like)
    return cut_bits(np.ascontiguousarray(array, np.float32)).astype(like.dtype)


def run(setting: Setting, profile: Profile, product: Product | None, see: See) -> None:
    """Run the ids: the prefill in one call, the others one at a time; show every tap of every call.

    product: x_MD @ w.T in place of the spec's own, which is slow, or None. see(start, name, array)
    is shown arrays of one sequence, without a B axis, of the positions from start on; it may raise,
    to end the run.
    """
    model, cache = (compiled(name, setting.edits) for name in SOURCES)
    params, config = layers_in_order(setting)
    ops = model.PLAIN
    if product is not None:
        ops = ops._replace(linear=partial(linear, model, product))
    if profile.narrow_tables:
        ops = ops._replace(rope=partial(narrow_rope, model))
    memory = cache.new_cache(config, 1, len(setting.ids) + 1, profile.dtype)
    ends = [setting.prefill, *range(setting.prefill + 1, len(setting.ids) + 1)]
    start = 0
    for end in ends:
        tap = named_tap(setting, partial(see, start))
        ids_BT = np.array([setting.ids[start:end]])
        with np.errstate(all="ignore"):  # overflows are what some mutations are about
            model.forward(
                params, config, ids_BT, memory, None, profile.dtype, ops, tap, last_only=False
            )
        start = end


def layers_in_order(setting: Setting) -> tuple[Any, Any]:
    """Params and config of the layers that run, in their order."""
    if setting.order is None:
        return setting.params, setting.config
    config = replace(setting.config, n_layers=len(setting.order))
    layers = setting.params.layers
    return relayered(setting.params, setting.order, lambda i: layers[i]), config


def named_tap(setting: Setting, see: Callable[[str, np.ndarray], None]) -> Any:
    """A tap of model.forward that drops the B axis and calls layers as the setting does."""

    def tap(name: str, array: np.ndarray) -> None:
        if setting.called is not None and name.startswith("layers."):
            _, step, rest = name.split(".")
            name = f"layers.{setting.called[int(step)]}.{rest}"
        see(name, array[0])

    return tap


def linear(model: Any, product: Product, x_BTD: Any, w: Any) -> Any:
    """model.linear by another product, rounded as the mutated spec rounds."""
    x_MD = model.widen(x_BTD.reshape(-1, x_BTD.shape[-1]))
    return model.narrow(product(x_MD, w), x_BTD).reshape(*x_BTD.shape[:-1], w.shape[0])


def narrow_rope(model: Any, x_BTNH: Any, cos_BTP: Any, sin_BTP: Any, pairing: str) -> Any:
    """numerics.narrow_rope of a mutated spec: tables, products and sums in the type of x."""
    cos_BTP, sin_BTP = model.narrow(cos_BTP, x_BTNH), model.narrow(sin_BTP, x_BTNH)
    return model.rope(x_BTNH, cos_BTP, sin_BTP, pairing)

"""Mistakes that ports of Llama make: an id, a sentence for the porter, and the spec with it.

A mistake of the forward pass is an edit of the source text of model.py or cache.py, so that a
report can show the line as it would have to read; the others change the config, the weights, the
order of the layers or the token ids. edits.py and changes.py hold the two tables.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any, NamedTuple

from llama3np.config import Config
from llama3np.params import Layer, Params


class Edit(NamedTuple):
    """A passage of the spec's source, and how a wrong implementation has it."""

    old: str  # stands in the module's text exactly once
    new: str
    module: str = "model"  # or "cache"


class Layers(Sequence):
    """Layers that are changed when they are first asked for: most runs are given up early."""

    def __init__(self, items: Sequence[Any], change: Callable[[Any], Layer]):
        self._items, self._change = items, change
        self._made: dict[int, Layer] = {}

    def __len__(self) -> int:
        return len(self._items)

    def __getitem__(self, i: Any) -> Any:
        if not 0 <= i < len(self):
            raise IndexError(i)
        if i not in self._made:
            self._made[i] = self._change(self._items[i])
        return self._made[i]


def relayered(params: Params, items: Sequence[Any], change: Callable[[Any], Layer]) -> Params:
    """Params whose layers are made of other things when they are first asked for."""
    return params._replace(layers=Layers(items, change))  # type: ignore[arg-type]


class Setting(NamedTuple):
    """All that a run of the spec depends on; a mutation makes another one of it."""

    config: Config
    params: Params
    ids: tuple[int, ...]
    prefill: int  # so many ids in one call, the others one at a time
    bos_id: int | None = None  # None: not known, the first id is taken for it
    edits: tuple[Edit, ...] = ()
    order: tuple[int, ...] | None = None  # which layer runs at each step; None: 0, 1, 2, ...
    # By which layer number a step's taps are called: a port may count steps, or name its weights.
    called: tuple[int, ...] | None = None

    def edited(self, *edits: Edit) -> Setting:
        """The same run of a spec with these passages changed too."""
        return self._replace(edits=self.edits + edits)


Case = tuple[str, Setting]  # which of a mutation's forms ("layer 3"; "" if it has one), and its run


class Mutation(NamedTuple):
    """A mistake. `cases` makes its forms for a run: none where it cannot be made there."""

    id: str
    sentence: str
    cases: Callable[[Setting], Iterable[Case]]


def edit(id: str, sentence: str, *edits: Edit) -> Mutation:
    """A mutation of one form, that only changes the source."""
    return Mutation(id, sentence, lambda run: [("", run.edited(*edits))])


def edits(id: str, sentence: str, forms: dict[str, tuple[Edit, ...]]) -> Mutation:
    """A mutation of several forms, each of which only changes the source."""
    return Mutation(
        id, sentence, lambda run: [(form, run.edited(*some)) for form, some in forms.items()]
    )


def configured(id: str, sentence: str, change: Callable[[Config], Config | None]) -> Mutation:
    """A mutation of the config; None, or an equal one, where it cannot be made."""

    def cases(run: Setting) -> Iterator[Case]:
        config = change(run.config)
        if config is not None and config != run.config:
            yield "", run._replace(config=config)

    return Mutation(id, sentence, cases)


@cache
def table() -> dict[str, Mutation]:
    """Every mutation by its id; of two that give the same numbers the first is the likelier."""
    from llama3np.crosscheck import changes, edits

    listed: list[Mutation] = [*edits.TABLE, *changes.TABLE]
    found: dict[str, Any] = {mutation.id: mutation for mutation in listed}
    if len(found) != len(listed):
        raise ValueError("mutations: two of them have one id")
    return found

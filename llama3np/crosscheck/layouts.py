"""The shapes in which others keep a tap, and how each is read as ours.

A layout is a word of dimension letters, one for each axis; those in parentheses are flattened into
one: "T(NH)" has shape (T, N*H). Axes of size 1, such as a batch of one sequence, may stand anywhere
and may be left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import product
from math import prod

import numpy as np

# By the dimensions of a tap: the layouts that are known, ours first.
HEADS = ("TNH", "T(NH)", "NTH", "TKGH", "KGTH", "HNT", "(NH)T", "HTN")
LAYOUTS = {
    "TD": ("TD", "DT"),
    "TF": ("TF", "FT"),
    "TV": ("TV", "VT"),
    "TNH": HEADS,
    "TKH": ("TKH", "T(KH)", "KTH", "HKT", "(KH)T", "HTK", *HEADS),  # HEADS: one for each query head
    "NTS": ("NTS", "KGTS", "TNS", "NST", "STN"),
}
MASKED = -1e4  # a score from here down is masked: people fill with -inf, -1e9, a dtype's lowest
ORDERS = {
    "NTH": "heads before positions",
    "KTH": "heads before positions",
    "KGTH": "heads before positions",
    "TNS": "positions before heads",
}


@dataclass(frozen=True)
class Layout:
    """One way to read an array as a tap of ours."""

    dims: str  # the tap's own
    word: str
    reversed: bool  # its shape is written back to front, as ggml does, its numbers are in order
    sizes: Mapping[str, int]  # of every letter but T; of S as many as there are in the array
    keys: int  # S, positions that there are

    @property
    def axes(self) -> list[str]:
        """The letters of each axis, N as the K and G that it is made of."""
        inside = False
        found: list[str] = []
        for letter in self.word:
            if letter in "()":
                inside = letter == "("
                found += [""] * inside
            elif inside:
                found[-1] += letter
            else:
                found.append(letter)
        return [axis.replace("N", "KG") for axis in found]

    @property
    def repeated(self) -> bool:
        """Whether a key/value head stands there once for each of its query heads."""
        return self.dims == "TKH" and ("N" in self.word or "G" in self.word)

    def count(self, shape: tuple[int, ...]) -> int | None:
        """T, if an array of this shape may have this layout."""
        shape = shape[::-1] if self.reversed else shape
        seen = [size for size in shape if size != 1]
        axes = [axis for axis in self.axes if axis == "T" or self._size(axis) != 1]
        if len(seen) < len(axes):
            seen.insert(axes.index("T"), 1)
        fits = len(seen) == len(axes) and all(
            axis == "T" or self._size(axis) == size for axis, size in zip(axes, seen, strict=True)
        )
        return seen[axes.index("T")] if fits else None

    def _size(self, letters: str) -> int:
        return prod(self.sizes[letter] for letter in letters)

    def read(self, array: np.ndarray, raw: bool = False) -> np.ndarray | None:
        """The array in our dimensions, a view where there is one; None if it cannot be that.

        It cannot if keys that are said to be repeated differ, or if there is weight on keys beyond
        the last position; raw scores, which no mask has seen, may hold anything there.
        """
        sizes = {**self.sizes, "T": self.count(array.shape) or 0}
        letters, wanted = "".join(self.axes), self.dims.replace("N", "KG")
        wanted = "TKGH" if self.repeated else wanted
        split = array.reshape([sizes[letter] for letter in letters])
        ours = split.transpose([letters.index(letter) for letter in wanted])
        if self.repeated:
            same = (ours == ours[:, :, :1]) | (ours != ours)  # NaN is told later
            return ours[:, :, 0] if same.all() else None
        full = ours.reshape([sizes[letter] for letter in self.dims])
        if "S" not in self.dims or full.shape[-1] == self.keys:
            return full
        beyond = full[..., self.keys :]
        return full[..., : self.keys] if raw or hidden(beyond).all() else None

    def changes(self, shape: tuple[int, ...]) -> list[str]:
        """What is read differently from ours, in words."""
        order = "transposed" if self.word[-1] == "T" or self.word == "NST" else ""
        found = {
            "a batch axis of 1": len(shape) > len(self.axes),
            "its shape back to front": self.reversed,
            "heads flattened": "(" in self.word,
            ORDERS.get(self.word, order): True,
            "one key/value head for each query head": self.repeated,
            f"keys beyond {self.keys} left out": "S" in self.dims and self.sizes["S"] != self.keys,
        }
        return [words for words, so in found.items() if so and words]


def layouts(dims: str, shape: tuple[int, ...], sizes: Mapping[str, int]) -> Iterator[Layout]:
    """Every layout in which an array of this shape may hold a tap of these dims, likely ones first.

    sizes: of every letter but T, whose number is free; N is K * G.
    """
    keys = sizes["S"]
    longer = sorted({size for size in shape if size > keys}) if "S" in dims else []
    for back_to_front, S, word in product((False, True), (keys, *longer), LAYOUTS[dims]):
        layout = Layout(dims, word, back_to_front, {**sizes, "S": S}, keys)
        in_order = word.rstrip(")")[-1] == dims[-1] and len(shape) > 1
        if (in_order or not back_to_front) and layout.count(shape) is not None:
            yield layout


def hidden(scores: np.ndarray) -> np.ndarray:
    """Where a score is masked, or a probability is 0."""
    return (scores <= MASKED) | (scores == 0)

"""The sizes at which kernels break, and a check of every kernel there."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np

from llama3np.kernels import ggml
from llama3np.kernels.cuda import registry
from llama3np.kernels.cuda.checks.attention import attend, attend_block, combine, rounding, turn
from llama3np.kernels.cuda.checks.products import add, gate_up, project, swiglu
from llama3np.kernels.cuda.checks.rows import embed, every_number, rows_of
from llama3np.kernels.cuda.checks.tokens import obey, pick, settle, sift, weigh
from llama3np.kernels.cuda.registry import FORMATS, PLAIN, STRETCH, Kernel

Case = Callable[..., None]  # one launch and its comparison; takes rng=


def check(kernel: Kernel) -> int:
    """Launch a kernel over the sizes where it might break; return how many these were.

    Raises MismatchError, which names the kernel, the element and both values, and KeyError for a
    kernel of which nothing is known here.
    """
    cases = list(CASES[kernel.entry](kernel))
    for number, case in enumerate(cases):
        case(rng=np.random.default_rng(number))
    return len(cases)


def _product_sizes(kernel: Kernel) -> list[tuple[int, int, int]]:
    """(rows of the weight, its columns, vectors): part of a block and a tile, and one more."""
    d, block = dict(kernel.defines), registry.block_rows(kernel)
    format, M = FORMATS[d["FORMAT"]], d["BATCH"]
    tile = 512 if d["SCALAR"] or format == "F32" else 1024
    fewer = max(1, M - 1)
    if format in PLAIN and d["SCALAR"]:
        return [(1, 3, M), (block + 1, tile, fewer), (block - 1, tile + 1, M), (2, 2 * tile + 6, M)]
    unit = ggml.FORMATS[format].weights if format not in PLAIN else 16 // kernel.stored.itemsize
    return [(1, unit, M), (block + 1, tile, fewer), (block - 1, tile + unit, M)]


def _projects(kernel: Kernel) -> Iterator[Case]:
    for N, K, rows in _product_sizes(kernel):
        sizes = [N] if N == 1 else [N, 1, N - 1]
        yield partial(project, kernel, sizes, K, rows, eps=0.5, parts=33)


def _gate_ups(kernel: Kernel) -> Iterator[Case]:
    for N, K, rows in _product_sizes(kernel):
        yield partial(gate_up, kernel, N, K, rows)


def _adds(kernel: Kernel) -> Iterator[Case]:
    for rounded, (N, K, rows) in enumerate(_product_sizes(kernel)):
        yield partial(add, kernel, N, K, rows, rounded=rounded % 2)


def _row_cases(of: Case) -> Callable[[Kernel], Iterator[Case]]:
    def cases(kernel: Kernel) -> Iterator[Case]:
        format = FORMATS[dict(kernel.defines)["FORMAT"]]
        unit = 1 if format in PLAIN else ggml.FORMATS[format].weights
        for N, K in ((1, unit), (5, 3 * unit), (3, 256 + unit)):
            yield partial(of, kernel, N, K)
        if kernel.entry == "widen" and format in ("F16", "BF16"):
            yield partial(every_number, kernel)

    return cases


# Positions of rows: the first, the ends of stretches and those after them; -1 is an idle row.
EDGES = (0, STRETCH - 1, STRETCH, -1, 2 * STRETCH)


def _attention_cases(of: Case, **options: Any) -> Callable[[Kernel], Iterator[Case]]:
    """For a cache that is full, and for one with room; two heads of keys and values, and one."""

    def cases(kernel: Kernel) -> Iterator[Case]:
        yield partial(of, kernel, 2, 2 * STRETCH + 1, EDGES)
        yield partial(of, kernel, 1, 40, (-1, 31, 6), **options)
        if of is turn and kernel.cached.itemsize == 2:
            yield partial(rounding, kernel, 61)

    return cases


def _blocks(kernel: Kernel) -> Iterator[Case]:
    """Fewer queries and keys than a block has, as many, and more; groups of one and of three."""
    size = dict(kernel.defines)["QUERIES"]
    yield partial(attend_block, kernel, 1, 1, [0], [1], room=0)
    yield partial(attend_block, kernel, 3, 2, [size, 0, 2], [size + 1, size, 3], room=5)


def _always(of: Case, *sizes: tuple[int, ...]) -> Callable[[Kernel], Iterator[Case]]:
    return lambda kernel: (partial(of, kernel, *each) for each in sizes)


CASES: dict[str, Callable[[Kernel], Iterator[Case]]] = {
    "project": _projects,
    "gate_up": _gate_ups,
    "add": _adds,
    "swiglu": _always(swiglu, (1, 1), (256, 2), (257, 8)),
    "widen": _row_cases(rows_of),
    "take": _row_cases(rows_of),
    "embed": _row_cases(embed),
    "turn": _attention_cases(turn),
    "attend": _attention_cases(attend, size=30),  # scores of hundreds
    "combine": _attention_cases(combine),
    "attend_block": _blocks,
    "obey": _always(obey, (1,), (8,)),
    "pick": _always(pick, (7, 1, 32), (3001, 8, 32), (32 * 256 + 1, 2, 32)),
    "weigh": _always(weigh, (7, 1, 32), (3001, 8, 32)),
    "sift": _always(sift, (7, 32), (3001, 32)),
    "settle": _always(settle, (1, 32), (8, 33)),
}

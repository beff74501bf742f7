"""Every CUDA kernel: its source, what it is specialised for, and its parameters.

The sources are the .cu files beside this one, put together as text: NVRTC then needs no header.
A kernel is specialised by macros, and its C prototype is the one description of its parameters.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import ml_dtypes
import numpy as np

FORMATS = (
    "F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q4_K", "Q6_K",
    "Q5_0", "Q5_1", "Q2_K", "Q3_K", "Q5_K",
)  # fmt: skip
PLAIN = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}
VECTORED = FORMATS[:8]  # those that products read 16 bytes at a time; others go weight by weight
CACHED = (np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16))
BATCHES = (1, 2, 4, 8)  # rows that products are specialised for; idle ones fill others up

WARPS = 8  # of a product's block
STRETCH = 256  # positions of attention's block
PARTS = 32  # of a row of logits, when the largest is looked for
BINS = 1024  # of a row's logits by their distance from the largest, when tokens are drawn
HEADS = 8  # query heads of one block of attention, at most
SHARED = 46 * 1024  # bytes of shared memory that every device gives a block, less a little


class Parameter(NamedTuple):
    """One parameter: a number of this dtype, or an array of it."""

    name: str
    dtype: np.dtype
    array: bool


class Kernel(NamedTuple):
    """A kernel, specialised. Equal ones are compiled once."""

    entry: str
    files: tuple[str, ...]
    defines: tuple[tuple[str, int], ...]
    stored: np.dtype = np.dtype(np.uint8)  # what C calls Stored
    cached: np.dtype = np.dtype(np.float32)  # what C calls Cached
    registers: int = 128  # most registers of a thread: the gate's limit

    @property
    def name(self) -> str:
        """Entry and macros, for messages."""
        return " ".join([self.entry, *(f"{name}={value}" for name, value in self.defines)])

    @property
    def source(self) -> str:
        """The whole CUDA C++ text."""
        return "".join(map(_text, ("common.cu", *self.files)))

    @property
    def options(self) -> tuple[str, ...]:
        """The compiler's."""
        return ("--std=c++17", *(f"-D{name}={value}" for name, value in self.defines))

    @property
    def parameters(self) -> tuple[Parameter, ...]:
        """In the order of the C prototype. Raises KeyError for a type that is not known here."""
        types: dict[str, np.dtype] = {
            "int": np.dtype(np.int32),
            "float": np.dtype(np.float32),
            "double": np.dtype(np.float64),
            "long long": np.dtype(np.int64),
            "Stored": self.stored,
            "Cached": self.cached,
        }
        return tuple(
            Parameter(name, types[c], array)
            for c, array, name in _prototype(self.source, self.entry)
        )


@cache
def _text(file: str) -> str:
    return Path(__file__).with_name(file).read_text(encoding="utf-8")


@cache
def _prototype(source: str, entry: str) -> tuple[tuple[str, bool, str], ...]:
    """(C type, whether a pointer, name) of each parameter."""
    found = re.search(rf"__global__[^;{{]*?\b{entry}\(([^)]*)\)", source)
    if found is None:
        raise KeyError(entry)
    pattern = re.compile(r"(?:const )?(long long|\w+)(\*?)(?: __restrict__)? (\w+)")
    matches = [pattern.fullmatch(" ".join(part.split())) for part in found[1].split(",")]
    return tuple((match[1], match[2] == "*", match[3]) for match in matches if match)


# ---- the kernels ------------------------------------------------------------------------------


def weight_kernel(entry: str, format: str, aligned: bool = True, batch: int = 1) -> Kernel:
    """A product, "project", "gate_up" or "add", of a weight of this format and `batch` vectors.

    aligned: rows begin at multiples of 16 bytes. Formats that are not VECTORED never count as such.
    """
    scalar = not (aligned and format in VECTORED)
    # Of a warp. What it holds of each, now and next, has to fit its registers; with one vector two
    # blocks shall share a multiprocessor, with more each number of theirs shall serve more rows.
    rows = 2 if scalar or format in PLAIN or batch == 1 else 4
    defines = {"FORMAT": FORMATS.index(format), "SCALAR": int(scalar), "BATCH": batch, "ROWS": rows}
    files = ("formats.cu", "pieces.cu", "product.cu")
    registers = 128 if batch == 1 else 255
    stored = PLAIN.get(format, np.dtype(np.uint8))
    return Kernel(entry, files, tuple(defines.items()), stored, registers=registers)


SWIGLU = weight_kernel("swiglu", "F32")


def block_rows(kernel: Kernel) -> int:
    """Rows of the weight (pairs of rows, of gate_up) that a block of this product has."""
    rows = WARPS * dict(kernel.defines)["ROWS"]
    return rows // 2 if kernel.entry == "gate_up" else rows


def square_parts(kernel: Kernel) -> int:
    """Sums of squares that a block of the product "add" leaves: one for 16 rows."""
    return dict(kernel.defines)["ROWS"] // 2


def row_kernel(entry: str, format: str) -> Kernel:
    """What reads rows of a weight: "widen", "take" or "embed"."""
    defines = (("FORMAT", FORMATS.index(format)),)
    return Kernel(
        entry,
        ("formats.cu", "rows.cu"),
        defines,
        PLAIN.get(format, np.dtype(np.uint8)),
        registers=64,
    )


def attention_kernel(entry: str, head: int, group: int, cached: np.dtype, pairing: str) -> Kernel:
    """A part of a decode step's attention: "turn", "attend" or "combine"."""
    defines = {
        "HEAD": head,
        "GROUP": group,
        "PAIRING": int(pairing == "half"),
        "CACHED": CACHED.index(cached),
    }
    defines |= _shape(head, group, cached.itemsize)
    return Kernel(entry, ("attend.cu",), tuple(defines.items()), cached=cached, registers=160)


def _shape(head: int, group: int, itemsize: int) -> dict[str, int]:
    """How a block of attention divides positions, heads and numbers among its 128 threads."""
    vec = 16 // itemsize if head % (16 // itemsize) == 0 else 1
    lanes = min(32, 1 << (head // vec - 1).bit_length())
    chunks = -(-head // (vec * lanes))

    def fits(heads: int) -> bool:
        shared = 4 * heads * (STRETCH + 128 // lanes * head)
        return shared <= SHARED and heads * vec * chunks <= 64

    heads = next((n for n in (HEADS, 4, 2) if fits(n)), 1)
    return {"HEADS": min(heads, group), "VEC": vec, "LANES": lanes, "CHUNKS": chunks}


def query_shares(kernel: Kernel) -> int:
    """Blocks that share the query heads of one key/value head."""
    defines = dict(kernel.defines)
    return -(-defines["GROUP"] // defines["HEADS"])


def token_kernel(entry: str) -> Kernel:
    """What brings tokens in, and chooses: "obey", "pick" and "settle", or "weigh" and "sift"."""
    return Kernel(entry, ("tokens.cu",), (("BINS", BINS),), registers=64)


def prefill_kernel(head: int, cached: np.dtype) -> Kernel:
    """Attention of many queries, by blocks of queries and keys: "attend_block"."""
    size = 32 if head <= 128 else 16 if head <= 256 else 8  # shared memory holds keys and values
    defines = {"HEAD": head, "CACHED": CACHED.index(cached), "QUERIES": size, "KEYS": size}
    return Kernel(
        "attend_block", ("prefill.cu",), tuple(defines.items()), cached=cached, registers=168
    )


# ---- all of them, for the gates ------------------------------------------------------------------

HEAD_SHAPES = ((128, 4), (64, 4), (64, 3), (128, 8), (128, 16), (80, 1), (256, 8), (10, 3), (2, 1))


def every_kernel() -> Iterator[Kernel]:
    """Every kernel, for all formats and batches, and for heads as models have them and odd ones."""
    for format, aligned, batch in product(FORMATS, (True, False), BATCHES):
        if aligned == (format in VECTORED) or format in PLAIN:
            for entry in ("project", "gate_up", "add"):
                yield weight_kernel(entry, format, aligned, batch)
    yield SWIGLU
    for format, entry in product(FORMATS, ("widen", "take", "embed")):
        yield row_kernel(entry, format)
    for (head, group), cached in product(HEAD_SHAPES, CACHED):
        for entry in ("turn", "attend", "combine"):
            yield attention_kernel(entry, head, group, cached, "interleaved")
        yield attention_kernel("turn", head, group, cached, "half")
    yield from map(token_kernel, ("obey", "pick", "settle", "weigh", "sift"))
    for (head, _), cached in product(HEAD_SHAPES, CACHED):
        yield prefill_kernel(head, cached)

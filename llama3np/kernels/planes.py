"""GGUF blocks decoded into columns, for NumPy: long steps over one place of all blocks at once.

A block is 16 or more bytes beside a scale, too few for NumPy, whose every step costs as much as
dozens of numbers. So the first word of all blocks of all rows is cut out, then the second, and so
on: each field of a word makes a plane, one number of every block. The numbers of a row come to
stand in a column, in an order of their own that vectors must take as well. The numbers are those
of ggml.decode, to the last bit, at twice its speed.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from llama3np.kernels.blocks import Blocks
from llama3np.kernels.ggml import FORMATS, scales_q4_q5
from llama3np.kernels.widening import from_half

Scales = Callable[[np.ndarray], list[np.ndarray]]  # blocks_ONC -> scales, minima: (S, N, O)


class Planes(NamedTuple):
    """Where the numbers of a block are: A groups of U words, with H numbers in each byte.

    value = scale * (field - offset), or with the minimum added, of each number's own part.
    """

    bits: int  # of a field: 4 or 8
    first: int  # the byte of a block where its words begin
    words: int  # U
    offset: int
    flip: int  # what is exclusive-ored to the words: it makes signed bytes unsigned, 128 more
    scales: Scales  # S is 1 or A * H


def _halves(count: int) -> Scales:
    """How to read the `count` float16 numbers that blocks begin with."""

    def read(blocks_ONC: np.ndarray) -> list[np.ndarray]:
        bits_ONJ = blocks_ONC[:, :, : 2 * count].view("<i2")
        bits_JNO = np.ascontiguousarray(bits_ONJ.transpose(2, 1, 0))
        return list(from_half(bits_JNO, np.empty(bits_JNO.shape, np.float32))[:, None])

    return read


def _of_q4_k(blocks_ONC: np.ndarray) -> list[np.ndarray]:
    n_rows, N, C = blocks_ONC.shape
    both_R8 = scales_q4_q5(blocks_ONC.reshape(-1, C))
    both_ON8 = (s_R8.reshape(n_rows, N, 8) for s_R8 in both_R8)
    return [np.ascontiguousarray(s_ON8.transpose(2, 1, 0)) for s_ON8 in both_ON8]


PLANES = {
    "Q4_0": Planes(4, 2, 4, 8, 0, _halves(1)),
    "Q4_1": Planes(4, 4, 4, 0, 0, _halves(2)),
    "Q8_0": Planes(8, 2, 8, 128, 0x80808080 - 2**32, _halves(1)),
    "Q4_K": Planes(4, 16, 8, 0, 0, _of_q4_k),
}


def _axes(type_name: str) -> tuple[int, int, int, int]:
    """A, U, the 4 bytes of a word, and H."""
    planes, H = PLANES[type_name], 8 // PLANES[type_name].bits
    return FORMATS[type_name].weights // (planes.words * 4 * H), planes.words, 4, H


@lru_cache(maxsize=64)
def order(type_name: str, n_in: int) -> np.ndarray:
    """The place in its row of each number of a column."""
    A, U, four, H = _axes(type_name)
    places_NAHUI = np.arange(n_in).reshape(-1, A, H, U, four)
    return places_NAHUI.transpose(1, 3, 4, 2, 0).reshape(-1)


def decode_columns(w: Blocks, start: int, stop: int, out_KO: np.ndarray) -> None:
    """Fill out_KO, float32 and contiguous, with rows start to stop as columns, in `order`."""
    form, planes, axes = FORMATS[w.type], PLANES[w.type], _axes(w.type)
    blocks_ONC = w.stored[start:stop].reshape(stop - start, -1, form.nbytes)
    n_rows, N, _ = blocks_ONC.shape
    out_AUIHNO = out_KO.reshape(*axes, N, n_rows)
    fields = _fields(blocks_ONC, planes).reshape(out_AUIHNO.shape)
    np.copyto(out_AUIHNO, fields, casting="unsafe")  # small numbers: all are exact
    if planes.offset:
        out_AUIHNO -= np.float32(planes.offset)
    operations = (np.multiply, np.add)
    with np.errstate(all="ignore"):  # a scale that is inf or nan decodes to what it decodes to
        for operate, scale_SNO in zip(operations, planes.scales(blocks_ONC), strict=False):
            scale_A11HNO = scale_SNO.reshape(axes[0], 1, 1, -1, N, n_rows)
            operate(out_AUIHNO, scale_A11HNO, out=out_AUIHNO)


def _fields(blocks_ONC: np.ndarray, planes: Planes) -> np.ndarray:
    """The J fields of each of the X words of a block, int32: (X, J, N, O)."""
    words_ONX = blocks_ONC[:, :, planes.first :].view("<i4")
    words_XNO = words_ONX.transpose(2, 1, 0).copy("C")  # even where it could be a view
    words_XNO ^= np.int32(planes.flip)
    shifts_J11 = np.arange(0, 32, planes.bits, dtype=np.int32)[:, None, None]
    fields_XJNO = words_XNO[:, None] >> shifts_J11
    fields_XJNO &= np.int32(2**planes.bits - 1)
    return fields_XJNO

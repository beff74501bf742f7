"""Compiled products and widening of every stored format, against ggml.decode and float64.

The weights a product sees are those of ggml.decode, bit for bit, so its error is that of the sum:
each product is rounded at most once on its own, and then meets a number of sums on its way.
"""

import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from checks import assert_same
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

pytest.importorskip("numba")

from llama3np.kernels import ggml
from llama3np.kernels.cpu.compiler import jit
from llama3np.kernels.cpu.dots import read_words, row_dot, widen_rows
from llama3np.kernels.cpu.tiles import tile_dots
from llama3np.kernels.ggml import FORMATS, SCALES

UNIT = 2.0**-24  # what one rounding of float32 is off by, at most, relative to its result


@jit
def product(code, address, stride, rows, x, n, y):
    """y = W @ x."""
    for r in range(rows):
        y[r] = row_dot(code, address + r * stride, x, n)


every_format = pytest.mark.parametrize("name", FORMATS)


class Place(NamedTuple):
    """Rows of a format somewhere in a buffer."""

    name: str
    rows: int
    n: int
    start: int
    stride: int  # bytes from row to row

    @property
    def row_bytes(self):
        return self.n // FORMATS[self.name].weights * FORMATS[self.name].nbytes


@st.composite
def places(draw, name):
    blocks = draw(st.integers(1, {1: 400, 32: 40, 256: 20}[FORMATS[name].weights]))
    rows, start, gap = draw(st.integers(1, 4)), draw(st.integers(0, 70)), draw(st.integers(0, 70))
    place = Place(name, rows, blocks * FORMATS[name].weights, start, gap)
    return place._replace(stride=place.row_bytes + gap)


def stored_rows(place, seed, tame):
    """A buffer with the rows in it, and a view of them; tame: numbers near 1, none of them nan."""
    name, rows, n, start, stride = place
    form, rng = FORMATS[name], np.random.default_rng(seed)
    buffer = rng.integers(0, 256, start + rows * stride + 1, dtype=np.uint8)
    shape, strides = (rows, place.row_bytes), (stride, 1)
    stored_RC = np.lib.stride_tricks.as_strided(buffer[start:], shape, strides)
    if tame and form.dtype is not None:
        stored_RC[...] = rng.standard_normal((rows, n)).astype(form.dtype).view(np.uint8)
    for at in SCALES.get(name, []) if tame else []:
        blocks = stored_RC.reshape(rows, -1, form.nbytes, copy=False)
        halves = rng.normal(0, 0.01, blocks.shape[:2]).astype(np.float16)
        blocks[:, :, at : at + 2] = halves[..., None].view(np.uint8)
    return buffer, stored_RC


def decoded(name, stored_RC, n):
    with np.errstate(all="ignore"):
        return ggml.decode(name, np.ascontiguousarray(stored_RC), (len(stored_RC), n))


def compiled_product(place, buffer, x_I):
    name, rows, n, start, stride = place
    y_R = np.full(rows, np.nan, np.float32)
    code, address = FORMATS[name].number, buffer.ctypes.data + start
    product(code, address, stride, rows, x_I.ctypes.data, n, y_R)
    return y_R


def assert_rounded(y, w_RI, x_IM, roundings):
    """Each result is a sum of products of which each was rounded so many times."""
    w_RI, x_IM = w_RI.astype(np.float64), x_IM.astype(np.float64)
    limit = roundings * UNIT / (1 - roundings * UNIT) * (np.abs(w_RI) @ np.abs(x_IM))
    error = np.abs(y - w_RI @ x_IM)
    assert (error <= limit).all(), f"{(error / limit).max()} of the bound"


@every_format
@given(st.data(), seeds, st.integers(0, 15))
def test_product_of_a_row_is_the_sum_within_its_roundings(name, data, seed, shift):
    place = data.draw(places(name))
    n = place.n
    buffer, stored_RC = stored_rows(place, seed, tame=True)
    x_I = np.random.default_rng(seed).standard_normal(n + shift, np.float32)[shift:]
    y_R = compiled_product(place, buffer, x_I)
    # A product is rounded, added to every 64th other, with up to three of what is left after
    # 64s; then come 2 levels of four sums, at most 15 of 16 lanes, and one with the rest of 15.
    assert_rounded(y_R, decoded(name, stored_RC, n), x_I, 1 + n // 64 + 3 + 2 + 15 + 1)


@every_format
@given(st.data(), seeds)
def test_widened_rows_are_the_decoded_rows_bit_for_bit(name, data, seed):
    """Whatever the bits: subnormal, infinite and undefined scales as well."""
    place = data.draw(places(name))
    _, rows, n, start, stride = place
    buffer, stored_RC = stored_rows(place, seed, tame=False)
    room = np.full((rows + 1, n), 7, np.float32)
    address = buffer.ctypes.data + start
    widen_rows(FORMATS[name].number, address, stride, rows, n, room.ctypes.data)
    expected_RI = decoded(name, stored_RC, n)
    both_nan = np.isnan(expected_RI) & np.isnan(room[:-1])
    expected_RI[both_nan] = room[:-1][both_nan] = 0  # one nan is as good as another
    assert_same(room[:-1].view(np.uint32), expected_RI.view(np.uint32), name)
    assert (room[-1] == 7).all()


@every_format
@given(st.data(), seeds, st.sampled_from([np.inf, -np.inf, np.nan]))
def test_product_with_a_damaged_block_is_not_finite(name, data, seed, damage):
    place, form = data.draw(places(name)), FORMATS[name]
    rows, n = place.rows, place.n
    buffer, stored_RC = stored_rows(place, seed, tame=True)
    r, block = (data.draw(st.integers(0, most - 1)) for most in (rows, n // form.weights))
    at = block * form.nbytes + data.draw(st.sampled_from(SCALES.get(name, [0])))
    number = np.array([damage], form.dtype or np.float16).view(np.uint8)
    stored_RC[r, at : at + number.size] = number
    y_R = compiled_product(place, buffer, np.ones(n, np.float32))
    assert_same(np.isfinite(y_R), np.arange(rows) != r, name)


@given(*(st.integers(1, most) for most in (11, 13, 150)), st.integers(0, 3), seeds)
def test_tile_is_the_product_with_the_same_bits_as_each_pair_alone(rows, m, n, gap, seed):
    rng = np.random.default_rng(seed)
    w_RI = rng.standard_normal((rows, n), np.float32)
    x_MI = rng.standard_normal((m, n + gap), np.float32)[:, :n]
    room_MR = np.full((m, rows + 2), 7, np.float32)

    def tile(w, r, x, j, y_MR):
        ends = x_MI.strides[0], j, n, y_MR.ctypes.data, y_MR.strides[0]
        tile_dots(0, w.ctypes.data, 4 * n, r, x.ctypes.data, *ends)

    tile(w_RI, rows, x_MI, m, room_MR)
    alone_MR = np.empty((m, rows), np.float32)
    for j in range(m):
        for r in range(rows):
            tile(w_RI[r:], 1, x_MI[j:], 1, alone_MR[j:, r:])
    assert_same(room_MR[:, :rows], alone_MR, "tile")
    assert (room_MR[:, rows:] == 7).all()
    # A product is rounded, added to every 16th other, in 4 levels to those of other lanes, and
    # to a rest of at most 15, which is one sum.
    assert_rounded(alone_MR.T, w_RI, x_MI.T, 1 + n // 16 + 4 + 15 + 1)


@given(st.integers(0, 5000), st.integers(0, 70), seeds)
def test_reading_sees_every_byte(nbytes, start, seed):
    buffer = np.random.default_rng(seed).integers(0, 256, start + nbytes, dtype=np.uint8)
    whole = nbytes // 1024 * 1024
    words = buffer[start : start + whole].view(np.int64)
    rest = buffer[start + whole :].astype(np.int64)
    expected = np.bitwise_xor.reduce(words) ^ np.bitwise_xor.reduce(rest)
    assert read_words(buffer.ctypes.data + start, nbytes) == expected


def test_forms_for_other_processors_pass_as_well():
    """The same tests with nothing but what every processor of this kind has."""
    if os.environ.get("NUMBA_CPU_NAME") == "generic":
        pytest.skip("these are they")
    root = Path(__file__).parent.parent
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    environment = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": ""}
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout

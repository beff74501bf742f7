"""How a weight lies on the device, such that a kernel can read it 16 bytes at a time.

Plain numbers are device arrays, as they are in the file. A row of GGUF blocks is not: 34 bytes of
Q8_0 put most of its numbers across the borders of 16. The same bytes lie apart here: first the
numbers of all blocks, then what scales them (formats.cu says where each of them is).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import cupy as cp
import numpy as np

from llama3np.kernels.blocks import Blocks
from llama3np.kernels.cuda.launch import launch
from llama3np.kernels.cuda.registry import PLAIN, VECTORED, row_kernel
from llama3np.kernels.ggml import FORMATS

# Bytes of a block that lie together in its section, one section after the other. Q6_K's are the
# low nibbles, the high pairs, the scales, and the scale of these.
SECTIONS = {
    "Q8_0": ((2, 34), (0, 2)),
    "Q4_0": ((2, 18), (0, 2)),
    "Q4_1": ((4, 20), (0, 4)),
    "Q4_K": ((16, 144), (0, 16)),
    "Q6_K": ((0, 128), (128, 192), (192, 208), (208, 210)),
}
_NAMES = {dtype: name for name, dtype in PLAIN.items()}


class DeviceBlocks:
    """A matrix in GGUF blocks on the device, that is never decoded as a whole.

    `data` has its bytes (uint8), as `repack` lays them out. `w[start:stop]` and `w[ids]` are rows
    in float32, with the bits that ggml.decode gives.
    """

    ndim = 2
    dtype = np.dtype(np.float32)  # of the weights, not of what is stored

    def __init__(self, type_name: str, data: Any, shape: tuple[int, int]):
        self.type, self.data, self.shape = type_name, data, shape
        self.nbytes, self.size = data.nbytes, shape[0] * shape[1]

    def __getitem__(self, rows: Any) -> Any:
        """Rows by a slice without a step, or by an integer device array of any shape."""
        if isinstance(rows, slice):
            start, stop, _ = rows.indices(self.shape[0])
            return rows_of(self, start, max(start, stop))
        taken_ID = taken(self, rows.reshape(-1))
        return taken_ID.reshape(*rows.shape, self.shape[1])


def upload(w: Any, put: Callable[[np.ndarray], Any] = cp.asarray) -> Any:
    """A weight on the device, the same number of bytes: an array, or DeviceBlocks.

    w: a host array, Half, Joined or Blocks. put: brings a contiguous host array there.
    """
    if isinstance(w, Blocks):
        return DeviceBlocks(w.type, put(repack(w.type, w.stored)), w.shape)
    return put(np.ascontiguousarray(getattr(w, "stored", w)))


def format_of(w: Any) -> str:
    """The name in registry.FORMATS of a weight on the device; KeyError for a dtype without one."""
    return w.type if isinstance(w, DeviceBlocks) else _NAMES[w.dtype]


def stored(w: Any) -> Any:
    """The array that kernels read."""
    return w.data if isinstance(w, DeviceBlocks) else w


def aligned(w: Any) -> bool:
    """Whether kernels may read rows 16 bytes at a time."""
    whole = isinstance(w, DeviceBlocks) or w.shape[1] * w.itemsize % 16 == 0
    return format_of(w) in VECTORED and whole and stored(w).data.ptr % 16 == 0


# ---- blocks ------------------------------------------------------------------------------------


def repack(type_name: str, stored_NC: np.ndarray) -> np.ndarray:
    """The blocks' bytes by sections, (bytes,) uint8; as they are for formats without sections."""
    blocks_RC = stored_NC.reshape(-1, FORMATS[type_name].nbytes)
    if type_name not in SECTIONS:
        return np.ascontiguousarray(blocks_RC).reshape(-1)
    packed = np.empty(blocks_RC.size, np.uint8)
    for section_RC, (start, stop) in _sections(type_name, packed):
        section_RC[...] = blocks_RC[:, start:stop]
        if (type_name, start) == ("Q6_K", 0):
            section_RC[...] = _beside(section_RC, 2, 4)
    return packed


def pieces(type_name: str, stored_NC: np.ndarray, weights: int = 1 << 22) -> Iterator[np.ndarray]:
    """The bytes of `repack` in order, some million weights at a time: never all of them twice."""
    form = FORMATS[type_name]
    blocks = stored_NC.shape[1] // form.nbytes  # of a row
    rows = max(1, weights // max(1, blocks * form.weights))
    for start, stop in SECTIONS.get(type_name, ((0, form.nbytes),)):
        for i in range(0, len(stored_NC), rows):
            blocks_RC = stored_NC[i : i + rows].reshape(-1, form.nbytes)
            section_RC = np.ascontiguousarray(blocks_RC[:, start:stop])
            yield _beside(section_RC, 2, 4) if (type_name, start) == ("Q6_K", 0) else section_RC


def unpack(type_name: str, packed: np.ndarray, n_rows: int) -> np.ndarray:
    """The inverse of `repack`: (rows, bytes of a row)."""
    if type_name not in SECTIONS:
        return packed.reshape(n_rows, -1)
    blocks_RC = np.empty((packed.size // FORMATS[type_name].nbytes, FORMATS[type_name].nbytes), np.uint8)
    for section_RC, (start, stop) in _sections(type_name, packed):
        is_low = (type_name, start) == ("Q6_K", 0)
        blocks_RC[:, start:stop] = _beside(section_RC, 4, 2) if is_low else section_RC
    return blocks_RC.reshape(n_rows, -1)


def _sections(type_name: str, packed: np.ndarray) -> list[tuple[np.ndarray, tuple[int, int]]]:
    """Each section as (blocks, bytes of one), and which bytes of a block these are."""
    n, at, found = packed.size // FORMATS[type_name].nbytes, 0, []
    for start, stop in SECTIONS[type_name]:
        size = n * (stop - start)
        found.append((packed[at : at + size].reshape(n, -1), (start, stop)))
        at += size
    return found


def _beside(low_RC: np.ndarray, outer: int, inner: int) -> np.ndarray:
    """Exchange the two middle axes of (R, halves, outer, inner, 8): Q6_K's low nibbles.

    In the file a half has its runs 0 and 2 in 32 bytes, then 1 and 3 in 32. Here 8 bytes of
    those are followed by 8 of these: what one lane takes, in 16.
    """
    return low_RC.reshape(-1, 2, outer, inner, 8).swapaxes(2, 3).reshape(low_RC.shape)


# ---- rows as float32 -----------------------------------------------------------------------------


def rows_of(w: Any, start: int, stop: int, out_IK: Any = None) -> Any:
    """Rows start to stop of any weight on the device, widened into a new array or `out_IK`."""
    N, K = w.shape
    out_IK = cp.empty((stop - start, K), np.float32) if out_IK is None else out_IK
    if stop > start:
        kernel = row_kernel("widen", format_of(w))
        arguments = {"w": stored(w), "N": N, "K": K, "start": start, "out": out_IK, "pitch": K}
        launch(kernel, (stop - start,), 256, **arguments)
    return out_IK


def taken(w: Any, ids_I: Any) -> Any:
    """Rows of these ids, integers on the device that are known to be in range, in float32."""
    (N, K), ids_I = w.shape, ids_I.astype(np.int32)
    out_IK = cp.empty((len(ids_I), K), np.float32)
    if len(ids_I):
        arguments = {"w": stored(w), "N": N, "K": K, "ids": ids_I, "out": out_IK, "pitch": K}
        launch(row_kernel("take", format_of(w)), (len(ids_I),), 256, **arguments)
    return out_IK

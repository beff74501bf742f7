"""The array module, NumPy or CuPy: every difference between the two lives here."""

from __future__ import annotations

from typing import Any

import numpy as np

from llama3np.errors import InputError


def namespace(array: Any) -> Any:
    """Return the module whose functions take this array: numpy, or cupy for a device array."""
    if isinstance(array, np.ndarray):
        return np
    import cupy

    return cupy.get_array_module(array)


def widen(array: Any) -> Any:
    """Return 16-bit floats as float32 and anything else as it is."""
    return array.astype(np.float32) if array.dtype.itemsize == 2 else array


def host_ids(ids: Any, vocab_size: int) -> np.ndarray:
    """Return token ids as a (B, T) host array, every one of them checked.

    The check is on the host because neither array module does it: NumPy takes a negative index
    from the end, and CuPy wraps any index silently, so a bad id would read another token's row.
    Raises InputError for an empty or unshaped array, a dtype that is not integer, and an id
    outside 0 <= id < vocab_size.
    """
    try:
        ids_BT = np.asarray(ids)
    except ValueError:  # NumPy's own words for a ragged list
        raise InputError("token ids: expected rows of one length, found a ragged list") from None
    if ids_BT.ndim != 2 or ids_BT.size == 0:
        raise InputError(f"token ids: expected shape (B, T) and no empty row, found {ids_BT.shape}")
    if not np.issubdtype(ids_BT.dtype, np.integer):
        raise InputError(f"token ids: expected integers, found {ids_BT.dtype}")
    wrong = (ids_BT < 0) | (ids_BT >= vocab_size)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise InputError(
            f"token ids: expected 0 <= id < {vocab_size} (the vocabulary), found "
            f"{ids_BT[row, column]} at row {row}, position {column}"
        )
    return ids_BT

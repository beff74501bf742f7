"""The key/value cache: preallocated, one length per row, the one object that owns memory."""

from __future__ import annotations

from collections.abc import Sequence
from numbers import Integral
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama3np.backend import current, device_of, namespace, on
from llama3np.errors import InputError

# How keys and values may be stored: "f32" is exact, the others round every number once, to the
# nearest (ties to even). float16 has 11 bits for numbers up to 65504, bfloat16 8 for all.
KV_DTYPES = {
    "f32": np.dtype(np.float32),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
}


class Window(NamedTuple):
    """Where the tokens of one call go: made by Cache.window, used by every layer of that call."""

    positions_BT: Any  # position of every token; padding counts on past its row's end
    rows_M: Any  # row b and
    columns_M: Any  # column t of every real token, M of them, and
    slots_M: Any  # its slot in the cache
    last: Any  # index of every row's last real token, as (B, 1) positions in a (B, T, ...) array
    new_B: np.ndarray  # real tokens of each row
    size: int  # S: slots that some query of the call may see


class Cache:
    """Keys and values of the tokens seen so far, by layer, row and key/value head.

    k, v: a list of L arrays k_BKSH, v_BKSH with S = max_seq_len slots.
    lengths_B: host integers, the tokens that each row holds. Slots from there on hold nothing
    yet, or a trimmed past: they are finite, never seen, and overwritten.

    The dtype is that of the arithmetic, or beside float32 one of 16 bits (see kv_dtype): writing
    rounds, and who reads k_BKSH and v_BKSH widens. Raises InputError for arrays of several shapes
    or dtypes.
    """

    def __init__(self, k: list[Any], v: list[Any], lengths_B: np.ndarray):
        kinds = {(array.shape, str(array.dtype)) for array in (*k, *v)}
        if len(k) != len(v) or len(kinds) != 1:
            found = ", ".join(sorted(f"{dtype} {shape}" for shape, dtype in kinds))
            raise InputError(f"cache: expected keys and values all of one kind, found {found}")
        self.k, self.v, self.lengths_B = k, v, lengths_B

    @property
    def batch(self) -> int:
        """B, the rows."""
        return self.k[0].shape[0]

    @property
    def max_seq_len(self) -> int:
        """S, the tokens a row can hold."""
        return self.k[0].shape[2]

    @property
    def nbytes(self) -> int:
        """Bytes reserved for keys and values (an operating system may count them as used later)."""
        return sum(array.nbytes for array in (*self.k, *self.v))

    # ---- what a forward pass does -------------------------------------------------------------

    def check(self, config: Any, dtype: Any, xp: Any = np) -> None:
        """Raise InputError if this is the cache of another model, another precision or device.

        dtype is that of the arithmetic, xp the module of the model's arrays, whose device is the
        current one of this thread (backend.on).
        """
        expected = config.n_layers, config.n_kv_heads, config.head_dim
        k = self.k[0]
        found = len(self.k), k.shape[1], k.shape[3]
        allowed = [str(allowed) for allowed in _stored_dtypes(dtype)]
        if found != expected or str(k.dtype) not in allowed:
            raise InputError(
                f"cache: expected (layers, key/value heads, head size) {expected} in "
                f"{' or '.join(allowed)}, found {found} in {k.dtype}"
            )
        if (found_on := device_of(k)) != (expected_on := current(xp)):
            raise InputError(
                f"cache: expected one that lies on {expected_on}, found one on {found_on}"
            )

    def room(self, shape_BT: tuple[int, int], new_B: Any = None) -> np.ndarray:
        """The counts new_B of T tokens a row, all if not given, for which there is room.

        Raises InputError, before anything changes, if a row would not fit.
        """
        B, T = shape_BT
        if self.batch != B:
            raise InputError(f"cache: expected {self.batch} rows of token ids, found {B}")
        new_B = np.full(B, T) if new_B is None else np.asarray(new_B)
        if new_B.shape != (B,) or (new_B < 0).any() or (new_B > T).any():
            raise InputError(f"cache: expected {B} counts from 0 to {T}, found {new_B.tolist()}")
        ends_B = self.lengths_B + new_B
        if (self.lengths_B < 0).any():
            raise InputError(f"cache: expected lengths from 0 on, found {self.lengths_B.tolist()}")
        if (ends_B > self.max_seq_len).any():
            b = int(ends_B.argmax())
            raise InputError(
                f"cache: row {b} holds {self.lengths_B[b]} tokens and {new_B[b]} more do not fit "
                f"into max_seq_len {self.max_seq_len}"
            )
        return new_B

    def window(self, shape_BT: tuple[int, int], new_B: Any = None) -> Window:
        """Place T tokens in each row, of which the first new_B[b] are real (all, if not given).

        Raises InputError, before anything changes, if a row would not fit.
        """
        (B, T), xp = shape_BT, namespace(self.k[0])
        new_B = self.room(shape_BT, new_B)
        positions_BT = self.lengths_B[:, None] + np.arange(T)
        rows_M, columns_M = np.nonzero(np.arange(T) < new_B[:, None])
        return Window(
            positions_BT=xp.asarray(positions_BT),
            rows_M=xp.asarray(rows_M),
            columns_M=xp.asarray(columns_M),
            slots_M=xp.asarray(positions_BT[rows_M, columns_M]),
            last=(xp.arange(B)[:, None], xp.asarray(new_B - 1)[:, None]),
            new_B=new_B,
            size=max(int((self.lengths_B + new_B).max()), 1),
        )

    def write(self, layer: int, window: Window, k_BTKH: Any, v_BTKH: Any) -> tuple[Any, Any]:
        """Store the real tokens of one layer; return views k_BKSH, v_BKSH of the slots in use."""
        rows_M, columns_M, slots_M = window.rows_M, window.columns_M, window.slots_M
        for array_BKSH, new_BTKH in ((self.k[layer], k_BTKH), (self.v[layer], v_BTKH)):
            array_BKSH[rows_M, :, slots_M] = new_BTKH[rows_M, columns_M]
        return self.k[layer][:, :, : window.size], self.v[layer][:, :, : window.size]

    def advance(self, window: Window) -> None:
        """Count the tokens of a finished call; a call that was broken off leaves no trace."""
        self.lengths_B = self.lengths_B + window.new_B

    # ---- what a caller does -------------------------------------------------------------------

    def trim(self, lengths: int | Sequence[int] | np.ndarray) -> Cache:
        """Forget every token from a length on: one length for all rows, or one for each row."""
        new_B = np.asarray(lengths)
        whole = np.issubdtype(new_B.dtype, np.integer) and new_B.shape in ((), (self.batch,))
        if not whole or (new_B < 0).any() or (new_B > self.lengths_B).any():
            raise InputError(
                f"cache: expected lengths from 0 to {self.lengths_B} to trim to, found {lengths}"
            )
        self.lengths_B = np.broadcast_to(new_B, (self.batch,)).astype(np.int64)
        return self

    def reset(self) -> Cache:
        """Forget everything; the memory is kept."""
        return self.trim(0)

    def fork(self, rows: Sequence[int] | None = None) -> Cache:
        """Copy the given rows (all, if not given; one may be given twice) into a new cache.

        Raises InputError for rows that there are not, and where memory does not suffice.
        """
        chosen = np.arange(self.batch) if rows is None else np.asarray(rows)
        whole = np.issubdtype(chosen.dtype, np.integer) and chosen.ndim == 1 and chosen.size > 0
        if not whole or (chosen < 0).any() or (chosen >= self.batch).any():
            raise InputError(f"cache: expected rows from 0 to {self.batch - 1}, found {rows}")
        try:
            with on(device_of(self.k[0])) as xp:
                there = xp.asarray(chosen)  # once: host indices would be moved each time
                k, v = (
                    [_copy_rows(a, there, self._used) for a in each] for each in (self.k, self.v)
                )
        except MemoryError as error:  # CuPy's OutOfMemoryError is one
            raise InputError(
                f"cache: no memory for a copy of {chosen.size} rows: {error}"
            ) from None
        return Cache(k, v, self.lengths_B[chosen])

    @property
    def _used(self) -> int:
        return int(self.lengths_B.max())


def _copy_rows(array_BKSH: Any, rows: Any, used: int) -> Any:
    """Rows in an array of their own. Slots beyond `used` are untouched zeros, and cost nothing."""
    copy_BKSH = namespace(array_BKSH).zeros((len(rows), *array_BKSH.shape[1:]), array_BKSH.dtype)
    copy_BKSH[:, :, :used] = array_BKSH[rows, :, :used]
    return copy_BKSH


def new_cache(
    config: Any, batch: int, max_seq_len: int, dtype: Any = "float32", xp: Any = np
) -> Cache:
    """Return an empty cache for a batch of rows of at most max_seq_len tokens each.

    dtype is that of the keys and values; see kv_dtype for one of fewer bits than the arithmetic's.
    Zeros, not uninitialised memory: a masked slot has probability 0, and 0 * NaN would be NaN.
    Untouched pages of zeros cost nothing until they are written. Raises InputError for a batch
    or length below 1.
    """
    for name, size in (("batch", batch), ("max_seq_len", max_seq_len)):
        if not (isinstance(size, Integral) and size >= 1):
            raise InputError(f"cache: expected {name} to be a whole number >= 1, found {size!r}")
    shape = (batch, config.n_kv_heads, max_seq_len, config.head_dim)
    k, v = ([xp.zeros(shape, dtype) for _ in range(config.n_layers)] for _ in "kv")
    return Cache(k, v, np.zeros(batch, dtype=np.int64))


def kv_dtype(name: str | None, dtype: Any) -> np.dtype:
    """The dtype to store keys and values in: by its name in KV_DTYPES, or the arithmetic's if None.

    dtype is that of the arithmetic. Raises InputError for an unknown name, and for any name beside
    float64: an oracle that rounds is none.
    """
    if name is None:
        return np.dtype(dtype)
    allowed = [each for each, stored in KV_DTYPES.items() if stored in _stored_dtypes(dtype)]
    if name not in allowed:
        words = f"one of {', '.join(allowed)}" if allowed else "none beside float64"
        raise InputError(f"kv-dtype: expected {words}, found {name!r}")
    return KV_DTYPES[name]


def _stored_dtypes(dtype: Any) -> list[np.dtype]:
    """What may hold the keys and values of this arithmetic, its own type first."""
    own = np.dtype(dtype)
    return list(KV_DTYPES.values()) if own == np.float32 else [own]

"""Made-up weights by an integer formula that any language can follow, to the last bit.

All arithmetic is on unsigned 32-bit integers, modulo 2**32. A tensor is known by Meta's name for it
and a seed; its numbers are counted in C order, i = row * columns + column, rows of wq and wk in
Meta's order. Number i is made of byte i % 4, the lowest being 0, of the word w = i // 4:

    key = FNV-1a of "SEED/NAME": from 0x811C9DC5 on, for each byte (key ^ byte) * 0x01000193
    x = (w * 0x9E3779B9) ^ key
    x = (x ^ (x >> 16)) * 0x85EBCA6B
    x = ((x ^ (x >> 13)) + key) * 0xC2B2AE35
    x = x ^ (x >> 16)
    byte = (x >> 8 * (i % 4)) & 255

    a matrix of n columns:  (2 * byte - 255) / 2**e, e >= 7 the smallest with 3 * 4**(e-7) >= 2 * n
    attention.wo:           the same, with e + 2 in place of e
    a vector (a norm):      (112 + byte // 8) / 128

So every number has at most 8 significant bits and is the same in bfloat16, float16 and float32. A
matrix has mean 0 and a standard deviation of 147.8 / 2**e, from 0.71 to 1.41 times 1 / sqrt(n), so
all that it makes is of order 1; norms lie from 0.875 to 1.117. wo is a fourth of that because
attention takes means over tokens: 32 layers of it would leave the logits of any two positions
alike (correlation 0.86); so it is 0.05, and their standard deviation stays 1 at 126 layers.

For example, with seed 0, "layers.0.attention.wq.weight" of 4096 columns has the key 0xEC6C13F0 and
e = 13; word 0 ends as 0x4C831B94, so row 0 begins with 41, -201, 7 and -103 over 8192.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from llama3np.config import Config
from llama3np.load import names
from llama3np.load.checkpoint import DTYPES
from llama3np.load.lazy import Lazy
from llama3np.params import Params, from_named, named_shapes

CHUNK = 1 << 20  # numbers at a time: a few MB with all that is computed on the way

# ---- the formula ------------------------------------------------------------------------------


def key(name: str, seed: int) -> np.uint32:
    """What tells the tensors apart: a 32-bit hash of the seed and Meta's name."""
    hash = 0x811C9DC5
    for byte in f"{seed}/{name}".encode():
        hash = (hash ^ byte) * 0x01000193 & 0xFFFFFFFF
    return np.uint32(hash)


def drawn(key: np.uint32, start: int, stop: int) -> np.ndarray:
    """The random bytes of the numbers from start to stop, uint8."""
    first = start // 4
    x = np.arange(first, -(-stop // 4), dtype=np.uint32)
    x *= np.uint32(0x9E3779B9)
    x ^= key
    x ^= x >> np.uint32(16)
    x *= np.uint32(0x85EBCA6B)
    x ^= x >> np.uint32(13)
    x += key
    x *= np.uint32(0xC2B2AE35)
    x ^= x >> np.uint32(16)
    return x.astype("<u4", copy=False).view(np.uint8)[start - 4 * first : stop - 4 * first]


def exponent(name: str, n_columns: int) -> int:
    """The e of a matrix: it makes the standard deviation about 1 / sqrt(n_columns)."""
    e = 7
    while 3 * 4 ** (e - 7) < 2 * n_columns:
        e += 1
    return e + 2 if name.endswith(".attention.wo.weight") else e


def meanings(name: str, shape: tuple[int, ...]) -> np.ndarray:
    """The number that each of the 256 bytes means in this tensor, float64."""
    bytes_256 = np.arange(256)
    if len(shape) == 1:
        return (112 + bytes_256 // 8) / 128
    return (2 * bytes_256 - 255) / 2 ** exponent(name, shape[1])


# ---- tensors ----------------------------------------------------------------------------------


def tensor(
    name: str, shape: tuple[int, ...], dtype: np.dtype, seed: int, half_rows: int = 0
) -> Lazy:
    """The tensor that Meta calls `name`, in chunks of whole rows.

    half_rows: the head size, for wq and wk whose rows are wanted in Hugging Face's order.
    """
    numbers = meanings(name, shape).astype(dtype)
    row = shape[-1] if len(shape) == 2 else 1
    step = max(1, CHUNK // row)
    step = step if half_rows == 0 else max(1, step // half_rows) * half_rows  # whole heads

    def chunks() -> Iterator[np.ndarray]:
        for start in range(0, shape[0], step):
            stop = min(start + step, shape[0])
            chunk = numbers.take(drawn(key(name, seed), start * row, stop * row))
            chunk = chunk.reshape(stop - start, *shape[1:])
            yield names.to_half(chunk, (stop - start) // half_rows) if half_rows else chunk

    return Lazy(shape, numbers.dtype, chunks)


def params(
    config: Config, dtype: str = "bf16", norm_dtype: str | None = None, seed: int = 0
) -> Params:
    """All weights of a model, as Lazy tensors; norms in a dtype of their own if it is given."""

    def one(ours: str, shape: tuple[int, ...]) -> Lazy:
        its_dtype = DTYPES[norm_dtype or dtype] if len(shape) == 1 else DTYPES[dtype]
        turned = config.rope_pairing == "half" and ours.endswith((".wq", ".wk"))
        half_rows = config.head_dim if turned else 0
        return tensor(names.foreign(ours, "meta"), shape, its_dtype, seed, half_rows)

    return from_named({n: one(n, shape) for n, shape in named_shapes(config).items()}, config)

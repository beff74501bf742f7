"""llama2.c checkpoints: a header, then float32 tensors, each kind for all layers at once.

Two layouts: the legacy one (seven int32, as stories260K.bin has) and version 1 (magic "ak42",
256 bytes). Version 2 holds int8 groups and is refused. Source: llama2.c export.py and run.c.
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama3np.config import Config, from_llama2c
from llama3np.errors import CheckpointError, InputError
from llama3np.kernels import unstored
from llama3np.load import names
from llama3np.load.checkpoint import DTYPES, Checkpoint, Progress, assemble, report
from llama3np.load.files import map_file, new_file, view
from llama3np.load.lazy import chunks_of
from llama3np.params import Params, layer_shapes, named, named_shapes

MAGIC = b"24ka"  # the uint32 0x616b3432, "ak42", little endian
_LEGACY = struct.Struct("<7i")
_VERSION_1 = struct.Struct("<4si7iB")
_VERSION_1_SIZE = 256

# Our names in the order of the file; those of Layer stand once for all layers. The two tables
# are cosines and sines that run.c skips as well.
_LEGACY_ORDER = (
    "embed_VD attn_norm_D wq wk wv wo mlp_norm_D w_gate w_down w_up norm_D cos_SP sin_SP"
)
_VERSION_1_ORDER = "attn_norm_D mlp_norm_D norm_D embed_VD wq wk wv wo w_gate w_down w_up"

Shape = tuple[int, ...]


class _Opened(NamedTuple):
    config: Config
    order: list[str]
    start: int  # of the first tensor


def _with_head(order: str, tied: bool) -> list[str]:
    return order.split() if tied else [*order.split(), "head_VD"]


def plausible(head: bytes) -> bool:
    """Whether a file that begins so can be one: the magic, or seven int32 of sensible size."""
    if head[:4] == MAGIC:
        return True
    if len(head) < _LEGACY.size:
        return False
    dim, ffn_dim, n_layers, n_heads, n_kv_heads, vocab_size, length = _LEGACY.unpack_from(head)
    sizes = (dim, ffn_dim, n_layers, n_heads, n_kv_heads, abs(vocab_size), length)
    return all(0 < size <= 1 << 22 for size in sizes) and n_kv_heads <= n_heads <= dim


def load(path: Path, progress: Progress | None = None) -> Checkpoint:
    """Load a checkpoint and the tok<V>.bin or tokenizer.bin beside it; weights stay mapped.

    Raises CheckpointError for a header or a file size that is not as it should be.
    """
    data = map_file(path)
    config, order, start = _open(data, path)
    shapes = _shapes(config, order)
    expected = start + 4 * sum(map(math.prod, shapes.values()))
    if len(data) != expected:
        raise CheckpointError(f"{path}: expected {expected} bytes for {config}, found {len(data)}")
    stacked = {}
    for name, shape in shapes.items():
        stacked[name] = view(data, np.dtype("<f4"), shape, start)
        start += stacked[name].nbytes
    tensors = _unstacked(stacked, config)
    report(progress, {name: w.nbytes for name, w in tensors.items()}, tensors)
    tokenizer = _tokenizer(path, config)
    stop_ids = tuple(tokenizer.stop_ids) if tokenizer else ()
    return Checkpoint(config, assemble(tensors, config), tokenizer, "llama2.c checkpoint", stop_ids)


def _open(data: mmap.mmap, path: Path) -> _Opened:
    if data[:4] == MAGIC:
        return _open_version_1(data, path)
    if len(data) < _LEGACY.size:
        raise CheckpointError(
            f"{path}: expected a header of {_LEGACY.size} bytes, found {len(data)}"
        )
    *sizes, vocab_size, length = _LEGACY.unpack_from(data)
    tied = vocab_size > 0  # a negative size says that the head follows at the end
    config = from_llama2c([*sizes, abs(vocab_size), length], tied, str(path))
    return _Opened(config, _with_head(_LEGACY_ORDER, tied), _LEGACY.size)


def _open_version_1(data: mmap.mmap, path: Path) -> _Opened:
    if len(data) < _VERSION_1_SIZE:
        raise CheckpointError(f"{path}: expected a header of 256 bytes, found {len(data)}")
    _, version, *sizes, shared = _VERSION_1.unpack_from(data)
    if version != 1:
        kind = " (int8 groups)" if version == 2 else ""
        raise CheckpointError(
            f"{path}: expected a llama2.c export of version 0 or 1, found {version}{kind}"
        )
    config = from_llama2c(sizes, bool(shared), str(path))
    return _Opened(config, _with_head(_VERSION_1_ORDER, config.tied), _VERSION_1_SIZE)


def _shapes(config: Config, order: Iterable[str]) -> dict[str, Shape]:
    """The shape of every part of the file, in its order."""
    table = (config.context_length, config.head_dim // 2)
    V, D = config.vocab_size, config.dim
    of_model = {"embed_VD": (V, D), "norm_D": (D,), "head_VD": (V, D)}
    of_model |= {"cos_SP": table, "sin_SP": table}
    of_layer = layer_shapes(config)._asdict()
    return {
        name: of_model[name] if name in of_model else (config.n_layers, *of_layer[name])
        for name in order
    }


def _unstacked(stacked: dict[str, np.ndarray], config: Config) -> dict[str, np.ndarray]:
    """The parts of the file as named tensors: views, one for each layer."""
    tensors = dict(stacked)
    for field in layer_shapes(config)._fields:
        tensors |= {f"layers.{i}.{field}": w for i, w in enumerate(tensors.pop(field))}
    return {name: tensors[name] for name in named_shapes(config)}


def _tokenizer(path: Path, config: Config) -> Any:
    from llama3np import tokenizer  # not needed for the weights alone

    for file in (f"tok{config.vocab_size}.bin", "tokenizer.bin"):
        if (beside := path.parent / file).is_file():
            found = tokenizer.from_llama2c(beside)
            if found.n_vocab != config.vocab_size:  # the format has no count: it may be cut short
                raise CheckpointError(
                    f"{beside}: expected the {config.vocab_size} tokens of {path.name}, "
                    f"found {found.n_vocab}"
                )
            return found
    return None


def save_llama2c(path: str | Path, config: Config, params: Params) -> None:
    """Write the legacy layout that llama2.c's run reads; weights are widened to float32.

    Raises InputError for what the format has no place for (another theta, epsilon or head size
    than llama2.c's), for weights of other dtypes, and if there is something at `path`.
    """
    config, params = names.with_pairing(config, unstored(params), "interleaved")
    sizes = (config.dim, config.ffn_dim, config.n_layers, config.n_heads, config.n_kv_heads)
    header = (*sizes, config.vocab_size, config.context_length)
    if from_llama2c(header, config.tied, str(path)) != config:
        raise InputError(
            f"{path}: llama2.c checkpoints have theta 10000, epsilon 1e-5, no RoPE scaling and "
            f"heads of dim / n_heads numbers, found {config}"
        )
    sign = 1 if config.tied else -1
    ours = named(params, config.tied)
    for name, w in ours.items():
        if w.dtype not in DTYPES.values():
            raise InputError(
                f"{path}: tensor {name!r}: expected {', '.join(DTYPES)}, found {w.dtype}"
            )
    with new_file(Path(path)) as temporary, temporary.open("wb") as file:
        file.write(_LEGACY.pack(*sizes, sign * config.vocab_size, config.context_length))
        for name in _with_head(_LEGACY_ORDER, config.tied):
            for part in _parts(name, ours, config):
                for chunk in chunks_of(part):
                    file.write(chunk.astype("<f4").tobytes())


def _parts(name: str, ours: dict[str, Any], config: Config) -> list[Any]:
    """What the file holds under one name: a tensor, one tensor for each layer, or a table."""
    if name in ours:
        return [ours[name]]
    if name in ("cos_SP", "sin_SP"):
        freq_P = config.rope_theta ** -(np.arange(0, config.head_dim, 2) / config.head_dim)
        angles_SP = np.arange(config.context_length)[:, None] * freq_P
        return [np.cos(angles_SP) if name == "cos_SP" else np.sin(angles_SP)]
    return [ours[f"layers.{i}.{name}"] for i in range(config.n_layers)]

"""Llama models in GGUF files; the file format itself is gguf_file.py."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama3np.config import Config, from_gguf, scaling_from_divisors
from llama3np.errors import CheckpointError, InputError
from llama3np.kernels import Blocks, unstored
from llama3np.kernels.ggml import FORMATS, decode
from llama3np.load import names
from llama3np.load.checkpoint import Checkpoint, Progress, assemble, report
from llama3np.load.files import view
from llama3np.load.gguf_file import GGUF, MAGIC, Raw, TensorInfo, read, write
from llama3np.params import Params, named

__all__ = [
    "GGUF",
    "MAGIC",
    "Raw",
    "TensorInfo",
    "load",
    "plain_array",
    "read",
    "save_gguf",
    "write",
]

# ---- loading a model -------------------------------------------------------------------------


def load(path: Path, progress: Progress | None = None) -> Checkpoint:
    """Load a Llama model. Matrices stay mapped, in blocks as well; vectors become float32.

    Raises CheckpointError for all that is not as it should be.
    """
    gguf, config, matched, layout = open_file(path)
    weights = {ours: matrix_or_vector(gguf, theirs) for ours, theirs in matched.items()}
    report(progress, {name: w.nbytes for name, w in weights.items()}, weights)
    params = assemble(weights, config)
    tokenizer = tokenizer_of(gguf, path)
    stop_ids = tuple(tokenizer.stop_ids) if tokenizer else ()
    return Checkpoint(config, params, tokenizer, layout, stop_ids)


class Opened(NamedTuple):
    """A file's model with nothing read but its header (and the RoPE divisors)."""

    gguf: GGUF
    config: Config
    matched: dict[str, str]  # our name -> the file's
    layout: str  # "GGUF v3, Q4_1 and Q8_0"


def open_file(path: Path) -> Opened:
    """Read the header, its tensors checked against its settings. Raises InputError as load does."""
    gguf = read(path)
    config = _config(gguf, path)
    shapes = {name: info.shape for name, info in gguf.tensors.items()}
    matched = names.matched(shapes, config, "gguf", str(path))
    return Opened(gguf, config, matched, _layout(gguf))


def _config(gguf: GGUF, path: Path) -> Config:
    embed, head = names.foreign("embed_VD", "gguf"), names.foreign("head_VD", "gguf")
    if embed not in gguf.tensors:
        raise CheckpointError(f"{path}: expected a tensor {embed!r}, found none")
    divisors_P = None
    if names.GGUF_ROPE_DIVISORS in gguf.tensors:
        divisors_P = plain_array(gguf, names.GGUF_ROPE_DIVISORS).astype(np.float32)
    vocab_size, tied = gguf.tensors[embed].shape[0], head not in gguf.tensors
    return from_gguf(gguf.metadata, vocab_size, tied, str(path), divisors_P)


def plain_array(gguf: GGUF, name: str) -> np.ndarray:
    """A tensor of type F32, F16 or BF16 as it lies in the file, read-only."""
    info = gguf.tensors[name]
    dtype = FORMATS[info.type].dtype
    if dtype is None:
        raise CheckpointError(f"tensor {name!r}: expected plain numbers, found {info.type}")
    return view(gguf.data, dtype, info.shape, info.offset)


def matrix_or_vector(gguf: GGUF, name: str) -> np.ndarray | Blocks:
    """A tensor as the file has it: plain numbers or a matrix in blocks, mapped; else decoded."""
    info = gguf.tensors[name]
    if FORMATS[info.type].dtype is not None:
        return plain_array(gguf, name)
    if len(info.shape) == 2:
        return Blocks(info.type, gguf.stored(name))
    return decode(info.type, gguf.stored(name), info.shape)


def tokenizer_of(gguf: GGUF, path: Path) -> Any:
    """The tokenizer in a file, or None. Raises InputError for one that cannot be used."""
    from llama3np import tokenizer  # not needed for the weights alone

    if gguf.metadata.get("tokenizer.ggml.model", "none") == "none":
        return None
    return tokenizer.from_gguf(gguf.metadata, str(path))


def _layout(gguf: GGUF) -> str:
    """The version and the matrices' types, the one with the most bytes first."""
    nbytes: dict[str, int] = {}
    for info in gguf.tensors.values():
        if len(info.shape) == 2:
            nbytes[info.type] = nbytes.get(info.type, 0) + info.nbytes
    types = sorted(nbytes, key=nbytes.__getitem__, reverse=True)
    return f"GGUF v{gguf.version}, {' and '.join(types)}"


# ---- saving a model --------------------------------------------------------------------------


def save_gguf(
    path: str | Path,
    config: Config,
    params: Params,
    extra_metadata: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> None:
    """Write a model as GGUF, each weight in its own dtype, q and k rows interleaved.

    Blocks are written as they are. params may have any weights that gguf_file.write takes, if
    their rows need no other order.

    Raises InputError for a RoPE scaling that GGUF's divisors cannot express, and if there is
    something at `path`.
    """
    config, params = names.with_pairing(config, unstored(params), "interleaved")
    ours = named(params, config.tied)
    tensors = {names.foreign(name, "gguf"): _as_stored(w) for name, w in ours.items()}
    if (scaling := config.rope_scaling) is not None and scaling.factor != 1:
        theta, head_dim = config.rope_theta, config.head_dim
        divisors_P = scaling.divisors_P(theta, head_dim).astype(np.float32)
        if scaling_from_divisors(divisors_P, theta, head_dim, scaling.old_context) != scaling:
            raise InputError(f"{path}: GGUF's RoPE divisors do not determine {scaling}")
        tensors[names.GGUF_ROPE_DIVISORS] = divisors_P
    write(path, _settings(config) | dict(extra_metadata or {}), tensors, progress=progress)


def _as_stored(w: Any) -> Any:
    return Raw(w.type, w.shape, w.stored) if isinstance(w, Blocks) else w


def _settings(config: Config) -> dict[str, Any]:
    settings = {
        "block_count": config.n_layers,
        "context_length": config.context_length,
        "embedding_length": config.dim,
        "feed_forward_length": config.ffn_dim,
        "attention.head_count": config.n_heads,
        "attention.head_count_kv": config.n_kv_heads,
        "attention.key_length": config.head_dim,
        "attention.value_length": config.head_dim,
        "attention.layer_norm_rms_epsilon": float(config.norm_eps),
        "rope.dimension_count": config.head_dim,
        "rope.freq_base": float(config.rope_theta),
        "vocab_size": config.vocab_size,
    }
    if config.rope_scaling is not None:
        settings["rope.scaling.original_context_length"] = config.rope_scaling.old_context
    architecture = {"general.architecture": "llama"}
    return architecture | {f"llama.{key}": value for key, value in settings.items()}

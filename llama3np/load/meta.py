"""Meta's directories: params.json and consolidated.NN.pth, one for each model-parallel rank.

Each shard holds a slice of every matrix, along one axis, and a copy of every norm vector. They
are read as kernels.Joined: nothing is put together before it is multiplied.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama3np.config import LLAMA3_VOCAB, Config, from_meta, meta_ffn_dim
from llama3np.errors import CheckpointError, InputError
from llama3np.kernels import Joined, unstored
from llama3np.load import names, pth
from llama3np.load.checkpoint import Checkpoint, assemble, dtypes, report
from llama3np.load.files import new_directory, read_json
from llama3np.load.lazy import Lazy, Progress, Rows, decoded, told
from llama3np.params import Params, named

SETTINGS = "params.json"
FOLDER = "original"  # where Hugging Face's repositories have these files
_SHARD = re.compile(r"consolidated\.(\d\d)\.pth")

_EMBED, _HEAD = names.foreign("embed_VD", "meta"), names.foreign("head_VD", "meta")
_GATE, _OUT = (names.foreign(f"layers.0.{name}", "meta") for name in ("w_gate", "wo"))

# The axis along which a matrix is cut: its input for what sums over the ranks, else its output
# (llama/model.py: RowParallelLinear and ColumnParallelLinear).
_CUT_INPUT = re.compile(r"layers\.\d+\.(attention\.wo|feed_forward\.w2)\.weight")

# ---- reading ---------------------------------------------------------------------------------


def folder(directory: Path) -> Path | None:
    """Where a directory has Meta's files: in itself, in original/ below it, or nowhere."""
    for place in (directory, directory / FOLDER):
        if (place / SETTINGS).exists() and any(place.glob("consolidated*.pth")):
            return place
    return None


def load(
    directory: Path, progress: Progress | None = None, rope_factor: float | None = None
) -> Checkpoint:
    """Load a directory of a Llama model; weights stay mapped, shards are joined when multiplied.

    rope_factor: of `use_scaled_rope`, in place of what config.meta_rope_factor says. Raises
    CheckpointError for all that is wrong.
    """
    config, tensors, layout = open_directory(directory, rope_factor)
    report(progress, {name: w.nbytes for name, w in tensors.items()}, tensors)
    tokenizer = tokenizer_of(directory)
    stop_ids = tuple(tokenizer.stop_ids) if tokenizer else ()
    return Checkpoint(config, assemble(tensors, config), tokenizer, layout, stop_ids)


class Opened(NamedTuple):
    """A directory's model with nothing read but its settings and the tables of its tensors."""

    config: Config
    tensors: dict[str, np.ndarray | Joined]  # by our names, mapped, in the dtype of the files
    layout: str  # "Meta directory, 8 shards, bf16"


def open_directory(directory: Path, rope_factor: float | None = None) -> Opened:
    """Read the settings and map the tensors, all of them checked. Raises as load does."""
    place = folder(directory) or directory
    files = _shard_files(place)
    shards = [pth.read(file) for file in files]
    _check_alike(shards, files)
    tied = _drop_tied_head(shards)
    config = _config(read_json(place / SETTINGS), shards, tied, place, rope_factor)
    shapes = {name: _merged_shape(name, shards, config.dim) for name in shards[0]}
    matched = names.matched(shapes, config, "meta", str(place))
    tensors = {o: _merged(theirs, shards, config.dim, place) for o, theirs in matched.items()}
    return Opened(config, tensors, _layout(len(files), tensors, config))


def _shard_files(place: Path) -> list[Path]:
    """The shards in order; they must be numbered from 00 without a gap."""
    found = sorted(place.glob("consolidated*.pth"))
    expected = [f"consolidated.{i:02}.pth" for i in range(len(found))]
    for file, wanted in zip(found, expected, strict=True):
        if file.name != wanted:
            raise CheckpointError(f"{place}: expected the shard {wanted}, found {file.name}")
    return found


def _check_alike(shards: Sequence[Mapping[str, np.ndarray]], files: Sequence[Path]) -> None:
    """Every shard has the tensors of the first, in the same shapes and dtypes."""
    first = shards[0]
    for shard, file in zip(shards, files, strict=True):
        for name in sorted(set(first) ^ set(shard)):
            where = "in" if name in shard else "not in"
            raise CheckpointError(
                f"{file}: tensor {name[:200]!r} is {where} this shard, unlike {files[0].name}"
            )
        for name, w in shard.items():
            like = first[name]
            if (w.shape, w.dtype) != (like.shape, like.dtype):
                raise CheckpointError(
                    f"{file}: tensor {name[:200]!r}: expected {like.dtype} {like.shape} as in "
                    f"{files[0].name}, found {w.dtype} {w.shape}"
                )


def _drop_tied_head(shards: Sequence[dict[str, np.ndarray]]) -> bool:
    """Whether the head is the embedding table: absent, or the same numbers of the same storage."""
    for shard in shards:
        if _HEAD in shard and _EMBED in shard and _place(shard[_HEAD]) == _place(shard[_EMBED]):
            del shard[_HEAD]
    return not any(_HEAD in shard for shard in shards)


def _place(w: np.ndarray) -> tuple[Any, ...]:
    return w.dtype, w.shape, w.strides, w.ctypes.data


def _config(
    values: Mapping[str, Any],
    shards: Sequence[Mapping[str, np.ndarray]],
    tied: bool,
    place: Path,
    rope_factor: float | None,
) -> Config:
    """The Config, with the vocabulary and the feed-forward width, which only the tensors tell."""
    first, n, dim = shards[0], len(shards), values.get("dim")
    for name in (_EMBED, _GATE, _OUT):
        if name not in first or first[name].ndim != 2:
            raise CheckpointError(f"{place}: expected a matrix {name!r}, found none")
    width = first[_OUT].shape[1]
    if isinstance(dim, int) and width and dim % width == 0 and dim != n * width:
        raise CheckpointError(
            f"{place}: expected {dim // width} shards, each with {width} of the {dim} columns of "
            f"{_OUT!r}, found {n}"
        )
    vocab_size, _ = _merged_shape(_EMBED, shards, dim)
    source = str(place / SETTINGS)
    return from_meta(values, vocab_size, n * len(first[_GATE]), tied, source, rope_factor)


def _axis(name: str, w: np.ndarray, dim: Any) -> int:
    """The axis along which shards cut a matrix."""
    if name == _EMBED:  # Llama 3 cuts the vocabulary, Llama 1 and 2 cut the width
        return 0 if w.shape[1] == dim else 1
    return 1 if _CUT_INPUT.fullmatch(name) else 0


def _merged_shape(
    name: str, shards: Sequence[Mapping[str, np.ndarray]], dim: Any
) -> tuple[int, ...]:
    w, n = shards[0][name], len(shards)
    if w.ndim != 2:
        return w.shape
    rows, columns = w.shape
    return (n * rows, columns) if _axis(name, w, dim) == 0 else (rows, n * columns)


def _merged(
    name: str, shards: Sequence[Mapping[str, np.ndarray]], dim: int, place: Path
) -> np.ndarray | Joined:
    parts = [shard[name] for shard in shards]
    if parts[0].ndim == 1:
        # By bits, so that NaN is equal to itself: it is as wrong in one shard as in all.
        if any(part.tobytes() != parts[0].tobytes() for part in parts):
            raise CheckpointError(f"{place}: tensor {name!r} differs between the shards")
        return parts[0]
    if len(parts) == 1 and parts[0].dtype.itemsize == 2:
        return parts[0]  # 16-bit matrices are multiplied by chunks anyway
    # A float32 matrix in one part too: the same chunks give the same bits as two or more parts.
    return Joined(parts, _axis(name, parts[0], dim))


def tokenizer_of(directory: Path) -> Any:
    """The tokenizer of a directory, or None. Raises CheckpointError for one that cannot be used."""
    from llama3np import tokenizer  # not needed for the weights alone

    file = tokenizer_file(directory)
    return tokenizer.from_tokenizer_model(file) if file else None


def tokenizer_file(directory: Path) -> Path | None:
    """Where a directory's tokenizer.model is, if it has one."""
    place = folder(directory) or directory
    for beside in (place, place.parent):  # Meta's downloads of Llama 2 have it beside the folder
        if (beside / "tokenizer.model").exists():
            return beside / "tokenizer.model"
    return None


def _layout(n_files: int, tensors: Mapping[str, Any], config: Config) -> str:
    shards = "1 shard" if n_files == 1 else f"{n_files} shards"
    layout = f"Meta directory, {shards}, {dtypes(tensors.values())}"
    scaling = config.rope_scaling
    return f"{layout}, use_scaled_rope taken as factor {scaling.factor:g}" if scaling else layout


# ---- writing ---------------------------------------------------------------------------------


def save_meta(
    directory: str | Path,
    config: Config,
    params: Params,
    model_parallel: int = 1,
    progress: Progress | None = None,
) -> None:
    """Write params.json and consolidated.NN.pth, one for each of `model_parallel` ranks.

    Rows of wq and wk are written interleaved, each weight in its own dtype, one tensor in memory
    at a time. The directory appears whole or not at all. The context length is not written: the
    format has no place for it. Raises InputError for what else it has no place for (heads of
    another size than dim / n_heads, other RoPE scalings), for sizes that `model_parallel` does
    not divide, and if there is a directory that is not empty.
    """
    directory = Path(directory)
    config, params = names.with_pairing(config, unstored(params), "interleaved")
    settings = _settings(config, directory)
    _check_divisible(config, model_parallel, directory)
    ours = named(params, config.tied)
    tensors = {names.foreign(name, "meta"): decoded(w) for name, w in ours.items()}
    shards = [
        {name: _slice(w, _cut(name, config), rank, model_parallel) for name, w in tensors.items()}
        for rank in range(model_parallel)
    ]
    with new_directory(directory) as temporary:
        text = json.dumps(settings) + "\n"
        (temporary / SETTINGS).write_text(text, encoding="utf-8")
        for rank, shard in enumerate(told(shards, progress)):
            pth.save_pth(temporary / f"consolidated.{rank:02}.pth", shard)


def _settings(config: Config, directory: Path) -> dict[str, Any]:
    """params.json; what is read from it must be the config it was made of."""
    multiplier, multiple_of = _ffn_settings(config.dim, config.ffn_dim)
    settings = {
        "dim": config.dim,
        "n_layers": config.n_layers,
        "n_heads": config.n_heads,
        "n_kv_heads": config.n_kv_heads,
        "vocab_size": config.vocab_size,
        "multiple_of": multiple_of,
        "norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
    }
    settings |= {} if multiplier is None else {"ffn_dim_multiplier": multiplier}
    settings |= {} if config.rope_scaling is None else {"use_scaled_rope": True}
    read = from_meta(settings, config.vocab_size, config.ffn_dim, config.tied, str(directory))
    if replace(read, context_length=config.context_length) != config:
        raise InputError(
            f"{directory}: Meta's params.json has no place for {config}: heads have dim / n_heads "
            f"numbers, and RoPE scaling is none or {read.rope_scaling}"
        )
    return settings


def _ffn_settings(dim: int, ffn_dim: int) -> tuple[float | None, int]:
    """ffn_dim_multiplier and multiple_of that give this width: of Meta's own, if one of them does.

    Half a row more than the quotient cannot be truncated to a row less.
    """
    usual = ((None, 256), (1.5, 256), (1.3, 4096), (1.3, 1024), (1.2, 4096))
    for multiplier, multiple_of in usual:
        if meta_ffn_dim(dim, multiplier or 1.0, multiple_of) == ffn_dim:
            return multiplier, multiple_of
    return (ffn_dim + 0.5) / meta_ffn_dim(dim, 1.0, 1), 1


def _check_divisible(config: Config, n: int, directory: Path) -> None:
    sizes = ("n_heads", "n_kv_heads", "ffn_dim", "dim", "vocab_size")
    for name in sizes:
        size = getattr(config, name)
        if n < 1 or size % n:
            raise InputError(
                f"{directory}: expected model_parallel to divide {name} = {size}, found {n}"
            )


def _cut(name: str, config: Config) -> int:
    if name == _EMBED:
        return 0 if config.vocab_size >= LLAMA3_VOCAB else 1
    return 1 if _CUT_INPUT.fullmatch(name) else 0


def _slice(w: Any, axis: int, rank: int, n: int) -> Any:
    """One rank's part of a matrix; all of a norm vector, and of what is not cut."""
    if w.ndim == 1 or n == 1:
        return w
    step = w.shape[axis] // n
    place = slice(rank * step, (rank + 1) * step)
    part = (place,) if axis == 0 else (slice(None), place)
    shape = tuple(step if i == axis else size for i, size in enumerate(w.shape))
    if isinstance(w, Lazy):
        return Lazy(shape, w.dtype, lambda: iter((np.asarray(w)[part],)))
    if axis == 0:
        return Rows(shape, w.dtype, lambda start, stop: w[place][start:stop])
    return Rows(shape, w.dtype, lambda start, stop: w[start:stop][part])

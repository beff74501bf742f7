"""One checkpoint format into another, a few rows of one tensor in memory at a time.

| from, to      | Hugging Face                | Meta                     | GGUF                    |
|---------------|-----------------------------|--------------------------|-------------------------|
| plain numbers | as they are                 | as they are              | as they are, norms f32  |
| GGUF's blocks | float32, which is exact     | float32, which is exact  | as they are             |

That is without a dtype; with one, every tensor gets it, but for GGUF's norms, which stay float32
because llama.cpp wants them so. q8_0 is for GGUF only: matrices become blocks, and those whose
rows are no whole blocks f16, as in llama.cpp's converter.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.kernels import Blocks
from llama3np.kernels.ggml import FORMATS
from llama3np.load import adapters, carry, names, quantize
from llama3np.load.checkpoint import DTYPES
from llama3np.load.files import new_directory, refuse_existing
from llama3np.load.gguf import save_gguf
from llama3np.load.gguf_file import Raw
from llama3np.load.huggingface import save_hf
from llama3np.load.lazy import Progress, Rows, decoded
from llama3np.load.meta import save_meta
from llama3np.load.opened import Opened, open_checkpoint
from llama3np.params import from_named

TARGETS = ("hf", "meta", "gguf")
CHOICES = (*DTYPES, "q8_0")

# general.file_type of a GGUF file by the type of most of its matrices (llama.h, llama_ftype)
_FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9}
_FILE_TYPES |= {"Q2_K": 10, "Q3_K": 12, "Q4_K": 15, "Q5_K": 17, "Q6_K": 18, "BF16": 32}


class Order(NamedTuple):
    """What is asked for."""

    to: str  # of TARGETS
    dtype: str | None = None  # of CHOICES; None: as the source has it
    shard_bytes: int | None = None  # for Hugging Face
    model_parallel: int = 1  # for Meta


def convert(
    source: str | Path,
    out: str | Path,
    to: str | None = None,
    dtype: str | None = None,
    shard_bytes: int | None = None,
    model_parallel: int | None = None,
    progress: Progress | None = None,
    rope_factor: float | None = None,
    adapter: str | Path | None = None,
) -> list[str]:
    """Write the model at `source` to `out`; return a sentence for each thing that is left out.

    to: "hf", "meta" or "gguf"; if None, by the name of `out`: GGUF if it ends in .gguf, else "hf".
    dtype: "f32", "f16", "bf16" or, for GGUF, "q8_0". shard_bytes: of each file, for Hugging Face;
    model_parallel: the number of files, for Meta. rope_factor: as in load_checkpoint.
    adapter: a directory of low-rank adapters in PEFT's layout, which are merged into the weights:
    W + scale B A, summed in float64 and kept in float32, then in the dtype that is asked for; in
    W's own if none is, or float32 where W was in GGUF's blocks.
    progress(done_bytes, total_bytes, tensor_name) is told of what is written. `out` appears whole
    or not at all. Raises InputError for what load_checkpoint refuses, for a model or numbers that
    the target cannot hold, for options that do not fit it, and if there is something at `out`.
    """
    source, out = Path(source), Path(out)
    order = _order(out, to, dtype, shard_bytes, model_parallel)
    if order.to == "gguf" or not out.is_dir() or any(out.iterdir()):
        refuse_existing(out)
    opened = open_checkpoint(source, rope_factor)
    if adapter is not None:
        opened = opened._replace(tensors=_merged(opened, Path(adapter), order))
    notes = _write(opened, out, order, progress)
    from llama3np.load import inspect  # which imports this package's modules itself

    return notes + carry.lost(inspect(source, rope_factor), inspect(out))


def _write(opened: Opened, out: Path, order: Order, progress: Progress | None) -> list[str]:
    """Write weights, tokenizer and settings; return a sentence for a tokenizer left out."""
    config, tensors = _tensors(opened, order)
    params = from_named(tensors, config)
    if order.to == "gguf":
        metadata, notes = carry.metadata(opened, config)
        save_gguf(out, config, params, metadata | _file_type(tensors), progress)
        return notes
    with new_directory(out) as temporary:
        if order.to == "meta":
            save_meta(temporary, config, params, order.model_parallel, progress)
            return carry.meta_files(opened, temporary)
        save_hf(temporary, config, params, order.shard_bytes, progress=progress)
        return carry.hf_files(opened, temporary)


def _order(
    out: Path, to: str | None, dtype: str | None, shard_bytes: int | None, mp: int | None
) -> Order:
    """The order, once its parts fit together."""
    to = to or ("gguf" if out.suffix.lower() == ".gguf" else "hf")
    if to not in TARGETS:
        raise InputError(f"to: expected one of {', '.join(TARGETS)}, found {to!r}")
    if dtype is not None and dtype not in CHOICES:
        raise InputError(f"dtype: expected one of {', '.join(CHOICES)}, found {dtype!r}")
    if dtype == "q8_0" and to != "gguf":
        raise InputError(f"dtype: q8_0 is for GGUF, expected {', '.join(DTYPES)} for {to}")
    if shard_bytes is not None and (to != "hf" or shard_bytes < 1):
        raise InputError(f"shard size: bytes, for Hugging Face; found {shard_bytes} for {to}")
    if mp is not None and to != "meta":
        raise InputError(f"model_parallel: is for Meta's files, found {mp} for {to}")
    return Order(to, dtype, shard_bytes, 1 if mp is None else mp)


# ---- tensors ---------------------------------------------------------------------------------


def _tensors(opened: Opened, order: Order) -> tuple[Config, dict[str, Any]]:
    """The tensors by our names as they are to be written, and the order of their rows."""
    config = replace(opened.config, rope_pairing="half" if order.to == "hf" else "interleaved")
    tensors = {}
    for name, w in opened.tensors.items():
        keeps = isinstance(w, Blocks) and order.dtype in (None, w.type.lower())
        if order.to == "gguf" and keeps:  # GGUF's rows are in one order always
            tensors[name] = w
        else:
            plain = _in_order(name, decoded(w), opened.config, config)
            tensors[name] = _stored_as(plain, name, order)
    return config, tensors


def _merged(opened: Opened, adapter: Path, order: Order) -> dict[str, Any]:
    """The tensors with adapters added: float32, or in the dtype they had if no other is wanted."""
    found = adapters.merged(opened.tensors, adapters.read(adapter, opened.config))
    if order.dtype is not None:
        return found  # cast once, to that dtype, when they are written
    changed = ((n, w) for n, w in opened.tensors.items() if found[n] is not w)
    casts = {n: _cast(found[n], w.dtype, n) for n, w in changed if not isinstance(w, Blocks)}
    return found | casts


def _in_order(name: str, w: Any, found: Config, wanted: Config) -> Any:
    n_heads = {"wq": found.n_heads, "wk": found.n_kv_heads}.get(name.rpartition(".")[2])
    if n_heads is None or found.rope_pairing == wanted.rope_pairing:
        return w
    to_half = wanted.rope_pairing == "half"
    return names.turned(w, n_heads, names.to_half if to_half else names.to_interleaved)


def _stored_as(w: Any, name: str, order: Order) -> Any:
    """The tensor in the dtype that is asked for, made as it is written."""
    if w.ndim == 1 and order.to == "gguf":
        return np.asarray(w).astype(np.float32)
    dtype = order.dtype
    if dtype == "q8_0" and w.shape[1] % quantize.WEIGHTS == 0:
        return _quantized(w, name)
    if dtype is None or DTYPES["f16" if dtype == "q8_0" else dtype] == w.dtype:
        return w
    return _cast(w, DTYPES["f16" if dtype == "q8_0" else dtype], name)


def _quantized(w: Any, name: str) -> Raw:
    """The matrix as Q8_0; one row of the stored bytes is one row of weights."""
    n_out, n_in = w.shape
    row_bytes = n_in // quantize.WEIGHTS * quantize.NBYTES

    def make(start: int, stop: int) -> np.ndarray:
        return quantize.q8_0(w[start:stop], name).reshape(-1, row_bytes)

    return Raw("Q8_0", (n_out, n_in), Rows((n_out, row_bytes), np.dtype(np.uint8), make))


def _cast(w: Any, dtype: np.dtype, name: str) -> Any:
    """The tensor in another dtype. A finite number must stay one: only float16 is too narrow."""

    def narrowed(x: np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore", invalid="ignore"):
            y = x.astype(dtype)
        if not (np.isfinite(y) | ~np.isfinite(x)).all():
            raise InputError(f"tensor {name!r}: has numbers too large for {dtype}; use bf16 or f32")
        return y

    if w.ndim == 1:
        return narrowed(np.asarray(w))
    return Rows(tuple(w.shape), dtype, lambda start, stop: narrowed(w[start:stop]))


def _file_type(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """What a GGUF file says of its own matrices: the type that has the most weights."""
    type_of = {form.dtype: name for name, form in FORMATS.items() if form.dtype is not None}
    weights: dict[str, int] = {}
    for w in tensors.values():
        if len(w.shape) == 2:
            type_name = w.type if isinstance(w, (Raw, Blocks)) else type_of[np.dtype(w.dtype)]
            weights[type_name] = weights.get(type_name, 0) + w.shape[0] * w.shape[1]
    return {
        "general.file_type": _FILE_TYPES[max(weights, key=weights.__getitem__)],
        "general.quantization_version": 2,
    }

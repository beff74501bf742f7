"""OUT as a model: the weights of the lowest validation loss, in a Hugging Face directory.

They are bf16, as those of published models, but where a training began with given weights that
bf16 does not hold: those are float32.

Where adapters are trained, those weights are the merged ones, and OUT/adapter has the adapters
alone in PEFT's layout. (Not OUT itself: transformers, where PEFT is installed, would put them on
what it loads from OUT, which has them already.)
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from llama3np.config import Config
from llama3np.kernels.adapted import Adapted
from llama3np.load import adapters, names, safetensors
from llama3np.load.huggingface import SINGLE
from llama3np.load.lazy import Rows, write_tensor
from llama3np.params import Params, Weight, mapped, named
from llama3np.train import durable
from llama3np.train.lora import SCALE

ADAPTER = "adapter"
BF16 = np.dtype(ml_dtypes.bfloat16)


def dtype_for(given: Params) -> np.dtype:
    """What weights that began as these are written in: bf16 if all given matrices are, or float32.

    given: in any format that load_checkpoint gives.
    """
    tensors = named(given, given.head_VD is given.embed_VD).values()
    return BF16 if all(w.dtype == BF16 for w in tensors if w.ndim == 2) else np.dtype(np.float32)


def rounded(params: Params, dtype: np.dtype) -> Params:
    """The weights in a dtype, a few rows at a time as they are written."""

    def of(w: Weight) -> Any:
        if w.ndim == 1:
            return w.astype(dtype)
        return Rows(tuple(w.shape), dtype, lambda start, stop: w[start:stop].astype(dtype))

    return mapped(params, of)


def as_read(params: Params, dtype: np.dtype) -> Params:
    """The weights that whoever opens OUT will have, rounded to the dtype of its file; float32."""
    return mapped(rounded(params, dtype), lambda w: w[: w.shape[0]].astype(np.float32))


def replace_weights(out: Path, params: Params, dtype: np.dtype) -> None:
    """Put new weights into OUT, in place of the old ones as a whole; config.json fits both.

    params: in host memory, in any format; dtype: of the file. Raises InputError if they cannot be
    written; the old ones are kept.
    """
    tied = params.head_VD is params.embed_VD
    tensors = {
        names.foreign(name, "huggingface"): w
        for name, w in named(rounded(params, dtype), tied).items()
    }
    replace_tensors(out / SINGLE, tensors)


def replace_tensors(path: Path, tensors: Mapping[str, Any]) -> None:
    """Put a safetensors file in place of another, or of none, as a whole."""

    def write(file: BinaryIO) -> None:
        header: Any = safetensors.encoded_header(
            tensors, path, {"format": "pt"}, safetensors.SUPPORTED
        )
        file.write(header)
        for name, w in tensors.items():
            write_tensor(file, name, w)

    durable.replace_file(path, write)


def begin_adapters(out: Path, params: Params, config: Config, base: str) -> None:
    """Write OUT/adapter; base: the path of the model that the adapters of params are for."""
    (out / ADAPTER).mkdir()
    told = json.dumps(adapters.settings(_adapters(params, config), base), indent=2) + "\n"
    (out / ADAPTER / adapters.SETTINGS).write_text(told, encoding="utf-8")
    replace_adapters(out, params, config)


def replace_adapters(out: Path, params: Params, config: Config) -> None:
    """Put the adapters of params, float32, in place of those in OUT/adapter."""
    tensors = adapters.tensors(_adapters(params, config), config)
    replace_tensors(out / ADAPTER / adapters.WEIGHTS, tensors)


def _adapters(params: Params, config: Config) -> adapters.Adapters:
    found = {n: w for n, w in named(params, config.tied).items() if isinstance(w, Adapted)}
    return adapters.Adapters({name: (w.a_RI, w.b_OR) for name, w in found.items()}, SCALE)

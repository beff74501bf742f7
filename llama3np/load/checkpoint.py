"""What every loader returns, and the steps all of them share."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama3np.config import Config
from llama3np.params import Params, check, from_named

# progress(done_bytes, total_bytes, tensor_name), called once for each tensor
Progress = Callable[[int, int, str], None]

# The dtypes a weight may have as a plain array, by their short names.
DTYPES = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}


class Checkpoint(NamedTuple):
    """One model as its files hold it.

    Matrices are mapped float32, float16 or bfloat16 arrays, read-only and not copied, or float32
    decoded from GGUF blocks. Norm vectors are float32 whatever the file has.
    """

    config: Config
    params: Params
    tokenizer: Any  # of llama3np.tokenizer, or None if the files have none
    layout: str  # "Hugging Face directory, 4 safetensors files, bf16"
    stop_ids: tuple[int, ...]  # any of them ends a text


def assemble(tensors: Mapping[str, np.ndarray], config: Config) -> Params:
    """The tree of tensors named as in params.named_shapes, norm vectors widened to float32."""
    widened = {
        name: w.astype(np.float32, copy=False) if w.ndim == 1 else w for name, w in tensors.items()
    }
    params = from_named(widened, config)
    check(params, config)
    return params


def report(progress: Progress | None, tensors: Mapping[str, int]) -> None:
    """Tell `progress` of tensors that are ready; `tensors` gives each one's bytes."""
    if progress is None:
        return
    done, total = 0, sum(tensors.values())
    for name, nbytes in tensors.items():
        done += nbytes
        progress(done, total, name)

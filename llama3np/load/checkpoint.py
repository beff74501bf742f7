"""What every loader returns, and the steps all of them share."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama3np.config import Config
from llama3np.load.lazy import Progress
from llama3np.params import Params, Weight, check, from_named
from llama3np.sample import GREEDY, Sampling

# The dtypes a weight may have as a plain array, by their short names.
DTYPES = {
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
}


class Checkpoint(NamedTuple):
    """One model as its files hold it.

    Matrices are mapped float32, float16 or bfloat16 arrays, read-only and not copied, or a
    kernels.Blocks of a GGUF file, or a kernels.Joined of the shards of Meta's files. Norm vectors
    are float32 whatever the file has.
    """

    config: Config
    params: Params
    tokenizer: Any  # of llama3np.tokenizer, or None if the files have none
    layout: str  # "Hugging Face directory, 4 safetensors files, bf16"
    stop_ids: tuple[int, ...]  # any of them ends a text
    sampling: Sampling = GREEDY  # what the files recommend


def assemble(tensors: Mapping[str, Weight], config: Config) -> Params:
    """The tree of tensors named as in params.named_shapes, norm vectors widened to float32."""
    widened = {
        name: w.astype(np.float32, copy=False) if w.ndim == 1 else w for name, w in tensors.items()
    }
    params = from_named(widened, config)
    check(params, config)
    return params


def report(progress: Progress | None, nbytes: Mapping[str, int], ready: Iterable[str]) -> None:
    """Tell `progress` of each tensor as `ready` yields its name; `nbytes` has all their sizes."""
    done, total = 0, sum(nbytes.values())
    for name in ready:
        done += nbytes[name]
        if progress is not None:
            progress(done, total, name)


def dtypes(weights: Iterable[Any]) -> str:
    """The matrices' dtypes, the most bytes first: "bf16", "bf16 and f32"."""
    nbytes = dict.fromkeys(DTYPES, 0)
    short_name = {dtype: name for name, dtype in DTYPES.items()}
    for w in weights:
        nbytes[short_name[w.dtype]] += w.nbytes if w.ndim == 2 else 0
    return " and ".join(sorted((n for n in nbytes if nbytes[n]), key=nbytes.__getitem__)[::-1])

"""OUT as a model: the weights of the lowest validation loss, bf16, in a Hugging Face directory."""

from __future__ import annotations

from pathlib import Path
from typing import Any, BinaryIO

import ml_dtypes
import numpy as np

from llama3np.backend import to_host
from llama3np.load import names, safetensors
from llama3np.load.huggingface import SINGLE
from llama3np.load.lazy import write_tensor
from llama3np.params import Params, mapped
from llama3np.train import durable
from llama3np.train.flat import Flat

BF16 = np.dtype(ml_dtypes.bfloat16)


def rounded(params: Params) -> Params:
    """The weights in bf16, as they are written."""
    return mapped(params, lambda w: np.asarray(w).astype(BF16))


def replace_weights(out: Path, params: Flat) -> None:
    """Put new weights into OUT, in place of the old ones as a whole; config.json fits both.

    Raises InputError if they cannot be written; the old ones are kept.
    """
    path = out / SINGLE
    tensors = {
        names.foreign(name, "huggingface"): to_host(w).astype(BF16)
        for name, w in params.tensors.items()
    }

    def write(file: BinaryIO) -> None:
        header: Any = safetensors.encoded_header(
            tensors, path, {"format": "pt"}, safetensors.SUPPORTED
        )
        file.write(header)
        for name, w in tensors.items():
            write_tensor(file, name, w)

    durable.replace_file(path, write)

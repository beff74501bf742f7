"""A model's weights, from where its loader left them to the device."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from llama3np.config import Config
from llama3np.kernels.blocks import Blocks
from llama3np.kernels.cuda.staging import Staging
from llama3np.kernels.cuda.weights import DeviceBlocks, pieces
from llama3np.load.lazy import Lazy, Progress
from llama3np.params import Params, from_named, named


def device_params(params: Params, config: Config, progress: Progress | None = None) -> Params:
    """The same tree on the current device, blocks as weights.DeviceBlocks; a tied head stays tied.

    progress(done_bytes, total_bytes, name) is called as the parts of each tensor are under way.
    """
    tensors, done = named(params, config.tied), 0
    total, placed = sum(w.nbytes for w in tensors.values()), {}
    with Staging() as staging:
        for name, w in tensors.items():

            def tell(nbytes: int, name: str = name) -> None:
                nonlocal done
                done += nbytes
                if progress is not None:
                    progress(done, total, name)

            placed[name] = _placed(w, partial(staging.put, tell=tell))
    return from_named(placed, config)


def _placed(w: Any, put: Callable[[Any], Any]) -> Any:
    """weights.upload, but for the host memory that it takes: blocks are laid out part by part."""
    if not isinstance(w, Blocks):
        return put(w)
    packed = Lazy((w.nbytes,), np.dtype(np.uint8), lambda: pieces(w.type, w.stored))
    return DeviceBlocks(w.type, put(packed), w.shape)

"""A model's weights, from where its loader left them to the device."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from llama3np.config import Config
from llama3np.kernels.blocks import Blocks
from llama3np.kernels.cuda.staging import Staging
from llama3np.load.lazy import Lazy, Progress
from llama3np.params import Params, from_named, named

PIECE = 1 << 22  # weights of blocks that are decoded at a time


def device_params(params: Params, config: Config, progress: Progress | None = None) -> Params:
    """The same tree on the current device, bits unchanged but for blocks; a tied head stays tied.

    progress(done_bytes, total_bytes, name) is called as the parts of each tensor are under way.
    """
    tensors, done = named(params, config.tied), 0
    total, placed = sum(map(device_bytes, tensors.values())), {}
    with Staging() as staging:
        for name, w in tensors.items():

            def tell(nbytes: int, name: str = name) -> None:
                nonlocal done
                done += nbytes
                if progress is not None:
                    progress(done, total, name)

            placed[name] = staging.put(_source(w), tell)
    return from_named(placed, config)


def device_bytes(w: Any) -> int:
    """Bytes of a weight on the device."""
    return 4 * w.size if isinstance(w, Blocks) else w.nbytes


def _source(w: Any) -> Any:
    """What Staging.put takes: blocks decoded to float32, part by part."""
    if not isinstance(w, Blocks):
        return w

    def chunks() -> Iterator[np.ndarray]:
        rows = max(1, PIECE // w.shape[1])
        return (w[start : start + rows] for start in range(0, w.shape[0], rows))

    return Lazy(w.shape, w.dtype, chunks)

"""Products of one float32 row by weights of any stored format: the head's, after a prompt.

Reading the weights takes the time, so nothing is laid out: each row of a weight meets x where it
lies. Sums run over all lanes of a vector, see dots.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from llama3np.kernels.cpu.dots import dot_rows
from llama3np.kernels.cpu.gemm import parts_of_all
from llama3np.kernels.cpu.shared import address, aligned
from llama3np.threads import Pool

CHUNK = 2**19  # weights that a thread takes at a time


def products(x_1K: np.ndarray, weights: Sequence[Any], pool: Pool) -> list[np.ndarray]:
    """The product of x with each weight, as gemm.products."""
    K, x_K = x_1K.shape[1], aligned(x_1K.size)
    x_K[:] = x_1K[0]
    y = [np.empty((1, w.shape[0]), np.float32) for w in weights]
    step = max(1, CHUNK // K)
    parts = parts_of_all(weights, K, y)
    tasks = [(part, o) for part in parts for o in range(0, len(part.stored), step)]

    def task(i: int, _: int) -> None:
        (code, stored, y_1O), o = tasks[i]
        rows, row_bytes = min(step, len(stored) - o), stored.strides[0]
        w, y_o = address(stored) + o * row_bytes, address(y_1O) + 4 * o
        dot_rows(code, w, row_bytes, rows, address(x_K), K, y_o)

    pool.map(task, len(tasks))
    return y

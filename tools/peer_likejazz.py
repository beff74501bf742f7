"""likejazz/llama3.np as a program of llama3np.peers: its forward, called with right positions.

Its own `generate` passes position L + 1 after a prompt of L tokens, so that a row of zeros stays
in its cache and the text is another one; so the loop is ours, and everything in it is its own.
options: folder, a copy of its repository; weights, an .npz file with its names.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np

from llama3np.peers import child

NAME = "likejazz/llama3.np"


def likejazz(task: dict[str, Any]) -> Any:
    sys.path.insert(0, task["options"]["folder"])
    from config import ModelArgs  # type: ignore[import-not-found]
    from llama3 import Llama  # type: ignore[import-not-found]

    # Its settings are those of stories15M, but for the epsilon that llama2.c's models have.
    model = Llama(task["options"]["weights"], ModelArgs(norm_eps=1e-5))

    def generate(ids: list[int], count: int) -> Any:
        position = 0
        for _ in range(count):
            logits_11V = model(np.array([ids]), position)
            position += len(ids)
            ids = [int(logits_11V[0, -1].argmax())]
            yield ids[0]

    return generate


if __name__ == "__main__":
    child.main({NAME: likejazz})

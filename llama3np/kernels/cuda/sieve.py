"""Sampling with the device's help: it leaves of a row's logits those among which the draw is.

The draw is the host's: in float64, by sample.draw, and with the numbers of a row's own generator,
as everywhere. What is left out is what top-k or top-p drops for sure; where neither is asked for,
all ids but a part of them, in which the random number falls. See tokens.cu.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import cupy as cp
import numpy as np

from llama3np.kernels.cuda import registry
from llama3np.kernels.cuda.launch import launch
from llama3np.kernels.cuda.pinned import Pinned
from llama3np.kernels.cuda.registry import BINS, PARTS
from llama3np.sample import Candidates, Sampling, all_ids, draw, powers

ROOM = 4096  # candidates of a row, at least a part of it: 32 KiB. If there are more, all are copied


class Found(NamedTuple):
    """What the device writes of each row, side by side in one piece of memory, for one copy."""

    facts_BX: Any  # how many candidates; the largest logit; sums of powers: see tokens.cu, cut_of
    ids_BC: Any
    logits_BC: Any


def found_in(memory: Any, B: int, room: int) -> Found:
    """Views of such memory, an array of bytes of either module."""
    facts, ids = 5 * 8 * B, 4 * room * B
    return Found(
        memory[:facts].view(np.float64).reshape(B, 5),
        memory[facts : facts + ids].view(np.int32).reshape(B, room),
        memory[facts + ids :].view(np.float32).reshape(B, room),
    )


class Sieve:
    """For B rows of V logits. It keeps all that graphs hold addresses of."""

    def __init__(self, B: int, V: int):
        self.B, self.V = B, V
        self.room = min(V, max(ROOM, -(-V // PARTS)))
        self.wishes = Pinned((B, 4), np.float64)  # temperature, top-k, top-p, random number
        self.powers = cp.zeros((B, PARTS), np.float64)
        self.counts = cp.zeros((B, PARTS, BINS), np.int32)
        self.memory = cp.zeros(B * (5 * 8 + 2 * 4 * self.room), np.uint8)
        self.copy = Pinned(self.memory.shape, np.uint8)

    def order(self, sampling: Sampling, numbers_B: Any) -> None:
        """Say what the next launches are to look for."""
        k = min(sampling.top_k, self.V)  # of any size, which float64 is not
        self.wishes.host[:, :3] = sampling.temperature, k, sampling.top_p
        self.wishes.host[:, 3] = numbers_B

    def launches(self, logits_MV: Any, peaks: Any, sums: Any) -> None:
        """Leave the candidates. peaks, sums: of the parts, as the kernel `pick` has left them."""
        row = {"logits": logits_MV, "V": self.V, "peaks": peaks, "wishes": self.wishes.device}
        parts = {"powers": self.powers, "counts": self.counts}
        weigh, sift = map(registry.token_kernel, ("weigh", "sift"))
        launch(weigh, (PARTS, self.B), 256, **row, **parts)
        found = found_in(self.memory, self.B, self.room)
        launch(
            sift, (self.B,), BINS, **row, **parts, sums=sums, parts=PARTS, room=self.room,
            facts=found.facts_BX, ids=found.ids_BC, kept=found.logits_BC,
        )  # fmt: skip

    def drawn(
        self, sampling: Sampling, numbers_B: Any, logits_MV: Any, stream: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """Wait for the candidates and draw: ids_B, and their natural log-probabilities, float64.

        Raises InputError for logits that are not finite.
        """
        self.memory.get(stream=stream, out=self.copy.host)  # waits for it
        found, chosen = found_in(self.copy.host, self.B, self.room), []
        for b, number in enumerate(numbers_B):
            count, peak, total, sum_of_all, before = found.facts_BX[b]
            if count <= self.room and np.isfinite(found.facts_BX[b]).all():
                ids_C, logits_C = (of[b, : int(count)] for of in (found.ids_BC, found.logits_BC))
                powers_C = powers(logits_C, peak, sampling.temperature)
                candidates = Candidates(powers_C, total, before)
            else:  # a flat row, or damage, which all_ids will name
                logits_C, ids_C = logits_MV[b].get(stream=stream), np.arange(self.V)
                candidates = all_ids(logits_C, sampling.temperature)
                sum_of_all = all_ids(logits_C, 1.0).total
            place = draw(candidates, sampling, number)
            chosen.append((ids_C[place], logits_C[place] - peak - np.log(sum_of_all)))
        ids, logprobs = zip(*chosen, strict=True)
        return np.array(ids, np.int64), np.array(logprobs, np.float64)

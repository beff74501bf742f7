"""AdamW, clipping and the learning rate: what makes a step of a gradient."""

from __future__ import annotations

from collections.abc import Iterator
from math import cos, pi, sqrt
from typing import Any, NamedTuple

import numpy as np

from llama3np.backend import namespace
from llama3np.train.flat import Flat

# Numbers at a time: the chunks of all four vectors and what is computed between them, 64 kB each
# in float32, stay in a core's second-level cache. A device has a launch to pay for each chunk.
CHUNK = 1 << 14


class AdamW(NamedTuple):
    """The hyperparameters of AdamW, and its update.

        m <- beta1 m + (1 - beta1) g            v <- beta2 v + (1 - beta2) g^2
        w <- w - rate (m / (1 - beta1^t) / (sqrt(v / (1 - beta2^t)) + epsilon) + decay w)

    Loshchilov & Hutter 2019, algorithm 2 (their eta times alpha is rate, and decay is scaled by it,
    as PyTorch does). Divisors undo the zeros that m and v begin with. Only matrices decay.
    """

    beta1: float
    beta2: float
    epsilon: float
    decay: float

    def update(self, w: Flat, grad: Flat, first: Flat, second: Flat, rate: float, t: int) -> None:
        """Change w, first (m) and second (v) in place, all of one dtype; t is 1 the first time."""
        straight = rate / (1 - self.beta1**t)
        scale = 1 / sqrt(1 - self.beta2**t)
        for chunk in chunks(w.vector, 0, w.matrices):
            w.vector[chunk] *= 1 - rate * self.decay
        for chunk in chunks(w.vector, 0, len(w.vector)):
            g, m, v = grad.vector[chunk], first.vector[chunk], second.vector[chunk]
            m += (1 - self.beta1) * (g - m)
            v *= self.beta2
            v += (1 - self.beta2) * g * g
            root = namespace(v).sqrt(v)
            w.vector[chunk] -= straight * m / (root * scale + self.epsilon)


def chunks(vector: Any, start: int, stop: int) -> Iterator[slice]:
    """Slices that cover start to stop: short ones on the host, a single one on a device."""
    step = CHUNK if namespace(vector) is np else max(1, stop - start)
    return (slice(i, min(i + step, stop)) for i in range(start, stop, step))


def norm(vector: Any) -> float:
    """The Euclidean length; squares are summed in float64, in one order for any number of threads.

    Infinite or not a number if one of the numbers is.
    """
    xp, total = namespace(vector), 0.0
    for chunk in chunks(vector, 0, len(vector)):  # no product of BLAS: its order may change
        total += float(xp.square(vector[chunk], dtype=xp.float64).sum())
    return sqrt(total)


def clip(grad: Flat, limit: float) -> float:
    """Shorten the whole gradient to `limit` if it is longer, in place; return what it was.

    g <- g limit / max(limit, |g|)        Pascanu et al. 2013, the norm of all tensors together
    A gradient that is not finite is left as it is: the caller has to look at the norm.
    """
    length = norm(grad.vector)
    if limit < length < float("inf"):
        for chunk in chunks(grad.vector, 0, len(grad.vector)):
            grad.vector[chunk] *= limit / length
    return length


def learning_rate(step: int, peak: float, warmup: int, steps: int, floor: float) -> float:
    """The rate of step 0 <= step < steps: up to the peak in a line, then half a cosine to floor.

        peak (step + 1) / warmup                                              if step < warmup
        floor + (peak - floor) (1 + cos(pi x)) / 2,  x = (step - warmup) / (steps - 1 - warmup)

    Loshchilov & Hutter 2017 without restarts; warm-up as in nanoGPT. The last step's is the floor,
    but the peak if the warm-up leaves no other step to have it: warmup = steps - 1.
    """
    if step < warmup:
        return peak * (step + 1) / warmup
    x = (step - warmup) / max(1, steps - 1 - warmup)
    return floor + (peak - floor) * (1 + cos(pi * x)) / 2

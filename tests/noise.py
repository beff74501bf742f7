"""What rounding is allowed: measured for each case, against the oracle, and not chosen."""

import ml_dtypes
import numpy as np
import oracle
from checks import difference, largest

ULP32 = 2.0**-23
NOISE = 8  # times the noise of a case; of 200,000 taps measured none was above 3.2 times
SHORT_NOISE = 4  # of 16 bits; of 141,000 taps measured none was above 1.8 times


def oracle_taps(model, ids):
    return oracle.forward(model.tensors, model.sizes, ids)


def noise(model, ids, truth):
    """How far a float32 forward strays from the oracle, by tap, for this model and these ids.

    The largest of four samples: the same scalar loops in float32, and three times in float64
    with every weight moved by up to one float32 ulp, which does to each sum what the rounding of
    its terms does. One sample would not do: a tap of one number may have been rounded luckily.
    Noise is handed on, so that of a tap is never taken to be below that of the taps before it.
    """
    rng = np.random.default_rng(model.seed)
    samples = [oracle.forward(model.tensors, model.sizes, ids, np.float32)]
    return floors([*samples, *moved(model, ids, ULP32, rng)], truth)


def short_noise(model, ids, truth, dtype):
    """What a forward in a 16-bit type is allowed, by tap: weights are moved by up to its eps.

    Numbers below the normal ones have an absolute error, which float16 shows.
    """
    kind = ml_dtypes.finfo(dtype)
    eps, tiny = float(kind.eps), float(kind.smallest_subnormal)
    found = floors(moved(model, ids, eps, np.random.default_rng(model.seed)), truth)
    return {
        name: SHORT_NOISE * (floor + eps + tiny / max(largest(truth[name]), tiny))
        for name, floor in found.items()
    }


def moved(model, ids, by, rng):
    """Three runs in float64 with every weight moved by up to so much of itself."""
    for _ in range(3):
        weights = {
            name: w * (1 + by * rng.uniform(-1, 1, w.shape)) for name, w in model.tensors.items()
        }
        yield oracle.forward(weights, model.sizes, ids)


def floors(samples, truth):
    """The largest error of a sample, by tap, never below that of the taps before it."""
    samples = list(samples)
    errors = [
        max(difference(sample[name], expected) for sample in samples)
        for name, expected in truth.items()
    ]
    return dict(zip(truth, np.maximum.accumulate(errors), strict=True))

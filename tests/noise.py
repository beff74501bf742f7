"""What float32 is allowed: measured for each case, against the oracle, and not chosen."""

import numpy as np
import oracle
from checks import difference

ULP32 = 2.0**-23
NOISE = 8  # times the noise of a case; of 200,000 taps measured none was above 3.2 times


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
    for _ in range(3):
        moved = {
            name: w * (1 + ULP32 * rng.uniform(-1, 1, w.shape)) for name, w in model.tensors.items()
        }
        samples.append(oracle.forward(moved, model.sizes, ids))
    floors = [
        max(difference(sample[name], expected) for sample in samples)
        for name, expected in truth.items()
    ]
    return dict(zip(truth, np.maximum.accumulate(floors), strict=True))

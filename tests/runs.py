"""Short ways to run a drawn model."""

import numpy as np

from llama3np.cache import new_cache
from llama3np.model import PLAIN, forward


def run(model, ids_BT, dtype="float64", **options):
    """Logits of all tokens of a fresh cache with a few slots to spare."""
    ids_BT = np.asarray(ids_BT)
    B, T = ids_BT.shape
    cache = new_cache(model.config, B, T + 3, dtype)
    return extend(model, ids_BT, cache, dtype, **options)


def extend(model, ids_BT, cache, dtype="float64", **options):
    """Logits of all new tokens; the cache goes on."""
    options = {"last_only": False, **options}
    logits_BTV, same = forward(model.params, model.config, ids_BT, cache, dtype=dtype, **options)
    assert same is cache
    return logits_BTV


def trace(model, ids_BT, dtype="float64", ops=PLAIN, **options):
    """The taps of a run, name -> array, in order."""
    taps = {}

    def tap(name, array):
        assert name not in taps, f"tap {name} called twice"
        taps[name] = np.array(array)

    run(model, ids_BT, dtype, ops=ops, tap=tap, **options)
    return taps

"""Short ways to run a drawn model, on the array module of its weights."""

import numpy as np
from devices import to_host

from llama3np import cache
from llama3np.model import PLAIN, forward


def new_cache(model, batch, slots, dtype="float64"):
    """An empty cache beside the model's weights."""
    return cache.new_cache(model.config, batch, slots, dtype, model.xp)


def run(model, ids_BT, dtype="float64", **options):
    """Logits of all tokens of a fresh cache with a few slots to spare."""
    ids_BT = np.asarray(ids_BT)
    B, T = ids_BT.shape
    return extend(model, ids_BT, new_cache(model, B, T + 3, dtype), dtype, **options)


def extend(model, ids_BT, cache, dtype="float64", **options):
    """Logits of all new tokens, on the host; the cache goes on."""
    options = {"last_only": False, **options}
    logits_BTV, same = forward(model.params, model.config, ids_BT, cache, dtype=dtype, **options)
    assert same is cache
    assert isinstance(logits_BTV, model.xp.ndarray)
    return to_host(logits_BTV)


def trace(model, ids_BT, dtype="float64", ops=PLAIN, **options):
    """The taps of a run, name -> array on the host, in order."""
    taps = {}

    def tap(name, array):
        assert name not in taps, f"tap {name} called twice"
        taps[name] = np.array(to_host(array))

    run(model, ids_BT, dtype, ops=ops, tap=tap, **options)
    return taps

"""model.linear by an engine's own products, computed together where one x meets several weights."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from llama3np.backend import narrow, widen
from llama3np.params import Params

# (x_MD, weights) -> x_MD @ w.T for each of them
Products = Callable[[np.ndarray, Sequence[Any]], list[np.ndarray]]


class Linear:
    """model.linear. Whoever asks for the first of wq, wk, wv, or of w_gate, w_up, waits for all.

    So threads wait for each other once, and x is laid out once. The spec asks for the others next,
    with the same x: they are found done. Any number of threads may call at once.
    """

    def __init__(self, params: Params, products: Products):
        self.products = products
        self._together: dict[int, Sequence[Any]] = {}  # by the id of each weight
        for layer in params.layers:
            for weights in ((layer.wq, layer.wk, layer.wv), (layer.w_gate, layer.w_up)):
                self._together |= dict.fromkeys(map(id, weights), weights)
        self._done = _Done()

    def __call__(self, x_BTD: Any, w: Any) -> Any:
        """y_BTO = x_BTD @ w.T."""
        done = self._done
        if done.x is not x_BTD or id(w) not in done.y:
            weights = self._together.get(id(w), (w,))
            found = self.products(widen(x_BTD.reshape(-1, x_BTD.shape[-1])), weights)
            done.x, done.y = x_BTD, dict(zip(map(id, weights), found, strict=True))
        y_MO = done.y.pop(id(w))
        if not done.y:
            done.x = None
        return narrow(y_MO, x_BTD).reshape(*x_BTD.shape[:-1], w.shape[0])


class _Done(threading.local):
    """What this thread has computed, and not yet been asked for."""

    x: Any = None

    def __init__(self) -> None:
        self.y: dict[int, np.ndarray] = {}

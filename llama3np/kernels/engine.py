"""Engines: who computes the five operations of model.py, and how many threads share them."""

from __future__ import annotations

import logging
from functools import partial
from importlib.util import find_spec
from typing import Any

import ml_dtypes
import numpy as np

from llama3np import model
from llama3np.cache import Cache
from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.kernels import tokens
from llama3np.kernels.attention import attention
from llama3np.kernels.product import product
from llama3np.kernels.rounded import round_bf16
from llama3np.numerics import Profile
from llama3np.params import Params, named
from llama3np.threads import Pool, available_cores, single_threaded_blas

ENGINES = ("numpy", "numba")


class Engine:
    """NumPy alone: products by tiles of weight rows, attention by blocks of queries.

    An engine has model.forward as its oracle: it computes the same to the last few bits, always
    the same bits for one number of threads, and may be used by several threads at once.
    """

    name = "numpy"
    widen: Any = None  # how rows of a weight become float32: NumPy's way

    def __init__(self, params: Params, config: Config, profile: Profile, pool: Pool):
        self.params, self.config, self.profile, self.pool = params, config, profile, pool
        self.tapped = model.PLAIN._replace(
            rms_norm=partial(tokens.rms_norm, pool=pool),
            linear=self.linear,
            rope=partial(tokens.rope, pool=pool),
            swiglu=partial(tokens.swiglu, pool=pool),
        )
        self.ops = self.tapped._replace(attention=partial(attention, pool=pool))

    def linear(self, x_BTD: Any, w: Any) -> Any:
        """model.linear over the pool."""
        x_MD = x_BTD.reshape(-1, x_BTD.shape[-1])
        y_MO = self.product(x_MD, w)
        return y_MO.reshape(*x_BTD.shape[:-1], w.shape[0])

    def product(self, x_MD: np.ndarray, w: Any) -> np.ndarray:
        """x_MD @ w.T, by the profile."""
        return product(round_bf16(x_MD) if self.profile.rounded else x_MD, w, self.pool, self.widen)

    def forward(
        self, ids_BT: Any, cache: Cache, new_B: Any = None, tap: Any = None, last_only: bool = True
    ) -> np.ndarray:
        """model.forward of this model: logits_BTV. With a tap, scores and probs are shown whole."""
        ops = self.ops if tap is None else self.tapped
        # Damaged weights overflow: choose says so in a sentence, NumPy's warnings add nothing.
        with np.errstate(over="ignore", invalid="ignore"), single_threaded_blas():
            logits_BTV, _ = model.forward(
                self.params,
                self.config,
                ids_BT,
                cache,
                new_B,
                self.profile.dtype,
                ops,
                tap,
                last_only,
            )
        return logits_BTV


def make_engine(
    name: str | None, threads: int | None, params: Params, config: Config, profile: Profile
) -> Engine:
    """The engine of a name: "numpy", "numba", or None for numba where it can be imported.

    threads: None for as many as there are physical cores. Raises InputError for another name, and
    for "numba" where it is not installed.
    """
    if name not in (None, *ENGINES):
        raise InputError(f"engine: expected one of {', '.join(ENGINES)}, found {name!r}")
    if profile.rounded:
        refuse_unrounded(params, config, profile)
    pool = Pool(available_cores() if threads is None else threads)
    if name == "numba" or (name is None and find_spec("numba") is not None):
        try:
            from llama3np.kernels.cpu.engine import CompiledEngine

            return CompiledEngine(params, config, profile, pool)
        except ImportError as error:
            said = f"engine: numba cannot be imported ({error})"
            if name == "numba":
                raise InputError(f'{said}; pip install "llama3np[fast]"') from None
            logging.getLogger("llama3np").warning("llama3np: %s; NumPy computes alone", said)
    return Engine(params, config, profile, pool)


def refuse_unrounded(params: Params, config: Config, profile: Profile) -> None:
    """Raise InputError, naming the tensor, for a matrix that is not bfloat16."""
    for name, w in named(params, config.tied).items():
        if len(w.shape) == 2 and w.dtype != ml_dtypes.bfloat16:
            raise InputError(
                f"params: {name}: the profile {profile.name} multiplies bfloat16 weights, found "
                f"{getattr(w, 'type', w.dtype)} (llama3np convert --dtype bf16 makes them)"
            )

"""Engines: who computes the five operations of model.py, and how many threads share them."""

from __future__ import annotations

import os
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from numbers import Integral
from typing import Any

import ml_dtypes
import numpy as np

from llama3np import model
from llama3np.backend import CPU, Device
from llama3np.cache import Cache
from llama3np.config import Config
from llama3np.errors import InputError, warn_once
from llama3np.kernels import tokens
from llama3np.kernels.attention import attention
from llama3np.kernels.linear import Linear, Products
from llama3np.kernels.product import products
from llama3np.kernels.rounded import round_bf16
from llama3np.numerics import Profile
from llama3np.params import Params, named
from llama3np.threads import Pool, available_cores, single_threaded_blas

ENGINES = ("numpy", "numba")
# Name -> module and class, of those on a CUDA device; cuda if none is named.
CUDA_ENGINES = {
    "cupy": ("llama3np.kernels.cuda.plain", "CupyEngine"),
    "cuda": ("llama3np.kernels.cuda.engine", "CudaEngine"),
}


class Engine:
    """NumPy alone: products by tiles of weight rows, attention by blocks of queries.

    An engine has model.forward as its oracle: it computes the same to the last few bits, always
    the same bits for one number of threads, and may be used by several threads at once.
    """

    name = "numpy"
    widen: Any = None  # how rows of a weight become float32: NumPy's way

    def __init__(self, params: Params, config: Config, profile: Profile, pool: Pool):
        self.params, self.config, self.profile, self.pool = params, config, profile, pool
        self.tapped = self.ops = profile.ops._replace(linear=Linear(params, self.products()))
        if not profile.short:
            self.tapped = self.tapped._replace(
                rms_norm=partial(tokens.rms_norm, pool=pool),
                rope=partial(tokens.rope, pool=pool),
                swiglu=partial(tokens.swiglu, pool=pool),
            )
            self.ops = self.tapped._replace(attention=partial(attention, pool=pool))

    def __reduce__(self) -> Any:
        """A copy is made anew from copies of the weights: what is compiled holds addresses."""
        return type(self), (self.params, self.config, self.profile, self.pool)

    def products(self) -> Products:
        """What computes x_MD @ w.T by the profile. It does not hold on to the engine.

        An engine that held operations that held it would not be freed, weights and all, before
        the next garbage collection.
        """
        rounded, pool, widen = self.profile.rounded, self.pool, self.widen
        return lambda x_MD, ws: products(round_bf16(x_MD) if rounded else x_MD, ws, pool, widen)

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

    def chooser(self, cache: Cache) -> Any:
        """What chooses for this cache in place of the host (generate.Chooser), or None."""
        return None


def make_engine(
    name: str | None,
    threads: int | None,
    params: Params,
    config: Config,
    profile: Profile,
    device: Device = CPU,
) -> Any:
    """The engine of a name; None for the fastest: numba where it can be imported, or cuda.

    threads: of the CPU's, None for as many as there are physical cores. device: on which the
    params lie. Raises InputError as engine_class and checked_threads do, and for weights that the
    profile cannot take.
    """
    kind, threads = engine_class(name, device), checked_threads(threads)
    if profile.rounded:
        refuse_unrounded(params, config, profile)
    if device.kind == "cuda":
        return kind(params, config, profile, device)
    return kind(params, config, profile, Pool(available_cores() if threads is None else threads))


def engine_class(name: str | None, device: Device = CPU) -> type[Any]:
    """Look an engine up; raise InputError for one that is none of the device's, or not installed.

    Of a CUDA device, backend.use has been called: CuPy is there.
    """
    if device.kind == "cuda":
        return _cuda_class(name)
    if name not in (None, *ENGINES):
        of = " (on the cpu)" if name in CUDA_ENGINES else ""
        raise InputError(f"engine: expected one of {', '.join(ENGINES)}{of}, found {name!r}")
    if name == "numpy" or (name is None and find_spec("numba") is None):
        return Engine
    try:
        from llama3np.kernels.cpu.engine import CompiledEngine
    except ImportError as error:
        said = f"engine: numba cannot be imported ({error})"
        if name == "numba":
            raise InputError(f'{said}; pip install "llama3np[fast]"') from None
        warn_once(f"{said}; NumPy computes alone")
        return Engine
    return CompiledEngine


def _cuda_class(name: str | None) -> type[Any]:
    if name not in (None, *CUDA_ENGINES):
        of = ", ".join(CUDA_ENGINES)
        raise InputError(f"engine: expected one of {of} (on cuda), found {name!r}")
    module, kind = CUDA_ENGINES[name or "cuda"]
    return getattr(import_module(module), kind)


def checked_threads(threads: int | None) -> int | None:
    """The number as it is; raise InputError for one below 1 or far above what is of use."""
    most = max(64, 4 * (os.cpu_count() or 1))
    whole = isinstance(threads, Integral) and not isinstance(threads, bool)
    if threads is not None and not (whole and 1 <= threads <= most):
        raise InputError(f"threads: expected a whole number from 1 to {most}, found {threads!r}")
    return threads


def refuse_unrounded(params: Params, config: Config, profile: Profile) -> None:
    """Raise InputError, naming the tensor, for a matrix that is not bfloat16."""
    for name, w in named(params, config.tied).items():
        if len(w.shape) == 2 and w.dtype != ml_dtypes.bfloat16:
            raise InputError(
                f"params: {name}: the profile {profile.name} multiplies bfloat16 weights, found "
                f"{getattr(w, 'type', w.dtype)} (llama3np convert --dtype bf16 makes them)"
            )

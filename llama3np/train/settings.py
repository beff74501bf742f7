"""What a training is told: sizes of new models, hyperparameters, and the first weights.

Sources, by the names used below:
    GPT-2     Radford et al. 2019         GPT-3     Brown et al. 2020, table 2.1 and appendix B
    Llama     Touvron et al. 2023         llama2.c  train.py of karpathy/llama2.c
    nanoGPT   train.py and config/train_shakespeare_char.py of karpathy/nanoGPT
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import isfinite, sqrt
from numbers import Integral, Real
from typing import Any, NamedTuple

import numpy as np

from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.params import Params, from_named, named_shapes


def _whole(value: Any, least: int) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least


def _number(value: Any) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool) and isfinite(value)


_COUNTS = ("context", "rows", "steps", "accumulate", "eval_every", "checkpoint_every")
# Names of settings, what fits each of them, and that in words.
_RANGES: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (_COUNTS, lambda x: _whole(x, 1), "a whole number from 1 on"),
    (("warmup", "seed"), lambda x: _whole(x, 0), "a whole number from 0 on"),
    (("lora",), lambda x: x is None or _whole(x, 1), "a whole number from 1 on"),
    (("recompute",), lambda x: isinstance(x, bool), "true or false"),
    (("learning_rate", "epsilon", "clip"), lambda x: _number(x) and x > 0, "a number above 0"),
    (("decay",), lambda x: _number(x) and x >= 0, "a number from 0 on"),
    (("floor",), lambda x: _number(x) and 0 <= x <= 1, "a number from 0 to 1"),
    (("beta1", "beta2"), lambda x: _number(x) and 0 <= x < 1, "a number from 0 on below 1"),
)


@dataclass(frozen=True)
class Settings:
    """Everything that decides what is computed, but for the sizes of the model and the data."""

    context: int  # T, tokens of a window: what a sample can look back on
    rows: int  # B, windows at a time; they bound the memory of a device, on the CPU parts.PART does
    steps: int  # the schedule ends there, so it cannot be changed half-way
    learning_rate: float  # at the peak
    warmup: int = 100  # steps of the linear rise: nanoGPT's for characters
    floor: float = 0.1  # the last rate over the peak's: GPT-3, Llama, nanoGPT
    decay: float = 0.1  # of weights, of matrices only: GPT-3, Llama, llama2.c
    beta1: float = 0.9  # GPT-3, Llama
    beta2: float = 0.99  # nanoGPT's for characters: few tokens a step; Llama has 0.95
    epsilon: float = 1e-8  # GPT-3, PyTorch's default
    clip: float = 1.0  # the longest gradient: GPT-3, Llama, llama2.c
    accumulate: int = 1  # times `rows` that make a step
    lora: int | None = None  # R of low-rank adapters; None: all weights are trained
    recompute: bool = False  # activations of a block again in the backward pass: less memory
    seed: int = 0  # of the weights and of the order of the data
    eval_every: int = 250  # steps; nanoGPT's for characters
    checkpoint_every: int = 250  # steps, so that a power cut costs minutes

    def __post_init__(self):
        for names, fits, expected in _RANGES:
            for name in names:
                if not fits(value := getattr(self, name)):
                    raise InputError(f"{name}: expected {expected}, found {value}")

    @property
    def batch_rows(self) -> int:
        """Windows of a step."""
        return self.rows * self.accumulate

    @property
    def batch_tokens(self) -> int:
        """Targets of a step."""
        return self.batch_rows * self.context


# ---- presets -----------------------------------------------------------------------------------


class Preset(NamedTuple):
    """A new model: its sizes, but for the vocabulary (1 here), and how to train it."""

    sizes: Config
    settings: Settings

    def config(self, vocab_size: int, context: int) -> Config:
        """The sizes with the tokenizer's vocabulary and the windows' length."""
        return replace(self.sizes, vocab_size=vocab_size, context_length=context)


def _sizes(dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_dim: int) -> Config:
    """Llama's, feed-forward about 3 times the width; tied, as all small Llamas of note are.

    Theta 10000 is Llama's for contexts of a few thousand; 500000 came with 8192. Rows of wq and wk
    stand in Hugging Face's order, because that is what is written.
    """
    return Config(
        dim=dim,
        n_layers=n_layers,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=dim // n_heads,
        ffn_dim=ffn_dim,
        vocab_size=1,
        rope_pairing="half",
        tied=True,
    )


# The rates fall with size as in GPT-3's table 2.1, from nanoGPT's 1e-3 for 10 M parameters on
# characters to llama2.c's 5e-4 for 15 M and more. Parameters are counted with 257 characters.
PRESETS = {
    "tiny": Preset(  # 0.8 M
        _sizes(dim=128, n_layers=4, n_heads=4, n_kv_heads=2, ffn_dim=384),
        # Of tinyshakespeare's million characters, 12 epochs: beyond 10 or so at this rate the
        # validation loss rises again. Models this small bear rates above the tables'.
        Settings(context=256, rows=16, steps=3000, learning_rate=3e-3),
    ),
    "small": Preset(  # 4.8 M
        _sizes(dim=256, n_layers=6, n_heads=8, n_kv_heads=4, ffn_dim=768),
        Settings(context=256, rows=32, steps=5000, learning_rate=1e-3),
    ),
    "medium": Preset(  # 25.3 M, 27.3 M with 4096 tokens
        _sizes(dim=512, n_layers=8, n_heads=8, n_kv_heads=4, ffn_dim=1536),
        Settings(
            context=512,
            rows=16,
            accumulate=4,
            steps=20000,
            learning_rate=5e-4,
            warmup=1000,
            beta2=0.95,
        ),
    ),
}

# From given weights: a tenth and less of the rates of new ones, and a short way, as in nanoGPT's
# config/finetune_shakespeare.py (3e-5 for 1.5 G parameters; the models here are smaller).
FINE_TUNING = Settings(
    context=512, rows=8, steps=500, learning_rate=1e-4, warmup=20, beta2=0.95, eval_every=50
)

# Adapters take ten times the rate of all weights (Schulman et al. 2025, "LoRA Without Regret"), and
# do not decay, as in PEFT's examples: decay is towards the frozen weights.
ADAPTERS = replace(FINE_TUNING, learning_rate=1e-3, decay=0.0)


def changed(settings: Settings, **given: object) -> Settings:
    """The settings with those that are given, None being not given.

    A warm-up of more than a tenth of the steps is shortened to it. Raises InputError by its name
    for a value out of range.
    """
    told = {name: value for name, value in given.items() if value is not None}
    new = replace(settings, **told)  # type: ignore[arg-type]
    return replace(new, warmup=min(new.warmup, new.steps // 10))


# ---- the first weights -------------------------------------------------------------------------

STD = 0.02  # GPT-2, Llama


def initial(config: Config, seed: int) -> Params:
    """The weights training begins with, float32: a function of config and seed.

    Matrices are normal with deviation 0.02 (GPT-2); wo and w_down, which add to the residual
    stream 2 L times, with 0.02 / sqrt(2 L), so that its size does not grow with depth (GPT-2;
    nanoGPT, llama2.c). Norms are 1.
    """
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in named_shapes(config).items():
        into_stream = name.endswith((".wo", ".w_down"))
        std = STD / sqrt(2 * config.n_layers) if into_stream else STD
        if len(shape) == 1:
            tensors[name] = np.ones(shape, np.float32)
        else:
            tensors[name] = rng.standard_normal(shape, dtype=np.float32) * np.float32(std)
    return from_named(tensors, config)

"""What the property tests draw: models, token ids, ragged batches, splits, byte strings.

Sizes are small, so that a test is fast, and odd, so that no two dimensions are the same by
custom: width is not heads * head size, groups have 1 to 4 heads, few sizes are powers of two.
"""

from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

import ml_dtypes
import numpy as np
import oracle
from devices import on
from hypothesis import strategies as st

import llama3np.params
from llama3np.config import PAIRINGS, Config, RopeScaling
from llama3np.numerics import PROFILES

STORED = ("float32", "float16", "bfloat16")
SHORT = tuple(name for name, profile in PROFILES.items() if profile.short)  # of 16 bits
MAX_TOKENS = 8

seeds = st.integers(0, 2**32 - 1)
pairings = st.sampled_from(PAIRINGS)


@st.composite
def scalings(draw):
    """llama3 scaling with a short old context, so that a few pairs fall on each side of it."""
    low = draw(st.sampled_from([0.5, 1.0, 1.5]))
    return RopeScaling(
        factor=draw(st.sampled_from([1.0, 2.0, 8.0, 32.0])),
        low_freq_factor=low,
        high_freq_factor=low * draw(st.sampled_from([2.0, 4.0])),
        old_context=draw(st.integers(4, 64)),
    )


@st.composite
def configs(draw, **fixed):
    """Any small architecture; a field given by name is taken as it is."""
    n_kv_heads = fixed.pop("n_kv_heads", None) or draw(st.integers(1, 3))
    fields = {
        "dim": st.integers(2, 20),
        "n_layers": st.integers(1, 3),
        "n_heads": st.integers(1, 4).map(lambda group: n_kv_heads * group),
        "head_dim": st.integers(1, 5).map(lambda pairs: 2 * pairs),
        "ffn_dim": st.integers(1, 24),
        "vocab_size": st.integers(2, 40),
        "norm_eps": st.sampled_from([0.0, 1e-6, 1e-5, 1e-2]),
        "rope_theta": st.sampled_from([10.0, 10000.0, 500000.0]),
        "rope_scaling": st.none() | scalings(),
        "rope_pairing": pairings,
        "tied": st.booleans(),
    }
    drawn = {name: fixed[name] if name in fixed else draw(fields[name]) for name in fields}
    return Config(n_kv_heads=n_kv_heads, **drawn)


@dataclass(frozen=True)
class Model:
    """A config and random weights, told by their seed: short enough to print in full."""

    config: Config
    seed: int
    stored: str = "float32"  # the dtype of the weights, whatever the arithmetic
    xp: Any = field(default=np, repr=False)  # whose arrays the params are

    def on(self, xp):
        """The same model with its weights as arrays of that module."""
        return replace(self, xp=xp)

    @cached_property
    def params(self):
        return on(self.xp, self.host_params)

    @cached_property
    def host_params(self):
        """Weights as if mapped from a read-only file."""
        rng = np.random.default_rng(self.seed)
        dtype = ml_dtypes.bfloat16 if self.stored == "bfloat16" else np.dtype(self.stored)
        params = llama3np.params.random(self.config, rng, dtype)
        for tensor in llama3np.params.named(params, self.config.tied).values():
            tensor.flags.writeable = False
        return params

    @cached_property
    def tensors(self):
        """The same weights by name, in float64, for the oracle and for changes by hand."""
        named = llama3np.params.named(self.host_params, self.config.tied)
        return {name: np.asarray(tensor, dtype=np.float64) for name, tensor in named.items()}

    @property
    def sizes(self):
        """The same architecture in the oracle's own words."""
        c, scaling = self.config, None
        if c.rope_scaling is not None:
            s = c.rope_scaling
            scaling = oracle.Scaling(s.factor, s.low_freq_factor, s.high_freq_factor, s.old_context)
        return oracle.Sizes(
            n_layers=c.n_layers,
            n_heads=c.n_heads,
            n_kv_heads=c.n_kv_heads,
            head_dim=c.head_dim,
            eps=c.norm_eps,
            theta=c.rope_theta,
            scaling=scaling,
            pairing=c.rope_pairing,
        )


def models(stored=None, **fixed):
    """A Model of any config; `stored` fixes the dtype of its weights."""
    kinds = st.sampled_from(STORED) if stored is None else st.just(stored)
    return st.builds(Model, configs(**fixed), seeds, kinds)


def token_ids(vocab_size, min_size=1, max_size=MAX_TOKENS):
    return st.lists(st.integers(0, vocab_size - 1), min_size=min_size, max_size=max_size)


@st.composite
def runs(draw, min_tokens=1, **fixed):
    """(model, ids): one sequence."""
    model = draw(models(**fixed))
    return model, draw(token_ids(model.config.vocab_size, min_tokens))


@st.composite
def ragged_runs(draw, min_rows=1, **fixed):
    """(model, rows, pad): sequences of different lengths, and the id to fill them up with."""
    model = draw(models(**fixed))
    V = model.config.vocab_size
    rows = draw(st.lists(token_ids(V), min_size=min_rows, max_size=4))
    return model, rows, draw(st.integers(0, V - 1))


def padded(rows, pad):
    """Rows of ids as one (B, T) array filled up on the right, and the length of each."""
    lengths = [len(row) for row in rows]
    ids_BT = np.full((len(rows), max(lengths)), pad)
    for row_T, row in zip(ids_BT, rows, strict=True):
        row_T[: len(row)] = row
    return ids_BT, lengths


@st.composite
def splits(draw, total, parts=None):
    """Sizes of consecutive chunks, each at least 1 (or 0 if their number is given), of this sum."""
    if parts is None:
        cuts = [i for i in range(1, total) if draw(st.booleans())]
    else:
        cut = st.integers(0, total)
        cuts = sorted(draw(st.lists(cut, min_size=parts - 1, max_size=parts - 1)))
    edges = [0, *cuts, total]
    return [end - start for start, end in pairwise(edges)]


def arrays(*shape):
    """A float64 array of standard normal numbers, told by its seed."""
    return seeds.map(lambda seed: np.random.default_rng(seed).standard_normal(shape))


# Bytes that break decoders: all of them, cut UTF-8 of every length, and the texts between.
byte_strings = st.one_of(
    st.binary(max_size=64),
    st.text(max_size=32).map(lambda text: text.encode("utf-8", "surrogatepass")),
    st.lists(st.sampled_from(["a", "é", "漢", "🦙", "\x00", " "]), max_size=8).flatmap(
        lambda parts: st.integers(0, 32).map(lambda end: "".join(parts).encode()[:end])
    ),
)

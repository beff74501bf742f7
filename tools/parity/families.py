"""What is compared: for every family a tiny and a full-width model, and the token ids fed to them.

Everything follows from the preset's name by the formulas here and in made_up.py, so that whoever
compares against the goldens makes the same models, without torch.
"""

from __future__ import annotations

from dataclasses import replace

import made_up
import numpy as np

from llama3np.config import Config
from llama3np.presets import PRESETS

FAMILIES = tuple(PRESETS)
SCALED = tuple(name for name, config in PRESETS.items() if config.rope_scaling is not None)

TINY_VOCABULARY = 128
WIDE_VOCABULARY = 1000  # rows of the embedding and the head are all alike: fewer show as much
SHORT = 301  # tokens: positions 0..300
LONG = 8448  # tokens, of which positions 8192..8447 are compared, beyond the old context
OLD_CONTEXT = 8192
CHUNK = 256  # tokens of the long sequence that go through a model at a time


def tiny(name: str) -> Config:
    """Two layers an eighth as large: heads of 16 in place of 128, a fraction of them, same groups.

    Heads of 8 and 16 have pairs on all sides of the scaling: kept, in between and stretched.
    """
    preset = PRESETS[name]
    n_kv_heads, head_dim = max(2, preset.n_kv_heads // 8), preset.head_dim // 8
    n_heads = n_kv_heads * preset.group
    dim = n_heads * head_dim
    return replace(
        preset,
        dim=dim,
        n_layers=2,
        n_heads=n_heads,
        n_kv_heads=n_kv_heads,
        head_dim=head_dim,
        ffn_dim=preset.ffn_dim * dim // preset.dim,
        vocab_size=TINY_VOCABULARY,
    )


def long(name: str) -> Config:
    """The tiny model's first layer: over 8448 tokens every score of a head takes its time."""
    return replace(tiny(name), n_layers=1)


def wide(name: str) -> Config:
    """The published widths, two layers of them; of 405B one, for two take 25.5 GB in float32."""
    n_layers = 1 if name == "llama3.1-405b" else 2
    return replace(PRESETS[name], n_layers=n_layers, vocab_size=WIDE_VOCABULARY)


def token_ids(n: int, vocab_size: int) -> np.ndarray:
    """Made-up ids: two bytes each of made_up's tensor "ids", little endian, modulo the size."""
    words_T = made_up.drawn(made_up.key("ids", 0), 0, 2 * n).view("<u2")
    return (words_T % vocab_size).astype(np.int64)

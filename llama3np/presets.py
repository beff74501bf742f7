"""The published models by name: what their own config files say.

Sources: config.json and params.json of meta-llama's repositories on Hugging Face. Rows of wq and
wk are in Meta's order; Hugging Face's files hold the other one (Config.rope_pairing).
"""

from __future__ import annotations

from dataclasses import replace

from llama3np.config import Config, RopeScaling

_SCALED_BY_8 = RopeScaling(8.0, 1.0, 4.0, 8192)  # 3.1 and 3.3
_SCALED_BY_32 = RopeScaling(32.0, 1.0, 4.0, 8192)  # 3.2

_LONG = 131072


def _llama2(dim: int, n_layers: int, n_heads: int, n_kv_heads: int, ffn_dim: int) -> Config:
    head_dim = dim // n_heads
    return Config(dim, n_layers, n_heads, n_kv_heads, head_dim, ffn_dim, 32000, context_length=4096)


def _llama3(dim: int, n_layers: int, n_heads: int, ffn_dim: int) -> Config:
    head_dim = dim // n_heads
    sizes = Config(dim, n_layers, n_heads, 8, head_dim, ffn_dim, 128256)
    return replace(sizes, rope_theta=500000.0, context_length=8192)


def _stretched(config: Config, scaling: RopeScaling = _SCALED_BY_8, tied: bool = False) -> Config:
    return replace(config, rope_scaling=scaling, tied=tied, context_length=_LONG)


_LLAMA3_8B = _llama3(4096, 32, 32, 14336)
_LLAMA3_70B = _llama3(8192, 80, 64, 28672)

PRESETS: dict[str, Config] = {
    "llama2-7b": _llama2(4096, 32, 32, 32, 11008),
    "llama2-13b": _llama2(5120, 40, 40, 40, 13824),
    "llama2-70b": _llama2(8192, 80, 64, 8, 28672),
    "llama3-8b": _LLAMA3_8B,
    "llama3-70b": _LLAMA3_70B,
    "llama3.1-8b": _stretched(_LLAMA3_8B),
    "llama3.1-70b": _stretched(_LLAMA3_70B),
    "llama3.1-405b": _stretched(_llama3(16384, 126, 128, 53248)),
    "llama3.2-1b": _stretched(_llama3(2048, 16, 32, 8192), _SCALED_BY_32, tied=True),
    "llama3.2-3b": _stretched(_llama3(3072, 28, 24, 8192), _SCALED_BY_32, tied=True),
    "llama3.3-70b": _stretched(_LLAMA3_70B),
}

"""What a checkpoint says of itself: sizes, RoPE, norm epsilon. One frozen record for all formats.

Every reader is strict. A key that would change the arithmetic and is not supported is refused by
name; a size that is missing is named. Nothing is guessed from a folder's name.
"""

from __future__ import annotations

from dataclasses import dataclass

from llama3np.errors import InputError

PAIRINGS = ("interleaved", "half")


@dataclass(frozen=True)
class RopeScaling:
    """Llama 3.1's stretching of the long RoPE wavelengths (kind "llama3")."""

    factor: float  # long wavelengths are stretched by it: 8 in 3.1 and 3.3, 32 in 3.2
    low_freq_factor: float  # wavelengths above old_context / low are stretched in full
    high_freq_factor: float  # wavelengths below old_context / high are left alone
    old_context: int  # the context length before stretching, 8192

    def __post_init__(self):
        if not (self.factor >= 1 and 0 < self.low_freq_factor < self.high_freq_factor):
            raise InputError(
                f"RoPE scaling: expected factor >= 1 and 0 < low_freq_factor < high_freq_factor, "
                f"found factor {self.factor}, low {self.low_freq_factor}, "
                f"high {self.high_freq_factor}"
            )
        if self.old_context < 1:
            raise InputError(f"RoPE scaling: the old context is {self.old_context}")


@dataclass(frozen=True)
class Config:
    """The architecture of one checkpoint; letters are those of the dimension key."""

    dim: int  # D, model width
    n_layers: int  # L
    n_heads: int  # N = K * G, query heads
    n_kv_heads: int  # K, key/value heads
    head_dim: int  # H
    ffn_dim: int  # F, feed-forward width
    vocab_size: int  # V
    norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rope_pairing: str = "interleaved"  # or "half": how the rows of wq and wk are ordered
    tied: bool = False  # the head is the embedding table
    context_length: int = 2048  # positions the model was trained for

    def __post_init__(self):
        for name in ("dim", "n_layers", "n_heads", "n_kv_heads", "head_dim", "ffn_dim"):
            if getattr(self, name) < 1:
                raise InputError(f"config: expected {name} >= 1, found {getattr(self, name)}")
        if self.vocab_size < 1 or self.context_length < 1:
            raise InputError(
                f"config: expected vocab_size and context_length >= 1, "
                f"found {self.vocab_size} and {self.context_length}"
            )
        if self.n_heads % self.n_kv_heads:
            raise InputError(
                f"config: expected n_heads to be a multiple of n_kv_heads, "
                f"found {self.n_heads} and {self.n_kv_heads}"
            )
        if self.head_dim % 2:
            raise InputError(f"config: RoPE turns pairs, but head_dim is {self.head_dim}")
        if self.rope_pairing not in PAIRINGS:
            raise InputError(
                f"config: expected rope_pairing in {PAIRINGS}, found {self.rope_pairing!r}"
            )
        if not (self.norm_eps >= 0 and self.rope_theta > 0):
            raise InputError(
                f"config: expected norm_eps >= 0 and rope_theta > 0, "
                f"found {self.norm_eps} and {self.rope_theta}"
            )

    @property
    def group(self) -> int:
        """G, the query heads that share one key/value head."""
        return self.n_heads // self.n_kv_heads

"""What a model costs, from its Config alone: parameters, bytes, FLOPs, and the roofline.

Letters are those of the dimension key: L layers, N query and K key/value heads of size H, width D,
feed-forward width F, vocabulary V; S is the context, the tokens a new one attends to.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import NamedTuple

from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.params import layer_shapes, named_shapes

# ---- formats ---------------------------------------------------------------------------------


class Format(NamedTuple):
    """How a weight is stored: blocks of so many weights in so many bytes."""

    weights: int
    nbytes: int

    @property
    def bits(self) -> float:
        """Bits for each weight, the block's scale included."""
        return 8 * self.nbytes / self.weights


FORMATS = {
    "f32": Format(1, 4),
    "bf16": Format(1, 2),
    "f16": Format(1, 2),
    "q8_0": Format(32, 34),  # 32 int8 and a float16 scale: 8.5 bits
    "q4_0": Format(32, 18),  # 32 of 4 bits and a float16 scale: 4.5 bits
}
CACHE_BYTES = {"f32": 4, "f64": 8, "bf16": 2, "f16": 2}


def tensor_bytes(shape: tuple[int, ...], format: str) -> int:
    """Bytes of one tensor in one of FORMATS.

    In block formats a vector stays float32, as GGUF files have it, and so does a matrix whose rows
    are no whole number of blocks.
    """
    form = FORMATS[format]
    if (len(shape) == 1 and form.weights > 1) or shape[-1] % form.weights:
        form = FORMATS["f32"]
    return prod(shape) // form.weights * form.nbytes


# ---- parameters and bytes --------------------------------------------------------------------


def parameters(config: Config) -> dict[str, int]:
    """Parameters by part; a tied head is counted once, as the embedding.

    embedding   V D
    attention   L (N H D + 2 K H D + D N H)        wq; wk and wv; wo
    feed_forward  3 L D F                          w_gate, w_up, w_down
    norms       (2 L + 1) D
    head        V D, or 0 if tied
    """
    layer, L = layer_shapes(config), config.n_layers
    table = config.vocab_size * config.dim
    return {
        "embedding": table,
        "attention": L * sum(map(prod, (layer.wq, layer.wk, layer.wv, layer.wo))),
        "feed_forward": L * sum(map(prod, (layer.w_gate, layer.w_up, layer.w_down))),
        "norms": (2 * L + 1) * config.dim,
        "head": 0 if config.tied else table,
    }


def weight_bytes(config: Config, format: str) -> int:
    """Bytes of all weights in one of FORMATS; what stays wider is said at tensor_bytes."""
    return sum(tensor_bytes(shape, format) for shape in named_shapes(config).values())


def cache_bytes_per_token(config: Config, dtype: str) -> int:
    """Bytes of the keys and values of one token: 2 L K H, each of the dtype's size."""
    return 2 * config.n_layers * config.n_kv_heads * config.head_dim * CACHE_BYTES[dtype]


# ---- work for one token ----------------------------------------------------------------------


def flops_per_token(config: Config, context: int) -> int:
    """Floating-point operations to decode one token that attends to `context` others and itself.

    2 for each weight of a product (a multiplication and an addition; the embedding is a look-up,
    the head a product, tied or not), and 4 L N H S: scores and weighted values of S = context + 1
    positions. Norms, RoPE and softmax are below a thousandth of it and left out.
    """
    return prefill_flops(config, 1, context)


def prefill_flops(config: Config, tokens: int, context: int = 0) -> int:
    """Floating-point operations of a prompt of T tokens that stands after `context` others.

    2 T for each weight of a layer's products, 2 V D for the head, which only the last token needs,
    and 4 L N H (T S + T (T + 1) / 2): token t attends to S = context others, to the t before it in
    the prompt and to itself.
    """
    parts = parameters(config)
    layers = parts["attention"] + parts["feed_forward"]
    heads = config.n_layers * config.n_heads * config.head_dim
    seen = tokens * context + tokens * (tokens + 1) // 2
    return 2 * tokens * layers + 2 * config.vocab_size * config.dim + 4 * heads * seen


def bytes_per_step(config: Config, format: str, context: int, batch: int, dtype: str) -> int:
    """Bytes that a decode step of `batch` rows reads, each row with `context` tokens before it.

    Every weight once whatever the batch, but of an embedding that is no head only `batch` rows,
    and context keys and values of every row.
    """
    rows = tensor_bytes((batch, config.dim), format)
    table = tensor_bytes((config.vocab_size, config.dim), format)
    weights = weight_bytes(config, format) + (0 if config.tied else rows - table)
    return weights + batch * context * cache_bytes_per_token(config, dtype)


# ---- a CUDA device ---------------------------------------------------------------------------

# The sizes that the engines on a device keep to, in numbers. A tile of weights is widened at a
# time: 64 MiB of float32, large enough that a product of it fills any GPU. Scores are made so many
# at a time: 32 MiB, of which attention holds four kinds.
TILE, SCORES = 1 << 24, 1 << 23
# What is beside arrays: compiled kernels, cuBLAS's own memory (32 MiB on the newest), and what
# CuPy's pool loses by rounding up and by gaps.
BESIDE = 256 << 20


class Needs(NamedTuple):
    """Bytes of a device's memory, by what they are for."""

    weights: int
    cache: int
    workspace: int

    @property
    def total(self) -> int:
        """All of it."""
        return sum(self)


def workspace_bytes(config: Config, tokens: int, context: int, rows: int = 1, size: int = 4) -> int:
    """An upper bound of what a call of `tokens` tokens, all rows counted, needs beside the cache.

    size: bytes of a number; those of 2 are widened to compute, and take 4. Of each token there are
    at most 8 vectors of width D or N H at a time, 6 of width F (in swiglu), or, when the layers are
    done, the logits; of the keys, or values, that are seen 2 copies (widened, and laid out for a
    product); 4 kinds of scores; and a tile.
    """
    c, size = config, max(size, 4)
    wide = max(c.dim, c.n_heads * c.head_dim)
    per_token = max(8 * wide + 6 * c.ffn_dim, 2 * wide + c.vocab_size)
    seen = 2 * rows * context * c.n_kv_heads * c.head_dim
    scores = 4 * min(max(SCORES, c.n_heads * context), tokens * c.n_heads * context)
    return size * (tokens * per_token + seen + scores + TILE) + BESIDE


def device_needs(
    config: Config, weights: int, context: int, dtype: str, tokens: int, size: int = 4
) -> Needs:
    """What one row of `context` tokens needs on a device, fed `tokens` at a time.

    weights: bytes of all weights; dtype: of the cache, one of CACHE_BYTES.
    """
    cache = context * cache_bytes_per_token(config, dtype)
    return Needs(weights, cache, workspace_bytes(config, min(tokens, context), context, 1, size))


# ---- what fits, and how fast it can be at best -----------------------------------------------


def share(config: Config, gpus: int) -> Config:
    """One of `gpus` equal parts of a model: heads, feed-forward width and vocabulary divided.

    Tensor parallelism (Shoeybi et al. 2019): the width stays whole, so each part holds all norms.
    Raises InputError if the heads or the feed-forward width are not divisible.
    """
    divided = {"n_kv_heads": config.n_kv_heads, "ffn_dim": config.ffn_dim}
    for name, size in divided.items():
        if gpus < 1 or size % gpus:
            raise InputError(f"gpus: expected a number that divides {name} {size}, found {gpus}")
    return replace(
        config,
        n_heads=config.n_heads // gpus,
        n_kv_heads=config.n_kv_heads // gpus,
        ffn_dim=config.ffn_dim // gpus,
        vocab_size=-(-config.vocab_size // gpus),
    )


def memory(config: Config, format: str, context: int, batch: int, dtype: str) -> int:
    """Bytes of weights and cache. Activations, the program and the drivers come on top."""
    return weight_bytes(config, format) + batch * context * cache_bytes_per_token(config, dtype)


def longest_context(config: Config, format: str, memory: int, dtype: str) -> int:
    """Tokens of one row whose cache fits into `memory` bytes beside the weights; 0 if none."""
    free = memory - weight_bytes(config, format)
    return max(0, min(config.context_length, free // cache_bytes_per_token(config, dtype)))


def roofline(
    config: Config, format: str, context: int, batch: int, dtype: str, bandwidth: float
) -> float:
    """Tokens per second, all rows together, if reading memory at `bandwidth` were all there is.

    batch * bandwidth / bytes_per_step: an upper bound for decoding. Computing, and with several
    GPUs the exchange between them, take from it.
    """
    return batch * bandwidth / bytes_per_step(config, format, context, batch, dtype)


class Gpu(NamedTuple):
    """A card as its data sheet has it."""

    name: str
    memory: int
    bandwidth: float  # bytes a second


# NVIDIA's data sheets: RTX 3060 12 GB (GDDR6, 192 bit), RTX 4090, A100 80 GB SXM, H100 SXM.
GPUS = (
    Gpu("RTX 3060 12 GB", 12 << 30, 360e9),
    Gpu("RTX 4090", 24 << 30, 1008e9),
    Gpu("A100 80 GB", 80 << 30, 2039e9),
    Gpu("H100 80 GB", 80 << 30, 3350e9),
)
# Seconds of a kernel in a CUDA graph beside what it reads: an assumption. `llama3np selftest` and
# tools/bench_cuda.py measure it, as graph_us.
BETWEEN_KERNELS = 1.5e-6


def step_kernels(config: Config) -> int:
    """Kernels of a decode step of the engine cuda, all of one format: kernels/cuda/step.py."""
    return 7 * config.n_layers + 3


def predicted_step(
    config: Config, format: str, context: int, dtype: str, bandwidth: float
) -> float:
    """Seconds of a decode step of one row: bytes / bandwidth + kernels. A prediction, not measured.

    No GPU reads at the bandwidth of its data sheet, so the time will be longer: 0.8 to 0.9 of that
    bandwidth would be good.
    """
    nbytes = bytes_per_step(config, format, context, 1, dtype)
    return nbytes / bandwidth + step_kernels(config) * BETWEEN_KERNELS

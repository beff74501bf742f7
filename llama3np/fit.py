"""Whether a model fits into a device's memory, and what would where it does not.

Only sizes are looked at: nothing is allocated, and no device is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from llama3np import cost
from llama3np.config import Config
from llama3np.errors import InputError

SMALLER = ("q8_0", "q4_0")  # what weights might be stored as instead
GPUS = (2, 4, 8)
LEAST = 256  # tokens of context that are worth being proposed


@dataclass(frozen=True)
class Wish:
    """What is to lie on a device: weights, and the keys and values of one row."""

    config: Config
    weights: int  # bytes as they lie on the device
    context: int  # tokens
    kv: str  # how keys and values are stored, one of cost.CACHE_BYTES
    chunk: int  # tokens that are fed at a time
    size: int = 4  # bytes of an activation; with 2, weights have as many whatever their storage

    def needs(
        self, weights: int | None = None, context: int | None = None, kv: str | None = None
    ) -> cost.Needs:
        """The bytes of it, or of the same with something changed."""
        return cost.device_needs(
            self.config,
            self.weights if weights is None else weights,
            self.context if context is None else context,
            kv or self.kv,
            self.chunk,
            self.size,
        )


def told(wish: Wish, device: str, free: int, total: int) -> str:
    """The plan in one line, for a person."""
    needs = wish.needs()
    return (
        f"{device}: {_gb(needs.total)} needed: weights {_gb(needs.weights)}, keys and values of "
        f"{wish.context} tokens in {wish.kv} {_gb(needs.cache)}, workspace {_gb(needs.workspace)}; "
        f"{_gb(free)} of {_gb(total)} free"
    )


def check(wish: Wish, device: str, free: int, total: int) -> None:
    """Raise InputError, with what would fit, if the wish needs more than `free` bytes."""
    if wish.needs().total <= free:
        return
    ways = "; ".join(alternatives(wish, free)) or "nothing smaller of this model does"
    raise InputError(f"device: does not fit: {told(wish, device, free, total)}. What fits: {ways}")


def alternatives(wish: Wish, free: int) -> Iterator[str]:
    """What would fit into `free` bytes: each way is one change, with its number."""
    if (context := longest(wish, free, wish.kv)) >= LEAST:
        yield f"--max-seq-len {context}"
    if wish.kv == "f32" and (context := longest(wish, free, "bf16")) >= LEAST:
        shorter = f" with --max-seq-len {context}" if context < wish.context else ""
        yield f"--kv-dtype bf16{shorter}"
    for name in SMALLER if wish.size > 2 else ():
        needs = wish.needs(weights=cost.weight_bytes(wish.config, name))
        if needs.weights < wish.weights and needs.total <= free:
            yield f"weights in {name} ({_gb(needs.total)})"
    if (spread := _spread(wish, free)) is not None:
        gpus, total = spread
        yield f"{gpus} such GPUs, each with {_gb(total)}"


def longest(wish: Wish, free: int, kv: str) -> int:
    """The longest context up to the wished one that fits; 0 if none does."""
    low, high = 0, wish.context
    while low < high:
        middle = (low + high + 1) // 2
        if wish.needs(context=middle, kv=kv).total <= free:
            low = middle
        else:
            high = middle - 1
    return low


def _spread(wish: Wish, free: int) -> tuple[int, int] | None:
    """The fewest GPUs over which it fits, and the bytes of each of them; None if too many."""
    whole = cost.weight_bytes(wish.config, "bf16")
    for gpus in GPUS:
        try:
            part = cost.share(wish.config, gpus)
        except InputError:  # heads that cannot be divided so
            continue
        weights = wish.weights * cost.weight_bytes(part, "bf16") // whole
        needs = cost.device_needs(part, weights, wish.context, wish.kv, wish.chunk, wish.size)
        if needs.total <= free:
            return gpus, needs.total
    return None


def _gb(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB"

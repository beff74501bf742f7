"""The checks of `llama3np selftest` that only a CUDA device has."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import cupy
import numpy as np

from llama3np import selftest
from llama3np.backend import Device, on, to_host
from llama3np.kernels.cuda import registry, weights
from llama3np.kernels.cuda.checks import edges
from llama3np.kernels.cuda.launch import compiled
from llama3np.kernels.cuda.step import RECORDS
from llama3np.kernels.ggml import decode
from llama3np.llm import Llama
from llama3np.sample import Sampling, all_ids, draw

SHAPES = ((1, 256), (3, 512), (47, 256))  # rows and columns of matrices of blocks
REPLAYS = 5
TOLD = 3  # wrong kernels of one kind that a line tells
SAMPLINGS = (Sampling(0.8), Sampling(1.5, top_k=20), Sampling(0.7, top_p=0.9), Sampling(1, 50, 0.8))
DRAWS = 4  # of each


def kernels(device: Device) -> Iterator[tuple[str, str, selftest.Check]]:
    """Each kernel of the registry: within its registers, no spill, and its numbers right."""
    every = list(dict.fromkeys(registry.every_kernel()))
    for entry in dict.fromkeys(kernel.entry for kernel in every):
        some = [kernel for kernel in every if kernel.entry == entry]
        yield "kernels", f"{len(some)} of {entry}", partial(_kernels, some, device)


def _kernels(some: list[registry.Kernel], device: Device) -> str:
    most, launches, wrong = 0, 0, []
    for kernel in some:
        try:
            with on(device):
                most = max(most, _compiled(kernel))
                launches += edges.check(kernel)
        except selftest.MismatchError as error:
            wrong.append(str(error))
        except Exception as error:  # the others may still tell something
            wrong.append(f"{kernel.name}: {type(error).__name__}: {error}")
    if wrong:
        told = "; ".join(wrong[:TOLD])
        raise selftest.MismatchError(f"{len(wrong)} of {len(some)} are wrong: {told}")
    return f"right in {launches} launches; {most} registers at most, no local memory"


def _compiled(kernel: registry.Kernel) -> int:
    """The registers of a kernel, built for this device."""
    built = compiled(kernel)
    registers, local = built.num_regs, built.local_size_bytes
    if registers > kernel.registers or local:
        raise selftest.MismatchError(
            f"{kernel.name}: {registers} registers ({kernel.registers} allowed), {local} bytes "
            "of local memory (none allowed)"
        )
    return registers


def rows(device: Device) -> Iterator[tuple[str, str, selftest.Check]]:
    """Rows of every format of blocks as float32, to the last bit: by stretches and by ids."""
    for name in selftest.SCALES:
        yield "rows", name, partial(_rows_of, name, device)


def _rows_of(name: str, device: Device) -> str:
    rng = np.random.default_rng(1)
    for shape in SHAPES:
        stored = selftest.blocks(name, shape, rng)
        expected_NK = decode(name, stored.stored, shape)
        ids = rng.integers(0, shape[0], (2, 5))
        with on(device):
            w = weights.upload(stored)
            found = to_host(w[:]), to_host(w[cupy.asarray(ids)])
        for part, expected in zip(found, (expected_NK, expected_NK[ids]), strict=True):
            if part.shape != expected.shape or (part != expected).any():
                raise selftest.MismatchError(f"{shape}: rows differ from what the blocks mean")
    return f"{len(SHAPES)} shapes, the same bits"


def replay(device: Device) -> str:
    """One token again and again: launched kernel by kernel first, then by the captured graph."""
    config = selftest.WIDE
    params = selftest.made(config, "BF16", np.random.default_rng(2))
    llm = Llama(config, params, device=str(device), engine="cuda")
    cache, logits = llm.new_cache(2, 16), []
    llm.forward([[1, 2, 3], [4, 5, 6]], cache)
    for _ in range(REPLAYS):
        logits.append(llm.forward([[7], [8]], cache, last_only=True))
        cache.trim(3)
    if any(again.tobytes() != logits[0].tobytes() for again in logits[1:]):
        raise selftest.MismatchError("a replayed step has other bits than its launches")
    return f"{REPLAYS - 1} replays, the same bits"


def greedy(device: Device) -> str:
    """Tokens that the device chooses, more than it records at a time, beside the host's choice."""
    config, n = selftest.WIDE, RECORDS + 6
    params = selftest.made(config, "BF16", np.random.default_rng(3))
    params = params._replace(head_VD=np.repeat(params.head_VD[: config.vocab_size // 2 + 1], 2, 0))
    params = params._replace(head_VD=params.head_VD[: config.vocab_size])  # every logit twice
    llm = Llama(config, params, device=str(device), engine="cuda")
    ids_B = np.array([7, 8])
    found, _ = llm.engine.greedy(ids_B, llm.new_cache(2, n), n)
    cache, expected = llm.new_cache(2, n), []
    for _ in range(n):
        logits_B1V = llm.engine.forward(ids_B[:, None], cache)
        ids_B = logits_B1V[:, 0].argmax(axis=-1)
        expected.append(ids_B)
    if (found != np.stack(expected)).any():
        raise selftest.MismatchError("the device chooses others than the largest logits, lowest id")
    return f"{n} tokens of 2 rows, the same"


def drawn(device: Device) -> str:
    """Tokens drawn from what the device leaves of the logits, beside those drawn from all."""
    config = replace(selftest.WIDE, vocab_size=2001)
    params = selftest.made(config, "BF16", np.random.default_rng(4))
    llm = Llama(config, params, device=str(device), engine="cuda")
    n, ids_B = DRAWS * len(SAMPLINGS), np.array([7, 8])
    cache, other = llm.new_cache(2, n), llm.new_cache(2, n)
    for sampling in SAMPLINGS:
        for numbers_B in np.random.default_rng(5).random((DRAWS, 2)):
            found, _ = llm.engine.sample(ids_B, cache, sampling, numbers_B)
            logits_BV = llm.engine.forward(ids_B[:, None], other)[:, 0]
            every = [all_ids(logits_V, sampling.temperature) for logits_V in logits_BV]
            ids_B = np.array([draw(every[b], sampling, numbers_B[b]) for b in range(2)])
            if (found[0] != ids_B).any():
                raise selftest.MismatchError(f"{sampling}: drawn {found[0]}, expected {ids_B}")
    return f"{n} tokens of 2 rows in {len(SAMPLINGS)} ways, the same"

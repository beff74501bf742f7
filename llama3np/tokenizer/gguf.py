"""The vocabulary inside a GGUF file: the tokenizer.ggml.* keys of its metadata."""

from __future__ import annotations

from numbers import Integral
from typing import Any

import numpy as np

from llama3np.errors import CheckpointError
from llama3np.tokenizer.base import stop_ids
from llama3np.tokenizer.bpe import LLAMA3, SMOLLM, BytePairTokenizer
from llama3np.tokenizer.bytelevel import Vocabulary, tokenizer
from llama3np.tokenizer.llama3 import BEGIN_OF_TEXT

_PREFIX = "tokenizer.ggml."
_NORMAL, _CONTROL, _UNUSED = 1, 3, 5  # gguf TokenType; the others are of other vocabularies
_PRE = {"llama-bpe": LLAMA3, "smollm": SMOLLM}
_WHOLE_PIECE = {"llama-bpe"}  # llama.cpp src/llama-vocab.cpp sets ignore_merges, and BOS, for it


def from_gguf(metadata: dict[str, Any], source: str) -> BytePairTokenizer:
    """The tokenizer that a GGUF file's metadata describes.

    metadata: key -> value; arrays of strings are lists of str, arrays of numbers lists or NumPy
    arrays. source: the file, for messages. Raises CheckpointError, naming the key, for what is
    absent and for a vocabulary or pre-tokenizer that is not supported: guessing gives wrong ids
    quietly.
    """
    keys = _Keys(metadata, source)
    keys.one_of("model", ("gpt2",))
    pre = keys.one_of("pre", tuple(_PRE))
    texts = keys.texts("tokens")
    specials = _specials(keys, texts)
    bos_id = keys.id("bos_token_id", len(texts))
    bos_id = specials.get(BEGIN_OF_TEXT) if bos_id is None else bos_id
    vocab = Vocabulary(
        source, texts, specials, keys.get("merges", list), pre in _WHOLE_PIECE, _PRE[pre]
    )
    ends = (keys.id(f"{name}_token_id", len(texts)) for name in ("eos", "eot", "eom"))
    return tokenizer(
        vocab,
        bos_id=bos_id,
        add_bos=bool(metadata.get(_PREFIX + "add_bos_token", pre == "llama-bpe")),
        stop_ids=stop_ids(specials, *ends),
        chat_template=keys.template(),
    )


def _specials(keys: _Keys, texts: list[str]) -> dict[str, int]:
    """Control and unused tokens by name; any type but normal, control, unused is refused."""
    kinds = keys.numbers("token_type")
    if len(kinds) != len(texts):
        raise CheckpointError(
            f"{keys.source}: {_PREFIX}token_type: expected {len(texts)} values, found {len(kinds)}"
        )
    if strange := set(kinds) - {_NORMAL, _CONTROL, _UNUSED}:
        id = next(id for id, kind in enumerate(kinds) if kind in strange)
        raise CheckpointError(
            f"{keys.source}: {_PREFIX}token_type: expected normal and control tokens, "
            f"found type {kinds[id]} for token {id} {texts[id]!r}"
        )
    return {text: id for id, text in enumerate(texts) if kinds[id] != _NORMAL}


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
            raise self._wrong(name, " or ".join(known), repr(value))
        return value

    def id(self, name: str, n_vocab: int) -> int | None:
        """A token id, or None if the file does not give it."""
        value = self._metadata.get(_PREFIX + name)
        if value is None:
            return None
        if not isinstance(value, Integral) or not 0 <= int(value) < n_vocab:
            raise self._wrong(name, f"an id of {n_vocab} tokens", repr(value))
        return int(value)

    def template(self) -> str | None:
        value = self._metadata.get("tokenizer.chat_template")
        return value if isinstance(value, str) else None

"""Llama 2's tokenizer.model: a sentencepiece file, read and run by the library of that name.

The library is an extra: with Llama 3 it is not needed. GGUF files and tokenizer.json hold the same
vocabulary, and pieces.py runs that without it.
"""

from __future__ import annotations

from typing import Any

from llama3np.errors import CheckpointError
from llama3np.tokenizer.base import stop_ids
from llama3np.tokenizer.pieces import SPACE, SpacedTokenizer, Table, table


def plausible(data: bytes) -> bool:
    """Whether a file that begins so is a sentencepiece model: a protobuf with <unk> first."""
    return data[:1] == b"\n" and b"<unk>" in data[:64]


def from_sentencepiece(data: bytes, source: str, **known: Any) -> SentencePieceTokenizer:
    """The tokenizer of a sentencepiece model, given its bytes; `known` goes to Tokenizer.

    Raises CheckpointError if the library is not installed, and for a file that it cannot read or
    that lacks the tokens of bytes, <s> or </s>.
    """
    library, texts = _read(data, source)
    ids = range(len(texts))
    byte_ids = [id for id in ids if library.is_byte(id)]
    tests = (library.is_control, library.is_unknown, library.is_unused)
    special_ids = [id for id in ids if any(test(id) for test in tests)]
    tokens = table(texts, byte_ids, special_ids, source)
    for name in ("<s>", "</s>"):
        if name not in tokens.specials:
            raise CheckpointError(f"{source}: expected the control token {name}, found none")
    return SentencePieceTokenizer(library, tokens, **known)


def _read(data: bytes, source: str) -> tuple[Any, list[str]]:
    """The library's reader of a model, and the text of each token."""
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError:
        raise CheckpointError(
            f"{source}: a sentencepiece file (Llama 2) needs the sentencepiece library; run: "
            f'pip install "llama3np[llama2]"'
        ) from None
    try:
        library = SentencePieceProcessor(model_proto=data)
        return library, [library.id_to_piece(id) for id in range(len(library))]
    except (RuntimeError, ValueError):  # UnicodeDecodeError is one
        raise CheckpointError(
            f"{source}: expected a sentencepiece model, found a damaged one"
        ) from None


class SentencePieceTokenizer(SpacedTokenizer):
    """A tokenizer that leaves the encoding to the library; decoding is ours, id by id."""

    def __init__(self, library: Any, tokens: Table, add_bos: bool = True, **known: Any):
        prefixed = library.normalize("a").startswith(SPACE)
        specials = tokens.specials
        super().__init__(
            tokens,
            begins_after={None, *specials.values()} if prefixed else (),
            bos_id=specials["<s>"],
            add_bos=add_bos,
            stop_ids=stop_ids(specials, specials["</s>"]),
            **known,
        )
        self._library = library

    def _encode(self, text: str, utf8: bytes) -> list[int]:
        return self._library.encode(text)

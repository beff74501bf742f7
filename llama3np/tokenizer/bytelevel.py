"""Vocabularies that write bytes as printable characters and list their merges.

tokenizer.json and GGUF both hold such a one; each reader makes a `Vocabulary` of its file, and
`tokenizer` here turns it into a `BytePairTokenizer` after checking the merges.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from llama3np.errors import CheckpointError
from llama3np.tokenizer.bpe import BytePairTokenizer, PreTokenizer
from llama3np.tokenizer.merges import check_merges


@dataclass(frozen=True)
class Vocabulary:
    """What a file says of its tokens, before any of it is believed."""

    source: str  # for messages: the file
    texts: list[str]  # by id: ordinary tokens in the byte alphabet, control tokens as they are
    specials: dict[str, int]  # control tokens: name -> id
    merges: Sequence[Any]  # "left right" or (left, right), in order of priority
    whole_piece: bool  # is a piece that is a token taken at once, without merging
    pre: PreTokenizer


def tokenizer(vocab: Vocabulary, **known: Any) -> BytePairTokenizer:
    """A tokenizer that gives the ids which the file's own rules give.

    `known` goes to Tokenizer. Raises CheckpointError where that cannot be guaranteed.
    """
    control = set(vocab.specials.values())
    ordinary = {text: id for id, text in enumerate(vocab.texts) if id not in control}
    if len(ordinary) + len(control) != len(vocab.texts):
        raise CheckpointError(
            f"{vocab.source}: expected every token once, found one text for two ids"
        )
    pieces = [b""] * len(vocab.texts)
    for id, piece in zip(ordinary.values(), _to_bytes(list(ordinary), vocab.source), strict=True):
        pieces[id] = piece
    merges = split_merges(vocab.merges, vocab.source)
    check_merges(merges, ordinary, vocab.whole_piece, vocab.source)
    return BytePairTokenizer(pieces, vocab.pre, specials=vocab.specials, **known)


def byte_alphabet() -> list[str]:
    """The character that stands for each byte (GPT-2 encoder.py, bytes_to_unicode).

    Printable Latin-1 stands for itself; the other 68 bytes, in order, have U+0100 and up.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = (chr(code) for code in range(0x100, 0x200))
    return [chr(byte) if byte in printable else next(others) for byte in range(256)]


def _to_bytes(texts: list[str], source: str) -> list[bytes]:
    """Bytes of tokens in the byte alphabet; all at once, because there are many."""
    alphabet = byte_alphabet()
    joined = "".join(texts)
    if strange := set(joined) - set(alphabet):
        text = next(text for text in texts if strange & set(text))
        raise CheckpointError(f"{source}: token {text!r} is not written in the byte-level alphabet")
    if "" in texts:
        raise CheckpointError(f"{source}: expected tokens with text, found an empty one")
    data = joined.translate({ord(c): byte for byte, c in enumerate(alphabet)}).encode("latin-1")
    pieces = []
    start = 0
    for text in texts:
        pieces.append(data[start : start + len(text)])
        start += len(text)
    return pieces


def split_merges(merges: Sequence[Any], source: str) -> list[tuple[str, ...]]:
    """Merges as pairs; the tokenizers library writes "a b", since 0.20 ["a", "b"].

    Raises CheckpointError, naming `source`, for what is not two texts.
    """
    try:
        pairs = [tuple(m.split(" ")) if isinstance(m, str) else tuple(m) for m in merges]
    except TypeError:
        pairs = [()]
    for i, pair in enumerate(pairs):
        if len(pair) != 2 or not all(isinstance(text, str) for text in pair):
            raise CheckpointError(f"{source}: merge {i}: expected two tokens, found {pair}")
    return pairs

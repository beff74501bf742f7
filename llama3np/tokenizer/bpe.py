"""Byte-pair encoding by tiktoken: cut a text into pieces, then join bytes within each piece.

    piece in the vocabulary  ->  its id
    otherwise                ->  join the adjacent pair whose bytes together have the lowest rank,
                                 the leftmost on a tie, until no pair together is a token
                                                                       (tiktoken src/lib.rs)

A token's rank is its id. That this is also what a file with a list of merges asks for is checked
in merges.py before a tokenizer is made.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from llama3np.tokenizer.base import Tokenizer


@dataclass(frozen=True)
class PreTokenizer:
    """How a text is cut into pieces: `pattern` matches them one after the other, leaving none."""

    name: str
    pattern: str


# Meta llama/tokenizer.py:47
LLAMA3 = PreTokenizer(
    "llama-bpe",
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+",
)

# Every digit alone, then GPT-2's pattern between digits (tokenizers: Digits, then ByteLevel). In
# one pass: white space before a digit is at the end of its stretch, so it stays in one piece.
SMOLLM = PreTokenizer(
    "smollm",
    r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+",
)

# tiktoken panics where `\s+(?!\S)` meets about a million white-space characters in a row (its
# regular expressions remember each as a place to come back to). Far below, other means are used.
_LONG_RUN = 100_000
_WHITE = r"[\t-\r \x85\xa0\u1680\u2000-\u200a\u2028\u2029\u202f\u205f\u3000]"  # Rust's \s
# The look-behind keeps the search linear: a run is counted from its first character only.
_LONG_WHITE = re.compile(f"(?<!{_WHITE}){_WHITE}{{{_LONG_RUN}}}")


class BytePairTokenizer(Tokenizer):
    """A tokenizer of bytes whose merge order is the order of its ids.

    Bytes without a token (SmolLM2 has 21, for example 0x04) are dropped after the text was cut
    into pieces, and their neighbours may join: what the tokenizers library does.
    """

    def __init__(self, pieces: list[bytes], pre: PreTokenizer, **known: Any):
        import tiktoken

        super().__init__(pieces, **known)
        ranks = {piece: id for id, piece in enumerate(pieces) if piece}
        self._missing = bytes(byte for byte in range(256) if bytes([byte]) not in ranks)
        self.pre, self._pattern = pre, pre.pattern
        self._bpe = tiktoken.Encoding(
            pre.name, pat_str=pre.pattern, mergeable_ranks=ranks, special_tokens={}
        )

    def _encode(self, text: str, utf8: bytes) -> list[int]:
        loses_bytes = len(utf8.translate(None, self._missing)) < len(utf8)
        if loses_bytes or (len(text) >= _LONG_RUN and _LONG_WHITE.search(text)):
            return self._encode_piecewise(text)
        return self._bpe.encode_ordinary(text)

    def _encode_piecewise(self, text: str) -> list[int]:
        """The same ids for any text, more slowly: pieces by `regex`, merges by tiktoken.

        The one difference allowed: `regex` and tiktoken may follow different versions of Unicode,
        and then disagree on whether a character that only one of them knows is a letter.
        """
        import regex  # type: ignore[import-untyped]

        pieces = (
            piece.encode().translate(None, self._missing)
            for piece in regex.findall(self._pattern, text)
        )
        return [id for piece in pieces if piece for id in self._bpe._encode_single_piece(piece)]

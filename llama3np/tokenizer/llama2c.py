"""llama2.c's tokenizer file: scored pieces, joined best score first, with bytes to fall back on.

    int32 longest piece, then for each token: float32 score, int32 length, bytes    (little endian)

Ids 0, 1, 2 are <unk>, BOS and EOS; 3 to 258 the bytes, written <0x00> to <0xFF>; pieces follow.
"""

from __future__ import annotations

import heapq
import struct
from math import isfinite
from pathlib import Path

from llama3np.errors import CheckpointError
from llama3np.tokenizer.base import Tokenizer, read_bytes

_SPECIALS = {"<unk>": 0, "<s>": 1, "</s>": 2}
_FIRST_BYTE = 3  # byte b has the id b + 3
_FIRST_PIECE = _FIRST_BYTE + 256


def from_llama2c(path: str | Path) -> Llama2cTokenizer:
    """The tokenizer of a llama2.c `.bin` file (tok512.bin, or Llama 2's tokenizer.bin).

    Raises CheckpointError for a file that is cut off or laid out otherwise: the first version of
    this format has no length before the tokens.
    """
    scores, texts = _read_tokens(read_bytes(path), path)
    expected = [f"<0x{byte:02X}>" for byte in range(256)]
    if texts[_FIRST_BYTE:_FIRST_PIECE] != expected:
        raise CheckpointError(f"{path}: expected the tokens <0x00> to <0xFF> at ids 3 to 258")
    if len(set(texts)) < len(texts):
        raise CheckpointError(f"{path}: expected {len(texts)} different tokens, found one twice")
    return Llama2cTokenizer(scores[_FIRST_PIECE:], texts[_FIRST_PIECE:])


def _read_tokens(data: bytes, path: str | Path) -> tuple[list[float], list[str]]:
    """Scores and texts of all tokens; the file ends with the last one."""
    scores, texts = [], []
    try:
        (longest,) = struct.unpack_from("<i", data)
        at = 4
        while at < len(data):
            score, length = struct.unpack_from("<fi", data, at)
            text = data[at + 8 : at + 8 + length]
            if not 0 < len(text) == length <= longest or not isfinite(score):
                raise ValueError
            scores.append(score)
            texts.append(text.decode())
            at += 8 + length
    except (struct.error, ValueError):  # UnicodeDecodeError is one
        raise CheckpointError(
            f"{path}: token {len(texts)}: expected a score, a length of at most that in the "
            f"file's first four bytes, and UTF-8, found something else or the end of the file"
        ) from None
    return scores, texts


class Llama2cTokenizer(Tokenizer):
    """Characters, or their bytes where they have no piece, joined by score (llama2.c run.c encode).

    A text gets a space before it, as sentencepiece does it; after BOS the decoder takes it away
    again. Pieces are never joined to, or from, the names of control and byte tokens.
    """

    def __init__(self, scores: list[float], texts: list[str]):
        pieces = [bytes([byte]) for byte in range(256)] + [text.encode() for text in texts]
        super().__init__(
            [b""] * len(_SPECIALS) + pieces,
            specials=dict(_SPECIALS),
            bos_id=_SPECIALS["<s>"],
            add_bos=True,
            stop_ids=(_SPECIALS["<s>"], _SPECIALS["</s>"]),  # run.c generate: BOS ends a story
        )
        self._scores = dict(zip(texts, scores, strict=True))
        self._ids = {text: _FIRST_PIECE + i for i, text in enumerate(texts)}
        self._inner = {text[i : i + 2] for text in texts for i in range(len(text) - 1)}

    def bytes_after(self, previous: int | None, id: int) -> bytes:
        """What an id adds to a text: a piece after BOS loses its first space (run.c decode)."""
        piece = self.token_bytes(id)
        if previous == self.bos_id and id >= _FIRST_PIECE:
            return piece.removeprefix(b" ")
        return piece

    def _encode(self, text: str, utf8: bytes) -> list[int]:
        if not text:
            return []
        known: dict[str, list[int]] = {}
        ids: list[int] = []
        for stretch in self._stretches(" " + text):
            if stretch not in known:
                known[stretch] = self._join(stretch)
            ids += known[stretch]
        return ids

    def _stretches(self, text: str) -> list[str]:
        """Cut a text where no piece can reach across: between two characters that no piece has.

        Joining within the stretches is joining within the text, and words come again and again.
        """
        inner = self._inner
        cuts = [i for i in range(1, len(text)) if text[i - 1 : i + 1] not in inner]
        return [text[i:j] for i, j in zip([0, *cuts], [*cuts, len(text)], strict=True)]

    def _join(self, stretch: str) -> list[int]:
        """Join the neighbours whose piece has the best score, the leftmost first, until none has.

        A symbol lives at its first character: end[i] is where it ends (0: it was joined to the one
        before it), before[i] where its left neighbour begins. The heap has every pair that was
        ever adjacent; those of which a part has been joined since are skipped.
        """
        n = len(stretch)
        end = list(range(1, n + 1))
        before = list(range(-1, n))
        heap: list[tuple[float, int, int]] = []

        def offer(left: int) -> None:
            if left >= 0 and end[left] < n:
                stop = end[end[left]]
                if (score := self._scores.get(stretch[left:stop])) is not None:
                    heapq.heappush(heap, (-score, left, stop))

        for left in range(n - 1):
            offer(left)
        while heap:
            _, left, stop = heapq.heappop(heap)
            right = end[left]
            if right in (0, n) or end[right] != stop:
                continue
            end[left], end[right], before[stop] = stop, 0, left
            offer(before[left])
            offer(left)
        return self._symbol_ids(stretch, end)

    def _symbol_ids(self, stretch: str, end: list[int]) -> list[int]:
        """Ids of the symbols from each i to end[i]: a piece's, or bytes for a character without."""
        ids: list[int] = []
        start = 0
        while start < len(stretch):
            symbol = stretch[start : end[start]]
            known = self._ids.get(symbol)
            ids += [_FIRST_BYTE + b for b in symbol.encode()] if known is None else [known]
            start = end[start]
        return ids

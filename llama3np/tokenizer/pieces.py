"""Pieces of text, joined pair by pair, with bytes to fall back on: the scheme of sentencepiece.

    characters  ->  join the neighbours of lowest cost, the leftmost on a tie, until none has a cost
    what is then no piece  ->  the tokens of its bytes              (sentencepiece bpe_model.cc)

Vocabularies of sentencepiece write a space as U+2581; here it is a space. So U+2581 in a text is
one too, as it is there once the ids are decoded.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any, NamedTuple

from llama3np.errors import CheckpointError
from llama3np.tokenizer.base import Tokenizer

SPACE = "\u2581"
BYTE_NAMES = [f"<0x{byte:02X}>" for byte in range(256)]

# What a text gets before it: sentencepiece's dummy prefix, that of Metaspace in the tokenizers
# library, or nothing.
PREFIXES = ("always", "unless space", "never")

Cost = Callable[[str, str], "float | None"]  # of joining two neighbours; None: they are not joined


def by_score(scores: Mapping[str, float]) -> Cost:
    """Join two if they are a piece together, the one of the best score first."""
    costs = {text: -score for text, score in scores.items()}
    return lambda left, right: costs.get(left + right)


def by_rank(ranks: Mapping[tuple[str, str], int]) -> Cost:
    """Join two if the pair is in a list of merges, the one listed first before the others."""
    return lambda left, right: ranks.get((left, right))


class Table(NamedTuple):
    """The tokens of a vocabulary, each id from 0 on in one of the three."""

    ids: dict[str, int]  # pieces as they are, with real spaces
    byte_ids: Sequence[int]  # of the 256 bytes
    specials: dict[str, int]  # all that no text becomes: control, unknown and unused tokens


def table(
    texts: list[str], byte_ids: list[int], special_ids: Collection[int], source: str
) -> Table:
    """The tokens of a sentencepiece vocabulary, by id: the bytes, the special ones, the pieces.

    Raises CheckpointError for a text that stands twice, byte tokens other than <0x00> to <0xFF> in
    order, and a piece that is empty or has a real space, which no text would reach.
    """
    if len(set(texts)) < len(texts):
        raise CheckpointError(f"{source}: expected every token once, found one text for two ids")
    if [texts[id] for id in byte_ids] != BYTE_NAMES:
        raise CheckpointError(
            f"{source}: expected the byte tokens <0x00> to <0xFF> in order, found {len(byte_ids)} "
            f"byte tokens or another order"
        )
    others = {*byte_ids, *special_ids}
    ids = {text: id for id, text in enumerate(texts) if id not in others}
    for text, id in ids.items():
        if not text or " " in text:
            raise CheckpointError(
                f"{source}: token {id}: expected spaces as U+2581, found {text!r}"
            )
    specials = {texts[id]: id for id in special_ids}
    return Table({text.replace(SPACE, " "): id for text, id in ids.items()}, byte_ids, specials)


class SpacedTokenizer(Tokenizer):
    """A tokenizer that puts a space before a text, and takes it away again when decoding.

    begins_after: a piece after one of these ids loses its first space; None is the beginning of
    all. For sentencepiece and the tokenizers library that is a text's own beginning; an id after
    a control token begins one too.
    """

    def __init__(self, tokens: Table, begins_after: Collection[int | None], **known: Any):
        pieces = [b""] * sum(map(len, tokens))
        for text, id in tokens.ids.items():
            pieces[id] = text.encode()
        for byte, id in enumerate(tokens.byte_ids):
            pieces[id] = bytes([byte])
        super().__init__(pieces, tokens.specials, **known)
        self._bytes, self._begins_after = set(tokens.byte_ids), begins_after

    def bytes_after(self, previous: int | None, id: int) -> bytes:
        """What an id adds to a text; the byte token of a space is no piece, and stays."""
        piece = self.token_bytes(id)
        if previous not in self._begins_after or id in self._bytes:
            return piece
        return piece.removeprefix(b" ")


class PieceTokenizer(SpacedTokenizer):
    """A tokenizer by joining. prefix: one of PREFIXES. space: how a text may write a space too."""

    def __init__(
        self,
        tokens: Table,
        cost: Cost,
        begins_after: Collection[int | None],
        prefix: str = "always",
        space: str = SPACE,
        **known: Any,
    ):
        super().__init__(tokens, () if prefix == "never" else begins_after, **known)
        self._ids, self._byte_ids, self._cost = tokens.ids, tokens.byte_ids, cost
        self._prefix, self._space = prefix, space
        self._inner = {text[i : i + 2] for text in tokens.ids for i in range(len(text) - 1)}

    def _encode(self, text: str, utf8: bytes) -> list[int]:
        text = text.replace(self._space, " ")
        if text and (self._prefix == "always" or (self._prefix != "never" and text[0] != " ")):
            text = " " + text
        known: dict[str, list[int]] = {}
        ids: list[int] = []
        for stretch in self._stretches(text):
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
        """Join the neighbours of lowest cost, the leftmost first, until none has a cost.

        A symbol lives at its first character: end[i] is where it ends (0: it was joined to the one
        before it), before[i] where its left neighbour begins. The heap has every pair that was
        ever adjacent; those of which a part has been joined since are skipped.
        """
        n = len(stretch)
        end = list(range(1, n + 1))
        before = list(range(-1, n))
        heap: list[tuple[float, int, int]] = []

        def offer(left: int) -> None:
            if left >= 0 and (middle := end[left]) < n:
                stop = end[middle]
                cost = self._cost(stretch[left:middle], stretch[middle:stop])
                if cost is not None:
                    heapq.heappush(heap, (cost, left, stop))

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
            ids += [self._byte_ids[b] for b in symbol.encode()] if known is None else [known]
            start = end[start]
        return ids

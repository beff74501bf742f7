"""llama2.c's tokenizer file: scored pieces, joined best score first, with bytes to fall back on.

    int32 longest piece, then for each token: float32 score, int32 length, bytes    (little endian)

Ids 0, 1, 2 are <unk>, BOS and EOS; 3 to 258 the bytes, written <0x00> to <0xFF>; pieces follow.
"""

from __future__ import annotations

import struct
from math import isfinite
from pathlib import Path

from llama3np.errors import CheckpointError
from llama3np.tokenizer.base import read_bytes
from llama3np.tokenizer.pieces import BYTE_NAMES, PieceTokenizer, Table, by_score

_SPECIALS = {"<unk>": 0, "<s>": 1, "</s>": 2}
_FIRST_BYTE = 3  # byte b has the id b + 3
_FIRST_PIECE = _FIRST_BYTE + 256


def from_llama2c(path: str | Path) -> PieceTokenizer:
    """The tokenizer of a llama2.c `.bin` file (tok512.bin, or Llama 2's tokenizer.bin).

    Raises CheckpointError for a file that is cut off or laid out otherwise: the first version of
    this format has no length before the tokens.
    """
    scores, texts = _read_tokens(read_bytes(path), path)
    if texts[_FIRST_BYTE:_FIRST_PIECE] != BYTE_NAMES:
        raise CheckpointError(f"{path}: expected the tokens <0x00> to <0xFF> at ids 3 to 258")
    if len(set(texts)) < len(texts):
        raise CheckpointError(f"{path}: expected {len(texts)} different tokens, found one twice")
    return of_pieces(scores[_FIRST_PIECE:], texts[_FIRST_PIECE:])


def of_pieces(scores: list[float], texts: list[str]) -> PieceTokenizer:
    """The tokenizer of the scored pieces that come after the byte tokens, all different."""
    ids = {text: _FIRST_PIECE + i for i, text in enumerate(texts)}
    return PieceTokenizer(
        Table(ids, range(_FIRST_BYTE, _FIRST_PIECE), dict(_SPECIALS)),
        by_score(dict(zip(texts, scores, strict=True))),
        begins_after={_SPECIALS["<s>"]},  # run.c decode: after BOS only
        space=" ",
        bos_id=_SPECIALS["<s>"],
        add_bos=True,
        stop_ids=(_SPECIALS["<s>"], _SPECIALS["</s>"]),  # run.c generate: BOS ends a story
    )


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

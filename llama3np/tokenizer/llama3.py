"""Llama 3's tokenizer.model: one line for each token, its bytes in base64 and its rank."""

from __future__ import annotations

import binascii
from pathlib import Path

from llama3np.errors import CheckpointError
from llama3np.tokenizer.base import stop_ids
from llama3np.tokenizer.bpe import LLAMA3, BytePairTokenizer

BEGIN_OF_TEXT = "<|begin_of_text|>"
N_RANKS = 128_000  # with another count the file is cut off or of another model
N_SPECIALS = 256

# The names of Llama 3.1 and later, from id 128000 on (llama-models tokenizer.py). The file of 3.0
# is the same, and has other names for ids that its models do not use.
_NAMED = (
    "begin_of_text",
    "end_of_text",
    "reserved_special_token_0",
    "reserved_special_token_1",
    "finetune_right_pad_id",
    "step_id",
    "start_header_id",
    "end_header_id",
    "eom_id",
    "eot_id",
    "python_tag",
    "image",
)


def from_ranks(data: bytes, path: str | Path) -> BytePairTokenizer:
    """The tokenizer of a `tokenizer.model` from Meta's Llama 3 folders, given its bytes.

    Raises CheckpointError, naming `path` and the line, for anything but 128,000 tokens with the
    ranks 0 to 127,999.
    """
    pieces = _read_ranks(data, path)
    specials = {name: N_RANKS + i for i, name in enumerate(special_names())}
    return BytePairTokenizer(
        pieces + [b""] * N_SPECIALS,
        LLAMA3,
        specials=specials,
        bos_id=specials[BEGIN_OF_TEXT],
        add_bos=True,
        stop_ids=stop_ids(specials),
    )


def special_names() -> list[str]:
    """All 256 control tokens in the order of their ids."""
    reserved = (f"reserved_special_token_{i}" for i in range(2, N_SPECIALS - len(_NAMED) + 2))
    return [f"<|{name}|>" for name in (*_NAMED, *reserved)]


def _read_ranks(data: bytes, path: str | Path) -> list[bytes]:
    """The bytes of each rank, 0 to 127,999; every single byte among them."""
    ranks: dict[int, bytes] = {}
    for number, line in enumerate(data.splitlines(), start=1):
        try:
            token, rank = line.split()
            ranks[int(rank)] = piece = binascii.a2b_base64(token)
            if binascii.b2a_base64(piece, newline=False) != token:  # a2b skips what it dislikes
                raise ValueError
        except ValueError:  # binascii.Error is one
            raise CheckpointError(
                f"{path}: line {number}: expected base64 and a rank, found {line[:40]!r}"
            ) from None
        if len(ranks) != number:
            raise CheckpointError(f"{path}: line {number}: rank {int(rank)} is there twice")
    if len(ranks) != N_RANKS:
        raise CheckpointError(f"{path}: expected {N_RANKS} ranks, found {len(ranks)}")
    hole = next((rank for rank in range(N_RANKS) if not ranks.get(rank)), None)
    if hole is not None:
        raise CheckpointError(f"{path}: expected ranks 0 to {N_RANKS - 1}, found none with {hole}")
    _check_tokens(set(ranks.values()), path)
    return [ranks[rank] for rank in range(N_RANKS)]


def _check_tokens(tokens: set[bytes], path: str | Path) -> None:
    if len(tokens) != N_RANKS:
        raise CheckpointError(f"{path}: {N_RANKS - len(tokens)} ranks repeat the bytes of another")
    for byte in range(256):
        if bytes([byte]) not in tokens:
            raise CheckpointError(
                f"{path}: expected a token for every byte, found none for {byte:#04x}"
            )

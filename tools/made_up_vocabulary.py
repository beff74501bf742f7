"""A made-up vocabulary of Llama 3's size, in each of the files that vocabularies come in.

128,000 tokens and about 280,000 merges, as the real one has, with tokens of about its lengths: so
opening it takes what opening the real one takes. It begins with the 256 bytes, goes on with all
pairs of 36 letters, and with words of random letters: every beginning of a word is a token. The
letters are drawn by the formula of make_checkpoint.py, from a tensor named "vocabulary".
"""

from __future__ import annotations

import base64
import functools
import json
from pathlib import Path
from typing import Any

import made_up

from llama3np.tokenizer.bpe import LLAMA3
from llama3np.tokenizer.bytelevel import byte_alphabet
from llama3np.tokenizer.llama3 import BEGIN_OF_TEXT, N_RANKS, special_names

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJ"  # 36 of them give about Llama 3's merges
SHORTEST, LENGTHS = 4, 8  # words have 4 to 11 letters, and half of them a space before
END_OF_TURN = "<|eot_id|>"


@functools.cache
def tokens() -> list[str]:
    """The 128,000 tokens by id, in the byte-level alphabet."""
    space = byte_alphabet()[ord(" ")]
    known = dict.fromkeys(byte_alphabet())
    known |= dict.fromkeys(a + b for a in space + LETTERS for b in LETTERS)
    drawn = iter(made_up.drawn(made_up.key("vocabulary", 0), 0, 1 << 20).tolist())
    while len(known) < N_RANKS:
        n_letters = SHORTEST + next(drawn) % LENGTHS
        before = space if next(drawn) % 2 else ""
        word = before + "".join(LETTERS[next(drawn) % len(LETTERS)] for _ in range(n_letters))
        known |= dict.fromkeys(word[:end] for end in range(3, len(word) + 1))
    return list(known)[:N_RANKS]


@functools.cache
def merges() -> list[tuple[str, str]]:
    """All pairs of tokens that together are a token, in the order of what they make."""
    ids = {token: id for id, token in enumerate(tokens())}
    pairs = []
    for token in ids:
        cuts = ((token[:cut], token[cut:]) for cut in range(1, len(token)))
        known = [pair for pair in cuts if pair[0] in ids and pair[1] in ids]
        pairs += sorted(known, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return pairs


def gguf_metadata() -> dict[str, Any]:
    """The tokenizer.ggml.* keys of a GGUF file."""
    specials = special_names()
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": tokens() + specials,
        "tokenizer.ggml.token_type": [1] * N_RANKS + [3] * len(specials),  # normal, control
        "tokenizer.ggml.merges": [f"{left} {right}" for left, right in merges()],
        "tokenizer.ggml.bos_token_id": N_RANKS + specials.index(BEGIN_OF_TEXT),
        "tokenizer.ggml.eos_token_id": N_RANKS + specials.index(END_OF_TURN),
    }


def write_tokenizer_model(path: Path) -> None:
    """Meta's file: a line of base64 and rank for each token."""
    alphabet = {character: byte for byte, character in enumerate(byte_alphabet())}
    pieces = (bytes(alphabet[character] for character in token) for token in tokens())
    lines = (base64.b64encode(piece) + b" %d\n" % id for id, piece in enumerate(pieces))
    path.write_bytes(b"".join(lines))


def write_tokenizer_json(path: Path) -> None:
    """The file of the tokenizers library, with the keys of Llama 3's."""
    split = {"type": "Split", "pattern": {"Regex": LLAMA3.pattern}, "behavior": "Isolated"}
    to_bytes = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True}
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    model = {
        "type": "BPE",
        "ignore_merges": True,
        "vocab": {token: id for id, token in enumerate(tokens())},
        "merges": merges(),
    }
    file = {
        "version": "1.0",
        "added_tokens": [
            {"id": id, "content": name, "special": True, **flags}
            for id, name in enumerate(special_names(), N_RANKS)
        ],
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [split | {"invert": False}, to_bytes | {"use_regex": False}],
        },
        "decoder": to_bytes | {"use_regex": True},
        "model": model,
    }
    path.write_text(json.dumps(file, ensure_ascii=False), encoding="utf-8")

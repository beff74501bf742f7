"""A tokenizer as the files that other programs read: tokenizer.ggml.* keys, tokenizer.json.

Only vocabularies of bytes (Llama 3's, SmolLM2's) are written; for others InputError says so. Their
ids are the order of their merges (merges.py), so the merges a file lists can be told from the ids:
all pairs of tokens that make a token where pieces are looked up whole (Llama 3's way), else each
token's own last merge.
"""

from __future__ import annotations

import base64
from itertools import pairwise
from typing import Any, NamedTuple

from llama3np.errors import InputError
from llama3np.tokenizer.base import Tokenizer
from llama3np.tokenizer.bpe import LLAMA3, SMOLLM, BytePairTokenizer
from llama3np.tokenizer.bytelevel import byte_alphabet
from llama3np.tokenizer.gguf import CONTROL, NORMAL, UNUSED
from llama3np.tokenizer.huggingface import PRE_TOKENIZERS
from llama3np.tokenizer.llama3 import N_RANKS, N_SPECIALS

_ENDS = {"eot": ("<|eot_id|>", "<|im_end|>"), "eom": ("<|eom_id|>",)}  # GGUF key -> its tokens


class Exported(NamedTuple):
    """What every format holds of a vocabulary of bytes."""

    texts: list[str]  # by id: ordinary tokens in the byte alphabet, control tokens as they are
    specials: dict[str, int]
    merges: list[tuple[str, str]]
    whole_piece: bool  # is a piece that is a token taken at once


def exported(tokenizer: Tokenizer) -> Exported:
    """A vocabulary with its merges. Raises InputError for one that is not of bytes."""
    if not isinstance(tokenizer, BytePairTokenizer) or tokenizer.pre not in (LLAMA3, SMOLLM):
        raise InputError("a vocabulary of characters (Llama 2's kind) is not written")
    alphabet = byte_alphabet()
    names = {id: name for name, id in tokenizer.specials.items()}
    pieces = [tokenizer.token_bytes(id) for id in range(tokenizer.n_vocab)]
    texts = [
        names[id] if id in names else "".join(alphabet[byte] for byte in piece)
        for id, piece in enumerate(pieces)
    ]
    if len(set(texts)) < len(texts):
        raise InputError("a control token has the text of another token, which no file can hold")
    whole_piece = tokenizer.pre == LLAMA3
    ordinary = {text: id for id, text in enumerate(texts) if id not in names}
    merges = _all_pairs(ordinary) if whole_piece else _last_merges(ordinary)
    return Exported(texts, tokenizer.specials, merges, whole_piece)


def _all_pairs(ids: dict[str, int]) -> list[tuple[str, str]]:
    """Every pair of tokens that together are a token, in the order of the ids they make."""
    merges: list[tuple[str, str]] = []
    for text in sorted(ids, key=ids.__getitem__):
        cuts = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        pairs = [pair for pair in cuts if pair[0] in ids and pair[1] in ids]
        merges += sorted(pairs, key=lambda pair: (ids[pair[0]], ids[pair[1]]))
    return merges


def _last_merges(ids: dict[str, int]) -> list[tuple[str, str]]:
    """The two tokens that joining leaves of each token when only lower ids are known."""
    merges = []
    for text in sorted(ids, key=ids.__getitem__):
        if len(text) == 1:
            continue
        parts = _joined_below(text, ids)
        if len(parts) != 2:
            raise InputError(f"token {text!r} cannot be reached by merging two tokens")
        merges.append((parts[0], parts[1]))
    return merges


def _joined_below(text: str, ids: dict[str, int]) -> list[str]:
    """Join the pair of lowest id, the leftmost first, among ids below that of the text."""
    parts, limit = list(text), ids[text]
    while len(parts) > 2:
        made = [ids.get(a + b, limit) for a, b in pairwise(parts)]
        lowest = min(made)
        if lowest >= limit:
            break
        i = made.index(lowest)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return parts


# ---- GGUF ------------------------------------------------------------------------------------


def to_gguf(tokenizer: Tokenizer, n_rows: int, eos_id: int | None) -> dict[str, Any]:
    """The tokenizer.* metadata of a GGUF file; n_rows: of the embedding table.

    Rows beyond the vocabulary get an unused token each, [PAD7], as llama.cpp's converter gives
    them: it wants as many tokens as rows. Raises InputError as `exported` does.
    """
    vocab = exported(tokenizer)
    ids, n_absent = vocab.specials, n_rows - len(vocab.texts)
    kinds = [NORMAL] * len(vocab.texts)
    for id in ids.values():
        kinds[id] = CONTROL
    keys = {
        "model": "gpt2",
        "pre": "llama-bpe" if vocab.whole_piece else "smollm",
        "tokens": vocab.texts + [f"[PAD{len(vocab.texts) + i}]" for i in range(n_absent)],
        "token_type": kinds + [UNUSED] * n_absent,
        "merges": [f"{left} {right}" for left, right in vocab.merges],
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": eos_id,
        "add_bos_token": tokenizer.add_bos,
    }
    for key, names in _ENDS.items():
        found = [ids[name] for name in names if name in ids and ids[name] != eos_id]
        keys[f"{key}_token_id"] = found[0] if found else None
    given = {f"tokenizer.ggml.{key}": value for key, value in keys.items() if value is not None}
    template = tokenizer.chat_template
    return given | ({} if template is None else {"tokenizer.chat_template": template})


# ---- Hugging Face ----------------------------------------------------------------------------


def to_tokenizer_json(tokenizer: Tokenizer) -> dict[str, Any]:
    """The object of a tokenizer.json. Raises InputError as `exported` does."""
    vocab = exported(tokenizer)
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    added = sorted(vocab.specials.items(), key=lambda item: item[1])
    model = {
        "type": "BPE",
        "dropout": None,
        "unk_token": None,
        "continuing_subword_prefix": None,
        "end_of_word_suffix": None,
        "fuse_unk": False,
        "byte_fallback": False,
        "ignore_merges": vocab.whole_piece,
        "vocab": {text: id for id, text in enumerate(vocab.texts)},
        "merges": [f"{left} {right}" for left, right in vocab.merges],
    }
    steps = PRE_TOKENIZERS[LLAMA3 if vocab.whole_piece else SMOLLM]
    trimmed = [{**s, "trim_offsets": True} if s["type"] == "ByteLevel" else s for s in steps]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": n, **flags, "special": True} for n, id in added],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": trimmed},
        "post_processor": _bos_before(tokenizer),
        "decoder": {
            "type": "ByteLevel",
            "add_prefix_space": True,
            "trim_offsets": True,
            "use_regex": True,
        },
        "model": model,
    }


def _bos_before(tokenizer: Tokenizer) -> dict[str, Any] | None:
    """The step that puts BOS before each text, where the model wants it."""
    if not tokenizer.add_bos:
        return None
    bos = name_of(tokenizer, tokenizer.bos_id)
    special = {"SpecialToken": {"id": bos, "type_id": 0}}
    first, second = ({"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB"))
    return {
        "type": "TemplateProcessing",
        "single": [special, first],
        "pair": [special, first, special, second],
        "special_tokens": {bos: {"id": bos, "ids": [tokenizer.bos_id], "tokens": [bos]}},
    }


def to_tokenizer_config(tokenizer: Tokenizer, eos_id: int | None) -> dict[str, Any]:
    """The object of the tokenizer_config.json beside it."""
    given = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": name_of(tokenizer, tokenizer.bos_id),
        "eos_token": name_of(tokenizer, eos_id),
        "add_bos_token": tokenizer.add_bos,
        "clean_up_tokenization_spaces": False,
        "chat_template": tokenizer.chat_template,
    }
    return {key: value for key, value in given.items() if value is not None}


def name_of(tokenizer: Tokenizer, id: int | None) -> str | None:
    """The name of a control token; None for None and for an ordinary token."""
    return next((name for name, its_id in tokenizer.specials.items() if its_id == id), None)


# ---- Meta ------------------------------------------------------------------------------------


def to_ranks(tokenizer: Tokenizer) -> bytes:
    """Meta's tokenizer.model. Raises InputError for any vocabulary but Llama 3's."""
    if (
        not isinstance(tokenizer, BytePairTokenizer)
        or tokenizer.pre != LLAMA3
        or sorted(tokenizer.specials.values()) != list(range(N_RANKS, N_RANKS + N_SPECIALS))
    ):
        raise InputError("Meta's tokenizer.model has a place only for Llama 3's vocabulary")
    lines = (
        base64.b64encode(tokenizer.token_bytes(rank)) + b" %d\n" % rank for rank in range(N_RANKS)
    )
    return b"".join(lines)

"""Chat data: dialogs of a JSONL file as one stream of tokens, of which the answers are learned.

A line is {"messages": [{"role": "user", "content": "Hi"}, ...]}, as OpenAI's fine-tuning files
have it, or the list alone. Blank lines are skipped. An answer with "weight": 0 is read, and not
learned. The ids are those of llama3np.chat, so training sees what `chat` will ask.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

import numpy as np

from llama3np.chat import chat_format, chat_ids
from llama3np.errors import InputError
from llama3np.load.files import parse_value
from llama3np.tokenizer import Tokenizer
from llama3np.train.texts import open_text
from llama3np.train.tokens import Tokens, store

Message = Mapping[str, Any]


class _Turn(NamedTuple):
    """How a turn of a format stands in the ids: opening ... heading and content ... closing."""

    opening: str
    heading: str  # what is encoded after it before an answer's content, or in one with it
    closing: str


_TURNS = {
    "llama3": _Turn("<|end_header_id|>", "\n\n", "<|eot_id|>"),
    "chatml": _Turn("<|im_start|>", "assistant\n", "<|im_end|>"),
}


# ---- lines -----------------------------------------------------------------------------------


def read(path: str | Path) -> Iterator[tuple[int, list[Message]]]:
    """The number and the messages of each line that has any; roles are left to the format.

    Raises InputError with file and line for one that is no list of messages, or has no answer.
    """
    with open_text(path) as file:
        for number, line in enumerate(file, start=1):
            if line.strip():
                yield number, _messages(line, f"{path}:{number}")


def contents(files: Iterable[str | Path]) -> Iterator[str]:
    """What the messages of these files say: the text to make a vocabulary from."""
    for file in files:
        for _, messages in read(file):
            yield from (message["content"] for message in messages)


def _messages(line: str, where: str) -> list[Message]:
    value = parse_value(line, where)
    messages = value.get("messages") if isinstance(value, dict) else value
    if not isinstance(messages, list):
        raise InputError(f"{where}: expected a list of messages, found {short(value)}")
    for i, message in enumerate(messages):
        _check(message, f"{where}: message {i}")
    if not any(map(_learned, messages)):
        raise InputError(
            f"{where}: expected an assistant's message, of a weight other than 0, to learn from, "
            f"found {short(messages)}"
        )
    return messages


def _check(message: Any, where: str) -> None:
    for key in ("role", "content"):
        if not isinstance(message, dict) or not isinstance(message.get(key), str):
            raise InputError(f"{where}: expected a text for {key!r}, found {short(message)}")
        try:
            message[key].encode()
        except UnicodeEncodeError as error:  # JSON can say what UTF-8 cannot hold
            lone = f"U+{ord(error.object[error.start]):04X}"
            raise InputError(
                f"{where}: {key}: expected Unicode, found the lone surrogate {lone}"
            ) from None
    if message.get("weight", 1) not in (0, 1):
        raise InputError(f"{where}: weight: expected 0 or 1, found {short(message['weight'])}")


def _learned(message: Message) -> bool:
    return message["role"] == "assistant" and message.get("weight", 1) == 1


# ---- ids -------------------------------------------------------------------------------------


def encode(tokenizer: Tokenizer, messages: Sequence[Message]) -> Tokens:
    """Ids of a dialog, and 1 for what the assistant says and the token that closes its turn.

    ids_M: int64, those of chat_ids without the header of another answer; mask_M: uint8. ChatML
    encodes a heading and what follows in one: a token that has the end of one and the beginning
    of the other (an answer that begins with white space may make one) is not learned, as no
    prompt leads to it. Raises InputError as chat_ids does, and for Llama 2's format.
    """
    ids = chat_ids(tokenizer, messages, add_generation_prompt=False)
    turn = _turn(tokenizer)
    opening, closing = (tokenizer.specials[name] for name in (turn.opening, turn.closing))
    begins = [i + 1 for i, id in enumerate(ids) if id == opening]
    ends = [i + 1 for i, id in enumerate(ids) if id == closing]
    added = len(begins) - len(messages)  # a template's own system message
    mask_M = np.zeros(len(ids), np.uint8)
    for message, begin, end in zip(messages, begins[added:], ends[added:], strict=True):
        if _learned(message):
            begin += _n_heading(tokenizer, ids[begin:end], turn.heading)
            mask_M[begin:end] = 1
    return Tokens(np.array(ids, np.int64), mask_M)


def _turn(tokenizer: Tokenizer) -> _Turn:
    name = chat_format(tokenizer)
    if name not in _TURNS:
        raise InputError(
            f"chat data: expected a tokenizer with the dialogs of {' or '.join(_TURNS)}, found "
            f"{name or 'none'}"
        )
    return _TURNS[name]


def _n_heading(tokenizer: Tokenizer, ids: Sequence[int], heading: str) -> int:
    """How many ids have a part of the heading that a turn begins with."""
    left = len(heading)  # in bytes: it is ASCII
    for n_ids, id in enumerate(ids):
        if left <= 0:
            return n_ids
        left -= len(tokenizer.token_bytes(id))
    return len(ids)


# ---- files -----------------------------------------------------------------------------------


def write(
    directory: str | Path, tokenizer: Tokenizer, files: Iterable[str | Path], *, length: int
) -> None:
    """Encode dialogs into token files with masks; the last tenth of them is for validation.

    At least one dialog is for either; what is trained on must have a window of `length`. The
    directory appears whole or not at all. Raises InputError as `read` and `encode` do, with file
    and line, for too few dialogs or tokens, and for a directory that is there already.
    """
    ends: list[int] = []  # of each dialog, in tokens

    def split(n_tokens: int) -> int:
        if len(ends) < 2:
            raise InputError(
                f"chat data: expected two dialogs or more, one to validate by, found {len(ends)}"
            )
        n_train = ends[int(len(ends) * 0.9) - 1]  # at least one dialog on each side
        if n_train <= length:
            raise InputError(
                f"chat data: expected {length + 1} tokens or more to train on, for one window of "
                f"{length}, found {n_train} of {n_tokens}"
            )
        return n_train

    store(directory, tokenizer.n_vocab, _encoded(tokenizer, files, ends), split)


def _encoded(
    tokenizer: Tokenizer, files: Iterable[str | Path], ends: list[int]
) -> Iterator[Tokens]:
    """The tokens of each dialog; where it ends is added to `ends`."""
    _turn(tokenizer)
    for file in files:
        for number, messages in read(file):
            try:
                tokens = encode(tokenizer, messages)
            except InputError as error:
                raise InputError(f"{file}:{number}: {error}") from None
            ends.append((ends[-1] if ends else 0) + len(tokens.ids_M))
            yield tokens

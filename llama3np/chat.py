"""Dialogs as token ids, in the format that the model at hand was trained on.

A dialog is built from ids: control tokens are put in by name, and what people wrote is encoded as
ordinary text between them. Whatever a message says, it cannot end its turn or begin another.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from llama3np.errors import InputError
from llama3np.tokenizer import Tokenizer

# The control tokens each format needs; the first opens every turn.
FORMATS = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
}
# What a role is called in its header. Tools answer as "ipython" (llama-models chat_format.py).
_ROLES = {
    "llama3": {
        "system": "system",
        "user": "user",
        "assistant": "assistant",
        "ipython": "ipython",
        "tool": "ipython",
    },
    "chatml": {"system": "system", "user": "user", "assistant": "assistant"},
}
# A system turn written out in a template. Without quotes in it: it is one literal, not a variable.
_DEFAULT_SYSTEM = re.compile(r"<\|im_start\|>system(?:\n|\\n)([^'\"{}<>|]+)<\|im_end\|>")


def chat_format(tokenizer: Tokenizer) -> str | None:
    """The dialog format of a vocabulary, "llama3" or "chatml"; None if it has none.

    The control tokens tell. Where a vocabulary has those of both, its template does.
    """
    known = [
        name for name, tokens in FORMATS.items() if all(t in tokenizer.specials for t in tokens)
    ]
    used = [name for name in known if FORMATS[name][0] in (tokenizer.chat_template or "")]
    return next(iter(used or known), None)


def chat_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    add_generation_prompt: bool = True,
) -> list[int]:
    """Ids of a dialog, ready for the assistant's answer if `add_generation_prompt`.

    messages: {"role": ..., "content": ...} each. Roles are system, user and assistant, and with
    Llama 3 ipython (or tool). Contents are taken as they are, as Meta does: nothing is stripped.
    Raises InputError for a vocabulary without a format, an unknown role, or a message that lacks
    its role or content.
    """
    name = chat_format(tokenizer)
    if name is None:
        raise InputError("the model has no chat format: its vocabulary lacks the control tokens")
    turns = [_turn(i, message, _ROLES[name]) for i, message in enumerate(messages)]
    build = _llama3_ids if name == "llama3" else _chatml_ids
    ids = build(tokenizer, turns, add_generation_prompt)
    return tokenizer.with_bos(ids) if tokenizer.add_bos else ids


def _turn(i: int, message: Mapping[str, str], roles: Mapping[str, str]) -> tuple[str, str]:
    """The role as it is written, and the content, of message i."""
    for key in ("role", "content"):
        if not isinstance(message, Mapping) or not isinstance(message.get(key), str):
            raise InputError(f"chat: message {i}: expected a text for {key!r}, found {message!r}")
    if message["role"] not in roles:
        raise InputError(
            f"chat: message {i}: expected a role among {', '.join(roles)}, "
            f"found {message['role']!r}"
        )
    return roles[message["role"]], message["content"]


def _llama3_ids(tokenizer: Tokenizer, turns: list[tuple[str, str]], prompt: bool) -> list[int]:
    r"""BOS, then <|start_header_id|>role<|end_header_id|>\n\ncontent<|eot_id|> for each turn.

    Meta llama/tokenizer.py:207, ChatFormat; BOS comes from chat_ids.
    Role, line ends and content are encoded apart, so that a content of line ends does not join
    the header's.
    """
    start, end, eot = (tokenizer.specials[token] for token in FORMATS["llama3"])

    def header(role: str) -> list[int]:
        return [start, *tokenizer.encode(role), end, *tokenizer.encode("\n\n")]

    ids = [id for role, text in turns for id in (*header(role), *tokenizer.encode(text), eot)]
    return ids + header("assistant") if prompt else ids


def _chatml_ids(tokenizer: Tokenizer, turns: list[tuple[str, str]], prompt: bool) -> list[int]:
    r"""<|im_start|>role\ncontent<|im_end|>\n for each turn.

    Role and content are one text between control tokens, as in Hugging Face's tokenizers. A
    template with a system message of its own puts it before a dialog that has none.
    """
    start, end = (tokenizer.specials[token] for token in FORMATS["chatml"])
    default = _DEFAULT_SYSTEM.search(tokenizer.chat_template or "")
    if default and turns and turns[0][0] != "system":
        turns = [("system", default[1].replace("\\n", "\n")), *turns]
    newline = tokenizer.encode("\n")
    texts = [tokenizer.encode(f"{role}\n{text}") for role, text in turns]
    ids = [id for text_ids in texts for id in (start, *text_ids, end, *newline)]
    return [*ids, start, *tokenizer.encode("assistant\n")] if prompt else ids

"""Dialogs as token ids, in the format that the model at hand was trained on.

A dialog is built from ids: control tokens are put in by name, and what people wrote is encoded as
ordinary text between them. Whatever a message says, it cannot end its turn or begin another. Llama
2 marks its turns by ordinary text, so a message with such a mark in it is refused.

Which format it is, the files tell: Llama 3 and ChatML by control tokens that nothing else needs,
Llama 2 by a chat template with its marks, for its base and chat models have one vocabulary. Meta's
folders of Llama 2 have no template: there the format has to be asked for.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from itertools import zip_longest

from llama3np.errors import InputError
from llama3np.tokenizer import Tokenizer

# The control tokens each format needs.
FORMATS = {
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama2": ("<s>", "</s>"),
}
# What a template has in it that makes dialogs of the format. Mistral's has [INST] alone.
_MARKS = {
    "llama3": ("<|start_header_id|>",),
    "chatml": ("<|im_start|>",),
    "llama2": ("[INST]", "<<SYS>>"),
}
_LLAMA2_TAGS = ("[INST]", "[/INST]", "<<SYS>>", "<</SYS>>")  # llama/generation.py, SPECIAL_TAGS
_PLAIN = {role: role for role in ("system", "user", "assistant")}
# What a role is called in its header. Tools answer as "ipython" (llama-models chat_format.py).
_ROLES = {
    "llama3": {**_PLAIN, "ipython": "ipython", "tool": "ipython"},
    "chatml": _PLAIN,
    "llama2": _PLAIN,
}
# A system turn written out in a template. Without quotes in it: it is one literal, not a variable.
_DEFAULT_SYSTEM = re.compile(r"<\|im_start\|>system(?:\n|\\n)([^'\"{}<>|]+)<\|im_end\|>")


def chat_format(tokenizer: Tokenizer) -> str | None:
    """The dialog format of a vocabulary, a key of FORMATS; None if nothing tells one.

    The template tells; without one, the control tokens of Llama 3 or ChatML.
    """
    template = tokenizer.chat_template or ""
    known = [name for name in FORMATS if not _lacking(tokenizer, name)]
    used = [name for name in known if all(mark in template for mark in _MARKS[name])]
    return next(iter(used or (name for name in known if name != "llama2")), None)


def _lacking(tokenizer: Tokenizer, name: str) -> list[str]:
    return [token for token in FORMATS[name] if token not in tokenizer.specials]


def _chosen(tokenizer: Tokenizer, asked: str | None) -> str:
    """The format that was asked for, else the vocabulary's own. InputError if it has none."""
    if asked is None:
        if (name := chat_format(tokenizer)) is not None:
            return name
        fitting = [name for name in FORMATS if not _lacking(tokenizer, name)]
        choose = f"choose {' or '.join(fitting)} if it is one" if fitting else "none fits"
        raise InputError(f"the model has no chat format that its tokenizer tells; {choose}")
    if asked not in FORMATS:
        raise InputError(f"chat format: expected one of {', '.join(FORMATS)}, found {asked!r}")
    if lacking := _lacking(tokenizer, asked):
        raise InputError(f"chat format {asked}: the vocabulary has no control token {lacking[0]}")
    return asked


def chat_ids(
    tokenizer: Tokenizer,
    messages: Sequence[Mapping[str, str]],
    add_generation_prompt: bool = True,
    format: str | None = None,
) -> list[int]:
    """Ids of a dialog, ready for the assistant's answer if `add_generation_prompt`.

    messages: {"role": ..., "content": ...} each. Roles are system, user and assistant, and with
    Llama 3 ipython (or tool). Contents are taken as they are, as Meta does, but for Llama 2, where
    it strips them. format: a key of FORMATS in place of the vocabulary's own.
    Raises InputError for a vocabulary without a format, an unknown role, a message that lacks
    its role or content, and a dialog that the format cannot express.
    """
    name = _chosen(tokenizer, format)
    turns = [_turn(i, message, _ROLES[name]) for i, message in enumerate(messages)]
    ids = _BUILDERS[name](tokenizer, turns, add_generation_prompt)
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


def _llama2_ids(tokenizer: Tokenizer, turns: list[tuple[str, str]], prompt: bool) -> list[int]:
    r"""<s>[INST] user [/INST] answer </s> for each pair; the last user's ends with [/INST].

    Meta llama/generation.py, chat_completion: contents are stripped, and a system message stands
    in the first user's, as <<SYS>>\nsystem\n<</SYS>>\n\n.
    """
    texts = _llama2_texts(turns)
    if prompt and texts and len(texts) % 2 == 0:
        raise InputError("chat: expected the last message to be the user's, found an answer")
    ids: list[int] = []
    for user, answer in zip_longest(texts[::2], texts[1::2]):
        pair = f"[INST] {user} [/INST]" + ("" if answer is None else f" {answer} ")
        end = () if answer is None else (tokenizer.specials["</s>"],)
        ids += [tokenizer.specials["<s>"], *tokenizer.encode(pair), *end]
    return ids


def _llama2_texts(turns: list[tuple[str, str]]) -> list[str]:
    """What user and assistant say in turn, the system message inside the first."""
    roles = [role for role, _ in turns]
    first = int(roles[:1] == ["system"])
    for i, role in enumerate(roles[first:]):
        expected = ("user", "assistant")[i % 2]
        if role != expected:
            raise InputError(
                f"chat: message {first + i}: expected the role {expected!r}, found {role!r}"
            )
    for i, (_, content) in enumerate(turns):
        for tag in _LLAMA2_TAGS:
            if tag in content:
                raise InputError(f"chat: message {i}: {tag} would end or begin a turn of Llama 2")
    texts = [content for _, content in turns]
    if first:
        system, user, *rest = [*texts, ""] if len(texts) == 1 else texts
        texts = [f"<<SYS>>\n{system}\n<</SYS>>\n\n{user}", *rest]
    return [text.strip() for text in texts]


_BUILDERS = {"llama3": _llama3_ids, "chatml": _chatml_ids, "llama2": _llama2_ids}

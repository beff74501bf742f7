"""The tokenizer of a model that is trained from nothing: made from its text, or taken as it is.

| --tokenizer | ids, in this order                                                              |
|-------------|---------------------------------------------------------------------------------|
| char        | 256 bytes; each character of the text that has several; control tokens          |
| bpe:N       | 256 bytes; the pairs that are joined, most frequent first; control tokens       |
| FILE        | those of a tokenizer.json or tokenizer.model, or of a directory that has one    |

The first two are byte-level BPE in Llama 3's form, so every program that opens Llama 3 opens them,
and no text is without ids: a character that training never saw is the bytes it has in UTF-8.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any

from llama3np.errors import InputError
from llama3np.load.files import new_file
from llama3np.load.huggingface import tokenizer_of
from llama3np.tokenizer import Tokenizer, from_tokenizer_json, from_tokenizer_model
from llama3np.tokenizer.base import stop_ids
from llama3np.tokenizer.bpe import LLAMA3, BytePairTokenizer
from llama3np.tokenizer.bytelevel import byte_alphabet
from llama3np.tokenizer.export import to_tokenizer_config, to_tokenizer_json
from llama3np.tokenizer.llama3 import BEGIN_OF_TEXT
from llama3np.train.texts import blocks

END_OF_TEXT = "<|end_of_text|>"
_END_OF_TURN = "<|eot_id|>"
_CHAT = (BEGIN_OF_TEXT, END_OF_TEXT, "<|start_header_id|>", "<|end_header_id|>", _END_OF_TURN)
# Llama 3's dialogs, for transformers; llama3np.chat builds the same ids without it.
_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<|start_header_id|>' + "
    "('ipython' if message['role'] == 'tool' else message['role']) + "
    "'<|end_header_id|>\n\n' + message['content'] + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
# The library makes room for N tokens before it looks at the text. Five times the largest
# vocabularies there are.
_MOST_TOKENS = 1 << 20
# Of what stands beside a tokenizer's file, that which changes its ids or its dialogs.
_BESIDE = ("tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def make(spec: str, texts: Iterable[Path | str], directory: str | Path, chat: bool) -> Tokenizer:
    """Put the files of a tokenizer into a directory, and open it there.

    spec: as in the table above. texts: of each Path the file's text, a str is text itself.
    chat: with the control tokens of Llama 3's dialogs, not with the end of a text alone. The same
    texts make the same files. Raises InputError for a spec that is none, a text that cannot be
    read or has too few pairs, a file that holds no tokenizer, and for files that are there already.
    """
    directory = Path(directory)
    names = _CHAT if chat else (END_OF_TEXT,)
    if spec == "char":
        _write(directory, _files(byte_level(characters(_read(texts)), names)))
    elif re.fullmatch(r"bpe:\d+", spec):
        _write(directory, _files(byte_level(trained(spec, _read(texts), len(names)), names)))
    elif os.path.exists(spec):  # noqa: PTH110  that of Path raises for names that are too long
        _take(Path(spec), directory, chat)
    else:
        raise InputError(f"--tokenizer: expected char, bpe:N or a file, found {spec!r}")
    return tokenizer_of(directory)


def end_of_text(tokenizer: Tokenizer) -> int | None:
    """The id that stands between two texts: the token of that name, else any that ends one."""
    named = (END_OF_TEXT, "<|endoftext|>", "</s>")
    found = [tokenizer.specials[name] for name in named if name in tokenizer.specials]
    return next(iter([*found, *tokenizer.stop_ids]), None)


def _read(texts: Iterable[Path | str]) -> Iterator[str]:
    for text in texts:
        yield from blocks(text) if isinstance(text, Path) else [text]


# ---- vocabularies of bytes -------------------------------------------------------------------


def byte_level(longer: Iterable[bytes], names: Iterable[str]) -> BytePairTokenizer:
    """All single bytes, in the order of the tokenizers library, then these tokens and controls."""
    alphabet = byte_alphabet()
    single = [bytes([byte]) for byte in sorted(range(256), key=alphabet.__getitem__)]
    pieces = [*single, *longer]
    specials = {name: len(pieces) + i for i, name in enumerate(names)}
    return BytePairTokenizer(
        pieces + [b""] * len(specials),
        LLAMA3,
        specials=specials,
        bos_id=specials.get(BEGIN_OF_TEXT),
        add_bos=BEGIN_OF_TEXT in specials,
        stop_ids=stop_ids(specials),
        chat_template=_TEMPLATE if _END_OF_TURN in specials else None,
    )


def characters(texts: Iterable[str]) -> list[bytes]:
    """UTF-8 of each character that has several bytes, and the beginnings that joining goes through.

    A token of two bytes or more begins as a character does, and no character begins inside
    another: so nothing is ever joined across two of them, and each is one id.
    """
    found: set[str] = set()
    for text in texts:
        found.update(text)
    utf8 = [character.encode("utf-8") for character in found]
    starts = {piece[:end] for piece in utf8 for end in range(2, len(piece) + 1)}
    return sorted(starts, key=lambda piece: (len(piece), piece))  # parts before what they make


def trained(spec: str, texts: Iterable[str], n_specials: int) -> list[bytes]:
    """Tokens of several bytes, so that with bytes and control tokens there are N, of "bpe:N".

    Only pairs that stand in the text twice are joined: one that came once teaches nothing.
    """
    digits, least = spec.removeprefix("bpe:"), 256 + n_specials
    n_tokens = int(digits) if len(digits) < 20 else _MOST_TOKENS + 1  # int() has its own limit
    if not least <= n_tokens <= _MOST_TOKENS:
        raise InputError(
            f"--tokenizer: expected {least} tokens or more (256 bytes and {n_specials} for "
            f"control), and at most {_MOST_TOKENS}, found {short(spec)}"
        )
    byte_of = {character: byte for byte, character in enumerate(byte_alphabet())}
    ids = _joined(texts, n_tokens - n_specials)
    if len(ids) < n_tokens - n_specials:
        found = len(ids) + n_specials
        raise InputError(f"--tokenizer {spec}: the text makes only {found} tokens, ask for fewer")
    in_order = sorted(ids, key=ids.__getitem__)
    return [bytes(map(byte_of.__getitem__, text)) for text in in_order if len(text) > 1]


def _joined(texts: Iterable[str], n_tokens: int) -> dict[str, int]:
    """Byte-pair encoding learned by the tokenizers library: each token, as it writes it, its id."""
    try:
        from tokenizers import Regex, models, pre_tokenizers, trainers
        from tokenizers import Tokenizer as Library
    except ImportError:
        raise InputError(
            '--tokenizer bpe:N needs the tokenizers library; run: pip install "llama3np[train]"'
        ) from None
    library = Library(models.BPE())
    split = pre_tokenizers.Split(Regex(LLAMA3.pattern), "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    library.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    trainer = trainers.BpeTrainer(
        vocab_size=n_tokens,
        min_frequency=2,
        initial_alphabet=byte_alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(texts, trainer)
    return library.get_vocab()


# ---- files -----------------------------------------------------------------------------------


def _files(tokenizer: Tokenizer) -> dict[str, dict[str, Any]]:
    """What to write, by name. Raises InputError for what a tokenizer.json cannot hold."""
    eos_id = tokenizer.specials.get(_END_OF_TURN, end_of_text(tokenizer))
    return {
        "tokenizer_config.json": to_tokenizer_config(tokenizer, eos_id),
        "tokenizer.json": to_tokenizer_json(tokenizer),
    }


def _write(directory: Path, files: Mapping[str, Mapping[str, Any]]) -> None:
    for name, value in files.items():
        with new_file(directory / name) as temporary:
            text = json.dumps(value, indent=1, ensure_ascii=False) + "\n"
            temporary.write_text(text, encoding="utf-8")


def _take(source: Path, directory: Path, chat: bool) -> None:
    """Put a tokenizer that exists where it is looked for, so that every program sees the same ids.

    That takes a tokenizer.json with a tokenizer_config.json beside it: they are copied, or written
    for a file that has none of them. What cannot be written is copied: Llama 2's kind.
    """
    names = {"tokenizer.json": from_tokenizer_json, "tokenizer.model": from_tokenizer_model}
    found = [source / name for name in names] if source.is_dir() else [source]
    file = next((file for file in found if file.is_file()), None)
    name = next((name for name in names if file and file.suffix == Path(name).suffix), None)
    if file is None or name is None:
        raise InputError(f"--tokenizer: {source}: expected {' or '.join(names)}, found neither")
    tokenizer = names[name](file)  # refused here, by its own name, before anything is written
    if name == "tokenizer.json" and file.with_name(_BESIDE[0]).exists():
        _copy(file, directory, name)
        return
    if chat and tokenizer.chat_template is None and {*_CHAT} <= {*tokenizer.specials}:
        tokenizer.chat_template = _TEMPLATE
    try:
        files = _files(tokenizer)
    except InputError:
        _copy(file, directory, name)
    else:
        _write(directory, files)


def _copy(file: Path, directory: Path, name: str) -> None:
    beside = {file.with_name(other): directory / other for other in _BESIDE}
    for path, target in ({file: directory / name} | beside).items():
        if path.is_file():
            with new_file(target) as temporary:
                shutil.copyfile(path, temporary)

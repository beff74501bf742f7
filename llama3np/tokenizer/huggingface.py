"""BPE from tokenizer.json, the file of Hugging Face's tokenizers library.

Only what changes no id is ignored. The rest (normalizer, pre-tokenizer, model options) must be
what Llama 3 or SmolLM2 has (merging bytes) or what Llama 2 has (merging characters, with bytes to
fall back on), or the file is refused with a word on what was found.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from llama3np.errors import CheckpointError
from llama3np.tokenizer.base import Tokenizer, read_bytes, stop_ids
from llama3np.tokenizer.bpe import LLAMA3, SMOLLM, PreTokenizer
from llama3np.tokenizer.bytelevel import Vocabulary, split_merges, tokenizer
from llama3np.tokenizer.llama3 import BEGIN_OF_TEXT
from llama3np.tokenizer.pieces import BYTE_NAMES, SPACE, PieceTokenizer, by_rank, table

_SPLIT = {
    "type": "Split",
    "pattern": {"Regex": LLAMA3.pattern},
    "behavior": "Isolated",
    "invert": False,
}
_DIGITS = {"type": "Digits", "individual_digits": True}
_BYTES = {"type": "ByteLevel", "add_prefix_space": False}
_PREPEND = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": SPACE},
        {"type": "Replace", "pattern": {"String": " "}, "content": SPACE},
    ],
}
_METASPACE = {"type": "Metaspace", "replacement": SPACE, "prepend_scheme": "first", "split": False}
PRE_TOKENIZERS: dict[PreTokenizer, list[dict[str, Any]]] = {
    LLAMA3: [_SPLIT, {**_BYTES, "use_regex": False}],
    SMOLLM: [_DIGITS, {**_BYTES, "use_regex": True}],
}


def from_tokenizer_json(path: str | Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.json`, with what `tokenizer_config.json` beside it adds.

    From the latter: BOS, EOS, whether prompts begin with BOS, the chat template. Raises
    CheckpointError for a file that is broken or asks for anything not supported.
    """
    path = Path(path)
    file = _Node(_read_json(path), str(path))
    config = config_beside(path)
    specials = _specials(file)
    template_bos = _leading_token(file.value.get("post_processor"))
    bos = _token_name(config.get("bos_token")) or template_bos
    if bos is None and BEGIN_OF_TEXT in specials:
        bos = BEGIN_OF_TEXT
    eos = _token_name(config.get("eos_token"))
    add_bos = config.get("add_bos_token")
    if add_bos is None:
        add_bos = template_bos or BEGIN_OF_TEXT in specials
    model = file.value.get("model")
    falls_back = isinstance(model, dict) and model.get("byte_fallback")
    return (_pieces if falls_back else _byte_level)(
        file,
        specials,
        bos_id=_special_id(specials, bos, path),
        add_bos=bool(add_bos),
        stop_ids=stop_ids(specials, _special_id(specials, eos, path)),
        chat_template=chat_template(path, config),
    )


# ---------------------------------------------------------------------- tokenizer.json


class _Node:
    """A JSON object that knows where it stands, for messages."""

    def __init__(self, value: Any, where: str):
        if not isinstance(value, dict):
            raise CheckpointError(f"{where}: expected an object, found {type(value).__name__}")
        self.value = value
        self.where = where

    def get(self, key: str, kind: type) -> Any:
        if not isinstance(self.value.get(key), kind):
            found = type(self.value[key]).__name__ if key in self.value else "nothing"
            raise CheckpointError(f"{self.where}: {key}: expected {kind.__name__}, found {found}")
        return self.value[key]

    def expect(self, **wanted: Any) -> None:
        """Refuse keys with another value; None stands for an absent key as well."""
        for key, value in wanted.items():
            if (self.value.get(key) or None) != (value or None):
                raise CheckpointError(
                    f"{self.where}: {key}: expected {value!r}, found {_brief(self.value.get(key))}"
                )


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 200 else text[:200] + "..."


def _byte_level(file: _Node, specials: dict[str, int], **known: Any) -> Tokenizer:
    """Llama 3's and SmolLM2's kind; `known` goes to Tokenizer, here and below."""
    file.expect(normalizer=None)
    pre = _pre_tokenizer(file)
    model = _model(file, unk_token=None, byte_fallback=False)
    vocab = Vocabulary(
        source=file.where,
        texts=_by_id(model.get("vocab", dict), specials, file.where),
        specials=specials,
        merges=model.get("merges", list),
        whole_piece=bool(model.value.get("ignore_merges")),
        pre=pre,
    )
    return tokenizer(vocab, **known)


def _model(file: _Node, **wanted: Any) -> _Node:
    """The model, once it is BPE with nothing that would change an id but what is `wanted`."""
    model = _Node(file.get("model", dict), f"{file.where}: model")
    model.expect(
        type="BPE",
        dropout=None,
        continuing_subword_prefix=None,
        end_of_word_suffix=None,
        **wanted,
    )
    return model


def _pieces(file: _Node, specials: dict[str, int], **known: Any) -> Tokenizer:
    """Llama 2's kind. With a token for every byte there is nothing unknown, and none is fused."""
    prefix = _prefix(file)
    model = _model(file, ignore_merges=False)
    texts = _by_id(model.get("vocab", dict), specials, file.where)
    ids = {text: id for id, text in enumerate(texts)}
    byte_ids = [ids[name] for name in BYTE_NAMES if name in ids]
    tokens = table(texts, byte_ids, list(specials.values()), file.where)
    ranks: dict[tuple[str, str], int] = {}
    for rank, pair in enumerate(split_merges(model.get("merges", list), file.where)):
        left, right = (text.replace(SPACE, " ") for text in pair)
        if not {left, right, left + right} <= tokens.ids.keys():
            raise CheckpointError(
                f"{file.where}: merge {rank} {pair} has or makes what is no token"
            )
        ranks[left, right] = rank
    begins_after = {None, *specials.values()}
    return PieceTokenizer(tokens, by_rank(ranks), begins_after, prefix, **known)


def _prefix(file: _Node) -> str:
    """Which of PREFIXES the file asks for: spaces become U+2581, and one is put before a text."""
    normalizer, pre = file.value.get("normalizer"), file.value.get("pre_tokenizer")
    if pre is None and normalizer == _PREPEND:
        return "always"
    if normalizer is None and pre == _METASPACE:
        return "unless space"
    raise CheckpointError(
        f"{file.where}: expected Llama 2's normalizer (Prepend, Replace) or its pre_tokenizer "
        f"(Metaspace), found {_brief(normalizer)} and {_brief(pre)}"
    )


def _pre_tokenizer(file: _Node) -> PreTokenizer:
    found = file.value.get("pre_tokenizer")
    steps = found.get("pretokenizers") if isinstance(found, dict) else None
    for pre, wanted in PRE_TOKENIZERS.items():
        if isinstance(steps, list) and list(map(_without_offsets, steps)) == wanted:
            return pre
    raise CheckpointError(
        f"{file.where}: pre_tokenizer: expected Llama 3's Split or SmolLM2's Digits, "
        f"then ByteLevel, found {_brief(found)}"
    )


def _without_offsets(step: Any) -> Any:
    """`trim_offsets` concerns positions in the text, not ids."""
    if not isinstance(step, dict):
        return step
    return {key: value for key, value in step.items() if key != "trim_offsets"}


def _specials(file: _Node) -> dict[str, int]:
    specials: dict[str, int] = {}
    for i, value in enumerate(file.get("added_tokens", list)):
        token = _Node(value, f"{file.where}: added_tokens[{i}]")
        name, id = token.get("content", str), token.get("id", int)
        if not token.value.get("special"):
            raise CheckpointError(
                f"{token.where}: {name!r} is to be found in plain text: not supported"
            )
        specials[name] = id
    return specials


def _special_id(specials: dict[str, int], name: str | None, path: Path) -> int | None:
    if name is not None and name not in specials:
        raise CheckpointError(f"{path}: expected {name!r} among added_tokens, found none")
    return None if name is None else specials[name]


def _by_id(vocab: dict[str, Any], specials: dict[str, int], where: str) -> list[str]:
    """Token texts in the order of their ids, which must be 0 to n-1 without a hole."""
    ids = {**vocab, **specials}
    texts: list[str | None] = [None] * len(ids)
    for text, id in ids.items():
        if not isinstance(id, int) or not 0 <= id < len(texts) or texts[id] is not None:
            raise CheckpointError(
                f"{where}: expected ids 0 to {len(texts) - 1}, each once, found {id} for {text!r}"
            )
        texts[id] = text
    return [text for text in texts if text is not None]


def _leading_token(post: Any) -> str | None:
    """The token that a TemplateProcessing step puts before a text, if there is one."""
    match post:
        case {"type": "Sequence", "processors": [*steps]}:
            return next(filter(None, map(_leading_token, steps)), None)
        case {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": str(name)}}, *_]}:
            return name
    return None


# ---------------------------------------------------------------------- files beside it


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:  # JSONDecodeError, UnicodeDecodeError
        raise CheckpointError(f"{path}: expected JSON, found something else ({error})") from None


def config_beside(path: Path) -> dict[str, Any]:
    """The tokenizer_config.json beside a tokenizer's file; empty if there is none."""
    beside = path.with_name("tokenizer_config.json")
    return _Node(_read_json(beside), str(beside)).value if beside.exists() else {}


def _token_name(value: Any) -> str | None:
    """A token of tokenizer_config.json: its text, or an object with its text as `content`."""
    if isinstance(value, dict):
        value = value.get("content")
    return value if isinstance(value, str) else None


def chat_template(path: Path, config: dict[str, Any]) -> str | None:
    """The template's text: in the config, there under the name "default", or in its own file."""
    template = config.get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = next((e.get("template") for e in named if e.get("name") == "default"), None)
    beside = path.with_name("chat_template.jinja")
    if template is None and beside.exists():
        template = read_bytes(beside).decode("utf-8", "replace")
    return template if isinstance(template, str) else None

"""What a converted checkpoint takes along beside its weights: tokenizer, stop ids, names.

Each function returns, last or alone, a sentence for each thing that the target cannot hold; the
conversion goes on without it.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.load import meta
from llama3np.load.inspection import Inspection
from llama3np.load.opened import Opened, eos_id
from llama3np.sample import Sampling
from llama3np.tokenizer import export

# Files of a Hugging Face directory that say nothing of its weights.
_HF_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "chat_template.jinja",
    "generation_config.json",
)


def metadata(opened: Opened, config: Config) -> tuple[dict[str, Any], list[str]]:
    """The metadata of a GGUF file that its weights do not tell: general.* and tokenizer.*."""
    if opened.kind == "gguf":
        kept = ("general.", "tokenizer.")
        return {k: v for k, v in opened.metadata.items() if k.startswith(kept)}, []
    general = {"general.type": "model", "general.name": opened.path.resolve().name}
    none = {"tokenizer.ggml.model": "none"}
    if opened.tokenizer is None:
        return general | none, _without(opened)
    try:
        keys = export.to_gguf(opened.tokenizer, config.vocab_size, eos_id(opened))
        return general | keys, []
    except InputError as error:
        return general | none, _without(opened, str(error))


def hf_files(opened: Opened, directory: Path) -> list[str]:
    """Copy, or write, the tokenizer's files and generation_config.json."""
    if opened.kind == "huggingface":
        _copy(opened.path, _HF_FILES, directory)
        if opened.stop_ids and not (directory / "generation_config.json").exists():
            _write(directory / "generation_config.json", {"eos_token_id": list(opened.stop_ids)})
        return []
    file = meta.tokenizer_file(opened.path) if opened.kind == "meta" else None
    if file:
        _copy(file.parent, ("tokenizer.model",), directory)
    if opened.tokenizer is None:
        return [] if file and not opened.problem else _without(opened)
    stop_ids = list(opened.tokenizer.stop_ids)
    generation = {"bos_token_id": opened.tokenizer.bos_id, "eos_token_id": stop_ids or None}
    _write(directory / "generation_config.json", generation)
    try:
        tokenizer_json = export.to_tokenizer_json(opened.tokenizer)
    except InputError as error:
        return [] if file else _without(opened, str(error))
    _write(directory / "tokenizer.json", tokenizer_json)
    settings = export.to_tokenizer_config(opened.tokenizer, eos_id(opened))
    _write(directory / "tokenizer_config.json", settings)
    return []


def meta_files(opened: Opened, directory: Path) -> list[str]:
    """Copy, or write, tokenizer.model."""
    places = {"meta": meta.tokenizer_file, "huggingface": lambda path: path / "tokenizer.model"}
    file = places[opened.kind](opened.path) if opened.kind in places else None
    if file and file.exists():
        _copy(file.parent, ("tokenizer.model",), directory)
        return []
    if opened.tokenizer is None:
        return _without(opened)
    try:
        (directory / "tokenizer.model").write_bytes(export.to_ranks(opened.tokenizer))
        return []
    except InputError as error:
        return _without(opened, str(error))


def lost(before: Inspection, after: Inspection) -> list[str]:
    """What the target says otherwise than the source when both are opened: it has no place for it.

    RoPE pairing apart, which the target's format decides, and what a missing tokenizer explains.
    """
    found: dict[str, tuple[Any, Any]] = {
        "context length": (before.config.context_length, after.config.context_length),
        "sampling": (_told(before.sampling), _told(after.sampling)),
    }
    if after.tokenizer is not None:
        kept = sorted(set(before.stop_ids) & set(after.stop_ids))
        found["stop ids"] = (sorted(before.stop_ids), kept)
        had, has = (x.tokenizer.chat_template is not None for x in (before, after))
        found["chat template"] = (had, had and has)
    changed = {what: values for what, values in found.items() if values[0] != values[1]}
    return [f"the {what} is not kept: {was} became {now}" for what, (was, now) in changed.items()]


def _told(sampling: Sampling) -> str:
    """What files say of sampling; a seed is the user's."""
    return ", ".join(f"{k} {v}" for k, v in sampling._asdict().items() if k != "seed")


def _without(opened: Opened, why: str | None = None) -> list[str]:
    """A sentence on the missing tokenizer; none where the source has none either."""
    why = why or opened.problem
    return [f"{opened.path}: the tokenizer is left out: {why}"] if why else []


def _copy(source: Path, files: tuple[str, ...], directory: Path) -> None:
    for name in files:
        if (source / name).is_file():
            shutil.copyfile(source / name, directory / name)


def _write(path: Path, value: Mapping[str, Any]) -> None:
    given = {key: v for key, v in value.items() if v is not None or path.name == "tokenizer.json"}
    text = json.dumps(given, indent=1, ensure_ascii=False) + "\n"
    path.write_text(text, encoding="utf-8")

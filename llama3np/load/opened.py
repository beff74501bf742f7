"""A checkpoint of any format with nothing read but its headers: what is converted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.load import gguf, huggingface, llama2c, meta
from llama3np.load.files import read_json
from llama3np.params import named


class Opened(NamedTuple):
    """A model, its tensors in the dtype and the row order of its files."""

    path: Path
    kind: str  # as load.detect says
    config: Config
    tensors: dict[str, Any]  # by our names: arrays, kernels.Joined, kernels.Blocks
    metadata: Mapping[str, Any]  # of a GGUF file
    tokenizer: Any
    problem: str | None  # why there is no tokenizer, if the files have one
    stop_ids: tuple[int, ...]  # that the files declare beside the tokenizer's


def open_checkpoint(path: Path, rope_factor: float | None = None) -> Opened:
    """Open what is at `path`. Raises InputError as load_checkpoint does, but for the tokenizer."""
    from llama3np.load import detect  # which imports this package's modules itself

    kind = detect(path)
    if rope_factor is not None and kind != "meta":
        raise InputError(f"{path}: rope_factor is for Meta directories; this file tells its own")
    if kind == "gguf":
        return _gguf(path)
    if kind == "huggingface":
        return _huggingface(path)
    if kind == "meta":
        config, tensors, _ = meta.open_directory(path, rope_factor)
        tokenizer, problem = _tried(lambda: meta.tokenizer_of(path))
        return Opened(path, kind, config, tensors, {}, tokenizer, problem, ())
    loaded = llama2c.load(path)
    tensors = named(loaded.params, loaded.config.tied)
    return Opened(path, kind, loaded.config, tensors, {}, loaded.tokenizer, None, ())


def _gguf(path: Path) -> Opened:
    file, config, matched, _ = gguf.open_file(path)
    tensors = {ours: gguf.matrix_or_vector(file, theirs) for ours, theirs in matched.items()}
    tokenizer, problem = _tried(lambda: gguf.tokenizer_of(file, path))
    return Opened(path, "gguf", config, tensors, file.metadata, tokenizer, problem, ())


def _huggingface(path: Path) -> Opened:
    config, tensors, _, stop_ids, _ = huggingface.open_directory(path)
    tokenizer, problem = _tried(lambda: huggingface.tokenizer_of(path))
    return Opened(path, "huggingface", config, tensors, {}, tokenizer, problem, stop_ids)


def _tried(read: Callable[[], Any]) -> tuple[Any, str | None]:
    try:
        return read(), None
    except InputError as error:
        return None, str(error)


def eos_id(opened: Opened) -> int | None:
    """The one id that files name as the end: the tokenizer's own, else the first that ends a text.

    A Hugging Face directory names it in tokenizer_config.json, a GGUF file by a key.
    """
    specials = opened.tokenizer.specials
    found = opened.metadata.get("tokenizer.ggml.eos_token_id")
    beside = opened.path / "tokenizer_config.json"
    if opened.kind == "huggingface" and beside.exists():
        value = read_json(beside).get("eos_token")
        name = value.get("content") if isinstance(value, dict) else value
        found = specials.get(name) if isinstance(name, str) else None
    ends = (*opened.stop_ids, *opened.tokenizer.stop_ids)
    return found if found is not None else next(iter(ends), None)

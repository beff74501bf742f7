"""What a checkpoint is, without reading its weights: one function for each way to tell."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.load import gguf, huggingface
from llama3np.load.checkpoint import Checkpoint
from llama3np.params import named
from llama3np.sample import GREEDY, Sampling


class Stored(NamedTuple):
    """One tensor as its file holds it."""

    shape: tuple[int, ...]
    type: str  # "bfloat16", or a GGUF type: "Q4_1"
    nbytes: int


class Inspection(NamedTuple):
    """A model's files at a glance."""

    config: Config
    layout: str  # as in Checkpoint
    tensors: dict[str, Stored]  # by the names of params.named_shapes
    tokenizer: Any = None
    tokenizer_problem: str | None = None  # why there is none, if the files have one
    stop_ids: tuple[int, ...] = ()
    sampling: Sampling = GREEDY


def of_gguf(path: Path) -> Inspection:
    """What a GGUF file is, by its header."""
    opened = gguf.open_file(path)
    infos = {ours: opened.gguf.tensors[theirs] for ours, theirs in opened.matched.items()}
    tensors = {name: Stored(info.shape, info.type, info.nbytes) for name, info in infos.items()}
    tokenizer, problem = _tried(lambda: gguf.tokenizer_of(opened.gguf, path))
    stop_ids = tuple(tokenizer.stop_ids) if tokenizer else ()
    return Inspection(opened.config, opened.layout, tensors, tokenizer, problem, stop_ids)


def of_huggingface(path: Path) -> Inspection:
    """What a Hugging Face directory is, by its settings and the headers of its tensors."""
    opened = huggingface.open_directory(path)
    tokenizer, problem = _tried(lambda: huggingface.tokenizer_of(path))
    stop_ids = huggingface.with_tokenizers(opened.stop_ids, tokenizer)
    return Inspection(
        opened.config,
        opened.layout,
        {name: _stored(w) for name, w in opened.tensors.items()},
        tokenizer,
        problem,
        stop_ids,
        opened.sampling,
    )


def of_checkpoint(checkpoint: Checkpoint) -> Inspection:
    """What a loaded model is: for formats whose weights stay mapped, so that loading is cheap."""
    config, params, tokenizer, layout, stop_ids, sampling = checkpoint
    tensors = {name: _stored(w) for name, w in named(params, config.tied).items()}
    return Inspection(config, layout, tensors, tokenizer, None, stop_ids, sampling)


def _stored(w: Any) -> Stored:
    return Stored(tuple(w.shape), str(w.dtype), w.nbytes)


def _tried(read: Callable[[], Any]) -> tuple[Any, str | None]:
    try:
        return read(), None
    except InputError as error:
        return None, str(error)

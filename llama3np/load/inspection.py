"""What a checkpoint is, without reading its weights: `inspect`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.load import gguf, huggingface
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


def inspect(path: str | Path) -> Inspection:
    """Look at a checkpoint of any format: seconds for none, whatever its size.

    Headers, settings and the tokenizer are read, and every tensor is checked against the table of
    shapes; weights are neither read nor decoded. A tokenizer that cannot be used is told, not
    raised. Raises InputError for all else that load_checkpoint would refuse.
    """
    from llama3np.load import detect

    path = Path(path)
    special = {"gguf": _gguf, "huggingface": _huggingface}
    return special.get(detect(path), _mapped)(path)


def _gguf(path: Path) -> Inspection:
    opened = gguf.open_file(path)
    infos = {ours: opened.gguf.tensors[theirs] for ours, theirs in opened.matched.items()}
    tensors = {name: Stored(info.shape, info.type, info.nbytes) for name, info in infos.items()}
    tokenizer, problem = _tried(lambda: gguf.tokenizer_of(opened.gguf, path))
    stop_ids = tuple(tokenizer.stop_ids) if tokenizer else ()
    return Inspection(opened.config, opened.layout, tensors, tokenizer, problem, stop_ids)


def _huggingface(path: Path) -> Inspection:
    opened = huggingface.open_directory(path)
    tokenizer, problem = _tried(lambda: huggingface.tokenizer_of(path))
    stop_ids = opened.stop_ids or (tuple(tokenizer.stop_ids) if tokenizer else ())
    return Inspection(
        opened.config,
        opened.layout,
        {name: _stored(w) for name, w in opened.tensors.items()},
        tokenizer,
        problem,
        stop_ids,
        opened.sampling,
    )


def _mapped(path: Path) -> Inspection:
    """A format whose weights are mapped when loaded: loading it reads norm vectors at most."""
    from llama3np.load import load_checkpoint

    checkpoint = load_checkpoint(path)
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

"""A training that can be gone on with: one safetensors file, replaced as a whole.

Tensors `params.NAME`, `first.NAME` and `second.NAME` (the moments of AdamW), float32, by the names
of params.named_shapes, or of lora.shapes if adapters are trained; everything else is JSON under
the annotation `llama3np.train`.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from math import isfinite
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from llama3np.backend import Device, on, to_host
from llama3np.config import Config, RopeScaling
from llama3np.errors import CheckpointError, InputError
from llama3np.load import safetensors
from llama3np.load.files import parse_json
from llama3np.load.lazy import write_tensor
from llama3np.params import named_shapes
from llama3np.train import durable, lora
from llama3np.train.flat import Flat, Shapes
from llama3np.train.settings import Settings

FILE = "training/checkpoint.safetensors"
_ANNOTATION = "llama3np.train"
_FLOAT32 = {"F32": np.dtype(np.float32)}


class Run(NamedTuple):
    """What stays the same from the first step to the last."""

    config: Config
    settings: Settings
    origin: dict[str, Any]  # the options that settings do not hold: text, tokenizer, init ...
    files: dict[str, str]  # name below OUT -> SHA-256: the tokens and their tokenizer


@dataclass
class State:
    """What a step changes."""

    params: Flat
    first: Flat  # moment of AdamW
    second: Flat
    step: int = 0  # steps done; the data's order and the rate are functions of it
    evaluated: int = -1  # the step of the last validation
    val_loss: float | None = None  # of the last validation
    best: float | None = None  # the lowest validation loss
    metrics: int = 0  # bytes of metrics.jsonl

    @classmethod
    def start(cls, params: Flat) -> State:
        """The state before the first step."""
        return cls(params, params.like(), params.like())


_FLATS = ("params", "first", "second")
_NUMBERS = ("step", "evaluated", "val_loss", "best", "metrics")


def save(path: Path, run: Run, state: State) -> None:
    """Replace the checkpoint: at any time there is the old one or the new one, whole.

    Raises InputError if it cannot be written, and for parameters that are no numbers any more; the
    old one is kept.
    """
    if not isfinite(float(state.params.vector.sum(dtype=np.float64))):
        raise InputError(f"{path}: not written: the parameters are not finite at step {state.step}")
    tensors = {
        f"{kind}.{name}": to_host(w)
        for kind in _FLATS
        for name, w in getattr(state, kind).tensors.items()
    }
    told = {name: getattr(state, name) for name in _NUMBERS}
    told["run"] = {**run._asdict(), "config": asdict(run.config), "settings": asdict(run.settings)}
    annotations = {_ANNOTATION: json.dumps(told, allow_nan=False)}

    def write(file: BinaryIO) -> None:
        file.write(safetensors.encoded_header(tensors, path, annotations, _FLOAT32))
        for name, w in tensors.items():
            write_tensor(file, name, w)

    durable.replace_file(path, write)


def load(path: Path, device: Device) -> tuple[Run, State]:
    """The run and its state, on a device. Raises CheckpointError for any other file."""
    run, numbers, arrays = _mapped(path)
    rank = run.settings.lora
    shapes = named_shapes(run.config) if rank is None else lora.shapes(run.config, rank)
    params, first, second = (_flat(arrays, kind, shapes, path, device) for kind in _FLATS)
    return run, State(params, first, second, **numbers)


def load_run(path: Path) -> Run:
    """The run alone: no tensor is read. Raises CheckpointError for any other file."""
    return _mapped(path)[0]


def _mapped(path: Path) -> tuple[Run, dict[str, Any], dict[str, np.ndarray]]:
    """The run, the numbers of its state, and the tensors, still in the file."""
    arrays, annotations = safetensors.read_annotated(path, _FLOAT32)
    told = parse_json(annotations.get(_ANNOTATION, "{}").encode(), f"{path}: {_ANNOTATION}")
    try:
        return _run(told["run"]), {name: told[name] for name in _NUMBERS}, arrays
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{path}: expected a checkpoint of this version's llama3np train, found none ({error})"
        ) from None


def _run(told: dict[str, Any]) -> Run:
    config = dict(told["config"])
    if config["rope_scaling"] is not None:
        config["rope_scaling"] = RopeScaling(**config["rope_scaling"])
    return Run(Config(**config), Settings(**told["settings"]), told["origin"], told["files"])


def _flat(
    arrays: dict[str, np.ndarray], kind: str, shapes: Shapes, path: Path, device: Device
) -> Flat:
    """The tensors of one kind, copied out of the mapped file."""
    found = {name: arrays.get(f"{kind}.{name}") for name in shapes}
    for name, shape in shapes.items():
        w = found[name]
        if w is None or w.shape != shape:
            has = "no such tensor" if w is None else f"{w.shape}"
            raise CheckpointError(f"{path}: {kind}.{name}: expected shape {shape}, found {has}")
    with on(device) as xp:
        return Flat.of(found, xp=xp)


def digests(out: Path, names: list[str]) -> dict[str, str]:
    """SHA-256 of files below OUT, by name."""
    return {name: durable.sha256(out / name) for name in names}


def verify(out: Path, run: Run) -> None:
    """Raise CheckpointError for a file of tokens or tokenizer that is not the one of the run."""
    for name, expected in run.files.items():
        path = out / name
        if not path.is_file():
            raise CheckpointError(f"{path}: expected the file this training began with, found none")
        if durable.sha256(path) != expected:
            raise CheckpointError(f"{path}: is not the file this training began with (SHA-256)")

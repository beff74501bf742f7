"""The beginning of a training: OUT with tokenizer, tokens, weights and the checkpoint of step 0.

All of it is made beside OUT and renamed when it is whole: there is a training or there is none.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

import numpy as np

from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.load import carry, load_checkpoint, names, save_hf
from llama3np.load.files import new_directory
from llama3np.load.installed import resolve
from llama3np.load.opened import open_checkpoint
from llama3np.params import named
from llama3np.train import checkpoint, dialogs, durable, frozen, lora, tokens, vocabulary
from llama3np.train.checkpoint import Run, State
from llama3np.train.evaluation import SAMPLE_TEMPERATURE
from llama3np.train.flat import Flat
from llama3np.train.result import BF16, begin_adapters, dtype_for, rounded
from llama3np.train.settings import ADAPTERS, FINE_TUNING, PRESETS, Settings, changed, initial

TOKENS = "training/tokens"
# Where there is a preset, there is a new model; else one to begin with.
DEFAULT_PRESET, DEFAULT_TOKENIZER = "tiny", "char"


class Order(NamedTuple):
    """What is to be trained. preset and tokenizer are of new models, init of given ones."""

    text: list[Path]  # of one kind: plain text, or .jsonl with dialogs
    preset: str | None = None
    tokenizer: str | None = None  # as vocabulary.make has it
    init: str | None = None  # a path, or the name of an installed model
    given: dict[str, Any] = {}  # noqa: RUF012  settings by name, in place of the preset's

    @property
    def chat(self) -> bool:
        """Whether the text is dialogs. Raises InputError if there is both, or neither."""
        dialog = [path.suffix == ".jsonl" for path in self.text]
        if not dialog:
            raise InputError("--text: expected a file or more, found none")
        if any(dialog) != all(dialog):
            a, b = self.text[dialog.index(False)], self.text[dialog.index(True)]
            raise InputError(f"--text: expected plain text or dialogs (.jsonl), found {a} and {b}")
        return dialog[0]

    def origin(self) -> dict[str, Any]:
        """What a checkpoint keeps of it beside the settings; texts by their SHA-256."""
        told = {"init": self.init}
        if self.init is None:
            told |= {
                "preset": self.preset or DEFAULT_PRESET,
                "tokenizer": self.tokenizer or DEFAULT_TOKENIZER,
            }
        return told | {"text": text_digests(self.text)}


def text_digests(text: Iterable[Path]) -> list[str]:
    """SHA-256 of each file. Raises InputError for one that cannot be read."""
    try:
        return [durable.sha256(path) for path in text]
    except OSError as error:
        raise InputError(f"--text: {error.filename}: cannot be read: {error.strerror}") from None


def begin(out: Path, order: Order) -> list[str]:
    """Make OUT; return a sentence for each thing of --init that it cannot hold.

    OUT appears whole or not at all. Raises InputError for an OUT that is not empty, for texts and
    tokenizers that cannot be used, and for a model that cannot be trained.
    """
    if out.is_symlink() or (out.exists() and not (out.is_dir() and not any(out.iterdir()))):
        raise InputError(
            f"{out}: is not empty: --resume goes on with what is there, a new --out begins anew"
        )
    with new_directory(out) as temporary:
        make = _new if order.init is None else _given
        begun = make(temporary, order)
        write = dialogs.write if order.chat else tokens.write
        length = begun.settings.context
        write(temporary / TOKENS, begun.tokenizer, order.text, length=length)
        _keep(temporary, begun, order)
    return begun.notes


class _Begun(NamedTuple):
    config: Config
    settings: Settings
    trained: Flat  # weights or adapters, float32
    dtype: np.dtype  # of the weights in OUT
    tokenizer: Any
    notes: list[str]


def _keep(out: Path, begun: _Begun, order: Order) -> None:
    """Write the checkpoint of step 0."""
    files = sorted(path for path in (out / TOKENS).iterdir())
    files += [path for path in sorted(out.iterdir()) if path.name.startswith("tokenizer")]
    digests = checkpoint.digests(out, [path.relative_to(out).as_posix() for path in files])
    origin = order.origin() | {"dtype": begun.dtype.name}
    if begun.settings.lora is not None:
        origin["base"] = frozen.identity(resolve(str(order.init)))
    run = Run(begun.config, begun.settings, origin, digests)
    checkpoint.save(out / checkpoint.FILE, run, State.start(begun.trained))


# ---- a new model -------------------------------------------------------------------------------


def _new(out: Path, order: Order) -> _Begun:
    if order.given.get("lora") is not None:
        raise InputError("--lora: expected --init MODEL, for adapters of its weights, found none")
    preset = PRESETS[order.preset or DEFAULT_PRESET]
    settings = changed(preset.settings, **order.given)
    texts = dialogs.contents(order.text) if order.chat else order.text
    with TemporaryDirectory() as made:  # its size is the model's, so it is made before
        spec = order.tokenizer or DEFAULT_TOKENIZER
        tokenizer = vocabulary.make(spec, texts, made, order.chat)
        config = preset.config(tokenizer.n_vocab, settings.context)
        params = initial(config, settings.seed)
        save_hf(out, config, rounded(params, BF16), tokenizer_files=sorted(Path(made).iterdir()))
    generation = {
        "do_sample": True,
        "temperature": SAMPLE_TEMPERATURE,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.stop_ids),
    }
    path = out / "generation_config.json"
    path.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    return _Begun(config, settings, Flat.of(named(params, config.tied)), BF16, tokenizer, [])


# ---- a given one -------------------------------------------------------------------------------


def _given(out: Path, order: Order) -> _Begun:
    """Full weights, or adapters of them, in Hugging Face's order; config and tokenizer are kept."""
    path = resolve(str(order.init))
    loaded = load_checkpoint(path)
    if loaded.tokenizer is None:
        raise InputError(f"--init: {path}: has no tokenizer, which a text needs")
    config, ordered = names.with_pairing(loaded.config, loaded.params, "half")
    settings = _fine_tuning(config, order)
    dtype = dtype_for(loaded.params)
    save_hf(out, config, rounded(ordered, dtype))
    if settings.lora is None:
        first = Flat.of(named(ordered, config.tied))
    else:
        first = lora.initial(config, settings.lora, settings.seed)
        params = lora.Lora(ordered, config).on_host(first)
        begin_adapters(out, params, config, str(path.resolve()))
    notes = carry.hf_files(open_checkpoint(path), out)
    return _Begun(config, settings, first, dtype, loaded.tokenizer, notes)


def _fine_tuning(config: Config, order: Order) -> Settings:
    usual = FINE_TUNING if order.given.get("lora") is None else ADAPTERS
    context = order.given.get("context") or min(usual.context, config.context_length)
    if context > config.context_length:
        raise InputError(
            f"--context: expected at most the {config.context_length} positions that {order.init} "
            f"was trained for, found {context}"
        )
    return changed(usual, **{**order.given, "context": context})

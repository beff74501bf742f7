"""The beginning of a training: OUT with tokenizer, tokens, weights and the checkpoint of step 0.

All of it is made beside OUT and renamed when it is whole: there is a training or there is none.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama3np import machine
from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.load import carry, load_checkpoint, names, save_hf
from llama3np.load.files import new_directory, refuse_special
from llama3np.load.huggingface import SINGLE, tokenizer_of
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
LESS_MEMORY = "begin anew with a lower --rows or --context, or with --recompute"
_BATCH_BYTES = 8 + 8 + 4 + 8  # of a token: id, target, weight, place in the stream
_MOST_CONTEXT = 2**31 - 1
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
        dialog = [path.suffix.lower() == ".jsonl" for path in self.text]
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
        return told | {"text": text_digest(self.text)}


def text_digest(text: Iterable[Path]) -> str:
    """SHA-256 of those of the files, in hexadecimal, in their order: one for thousands of files.

    Empty for no files. Raises InputError for a file that cannot be read.
    """
    digests = []
    for path in text:
        refuse_special(path)  # a pipe that nobody writes into has no end
        try:
            digests.append(durable.sha256(path))
        except OSError as error:
            raise InputError(f"--text: {path}: cannot be read: {error.strerror}") from None
    return hashlib.sha256("".join(digests).encode()).hexdigest() if digests else ""


def begin(out: Path, order: Order) -> list[str]:
    """Make OUT; return a sentence for each thing of --init or --tokenizer that it cannot hold.

    OUT appears whole or not at all. Raises InputError for an OUT that is not empty, for texts and
    tokenizers that cannot be used, for a model that cannot be trained, and for batches that
    memory cannot hold.
    """
    with durable.told(out):
        if out.is_dir() and any(out.iterdir()):
            raise InputError(
                f"{out}: is not empty: --resume goes on with what is there, a new --out begins anew"
            )
    with new_directory(out) as temporary:
        make = _new if order.init is None else _given
        begun = make(temporary, order)
        write = dialogs.write if order.chat else tokens.write
        length = begun.settings.context
        write(temporary / TOKENS, begun.tokenizer, order.text, length=length)
        _try_batch(temporary, begun.settings)
        _keep(temporary, begun, order)
    return begun.notes


class _Begun(NamedTuple):
    config: Config
    settings: Settings
    trained: Flat  # weights or adapters, float32
    dtype: np.dtype  # of the weights in OUT
    tokenizer: Any
    notes: list[str]


def _try_batch(out: Path, settings: Settings) -> None:
    """Raise InputError for batches that memory cannot hold: a checkpoint fixes their rows."""
    said = (
        f"--rows: memory is too small for {settings.batch_rows} rows of {settings.context} tokens "
        f"in a step; {LESS_MEMORY}"
    )
    free = machine.available()
    if free is not None and settings.batch_tokens * _BATCH_BYTES > free:
        raise InputError(said)
    train, _ = tokens.open_tokens(out / TOKENS)
    try:
        tokens.batch(train, settings.seed, 0, settings.batch_rows, settings.context)
    except MemoryError:
        raise InputError(said) from None


def _keep(out: Path, begun: _Begun, order: Order) -> None:
    """Write the checkpoint of step 0."""
    files = [*sorted((out / TOKENS).iterdir()), *sorted(out.iterdir())]
    kept = [path for path in files if path.is_file() and path.name != SINGLE]  # it will change
    digests = checkpoint.digests(out, [path.relative_to(out).as_posix() for path in kept])
    origin = order.origin() | {"dtype": begun.dtype.name}
    if begun.settings.lora is not None:
        origin["base"] = frozen.identity(resolve(str(order.init)))
    run = Run(begun.config, begun.settings, origin, digests)
    checkpoint.save(out / checkpoint.FILE, run, State.start(begun.trained))


# ---- a new model -------------------------------------------------------------------------------

_COPIED = (
    "--tokenizer: {}: is copied, because a vocabulary of its kind is not written here; other "
    "programs may open it with other ids, without BOS for example"
)


def _new(out: Path, order: Order) -> _Begun:
    if order.given.get("lora") is not None:
        raise InputError("--lora: expected --init MODEL, for adapters of its weights, found none")
    preset = PRESETS[order.preset or DEFAULT_PRESET]
    settings = changed(preset.settings, **order.given)
    if settings.context > _MOST_CONTEXT:
        raise InputError(
            f"--context: expected at most {_MOST_CONTEXT} tokens, found {settings.context}"
        )
    texts = dialogs.contents(order.text) if order.chat else order.text
    spec = order.tokenizer or DEFAULT_TOKENIZER
    tokenizer = vocabulary.make(spec, texts, out, order.chat)
    config = preset.config(tokenizer.n_vocab, settings.context)
    params = initial(config, settings.seed)
    model = out / "model"  # which is to be a new directory
    save_hf(model, config, rounded(params, BF16))
    for path in model.iterdir():
        path.rename(out / path.name)
    model.rmdir()
    generation = {
        "do_sample": True,
        "temperature": SAMPLE_TEMPERATURE,
        "bos_token_id": tokenizer.bos_id,
        "eos_token_id": list(tokenizer.stop_ids),
    }
    path = out / "generation_config.json"
    path.write_text(json.dumps(generation, indent=2) + "\n", encoding="utf-8")
    notes = [] if (out / "tokenizer_config.json").exists() else [_COPIED.format(spec)]
    return _Begun(config, settings, Flat.of(named(params, config.tied)), BF16, tokenizer, notes)


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
    if tokenizer_of(out) is None:
        without = "the new model takes token ids only, and samples of it are left out"
        notes = [f"{note}; {without}" for note in notes]
    return _Begun(config, settings, first, dtype, loaded.tokenizer, notes)


def _fine_tuning(config: Config, order: Order) -> Settings:
    usual = FINE_TUNING if order.given.get("lora") is None else ADAPTERS
    context = order.given.get("context")
    if context is None:
        context = min(usual.context, config.context_length)
    if context > config.context_length:
        raise InputError(
            f"--context: expected at most the {config.context_length} positions that {order.init} "
            f"was trained for, found {context}"
        )
    return changed(usual, **{**order.given, "context": context})

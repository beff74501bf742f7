"""Does a checkpoint compute what is publicly known of the model it is taken for?

The facts, each with its source, are in data/public_facts.json: hashes and ids of tokenizers, the
next token after a prompt, attention scores read from published plots, texts that others generated.
What is not in there is unknown, and is never taken for right.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from llama3np.backend import to_host
from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.llm import Llama
from llama3np.params import named
from llama3np.presets import PRESETS

AGREES, DIFFERS, UNKNOWN = "agrees", "differs", "unknown"


class Result(NamedTuple):
    """What came of one fact."""

    fact: str  # what was looked at
    outcome: str  # "agrees", "differs" or "unknown"
    detail: str  # what was expected and found
    source: str  # where the fact is published; empty if there is none
    of_weights: bool = False  # its outcome depends on the numbers in the tensors


def public_facts() -> dict[str, Any]:
    """The package's own table of facts."""
    text = resources.files("llama3np").joinpath("data/public_facts.json").read_text("utf-8")
    return json.loads(text)


def verify(
    llm: Llama, path: Path, known_as: str | None = None, facts: Mapping[str, Any] | None = None
) -> Iterator[Result]:
    """Check everything that is known of a loaded model; yield each Result as soon as it is there.

    path: where it was loaded from. known_as: the published name of these weights; without one
    they are taken for every model of the same architecture, and for an Instruct model only if
    they have a chat template. Raises InputError for a name of which nothing is known.
    """
    facts = public_facts() if facts is None else facts
    models = facts["models"]
    if known_as is not None and known_as not in models:
        raise InputError(f"--as: expected one of {', '.join(models)}, found {known_as!r}")
    presets = published(llm.config)
    wanted = None if known_as is None else models[known_as]["preset"]
    yield architecture(llm, presets, wanted)
    if wanted is not None and wanted not in presets:
        return
    yield from tokenizer(llm, path, facts["tokenizers"], presets)
    names = candidates(llm, models, presets) if known_as is None else [known_as]
    if not names:
        yield Result("weights", UNKNOWN, "no public value is known of this model", "", True)
    for name in names:
        yield from weights(llm, name, models[name])


def status(results: Iterable[Result]) -> int:
    """The exit status: 1 if something differs, 2 if no value of the weights is known, else 0."""
    outcomes = [(result.outcome, result.of_weights) for result in results]
    if any(outcome == DIFFERS for outcome, _ in outcomes):
        return 1
    return 0 if (AGREES, True) in outcomes else 2


# ---- which model is it -------------------------------------------------------------------------


def published(config: Config) -> list[str]:
    """The presets of this architecture; files differ in pairing and context length."""
    return [name for name, preset in PRESETS.items() if _core(preset) == _core(config)]


def _core(config: Config) -> Config:
    return replace(config, rope_pairing="interleaved", context_length=1)


def candidates(llm: Llama, models: Mapping[str, Any], presets: list[str]) -> list[str]:
    """The models of these architectures of which values are known.

    A chat template tells Instruct from base. Meta's directories have none and pass for base.
    """
    chat = llm.tokenizer is not None and llm.tokenizer.chat_template is not None
    return [n for n, m in models.items() if m["preset"] in presets and m["chat"] == chat]


# ---- tensors and tokenizer ---------------------------------------------------------------------


def architecture(llm: Llama, presets: list[str], wanted: str | None) -> Result:
    """The tensors that loading has found complete, against the published architectures."""
    shapes = [w.shape for w in named(llm.params, llm.config.tied).values()]
    total = sum(map(math.prod, shapes))
    found = f"{len(shapes)} tensors, {total:,} parameters, all that the config asks for"
    source = "config.json and params.json of meta-llama's repositories"
    if wanted is not None and wanted not in presets:
        expected = f"expected {_core(PRESETS[wanted])}, found {_core(llm.config)}"
        return Result("tensors", DIFFERS, expected, source)
    if not presets:
        return Result("tensors", UNKNOWN, f"{found}; no published model has their shapes", "")
    return Result("tensors", AGREES, f"{found}: {' or '.join(presets)}", source)


def tokenizer(
    llm: Llama, path: Path, known: Mapping[str, Any], presets: list[str]
) -> Iterator[Result]:
    """The tokenizer's file and ids, for the families whose tokenizer is known."""
    families = {preset.split("-")[0].split(".")[0] for preset in presets} & set(known)
    if not families:
        yield Result("tokenizer", UNKNOWN, "nothing is known of this model's tokenizer", "")
    for family in families:
        yield _tokenizer_file(path, known[family])
        yield _tokenizer_ids(llm, known[family])


def _tokenizer_file(path: Path, known: Mapping[str, Any]) -> Result:
    files = [path / folder / "tokenizer.model" for folder in (".", "original", "..")]
    file = next((f for f in files if path.is_dir() and f.is_file()), None)
    if file is None:
        return Result("tokenizer.model", UNKNOWN, "there is no such file", known["source"])
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    if found == known["sha256"]:
        return Result("tokenizer.model", AGREES, f"sha256 {found}", known["source"])
    detail = f"expected sha256 {known['sha256']}, found {found}"
    return Result("tokenizer.model", DIFFERS, detail, known["source"])


def _tokenizer_ids(llm: Llama, known: Mapping[str, Any]) -> Result:
    fact, texts = "ids of texts", known["texts"]
    if llm.tokenizer is None:
        return Result(fact, UNKNOWN, "the checkpoint has no tokenizer", known["source"])
    for text in texts:
        found = llm.tokenizer.encode(text["text"])
        if found != text["ids"]:
            detail = f"{text['text']!r}: expected {text['ids']}, found {found}"
            return Result(fact, DIFFERS, detail, text["source"])
    sources = sorted({text["source"] for text in texts})
    return Result(fact, AGREES, f"{len(texts)} texts", "; ".join(sources))


# ---- weights -----------------------------------------------------------------------------------


def weights(llm: Llama, name: str, known: Mapping[str, Any]) -> Iterator[Result]:
    """All that is known of one model's numbers."""
    for prompt in known["prompts"]:
        yield from _prompt(llm, name, prompt)
    for text in known["texts"]:
        yield _text(llm, name, text)


def _prompt(llm: Llama, name: str, known: Mapping[str, Any]) -> Iterator[Result]:
    """One run over a prompt: its ids, the token it ends in, and intermediate arrays."""
    if llm.tokenizer is not None:
        found = llm.encode(known["prompt"])
        detail = f"{known['prompt']!r}: expected {known['ids']}, found {found}"
        same = found == known["ids"]
        detail = f"{len(found)} ids" if same else detail
        yield Result(f"{name}: prompt", _outcome(same), detail, known["source"])
    wanted = {array["name"] for array in known["arrays"]}
    seen: dict[str, np.ndarray] = {}
    logits_11V = llm.forward(
        known["ids"],
        tap=lambda tap, array: seen.update({tap: to_host(array).copy()} if tap in wanted else {}),
        last_only=True,
    )
    id = int(logits_11V[0, 0].argmax())
    detail = f"expected {known['next_id']} {known['next_text']!r}, found {id}"
    same = id == known["next_id"]
    yield Result(f"{name}: next token", _outcome(same), detail, known["source"], True)
    for array in known["arrays"]:
        yield _array(name, array, seen[array["name"]])


def _array(name: str, known: Mapping[str, Any], found_BNTS: np.ndarray) -> Result:
    """One head's scores or probabilities, rows being queries, where the mask lets them be."""
    what = f"{name}: {known['name']}, head {known['head']}"
    rows, columns = np.tril_indices(len(known["lower_triangle"]))
    expected_X = np.concatenate(known["lower_triangle"])
    found_X = found_BNTS[0, known["head"]][rows, columns]
    allowed_X = known["atol"] + known["rtol"] * np.abs(expected_X)
    share_X = np.nan_to_num(np.abs(found_X - expected_X) / allowed_X, nan=np.inf)
    worst = int(share_X.argmax())
    detail = (
        f"{len(expected_X)} values; farthest is [{rows[worst]}, {columns[worst]}]: expected "
        f"{expected_X[worst]} within {allowed_X[worst]:.3f}, found {found_X[worst]:.4f}"
    )
    return Result(what, _outcome(share_X[worst] <= 1), detail, known["source"], True)


def _text(llm: Llama, name: str, known: Mapping[str, Any]) -> Result:
    """A greedy text, as far as published runs agree among themselves."""
    what = f"{name}: greedy text"
    if llm.tokenizer is None:
        return Result(what, UNKNOWN, "the checkpoint has no tokenizer", known["source"], True)
    try:
        (done,) = llm.generate(known["prompt"], known["max_new_tokens"])
    except InputError as error:  # logits that are not numbers: damaged weights are what we look for
        return Result(what, DIFFERS, str(error), known["source"], True)
    pairs = zip(done.text, known["text"], strict=False)
    at = next((i for i, (ours, theirs) in enumerate(pairs) if ours != theirs), None)
    at = min(len(done.text), len(known["text"])) if at is None else at
    if at >= known["agreed"]:
        return Result(what, AGREES, f"the first {at} characters", known["source"], True)
    detail = f"after {at} characters: expected {known['text'][at : at + 30]!r}, "
    detail += f"found {done.text[at : at + 30]!r}"
    return Result(what, DIFFERS, detail, known["source"], True)


def _outcome(same: bool) -> str:
    return AGREES if same else DIFFERS

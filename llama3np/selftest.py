"""Does this installation compute what it should, on this machine's processor or GPU?

Models of one layer, in every stored format, head shape and cache type, are held against the spec
in float64 on NumPy; each CUDA kernel alone against its plain expression; the embedded model, and
SmolLM2 where it is installed, against what other implementations give (data/*_goldens.json); a
named model against NumPy's engine; a CUDA graph against its launches; then the machine is measured.
Nothing is told that was not seen here: the report says what was run, and what was not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from importlib import resources
from importlib.util import find_spec
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

from llama3np import bench, machine, model
from llama3np.backend import Device
from llama3np.cache import KV_DTYPES, new_cache
from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.generate import pad
from llama3np.kernels import Blocks, stored
from llama3np.kernels.engine import CUDA_ENGINES, ENGINES
from llama3np.kernels.ggml import FORMATS, SCALES, decode
from llama3np.llm import Llama, load
from llama3np.load.huggingface import SINGLE
from llama3np.load.installed import installed
from llama3np.params import Params, from_named, named, random

PASS, FAIL, NOT_RUN = "PASS", "FAIL", "NOT RUN"

PLAIN = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}
WIDE = Config(256, 1, 4, 2, 64, 512, 301)  # whole blocks of 256 in every row
ODD = Config(66, 1, 3, 3, 22, 90, 47, rope_pairing="half", tied=True)  # rows that are not aligned
HEADS = ((128, 4), (64, 4), (64, 3), (128, 1), (80, 1), (10, 3), (2, 1))  # size, group
# What 16 bits of a key on the edge between two numbers may do to a logit.
KV_SLACK = {"f32": 0.0, "f16": 2.0**-12, "bf16": 2.0**-11}
# How many times the distance of NumPy's float32 from float64 another float32 may be away.
NOISE, ULP = 8, 2.0**-23
LOGIT = 1e-3  # absolute, of real models: every single mistake that was tried changes them by more
ROWS, STEPS = (9, 4, 17, 1, 5, 8, 3, 2), 3
LONG = 511  # tokens: those after them are the last of a stretch of attention, and the first of one
BATCHED = ("BF16", "Q8_0", "Q4_0", "Q4_K", "Q6_K")  # formats of which batches are tried
GOLDENS = ("shakespeare", "smollm2")  # models that data/NAME_goldens.json is of
TEXT = "The first person who walked on the Moon was"


class Result(NamedTuple):
    """What came of one check."""

    part: str  # "formats", "heads", ...
    name: str
    outcome: str  # PASS, FAIL or NOT_RUN
    detail: str


Check = Callable[[], str]  # what was seen, or an exception: a MismatchError, or whatever went wrong


class MismatchError(Exception):
    """What was computed is not what it should be."""


class NotRunError(Exception):
    """What a check needs is not here; says how to get it."""


def verdict(results: Sequence[Result]) -> str:
    """PASS if something was run and all of that passed."""
    return PASS if {r.outcome for r in results} - {NOT_RUN} == {PASS} else FAIL


def checks(device: Device, path: str | None) -> Iterator[Result]:
    """Run every check that the device has; whatever goes wrong in one is its FAIL."""
    for part, name, check in _all(device, path):
        try:
            yield Result(part, name, PASS, check())
        except NotRunError as error:
            yield Result(part, name, NOT_RUN, str(error))
        except Exception as error:
            said = (
                str(error)
                if isinstance(error, MismatchError)
                else f"{type(error).__name__}: {error}"
            )
            yield Result(part, name, FAIL, " ".join(said.split()))


def _all(device: Device, path: str | None) -> Iterator[tuple[str, str, Check]]:
    if device.kind == "cuda":
        from llama3np.kernels.cuda import selfcheck

        yield from selfcheck.kernels(device)
        yield from selfcheck.rows(device)
    engines = engines_of(device)
    for engine in engines:
        yield from formats(device, engine)
        yield from heads(device, engine)
        yield from batches(device, engine)
        yield "long", f"{engine}: {LONG} tokens", _case(device, engine, WIDE, (LONG, 5))
    if device.kind == "cuda":
        yield "graph", "replay against single launches", partial(selfcheck.replay, device)
        yield "graph", "greedy tokens against the logits", partial(selfcheck.greedy, device)
        yield "graph", "drawn tokens against the logits", partial(selfcheck.drawn, device)
    for name in GOLDENS:
        for engine in engines:
            yield "goldens", f"{name}, {engine}", partial(golden, name, device, engine)
    if path is not None:
        for engine in engines:
            yield "model", f"{path}, {engine}", partial(real, path, device, engine)


def engines_of(device: Device) -> list[str]:
    """The engines that are installed for it."""
    if device.kind == "cuda":
        return list(CUDA_ENGINES)
    return [name for name in ENGINES if name != "numba" or find_spec("numba")]


# ---- small models --------------------------------------------------------------------------------


def formats(device: Device, engine: str) -> Iterator[tuple[str, str, Check]]:
    """A model of each stored format; of those without blocks, one with odd sizes too."""
    for name in (*PLAIN, *SCALES):
        for config in (WIDE, ODD) if name in PLAIN else (WIDE,):
            about = f"{engine}: {name}, width {config.dim}"
            yield "formats", about, _case(device, engine, config, ROWS[:1], name)


def heads(device: Device, engine: str) -> Iterator[tuple[str, str, Check]]:
    """Heads of every size and group, both pairings, and keys and values of every type."""
    for (size, group), pairing in zip(HEADS, ("interleaved", "half") * len(HEADS), strict=False):
        config = replace(WIDE, n_heads=2 * group, n_kv_heads=2, head_dim=size, rope_pairing=pairing)
        for kv in KV_DTYPES:
            about = f"{engine}: size {size}, groups of {group}, {pairing}, {kv}"
            yield "heads", about, _case(device, engine, config, ROWS[:2], "BF16", kv)


def batches(device: Device, engine: str) -> Iterator[tuple[str, str, Check]]:
    """Ragged rows, as many as kernels are made for, and not all of them."""
    for name in BATCHED:
        for count in (2, 3, 8):
            about = f"{engine}: {count} ragged rows, {name}"
            yield "batches", about, _case(device, engine, WIDE, ROWS[:count], name)


def _case(
    device: Device, engine: str, config: Config, rows: Sequence[int], name: str = "BF16",
    kv: str = "f32",
) -> Check:  # fmt: skip
    return partial(agree, device, engine, config, rows, name, kv)


def agree(
    device: Device, engine: str, config: Config, rows: Sequence[int], name: str, kv: str
) -> str:
    """Prefill rows of these lengths, then decode, and compare every logit with the spec's.

    Returns how far they were apart; raises MismatchError if that is more than float32 explains.
    """
    rng = np.random.default_rng(0)
    params = made(config, name, rng)
    ids = [rng.integers(0, config.vocab_size, n + STEPS).tolist() for n in rows]
    llm = Llama(config, params, device=str(device), engine=engine, kv_dtype=kv)
    cache = llm.new_cache(len(rows), max(rows) + STEPS)
    found = fed(ids, lambda ids_BT, new_B: llm.engine.forward(ids_BT, cache, new_B))
    exact = spec(params, config, ids, "float64", "float64")
    single = spec(params, config, ids, "float32", "float32")
    expected = exact if kv == "f32" else spec(params, config, ids, "float32", KV_DTYPES[kv])
    scale = np.abs(exact).max()
    apart = np.abs(found - expected).max() / scale
    allowed = NOISE * (np.abs(single - exact).max() / scale + ULP) + KV_SLACK[kv]
    told = f"{apart:.1e} of the largest logit, {allowed:.1e} allowed"
    if not apart <= allowed:  # NaN is not
        raise MismatchError(told)
    return told


def fed(ids: list[list[int]], forward: Callable[[Any, Any], np.ndarray]) -> np.ndarray:
    """The logits after all but the last STEPS ids of each row, and after each of those: (S,B,V)."""
    prompts = [row[:-STEPS] for row in ids]
    logits = [forward(*pad(prompts))[:, 0]]
    ones_B = np.ones(len(ids), np.int64)
    for step in range(-STEPS, 0):
        logits.append(forward(np.array([[row[step]] for row in ids]), ones_B)[:, 0])
    return np.stack(logits)


def spec(params: Params, config: Config, ids: list[list[int]], dtype: str, kept: Any) -> np.ndarray:
    """What model.forward gives in NumPy, with arithmetic, and keys and values, of these dtypes."""
    weights = stored(params)
    cache = new_cache(config, len(ids), max(map(len, ids)), kept)

    def forward(ids_BT: Any, new_B: Any) -> np.ndarray:
        return model.forward(weights, config, ids_BT, cache, new_B, dtype)[0]

    return fed(ids, forward)


def made(config: Config, name: str, rng: np.random.Generator) -> Params:
    """Random weights, all matrices of one stored format."""
    params = random(config, rng)

    def change(w: Any) -> Any:
        if w.ndim == 1:
            return w
        return w.astype(PLAIN[name]) if name in PLAIN else blocks(name, w.shape, rng)

    changed = {key: change(w) for key, w in named(params, config.tied).items()}
    return from_named(changed, config)


def blocks(name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Blocks:
    """A matrix of random blocks, each of its own scale, weights about as large as a model's."""
    form = FORMATS[name]
    blocks_RC = rng.integers(0, 256, (shape[0] * shape[1] // form.weights, form.nbytes), np.uint8)
    one = np.array([1], np.float16).view(np.uint8)
    for at in SCALES[name]:
        blocks_RC[:, at : at + 2] = one
    largest = np.abs(decode(name, blocks_RC, (len(blocks_RC), form.weights))).max()
    signs_R = rng.choice((-1.0, 1.0), len(blocks_RC)) / largest
    for i, at in enumerate(SCALES[name]):
        sign = -1 if i and name.endswith("_1") else 1  # their minimum is added, of others taken off
        sizes_R = sign * signs_R * rng.uniform(0.05, 0.1, len(blocks_RC))
        blocks_RC[:, at : at + 2] = sizes_R.astype(np.float16)[:, None].view(np.uint8)
    return Blocks(name, blocks_RC.reshape(shape[0], -1))


# ---- a real model --------------------------------------------------------------------------------


def real(path: str, device: Device, engine: str, new_tokens: int = 16) -> str:
    """Logits of a text, and greedy ids after it, beside those of NumPy's engine."""
    found, expected = (
        _text_of(load(path, where, engine=by, max_seq_len=64), new_tokens)
        for where, by in ((str(device), engine), ("cpu", "numpy"))
    )
    apart = float(np.abs(found[0] - expected[0]).max())
    told = f"logits {apart:.1e} apart ({LOGIT} allowed)"
    if not apart <= LOGIT:
        raise MismatchError(told)
    if found[1] != expected[1]:
        raise MismatchError(f"{told}; greedy ids {found[1]}, expected {expected[1]}")
    return f"{told}; {len(found[1])} greedy ids the same"


def golden(name: str, device: Device, engine: str) -> str:
    """Greedy ids and the largest logits of a model, as transformers and a float64 forward give.

    Raises NotRunError where it is not installed.
    """
    known = goldens(name)
    try:
        path = installed(name)
    except InputError as error:
        raise NotRunError(str(error)) from None
    weights = path / SINGLE if path.is_dir() else path
    found = hashlib.sha256(np.memmap(weights, np.uint8, "r").data).hexdigest()
    if found != known["sha256"]:
        raise MismatchError(f"{weights}: sha256 {found}, expected {known['sha256']}")
    llm = load(path, str(device), engine=engine, max_seq_len=64)
    apart = max(_golden_item(llm, item) for item in known["items"])
    steps = sum(len(item["ids"]) for item in known["items"])
    return f"{steps} greedy ids the same, logits {apart:.1e} apart ({LOGIT} allowed)"


def goldens(name: str) -> dict[str, Any]:
    """The package's own table: prompts, and what other implementations made of them."""
    file = resources.files("llama3np").joinpath(f"data/{name}_goldens.json")
    return json.loads(file.read_text("utf-8"))


def _golden_item(llm: Llama, item: dict[str, Any]) -> float:
    """How far the five largest logits of every step are from those of the golden."""
    prompt, ids, apart = item["prompt_ids"], item["ids"], 0.0
    (done,) = llm.generate([prompt], len(ids), stop_ids=())
    if done.ids != ids:
        raise MismatchError(f"{item['id']}: greedy ids {done.ids}, expected {ids}")
    cache, fed = llm.new_cache(1, len(prompt) + len(ids)), prompt
    for step, (id, top_ids, top_logits) in enumerate(
        zip(ids, item["top5_ids"], item["top5_logits"], strict=True)
    ):
        logits_V = llm.forward(fed, cache, last_only=True)[0, 0]
        apart = max(apart, float(np.abs(logits_V[top_ids] - top_logits).max()))
        if not apart <= LOGIT or logits_V.argmax() != id:
            told = f"logits {logits_V[top_ids].tolist()} of ids {top_ids}, expected {top_logits}"
            raise MismatchError(f"{item['id']}, token {step}: {told}")
        fed = [id]
    return apart


def _text_of(llm: Llama, new_tokens: int) -> tuple[np.ndarray, list[int]]:
    ids = llm.encode(TEXT) if llm.tokenizer else bench.prompt_ids(9, llm.config.vocab_size)
    (done,) = llm.generate([ids], new_tokens, stop_ids=())
    return llm.forward(ids, last_only=True)[0, 0], done.ids


# ---- measurements --------------------------------------------------------------------------------


def facts(device: Device) -> dict[str, Any]:
    """What the report begins with: versions, the machine, the device."""
    known = {"versions": machine.versions(), "processor": machine.processor(), "when": time.time()}
    if device.kind == "cuda":
        from llama3np.kernels.cuda.limits import describe

        known["gpu"] = describe(device)
    return {"device": str(device), **known}


def measurements(
    device: Device, path: str | None, plan: bench.Plan | None = None
) -> dict[str, Any]:
    """The device's rates, and of a real model what `llama3np bench` measures."""
    if device.kind == "cuda":
        from llama3np.kernels.cuda.limits import DeviceLimits

        limits: Any = DeviceLimits(device)
        measured = {"launch_us": limits.launch_us(), "graph_us": limits.graph_us()}
    else:
        from llama3np.threads import Pool, available_cores

        limits, measured = machine.Limits(Pool(available_cores())), {}
    measured |= {"read_gb_s": limits.read_gb_s(), "sgemm_gflop_s": limits.sgemm_gflop_s()}
    del limits  # and the gigabyte that it holds
    if path is None:
        return measured
    llm = load(path, str(device))
    return measured | {"bench": bench.measure(llm, plan or bench.plan(llm.max_seq_len, rounds=3))}


def default_model() -> str | None:
    """The first model that is here of those with a name: smollm2, or the embedded one.

    By its name, or by its path where something else of that name lies here.
    """
    from llama3np.load.installed import MODELS, installed, resolve

    for name in MODELS:
        with contextlib.suppress(InputError):
            path = installed(name)
            return name if resolve(name) == path else str(path)
    return None

"""Low-rank adapters in the layout of PEFT: adapter_config.json and adapter_model.safetensors.

Names and meaning as of PEFT 0.21: a linear layer M has `base_model.model.M.lora_A.weight` (R, I)
and `base_model.model.M.lora_B.weight` (O, R), which add alpha / R B A to its weight, or
alpha / sqrt(R) B A with use_rslora (Kalajdzievski 2023). Rows stand in Hugging Face's order.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from functools import partial
from math import sqrt
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

import numpy as np

from llama3np.config import Config
from llama3np.errors import CheckpointError, InputError
from llama3np.kernels.adapted import Adapted
from llama3np.load import names, safetensors
from llama3np.load.files import read_json
from llama3np.load.lazy import Rows
from llama3np.params import named_shapes

_MOST_RANK, _MOST_ALPHA = 2**31 - 1, sys.float_info.max
SETTINGS, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
FOLDER = "adapter"  # of a training's output, where these files are
_PREFIX = "base_model.model."

# Settings that change nothing of what stored adapters add to a model. Any other, known or not, is
# refused unless it is off.
_FREE = {"peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path"}
_FREE |= {"revision", "inference_mode", "r", "lora_alpha", "use_rslora", "lora_dropout"}
_FREE |= {"target_modules", "exclude_modules", "layers_to_transform", "layers_pattern"}
_FREE |= {"init_lora_weights", "megatron_core", "qalora_group_size", "eva_config"}
_OFF: tuple[Any, ...] = (None, False, "none", {}, [])
# First adapters that leave the frozen weights as they are. Others (pissa, olora, ...) change them.
_INITIAL = (None, True, False, "gaussian", "orthogonal", "eva")


class Adapters(NamedTuple):
    """What is added to matrices: scale B A."""

    pairs: dict[str, tuple[np.ndarray, np.ndarray]]  # our name -> A (R, I), B (O, R), float32
    scale: float


def matrices(config: Config) -> dict[str, tuple[int, ...]]:
    """Name -> shape (O, I) of each matrix that may have an adapter: seven in every block."""
    shapes = named_shapes(config)
    return {name: w for name, w in shapes.items() if name.startswith("layers.") and len(w) == 2}


def module(ours: str) -> str:
    """PEFT's name of a matrix's module: "layers.0.wq" is "model.layers.0.self_attn.q_proj"."""
    return names.foreign(ours, "huggingface").removesuffix(".weight")


def _reordered(b_OR: Any, name: str, config: Config, reorder: names.Reorder) -> Any:
    """B of wq or wk with its rows, which are W's, from config's order to the other, or back."""
    n_heads = {"wq": config.n_heads, "wk": config.n_kv_heads}.get(name.rpartition(".")[2])
    if n_heads is None or config.rope_pairing == "half":
        return b_OR
    return reorder(b_OR, n_heads)


# ---- writing -----------------------------------------------------------------------------------


def settings(adapters: Adapters, base: str) -> dict[str, Any]:
    """What adapter_config.json says; base: the path of the frozen model."""
    rank = len(next(iter(adapters.pairs.values()))[0])
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": adapters.scale * rank,
        "lora_dropout": 0.0,
        "target_modules": sorted({module(name).rpartition(".")[2] for name in adapters.pairs}),
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
    }


def tensors(adapters: Adapters, config: Config) -> dict[str, Any]:
    """The tensors of adapter_model.safetensors, of adapters in the order of config."""
    found = {}
    for name, (a_RI, b_OR) in adapters.pairs.items():
        stem = _PREFIX + module(name)
        found[f"{stem}.lora_A.weight"] = a_RI
        found[f"{stem}.lora_B.weight"] = _reordered(b_OR, name, config, names.to_half)
    return found


# ---- reading -----------------------------------------------------------------------------------


def read(directory: Path, config: Config) -> Adapters:
    """The adapters in a directory, for a model of `config` and in the order of its rows.

    Raises CheckpointError, naming file and key or tensor, for whatever is not plain low-rank
    adapters of the seven matrices of blocks: other kinds (DoRA, ...), biases, ranks by module.
    """
    path, weights = directory / SETTINGS, directory / WEIGHTS
    if not path.exists() and (directory / FOLDER / SETTINGS).exists():
        raise CheckpointError(
            f"{directory}: expected {SETTINGS}, found none; there is one in {directory / FOLDER}"
        )
    told = read_json(path)
    rank, scale = _rank_and_scale(told, path)
    if not weights.exists():
        raise CheckpointError(f"{directory}: expected {WEIGHTS}, found none")
    stored = safetensors.read(weights)
    pairs = {}
    for name, (n_out, n_in) in matrices(config).items():
        stem = _PREFIX + module(name)
        shapes = {f"{stem}.lora_A.weight": (rank, n_in), f"{stem}.lora_B.weight": (n_out, rank)}
        if not any(key in stored for key in shapes):
            continue
        a_RI, b_OR = (_taken(stored, key, shape, weights) for key, shape in shapes.items())
        pairs[name] = a_RI, _reordered(b_OR, name, config, names.to_interleaved)
    _refuse_rest(stored, weights)
    _check_layers(told, pairs, path)
    if not pairs:
        raise CheckpointError(f"{weights}: expected adapters, found no tensor")
    return Adapters(pairs, scale)


def _rank_and_scale(told: Mapping[str, Any], path: Path) -> tuple[int, float]:
    """R, and what B A is multiplied by, once nothing else is asked for."""
    if told.get("peft_type") != "LORA":
        raise CheckpointError(f"{path}: peft_type: expected LORA, found {told.get('peft_type')!r}")
    for key, value in told.items():
        if key not in _FREE and value not in _OFF:
            raise CheckpointError(f"{path}: {key}: expected none, found {short(value)}")
    initial = told.get("init_lora_weights")
    if initial not in _INITIAL:
        raise CheckpointError(
            f"{path}: init_lora_weights: expected adapters of an unchanged model, found "
            f"{initial!r}, which changes it (PEFT converts them when it saves)"
        )
    return _scaled(told, path)


def _scaled(told: Mapping[str, Any], path: Path) -> tuple[int, float]:
    """R and alpha / R, or alpha / sqrt(R); JSON's numbers have no limits of their own."""
    values: list[Any] = [told.get(key) for key in ("r", "lora_alpha", "use_rslora")]
    rank, alpha, root = values
    if type(rank) is not int or rank < 1:
        raise CheckpointError(f"{path}: r: expected a whole number from 1 on, found {short(rank)}")
    if rank > _MOST_RANK:
        raise CheckpointError(f"{path}: r: expected at most {_MOST_RANK}, found {short(rank)}")
    number = isinstance(alpha, (int, float)) and not isinstance(alpha, bool)
    if not number or not abs(alpha) <= _MOST_ALPHA:  # NaN is not, either
        raise CheckpointError(f"{path}: lora_alpha: expected a number, found {short(alpha)}")
    if not isinstance(root, (bool, type(None))):
        raise CheckpointError(f"{path}: use_rslora: expected true or false, found {short(root)}")
    return rank, alpha / (sqrt(rank) if root else rank)


def _taken(stored: dict[str, Any], key: str, shape: tuple[int, int], path: Path) -> np.ndarray:
    """Take a tensor out of those that are left, as float32."""
    if key not in stored:
        raise CheckpointError(f"{path}: tensor {key!r} is missing, its partner is there")
    found: np.ndarray = stored.pop(key)
    if found.shape != shape:
        raise CheckpointError(
            f"{path}: tensor {key!r}: expected shape {shape}, found {found.shape}"
        )
    taken = found.astype(np.float32)  # no dtype that is read here is wider
    if not np.isfinite(taken).all():
        raise CheckpointError(f"{path}: tensor {key!r}: expected finite numbers, found others")
    return taken


def _check_layers(told: Mapping[str, Any], pairs: Mapping[str, Any], path: Path) -> None:
    """Where settings name layers, adapters of others are a contradiction: PEFT ignores them."""
    chosen, pattern = told.get("layers_to_transform"), told.get("layers_pattern")
    if pattern and "layers" not in (pattern if isinstance(pattern, list) else [pattern]):
        raise CheckpointError(f"{path}: layers_pattern: expected layers, found {short(pattern)}")
    if chosen is None or chosen == []:
        return
    layers = chosen if isinstance(chosen, list) else [chosen]
    others = {int(name.split(".")[1]) for name in pairs} - {n for n in layers if type(n) is int}
    if others:
        raise CheckpointError(
            f"{path}: layers_to_transform: expected all layers that have adapters, found "
            f"{short(chosen)} without layer {min(others)}"
        )


def _refuse_rest(stored: Mapping[str, Any], path: Path) -> None:
    if stored:
        known = sorted(row.huggingface.rpartition(".")[2] for row in names.OF_LAYER)
        modules = ", ".join(name for name in known if name.endswith("_proj"))
        raise CheckpointError(
            f"{path}: tensor {min(stored)!r}: expected lora_A and lora_B of {modules} in this "
            "model's blocks, found another"
        )


# ---- merging -----------------------------------------------------------------------------------


def merged(weights: Mapping[str, Any], adapters: Adapters) -> dict[str, Any]:
    """The tensors with scale B A added, summed in float64 and rounded to float32.

    A few rows are made at a time, as they are asked for; that raises InputError, naming the
    tensor, where float32 cannot hold the sum.
    """
    found = dict(weights)
    for name, (a_RI, b_OR) in adapters.pairs.items():
        sum_ = Adapted(weights[name], a_RI, b_OR, adapters.scale)
        found[name] = Rows(sum_.shape, sum_.dtype, partial(_rows, sum_, name))
    return found


def _rows(w: Adapted, name: str, start: int, stop: int) -> np.ndarray:
    """Rows of the sum, all of them finite."""
    with np.errstate(over="ignore", invalid="ignore"):
        rows = w[start:stop]
    if not np.isfinite(rows).all():
        raise InputError(f"tensor {name!r}: with its adapter, has numbers too large for float32")
    return rows

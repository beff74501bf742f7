"""Hugging Face directories: config.json, safetensors in one file or in shards with an index."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from reprlib import repr as short
from typing import Any, NamedTuple

import numpy as np

from llama3np.config import Config, from_hf
from llama3np.errors import CheckpointError, InputError
from llama3np.kernels import unstored
from llama3np.load import names, safetensors
from llama3np.load.checkpoint import Checkpoint, Progress, assemble, dtypes, report
from llama3np.load.files import new_directory, read_json
from llama3np.load.lazy import decoded, told
from llama3np.params import Params, named
from llama3np.sample import GREEDY, Sampling

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HEAD = names.foreign("head_VD", "huggingface")
_EMBED = names.foreign("embed_VD", "huggingface")

# ---- reading ---------------------------------------------------------------------------------


class Opened(NamedTuple):
    """A directory's model with nothing read but its JSON files and the tensors' headers."""

    config: Config
    tensors: dict[str, np.ndarray]  # by our names, mapped, in the dtype of the file
    layout: str  # "Hugging Face directory, 4 safetensors files, bf16"
    stop_ids: tuple[int, ...]  # those that the settings declare; the tokenizer's count too
    sampling: Sampling


def load(directory: Path, progress: Progress | None = None) -> Checkpoint:
    """Load a directory of a Llama model. Raises CheckpointError for all that is wrong."""
    opened = open_directory(directory)
    ours = opened.tensors
    report(progress, {name: w.nbytes for name, w in ours.items()}, ours)
    tokenizer = tokenizer_of(directory)
    params = assemble(ours, opened.config)
    stop_ids = with_tokenizers(opened.stop_ids, tokenizer)
    return Checkpoint(opened.config, params, tokenizer, opened.layout, stop_ids, opened.sampling)


def with_tokenizers(declared: tuple[int, ...], tokenizer: Any) -> tuple[int, ...]:
    """Both: settings that declare one end must not keep a dialog from stopping at the other."""
    return tuple(dict.fromkeys([*declared, *(tokenizer.stop_ids if tokenizer else ())]))


def open_directory(directory: Path) -> Opened:
    """Read the settings and map the tensors, all of them checked against each other.

    Raises CheckpointError as load does.
    """
    settings_path, generation_path = directory / "config.json", directory / "generation_config.json"
    settings = read_json(settings_path)
    generation = read_json(generation_path) if generation_path.exists() else {}
    config = from_hf(settings, str(settings_path))
    tensors, n_files = _read_weights(directory)
    if config.tied:
        _drop_copied_head(tensors, directory)
    shapes = {name: w.shape for name, w in tensors.items()}
    matched = names.matched(shapes, config, "huggingface", str(directory))
    ours = {name: tensors[theirs] for name, theirs in matched.items()}
    files = "1 safetensors file" if n_files == 1 else f"{n_files} safetensors files"
    layout = f"Hugging Face directory, {files}, {dtypes(ours.values())}"
    stop_ids = _stop_ids({generation_path: generation, settings_path: settings})
    return Opened(config, ours, layout, stop_ids, _sampling(generation, generation_path))


def _read_weights(directory: Path) -> tuple[dict[str, np.ndarray], int]:
    """Every tensor by the file's name for it, and the number of files."""
    if (directory / SINGLE).exists():
        return safetensors.read(directory / SINGLE), 1
    if (directory / INDEX).exists():
        return _read_shards(directory / INDEX)
    raise CheckpointError(f"{directory}: expected {SINGLE} or {INDEX}, found neither")


def _read_shards(index: Path) -> tuple[dict[str, np.ndarray], int]:
    file_of = read_json(index).get("weight_map")
    if not isinstance(file_of, dict) or not all(isinstance(f, str) for f in file_of.values()):
        raise CheckpointError(
            f"{index}: expected weight_map to give each tensor's file, found otherwise"
        )
    tensors: dict[str, np.ndarray] = {}
    files = sorted(set(file_of.values()))
    beside = {path.name for path in index.parent.iterdir()}
    for file in files:
        if file not in beside:
            raise CheckpointError(f"{index}: names the file {file!r}, which is not beside it")
        shard = safetensors.read(index.parent / file)
        listed = {name for name, its_file in file_of.items() if its_file == file}
        for name in sorted(listed ^ set(shard)):
            where = "in the index but not in" if name in listed else "not in the index but in"
            raise CheckpointError(f"{index}: the tensor {name!r} is {where} {file}")
        tensors |= shard
    return tensors, len(files)


def _drop_copied_head(tensors: dict[str, np.ndarray], directory: Path) -> None:
    """A tied checkpoint may hold its head a second time; a head of other numbers is refused."""
    head = tensors.pop(_HEAD, None)
    if head is not None and _EMBED in tensors and not _same_bits(head, tensors[_EMBED]):
        raise CheckpointError(
            f"{directory}: config.json has tie_word_embeddings, but {_HEAD} differs from {_EMBED}"
        )


def _same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a_bytes, b_bytes = a.reshape(-1).view(np.uint8), b.reshape(-1).view(np.uint8)
    step = 1 << 22  # by parts: the comparison makes an array of its own
    return all(
        np.array_equal(a_bytes[i : i + step], b_bytes[i : i + step])
        for i in range(0, len(a_bytes), step)
    )


def tokenizer_of(directory: Path) -> Any:
    """The tokenizer in a directory, or None. Raises CheckpointError for one that cannot be used."""
    from llama3np import tokenizer  # not needed for the weights alone

    if (directory / "tokenizer.json").exists():
        return tokenizer.from_tokenizer_json(directory / "tokenizer.json")
    if (directory / "tokenizer.model").exists():
        return tokenizer.from_tokenizer_model(directory / "tokenizer.model")
    return None


def _stop_ids(sources: Mapping[Path, Mapping[str, Any]]) -> tuple[int, ...]:
    """What ends a text by the first file that says it; nothing if none does."""
    for path, values in sources.items():
        found = values.get("eos_token_id")
        ids = found if isinstance(found, list) else [found]
        if found is not None and not all(type(i) is int and i >= 0 for i in ids):
            raise CheckpointError(f"{path}: eos_token_id: expected ids, found {short(found)}")
        if found is not None:
            return tuple(ids)
    return ()


def _sampling(generation: Mapping[str, Any], path: Path) -> Sampling:
    """What generation_config.json recommends: greedy unless it has do_sample.

    A setting that it leaves out limits nothing. (transformers then has a top_k of 50 of its own.)
    """
    if not generation.get("do_sample"):
        return GREEDY
    given = {name: generation.get(name) for name in ("temperature", "top_k", "top_p")}
    for name, value in given.items():
        kinds = int if name == "top_k" else (int, float)
        if value is not None and (isinstance(value, bool) or not isinstance(value, kinds)):
            raise CheckpointError(f"{path}: {name}: expected a number, found {value!r}")
    values = {name: value for name, value in given.items() if value is not None}
    try:
        return Sampling(**{"temperature": 1.0, **values}).check()
    except InputError as error:
        raise CheckpointError(f"{path}: {error}") from None


# ---- writing ---------------------------------------------------------------------------------


def save_hf(
    directory: str | Path,
    config: Config,
    params: Params,
    shard_bytes: int | None = None,
    tokenizer_files: Iterable[str | Path] = (),
    progress: Progress | None = None,
) -> None:
    """Write a directory that this package and transformers read, each weight in its own dtype.

    Rows of wq and wk are written in Hugging Face's order (pairing "half"). Shards of at most
    shard_bytes, or one tensor, with an index, if shard_bytes is given. The directory appears
    whole or not at all; raises InputError if there is one that is not empty.
    """
    directory = Path(directory)
    config, params = names.with_pairing(config, unstored(params), "half")
    ours = named(params, config.tied)
    theirs = {names.foreign(name, "huggingface"): decoded(w) for name, w in ours.items()}
    (tensors,) = told([theirs], progress)
    with new_directory(directory) as temporary:
        _write_json(temporary / "config.json", _settings(config, params))
        _write_weights(temporary, tensors, shard_bytes)
        for file in tokenizer_files:
            shutil.copyfile(file, temporary / Path(file).name)


def _settings(config: Config, params: Params) -> dict[str, Any]:
    """config.json in the older form of the RoPE keys, which every release of transformers reads."""
    scaling = config.rope_scaling
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_size": config.dim,
        "intermediate_size": config.ffn_dim,
        "num_hidden_layers": config.n_layers,
        "num_attention_heads": config.n_heads,
        "num_key_value_heads": config.n_kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.context_length,
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_scaling": scaling
        and {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.old_context,
        },
        "tie_word_embeddings": config.tied,
        "torch_dtype": params.embed_VD.dtype.name,
    }


def _write_weights(
    directory: Path, tensors: Mapping[str, np.ndarray], shard_bytes: int | None
) -> None:
    if shard_bytes is None:
        return safetensors.write(directory / SINGLE, tensors)
    shards = _shards(tensors, shard_bytes)
    file_of: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        safetensors.write(directory / file, shard)
        file_of |= dict.fromkeys(shard, file)
    total = sum(w.nbytes for w in tensors.values())
    _write_json(directory / INDEX, {"metadata": {"total_size": total}, "weight_map": file_of})


def _shards(tensors: Mapping[str, np.ndarray], limit: int) -> list[dict[str, np.ndarray]]:
    """Tensors in their order, a new shard wherever the next one would not fit."""
    shards: list[dict[str, np.ndarray]] = [{}]
    room = limit
    for name, w in tensors.items():
        if shards[-1] and w.nbytes > room:
            shards.append({})
            room = limit
        shards[-1][name] = w
        room -= w.nbytes
    return shards


def _write_json(path: Path, value: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")

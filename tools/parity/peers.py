"""Every intermediate of transformers and of Meta's own code in 16 bits, by our tap names.

Arrays are of one sequence, of the bits that torch computed: (T, D), heads as (T, N, H) in the
order of the checkpoint's rows, scores and probs as (N, T, S). Both models are watched from outside:
by hooks on their modules, and by what RoPE returns and softmax is given.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import ml_dtypes
import numpy as np
import torch
import transformers
from transformers.models.llama import modeling_llama

from llama3np.config import Config
from llama3np.load.names import foreign
from llama3np.params import Params, named

REPOSITORY = Path(__file__).resolve().parents[2]
TORCH = {"bfloat16": torch.bfloat16, "float16": torch.float16}
BITS = {torch.bfloat16: ml_dtypes.bfloat16, torch.float16: np.float16, torch.float32: np.float32}

# What a module's output is, and its input, by our name of its weight.
OUTPUT = {
    "attn_norm_D": "attn_norm", "wq": "q", "wk": "k", "wv": "v", "wo": "attn_out",
    "mlp_norm_D": "mlp_norm", "w_gate": "gate", "w_up": "up", "w_down": "mlp_out",
}  # fmt: skip
INPUT = {"wo": "attn", "mlp_norm_D": "h_mid", "w_down": "act"}
OF_MODEL = {"embed_VD": "embed", "norm_D": "norm", "head_VD": "logits"}

Taps = dict[str, np.ndarray]


def array_of(tensor: torch.Tensor) -> np.ndarray:
    """A tensor's bits as a NumPy array, its batch axis of 1 removed."""
    whole = tensor.detach()[0].contiguous()
    bits = torch.int32 if whole.dtype == torch.float32 else torch.int16
    return whole.view(bits).numpy().view(BITS[whole.dtype]).copy()


# ---- transformers ------------------------------------------------------------------------------


def transformers_taps(directory: Path, config: Config, ids: list[int], dtype: str) -> Taps:
    """Of a Hugging Face directory, with eager attention; all ids at once."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=TORCH[dtype], attn_implementation="eager"
    ).eval()
    taps: Taps = {}
    with watched(model, config, "huggingface", taps), turns_shown(
        modeling_llama, "apply_rotary_pos_emb", taps, lambda array: array.swapaxes(0, 1)
    ), torch.no_grad():  # fmt: skip
        model(torch.tensor([ids]), use_cache=False)
    return finished(taps, config)


# ---- Meta --------------------------------------------------------------------------------------


class Linear(torch.nn.Linear):
    """In place of fairscale's parallel layers, on one process: the product and nothing else."""

    def __init__(self, n_in: int, n_out: int, bias: bool = False, **_: Any):
        super().__init__(n_in, n_out, bias=bias)


class Embedding(torch.nn.Embedding):
    """In place of fairscale's VocabParallelEmbedding."""

    def __init__(self, n_rows: int, dim: int, **_: Any):
        super().__init__(n_rows, dim)


def meta_module() -> Any:
    """Meta's llama3/model.py as it is, of the package llama-models (`make test` installs it)."""
    names = ["fairscale", "fairscale.nn", "fairscale.nn.model_parallel"]
    stand_ins = {name: types.ModuleType(name) for name in names}
    layers = types.ModuleType("layers")
    vars(layers).update(
        ColumnParallelLinear=Linear, RowParallelLinear=Linear, VocabParallelEmbedding=Embedding
    )
    start = types.ModuleType("initialize")
    vars(start).update(get_model_parallel_world_size=lambda: 1)
    stand_ins |= {f"{names[-1]}.layers": layers, f"{names[-1]}.initialize": start}
    sys.path.insert(0, str(REPOSITORY / "weights" / "llama-models"))
    with mock.patch.dict(sys.modules, stand_ins):
        return importlib.import_module("llama_models.llama3.model")


def meta_taps(params: Params, config: Config, ids: list[int], dtype: str) -> Taps:
    """Of weights in Meta's order of rows; all ids at once."""
    meta, old = meta_module(), torch.get_default_dtype()
    torch.set_default_dtype(TORCH[dtype])  # as Meta's generation.py builds its model
    try:
        model = meta.Transformer(meta_args(meta, config, len(ids))).eval()
    finally:
        torch.set_default_dtype(old)
    weights = named(params, config.tied) | {"head_VD": params.head_VD}
    state = {
        foreign(name, "meta"): torch.from_numpy(np.array(w, dtype=np.float32))
        for name, w in weights.items()
    }
    model.load_state_dict(state)
    taps: Taps = {}
    with watched(model, config, "meta", taps), turns_shown(meta, "apply_rotary_emb", taps):
        model(torch.tensor([ids]), 0)
    return finished(taps, config)


def meta_args(meta: Any, config: Config, tokens: int) -> Any:
    """Meta's params.json of a config; what it cannot say is refused."""
    if config.rope_scaling is not None and config.rope_scaling.factor != 8:
        raise ValueError("Meta's model.py knows the factor 8 alone")
    # The feed-forward width is a multiple of itself: half of it, rounded up.
    half = config.ffn_dim / 2 / int(8 * config.dim / 3)
    return meta.ModelArgs(
        dim=config.dim,
        n_layers=config.n_layers,
        n_heads=config.n_heads,
        n_kv_heads=config.n_kv_heads,
        vocab_size=config.vocab_size,
        multiple_of=config.ffn_dim,
        ffn_dim_multiplier=half,
        norm_eps=config.norm_eps,
        rope_theta=config.rope_theta,
        use_scaled_rope=config.rope_scaling is not None,
        max_batch_size=1,
        max_seq_len=tokens,
    )


# ---- watching ----------------------------------------------------------------------------------


@contextmanager
def watched(model: Any, config: Config, layout: str, taps: Taps) -> Iterator[None]:
    """Keep what goes through the modules, and through softmax, in `taps` while a block runs."""

    def module(name: str) -> Any:
        return model.get_submodule(foreign(name, layout).removesuffix(".weight"))

    def keep_output(tap: str) -> Callable[..., None]:
        return lambda _, __, out: taps.update({tap: array_of(out)})

    def keep_input(tap: str) -> Callable[..., None]:
        return lambda _, given: taps.update({tap: array_of(given[0])})

    hooks = [module(name).register_forward_hook(keep_output(tap)) for name, tap in OF_MODEL.items()]
    for i in range(config.n_layers):
        prefix = f"layers.{i}."
        for name, tap in OUTPUT.items():
            hooks.append(module(prefix + name).register_forward_hook(keep_output(prefix + tap)))
        for name, tap in INPUT.items():
            hooks.append(module(prefix + name).register_forward_pre_hook(keep_input(prefix + tap)))
        after = f"layers.{i + 1}.attn_norm_D" if i + 1 < config.n_layers else "norm_D"
        hooks.append(module(after).register_forward_pre_hook(keep_input(prefix + "h")))
    with softmax_shown(taps):
        yield
    for hook in hooks:
        hook.remove()


@contextmanager
def softmax_shown(taps: Taps) -> Iterator[None]:
    """Keep what softmax is given, and what becomes of its result, once for each layer in turn."""
    softmax, n_calls = torch.nn.functional.softmax, 0

    def shown(scores: torch.Tensor, *args: Any, **options: Any) -> torch.Tensor:
        nonlocal n_calls
        probs = softmax(scores, *args, **options)
        prefix, n_calls = f"layers.{n_calls}.", n_calls + 1
        taps[prefix + "scores"], taps[prefix + "probs"] = array_of(scores), array_of(probs)
        return probs

    with mock.patch.object(torch.nn.functional, "softmax", shown):
        yield


@contextmanager
def turns_shown(
    module: Any, name: str, taps: Taps, arranged: Callable[[np.ndarray], np.ndarray] = np.asarray
) -> Iterator[None]:
    """Keep the queries and keys that a module's function of RoPE returns."""
    turn, n_calls = getattr(module, name), 0

    def shown(*args: Any, **options: Any) -> Any:
        nonlocal n_calls
        turned = turn(*args, **options)
        for tap, tensor in zip(("q_rope", "k_rope"), turned, strict=True):
            taps[f"layers.{n_calls}.{tap}"] = arranged(array_of(tensor))
        n_calls += 1
        return turned

    with mock.patch.object(module, name, shown):
        yield


def finished(taps: Taps, config: Config) -> Taps:
    """The taps with heads apart, 16 bits throughout, and -inf where a query may not look.

    Meta's code widens scores as softmax takes them, and logits, exactly; both give softmax's result
    in float32 and round it next. transformers masks by the least finite number.
    """
    kind = taps["embed"].dtype
    for name, array in taps.items():
        tap = name.rpartition(".")[2]
        if tap in ("q", "k", "v", "attn"):
            array = array.reshape(len(array), -1, config.head_dim)
        if tap == "scores":
            array = np.where(np.tri(array.shape[1], dtype=bool), array.astype(np.float32), -np.inf)
        taps[name] = array.astype(kind)
    return taps

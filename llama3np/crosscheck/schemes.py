"""What others call our taps: the naming schemes of other implementations, and a user's own names.

A name may end in ".output", which says no more than the name itself, or in ".input" where the table
has it. Where two names of one trace mean the same tap, the one that stands first here is taken.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from llama3np.crosscheck import taps
from llama3np.errors import InputError

# Of transformers' modeling_llama.py; `self_attn.q_rope` and the like have no module of their own.
HUGGING_FACE = {
    "embed_tokens": "embed",
    "layers.{i}.input_layernorm": "attn_norm",
    "layers.{i}.self_attn.q_proj": "q",
    "layers.{i}.self_attn.k_proj": "k",
    "layers.{i}.self_attn.v_proj": "v",
    "layers.{i}.self_attn.q_rope": "q_rope",
    "layers.{i}.self_attn.k_rope": "k_rope",
    "layers.{i}.self_attn.scores": "scores",
    "layers.{i}.self_attn.probs": "probs",
    "attentions.{i}": "probs",
    "layers.{i}.self_attn.o_proj.input": "attn",
    "layers.{i}.self_attn.o_proj": "attn_out",
    "layers.{i}.self_attn": "attn_out",
    "layers.{i}.post_attention_layernorm.input": "h_mid",
    "layers.{i}.post_attention_layernorm": "mlp_norm",
    "layers.{i}.mlp.gate_proj": "gate",
    "layers.{i}.mlp.up_proj": "up",
    "layers.{i}.mlp.down_proj.input": "act",
    "layers.{i}.mlp.down_proj": "mlp_out",
    "layers.{i}.mlp": "mlp_out",
    "layers.{i}": "h",
    "norm": "norm",
    "lm_head": "logits",
    "lm_head.input": "norm",
}

# Of Meta's llama/model.py.
META = {
    "tok_embeddings": "embed",
    "layers.{i}.attention_norm": "attn_norm",
    "layers.{i}.attention.wq": "q",
    "layers.{i}.attention.wk": "k",
    "layers.{i}.attention.wv": "v",
    "layers.{i}.attention.q_rope": "q_rope",
    "layers.{i}.attention.k_rope": "k_rope",
    "layers.{i}.attention.scores": "scores",
    "layers.{i}.attention.probs": "probs",
    "layers.{i}.attention.wo.input": "attn",
    "layers.{i}.attention.wo": "attn_out",
    "layers.{i}.attention": "attn_out",
    "layers.{i}.ffn_norm.input": "h_mid",
    "layers.{i}.ffn_norm": "mlp_norm",
    "layers.{i}.feed_forward.w1": "gate",
    "layers.{i}.feed_forward.w3": "up",
    "layers.{i}.feed_forward.w2.input": "act",
    "layers.{i}.feed_forward.w2": "mlp_out",
    "layers.{i}.feed_forward": "mlp_out",
    "layers.{i}": "h",
    "norm": "norm",
    "output": "logits",
    "output.input": "norm",
}

# The nodes of llama.cpp's graph (src/llama-graph.cpp and models/llama.cpp). Two nodes of a layer
# are called Qcur, before and after RoPE; "kq" is neither scaled nor masked.
LLAMA_CPP = {
    "inp_embd": "embed",
    "embd": "embed",
    "attn_norm-{i}": "attn_norm",
    "Qcur_rope-{i}": "q_rope",
    "Kcur_rope-{i}": "k_rope",
    "Qcur-{i}.rope": "q_rope",
    "Kcur-{i}.rope": "k_rope",
    "Qcur-{i}": "q or q_rope",
    "Kcur-{i}": "k or k_rope",
    "Vcur-{i}": "v",
    "kq-{i}": "raw scores",
    "kq_soft_max-{i}": "probs",
    "kq_soft_max_ext-{i}": "probs",
    "kqv_out-{i}": "attn",
    "kqv_merged_cont-{i}": "attn",
    "kqv-{i}": "attn",
    "attn_out-{i}": "attn_out",
    "ffn_inp-{i}": "h_mid",
    "ffn_norm-{i}": "mlp_norm",
    "ffn_gate-{i}": "gate",
    "ffn_up-{i}": "up",
    "ffn_swiglu-{i}": "act",
    "ffn_gate_par-{i}": "act",
    "ffn_out-{i}": "mlp_out",
    "l_out-{i}": "h",
    "result_norm": "norm",
    "result_output": "logits",
}

OURS = "llama3np"
SCHEMES = {"Hugging Face": HUGGING_FACE, "Meta": META, "llama.cpp": LLAMA_CPP}

# Wrappers around a model put their own name before those of its modules.
WRAPPED = r"(?:module\.|base_model\.model\.|model\.)*"


class Meaning(NamedTuple):
    """What a name means: a layer (None before and after them) and one or two possible taps."""

    layer: int | None
    kinds: tuple[str, ...]  # ("q",), or ("q", "q_rope") where the scheme calls both alike
    scheme: str
    rank: int = 0  # of two names for one tap the lower is taken
    raw: bool = False  # scores neither scaled nor masked


def _pattern(name: str) -> re.Pattern[str]:
    wrapped = WRAPPED if "-" not in name else ""
    return re.compile(wrapped + re.escape(name).replace(r"\{i\}", r"(\d+)") + r"(?:\.output)?")


_TABLE = [
    (_pattern(name), scheme, rank, kind)
    for scheme, names in SCHEMES.items()
    for rank, (name, kind) in enumerate(names.items(), start=1)
]


def meaning(name: str, n_layers: int, own: Mapping[str, str] | None = None) -> Meaning | None:
    """What a name means, or None: by the user's map, as a tap of ours, or by a scheme."""
    for theirs, tap in (own or {}).items():
        match = re.fullmatch(re.escape(theirs).replace(r"\{i\}", r"(\d+)"), name)
        if match:
            layer, kind = taps.parse(tap.replace("{i}", match[1]) if match.groups() else tap)
            return Meaning(layer, (kind,), "the map", rank=-1)
    try:
        layer, kind = taps.parse(name)
        return Meaning(layer, (kind,), OURS)
    except KeyError:
        return _hidden_state(name, n_layers) or _known(name)


def _known(name: str) -> Meaning | None:
    for pattern, scheme, rank, kind in _TABLE:
        if match := pattern.fullmatch(name):
            layer = int(match[1]) if match.groups() else None
            raw = kind.startswith("raw ")
            kinds = tuple(kind.removeprefix("raw ").split(" or "))
            return Meaning(layer, kinds, scheme, rank, raw)
    return None


def _hidden_state(name: str, n_layers: int) -> Meaning | None:
    """Transformers' output_hidden_states: the embedding, each layer but the last, then the norm."""
    match = re.fullmatch(r"hidden_states\.(\d+)", name)
    if not match or (i := int(match[1])) > n_layers:
        return None
    if i in (0, n_layers):
        return Meaning(None, ("embed" if i == 0 else "norm",), "Hugging Face", rank=99)
    return Meaning(i - 1, ("h",), "Hugging Face", rank=99)


# ---- the user's map ------------------------------------------------------------------------------


def read_map(path: str | Path) -> dict[str, str]:
    """A JSON file of names: theirs, with {i} for the layer, and the tap that each of them is.

    {"blk{i}/query": "layers.{i}.q", "out": "logits"}
    Raises InputError for a file that cannot be read, is not such an object, or names no tap.
    """
    try:
        names = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from None
    except ValueError as error:  # not JSON, or not UTF-8
        raise InputError(f"{path}: expected a JSON object of names, found {error}") from None
    return checked_map(names, str(path))


def checked_map(names: Any, source: str = "map") -> dict[str, str]:
    """The same names, each tap known and {i} on both sides or on neither; InputError if not."""
    if not isinstance(names, dict):
        raise InputError(f"{source}: expected a JSON object of names, found {type(names).__name__}")
    for theirs, tap in names.items():
        if not isinstance(tap, str) or not _is_tap(tap):
            raise InputError(
                f"{source}: {theirs!r}: expected a tap such as 'layers.{{i}}.q' or 'logits', "
                f"found {tap!r}"
            )
        if theirs.count("{i}") != tap.count("{i}"):  # of a tap it is 0 or 1
            raise InputError(
                f"{source}: {theirs!r}: expected {{i}}, the layer, once in both names or in "
                f"neither, found {tap!r}"
            )
    return names


def _is_tap(name: str) -> bool:
    try:
        return bool(taps.parse(name.replace("{i}", "0")))
    except KeyError:
        return False

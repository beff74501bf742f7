"""The command `llama3np info`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from typing import Any

from llama3np import cost
from llama3np.chat import chat_format
from llama3np.cli import common
from llama3np.errors import InputError
from llama3np.llm import DEFAULT_CONTEXT, SHORT_NAMES
from llama3np.load import Inspection, Stored
from llama3np.numerics import PROFILES, profile
from llama3np.params import Layer


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument(
        "--dtype", default="float32", choices=PROFILES, help="precision profile (docs/numerics.md)"
    )
    parser.add_argument("--max-seq-len", type=int, metavar="N", help="prompt + new tokens at most")
    common.rope_argument(parser)


def run(args: argparse.Namespace) -> None:
    """Look, describe, print. No weight is read."""
    found = common.model_facts(args.model, args.rope_factor)
    facts = describe(found, args.dtype, args.max_seq_len)
    if args.json:
        print(json.dumps(facts))
        return
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    console.print(tree(facts))
    console.print()
    console.print(table({name: value for name, value in facts.items() if name != "structure"}))


# ---- the facts, as --json prints them --------------------------------------------------------


def describe(found: Inspection, dtype: str, max_seq_len: int | None) -> dict[str, Any]:
    """Everything that is known; `bytes` are those of the files, the cache's of the profile."""
    config, tokenizer, sampling = found.config, found.tokenizer, found.sampling
    length = min(config.context_length, DEFAULT_CONTEXT) if max_seq_len is None else max_seq_len
    if length < 1:
        raise InputError(f"--max-seq-len: expected 1 or more, found {length}")
    parts = cost.parameters(config)
    kept = SHORT_NAMES[profile(dtype).dtype]
    return {
        "layout": found.layout,
        "structure": structure(found.tensors, config.n_layers, config.tied),
        "config": dataclasses.asdict(config),
        "parameters": sum(parts.values()),
        "parameters_by_part": parts,
        "bytes": by_type(found.tensors),
        "bytes_as": {name: cost.weight_bytes(config, name) for name in cost.FORMATS},
        "max_seq_len": length,
        "cache_bytes_per_token": cost.cache_bytes_per_token(config, kept),
        "cache_bytes_per_token_as": {
            name: cost.cache_bytes_per_token(config, name) for name in cost.CACHE_BYTES
        },
        "flops_per_token": {
            f"after {context} tokens": cost.flops_per_token(config, context)
            for context in sorted({0, length - 1, config.context_length - 1})
        },
        "tokenizer": f"{tokenizer.n_vocab} tokens" if tokenizer else found.tokenizer_problem,
        "chat_format": None if tokenizer is None else chat_format(tokenizer),
        "stop_ids": sorted(found.stop_ids),
        "sampling": {name: getattr(sampling, name) for name in ("temperature", "top_k", "top_p")},
    }


def by_type(tensors: dict[str, Stored]) -> dict[str, int]:
    """Bytes of the tensors of each type."""
    sizes: Counter[str] = Counter()
    for tensor in tensors.values():
        sizes[tensor.type] += tensor.nbytes
    return dict(sizes)


def structure(tensors: dict[str, Stored], n_layers: int, tied: bool) -> dict[str, Any]:
    """Names, shapes and types as params.py nests them, the layers, which are alike, as one.

    A type that differs between layers is given with the number of layers that have it.
    """
    layer = {
        field: entry(*(tensors[f"layers.{i}.{field}"] for i in range(n_layers)))
        for field in Layer._fields
    }
    return {
        "embed_VD": entry(tensors["embed_VD"]),
        "layers": {"count": n_layers, **layer},
        "norm_D": entry(tensors["norm_D"]),
        "head_VD": {"tied": "embed_VD"} if tied else entry(tensors["head_VD"]),
    }


def entry(*alike: Stored) -> dict[str, Any]:
    """What tensors of one shape are: "Q4_K", or "Q4_K (24 x), Q6_K (8 x)"."""
    types = Counter(tensor.type for tensor in alike)
    several = ", ".join(f"{name} ({count} x)" for name, count in types.items())
    return {"shape": list(alike[0].shape), "type": several if len(types) > 1 else alike[0].type}


# ---- for people ------------------------------------------------------------------------------


def tree(facts: dict[str, Any]) -> Any:
    """The structure as a tree, as print(model) shows it in other libraries."""
    from rich.tree import Tree

    parts = facts["structure"]
    root = Tree(f"Params: {facts['parameters']:,} parameters")
    for name, part in parts.items():
        if name != "layers":
            root.add(line(name, part))
            continue
        layers = root.add(f"layers ({part['count']} x)")
        for field in Layer._fields:
            layers.add(line(field, part[field]))
    return root


def line(name: str, part: dict[str, Any]) -> str:
    """One tensor: its name, shape and type."""
    if "tied" in part:
        return f"{name}  is {part['tied']}"
    shape = ", ".join(map(str, part["shape"]))
    return f"{name}  ({shape})  {part['type']}"


def table(facts: dict[str, Any]) -> Any:
    """Names and values, nested ones indented; large numbers with commas."""
    from rich.table import Table

    rows = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts.items():
        nested = value.items() if isinstance(value, dict) else [("", value)]
        for i, (key, item) in enumerate(nested):
            shown = f"{item:,}" if isinstance(item, int) and item > 9999 else str(item)
            rows.add_row(name if i == 0 else "", key, shown)
    return rows

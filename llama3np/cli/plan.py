"""The command `llama3np plan`: what fits into memory, and how fast it can be at best."""

from __future__ import annotations

import argparse
import json
from typing import Any

from llama3np import cost
from llama3np.cli import common
from llama3np.config import Config
from llama3np.errors import InputError

CONTEXTS = (2048, 8192, 32768, 131072)
BATCHES = "1,8,32"
NOTE = (
    "Tokens/s, all rows together, with every row at that context; or (the bytes it would need). "
    "Longest is the context that fits with one row. Memory is weights and cache: activations and "
    "the program come on top. Speed is the roofline, bandwidth / bytes read: an upper bound."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add = parser.add_argument
    add("--memory", required=True, metavar="24GB", help="of each GPU, or of the machine")
    add("--bandwidth", required=True, metavar="50GB/s", help="of that memory")
    add("--gpus", type=int, default=1, metavar="N", help="tensor parallel: each holds 1/N")
    add("--context", metavar="N,N", help="tokens of a row; 2048 and up if not given")
    add("--batch", default=BATCHES, metavar="N,N", help=f"rows at a time; {BATCHES} if not given")
    add("--cache-dtype", default="f32", choices=cost.CACHE_BYTES, help="of keys and values")


def run(args: argparse.Namespace) -> None:
    """Compute, print."""
    plan = make(args, common.model_facts(args.model).config)
    if args.json:
        print(json.dumps(plan))
        return
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    each = "" if plan["gpus"] == 1 else f" on each of {plan['gpus']} GPUs"
    console.print(
        f"{plan['model']}: {plan['parameters']:,} parameters; {common.show_bytes(plan['memory'])} "
        f"and {common.show_bytes(plan['bandwidth'])}/s{each}; cache in {plan['cache_dtype']}"
    )
    console.print()
    console.print(table(plan))
    console.print()
    console.print(NOTE)


def make(args: argparse.Namespace, config: Config) -> dict[str, Any]:
    """The plan, as --json prints it; bytes and memory are those of one GPU."""
    contexts = _contexts(args.context, config)
    batches = _counts(args.batch, "--batch")
    memory = common.parse_bytes(args.memory, "--memory")
    bandwidth = common.parse_bytes(args.bandwidth.removesuffix("/s"), "--bandwidth")
    part = cost.share(config, args.gpus)
    return {
        "model": args.model,
        "parameters": sum(cost.parameters(config).values()),
        "memory": memory,
        "bandwidth": bandwidth,
        "gpus": args.gpus,
        "cache_dtype": args.cache_dtype,
        "formats": {
            name: {
                "weight_bytes": cost.weight_bytes(part, name),
                "longest_context": cost.longest_context(part, name, memory, args.cache_dtype),
                "cases": [
                    case(part, name, context, batch, args.cache_dtype, memory, bandwidth)
                    for context in contexts
                    for batch in batches
                ],
            }
            for name in cost.FORMATS
        },
    }


def case(
    part: Config, name: str, context: int, batch: int, dtype: str, memory: int, bandwidth: int
) -> dict[str, Any]:
    """One cell of the table; a speed only where it fits."""
    size = cost.memory(part, name, context, batch, dtype)
    speed = cost.roofline(part, name, context, batch, dtype, bandwidth)
    return {
        "context": context,
        "batch": batch,
        "bytes": size,
        "fits": size <= memory,
        "tokens_per_s": round(speed, 3) if size <= memory else None,
    }


def _contexts(text: str | None, config: Config) -> list[int]:
    if text is None:
        return [c for c in CONTEXTS if c <= config.context_length] or [config.context_length]
    contexts = _counts(text, "--context")
    if max(contexts) > config.context_length:
        raise InputError(
            f"--context: expected at most {config.context_length} (the model's context), "
            f"found {max(contexts)}"
        )
    return contexts


def _counts(text: str, option: str) -> list[int]:
    counts = common.parse_ids(text, option)
    if min(counts) < 1:
        raise InputError(f"{option}: expected numbers of 1 or more, found {min(counts)}")
    return counts


def table(plan: dict[str, Any]) -> Any:
    """A row for each format and context, a column for each batch."""
    from rich.table import Table

    first = next(iter(plan["formats"].values()))["cases"]
    batches = list(dict.fromkeys(case["batch"] for case in first))
    rows = Table(box=None, pad_edge=False)
    for header in ("weights", "size", "longest", "context", *(f"batch {b}" for b in batches)):
        rows.add_column(header, justify="left" if header == "weights" else "right")
    for name, form in plan["formats"].items():
        about = (name, common.show_bytes(form["weight_bytes"]), f"{form['longest_context']:,}")
        for start in range(0, len(form["cases"]), len(batches)):
            cases = form["cases"][start : start + len(batches)]
            context = f"{cases[0]['context']:,}"
            rows.add_row(*(about if start == 0 else ("", "", "")), context, *map(_cell, cases))
    return rows


def _cell(case: dict[str, Any]) -> str:
    if not case["fits"]:
        return f"({common.show_bytes(case['bytes'])})"
    return f"{case['tokens_per_s']:,.1f}/s"

"""The command `llama3np info`."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections import Counter
from typing import Any

from llama3np.cli import common
from llama3np.llm import Llama
from llama3np.params import named


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    common.load_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Load, describe, print."""
    llm, load_s = common.load_model(args)
    facts = describe(llm, load_s)
    if args.json:
        print(json.dumps(facts))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None, show_header=False, pad_edge=False)
    for name, value in facts.items():
        nested = value.items() if isinstance(value, dict) else [("", value)]
        for i, (key, text) in enumerate(nested):
            shown = f"{text:,}" if isinstance(text, int) and text > 9999 else str(text)
            table.add_row(name if i == 0 else "", key, shown)
    Console(soft_wrap=True, highlight=False).print(table)


def describe(llm: Llama, load_s: float) -> dict[str, Any]:
    """The facts, as --json prints them."""
    from llama3np.chat import chat_format

    sizes: Counter[str] = Counter()
    parameters = 0
    for weight in named(llm.params, llm.config.tied).values():
        sizes[str(weight.dtype)] += weight.nbytes
        count = 1
        for size in weight.shape:
            count *= size
        parameters += count
    tokenizer = llm.tokenizer
    return {
        "layout": llm.layout,
        "config": dataclasses.asdict(llm.config),
        "parameters": parameters,
        "bytes": dict(sizes),
        "max_seq_len": llm.max_seq_len,
        "cache_bytes_per_token": llm.new_cache(1, 1).nbytes,
        "tokenizer": None if tokenizer is None else f"{tokenizer.n_vocab} tokens",
        "chat_format": None if tokenizer is None else chat_format(tokenizer),
        "stop_ids": sorted(llm.stop_ids),
        "load_s": round(load_s, 4),
    }

"""The command `llama3np verify`."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence

from llama3np.cli import common
from llama3np.load.installed import resolve
from llama3np.verify import DIFFERS, Result, status, verify

CONCLUSIONS = (
    "Nothing differs from what is publicly known.",
    "Something differs: these are not the weights, or not the tokenizer, of that model.",
    "Nothing differs, but no value of these weights is publicly known: they are not verified.",
)
HINT = "If they are those of another model with this architecture, such as Instruct, say --as NAME."


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument(
        "--as", dest="known_as", metavar="NAME", help="the published name of these weights"
    )
    common.load_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Load, check fact by fact, print; exit status 1 if one differs, 2 if none is known."""
    llm, _ = common.load_model(args)
    results = []
    for result in verify(llm, resolve(args.model), args.known_as):
        results.append(result)
        if not args.json:
            print(f"{result.outcome:<8} {result.fact:<34} {result.detail}", flush=True)
    if args.json:
        print(json.dumps({"results": [r._asdict() for r in results], "status": status(results)}))
    else:
        print(conclusion(results, args.known_as))
    return status(results)


def conclusion(results: Sequence[Result], known_as: str | None) -> str:
    """What to make of it, in a sentence or two."""
    guessed = known_as is None and any(r.outcome == DIFFERS and r.of_weights for r in results)
    return CONCLUSIONS[status(results)] + (f" {HINT}" if guessed else "")

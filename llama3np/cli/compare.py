"""The command `llama3np compare`."""

from __future__ import annotations

import argparse
import json
from typing import Any

from llama3np.cli import score
from llama3np.crosscheck import budget, files, references, report
from llama3np.crosscheck.compare import Comparison, compare
from llama3np.crosscheck.schemes import read_map
from llama3np.errors import InputError
from llama3np.numerics import PROFILES

TAKES_MODEL = False  # two traces are compared; --model is an option
STATUS = {"agree": 0, "diverge": 1, "incomplete": 2}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("ref", metavar="REF", help="a trace that llama3np made")
    parser.add_argument("cand", metavar="CAND", help="the other implementation's, in any names")
    parser.add_argument(
        "--logits", action="store_true", help="both hold logits over a text: how far apart"
    )
    parser.add_argument("--map", metavar="FILE", help='JSON: {"their.{i}.name": "layers.{i}.q"}')
    parser.add_argument("--partial", action="store_true", help="CAND needs no logits")
    parser.add_argument(
        "--profile", choices=PROFILES, help="judge by its error, not by what CAND seems to be"
    )
    parser.add_argument(
        "--model", metavar="MODEL", help="measure the budget with it, if REF has none"
    )
    parser.add_argument("--plot", metavar="OUT", help="a picture of the error over depth")
    parser.add_argument("--full", action="store_true", help="a row for every tap of every layer")


def run(args: argparse.Namespace) -> int:
    """Compare, print; 0 if they agree, 1 if not, 2 if that cannot be told."""
    if args.logits:
        refuse_options(args)
        far = references.compared(args.ref, args.cand)
        print(json.dumps(report.plain(far)) if args.json else "\n".join(score.lines(far)))
        return 0
    if args.plot:
        report.figure_class()  # before the work
    names = read_map(args.map) if args.map else None
    reference = files.read(args.ref)
    result = compare(
        reference,
        files.read(args.cand),
        names,
        partial=args.partial,
        profile=args.profile,
        budgets=measured(args, reference.meta),
    )
    if args.plot:
        report.plot(result, args.plot)
    show(result, args.json, args.full)
    return STATUS[result.verdict]


def refuse_options(args: argparse.Namespace) -> None:
    """Raise InputError for an option of traces, which predictions over a text have no use for."""
    for name in ("map", "partial", "profile", "model", "plot", "full"):
        if getattr(args, name):
            raise InputError(f"compare: expected --logits without --{name}, which is of traces")


def measured(args: argparse.Namespace, meta: dict[str, Any]) -> Any:
    """The budgets of REF, or those measured with --model; None for the former."""
    if meta.get("budgets") or not args.model:
        return None
    if "ids" not in meta:
        raise InputError(f"{args.ref}: expected a trace of llama3np, found no ids in its metadata")
    profiles = [args.profile] if args.profile else None
    return budget.measure(args.model, meta["ids"], profiles, meta.get("prefill"))


def show(result: Comparison, as_json: bool, full: bool) -> None:
    """Print one JSON object, or the table and what is to be said of it."""
    if as_json:
        print(json.dumps(report.as_json(result)))
        return
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    table = report.table(result, full)
    room = console.options.update(max_width=1000)
    console.width = max(console.width, console.measure(table, options=room).maximum)  # uncut
    console.print(table)
    console.print()
    for line in report.lines(result):
        console.print(line)

"""The command `llama3np bench`: speed, beside the limits of the machine, and beside others."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator
from itertools import zip_longest
from typing import Any

from llama3np import bench, peers
from llama3np.cli import common
from llama3np.errors import InputError
from llama3np.load.installed import resolve

# Options of loading that a process of its own is given as well.
LOADING = ("dtype", "rope_factor", "engine", "threads", "kv_dtype", "prefill_chunk")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add = parser.add_argument
    add("--prompt-tokens", type=int, metavar="N", help=f"{bench.PROMPT_TOKENS} or what fits")
    add("--new-tokens", type=int, metavar="N", help=f"{bench.NEW_TOKENS} or what fits")
    add("--batch", type=int, default=1, metavar="N", help="rows at a time")
    add("--context", type=int, metavar="N", help="tokens before the new ones; as the prompt has")
    add("--rounds", type=int, default=bench.ROUNDS, metavar="N", help="medians are over these")
    add("--profile-ops", action="store_true", help="where the time goes")
    add("--vs", choices=peers.PEERS, help="measure another program too, in alternating processes")
    add("--peer-python", metavar="PATH", help="a Python that has the other program")
    common.load_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Look whether all is there, measure, print."""
    python = args.peer_python or sys.executable
    if args.peer_python and not args.vs:
        raise InputError("--peer-python: expected --vs with it")
    version = ""
    if args.profile_ops and args.device != "cpu":
        raise InputError(f"--profile-ops: expected --device cpu, found {args.device}")
    if args.vs:
        if args.device != "cpu":
            raise InputError(f"--vs: expected --device cpu, found {args.device}")
        if args.batch != 1:
            raise InputError(f"--vs: expected --batch 1, found {args.batch}")
        version = peers.find(args.vs, args.model, python)
    report = measured(args)
    if args.vs:
        report["vs"] = {"version": version, **compared(args, report, python)}
    if args.json:
        print(json.dumps(report))
    else:
        show(report)


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """What --json prints, without another program. The model is let go of at the end."""
    try:
        llm, load_s = common.load_model(args)
        room = llm.config.context_length if args.max_seq_len is None else args.max_seq_len
        plan = bench.plan(
            room, args.prompt_tokens, args.new_tokens, args.batch, args.context, args.rounds
        )
        with progress_bar() as tell:
            report = {"model": args.model, "load_s": load_s, **bench.measure(llm, plan, tell)}
        if args.profile_ops:
            report["profile"] = bench.profile_ops(llm, plan)
    except MemoryError:
        raise InputError(f"{args.model}: does not fit into the memory of this machine") from None
    return report


def compared(args: argparse.Namespace, report: dict[str, Any], python: str) -> dict[str, Any]:
    """Another program beside ours, with the same prompt and as many threads."""
    given = {name: value for name in LOADING if (value := vars(args).get(name)) is not None}
    task = peers.Task(
        str(resolve(args.model)),
        bench.prompt_ids(report["prefill"]["tokens"], report["vocab_size"]),
        report["decode"]["tokens"],
        report["threads"],
    )
    ours = peers.Program(peers.OURS, options={**given, "threads": report["threads"]})
    with progress_bar() as tell:
        return peers.compare(ours, peers.Program(args.vs, python), task, args.rounds, tell)


@contextlib.contextmanager
def progress_bar() -> Iterator[bench.Progress | None]:
    """Yield tell(done, total, what): a bar on a terminal, None into a pipe."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("loading")
        yield lambda done, total, what: bar.update(
            task, completed=done, total=total, description=what
        )


# ---- for people --------------------------------------------------------------------------------


def show(report: dict[str, Any]) -> None:
    """Print the report as tables, and sentences where they tell more."""
    from rich.console import Console

    console = Console(soft_wrap=True, highlight=False, markup=False)
    by = f"{report['threads']} threads" if report["device"] == "cpu" else report["device"]
    where = report["gpu"]["name"] if "gpu" in report else report["processor"]
    console.print(
        f"{report['model']}: engine {report['engine']}, {by}, {report['dtype']}, "
        f"keys and values {report['kv_dtype']}, {where}"
    )
    console.print(speeds(report))
    for line in sentences(report):
        console.print(line)
    if "profile" in report:
        console.print(profile(report["profile"]))
    if "vs" in report:
        console.print(versus(report["vs"]))


def speeds(report: dict[str, Any]) -> Any:
    """Prefill and decode: tokens/s, and the share of the limit measured beside them."""
    rows = _table("", "tokens/s", "range", "limit", "share of it", "range")
    limits = {
        "prefill": f"{report['sgemm_gflop_s']:.0f} GFLOP/s",
        "decode": f"{report['read_limit_gb_s']:.1f} GB/s",
    }
    for kind, limit in limits.items():
        part = report[kind]
        speed, share = f"{part['tokens_per_s']:.1f}", f"{part['share_of_limit']:.2f}"
        speeds = _range(part["tokens_per_s_range"], ".1f")
        shares = _range(part["share_of_limit_range"], ".2f")
        rows.add_row(kind, speed, speeds, limit, share, shares)
    return rows


def sentences(report: dict[str, Any]) -> Iterator[str]:
    """Time to first token, memory, and what may have disturbed."""
    batch = f"{report['batch']} rows of " if report["batch"] > 1 else ""
    yield (
        f"{batch}{report['prefill']['tokens']} tokens of prompt; {report['decode']['tokens']} new "
        f"ones after {report['context']}; medians of {report['rounds']} rounds, beside float32 "
        f"products and reading memory"
    )
    yield (
        f"time to first token {report['time_to_first_token_s']:.3g} s; loaded in "
        f"{report['load_s']:.2g} s, first pass {report['first_pass_s']:.2g} s"
    )
    memory = {name: value for name, value in report["memory"].items() if value is not None}
    if memory:
        yield (
            f"memory of its own at most {common.show_bytes(memory['peak_anon'])}, with mapped "
            f"files {common.show_bytes(memory['peak_resident'])}"
        )
    if (others := report["other_processes_cores"]) is not None:
        yield f"other processes used {100 * others:.0f} % of a core"
    for name in peers.UNSET:
        if name in os.environ:
            yield f"{name}={os.environ[name]} is set, so BLAS did not pick its own kernel"


def profile(parts: dict[str, Any]) -> Any:
    """Milliseconds and shares of the time, largest first."""
    rows = _table("prefill", "ms", "%", "decode step", "ms", "%")
    both = (_largest_first(parts[kind]) for kind in ("prefill", "decode"))
    for left, right in zip_longest(*both, fillvalue=("", "", "")):
        rows.add_row(*left, *right)
    if (share := parts.get("attention_share_of_limit")) is not None:
        rows.caption = f"attention reads keys and values at {share:.2f} of the limit"
    return rows


def _largest_first(seconds: dict[str, float]) -> list[tuple[str, str, str]]:
    whole = sum(seconds.values())
    ordered = sorted(seconds.items(), key=lambda item: -item[1])
    return [(name, f"{1e3 * s:.2f}", f"{100 * s / whole:.0f}") for name, s in ordered]


def versus(found: dict[str, Any]) -> Any:
    """Speeds of both, and the median of the pairs' ratios."""
    name = f"{found['program']} {found['version']}"
    rows = _table("", "llama3np", name, f"ratio of {found['pairs']} pairs", "range")
    for kind in ("prefill", "decode"):
        part = found[kind]
        speeds = (f"{part[key]:.1f}" for key in ("our_tokens_per_s", "their_tokens_per_s"))
        rows.add_row(kind, *speeds, f"{part['ratio']:.2f}", _range(part["ratio_range"], ".2f"))
    same, of = found["agreeing_ids"]
    rows.caption = f"the first {same} of {of} new ids are the same"
    return rows


def _table(*headers: str) -> Any:
    from rich.table import Table

    rows = Table(box=None, pad_edge=False, caption_justify="left")
    for i, header in enumerate(headers):
        rows.add_column(header, justify="right" if i else "left")
    return rows


def _range(values: list[float], form: str) -> str:
    low, high = values
    return f"{low:{form}}-{high:{form}}"

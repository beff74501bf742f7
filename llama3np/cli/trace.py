"""The command `llama3np trace`."""

from __future__ import annotations

import argparse
import json
import re
import sys
from typing import Any

from llama3np.cli import common
from llama3np.crosscheck import budget, hashes, output, trace
from llama3np.errors import InputError
from llama3np.llm import Llama, as_count, load
from llama3np.load.installed import resolve
from llama3np.numerics import PROFILES


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add = parser.add_argument
    common.prompt_arguments(parser)
    add(
        *("-o", "--out"), required=True, metavar="OUT",
        help="what to write: .safetensors, .npz, or a directory of raw numbers",
    )  # fmt: skip
    add("--layers", metavar="0,3-5", help="those only; embed, norm and logits stay")
    add("--positions", metavar="0-7,20", help="those only; they see all keys")
    add("--taps", metavar="q,k_rope,logits", help="those only")
    add("--prefill", type=int, metavar="N", help="ids in the first call; the rest one at a time")
    add(
        "--decode", type=int, default=0, metavar="M",
        help="trace M greedy tokens after the prompt too, fed one at a time",
    )  # fmt: skip
    add("--budgets", metavar="float32,...", help="measure the error of these profiles")
    add("--no-budgets", action="store_true", help="measure none")
    common.compute_arguments(parser)
    add(
        *("--profile", "--dtype"), dest="dtype", default="float32", choices=PROFILES,
        help="precision profile; float64 is the oracle",
    )  # fmt: skip
    parser.set_defaults(max_seq_len=None, prefill_chunk=None)


def run(args: argparse.Namespace) -> None:
    """Say how large it will be, measure budgets, run, write."""
    output.form(args.out)  # before a large model is loaded
    profiles = profiles_of(args)
    llm, _ = common.load_model(args)
    prompt_ids = common.prompt_ids(args, llm)
    n_tokens = len(prompt_ids) + as_count("decode", args.decode, 0)
    if args.decode and n_tokens > llm.max_seq_len:
        raise InputError(
            f"--decode: expected {llm.max_seq_len} ids at most (max_seq_len), found "
            f"{len(prompt_ids)} of the prompt and {args.decode} more"
        )
    common.note_beyond(llm, n_tokens)
    first = first_call(args, len(prompt_ids))
    chosen: dict[str, Any] = {
        "layers": numbers(args.layers, "--layers"),
        "positions": numbers(args.positions, "--positions"),
        "taps": words(args.taps),
    }
    plan = trace.planned(llm.config, n_tokens, **chosen, dtype=trace.dtype_of(llm))
    tell_size(args.out, plan)
    ids = [*prompt_ids, *decoded(llm, prompt_ids, args.decode)]
    facts = {
        "model": args.model,
        "files": file_hashes(args.model),
        "budgets": budgets(args, llm, ids, first, profiles),
    }
    meta = trace.write(args.out, llm, ids, first, **chosen, facts=facts)
    report(args, plan, meta)


# ---- options -------------------------------------------------------------------------------------


def first_call(args: argparse.Namespace, n_prompt: int) -> int:
    """How many ids go through the model at once: all of the prompt's, if nothing else is said."""
    if args.prefill is None:
        return n_prompt
    if not 1 <= args.prefill <= n_prompt:
        raise InputError(f"--prefill: expected 1 to {n_prompt} ids, found {args.prefill}")
    return args.prefill


def numbers(text: str | None, option: str) -> list[int] | None:
    """Whole numbers from "0,3-5"; None for all. Raises InputError naming what is none."""
    if text is None:
        return None
    found: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d{1,9})(?:-(\d{1,9}))?", part.strip(), re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if last < first:
            raise InputError(f"{option}: expected numbers such as 0,3-5, found {part!r}")
        found += range(first, last + 1)
    return found


def words(text: str | None) -> list[str] | None:
    """Names from "q, k_rope"; None for all."""
    return None if text is None else [part.strip() for part in text.split(",")]


def profiles_of(args: argparse.Namespace) -> list[str] | None:
    """The profiles whose error is measured; None for those that are affordable."""
    if args.no_budgets and args.budgets is not None:
        raise InputError("trace: expected one of --budgets and --no-budgets")
    if args.no_budgets:
        return []
    wanted = words(args.budgets)
    return None if wanted is None else budget.checked(wanted)


# ---- steps ---------------------------------------------------------------------------------------


def tell_size(out: str, plan: trace.Plan) -> None:
    """Say it before anything is written. Raises InputError if the disk has not the room."""
    size = output.room_for(out, plan.specs)
    count = f"{len(plan.specs)} tap{'s' if len(plan.specs) > 1 else ''}"
    print(
        f"{out}: {count} at {len(plan.positions)} of {plan.S} positions, {common.show_bytes(size)}",
        file=sys.stderr,
    )


def decoded(llm: Llama, prompt_ids: list[int], count: int) -> list[int]:
    """So many greedy tokens after the prompt, stop tokens as any other."""
    return llm.generate(prompt_ids, count, stop_ids=())[0].ids if count else []


def file_hashes(model: str) -> dict[str, str]:
    """Which weights these are."""
    with common.progress_bar("hashing") as progress:
        return hashes.sha256(resolve(model), progress)


def budgets(
    args: argparse.Namespace, llm: Llama, ids: list[int], first: int, profiles: list[str] | None
) -> budget.Budgets:
    """The measured errors, on the CPU and with weights as the files have them."""
    if profiles == []:
        return {}
    source = llm
    if not budget.usable(llm):
        source = load(resolve(args.model), rope_factor=args.rope_factor, threads=args.threads)
    wanted = budget.affordable(source) if profiles is None else profiles
    print(f"measuring {', '.join(wanted)} against float64 (--no-budgets: not)", file=sys.stderr)
    with common.progress_bar("measuring", of_bytes=False) as progress:
        return budget.measure(source, ids, wanted, first, progress)


def report(args: argparse.Namespace, plan: trace.Plan, meta: dict[str, Any]) -> None:
    """What was written."""
    if args.json:
        facts = {key: meta[key] for key in ("ids", "positions", "prefill", "profile", "files")}
        sizes = {"out": args.out, "taps": len(plan.specs), "bytes": plan.nbytes}
        print(json.dumps({**sizes, **facts, "budgets": list(meta["budgets"])}))
    else:
        print(f"written: {args.out}")

"""The command `llama3np diagnose`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable

from llama3np.cli import common
from llama3np.crosscheck import diagnosis, files, schemes
from llama3np.crosscheck.diagnose import diagnose
from llama3np.crosscheck.mutations import table
from llama3np.errors import InputError
from llama3np.llm import Llama
from llama3np.numerics import PROFILES

MODEL_IS_OPTIONAL = True  # of --list


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add = parser.add_argument
    add("candidate", nargs="?", metavar="CAND", help="its trace: .safetensors, .npz or a directory")
    common.prompt_arguments(parser)
    add("--prefill", type=int, metavar="N", help="ids in the first call, the others one at a time")
    add("--map", metavar="NAMES.json", help="its names of taps, {its name: ours}")
    add("--profile", choices=PROFILES, help="judge by its error, not by what CAND seems to be")
    add("--list", action="store_true", help="print every mistake that is looked for")
    common.load_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """List, or load, diagnose and print; 0 if nothing is wrong, 1 if something is."""
    if args.list:
        print(listed(args.json))
        return 0
    if args.model is None or args.candidate is None:
        raise InputError("diagnose: expected MODEL and CAND, or --list")
    if args.device != "cpu" or args.dtype != "float32":
        raise InputError("diagnose: runs the model in float32 on the cpu, whatever CAND is of")
    trace = files.read(args.candidate)
    names = None if args.map is None else schemes.read_map(args.map)
    llm, _ = common.load_model(args)
    ids = ids_of(args, llm)
    found = diagnose(llm, trace, ids, args.prefill, names, watching(), args.profile)
    if args.json:
        print(json.dumps(diagnosis.described(found)))
    else:
        print("\n".join(diagnosis.lines(found)))
    return 0 if found.status == "agrees" else 1


def ids_of(args: argparse.Namespace, llm: Llama) -> list[int] | None:
    """The ids of the prompt; None where only the candidate's metadata can tell."""
    if args.prompt is None and args.prompt_ids is None:
        return None
    return common.prompt_ids(args, llm)


def listed(as_json: bool) -> str:
    """Every mutation's id and sentence."""
    sentences = {id: mutation.sentence for id, mutation in table().items()}
    if as_json:
        return json.dumps(sentences)
    width = max(map(len, sentences))
    return "\n".join(f"{id:<{width}}  {sentence}" for id, sentence in sentences.items())


def watching() -> Callable[[str], None] | None:
    """Says on a terminal which mutation is being tried."""
    if not sys.stderr.isatty():
        return None
    return lambda id: print(f"\r\033[K{id}", end="\r", file=sys.stderr, flush=True)

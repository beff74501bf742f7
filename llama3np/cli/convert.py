"""The command `llama3np convert`."""

from __future__ import annotations

import argparse
import json
import sys

from llama3np.cli import common
from llama3np.errors import InputError
from llama3np.load.convert import CHOICES, TARGETS, convert
from llama3np.load.installed import resolve


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("out", metavar="OUT", help="what to write: a directory, or a .gguf file")
    parser.add_argument("--to", choices=TARGETS, help="gguf if OUT ends in .gguf, else hf")
    parser.add_argument(
        "--dtype", choices=CHOICES, help="of the weights; as they are if not given (blocks of "
        "GGUF become f32 in other formats); q8_0 is for GGUF",
    )  # fmt: skip
    parser.add_argument("--shard-size", metavar="5GB", help="the most bytes of a safetensors file")
    parser.add_argument("--mp", type=int, metavar="M", help="the number of Meta's shards")
    parser.add_argument(
        "--adapter", metavar="DIR", help="low-rank adapters to merge, in the layout of PEFT"
    )
    common.rope_argument(parser)


def run(args: argparse.Namespace) -> int:
    """Convert; say on stderr what is left out."""
    size = args.shard_size
    if args.adapter == "":  # which would be the current folder
        raise InputError("--adapter: expected a directory, found an empty name")
    with common.progress_bar("writing") as progress:
        notes = convert(
            resolve(args.model),
            args.out,
            args.to,
            args.dtype,
            None if size is None else common.parse_bytes(size, "--shard-size"),
            args.mp,
            progress,
            args.rope_factor,
            args.adapter,
        )
    if args.json:
        print(json.dumps({"out": args.out, "left_out": notes}))
        return 0
    for note in notes:
        print(f"llama3np: {note}", file=sys.stderr)
    print(f"written: {args.out}")
    return 0

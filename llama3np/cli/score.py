"""The command `llama3np score`."""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from llama3np.cli import common
from llama3np.crosscheck import logits, references
from llama3np.errors import InputError
from llama3np.llm import Llama


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add = parser.add_argument
    common.prompt_arguments(parser)
    add("--file", metavar="PATH", help="a text file in place of PROMPT")
    add(
        "--window",
        type=int,
        metavar="N",
        help="token ids at a time, each on its own: as "
        "many as the model's context and --max-seq-len allow",
    )
    add("--top", type=int, default=logits.TOP, metavar="K", help="logits kept of each position: 64")
    add("-o", "--out", metavar="OUT.npz", help="keep them, as a reference for other models")
    add("--against", metavar="REF.npz", help="say how far from this reference")
    common.load_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Score a text; keep what it takes to compare others with, or compare."""
    if args.top < logits.FIVE:
        raise InputError(f"--top: expected {logits.FIVE} or more, found {args.top}")
    if args.out is not None:
        references.check_new(args.out)
    reference = None if args.against is None else reference_of(args.against)
    llm, _ = common.load_model(args)
    ids = ids_of(args, llm)
    parts = logits.windows(llm, ids, args.window)
    if sum(map(len, parts)) < len(ids):
        said = "the last id is left out: alone in its window, nothing predicts it"
        print(f"score: {said}", file=sys.stderr)
    common.note_beyond(llm, max(map(len, parts)))
    kept, apart = logits.score(llm, parts, args.top, reference)
    result: dict[str, Any] = {"tokens": len(kept.nll_R), **logits.perplexity(kept.nll_R)}
    if apart is not None:
        result |= logits.figures(apart)
    if args.out is not None:
        meta = {"model": args.model, "profile": llm.profile.name, "layout": llm.layout}
        references.save(args.out, kept, meta)
    print(json.dumps(result) if args.json else "\n".join(lines(result)))


def ids_of(args: argparse.Namespace, llm: Llama) -> list[int]:
    """The text's ids: of PROMPT, of a file, or as they were given."""
    if args.file is None:
        return common.prompt_ids(args, llm)
    if args.prompt is not None or args.prompt_ids is not None:
        raise InputError("score: expected one of PROMPT, --file and --prompt-ids")
    try:
        return llm.encode(Path(args.file).read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"--file: {args.file}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise InputError(f"--file: {args.file}: expected UTF-8 ({error})") from None


def reference_of(path: str) -> logits.Kept:
    """A compact reference, or one of all logits."""
    found = references.read(path)
    return found if isinstance(found, logits.Kept) else logits.kept(*found)


def lines(result: dict[str, Any]) -> list[str]:
    """The figures, for people."""
    told = [f"{'tokens scored':<22} {result['tokens']}"]
    for name in ("reference", "candidate"):
        if name in result:
            told.append(f"{'perplexity, ' + name:<22} {shown(result[name])}")
    if "perplexity" in result:
        told.append(f"{'perplexity':<22} {shown(result)}")
    if "kl_mean" in result:
        told += [
            f"{'KL divergence, mean':<22} {result['kl_mean']:.3g} +- "
            f"{result['kl_standard_error']:.2g} nats",
            f"{'99th percentile':<22} {result['kl_p99']:.3g}",
            f"{'largest':<22} {result['kl_max']:.3g}, at prediction {result['kl_max_at']}",
            f"{'top-1 agreement':<22} {result['top1_agreement']:.2%}",
            f"{'top-5 agreement':<22} {result['top5_agreement']:.2%}",
        ]
    return told


def shown(found: dict[str, float]) -> str:
    """A perplexity with its standard error, if there is one."""
    error = found["standard_error"]
    return f"{found['perplexity']:.4f}" + ("" if np.isnan(error) else f" +- {error:.4f}")

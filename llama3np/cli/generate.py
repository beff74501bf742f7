"""The command `llama3np generate`."""

from __future__ import annotations

import argparse
import os
import shlex
import sys

from llama3np.cli import common
from llama3np.errors import InputError
from llama3np.llm import Llama
from llama3np.load.installed import EMBEDDED, MODELS, installed, is_embedded, means_model

MODEL_IS_OPTIONAL = True
NOTES = (
    f"Without MODEL the model that comes with this package speaks, {EMBEDDED}, a small one that "
    "writes plays letter by letter; without PROMPT as well it begins with a line break. One word "
    "that is neither a model nor looks like a path is its PROMPT. As greedy text of so small a "
    "model goes round in circles, it samples as its files recommend (temperature 0.8) where no "
    "--temperature is given; --seed repeats a text."
)


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    common.prompt_arguments(parser)
    parser.add_argument("--chat", action="store_true", help="PROMPT is a message to answer")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: the system message")
    common.chat_arguments(parser)
    common.sampling_arguments(parser)
    common.load_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Load, continue, print."""
    choose_model(args)
    if (args.prompt is None) == (args.prompt_ids is None):
        raise InputError(f"generate: expected either PROMPT or --prompt-ids{one_word(args)}")
    for name in ("system", "chat_format"):
        if getattr(args, name) is not None and not args.chat:
            raise InputError(f"generate: --{name.replace('_', '-')} needs --chat")
    if args.chat and args.prompt_ids is not None:
        raise InputError("generate: --chat needs PROMPT, found --prompt-ids")
    llm, load_s = common.load_model(args)
    prompt_ids = ids_of(args, llm)
    timed = common.Timed(llm.stream(prompt_ids, **common.sampling_options(args, llm)))
    common.show(timed, prompt_ids, load_s, args.json, llm.tokenizer is not None)


def one_word(args: argparse.Namespace) -> str:
    """What became of the only word of a command line without a prompt, and how to make it one."""
    if args.prompt is not None or not args.named:
        return ""
    word = args.model
    there = word in MODELS or os.path.exists(word)  # noqa: PTH110 - no text raises there
    return (
        f": {word!r} is taken as MODEL{'' if there else ', and nothing is there'} "
        f"(as a PROMPT: generate {EMBEDDED} {shlex.quote(word)})"
    )


def choose_model(args: argparse.Namespace) -> None:
    """Let the embedded model speak where none is named, with a prompt and a way to sample."""
    word = args.model
    if word is not None and args.prompt is args.prompt_ids is None and not means_model(word):
        args.model, args.prompt = None, word  # the only word
    args.named = args.model is not None
    if args.named and not is_embedded(args.model):
        return
    if not args.named:
        args.model = str(installed(EMBEDDED))  # a path here of that name was not asked for
        if sys.stderr.isatty():
            print(f"[{EMBEDDED}, the model that comes with llama3np]", file=sys.stderr)
    if args.prompt is args.prompt_ids is None and not args.chat:
        args.prompt = "\n"
    if args.temperature is None:
        args.temperature = common.DEFAULT


def ids_of(args: argparse.Namespace, llm: Llama) -> list[int]:
    """The prompt as token ids, from whichever form it was given in."""
    if not args.chat:
        return common.prompt_ids(args, llm)
    text = common.text_of(args.prompt)
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return llm.chat_ids([*system, {"role": "user", "content": text}], args.chat_format)

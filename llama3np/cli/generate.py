"""The command `llama3np generate`."""

from __future__ import annotations

import argparse

from llama3np.cli import common
from llama3np.errors import InputError
from llama3np.llm import Llama


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
    if (args.prompt is None) == (args.prompt_ids is None):
        raise InputError("generate: expected either PROMPT or --prompt-ids")
    for name in ("system", "chat_format"):
        if getattr(args, name) is not None and not args.chat:
            raise InputError(f"generate: --{name.replace('_', '-')} needs --chat")
    if args.chat and args.prompt_ids is not None:
        raise InputError("generate: --chat needs PROMPT, found --prompt-ids")
    llm, load_s = common.load_model(args)
    prompt_ids = ids_of(args, llm)
    timed = common.Timed(llm.stream(prompt_ids, **common.sampling_options(args, llm)))
    common.show(timed, prompt_ids, load_s, args.json, llm.tokenizer is not None)


def ids_of(args: argparse.Namespace, llm: Llama) -> list[int]:
    """The prompt as token ids, from whichever form it was given in."""
    if not args.chat:
        return common.prompt_ids(args, llm)
    text = common.text_of(args.prompt)
    system = [] if args.system is None else [{"role": "system", "content": args.system}]
    return llm.chat_ids([*system, {"role": "user", "content": text}], args.chat_format)

"""The command `llama3np chat`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator

from llama3np.cli import common
from llama3np.conversation import Conversation
from llama3np.errors import InputError


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    parser.add_argument("--system", metavar="TEXT", help="the system message")
    common.chat_arguments(parser)
    common.sampling_arguments(parser)
    common.load_arguments(parser)


def run(args: argparse.Namespace) -> None:
    """Load, then answer line by line."""
    llm, load_s = common.load_model(args)
    options = common.sampling_options(args, llm)
    conversation = Conversation(llm, args.system, args.chat_format)
    for line in messages():
        try:
            steps = conversation.reply(line, **options)
        except InputError as error:  # a message too long, say: the dialog goes on without it
            print(f"llama3np: {error}", file=sys.stderr)
            continue
        common.show(common.Timed(steps), conversation.prompt_ids, load_s, args.json)


def messages() -> Iterator[str]:
    """What the user says, line by line; a person sees a prompt, a pipe does not."""
    watched = sys.stdin.isatty() and sys.stdout.isatty()
    while True:
        try:
            line = input("> " if watched else "").strip()
        except EOFError:
            return
        if line == "/exit":
            return
        if line:
            yield line

"""The command `llama3np`: one file for each sub-command, all of them thin."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from llama3np import __version__
from llama3np.errors import InputError

INTERRUPTED = 130  # 128 + SIGINT, as shells count


COMMANDS = {
    "generate": "continue a prompt; the text streams as it is made",
    "chat": "talk with a model: a line is a message; Ctrl-D or /exit ends",
    "info": "say what a checkpoint or preset is: structure, parameters, bytes, tokenizer",
    "plan": "say what fits into memory, and how fast it can be at best",
    "bench": "measure speed, beside the limits of this machine and other programs",
    "trace": "write every intermediate result of a run, to check another implementation with",
    "compare": "find the first operation in which another implementation's trace goes wrong",
    "diagnose": "say which mistake explains another implementation's trace",
    "score": "perplexity of a text, and how far from another model's predictions",
    "train": "train a new model on texts, or fine-tune one; Ctrl-C, then --resume goes on",
    "convert": "write a checkpoint in another format: Hugging Face, Meta, GGUF",
    "verify": "compare a checkpoint with what is publicly known of its model",
    "selftest": "check this installation on this processor or GPU, and write a report",
}


class Parser(argparse.ArgumentParser):
    """An argument parser whose errors are told as all others are: one sentence, status 2."""

    def error(self, message: str) -> NoReturn:
        """Raise InputError."""
        raise InputError(f"{message} (see {self.prog} --help)")


def parse(argv: Sequence[str]) -> argparse.Namespace:
    """The command line as a namespace, with the command's `run` in it."""
    if not argv or argv[0] not in COMMANDS:
        lines = "\n".join(f"  {name:<10} {summary}" for name, summary in COMMANDS.items())
        top = Parser(
            prog="llama3np",
            description="Llama 3 in plain array operations",
            epilog=f"commands:\n{lines}\n\nllama3np COMMAND --help tells the rest.",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        top.add_argument("command", metavar="COMMAND", choices=COMMANDS)
        top.add_argument("--version", action="version", version=f"llama3np {__version__}")
        return top.parse_args(argv[:1])
    module = importlib.import_module(f"llama3np.cli.{argv[0]}")
    notes = getattr(module, "NOTES", None)
    command = Parser(prog=f"llama3np {argv[0]}", description=COMMANDS[argv[0]], epilog=notes)
    if getattr(module, "TAKES_MODEL", True):
        from llama3np.load.installed import MODELS  # not for --version, which needs no format

        model = command.add_argument(
            "model", metavar="MODEL", help=f"a path, or an installed model: {', '.join(MODELS)}"
        )
        if getattr(module, "MODEL_IS_OPTIONAL", False):
            model.nargs, model.required = "?", False
    command.add_argument("--json", action="store_true", help="print one JSON object")
    command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    module.arguments(command)
    command.set_defaults(run=module.run)
    # Intermixed: an optional PROMPT may stand after an option, as in generate MODEL --chat PROMPT.
    return command.parse_intermixed_args(argv[1:])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; return its exit status: 0, 2 for a user's mistake, 130, or 1."""
    open_streams()
    argv = sys.argv[1:] if argv is None else argv
    try:
        with ended_by_signals():
            args = parse(argv)
            return args.run(args) or 0
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader has left, `| head` for example
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except Exception as error:
        if "--debug" in argv:
            traceback.print_exc()
        else:
            print(f"llama3np: {describe(error)}", file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """Let a closed terminal or a kill end the command as Ctrl-C does: unfinished files go.

    A signal that is ignored, as nohup has it, stays ignored. Handlers are as before once the block
    is left, for programs that call `main` themselves.
    """

    def end(number: int, _: Any) -> NoReturn:
        raise SystemExit(128 + number)

    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP") if hasattr(signal, name)]
    if threading.current_thread() is not threading.main_thread():
        numbers = []  # only that thread can
    numbers = [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]
    before = [(number, signal.signal(number, end)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in before:
            # None: it was set by other code than Python's, which cannot put it back
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


def open_streams() -> None:
    """UTF-8 both ways whatever the console's encoding, and a place to write where one is closed.

    Bytes that are not UTF-8 come in as lone surrogates, which the tokenizer refuses by name.
    """
    for name, errors in (
        ("stdin", "surrogateescape"),
        ("stdout", "replace"),
        ("stderr", "replace"),
    ):
        stream = getattr(sys, name)
        if stream is None:
            mode = "r" if name == "stdin" else "w"
            setattr(sys, name, Path(os.devnull).open(mode, encoding="utf-8"))  # noqa: SIM115
        elif hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors=errors)


def describe(error: Exception) -> str:
    """An error in one line."""
    text = " ".join(str(error).split())
    if isinstance(error, InputError):
        return text
    return f"{type(error).__name__}: {text} (--debug shows where)"

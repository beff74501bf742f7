"""The command `llama3np train`."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from llama3np.backend import CPU, parse_device, use
from llama3np.errors import InputError
from llama3np.kernels.engine import checked_threads
from llama3np.threads import available_cores
from llama3np.train import checkpoint, durable
from llama3np.train.loop import Result, train
from llama3np.train.progress import tell
from llama3np.train.settings import PRESETS
from llama3np.train.start import LESS_MEMORY, Order, begin, text_digest

TAKES_MODEL = False

# Options that replace a setting: option -> the setting, its type and what it is.
SETTINGS: dict[str, tuple[str, Any, str]] = {
    "--max-steps": ("steps", int, "steps in all; the schedule of the learning rate ends there"),
    "--seed": ("seed", int, "of the first weights and the order of the data: 0"),
    "--lora": ("lora", int, "rank of low-rank adapters of --init, in place of all its weights"),
    "--learning-rate": ("learning_rate", float, "at its peak"),
    "--rows": ("rows", int, "windows of text in a batch"),
    "--accumulate": ("accumulate", int, "batches that make a step: 1"),
    "--context": ("context", int, "tokens of a window"),
    "--eval-every": ("eval_every", int, "steps between validations"),
    "--checkpoint-every": ("checkpoint_every", int, "steps between checkpoints"),
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add = parser.add_argument
    add("--text", nargs="+", metavar="FILE", help="plain text, or .jsonl files of dialogs")
    add("--out", required=True, metavar="DIR", help="the model, its metrics and checkpoints")
    add("--preset", choices=PRESETS, help="a new model: its sizes and settings; tiny")
    add("--tokenizer", metavar="char|bpe:N|FILE", help="of a new model; char")
    add("--init", metavar="MODEL", help="go on from these weights (fine-tuning)")
    add("--resume", action="store_true", help="go on with the training in DIR, to the same end")
    for option, (name, kind, what) in SETTINGS.items():
        metavar = "X" if kind is float else "N"
        add(option, dest=name, type=kind, metavar=metavar, help=what)
    add("--recompute", action="store_true", default=None, help="less memory, a third more work")
    add("--device", default=str(CPU), metavar="cpu|cuda[:N]", help="where to compute: cpu")
    add("--threads", type=int, metavar="N", help="the physical cores if not given")


def run(args: argparse.Namespace) -> int:
    """Begin or go on; say how it ended, and how to go on if it was stopped."""
    out, device = Path(args.out), parse_device(args.device)
    threads = checked_threads(args.threads) or available_cores()
    use(device)  # before anything is made
    order = order_of(args)
    if args.resume:
        refuse_absent(out)
        refuse_other(out, order)
    else:
        new(out, order)
    result = train(out, device, threads)
    show(out, result, args.json)
    return 0 if result.signal is None else 128 + result.signal


def order_of(args: argparse.Namespace) -> Order:
    """What the command line asks for. Raises InputError for options that exclude each other."""
    if args.init is not None and (args.preset is not None or args.tokenizer is not None):
        given = "--preset" if args.preset is not None else "--tokenizer"
        raise InputError(f"{given}: is for new models; --init {args.init} has its own")
    if args.init is not None and args.resume:
        raise InputError("--init: begins a training; --resume goes on with one")
    names = [name for name, _, _ in SETTINGS.values()] + ["recompute"]
    settings = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    text = [Path(file) for file in args.text or ()]
    return Order(text, args.preset, args.tokenizer, args.init, settings)


def new(out: Path, order: Order) -> None:
    """Begin, and tell what OUT cannot hold. Raises InputError as `begin` does, or out of memory."""
    try:
        notes = begin(out, order)
    except MemoryError:
        raise InputError(f"{out}: memory is too small to begin; {LESS_MEMORY}") from None
    for note in notes:
        tell(f"llama3np: {note}")


def refuse_absent(out: Path) -> None:
    """Raise InputError if there is no training in OUT."""
    with durable.told(out):
        if not (out / checkpoint.FILE).exists():
            raise InputError(
                f"--resume: {out}: expected a training, found none ({checkpoint.FILE}); "
                "without --resume one begins"
            )


def refuse_other(out: Path, order: Order) -> None:
    """Raise InputError, naming the option, if the training in OUT was begun otherwise."""
    stored = checkpoint.load_run(out / checkpoint.FILE)
    options = {name: option for option, (name, _, _) in SETTINGS.items()}
    pairs = {
        options.get(name, f"--{name}"): (getattr(stored.settings, name), value)
        for name, value in order.given.items()
    }
    pairs["--preset"] = (stored.origin.get("preset"), order.preset)
    pairs["--tokenizer"] = (stored.origin.get("tokenizer"), order.tokenizer)
    pairs["--text"] = (stored.origin["text"], text_digest(order.text) or None)
    for option, (was, value) in pairs.items():
        if value is not None and value != was:
            new = option in ("--preset", "--tokenizer")  # which --init has none of
            other = "a new --out" if new else f"--init {out}"
            what = "other files" if option == "--text" else f"{was}, not with {value}"
            raise InputError(
                f"{option}: the training in {out} began with {what}; --resume goes on as it began, "
                f"to the last bit: leave {option} out, or begin another with {other}"
            )


def show(out: Path, result: Result, as_json: bool) -> None:
    """The figures of a training, and how to go on."""
    if as_json:
        print(json.dumps({"out": str(out), **result._asdict()}))
    elif result.signal is None:
        print(f"written: {out} (validation loss {result.best_val_loss:.4f})")
    if result.signal is not None:
        tell(
            f"llama3np: stopped at step {result.steps}; to go on: "
            f"llama3np train --out {out} --resume"
        )

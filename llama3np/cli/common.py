"""What the commands share: options, loading with a progress bar, and timing."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator
from typing import Any

from llama3np.cache import KV_DTYPES
from llama3np.chat import FORMATS
from llama3np.cost import tensor_bytes
from llama3np.errors import InputError
from llama3np.generate import CHUNK
from llama3np.kernels.engine import CUDA_ENGINES, ENGINES
from llama3np.llm import Llama, Step, load
from llama3np.load import Inspection, Stored, inspect
from llama3np.load.installed import MODELS, resolve
from llama3np.numerics import PROFILES
from llama3np.params import named_shapes
from llama3np.presets import PRESETS

DEFAULT = "default"  # as --temperature: the sampling that the model's files recommend


def load_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of loading."""
    compute_arguments(parser)
    parser.add_argument(
        "--dtype", default="float32", choices=PROFILES, help="precision profile (docs/numerics.md)"
    )
    parser.add_argument("--max-seq-len", type=int, metavar="N", help="prompt + new tokens at most")
    parser.add_argument(
        "--prefill-chunk", type=int, metavar="N", help=f"prompt tokens at a time: {CHUNK}"
    )


def compute_arguments(parser: argparse.ArgumentParser) -> None:
    """Where and by what it is computed."""
    parser.add_argument(
        "--device", default="cpu", metavar="cpu|cuda[:N]", help="where to compute: cpu if not given"
    )
    parser.add_argument(
        "--engine",
        choices=(*ENGINES, *CUDA_ENGINES),
        help="numba where it is installed; on cuda: cuda, or cupy for the plain operations",
    )
    parser.add_argument("--threads", type=int, metavar="N", help="the physical cores if not given")
    parser.add_argument("--kv-dtype", choices=KV_DTYPES, help="of keys and values: the profile's")
    rope_argument(parser)


def rope_argument(parser: argparse.ArgumentParser) -> None:
    """What the files of a Meta directory do not tell."""
    parser.add_argument(
        "--rope-factor",
        type=float,
        metavar="F",
        help="RoPE scaling of a Meta directory with use_scaled_rope, which tells no factor",
    )


def prompt_arguments(parser: argparse.ArgumentParser) -> None:
    """A text, or token ids."""
    parser.add_argument(
        "prompt", nargs="?", metavar="PROMPT", help="a text; - reads standard input"
    )
    parser.add_argument("--prompt-ids", metavar="1,2,3", help="token ids in place of PROMPT")


def prompt_ids(args: argparse.Namespace, llm: Llama) -> list[int]:
    """The ids of what prompt_arguments took. Raises InputError for both, or neither."""
    if (args.prompt is None) == (args.prompt_ids is None):
        raise InputError("expected either PROMPT or --prompt-ids")
    if args.prompt_ids is not None:
        return llm.encode(parse_ids(args.prompt_ids))
    return llm.encode(text_of(args.prompt))


def text_of(prompt: str) -> str:
    """PROMPT, or what is on standard input without its last line break."""
    return sys.stdin.read().removesuffix("\n") if prompt == "-" else prompt


def sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of generation."""
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="256 or what fits")
    parser.add_argument(
        "--temperature",
        type=temperature,
        metavar="T",
        help='0 (greedy) if not given; "default": what the model\'s files recommend',
    )
    parser.add_argument("--top-p", type=float, metavar="P")
    parser.add_argument("--top-k", type=int, metavar="K")
    parser.add_argument("--seed", type=int, metavar="S")
    parser.add_argument("--logprobs", action="store_true", help="with --json")


def temperature(text: str) -> float | str:
    """A number, or the word "default"."""
    return text if text == DEFAULT else float(text)


def sampling_options(args: argparse.Namespace, llm: Llama) -> dict[str, Any]:
    """The options of Llama.stream that the command line gave; a given one wins over the files'."""
    given = {name: getattr(args, name) for name in ("temperature", "top_p", "top_k", "seed")}
    given = {name: value for name, value in given.items() if value is not None}
    if given.get("temperature") == DEFAULT:
        del given["temperature"]
        given = llm.sampling._asdict() | given
    return {"max_new_tokens": args.max_new_tokens, "logprobs": args.logprobs, **given}


def chat_arguments(parser: argparse.ArgumentParser) -> None:
    """The dialog format, for models whose files do not tell it."""
    parser.add_argument("--chat-format", choices=FORMATS, help="in place of the model's own")


def model_facts(model: str, rope_factor: float | None = None) -> Inspection:
    """What MODEL is, weights unread: a path, an installed model, or a preset, which has no files.

    A path that exists wins over a preset's name. Raises InputError if it is none of them.
    """
    path = resolve(model)
    if path.exists() or os.sep in model:
        return inspect(path, rope_factor)
    if model not in PRESETS:
        known = ", ".join(PRESETS)
        raise InputError(f"{model}: expected a path, {', '.join(MODELS)}, or one of {known}")
    config = PRESETS[model]
    tensors = {
        name: Stored(shape, "bfloat16", tensor_bytes(shape, "bf16"))
        for name, shape in named_shapes(config).items()
    }
    return Inspection(config, f"preset {model}, no files", tensors)


def load_model(args: argparse.Namespace) -> tuple[Llama, float]:
    """Load MODEL, with a bar if a person is watching; return it and the seconds it took.

    For a CUDA device the plan of its memory is printed first, to stderr.
    """
    start = time.perf_counter()
    with progress_bar() as progress, plan_printed(args.device):
        llm = load(
            args.model,
            device=args.device,
            dtype=args.dtype,
            max_seq_len=args.max_seq_len,
            progress=progress,
            rope_factor=args.rope_factor,
            engine=args.engine,
            threads=args.threads,
            kv_dtype=args.kv_dtype,
            prefill_chunk=args.prefill_chunk,
        )
    return llm, time.perf_counter() - start


def note_beyond(llm: Llama, n_positions: int) -> None:
    """Say on stderr that positions are computed for which the model is not made."""
    if n_positions > (context := llm.config.context_length):
        print(f"{n_positions} positions, of a model whose context is {context}", file=sys.stderr)


@contextlib.contextmanager
def plan_printed(device: str) -> Iterator[None]:
    """Print to stderr what the package says while the block runs, if the device is not the CPU."""
    logger, handler = logging.getLogger("llama3np"), logging.StreamHandler(sys.stderr)
    if device == "cpu":
        yield
        return
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


@contextlib.contextmanager
def progress_bar(doing: str = "loading", of_bytes: bool = True) -> Iterator[Any]:
    """Yield progress(done, total, name): a bar on a terminal, None into a pipe."""
    if not sys.stderr.isatty():
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, MofNCompleteColumn, Progress, TextColumn

    amount = DownloadColumn() if of_bytes else MofNCompleteColumn()
    columns = (TextColumn(doing), BarColumn(), amount, TextColumn("{task.fields[n]}"))
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", n="")
        yield lambda done, total, name: bar.update(task, completed=done, total=total, n=name)


class Timed:
    """Steps as they come, with the clock: the first step ends prefill, the others are decode."""

    def __init__(self, steps: Iterable[Step]):
        self._steps = steps
        self.steps: list[Step] = []
        self.prefill_s = self.decode_s = 0.0

    def __iter__(self) -> Iterator[Step]:
        start = time.perf_counter()
        for step in self._steps:
            self.steps.append(step)
            elapsed = time.perf_counter() - start
            if len(self.steps) == 1:
                self.prefill_s = elapsed
            self.decode_s = elapsed - self.prefill_s
            yield step

    def result(self, prompt_ids: list[int], load_s: float) -> dict[str, Any]:
        """What --json prints. finish_reason is "interrupted" if the last step did not come."""
        last = self.steps[-1].finish_reason if self.steps else "length"
        logprobs = [step.logprob for step in self.steps if step.logprob is not None]
        return {
            "prompt_ids": prompt_ids,
            "ids": [step.id for step in self.steps],
            "text": "".join(step.text for step in self.steps),
            "finish_reason": last or "interrupted",
            **({"logprobs": logprobs} if logprobs else {}),
            "timings": {
                "load_s": round(load_s, 4),
                "prefill_s": round(self.prefill_s, 4),
                "prefill_tokens": len(prompt_ids),
                "decode_s": round(self.decode_s, 4),
                "decode_tokens": max(len(self.steps) - 1, 0),
            },
        }


def show(
    timed: Timed, prompt_ids: list[int], load_s: float, as_json: bool, has_text: bool = True
) -> None:
    """Print the text as it comes, or one JSON object at the end; Ctrl-C keeps what there is.

    A model without a tokenizer has no text: its token ids are printed instead.
    """
    try:
        for step in timed:
            if not as_json:
                print(step.text if has_text else f"{step.id} ", end="", flush=True)
    finally:
        result = timed.result(prompt_ids, load_s)
        print(json.dumps(result) if as_json else "", flush=True)
        if not as_json and sys.stderr.isatty():
            print(summary(result["timings"]), file=sys.stderr)


def summary(timings: dict[str, Any]) -> str:
    """One line on how long it took."""
    text = f"[loaded in {timings['load_s']:.2f} s; {timings['prefill_tokens']} prompt tokens in "
    text += f"{timings['prefill_s']:.2f} s"
    if timings["decode_s"] > 0:
        text += f"; {timings['decode_tokens'] / timings['decode_s']:.1f} tokens/s"
    return text + "]"


def parse_ids(text: str, option: str = "--prompt-ids") -> list[int]:
    """Whole numbers from "1,2,3"; raises InputError naming what is not one."""
    ids = []
    for part in text.split(","):
        try:
            ids.append(int(part))
        except ValueError:
            raise InputError(f"{option}: expected numbers such as 1,2,3, found {part!r}") from None
    return ids


_SIZE = re.compile(r"(\d{1,15}(?:\.\d{1,9})?)\s*(?:([kmgtp])(i?))?b?", re.IGNORECASE | re.ASCII)


def parse_bytes(text: str, option: str) -> int:
    """Bytes from "24GB", "24GiB", "16G", "512MB" or a plain number of them.

    G and GB are 10^9, GiB is 2^30; capitals do not matter. Raises InputError for anything else.
    """
    match = _SIZE.fullmatch(text.strip())
    number, unit, binary = match.groups() if match else ("0", None, None)
    power = "kmgtp".index(unit.lower()) + 1 if unit else 0
    size = int(float(number) * (1024 if binary else 1000) ** power)
    if size < 1:
        raise InputError(f"{option}: expected a size such as 24GB, 24GiB or 512M, found {text!r}")
    return size


def show_bytes(size: float) -> str:
    """Bytes for people, with three digits: 16.1 GB."""
    for unit in ("bytes", "kB", "MB", "GB"):
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} TB" if size < 999.5 else f"{size:,.0f} TB"

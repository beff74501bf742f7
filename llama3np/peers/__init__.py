"""The same work by llama3np and by another program, in processes that take turns.

Each pair of processes gives one ratio, and the median of the ratios is the result: the speed of
memory drifts within minutes, so two medians of separate runs say little about each other. What a
process does is child.py, which any Python can run that has the other program.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

from llama3np.errors import InputError
from llama3np.load.installed import resolve

CHILD = Path(__file__).with_name("child.py")
OURS = "llama3np"
REPEATS = 3  # of the work in one process; their median counts

# A setting of the user's that picks BLAS kernels would measure the setting.
UNSET = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")


class Peer(NamedTuple):
    """Another program that can be measured."""

    module: str  # what it is imported as
    package: str  # what to install
    form: str  # of the models it opens
    opens: Callable[[Path], bool]


def _is_gguf(path: Path) -> bool:
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(4) == b"GGUF"


def _is_hf(path: Path) -> bool:
    return (path / "config.json").is_file()


PEERS = {
    "llama.cpp": Peer("llama_cpp", "llama-cpp-python", "a GGUF file", _is_gguf),
    "transformers": Peer(
        "transformers", "transformers and torch", "a Hugging Face directory", _is_hf
    ),
}


def find(name: str, model: str, python: str = sys.executable) -> str:
    """The version of a peer. Raises InputError if it is not there, or cannot open the model."""
    peer, path = PEERS[name], resolve(model)
    if not peer.opens(path):
        raise InputError(f"--vs {name}: expected {peer.form}, found {path}")
    return version(name, python)


def version(name: str, python: str = sys.executable) -> str:
    """The version of a peer. Raises InputError if that Python does not have it."""
    peer = PEERS[name]
    code = f"import {peer.module} as peer; print(peer.__version__)"
    try:
        found = _run([python, "-c", code], "", _environment(python))
    except OSError as error:
        raise InputError(f"--peer-python: cannot run {python}: {error.strerror}") from None
    if found.returncode:
        raise InputError(
            f"--vs {name}: {python} has no {peer.module}: install {peer.package}, or name with "
            f"--peer-python a Python that has it"
        )
    return found.stdout.split()[-1]


# ---- one process -------------------------------------------------------------------------------


class Program(NamedTuple):
    """How to start a process that reads a task and prints its times; see child.py."""

    name: str
    python: str = sys.executable
    script: Path = CHILD
    options: dict[str, Any] = {}  # noqa: RUF012  read only: the program's own part of the task


class Task(NamedTuple):
    """What a process is to do."""

    model: str
    prompt_ids: list[int]
    new_tokens: int
    threads: int
    repeats: int = REPEATS


class Times(NamedTuple):
    """What a process found: seconds of each repetition, and the first ids, to see them agree."""

    prefill_s: list[float]
    decode_s: list[float]
    ids: list[int]


def measure(program: Program, task: Task) -> Times:
    """Run a process to its end. Raises InputError, with its last words, if it fails."""
    order = json.dumps({**task._asdict(), "program": program.name, "options": program.options})
    command = [program.python, str(program.script)]
    done = _run(command, order, _environment(program.python, task.threads))
    if done.returncode:
        words = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        raise InputError(f"{program.name} failed with {task.model}: {words[-1]}")
    return Times(**json.loads(done.stdout.splitlines()[-1]))


def _run(command: list[str], stdin: str, environment: dict[str, str]) -> Any:
    """subprocess.run kills the child if this process is ended while it waits."""
    return subprocess.run(
        command, input=stdin, env=environment, capture_output=True, text=True, check=False
    )


def _environment(python: str, threads: int | None = None) -> dict[str, str]:
    """This process's own, without what would pick kernels; another Python gets no path of ours."""
    environment = {key: value for key, value in os.environ.items() if key not in UNSET}
    inherited = environment.pop("PYTHONPATH", "")
    if python == sys.executable:  # the very package that runs here, wherever it was found
        here = str(Path(__file__).parents[2])
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, (here, inherited)))
    if threads is not None:
        environment |= {name: str(threads) for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS")}
    return environment


# ---- pairs -------------------------------------------------------------------------------------


def compare(
    ours: Program,
    theirs: Program,
    task: Task,
    pairs: int,
    tell: Callable[[int, int, str], None] | None = None,
) -> dict[str, Any]:
    """Times of both in turn, `pairs` of each, as --json prints them.

    In `prefill` and `decode`: ratio, the median of ours / theirs over the pairs, > 1 if ours is
    faster; its range and samples; and the median speeds. agreeing_ids: how many of the first
    pair's new ids are the same from the beginning on, and of how many.
    """
    measured: list[tuple[Times, Times]] = []
    for i in range(pairs):
        if tell:
            tell(i, pairs, f"pair {i + 1} of {pairs}")
        measured.append((measure(ours, task), measure(theirs, task)))
    return {
        "program": theirs.name,
        "pairs": pairs,
        "threads": task.threads,
        "prefill": ratios(len(task.prompt_ids), [(o.prefill_s, t.prefill_s) for o, t in measured]),
        "decode": ratios(task.new_tokens, [(o.decode_s, t.decode_s) for o, t in measured]),
        "agreeing_ids": [agreeing(*(times.ids for times in measured[0])), task.new_tokens + 1],
    }


def agreeing(a: Sequence[int], b: Sequence[int]) -> int:
    """How many ids are the same from the beginning on."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(a, b, strict=True)))


def ratios(tokens: int, pairs: Sequence[tuple[list[float], list[float]]]) -> dict[str, Any]:
    """Speeds of both and how they compare, from the seconds of each repetition in each pair."""
    seconds = [(median(ours), median(theirs)) for ours, theirs in pairs]
    samples = [theirs / ours for ours, theirs in seconds]
    return {
        "tokens": tokens,
        "ratio": median(samples),
        "ratio_range": [min(samples), max(samples)],
        "samples": samples,
        "our_tokens_per_s": median(tokens / ours for ours, _ in seconds),
        "their_tokens_per_s": median(tokens / theirs for _, theirs in seconds),
    }

"""The table of bars: what this program reaches, beside the machine's limits and other programs.

    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE python tools/bench_peers.py FOLDER

Makes the models it needs in FOLDER, if they are not there: 5 GB of Llama 3.2 1B's shape in four
formats, 16 GB of 8B's, and stories15M's. All have made-up weights. Each row is one comparison:
with the limits that `llama3np bench` measures in the same rounds, or with another program in
alternating processes; medians, and their range. Everything takes about an hour of an idle machine.

--only KEY measures one row (again and again for several), --list names them. --quick takes fewer
rounds and tokens, and leaves 8B out. llama.cpp is looked for in --peer-python (llama-cpp-python),
likejazz/llama3.np in --likejazz, a copy of its repository. A row whose peer is missing says so.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import bench_attention
import bench_start
import made_up
import make_checkpoint
import numpy as np
import peer_likejazz as likejazz

import llama3np
from llama3np import bench, machine, peers
from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.load import names
from llama3np.params import named
from llama3np.presets import PRESETS
from llama3np.threads import Pool, available_cores

COMMAND = (sys.executable, "-c", "import sys; from llama3np.cli import main; sys.exit(main())")
STORIES = Config(288, 6, 6, 6, 48, 768, 32000, context_length=256)  # llama2.c's stories15M

# ---- what is found -----------------------------------------------------------------------------


class Found(NamedTuple):
    """Samples of one thing, and what they are held against: at least a bar, or at most."""

    samples: Sequence[float]
    bar: float
    aim: float
    what: str = ""  # where a row has several
    form: str = "{:.2f}"
    most: bool = False

    @property
    def verdict(self) -> str:
        """The best that the median reaches."""
        middle = median(self.samples)
        for word, limit in (("aim", self.aim), ("bar", self.bar)):
            if (middle <= limit) if self.most else (middle >= limit):
                return word
        return "missed"

    def __str__(self) -> str:
        numbers = (median(self.samples), min(self.samples), max(self.samples))
        middle, low, high = map(self.form.format, numbers)
        return f"{self.what} {middle} ({low} to {high})".strip()


class Bench:
    """The models in a folder, and how to measure with them."""

    def __init__(self, folder: Path, args: argparse.Namespace):
        self.folder, self.likejazz = folder, args.likejazz
        self.peer_python, self.threads = args.peer_python, args.threads
        self.rounds = args.rounds or (3 if args.quick else bench.ROUNDS)
        self.repeats = 1 if args.quick else peers.REPEATS
        self.new_tokens = 16 if args.quick else bench.NEW_TOKENS

    # ---- models ------------------------------------------------------------------------------

    def one_b(self, dtype: str) -> Path:
        """Llama 3.2 1B's shape as GGUF."""
        return self.made(f"1b-{dtype}.gguf", PRESETS["llama3.2-1b"], "gguf", dtype)

    def stories(self, dtype: str = "f32") -> Path:
        """stories15M's shape. Its numbers are those of bfloat16, so both files have the same."""
        return self.made(f"stories15m-{dtype}.gguf", STORIES, "gguf", dtype)

    def made(self, name: str, config: Config, layout: str, dtype: str) -> Path:
        """A model of made-up weights, made if it is not there."""
        path = self.folder / name
        if not path.exists():
            print(f"making {path}", file=sys.stderr)
            self.folder.mkdir(parents=True, exist_ok=True)
            make_checkpoint.write(config, layout, path, dtype=dtype)
        return path

    def stories_npz(self) -> Path:
        """The weights of `stories` as likejazz/llama3.np has them: q and k rows are Meta's."""
        path = self.folder / "stories15m.npz"
        if not path.exists():
            params = made_up.params(replace(STORIES, rope_pairing="interleaved"), "f32")
            tensors = named(params, STORIES.tied)
            np.savez(
                path, **{names.foreign(n, "huggingface"): np.asarray(w) for n, w in tensors.items()}
            )
        return path

    # ---- runs --------------------------------------------------------------------------------

    @cache  # noqa: B019  one Bench a process; two rows may come of one run
    def run(self, path: Path, *options: str) -> dict[str, Any]:
        """What `llama3np bench --json` says, in a process of its own."""
        sizes = (
            "--rounds",
            self.rounds,
            "--new-tokens",
            self.new_tokens,
            "--threads",
            self.threads,
        )
        command = (*COMMAND, "bench", path, "--json", *sizes, *options)
        done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, check=False)
        if done.returncode:
            raise InputError(f"llama3np bench ended with {done.returncode}")
        return json.loads(done.stdout)

    def shares(self, kind: str, path: Path, *options: str) -> list[float]:
        """Of prefill or decode, the share of the limit in each round."""
        return self.run(path, *options)[kind]["share_samples"]

    @cache  # noqa: B019
    def against(
        self,
        program: str,
        path: Path,
        prompt: int,
        new: int,
        engine: str,
        dtype: str = "float32",
        ours_in: Path | None = None,
    ) -> dict[str, Any]:
        """Pairs of ours and another program, of llama3np.peers or likejazz.

        ours_in: a file of the same numbers that ours opens in place of `path`.
        """
        options = {"engine": engine, "threads": self.threads, "dtype": dtype}
        options |= {"path": str(ours_in)} if ours_in else {}
        ours = peers.Program(peers.OURS, options=options)
        vocab_size = (
            STORIES.vocab_size if "stories" in path.name else make_checkpoint.LLAMA3_VOCABULARY
        )
        ids = bench.prompt_ids(prompt, vocab_size)
        task = peers.Task(str(path), ids, new, self.threads, self.repeats)
        found = peers.compare(ours, self.program(program, path), task, self.rounds)
        same, of = found["agreeing_ids"]
        print(f"{program} with {path.name}: {same} of {of} ids are the same", file=sys.stderr)
        return found

    def program(self, name: str, path: Path) -> peers.Program:
        """How to start another program. Raises InputError if it is not there."""
        if name == likejazz.NAME:
            if self.likejazz is None or not (self.likejazz / "llama3.py").is_file():
                raise InputError("--likejazz: expected a copy of likejazz/llama3.np")
            files = {"folder": str(self.likejazz), "weights": str(self.stories_npz())}
            return peers.Program(name, script=Path(likejazz.__file__), options=files)
        peers.find(name, str(path), self.peer_python)
        return peers.Program(name, self.peer_python)

    def decode_ratios(self, dtype: str) -> list[float]:
        """Decoding of 1B in one format, ours to llama.cpp's."""
        path = self.one_b(dtype)
        found = self.against("llama.cpp", path, bench.PROMPT_TOKENS, self.new_tokens, "numba")
        return found["decode"]["samples"]

    def story_ratios(self, program: str, engine: str, dtype: str = "f32") -> list[float]:
        """Decoding of stories15M: 200 tokens after 8; the other program has it in float32."""
        ours = self.stories(dtype)
        found = self.against(program, self.stories(), 8, 200, engine, ours_in=ours)
        return found["decode"]["samples"]


# ---- the rows ----------------------------------------------------------------------------------


def decode_bf16(b: Bench) -> list[Found]:
    return [Found(b.shares("decode", b.one_b("bf16"), "--engine", "numba"), 0.85, 0.95)]


def decode_bf16_llama_cpp(b: Bench) -> list[Found]:
    return [Found(b.decode_ratios("bf16"), 1.0, 1.1)]


def decode_q8_llama_cpp(b: Bench) -> list[Found]:
    return [Found(b.decode_ratios("q8_0"), 1.0, 1.25)]


def decode_q4_llama_cpp(b: Bench) -> list[Found]:
    return [Found(b.decode_ratios(d), 0.9, 1.1, d.upper()) for d in ("q4_0", "q4_k_m")]


def decode_8b(b: Bench) -> list[Found]:
    path = b.made("8b", PRESETS["llama3-8b"], "hf", "bf16")
    return [Found(b.shares("decode", path, "--engine", "numba"), 0.80, 0.92)]


def decode_numpy(b: Bench) -> list[Found]:
    return [Found(b.shares("decode", b.one_b("bf16"), "--engine", "numpy"), 0.35, 0.5)]


def prefill_f32(b: Bench) -> list[Found]:
    return [Found(b.shares("prefill", b.one_b("bf16"), "--engine", "numba"), 0.90, 0.97)]


def prefill_bf16_mm(b: Bench) -> list[Found]:
    path, tokens = b.one_b("bf16"), bench.PROMPT_TOKENS
    found = b.against("llama.cpp", path, tokens, 1, "numba", "bf16-mm")
    return [Found(found["prefill"]["samples"], 1.0, 1.6)]


def attention_prefill(b: Bench) -> list[Found]:
    """One layer of 8B; materialised scores are timed on one group of heads, and multiplied."""
    layer = bench_attention.Bench(8192, b.threads, b.rounds)
    *_, blocks = bench_attention.variants(Pool(b.threads), layer.tokens).values()  # compiled ones
    gigabytes, _ = layer.extra_memory(blocks)
    ratios = []
    for _ in range(b.rounds):
        group_s = layer.seconds(bench_attention.materialised, *layer.arrays)
        ratios.append(bench_attention.K * group_s / layer.seconds(blocks, *layer.arrays))
    return [
        Found(ratios, 12, 20, "speed", "{:.1f}x"),
        Found([gigabytes], 0.15, 0.15, "memory", "{:.2f} GB", most=True),
    ]


def attention_decode(b: Bench) -> list[Found]:
    options = ("--engine", "numba", "--context", "8192", "--profile-ops", "--prompt-tokens", "64")
    found = b.run(b.one_b("bf16"), *options)
    return [Found(found["profile"]["attention_share_samples"], 0.6, 0.85)]


def stories_likejazz(b: Bench) -> list[Found]:
    return [
        Found(b.story_ratios(likejazz.NAME, engine), bar, aim, what, "{:.1f}x")
        for engine, bar, aim, what in (("numpy", 9, 15, "NumPy"), ("numba", 25, 40, "numba"))
    ] + [Found(b.story_ratios(likejazz.NAME, "numba", "bf16"), 25, 40, "numba on bf16", "{:.1f}x")]


def stories_llama_cpp(b: Bench) -> list[Found]:
    return [
        Found(b.story_ratios("llama.cpp", "numba", dtype), 2, 3, what, "{:.2f}x")
        for dtype, what in (("f32", "on f32"), ("bf16", "on bf16"))
    ]


def batches(b: Bench) -> list[Found]:
    """Both in one process, in turns."""
    llm = llama3np.load(b.one_b("bf16"), engine="numba", threads=b.threads)
    sizes = (1, 8)
    plans = [bench.plan(llm.max_seq_len, 64, b.new_tokens, size, rounds=b.rounds) for size in sizes]
    works = [bench.Work(llm, plan) for plan in plans]
    for work in works:
        work.first_pass()
    rounds = [
        [machine.seconds(lambda work=work: work.decode(b.new_tokens)) for work in works]
        for _ in range(b.rounds)
    ]
    return [Found([8 * one / eight for one, eight in rounds], 5, 7, form="{:.2f}x")]


def start(b: Bench) -> list[Found]:
    times = [bench_start.first_token("smollm2", "Gravity is", 1)[0] for _ in range(b.rounds + 1)]
    return [Found(times[1:], 1.5, 0.8, form="{:.2f} s", most=True)]  # the first may compile


class Row(NamedTuple):
    """One line of the table."""

    work: str
    bar: str
    aim: str
    measure: Callable[[Bench], list[Found]]


ROWS = {
    "decode": Row("decode 1B bf16 / read limit, numba", "0.85", "0.95", decode_bf16),
    "decode-bf16": Row(
        "decode 1B bf16 / llama.cpp BF16 (median of 7 alternating pairs)",
        *("1.0", "1.1", decode_bf16_llama_cpp),
    ),
    "decode-q8": Row("decode 1B Q8_0 / llama.cpp Q8_0", "1.0", "1.25", decode_q8_llama_cpp),
    "decode-q4": Row("decode 1B Q4_0 and Q4_K_M / llama.cpp", "0.9", "1.1", decode_q4_llama_cpp),
    "decode-8b": Row("decode 8B bf16 mapped / read limit", "0.80", "0.92", decode_8b),
    "decode-numpy": Row("decode 1B bf16, NumPy only / read limit", "0.35", "0.5", decode_numpy),
    "prefill": Row("prefill 512, 1B, float32 / SGEMM rate", "0.90", "0.97", prefill_f32),
    "prefill-bf16-mm": Row(
        "prefill 512, 1B, `bf16-mm` / llama.cpp BF16", "1.0", "1.6", prefill_bf16_mm
    ),
    "attention": Row(
        "attention, 8192-token prefill: speed / memory against materialised scores",
        *("12x, under 0.15 GB", "20x", attention_prefill),
    ),
    "attention-decode": Row(
        "decode at 8192 tokens of context: attention's reading of K and V / read limit",
        *("0.6", "0.85", attention_decode),
    ),
    "stories-likejazz": Row(
        "stories15M shape / likejazz/llama3.np called with right positions: NumPy only, numba",
        *("9x, 25x", "15x, 40x", stories_likejazz),
    ),
    "stories-llama-cpp": Row(
        "stories15M shape / llama.cpp F32, numba", "2x", "3x", stories_llama_cpp
    ),
    "batch": Row("batch 8 decode / batch 1, 1B bf16", "5x", "7x", batches),
    "start": Row("start to first token, SmolLM2, numba, warm cache", "1.5 s", "0.8 s", start),
}


# ---- the table ---------------------------------------------------------------------------------


def line(row: Row, b: Bench) -> str:
    """A row in Markdown; one that cannot be measured says why."""
    try:
        found = row.measure(b)
        cells = ("; ".join(map(str, found)), "; ".join(one.verdict for one in found))
    except InputError as error:
        cells = (f"not measured: {error}", "-")
    return f"| {' | '.join((row.work, row.bar, row.aim, *cells))} |"


def about(b: Bench) -> str:
    """The machine and the versions, in a sentence."""
    versions = machine.versions()
    with contextlib.suppress(InputError):
        versions["llama-cpp-python"] = peers.version("llama.cpp", b.peer_python)
    named_versions = ", ".join(f"{name} {version}" for name, version in versions.items())
    return f"{machine.processor()}, {b.threads} threads; {named_versions}. Medians (and range)."


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("folder", type=Path, nargs="?", metavar="FOLDER", help="where the models are made")
    add("--only", action="append", choices=ROWS, metavar="KEY", help="this row; may be repeated")
    add("--list", action="store_true", help="the keys of the rows")
    add("--quick", action="store_true", help="fewer rounds and tokens, and no 8B")
    add("--rounds", type=int, metavar="N", help="and pairs of processes: 7, or 3 with --quick")
    add("--threads", type=int, default=available_cores(), metavar="N")
    add("--peer-python", default=sys.executable, metavar="PATH", help="a Python with llama_cpp")
    add("--likejazz", type=Path, metavar="DIR", help="a copy of likejazz/llama3.np")
    args = parser.parse_args()
    if args.list:
        print("\n".join(f"{key:<18} {row.work}" for key, row in ROWS.items()))
        return
    if args.folder is None:
        parser.error("expected FOLDER")
    for name in peers.UNSET:
        os.environ.pop(name, None)  # of the processes to come; this one's BLAS is not measured
    b = Bench(args.folder, args)
    print("| work | bar | aim | measured | verdict |\n|---|---|---|---|---|")
    for key in args.only or [key for key in ROWS if not (args.quick and key == "decode-8b")]:
        print(line(ROWS[key], b), flush=True)
    print(f"\n{about(b)}")


if __name__ == "__main__":
    main()

"""Llama 3 8B at full size, 16.06 GB of made-up bfloat16 weights: how fast it opens, what it holds.

    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE python tools/bench_8b.py FOLDER [hf] [meta]

Makes FOLDER/hf (four safetensors files) and FOLDER/meta (one consolidated.00.pth) with
make_checkpoint.py if they are not there: 16.1 GB of disk each. Each is measured in a process of its
own, after its files were read once, and the table is printed in Markdown.

Open to ready is llama3np.load, tokenizer included; the import before it is not. RssAnon is memory
that only this process has, VmRSS less what is mapped from files; its peak is looked up every 20 ms.
Page cache is what of the files is mapped and resident (RssFile). Decoding is greedy. The speeds
mean something on an idle machine only: with a second process on its cores, BLAS threads wait for
one another at every chunk of weights, and decoding was seen to take ten times as long.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import make_checkpoint

import llama3np
from llama3np.machine import Peak, resident
from llama3np.presets import PRESETS

PRESET = "llama3-8b"
PROMPT_TOKENS, NEW_TOKENS, MAX_SEQ_LEN = 512, 32, 2048
ROWS = {  # key -> what it is called, its format, and the bar
    "open_s": ("open to ready", "{:.2f} s", "< 2 s"),
    "ready_anon": ("RssAnon at ready", "{:.2f} GB", "< 1.0 GB"),
    "peak_anon": ("RssAnon, peak through prefill and decode", "{:.2f} GB", "< 2.5 GB"),
    "file": ("resident pages of the files", "{:.2f} GB", ""),
    "prefill": (f"prefill, {PROMPT_TOKENS} tokens", "{:.1f} tokens/s", ""),
    "decode": (f"decode, {NEW_TOKENS} tokens", "{:.2f} tokens/s", ""),
}


def warm(folder: Path) -> None:
    """Read every file once, so that the page cache has what fits of it."""
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            with file.open("rb", buffering=0) as opened:
                while opened.read(1 << 24):
                    pass


def gigabytes(nbytes: int | None) -> float:
    """In units of 10^9."""
    return (nbytes or 0) / 1e9


def measure(path: str) -> dict[str, float]:
    """All rows of one checkpoint, in this process."""
    if resident("RssAnon") is None:
        raise SystemExit("/proc/self/status has no RssAnon: this benchmark needs Linux")
    start = time.perf_counter()
    llm = llama3np.load(path, max_seq_len=MAX_SEQ_LEN)
    figures = {"open_s": time.perf_counter() - start, "ready_anon": gigabytes(resident("RssAnon"))}
    prompt = [1 + 7 * i % 127_000 for i in range(PROMPT_TOKENS)]
    llm.generate([prompt[:16]], 2, stop_ids=())  # kernels are compiled, once for a machine
    cache = llm.new_cache()
    times = [time.perf_counter()]
    with Peak() as peak:
        for _ in llm.stream(prompt, NEW_TOKENS + 1, cache=cache, stop_ids=()):
            times.append(time.perf_counter())
    figures |= {"peak_anon": gigabytes(peak.nbytes), "file": gigabytes(resident("RssFile"))}
    figures["prefill"] = PROMPT_TOKENS / (times[1] - times[0])
    figures["decode"] = NEW_TOKENS / (times[-1] - times[1])
    return figures


def in_a_process(path: Path) -> dict[str, float]:
    command = [sys.executable, __file__, "--measure", str(path)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def table(figures: dict[str, dict[str, Any]]) -> str:
    lines = [f"| | {' | '.join(figures)} | bar |", "|---" * (len(figures) + 2) + "|"]
    for key, (name, form, bar) in ROWS.items():
        cells = [form.format(column[key]) for column in figures.values()]
        lines.append(f"| {name} | {' | '.join(cells)} | {bar} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("layouts", nargs="*", help="hf and meta (the default), or one of them")
    parser.add_argument("--measure", metavar="PATH", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure(args.measure)))
        return
    wrong = set(args.layouts) - {"hf", "meta"}
    if args.folder is None or wrong:
        parser.error(f"expected FOLDER and layouts of hf and meta, found {sorted(wrong)}")
    figures, (load, *_) = {}, os.getloadavg()
    for layout in args.layouts or ("hf", "meta"):
        path = args.folder / layout
        if not path.exists():
            print(f"making {path}", file=sys.stderr)
            args.folder.mkdir(parents=True, exist_ok=True)
            make_checkpoint.write(PRESETS[PRESET], layout, path)
        warm(path)
        figures[layout] = in_a_process(path)
    print(table(figures))
    python = sys.version.split()[0]
    print(f"\n{os.cpu_count()} cores, Python {python}, load average {load:.1f} at the beginning")


if __name__ == "__main__":
    main()

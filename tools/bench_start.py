"""What it costs to begin: import, first token, peak memory, each in processes of its own.

    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE python tools/bench_start.py [MODEL]

Medians. The import is what `import llama3np` takes beyond `import numpy`, alternating the two. The
first token is timed from the start of the process to the first byte of text on its output.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time

COMMAND = (sys.executable, "-c", "import sys; from llama3np.cli import main; sys.exit(main())")


def import_seconds(module: str) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True)
    return time.perf_counter() - start


def first_token(model: str, prompt: str, new_tokens: int) -> tuple[float, float, float]:
    """Seconds to the first byte, seconds in all, and the peak resident memory in MB."""
    start = time.perf_counter()
    command = [*COMMAND, "generate", model, prompt, "--max-new-tokens", str(new_tokens)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    assert process.stdout is not None
    process.stdout.read(1)
    first = time.perf_counter() - start
    process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)  # this child's own peak, not the largest of all
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"generate failed with exit status {process.returncode}")
    scale = 1e6 if sys.platform == "darwin" else 1e6 / 1024  # macOS counts bytes, Linux KiB
    return first, time.perf_counter() - start, usage.ru_maxrss / scale


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--prompt", default="Gravity is")
    parser.add_argument("--max-new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()

    pairs = [(import_seconds("llama3np"), import_seconds("numpy")) for _ in range(args.rounds)]
    runs = [first_token(args.model, args.prompt, args.max_new_tokens) for _ in range(args.rounds)]
    beyond = statistics.median(ours - numpy for ours, numpy in pairs)
    first, whole, peak = (statistics.median(column) for column in zip(*runs, strict=True))
    print(f"import llama3np beyond numpy   {beyond:6.3f} s   (bar: under 0.25)")
    print(f"first token of {args.model:<15} {first:6.2f} s   (bar: under 3)")
    print(f"{args.max_new_tokens} tokens in all {'':14} {whole:6.2f} s")
    print(f"peak resident memory           {peak:6.0f} MB  (bar: under 1000)")


if __name__ == "__main__":
    main()

"""Training beside PyTorch: speed, memory, and whether both compute the same losses.

    PYTHONPATH=tools python tools/bench_train.py --peer PEERS/python        PEERS has torch

The same made-up model, batches, AdamW and clipping, in processes that take turns; the first step
is left out. Memory is the peak of the process less what it had after its imports (Linux). PyTorch
holds the activations of the whole batch, ours those of the parts of 512 tokens at work. Fails if
losses are apart by more than 1e-4. --profile tells where our time goes, on one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from llama3np import model
from llama3np.config import Config
from llama3np.params import named
from llama3np.peers import UNSET
from llama3np.threads import single_threaded_blas
from llama3np.train import gradients, parts
from llama3np.train.backward import loss_and_gradients
from llama3np.train.flat import Flat
from llama3np.train.optimizer import AdamW, clip
from llama3np.train.parts import Batch, BatchGradient
from llama3np.train.settings import PRESETS, initial


def status_bytes(key: str) -> int:
    """Of /proc/self/status: VmRSS, the memory in use, or VmHWM, its peak since the start."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


BASE = status_bytes("VmRSS")  # after the imports
APART = 1e-4  # of losses, at most
VOCABULARY = 257
TORCH = Path(__file__).with_name("peer_torch_train.py")


# ---- the work ------------------------------------------------------------------------------------


def prepare(folder: Path, preset: str, args: argparse.Namespace) -> None:
    """Write what both programs read: sizes and settings, first weights, batches."""
    settings = PRESETS[preset].settings
    config = PRESETS[preset].config(VOCABULARY, settings.context)
    rng = np.random.default_rng(0)
    shape = (args.steps + 1, settings.rows, settings.context + 1)
    tensors = named(initial(config, 0), config.tied)
    adam = {name: getattr(settings, name) for name in AdamW._fields}
    task = {"config": asdict(config), "context": settings.context, "threads": args.threads}
    task |= {"adam": adam, "clip": settings.clip, "rate": settings.learning_rate}
    task |= {"attention": args.attention}
    (folder / "task.json").write_text(json.dumps(task))
    weights = {f"w.{name}": w for name, w in tensors.items()}
    np.savez(folder / "arrays.npz", windows=rng.integers(0, 65, shape), **weights)


def opened(folder: Path) -> tuple[dict[str, Any], Config, Flat, np.ndarray]:
    task = json.loads((folder / "task.json").read_text())
    arrays = np.load(folder / "arrays.npz")
    tensors = {name[2:]: arrays[name] for name in arrays.files if name.startswith("w.")}
    return task, Config(**task["config"]), Flat.of(tensors), arrays["windows"]


def batch_of(window_BT: np.ndarray) -> Batch:
    ids_BT, targets_BT = window_BT[:, :-1], window_BT[:, 1:]
    return Batch(ids_BT, targets_BT, np.full(ids_BT.shape, 1 / ids_BT.size, np.float32))


def child(folder: Path) -> None:
    """Our half: print losses, seconds of each step and memory."""
    task, config, params, windows_SBT = opened(folder)
    gradient, adam = BatchGradient(config, task["threads"]), AdamW(**task["adam"])
    first, second = params.like(), params.like()
    losses, seconds = [], []
    for t, window_BT in enumerate(windows_SBT, 1):
        start = time.perf_counter()
        loss, grad = gradient(params, batch_of(window_BT))
        clip(grad, task["clip"])
        adam.update(params, grad, first, second, task["rate"], t)
        seconds.append(time.perf_counter() - start)
        losses.append(loss)
    peak = status_bytes("VmHWM")
    print(json.dumps({"losses": losses, "seconds": seconds, "base": BASE, "peak": peak}))


def run(python: str, *command: str) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name not in UNSET}
    done = subprocess.run(
        [python, *command], env=environment, stdout=subprocess.PIPE, check=True, text=True
    )
    return json.loads(done.stdout.splitlines()[-1])


# ---- beside torch --------------------------------------------------------------------------------


def compare(preset: str, args: argparse.Namespace) -> str:
    """One row of the table."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, preset, args)
        pairs = [
            (run(sys.executable, __file__, "--child", name), run(args.peer, str(TORCH), name))
            for _ in range(args.pairs)
        ]
    tokens = PRESETS[preset].settings.rows * PRESETS[preset].settings.context
    speeds = [[tokens / median(one["seconds"][1:]) for one in pair] for pair in pairs]
    memory = [[(one["peak"] - one["base"]) / 1e6 for one in pair] for pair in pairs]
    ours, torchs = (median(column) for column in zip(*speeds, strict=True))
    our_mb, their_mb = (median(column) for column in zip(*memory, strict=True))
    shares = sorted(a / b for a, b in speeds)
    both = (zip(*(one["losses"] for one in pair), strict=True) for pair in pairs)
    apart = max(abs(a - b) for losses in both for a, b in losses)
    if not apart <= APART:
        raise SystemExit(f"{preset}: losses are apart by {apart:.1e}, expected {APART} at most")
    return (
        f"| {preset} | {ours:,.0f} | {torchs:,.0f} | {median(shares):.2f} ({shares[0]:.2f} to "
        f"{shares[-1]:.2f}) | {our_mb:,.0f} | {their_mb:,.0f} | {our_mb / their_mb:.2f} | "
        f"{apart:.1e} |"
    )


# ---- where the time goes -------------------------------------------------------------------------


class Clock:
    """Seconds by name, of functions that are watched."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    def watched(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **options: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **options)
            finally:
                spent = time.perf_counter() - start
                self.seconds[name] = self.seconds.get(name, 0.0) + spent

        return timed

    @contextmanager
    def watching(self, owner: Any, **names: str) -> Iterator[None]:
        """Watch functions of a module or class for a while: attribute=name."""
        before = {attribute: getattr(owner, attribute) for attribute in names}
        for attribute, name in names.items():
            setattr(owner, attribute, self.watched(name, before[attribute]))
        try:
            yield
        finally:
            for attribute, function in before.items():
                setattr(owner, attribute, function)


def profile(preset: str, args: argparse.Namespace) -> str:
    """Where one thread's time goes: a table, shares of a step."""
    clock, names = Clock(), model.Ops._fields
    ops = model.Ops(*(clock.watched(n, f) for n, f in zip(names, parts.OPS, strict=True)))
    back = type(parts.BACK)(
        *(clock.watched(f"{n}, backward", f) for n, f in zip(names, parts.BACK, strict=True))
    )
    with tempfile.TemporaryDirectory() as name:
        prepare(Path(name), preset, args)
        task, config, params, windows_SBT = opened(Path(name))
    adam, moments = AdamW(**task["adam"]), (params.like(), params.like())
    rows = max(1, parts.PART // task["context"])
    sums = {"product": "linear, gradient of W", "rows": "embedding, gradient"}
    start = time.perf_counter()
    with single_threaded_blas(), clock.watching(gradients.Sums, **sums):
        for t, window_BT in enumerate(windows_SBT, 1):
            batch, grad = batch_of(window_BT), params.like()
            for i in range(0, len(window_BT), rows):
                part = Batch(*(array[i : i + rows] for array in batch))
                tree, into = params.params(config), gradients.Sums(grad)
                loss_and_gradients(tree, config, *part, into, ops, back)
            clock.watched(
                "clip and AdamW",
                lambda grad=grad, t=t: (
                    clip(grad, task["clip"]),
                    adam.update(params, grad, *moments, task["rate"], t),
                ),
            )()
    whole = time.perf_counter() - start
    clock.seconds["loss, residual stream, rest"] = whole - sum(clock.seconds.values())
    lines = sorted(clock.seconds.items(), key=lambda item: -item[1])
    return "\n".join(f"| {name} | {seconds / whole:.1%} |" for name, seconds in lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--peer", default=sys.executable, help="a Python that has torch")
    parser.add_argument("--presets", nargs="+", default=["tiny", "small"], choices=PRESETS)
    parser.add_argument("--attention", default="fused", choices=("fused", "plain"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--profile", action="store_true")
    args = parser.parse_args()
    if args.child:
        return child(args.child)
    if args.profile:
        return print(profile(args.presets[0], args))
    print("| preset | tokens/s | torch | ratio | MB | torch | ratio | losses apart |")
    print("|---|---|---|---|---|---|---|---|")
    for preset in args.presets:
        print(compare(preset, args), flush=True)


if __name__ == "__main__":
    main()

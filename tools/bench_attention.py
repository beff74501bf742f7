"""Prefill attention of one layer: by blocks, against scores that are all in memory at once.

    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE python tools/bench_attention.py [--tokens 8192]

The shape is Llama 3 8B's, 32 query and 8 key/value heads of 128. The plain operation, and one that
does all it can in place, are timed on one group of heads (all at once would take 13 GB and more)
and multiplied; attention by blocks is timed whole, with the softmax of NumPy and with the compiled
one. All take turns, and the best time of each counts, since another process can only make it
longer. With --threads 1 the clock is that of the processor, which stands still while it works for
other programs: on a busy machine only that means something. Memory is the peak of what is
allocated beside the result; of the first two, for one group. The rate counts the products with
visible keys alone; the limit is the rate of NumPy's product of two square matrices in the same run.
"""

from __future__ import annotations

import argparse
import os
import time
import tracemalloc
from collections.abc import Callable
from contextlib import nullcontext

import numpy as np

from llama3np import model
from llama3np.kernels import attention as blocks
from llama3np.threads import Pool, available_cores, single_threaded_blas

N, K, H = 32, 8, 128
G = N // K


def materialised(q_BTNH: np.ndarray, k_BKSH: np.ndarray, v_BKSH: np.ndarray) -> np.ndarray:
    """The first group of heads, all scores at once, but nothing else as large: in place."""
    k_SH, v_SH, T = k_BKSH[0, 0], v_BKSH[0, 0], q_BTNH.shape[1]
    q_GTH = q_BTNH[0, :, :G].transpose(1, 0, 2) / np.float32(H**0.5)
    scores_GTS = q_GTH @ k_SH.T
    scores_GTS += np.triu(np.full((T, T), -np.inf, np.float32), 1)
    scores_GTS -= scores_GTS.max(axis=-1, keepdims=True)
    np.exp(scores_GTS, out=scores_GTS)
    scores_GTS /= scores_GTS.sum(axis=-1, keepdims=True)
    return (scores_GTS @ v_SH).transpose(1, 0, 2)


def plain(q_BTNH: np.ndarray, k_BKSH: np.ndarray, v_BKSH: np.ndarray) -> np.ndarray:
    """The first group of heads in the plain operation."""
    positions_BT = np.arange(q_BTNH.shape[1])[None]
    return model.attention(
        q_BTNH[:, :, :G], k_BKSH[:, :1], v_BKSH[:, :1], positions_BT, lambda *_: None
    )


def by_blocks(pool: Pool, soften: blocks.Soften, positions_BT: np.ndarray) -> Callable:
    def run(q_BTNH: np.ndarray, k_BKSH: np.ndarray, v_BKSH: np.ndarray) -> np.ndarray:
        with single_threaded_blas():
            return blocks.attention(
                q_BTNH, k_BKSH, v_BKSH, positions_BT, lambda *_: None, pool=pool, soften=soften
            )

    return run


def variants(pool: Pool, tokens: int) -> dict[str, Callable]:
    positions_BT = np.arange(tokens)[None]
    found = {"blocks, NumPy": by_blocks(pool, blocks.soften, positions_BT)}
    try:
        from llama3np.kernels.cpu.softmax import soften
    except ImportError:
        return found
    return found | {"blocks, compiled": by_blocks(pool, soften, positions_BT)}


ONE_GROUP = {"plain operation": plain, "materialised in place": materialised}


class Bench:
    """The clock and the arrays of a run."""

    def __init__(self, tokens: int, threads: int, repeats: int):
        self.tokens, self.threads, self.repeats = tokens, threads, repeats
        self.clock = time.process_time if threads == 1 else time.perf_counter
        shapes, rng = ((1, tokens, n, H) for n in (N, K, K)), np.random.default_rng(0)
        q_BTNH, *kv_BTKH = (rng.standard_normal(shape, dtype=np.float32) for shape in shapes)
        self.arrays = q_BTNH, *(array_BTKH.swapaxes(1, 2).copy() for array_BTKH in kv_BTKH)

    def seconds(self, run: Callable, *arrays: np.ndarray) -> float:
        """Of one call."""
        start = self.clock()
        run(*arrays)
        return self.clock() - start

    def best_seconds(self, runs: dict[str, Callable]) -> dict[str, float]:
        """Of each run, all heads together, taking turns."""
        best = dict.fromkeys(runs, float("inf"))
        for _ in range(self.repeats):
            for name, run in runs.items():
                groups = K if name in ONE_GROUP else 1
                best[name] = min(best[name], groups * self.seconds(run, *self.arrays))
        return best

    def extra_memory(self, run: Callable) -> tuple[float, np.ndarray]:
        """GB (10**9 bytes) beside the result, at most; and the first group of the result."""
        tracemalloc.start()
        result = run(*self.arrays)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return (peak - result.nbytes) / 1e9, result.reshape(self.tokens, -1, G, H)[:, 0]

    def product_rate(self) -> float:
        """GFLOP/s of the product of two matrices of 2048 x 2048."""
        square = np.random.default_rng(0).standard_normal((2048, 2048), dtype=np.float32)
        times = [self.seconds(np.matmul, square, square) for _ in range(10 * self.repeats)]
        return 2 * 2048**3 / min(times) / 1e9

    def report(self) -> None:
        """Print the table."""
        runs = {**ONE_GROUP, **variants(Pool(self.threads), self.tokens)}
        best, limit = self.best_seconds(runs), self.product_rate()
        gigaflops = 4 * N * H * self.tokens * (self.tokens + 1) / 2 / 1e9
        truth = materialised(*self.arrays)
        print("| attention | s/layer | GFLOP/s | of the limit | speed | extra memory | error |")
        print("|---" * 7 + "|")
        for name, run in runs.items():
            rate, faster = gigaflops / best[name], best["plain operation"] / best[name]
            memory, result_TGH = self.extra_memory(run)
            print(
                f"| {name} | {best[name]:.2f} | {rate:.0f} | {rate / limit:.2f} | {faster:.1f}x | "
                f"{memory:.3f} GB | {np.abs(result_TGH - truth).max():.1e} |"
            )
        print(
            f"\n{self.tokens} tokens, {self.threads} threads, limit {limit:.0f} GFLOP/s, ", end=""
        )
        print(f"NumPy {np.__version__}, load average {os.getloadavg()[0]:.1f} at the end")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--threads", type=int, default=available_cores())
    parser.add_argument("--repeats", type=int, default=5)
    args = parser.parse_args()
    with single_threaded_blas() if args.threads == 1 else nullcontext():
        Bench(args.tokens, args.threads, args.repeats).report()


if __name__ == "__main__":
    main()

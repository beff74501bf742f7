"""What taps cost: switched off against a spec that has none, and recording against not recording.

    env -u OPENBLAS_CORETYPE -u OPENBLAS_L2_SIZE python tools/bench_trace.py [MODEL]

Off: a decode step through model.py, tap=None, against one through the same source with every call
of `see` and `watcher` taken out. On: a decode step and a prompt with every tap recorded in memory,
against the same without a tap. Each pair is timed alternately, so that both see the same state of
the machine; printed are the median of their ratios and the quarters around it.
"""

from __future__ import annotations

import argparse
import ast
import inspect
import time
from collections.abc import Callable
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import numpy as np

import llama3np
from llama3np import model
from llama3np.crosscheck import trace
from llama3np.threads import single_threaded_blas


class Untapped(ast.NodeTransformer):
    """The spec without its taps: see(name, x) is x, and nothing makes or is handed a `see`."""

    def visit_Call(self, node: ast.Call) -> ast.AST:
        """A see(name, x) and watcher(...), where their value is used."""
        self.generic_visit(node)
        if isinstance(node.func, ast.Name) and node.func.id == "see":
            return node.args[1]
        if isinstance(node.func, ast.Name) and node.func.id == "watcher":
            return ast.Constant(None)
        return node

    def visit_Expr(self, node: ast.Expr) -> ast.AST | None:
        """A see(name, x) as a statement."""
        call = node.value
        if isinstance(call, ast.Call) and getattr(call.func, "id", None) == "see":
            return None
        return self.generic_visit(node)


def untapped_spec() -> ModuleType:
    """model.py, compiled without its taps."""
    tree = Untapped().visit(ast.parse(inspect.getsource(model)))
    module = ModuleType("untapped")
    exec(compile(ast.fix_missing_locations(tree), "untapped", "exec"), module.__dict__)
    return module


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def told(what: str, first: Callable[[], Any], second: Callable[[], Any], rounds: int) -> None:
    """Print the median of first's time over second's; who goes first alternates too."""
    seconds(first), seconds(second)
    ratios, base = [], []
    for i in range(rounds):
        pair = (first, second) if i % 2 else (second, first)
        times = [seconds(work) for work in pair]
        a, b = times if i % 2 else times[::-1]
        ratios.append(a / b)
        base.append(b)
    low, middle, high = np.percentile(ratios, (25, 50, 75))
    print(f"{what:<46} {middle:7.4f}  [{low:.4f}, {high:.4f}]  of {np.median(base) * 1e3:8.2f} ms")


def off(llm: llama3np.Llama, ids: list[int], rounds: int) -> None:
    """A decode step of the spec with the engine's operations: tap=None against no taps."""
    context = len(ids) - 1
    cache = llm.new_cache(1, len(ids))
    llm.forward(ids[:-1], cache, last_only=True)

    def step(forward: Callable[..., Any]) -> Callable[[], Any]:
        def run() -> None:
            forward(llm.params, llm.config, [ids[-1:]], cache, ops=llm.engine.ops)
            cache.trim(context)

        return run

    with single_threaded_blas():
        told("off / no taps: decode", step(model.forward), step(untapped_spec().forward), rounds)


def on(llm: llama3np.Llama, ids: list[int], rounds: int) -> None:
    """A decode step and a prompt, all taps put into memory, against the engine's own fastest."""
    context = len(ids) - 1
    plan = trace.planned(llm.config, len(ids))
    put = trace.into({name: np.zeros(*spec) for name, spec in plan.specs.items()}, plan.positions)
    cache = llm.new_cache(1, len(ids))
    llm.forward(ids[:-1], cache, last_only=True)

    def call(start: int, stop: int, tapped: bool) -> Callable[[], Any]:
        tap = (lambda name, array: put(name, start, array[0])) if tapped else None

        def run() -> None:
            cache.trim(start)
            llm.forward(ids[start:stop], cache, tap)

        return run

    def same_operations() -> None:
        cache.trim(context)
        with single_threaded_blas():
            ops = llm.engine.tapped
            model.forward(llm.params, llm.config, [ids[-1:]], cache, ops=ops, last_only=False)

    name, decode = llm.engine.name, call(context, context + 1, True)
    told(f"on / off, engine {name}: decode", decode, call(context, context + 1, False), rounds)
    told(f"on / the same operations off, {name}: decode", decode, same_operations, rounds)
    told(
        f"on / off, engine {name}: prompt", call(0, context, True), call(0, context, False), rounds
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", nargs="?", default="smollm2")
    parser.add_argument("--context", type=int, default=64, help="tokens in the cache beforehand")
    parser.add_argument("--rounds", type=int, default=400, help="pairs of decode steps")
    args = parser.parse_args()
    engines = ["numpy", "numba"] if find_spec("numba") else ["numpy"]
    for engine in engines:
        llm = llama3np.load(args.model, engine=engine)
        rng = np.random.default_rng(0)
        ids = rng.integers(0, llm.config.vocab_size, args.context + 1).tolist()
        if engine == "numpy":  # the others do not go through the spec when they decode
            print(f"{llm!r}, {args.context} tokens of context\nbars: 1.01 off, 2 on")
            off(llm, ids, args.rounds)
        on(llm, ids, max(1, args.rounds // 10))


if __name__ == "__main__":
    main()

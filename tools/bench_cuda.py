"""Decoding on a CUDA device, beside what its memory allows, torch and llama.cpp.

    python tools/bench_cuda.py MODEL [--device cuda:0] [--context N] [--new-tokens N] [--json]
    python tools/bench_cuda.py --roofline

Prints the tokens/s of each engine, and the share of the bandwidth that was measured in the same
process (kernels/cuda/limits.py); then those of transformers on torch and of llama.cpp, where they
are installed and take the file; then what cost.predicted_step says of this card and of others.
--roofline prints the predictions alone, in Markdown, as docs/cuda.md has them: they need no GPU.
Exit status 2, and one sentence, without a GPU.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from typing import Any

import llama3np
from llama3np import bench, cost, fit
from llama3np.backend import parse_device, use
from llama3np.errors import InputError
from llama3np.kernels.engine import CUDA_ENGINES
from llama3np.load.installed import resolve
from llama3np.presets import PRESETS

PRESET, CONTEXT, KV = "llama3-8b", 8192, "f32"
FORMATS = ("bf16", "q8_0", "q4_0")
HELD = 512 << 20  # bytes of a card that a driver and a desktop hold
ROUNDS = 5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("model", nargs="?", metavar="MODEL")
    parser.add_argument("--device", default="cuda", metavar="cuda[:N]")
    parser.add_argument("--context", type=int, default=1024, metavar="N")
    parser.add_argument("--new-tokens", type=int, default=128, metavar="N")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--roofline", action="store_true")
    args = parser.parse_args()
    if args.roofline:
        print("\n".join(roofline()))
        return 0
    try:
        if args.model is None:
            raise InputError("expected MODEL, or --roofline")
        if parse_device(args.device).kind == "cpu":
            raise InputError(f"device: expected cuda or cuda:N, found {args.device}")
        use(parse_device(args.device))
        report = measured(args)
    except InputError as error:
        print(f"bench_cuda: {error}", file=sys.stderr)
        return 2
    print(json.dumps(report) if args.json else "\n".join(table(report)))
    return 0


# ---- predictions ---------------------------------------------------------------------------------


def roofline() -> Iterator[str]:
    """Tokens/s and milliseconds a token of 8B, by card and format, with that many tokens before."""
    yield f"| predicted, {PRESET}, {CONTEXT} tokens before | GB/s | " + " | ".join(FORMATS) + " |"
    yield "|---|---|" + "---|" * len(FORMATS)
    for gpu in cost.GPUS:
        cells = (predicted(gpu, format) for format in FORMATS)
        yield f"| {gpu.name} | {gpu.bandwidth / 1e9:.0f} | " + " | ".join(cells) + " |"


def predicted(gpu: cost.Gpu, format: str) -> str:
    """One cell: a speed only where the model fits."""
    config = PRESETS[PRESET]
    wish = fit.Wish(config, cost.weight_bytes(config, format), CONTEXT, KV, bench.PROMPT_TOKENS)
    if wish.needs().total > gpu.memory - HELD:
        return "does not fit"
    step = cost.predicted_step(config, format, CONTEXT, KV, gpu.bandwidth)
    return f"{1 / step:.0f}/s ({1e3 * step:.1f} ms)"


# ---- measurements --------------------------------------------------------------------------------


def measured(args: argparse.Namespace) -> dict[str, Any]:
    """Each engine by bench.measure, then the other programs, one after the other."""
    from llama3np.kernels.cuda.limits import DeviceLimits

    plan = bench.Plan(bench.PROMPT_TOKENS, args.new_tokens, 1, args.context, ROUNDS)
    room = max(plan.prompt_tokens, plan.context + plan.new_tokens) + 1
    report: dict[str, Any] = {"model": args.model, "context": args.context, "engines": {}}
    for engine in CUDA_ENGINES:
        llm = llama3np.load(args.model, args.device, engine=engine, max_seq_len=room)
        report["engines"][engine] = bench.measure(llm, plan)
        step = report["engines"][engine]["decode"]["bytes_per_step"]
        report["kernels"], report["bytes_per_step"] = cost.step_kernels(llm.config), step
        ids = bench.prompt_ids(args.context, llm.config.vocab_size)
        del llm  # its memory is for the next one
    report["graph_us"] = DeviceLimits(parse_device(args.device)).graph_us()
    free_memory_of_pools()
    report["others"] = {
        name: tried(decode, args, ids)
        for name, (package, decode) in OTHERS.items()
        if find_spec(package) is not None
    }
    return report


def free_memory_of_pools() -> None:
    """Give back what CuPy keeps of freed arrays: other programs allocate by themselves."""
    import cupy

    cupy.get_default_memory_pool().free_all_blocks()


def tried(decode: Callable[..., Any], args: argparse.Namespace, ids: list[int]) -> Any:
    """What another program was measured at, or why not: it shall not take our report with it."""
    try:
        return decode(args, ids)
    except Exception as error:
        return f"not measured: {type(error).__name__}: {error}"


def torch_speed(args: argparse.Namespace, ids: list[int]) -> float | str:
    """Tokens/s of transformers' generate in bfloat16, greedy; or why not."""
    import torch
    from transformers import AutoModelForCausalLM

    try:
        model = AutoModelForCausalLM.from_pretrained(
            resolve(args.model), dtype=torch.bfloat16, device_map=args.device
        )
    except (OSError, ValueError) as error:
        return f"not measured: {error}"
    prompt = torch.tensor([ids], device=model.device)

    def run(new_tokens: int) -> None:
        model.generate(
            prompt, min_new_tokens=new_tokens, max_new_tokens=new_tokens, do_sample=False
        )
        torch.cuda.synchronize()

    return speed(run, args.new_tokens)


def llama_cpp_speed(args: argparse.Namespace, ids: list[int]) -> float | str:
    """Tokens/s of llama.cpp with all layers on the GPU, greedy; or why not."""
    import llama_cpp

    if not llama_cpp.llama_supports_gpu_offload():
        return "not measured: llama_cpp was built without CUDA"
    try:
        model = llama_cpp.Llama(
            str(resolve(args.model)),
            n_gpu_layers=-1,
            n_ctx=args.context + args.new_tokens + 1,
            verbose=False,
        )
    except ValueError as error:
        return f"not measured: {error}"

    def run(new_tokens: int) -> None:
        model.reset()
        for count, _ in enumerate(model.generate(ids, temp=0.0), 1):
            if count == new_tokens:
                return

    return speed(run, args.new_tokens)


OTHERS = {"torch": ("transformers", torch_speed), "llama.cpp": ("llama_cpp", llama_cpp_speed)}


def speed(run: Callable[[int], None], new_tokens: int) -> float:
    """Tokens/s of decoding alone: what more tokens take beside one, the best of a few rounds."""
    times = []
    for _ in range(ROUNDS):
        seconds = []
        for count in (1, 1 + new_tokens):
            start = time.perf_counter()
            run(count)
            seconds.append(time.perf_counter() - start)
        times.append(seconds[1] - seconds[0])
    return new_tokens / min(times)


def table(report: dict[str, Any]) -> Iterator[str]:
    """The report in Markdown."""
    first = next(iter(report["engines"].values()))
    yield f"{first['gpu']['name']}, {report['model']}, {report['context']} tokens before"
    yield ""
    yield "| | tokens/s | share of measured bandwidth |"
    yield "|---|---|---|"
    for engine, found in report["engines"].items():
        part = found["decode"]
        yield f"| {engine} | {part['tokens_per_s']:.1f} | {part['share_of_limit']:.2f} |"
    for name, found in report["others"].items():
        shown = found if isinstance(found, str) else f"{found:.1f}"
        yield f"| {name} | {shown} | |"
    bandwidth = first["read_limit_gb_s"] * 1e9
    step = report["bytes_per_step"] / bandwidth + report["kernels"] * report["graph_us"] / 1e6
    limits = f"{bandwidth / 1e9:.0f} GB/s and {report['graph_us']:.1f} us a kernel, as measured"
    yield f"| predicted from {limits} | {1 / step:.1f} | |"
    yield ""
    yield from roofline()


if __name__ == "__main__":
    sys.exit(main())

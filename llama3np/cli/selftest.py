"""The command `llama3np selftest`: PASS or FAIL, and a report to send back."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from llama3np import selftest
from llama3np.backend import Device, parse_device, use
from llama3np.errors import InputError
from llama3np.load import inspect
from llama3np.load.installed import resolve

MODEL_IS_OPTIONAL = True
REPORT = "llama3np-selftest.json"


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add this command's arguments."""
    add = parser.add_argument
    add("--device", default="cpu", metavar="cpu|cuda[:N]", help="what to check: cpu if not given")
    add("--report", default=REPORT, metavar="PATH", help=f"where to write it: {REPORT}")
    add("--no-speed", action="store_true", help="check only, measure nothing")


def run(args: argparse.Namespace) -> int:
    """Check, measure, write the report; exit status 0 for PASS, 1 for FAIL."""
    use(device := parse_device(args.device))
    path = args.model or selftest.default_model()
    if args.model is not None:  # a name that is mistaken is no failure of the device
        inspect(resolve(args.model))
    report = reported(device, path, args)
    try:
        Path(args.report).write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--report: {args.report}: {error.strerror}") from None
    if args.json:
        print(json.dumps(report))
    else:
        missing = [c for c in report["checks"] if c["outcome"] == selftest.NOT_RUN]
        told = [f"not run: {c['part']} {c['name']}: {c['detail']}" for c in missing]
        print("\n".join([*told, f"report: {args.report}", report["verdict"]]))
    return 0 if report["verdict"] == selftest.PASS else 1


def reported(device: Device, path: str | None, args: argparse.Namespace) -> dict[str, Any]:
    """Everything; told on the way, unless as JSON at the end."""

    def tell(line: str) -> None:
        if not args.json:
            print(line, flush=True)

    facts = selftest.facts(device)
    for key, value in facts.items():
        tell(f"{key}: {value}")
    tell(f"model: {path or 'none is installed, and none was named: small random ones only'}")
    results = []
    for result in selftest.checks(device, path):
        results.append(result)
        tell(f"{result.outcome} {result.part:<8} {result.name}: {result.detail}")
    verdict = selftest.verdict(results)
    measured = {}
    # What computes wrongly is not worth being measured.
    if not args.no_speed and verdict == selftest.PASS:
        measured = selftest.measurements(device, path)
        for line in lines(measured):
            tell(line)
    checks = [result._asdict() for result in results]
    return {**facts, "model": path, "checks": checks, "measured": measured, "verdict": verdict}


def lines(measured: dict[str, Any]) -> list[str]:
    """The measurements, for people."""
    told = [f"reads {measured['read_gb_s']:.1f} GB/s", f"{measured['sgemm_gflop_s']:.0f} GFLOP/s"]
    if "launch_us" in measured:
        told.append(f"{measured['launch_us']:.1f} microseconds a launch")
        told.append(f"{measured['graph_us']:.1f} a kernel in a graph")
    found = [", ".join(told)]
    for kind in ("prefill", "decode"):
        if "bench" in measured:
            part = measured["bench"][kind]
            found.append(
                f"{kind}: {part['tokens_per_s']:.1f} tokens/s, "
                f"{part['share_of_limit']:.2f} of the limit"
            )
    return found

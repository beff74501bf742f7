"""Make every mistake in transformers, and see what `llama3np diagnose` says: docs/confusion.md.

    python tools/confusion.py --peers PEERS/python

runs in this environment; the other Python has torch and transformers (tools/parity/README.md says
how to make it). It makes each mistake of tools/injections in a transformers model, and captures a
full trace and one of logits alone with tools/capture; here each is diagnosed. The models are
stories260K (the shared folder), SmolLM2 (installed) and two made-up ones of random weights.
--only PART runs the cases whose name has it in them, and prints them without writing the page.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from confusion_page import Result, page

import llama3np
from llama3np.crosscheck import files
from llama3np.crosscheck.diagnose import diagnose
from llama3np.load.convert import convert
from llama3np.load.installed import resolve

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "confusion.md"
TEXTS = (
    "Once upon a time, there was a little girl named Lily. She loved to play",
    "The sun was hot and the dog ran to the big tree.",
    "Tom said: it is my red ball!",
    "One day a cat saw 3 birds, and they were happy to see the cat and the moon.",
)
LONGER = (" ".join(TEXTS[:2]), " ".join(TEXTS[2:]))
SHORT_FIRST = (*TEXTS[2:], *TEXTS[:2])  # what is fed with mistakes is the first one
MADE_UP = [7, 3, 200, 41, 5, 99, 180, 12, 255, 64, 33, 3, 77, 101, 9, 222]  # ids of no text
JOB = "job.json"  # there once all traces are


# ---- what is run ---------------------------------------------------------------------------------


def make_job(shared: Path, out: Path, only: list[str]) -> dict[str, Any]:
    """What the other Python is told: models, prompts, and where to write."""
    out.mkdir(parents=True, exist_ok=True)
    smollm2 = out / "smollm2"
    convert(resolve("smollm2"), str(smollm2), "hf", "f32")
    stories = llama3np.load(shared / "data" / "stories260K.bin").tokenizer
    smol = llama3np.load("smollm2").tokenizer
    prompts = {
        "stories260k": [stories.with_bos(stories.encode(text)) for text in (*TEXTS, *LONGER)],
        "smollm2": [smol.with_bos(smol.encode(text)) for text in SHORT_FIRST],
        "made-up-8": [MADE_UP],
        "made-up-32": [MADE_UP],
    }
    models = {"stories260k": str(shared / "data" / "stories260K-hf"), "smollm2": str(smollm2)}
    return {"models": models, "prompts": prompts, "out": str(out), "only": only}


def inject(peers: str, job: dict[str, Any]) -> None:
    """Let the other Python write the candidates' traces; the job's file is there when they are."""
    part = Path(job["out"]) / f"{JOB}.part"
    part.write_text(json.dumps(job))
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "tools"), "TQDM_DISABLE": "1"}
    command = [peers, "-m", "injections.run", str(part)]
    subprocess.run(command, env=environment, check=True, stdout=sys.stderr)
    part.rename(part.with_name(JOB))


def results(job: dict[str, Any]) -> Iterator[Result]:
    """The diagnosis of every trace that was written, model by model."""
    out = Path(job["out"])
    for model in job["prompts"]:
        llm = llama3np.load(job["models"].get(model, out / model), threads=1)
        for file in sorted(out.glob(f"*@{model}.*.safetensors")):
            result = result_of(llm, file, job["prompts"][model][0])
            print(*result, file=sys.stderr, flush=True)
            yield result


def result_of(llm: llama3np.Llama, file: Path, wanted: list[int]) -> Result:
    """The diagnosis of one trace. wanted: the ids that a spoiled run was meant to have."""
    case, part, _ = file.name.rsplit(".", 2)
    name, model = case.split("@")
    mistake, _, form = name.partition("~")
    trace = files.read(file)
    ran, prefill = trace.meta["ids"], trace.meta["prefill"]
    ids = ran if mistake.startswith("right-") else wanted
    found = diagnose(llm, trace, ids, len(ids) if prefill == len(ran) else prefill)
    ranked = list(dict.fromkeys(trial.id for trial in (*found.explaining, *found.ranked)))
    named, *alike = dict.fromkeys(trial.id for trial in found.explaining) or [None]
    return Result(
        mistake, form, model, part, found.status, named,
        ranked.index(mistake) + 1 if mistake in ranked else 0,
        alike, mistake in found.invisible,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peers", required=True, help="a Python with torch and transformers")
    parser.add_argument("--shared", type=Path, default=os.environ.get("LLAMA3NP_SHARED"))
    parser.add_argument("--keep", type=Path, help="a folder: traces that are there are not remade")
    parser.add_argument("--only", nargs="*", default=[], help="parts of the cases' names")
    args = parser.parse_args()
    shared = Path(args.shared or ROOT.parent / "shared")
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.keep or Path(temporary)
        if not (folder / JOB).exists():
            inject(args.peers, make_job(shared, folder, args.only))
        found = list(results(json.loads((folder / JOB).read_text())))
    text = page(found)
    print(text) if args.only else PAGE.write_text(text)


if __name__ == "__main__":
    main()

"""Run spoiled and unspoiled models in transformers, and keep what they show.

python -m injections.run JOB.json, which holds "models" {name: path}, "prompts" {name: [ids, ...]},
"out" and "only": parts of the names of the cases to run, none for all. Every case leaves
OUT/CASE.full and OUT/CASE.logits, both .safetensors, written by tools/capture.
"""

import json
import sys
from pathlib import Path

from capture.transformers_capture import Capture, run

from injections.mistakes import MISTAKES
from injections.port import Port, write_made_up

DECODED = 6  # ids at the end that are fed one at a time, where decoding is wanted


def cases(prompts):
    """(name, model, ids, prefill, dtype, mistake or None) of everything there is to run."""
    for mistake_id, mistake in MISTAKES.items():
        for model in mistake.models:
            ids = prompts[model][0]
            prefill = len(ids) - DECODED if mistake.decode else None
            yield f"{mistake_id}@{model}", model, ids, prefill, mistake.dtype, mistake.make
    for model, many in prompts.items():
        dtypes = ["float32"] if model.startswith("made-up") else ["float32", "bfloat16", "float16"]
        for dtype in dtypes:
            for number, ids in enumerate(many):
                prefill = len(ids) // 2 if number % 2 else None
                yield f"right-{dtype}-{number}@{model}", model, ids, prefill, dtype, None


def keep(case, models, out):
    """Run one case and write its two files."""
    name, model, ids, prefill, dtype, make = case
    with Port(models[model], ids, prefill, dtype) as port:
        if make is not None:
            make(port)
        port.round()
        with Capture(port.llm) as capture:
            run(port.llm, port.ids, port.prefill)
    for part, only in (("full", None), ("logits", lambda tap: tap.startswith("lm_head"))):
        capture.save(
            out / f"{name.replace('/', '~')}.{part}.safetensors", port.ids, port.prefill, only
        )


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    out = Path(job["out"])
    models = job["models"] | write_made_up(out)
    for case in cases(job["prompts"]):
        if not job["only"] or any(part in case[0] for part in job["only"]):
            print(case[0], flush=True)
            keep(case, models, out)


if __name__ == "__main__":
    main()

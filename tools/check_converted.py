"""Do other programs open what `llama3np convert` writes, and compute the same with it?

    PEERS/pip install -e . torch==2.13.0 transformers llama-cpp-python
    PEERS/python tools/check_converted.py SMOLLM2.gguf

PEERS is the bin of an environment of its own, as `python -m venv` makes one.

GGUF -> Hugging Face float32: transformers loads it, and its logits are ours but for rounding; its
tokenizer gives our ids. That -> GGUF f16 and q8_0: llama.cpp loads each, and its greedy text is
ours. GGUF -> GGUF: its text is the same with both; it need not be ours, because llama.cpp rounds
activations to 8 bits where it multiplies blocks of 4. A peer that is not installed is said to be
absent, not passed.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np

import llama3np
from llama3np.load.convert import convert

PROMPT = "Gravity is"
N_NEW = 16
TEXTS = (PROMPT, "Hello, wörld!  12345\n\n\tdef f(x):\n    return x", "漢字 🦙 ’tis", " ")


def check_transformers(directory: Path) -> str:
    """Logits and ids of transformers against ours, both float32."""
    import torch
    import transformers

    ours = llama3np.load(directory)
    model = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    tokenizer = transformers.AutoTokenizer.from_pretrained(directory)
    for text in TEXTS:
        found, expected = tokenizer(text)["input_ids"], ours.tokenizer.prompt_ids(text)
        if found != expected:
            return f"FAILS: ids of {text!r}: ours {expected}, theirs {found}"
    ids = ours.encode(TEXTS[0] + TEXTS[1])
    with torch.no_grad():
        theirs_TV = model.eval()(torch.tensor([ids])).logits[0].numpy()
    ours_TV = ours.forward(ids)[0]
    error = np.abs(ours_TV - theirs_TV).max() / np.abs(theirs_TV).max()
    greedy = (ours_TV.argmax(-1) == theirs_TV.argmax(-1)).all()
    verdict = "agrees" if error < 1e-4 and greedy else "FAILS"
    return f"{verdict}: {len(ids)} positions, largest difference {error:.1e} of the largest logit"


def check_llama_cpp(file: Path) -> str:
    """The greedy text of llama.cpp against ours."""
    theirs = text_of_llama_cpp(file)
    ours = llama3np.load(file).generate(PROMPT, N_NEW)[0].text
    return f"{'agrees' if ours == theirs else 'FAILS'}: ours {ours!r}, theirs {theirs!r}"


def check_same(source: Path, file: Path) -> str:
    """The greedy text of llama.cpp with one file against that with the other."""
    before, after = text_of_llama_cpp(source), text_of_llama_cpp(file)
    return f"{'agrees' if before == after else 'FAILS'}: before {before!r}, after {after!r}"


def text_of_llama_cpp(file: Path) -> str:
    from llama_cpp import Llama

    peer = Llama(str(file), n_ctx=128, n_threads=2, verbose=False)
    return peer(PROMPT, max_tokens=N_NEW, temperature=0)["choices"][0]["text"]


def report(name: str, check: Callable[[Path], str], path: Path) -> bool:
    """Run one check; whether it did not fail."""
    try:
        result = check(path)
    except ImportError as error:
        result = f"absent: {error}"
    print(f"{name:<32} {result}", flush=True)
    return not result.startswith("FAILS")


def main(source: str) -> int:
    with tempfile.TemporaryDirectory() as folder:
        files = ("hf", "f16.gguf", "q8_0.gguf", "blocks.gguf")
        hf, f16, q8_0, blocks = (Path(folder) / name for name in files)
        convert(source, hf)
        convert(hf, f16, dtype="f16")
        convert(hf, q8_0, dtype="q8_0")
        convert(source, blocks)
        results = [
            report("transformers, Hugging Face f32", check_transformers, hf),
            report("llama.cpp, GGUF f16", check_llama_cpp, f16),
            report("llama.cpp, GGUF q8_0", check_llama_cpp, q8_0),
            report("llama.cpp, GGUF's own blocks", partial(check_same, Path(source)), blocks),
        ]
    return 0 if all(results) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))

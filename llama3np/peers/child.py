"""One process of a comparison: read a task from standard input, do it, print its times as JSON.

Run as a file, by any Python that has the program: nothing here is imported but that. A program is
a function of the task that gives generate(ids, count): feed the ids to an empty cache, then yield
`count` ids, each the one with the largest logit, as soon as it is known and before it is fed.
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any


def ours(task: dict[str, Any]) -> Any:
    """llama3np, by its public surface's own loop; options are those of llama3np.load.

    A path among them is opened in place of the task's model: another file of the same numbers.
    """
    import llama3np

    llm = llama3np.load(**{"path": task["model"], **task["options"]})
    cache = llm.new_cache(1, len(task["prompt_ids"]) + task["new_tokens"] + 1)

    def generate(ids: list[int], count: int) -> Any:
        for step in llm.stream(ids, count, cache=cache.reset(), stop_ids=()):
            yield step.id

    return generate


def llama_cpp(task: dict[str, Any]) -> Any:
    """llama.cpp by its C functions, so that nothing of Python's is between two tokens."""
    import ctypes

    import llama_cpp as lib
    import numpy as np

    told = [""]
    log = lib.llama_log_callback(lambda level, text, data: told.append(text.decode().strip()))
    lib.llama_log_set(log, ctypes.c_void_p(0))
    context, vocab_size = llama_cpp_context(lib, task)
    if not context:
        sys.exit("; ".join(filter(None, told[-4:])))

    def generate(ids: list[int], count: int) -> Any:
        lib.llama_memory_clear(lib.llama_get_memory(context), True)
        for _ in range(count):
            fed = (ctypes.c_int32 * len(ids))(*ids)
            if lib.llama_decode(context, lib.llama_batch_get_one(fed, len(ids))):
                sys.exit("llama_decode failed")
            logits = lib.llama_get_logits_ith(context, -1)
            ids = [int(np.ctypeslib.as_array(logits, (vocab_size,)).argmax())]
            yield ids[0]

    generate.log = log  # type: ignore[attr-defined]  # C calls it as long as the model lives
    return generate


def llama_cpp_context(lib: Any, task: dict[str, Any]) -> tuple[Any, int]:
    """A context with the task's threads, or None if it cannot be; and the size of its vocabulary.

    Everything else is as llama.cpp has it by default: a float16 cache, weights repacked.
    """
    model = lib.llama_model_load_from_file(task["model"].encode(), lib.llama_model_default_params())
    if not model:
        return None, 0
    settings = lib.llama_context_default_params()
    settings.n_ctx = settings.n_batch = len(task["prompt_ids"]) + task["new_tokens"] + 1
    settings.n_threads = settings.n_threads_batch = task["threads"]
    vocab_size = lib.llama_vocab_n_tokens(lib.llama_model_get_vocab(model))
    return lib.llama_init_from_model(model, settings), vocab_size


def transformers(task: dict[str, Any]) -> Any:
    """Hugging Face's own model, in the type that its files have."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(task["threads"])
    model = AutoModelForCausalLM.from_pretrained(task["model"], dtype="auto").eval()

    def generate(ids: list[int], count: int) -> Any:
        past = None
        for _ in range(count):
            with torch.inference_mode():
                out = model(
                    torch.tensor([ids]), past_key_values=past, use_cache=True, logits_to_keep=1
                )
            past, ids = out.past_key_values, [int(out.logits[0, -1].argmax())]
            yield ids[0]

    return generate


PROGRAMS = {"llama3np": ours, "llama.cpp": llama_cpp, "transformers": transformers}


def main(programs: dict[str, Any] = PROGRAMS) -> None:
    """One pass to warm up, then the repetitions."""
    task = json.load(sys.stdin)
    generate = programs[task["program"]](task)
    once(generate, task)
    passes = [once(generate, task) for _ in range(task["repeats"])]
    prefill_s, decode_s, ids = zip(*passes, strict=True)
    print(json.dumps({"prefill_s": prefill_s, "decode_s": decode_s, "ids": ids[0]}))


def once(generate: Any, task: dict[str, Any]) -> tuple[float, float, list[int]]:
    """Seconds to the first new token, seconds of the new_tokens steps after it, all new ids."""
    clock, ids = [time.perf_counter()], []
    for id in generate(task["prompt_ids"], task["new_tokens"] + 1):
        clock.append(time.perf_counter())
        ids.append(id)
    return clock[1] - clock[0], clock[-1] - clock[1], ids


if __name__ == "__main__":
    main()

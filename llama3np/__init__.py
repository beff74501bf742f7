"""Llama 3 in plain array operations: NumPy on the CPU, CuPy on CUDA.

    import llama3np
    llm = llama3np.load("path")      # a Hugging Face or Meta directory, .gguf, llama2.c .bin
    for step in llm.stream("Once upon a time", max_new_tokens=64):
        print(step.text, end="")

The model itself is llama3np/model.py, to be read from top to bottom.
"""

import llama3np.load  # noqa: F401  first: imported later, the package would hide the function
from llama3np.errors import CheckpointError, InputError
from llama3np.llm import Completion, Llama, Step, load

__all__ = ["CheckpointError", "Completion", "InputError", "Llama", "Step", "__version__", "load"]
__version__ = "0.1.0"

"""Capture the nodes of llama.cpp's graph, for `llama3np compare` and `llama3np diagnose`.

Copy this file next to your code; it needs llama-cpp-python and NumPy. Either

    python llama_cpp_capture.py model.gguf --prompt-ids 1,2,3 -o candidate.npz

or around your own calls:

    capture = Capture()
    llm = capture.open("model.gguf", n_ctx=512)     # a llama_cpp.Llama
    llm.eval(ids)
    capture.save("candidate.npz", ids)

Arrays are called as the nodes are: "attn_norm-0", "kq_soft_max-0", "l_out-0", "result_output".
llama.cpp calls queries and keys Qcur-0 and Kcur-0 before and after RoPE; here they are Qcur_rope-0
and Kcur_rope-0 after it. kq-0 is what llama.cpp makes: neither scaled nor masked.
"""

import argparse
import ctypes
import json
import re
import sys
from pathlib import Path
from unittest import mock

import llama_cpp
import numpy as np

F32 = 0  # enum ggml_type
# To what llama.cpp rounds the activations of a product, by the type of its weights (as its CPU code
# does, and more coarsely than this for weights of other types: those have no budget).
ROUNDED_TO = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
# Nodes that only look at others in another shape, the caches, and what has no name of its own.
SKIPPED = re.compile(r".*\)|cache_.*|node_.*|norm(-\d+)?|kqv-\d+")
HEADS = re.compile(r"([QK]cur_rope|kq|kq_soft_max)-\d+")  # (T, heads, H) or (N, T, slots)
KEPT_OPS = {"GET_ROWS", "MUL", "MUL_MAT", "ROPE", "SOFT_MAX", "CONT", "ADD", "SWIGLU"}


class Tensor(ctypes.Structure):
    """The first fields of struct ggml_tensor (ggml.h)."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),  # sizes, the innermost dimension first
        ("nb", ctypes.c_size_t * 4),  # strides in bytes
    )


def ggml():
    """The library with ggml's own functions on tensors."""
    folder = Path(llama_cpp.__file__).parent / "lib"
    library = ctypes.CDLL(str(next(folder.glob("*ggml-base.*"))))
    library.ggml_get_name.argtypes = library.ggml_op_desc.argtypes = [ctypes.c_void_p]
    library.ggml_get_name.restype = library.ggml_op_desc.restype = ctypes.c_char_p
    library.ggml_nbytes.argtypes, library.ggml_nbytes.restype = [ctypes.c_void_p], ctypes.c_size_t
    get = library.ggml_backend_tensor_get
    get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    get.restype = None
    return library


def activations(llm):
    """The dtype by whose error a model's run is judged; of quantised weights, their type's name."""
    text = ctypes.create_string_buffer(128)
    llama_cpp.llama_model_desc(llm.model, text, len(text))  # such as "llama 256M all F32"
    words = text.value.decode().removesuffix(" (guessed)").split()
    if words[-1] not in ROUNDED_TO:
        print(
            f"{words[-1]}: llama.cpp rounds what it multiplies by such weights more coarsely than "
            f"any budget here: convert the model to F32",
            file=sys.stderr,
        )
    return ROUNDED_TO.get(words[-1], words[-1])


class Capture:
    """Keeps what each evaluation of the graph shows: one sequence, one or more calls."""

    def __init__(self):
        self.ggml = ggml()
        self.calls = {}  # node -> an array of each call
        self.dtype = None  # of the activations, once a model is open
        self._callback = llama_cpp.llama_cpp.ggml_backend_sched_eval_callback(self._seen)

    def open(self, path, **options):
        """A llama_cpp.Llama whose graph is watched: a float32 cache, logits of all positions."""
        code = llama_cpp.llama_cpp  # Llama's own options lack the callback
        params = code.llama_context_default_params()
        params.cb_eval = self._callback
        options = {"logits_all": True, "verbose": False, "type_k": F32, "type_v": F32, **options}
        with mock.patch.object(code, "llama_context_default_params", return_value=params):
            llm = llama_cpp.Llama(str(path), **options)
        self.dtype = activations(llm)
        return llm

    def _seen(self, pointer, ask, _):
        """Called twice a node: to ask whether we want it, and when it has been computed."""
        name = self.ggml.ggml_get_name(pointer).decode()
        op = self.ggml.ggml_op_desc(pointer).decode()
        wanted = op in KEPT_OPS and not SKIPPED.fullmatch(name)
        if wanted and not ask:
            name = name.replace("cur-", "cur_rope-") if op == "ROPE" else name
            self.calls.setdefault(name, []).append(
                self._numbers(pointer, 3 if HEADS.fullmatch(name) else 2)
            )
        return True if not ask else wanted

    def _numbers(self, pointer, ndim):
        """The node as an array: its `ndim` inner dimensions, the innermost last."""
        tensor = Tensor.from_address(pointer)
        assert tensor.type == F32, f"expected float32, found ggml_type {tensor.type}"
        raw = np.empty(self.ggml.ggml_nbytes(pointer), np.uint8)
        self.ggml.ggml_backend_tensor_get(pointer, raw.ctypes.data, 0, raw.nbytes)
        shape, strides = tensor.ne[ndim - 1 :: -1], tensor.nb[ndim - 1 :: -1]
        return np.lib.stride_tricks.as_strided(raw.view(np.float32), shape, strides).copy()

    def arrays(self, S):
        """The calls joined along the positions; attention to S positions, empty slots left out."""
        joined = {}
        for name, calls in self.calls.items():
            if name.startswith(("kq-", "kq_soft_max-")):
                joined[name] = np.concatenate([call[..., :S] for call in calls], axis=1)
            else:
                joined[name] = np.concatenate(calls, axis=0)
        return joined

    def save(self, path, ids, prefill=None, **metadata):
        """Write an .npz file. ids: all of them; prefill: how many went into the first call."""
        metadata = {
            "ids": list(ids),
            "prefill": prefill or len(ids),
            "dtype": self.dtype,
            "implementation": f"llama.cpp through llama-cpp-python {llama_cpp.__version__}",
            **metadata,
        }
        text = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
        np.savez(path, __metadata__=text, **self.arrays(len(ids)))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a .gguf file")
    parser.add_argument("--prompt-ids", required=True, help="such as 1,2,3")
    parser.add_argument("--prefill", type=int, help="so many ids in the first call, then one each")
    parser.add_argument("-o", "--out", required=True, help="an .npz file")
    args = parser.parse_args()
    ids = [int(part) for part in args.prompt_ids.split(",")]
    capture = Capture()
    llm = capture.open(args.model, n_ctx=max(64, len(ids)))
    for part in (ids[: args.prefill], *([each] for each in ids[args.prefill or len(ids) :])):
        llm.eval(part)
    capture.save(args.out, ids, args.prefill)


if __name__ == "__main__":
    main()

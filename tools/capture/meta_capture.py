"""Capture what Meta's llama/model.py computes, for `llama3np compare` and `llama3np diagnose`.

Copy this file next to your code; it needs torch and safetensors. Around your own calls:

    with Capture(model) as capture:                 # a Transformer of llama/model.py
        model.forward(torch.tensor([ids]), 0)
    capture.save("candidate.safetensors", ids)

Decoding is several calls, with start_pos going up; each adds its positions.

Arrays are called as the modules are, with `.output`, or `.input` where no module puts it out.
What has no module is `attention.q_rope`, `.k_rope`, `.scores` and `.probs`. Values are those that
the model itself computed, in its own dtype; nothing is computed again here.
"""

import contextlib
import json
import sys
from unittest import mock

import torch
from safetensors.torch import save_file

# What only the next module sees: the mixed heads, silu(w1) * w3, the stream amid a block.
INPUTS = ("wo", "w2", "ffn_norm")
OUTPUTS = ("tok_embeddings", "attention_norm", "ffn_norm", "norm", "output")
OUTPUTS += ("wq", "wk", "wv", "wo", "w1", "w2", "w3")


class Capture(contextlib.ExitStack):
    """While entered, keeps what each call of the model shows: one sequence, one or more calls."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.calls = {}  # name -> (tensor, axis of positions) of each call
        self.inside = None  # the name of the attention module that is running

    def __enter__(self):
        blocks = set(self.model.layers)
        for name, module in self.model.named_modules():
            last = name.rsplit(".", 1)[-1]
            if last == "attention":
                self._hook_attention(name, module)
            elif module in blocks or last in OUTPUTS:
                self._hook(name, module, last in INPUTS)
        code = sys.modules[type(self.model).__module__]
        self._replace(code, "apply_rotary_emb", self._rope)
        self._replace(torch.nn.functional, "softmax", self._softmax)
        return self

    def _hook(self, name, module, with_input):
        def after(_, args, out):
            if with_input:
                self.keep(f"{name}.input", args[0])
            self.keep(f"{name}.output", out)

        self.callback(module.register_forward_hook(after).remove)

    def _hook_attention(self, name, module):
        def entered(now):
            self.inside = now

        self.callback(module.register_forward_pre_hook(lambda *_: entered(name)).remove)
        self.callback(module.register_forward_hook(lambda *_: entered(None)).remove)

    def _replace(self, owner, name, wrapper):
        """Let a function without a module pass through `wrapper`, which is given the function."""
        original = getattr(owner, name)

        def wrapped(*args, **options):
            return wrapper(original, *args, **options)

        self.enter_context(mock.patch.object(owner, name, wrapped))

    def _rope(self, original, *args, **options):
        turned = original(*args, **options)
        for tap, tensor in zip(("q_rope", "k_rope"), turned, strict=True):
            self.keep(f"{self.inside}.{tap}", tensor)  # (1, T, heads, H)
        return turned

    def _softmax(self, original, scores, *args, **options):
        probs = original(scores, *args, **options)
        if self.inside is not None:  # float32 both: Meta widens before, and narrows afterwards
            self.keep(f"{self.inside}.scores", scores, axis=2)  # (1, heads, T, S)
            self.keep(f"{self.inside}.probs", probs, axis=2)
        return probs

    def keep(self, name, tensor, axis=1):
        """Add a call's tensor; a copy, as a later operation may write in place."""
        self.calls.setdefault(name, []).append((tensor.detach().clone().cpu(), axis))

    def arrays(self):
        """The calls joined along the positions; what early queries could not see yet is masked."""
        return {name: joined(name, calls) for name, calls in self.calls.items()}

    def save(self, path, ids, prefill=None, **metadata):
        """Write a .safetensors file. ids: all of them; prefill: how many went into call one."""
        metadata = {
            "ids": list(ids),
            "prefill": prefill or len(ids),
            "dtype": str(next(self.model.parameters()).dtype).removeprefix("torch."),
            "implementation": "Meta llama/model.py",
            **metadata,
        }
        save_file(self.arrays(), path, {"llama3np": json.dumps(metadata)})


def joined(name, calls):
    """One tensor of several calls' tensors, each with the axis of its positions."""
    tensors, axis = [tensor for tensor, _ in calls], calls[0][1]
    if name.endswith((".scores", ".probs")):
        hidden = float("-inf") if name.endswith(".scores") else 0.0
        S = max(tensor.shape[-1] for tensor in tensors)
        pad = torch.nn.functional.pad
        tensors = [pad(t, (0, S - t.shape[-1]), value=hidden) for t in tensors]
    return torch.cat(tensors, axis).contiguous()

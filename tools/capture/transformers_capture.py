"""Capture what a Llama in transformers computes, for `llama3np compare` and `llama3np diagnose`.

Copy this file next to your code; it needs torch, transformers 5 and safetensors. Either

    python transformers_capture.py MODEL --prompt-ids 1,2,3 -o candidate.safetensors

or, in your own script, around your own calls (with attention "eager": the other kinds never hold
scores or probabilities in memory):

    with Capture(model) as capture:
        model(torch.tensor([ids]))
    capture.save("candidate.safetensors", ids)

Arrays are called as the modules are, with `.output`, or `.input` where no module puts it out.
What has no module is `self_attn.q_rope`, `.k_rope`, `.scores` and `.probs`. Values are those that
the model itself computed, in its own dtype; nothing is computed again here.
"""

import argparse
import contextlib
import json
import sys
from unittest import mock

import torch
from safetensors.torch import save_file

# What only the next module sees: the mixed heads, silu(gate) * up, the stream amid a block.
INPUTS = ("o_proj", "down_proj", "post_attention_layernorm")


class Capture(contextlib.ExitStack):
    """While entered, keeps what each call of the model shows: one sequence, one or more calls."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        self.calls = {}  # name -> (tensor, axis of positions) of each call
        self.inside = None  # the name of the attention module that is running

    def __enter__(self):
        blocks = set(self.model.model.layers)
        for name, module in self.model.named_modules():
            if name.endswith("self_attn"):
                self._hook_attention(name, module)
            elif module in blocks or "weight" in dict(module.named_parameters(recurse=False)):
                self._hook(name, module)
        code = sys.modules[type(self.model.model.layers[0].self_attn).__module__]
        self._replace(code, "apply_rotary_pos_emb", self._rope)
        self._replace(torch.nn.functional, "softmax", self._softmax)
        return self

    def _hook(self, name, module):
        if name.endswith(INPUTS):
            before = module.register_forward_pre_hook(
                lambda _, args: self.keep(f"{name}.input", args[0], axis=1)
            )
            self.callback(before.remove)
        after = module.register_forward_hook(
            lambda _, args, out: self.keep(f"{name}.output", out, axis=1)
        )
        self.callback(after.remove)

    def _hook_attention(self, name, module):
        def enter(*_):
            self.inside = name

        def leave(_, args, out):
            self.keep(f"{name}.probs", out[1], axis=2)
            self.inside = None

        self.callback(module.register_forward_pre_hook(enter).remove)
        self.callback(module.register_forward_hook(leave).remove)

    def _replace(self, owner, name, wrapper):
        """Let a function without a module pass through `wrapper`, which is given the function."""
        original = getattr(owner, name)

        def wrapped(*args, **options):
            return wrapper(original, *args, **options)

        self.enter_context(mock.patch.object(owner, name, wrapped))

    def _rope(self, original, *args, **options):
        turned = original(*args, **options)
        for tap, tensor in zip(("q_rope", "k_rope"), turned, strict=True):
            self.keep(f"{self.inside}.{tap}", tensor, axis=2)  # (1, heads, T, H)
        return turned

    def _softmax(self, original, scores, *args, **options):
        if self.inside is not None:
            self.keep(f"{self.inside}.scores", scores, axis=2)
        return original(scores, *args, **options)

    def keep(self, name, tensor, axis):
        """Add a call's tensor; anything but a tensor (what other modules return) is passed over."""
        if isinstance(tensor, torch.Tensor):
            # A copy: a later operation may write in place, and files refuse shared memory.
            self.calls.setdefault(name, []).append((tensor.detach().clone().cpu(), axis))

    def arrays(self):
        """The calls joined along the positions; what early queries could not see yet is masked."""
        return {name: joined(name, calls) for name, calls in self.calls.items()}

    def save(self, path, ids, prefill=None, only=None, **metadata):
        """Write a .safetensors file. ids: all of them; prefill: how many went into the first call.

        only: a function of a name, to keep part of the arrays.
        """
        kept = {name: a for name, a in self.arrays().items() if only is None or only(name)}
        metadata = {
            "ids": list(ids),
            "prefill": prefill or len(ids),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "implementation": f"transformers {sys.modules['transformers'].__version__}",
            **metadata,
        }
        save_file(kept, path, {"llama3np": json.dumps(metadata)})


def joined(name, calls):
    """One tensor of several calls' tensors, each with the axis of its positions."""
    tensors, axis = [tensor for tensor, _ in calls], calls[0][1]
    if name.endswith((".scores", ".probs")):
        hidden = float("-inf") if name.endswith(".scores") else 0.0
        S = max(tensor.shape[-1] for tensor in tensors)
        pad = torch.nn.functional.pad
        tensors = [pad(t, (0, S - t.shape[-1]), value=hidden) for t in tensors]
    return torch.cat(tensors, axis)


def run(model, ids, prefill=None):
    """All ids in one call; or `prefill` of them, then one at a time through the cache."""
    prefill = len(ids) if prefill is None else prefill
    cache = None
    with torch.no_grad():
        for part in (ids[:prefill], *([each] for each in ids[prefill:])):
            out = model(torch.tensor([part]), past_key_values=cache, use_cache=True)
            cache = out.past_key_values


def main():
    import transformers

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", help="a directory, or a name that transformers knows")
    parser.add_argument("--prompt-ids", required=True, help="such as 1,2,3")
    parser.add_argument("--prefill", type=int, help="so many ids in the first call, then one each")
    parser.add_argument("--dtype", default="float32", help="float32, bfloat16 or float16")
    parser.add_argument("-o", "--out", required=True, help="a .safetensors file")
    args = parser.parse_args()
    ids = [int(part) for part in args.prompt_ids.split(",")]
    model = transformers.AutoModelForCausalLM.from_pretrained(
        args.model, dtype=args.dtype, attn_implementation="eager"
    )
    with Capture(model) as capture:
        run(model, ids, args.prefill)
    capture.save(args.out, ids, args.prefill)


if __name__ == "__main__":
    main()

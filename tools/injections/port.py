"""The models that mistakes are made in: transformers' Llama, with eager attention."""

from __future__ import annotations

import contextlib
from pathlib import Path
from unittest import mock

import torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.models.llama import modeling_llama

MADE_UP = {  # name -> what differs from the others
    "made-up-8": {"factor": 8.0, "eps": 1e-5, "layers": 12},
    "made-up-32": {"factor": 32.0, "eps": 1e-6, "layers": 3},
}


class Port(contextlib.ExitStack):
    """One run to be: the model, the ids it is fed, and how many of them in the first call.

    `replace` undoes itself when the run is over; the weights are read anew for each run.
    """

    def __init__(self, path, ids, prefill=None, dtype="float32"):
        super().__init__()
        self.llm = LlamaForCausalLM.from_pretrained(path, attn_implementation="eager")
        self.model, self.config, self.code = self.llm.model, self.llm.config, modeling_llama
        self.layers, self.ids, self.prefill = self.model.layers, list(ids), prefill
        self.dtype = getattr(torch, dtype)

    def round(self):
        """Round the weights to the run's dtype; RoPE's frequencies, which are no weights, stay."""
        for w in self.llm.parameters():
            w.data = w.data.to(self.dtype)

    def replace(self, owner, name, new):
        """Put `new` in an attribute's place for as long as the run lasts."""
        self.enter_context(mock.patch.object(owner, name, new))

    def wrap(self, owner, name, wrapper):
        """Let a function of `owner` become wrapper(function, *args)."""
        function = getattr(owner, name)
        self.replace(owner, name, lambda *args, **options: wrapper(function, *args, **options))

    @property
    def norms(self):
        """Every RMSNorm of the model."""
        return [m for m in self.llm.modules() if isinstance(m, modeling_llama.LlamaRMSNorm)]


def made_up(name):
    """A small Llama 3.1 with random weights: scaled RoPE, an untied head, norms that are not 1."""
    traits, D, H, N, K, F, V = MADE_UP[name], 96, 32, 4, 2, 160, 256
    rope = {"rope_type": "llama3", "factor": traits["factor"], "rope_theta": 500000.0}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = LlamaConfig(
        vocab_size=V, hidden_size=D, intermediate_size=F, num_hidden_layers=traits["layers"],
        num_attention_heads=N, num_key_value_heads=K, head_dim=H, rms_norm_eps=traits["eps"],
        max_position_embeddings=131072, tie_word_embeddings=False,
        rope_parameters=rope | {"original_max_position_embeddings": 8192},
    )  # fmt: skip
    torch.manual_seed(len(name))
    llm = LlamaForCausalLM(config)
    for tensor_name, w in llm.named_parameters():
        spread = {"norm": 0.2, "embed": 0.5, "q_proj": 1.5, "k_proj": 1.5}
        factor = next((s for part, s in spread.items() if part in tensor_name), 1.0)
        fan_in = w.shape[-1] if w.ndim == 2 and "embed" not in tensor_name else 1
        w.data = factor * fan_in**-0.5 * torch.randn_like(w) + (1.0 if w.ndim == 1 else 0.0)
    return llm


def write_made_up(folder):
    """Write the made-up models as Hugging Face directories; return {name: path}."""
    paths = {name: Path(folder) / name for name in MADE_UP}
    for name, path in paths.items():
        made_up(name).save_pretrained(path)
    return paths

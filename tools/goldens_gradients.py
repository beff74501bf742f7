"""Gradients by torch's autograd through transformers' Llama: tests/goldens/gradients.npz.

    PYTHONPATH=. PEERS/python tools/goldens_gradients.py      PEERS has torch and transformers

Two small models, tied and not, groups of 2 and of 3 heads, with Llama 3's RoPE scaling in one, and
ragged batches. In the file, by case: `config` (JSON), `ids`, `targets`, `weights`, `loss`,
`w.NAME` (float32) and `d.NAME` (float32, of sum weights * -ln p), NAME as in params.named_shapes.
"""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from transformers import LlamaForCausalLM

from llama3np.config import Config, RopeScaling
from llama3np.load.huggingface import save_hf
from llama3np.load.names import foreign
from llama3np.params import named, random

OUT = Path(__file__).parent.parent / "tests" / "goldens" / "gradients.npz"
SCALING = RopeScaling(8.0, 1.0, 4.0, 16)
CASES = {
    "tied": Config(16, 2, 4, 2, 6, 20, 23, rope_pairing="half", tied=True),
    "scaled": Config(
        12, 3, 6, 2, 4, 18, 19, norm_eps=1e-5, rope_pairing="half", rope_scaling=SCALING
    ),
}


def case(config: Config, seed: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    params = random(config, rng)
    ids_BT, targets_BT = rng.integers(0, config.vocab_size, (2, 3, 24))
    real_BT = np.arange(24) < np.array([[24], [17], [5]])
    weights_BT = (rng.random((3, 24)) * real_BT).astype(np.float32)
    weights_BT /= weights_BT.sum()
    tensors = named(params, config.tied)
    with tempfile.TemporaryDirectory() as folder:
        save_hf(Path(folder) / "hf", config, params)
        model = LlamaForCausalLM.from_pretrained(
            Path(folder) / "hf", dtype=torch.float32, attn_implementation="eager"
        )
    logits = model(input_ids=torch.tensor(ids_BT), use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), torch.tensor(targets_BT), reduction="none"
    )
    loss = (losses * torch.tensor(weights_BT)).sum()
    loss.backward()
    theirs = dict(model.named_parameters())
    grads = {name: theirs[foreign(name, "huggingface")].grad.numpy() for name in tensors}
    return {
        "config": np.array(json.dumps(asdict(config))),
        **{"ids": ids_BT, "targets": targets_BT, "weights": weights_BT},
        "loss": loss.detach().numpy(),
        **{f"w.{name}": w for name, w in tensors.items()},
        **{f"d.{name}": grad for name, grad in grads.items()},
    }


if __name__ == "__main__":
    arrays = {
        f"{name}/{key}": array
        for seed, (name, config) in enumerate(CASES.items())
        for key, array in case(config, seed).items()
    }
    np.savez_compressed(OUT, **arrays)
    print(f"{OUT.name}: {OUT.stat().st_size} bytes, torch {torch.__version__}")

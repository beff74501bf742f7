"""Adapters by PEFT, and their gradients by torch's autograd: tests/goldens/lora.npz.

    PYTHONPATH=. PEERS/python tools/goldens_lora.py      PEERS has torch, transformers and peft

Two small models: one with adapters of all seven matrices, one with rsLoRA of q and v alone, with
Llama 3's RoPE scaling. In the file, by case: `config` (JSON), `ids`, `targets`, `weights`, `loss`,
`w.NAME` (float32, NAME as in params.named_shapes), `settings` (adapter_config.json as PEFT wrote
it), and by PEFT's own names `t.NAME`, the tensors of its adapter_model.safetensors, `d.NAME`, their
gradients of sum weights * -ln p, and `m.NAME`, the weights of merge_and_unload. All float32.

It also has PEFT open the same adapters as this package writes them, and compares the losses.
"""

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import numpy as np
import peft
import torch
from safetensors.numpy import load_file
from transformers import LlamaForCausalLM

from llama3np.config import Config, RopeScaling
from llama3np.load import adapters, safetensors
from llama3np.load.huggingface import save_hf
from llama3np.params import named, random

OUT = Path(__file__).parent.parent / "tests" / "goldens" / "lora.npz"
MODULES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
CASES = {
    "all": (
        Config(12, 2, 4, 2, 6, 14, 19, rope_pairing="half", tied=True),
        {"r": 3, "lora_alpha": 6, "target_modules": MODULES},
    ),
    "rslora": (
        Config(12, 2, 3, 3, 6, 10, 17, 1e-5, 5e5, RopeScaling(8.0, 1.0, 4.0, 16), "half"),
        {"r": 4, "lora_alpha": 5, "target_modules": ["q_proj", "v_proj"], "use_rslora": True},
    ),
}


def opened(folder: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    )


def loss_of(model, ids_BT, targets_BT, weights_BT):
    logits = model(input_ids=torch.tensor(ids_BT), use_cache=False).logits
    losses = torch.nn.functional.cross_entropy(
        logits.transpose(1, 2), torch.tensor(targets_BT), reduction="none"
    )
    return (losses * torch.tensor(weights_BT)).sum()


def written_here(folder: Path, config: Config, base: Path) -> Path:
    """What PEFT wrote into a folder, read and written again by this package."""
    found, again = adapters.read(folder, config), folder.with_name("again")
    again.mkdir()
    told = adapters.settings(found, str(base))
    (again / adapters.SETTINGS).write_text(json.dumps(told))
    safetensors.write(again / adapters.WEIGHTS, adapters.tensors(found, config))
    return again


def case(config: Config, options: dict, seed: int) -> dict[str, np.ndarray]:
    rng, folder = np.random.default_rng(seed), Path(tempfile.mkdtemp())
    torch.manual_seed(seed)
    params = random(config, rng)
    ids_BT, targets_BT = rng.integers(0, config.vocab_size, (2, 3, 20))
    real_BT = np.arange(20) < np.array([[20], [13], [4]])
    weights_BT = (rng.random((3, 20)) * real_BT).astype(np.float32)
    batch = ids_BT, targets_BT, weights_BT / weights_BT.sum()
    save_hf(folder / "hf", config, params)
    model = peft.get_peft_model(opened(folder / "hf"), peft.LoraConfig(**options))
    trained = {name: w for name, w in model.named_parameters() if w.requires_grad}
    with torch.no_grad():
        for w in trained.values():
            w += 0.2 * torch.randn(w.shape)  # B begins at zero, and would hide what A gets
    loss = loss_of(model, *batch)
    loss.backward()
    model.save_pretrained(folder / "adapter")
    again = written_here(folder / "adapter", config, folder / "hf")
    other = peft.PeftModel.from_pretrained(opened(folder / "hf"), again)
    apart = abs(loss_of(other, *batch).item() - loss.item())
    print(f"loss {loss.item():.6f}; of the adapters as written here: off by {apart:.1e}")
    merged = model.merge_and_unload().named_parameters()
    return {
        "config": np.array(json.dumps(asdict(config))),
        **dict(zip(("ids", "targets", "weights"), batch, strict=True)),
        "loss": loss.detach().numpy(),
        "settings": np.array((folder / "adapter" / adapters.SETTINGS).read_text()),
        **{f"w.{name}": w for name, w in named(params, config.tied).items()},
        **{f"t.{name}": w for name, w in load_file(folder / "adapter" / adapters.WEIGHTS).items()},
        **{f"d.{n.replace('.default', '')}": w.grad.numpy() for n, w in trained.items()},
        **{f"m.{name}": w.detach().numpy() for name, w in merged if "_proj" in name},
    }


if __name__ == "__main__":
    arrays = {
        f"{name}/{key}": array
        for seed, (name, (config, options)) in enumerate(CASES.items())
        for key, array in case(config, options, seed).items()
    }
    np.savez_compressed(OUT, **arrays)
    print(f"{OUT.name}: {OUT.stat().st_size} bytes, torch {torch.__version__}, {peft.__version__}")

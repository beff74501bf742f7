"""Write tests/goldens/optimizer.npz: updates of torch.optim.AdamW after clip_grad_norm_.

Run by hand with torch installed (2.13.0 wrote the committed file), from the repository's root:

    python tools/goldens_optimizer.py tests/goldens

Arrays: rates_U of U updates; for each tensor NAME its beginning NAME, gradients NAME_grads (U, ...)
and values after each update, NAME_float32 and NAME_float64; norms_float64 of the gradients.
"""

import sys
from pathlib import Path

import numpy as np
import torch

UPDATES = 12
BETAS, EPSILON, DECAY, LIMIT = (0.9, 0.95), 1e-8, 0.1, 1.0
SHAPES = {"wide": (5, 7), "tall": (9, 2), "norm": (6,)}


def made_up(rng):
    """Weights and gradients: half of the gradients are longer than the limit, some are zeros."""
    arrays = {}
    for name, shape in SHAPES.items():
        arrays[name] = rng.standard_normal(shape).astype(np.float32)
        grads = rng.standard_normal((UPDATES, *shape)) * np.geomspace(1e-3, 3, UPDATES).reshape(
            -1, *[1] * len(shape)
        )
        grads[:, 0] = 0  # an embedding of a token that is not in the batch
        arrays[f"{name}_grads"] = grads.astype(np.float32)
    return arrays | {"rates_U": np.geomspace(1e-2, 1e-4, UPDATES)}


def updated(arrays, dtype):
    """The tensors after each update, and the length of each gradient before it was cut."""
    tensors = {name: torch.nn.Parameter(torch.tensor(arrays[name], dtype=dtype)) for name in SHAPES}
    matrices = [tensors[name] for name, shape in SHAPES.items() if len(shape) == 2]
    groups = [
        {"params": matrices, "weight_decay": DECAY},
        {"params": [tensors["norm"]], "weight_decay": 0.0},
    ]
    adam = torch.optim.AdamW(groups, betas=BETAS, eps=EPSILON)
    values, norms = {name: [] for name in SHAPES}, []
    for i, rate in enumerate(arrays["rates_U"]):
        for group in adam.param_groups:
            group["lr"] = float(rate)
        for name, tensor in tensors.items():
            tensor.grad = torch.tensor(arrays[f"{name}_grads"][i], dtype=dtype)
        norms.append(torch.nn.utils.clip_grad_norm_(tensors.values(), LIMIT).item())
        adam.step()
        for name, tensor in tensors.items():
            values[name].append(tensor.detach().numpy().copy())
    return {name: np.stack(found) for name, found in values.items()}, norms


def main():
    arrays = made_up(np.random.default_rng(7))
    for dtype in (torch.float32, torch.float64):
        values, norms = updated(arrays, dtype)
        word = str(dtype).removeprefix("torch.")
        arrays |= {f"{name}_{word}": found for name, found in values.items()}
    np.savez_compressed(Path(sys.argv[1]) / "optimizer.npz", **arrays, norms_float64=norms)


if __name__ == "__main__":
    main()

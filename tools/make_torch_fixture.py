"""Write tests/goldens/torch_views.pth and .json: tensors that PyTorch stores in unusual ways.

Run by hand with torch installed (2.13.0 wrote the committed files), from the repository's root:

    python tools/make_torch_fixture.py tests/goldens
"""

import json
import sys
from collections import OrderedDict
from pathlib import Path

import torch


def tensors():
    whole = torch.arange(24, dtype=torch.float32).reshape(4, 6) / 8
    halves = torch.linspace(-3, 3, 20).to(torch.bfloat16)
    state = OrderedDict(
        {
            "whole": whole,
            "transposed": whole.t(),  # the same storage, other strides
            "columns": whole[:, 1:5:2],  # an offset, and a stride of two
            "last_row": whole[3],
            "parameter": torch.nn.Parameter(whole[1:3]),
            "bf16": halves,
            "bf16_part": halves[5:15].reshape(2, 5).t(),
            "f16": torch.tensor([[1.5, -2.0, 65504.0]], dtype=torch.float16),
            "special": torch.tensor([float("inf"), -0.0, 1e-40], dtype=torch.bfloat16),
            "empty": torch.zeros(0, 3),
            "scalar": torch.tensor(2.5),
        }
    )
    state._metadata = OrderedDict({"": {"version": 1}})  # as a module's state_dict has
    return state


def told(tensor):
    return {"dtype": str(tensor.dtype).removeprefix("torch."), "values": tensor.tolist()}


def main(folder):
    state = tensors()
    torch.save(state, folder / "torch_views.pth")
    expected = {name: told(tensor.detach()) for name, tensor in state.items()}
    text = json.dumps({"torch": torch.__version__, "tensors": expected}, indent=1) + "\n"
    (folder / "torch_views.json").write_text(text, encoding="utf-8")


main(Path(sys.argv[1]))

"""The model of bench_train.py in PyTorch, eager, float32: the same steps from the same weights.

    PEERS/python tools/peer_torch_train.py FOLDER      prints one JSON object

FOLDER holds task.json and arrays.npz, as bench_train.py writes them. Attention is torch's fused
scaled_dot_product_attention, or in plain operations with "attention": "plain" in the task.
"""

import json
import math
import sys
import time
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional


def status_bytes(key):
    """Of /proc/self/status: VmRSS, the memory in use, or VmHWM, its peak since the start."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


BASE = status_bytes("VmRSS")  # after the imports


def rms_norm(x, w, eps):
    return x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps) * w


def rope(x_BTNH, cos_T1P, sin_T1P):
    a, b = x_BTNH.chunk(2, -1)
    return torch.cat([a * cos_T1P - b * sin_T1P, a * sin_T1P + b * cos_T1P], -1)


class Model:
    def __init__(self, task, tensors):
        self.c, self.w = task["config"], tensors
        T, H = task["context"], self.c["head_dim"]
        freq_P = 1 / self.c["rope_theta"] ** (torch.arange(0, H, 2) / H)
        angles_T1P = torch.arange(T)[:, None, None] * freq_P
        self.cos_T1P, self.sin_T1P = angles_T1P.cos(), angles_T1P.sin()
        self.mask_TT = torch.full((T, T), -math.inf).triu(1)
        self.attend = self.plain if task["attention"] == "plain" else self.fused

    def fused(self, q, k, v):
        return functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    def plain(self, q_BNTH, k_BKTH, v_BKTH):
        groups = q_BNTH.shape[1] // k_BKTH.shape[1]
        k, v = (x.repeat_interleave(groups, 1) for x in (k_BKTH, v_BKTH))
        scores = q_BNTH @ k.transpose(2, 3) * q_BNTH.shape[-1] ** -0.5 + self.mask_TT
        return torch.softmax(scores, -1) @ v

    def heads(self, x_BTD, w):
        return functional.linear(x_BTD, w).view(*x_BTD.shape[:2], -1, self.c["head_dim"])

    def block(self, h, i):
        w = {name: self.w[f"layers.{i}.{name}"] for name in NAMES}
        x = rms_norm(h, w["attn_norm_D"], self.c["norm_eps"])
        q, k = (rope(self.heads(x, w[name]), self.cos_T1P, self.sin_T1P) for name in ("wq", "wk"))
        q, k, v = (y.transpose(1, 2) for y in (q, k, self.heads(x, w["wv"])))
        attn = self.attend(q, k, v).transpose(1, 2).reshape(*h.shape[:2], -1)
        h = h + functional.linear(attn, w["wo"])
        y = rms_norm(h, w["mlp_norm_D"], self.c["norm_eps"])
        gate, up = (functional.linear(y, w[name]) for name in ("w_gate", "w_up"))
        return h + functional.linear(functional.silu(gate) * up, w["w_down"])

    def loss(self, ids_BT, targets_BT):
        h = functional.embedding(ids_BT, self.w["embed_VD"])
        for i in range(self.c["n_layers"]):
            h = self.block(h, i)
        norm = rms_norm(h, self.w["norm_D"], self.c["norm_eps"])
        logits = functional.linear(norm, self.w["embed_VD"])
        return functional.cross_entropy(logits.flatten(0, 1), targets_BT.flatten())


NAMES = ("attn_norm_D", "wq", "wk", "wv", "wo", "mlp_norm_D", "w_gate", "w_up", "w_down")


def main(folder):
    task = json.loads((folder / "task.json").read_text())
    torch.set_num_threads(task["threads"])
    arrays = np.load(folder / "arrays.npz")
    windows_SBT = torch.tensor(arrays["windows"])
    tensors = {
        name[2:]: torch.nn.Parameter(torch.tensor(arrays[name]))
        for name in arrays.files
        if name.startswith("w.")
    }
    model, s = Model(task, tensors), task["adam"]
    matrices = [w for w in tensors.values() if w.dim() == 2]
    vectors = [w for w in tensors.values() if w.dim() == 1]
    groups = [
        {"params": matrices, "weight_decay": s["decay"]},
        {"params": vectors, "weight_decay": 0.0},
    ]
    betas = s["beta1"], s["beta2"]
    adam = torch.optim.AdamW(groups, lr=task["rate"], betas=betas, eps=s["epsilon"], fused=True)
    losses, seconds = [], []
    for window_BT in windows_SBT:
        start = time.perf_counter()
        loss = model.loss(window_BT[:, :-1], window_BT[:, 1:])
        adam.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(list(tensors.values()), task["clip"])
        adam.step()
        seconds.append(time.perf_counter() - start)
        losses.append(loss.item())
    peak = status_bytes("VmHWM")
    found = {"losses": losses, "seconds": seconds, "base": BASE, "peak": peak}
    print(json.dumps(found | {"version": torch.__version__}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))

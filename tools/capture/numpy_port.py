"""A small Llama in NumPy with one mistake in it: the worked example of docs/crosscheck.md.

    python numpy_port.py MODEL_DIR --prompt-ids 1,2,3 -o candidate.npz

MODEL_DIR is a Hugging Face directory in float32. Written as a port might be: whole matrices, no
cache, half-split RoPE, and a constant that should have been read from config.json.
"""

import argparse
import json
from pathlib import Path

import numpy as np
from numpy_capture import save, tap
from safetensors.numpy import load_file

THETA = 10000.0


def rms_norm(x, weight, eps):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * weight


def rope(x):
    """Turn pairs (i, i + H/2) of (T, heads, H) by position * theta^(-2i/H)."""
    T, _, H = x.shape
    angles = np.arange(T)[:, None] * THETA ** (-np.arange(0, H, 2) / H)
    cos, sin = (f(angles).astype(np.float32)[:, None] for f in (np.cos, np.sin))
    a, b = x[..., : H // 2], x[..., H // 2 :]
    return np.concatenate((a * cos - b * sin, a * sin + b * cos), axis=-1)


def softmax(x):
    powers = np.exp(x - x.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def attention(x, w, config, name):
    T, K = len(x), config["num_key_value_heads"]
    q, k, v = (x @ w[f"{name}.{p}_proj.weight"].T for p in "qkv")
    H = q.shape[-1] // config["num_attention_heads"]
    q, k, v = (
        tap(f"{name}.{p}_proj", y.reshape(T, -1, H)) for p, y in zip("qkv", (q, k, v), strict=True)
    )
    q, k = tap(f"{name}.q_rope", rope(q)), tap(f"{name}.k_rope", rope(k))
    k, v = (np.repeat(y, q.shape[1] // K, axis=1) for y in (k, v))
    scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(np.float32(H))
    scores = tap(f"{name}.scores", np.where(np.tri(T, dtype=bool), scores, -np.inf))
    probs = tap(f"{name}.probs", softmax(scores))
    return np.einsum("nts,snh->tnh", probs, v).reshape(T, -1) @ w[f"{name}.o_proj.weight"].T


def feed_forward(x, w, name):
    gate, up = (x @ w[f"{name}.{p}_proj.weight"].T for p in ("gate", "up"))
    return (gate / (1 + np.exp(-gate)) * up) @ w[f"{name}.down_proj.weight"].T


def forward(w, config, ids):
    eps = config["rms_norm_eps"]
    x = tap("model.embed_tokens", w["model.embed_tokens.weight"][ids])
    for i in range(config["num_hidden_layers"]):
        name = f"model.layers.{i}"
        y = tap(f"{name}.input_layernorm", rms_norm(x, w[f"{name}.input_layernorm.weight"], eps))
        x = x + attention(y, w, config, f"{name}.self_attn")
        y = rms_norm(x, w[f"{name}.post_attention_layernorm.weight"], eps)
        x = tap(name, x + feed_forward(y, w, f"{name}.mlp"))
    x = tap("model.norm", rms_norm(x, w["model.norm.weight"], eps))
    return tap("lm_head", x @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a Hugging Face directory")
    parser.add_argument("--prompt-ids", required=True, help="such as 1,2,3")
    parser.add_argument("-o", "--out", required=True, help="an .npz file")
    args = parser.parse_args()
    ids = [int(part) for part in args.prompt_ids.split(",")]
    config = json.loads((args.model / "config.json").read_text())
    forward(load_file(args.model / "model.safetensors"), config, ids)
    save(args.out, ids)


if __name__ == "__main__":
    main()

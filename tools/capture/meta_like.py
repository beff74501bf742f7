"""A stand-in for Meta's llama/model.py, which wants fairscale and a CUDA device to be imported.

Written for a check of meta_capture.py from what is documented of it: names of modules, signatures
(forward(tokens, start_pos), apply_rotary_emb(xq, xk, freqs_cis)), shapes, and where it rounds. No
line of it is Meta's. Run it as

    python meta_like.py META_DIR --prompt-ids 1,2,3 -o candidate.safetensors
"""

import argparse
import json
from pathlib import Path

import torch
from meta_capture import Capture
from torch import nn
from torch.nn import functional as F


def apply_rotary_emb(xq, xk, freqs_cis):
    """Both (1, T, heads, H); freqs_cis (T, H/2) complex."""

    def turned(x):
        pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
        return torch.view_as_real(pairs * freqs_cis[None, :, None]).flatten(-2).to(x.dtype)

    return turned(xq), turned(xk)


class RMSNorm(nn.Module):
    def __init__(self, dim, eps):
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x):
        wide = x.float()
        scale = torch.rsqrt((wide * wide).mean(-1, keepdim=True) + self.eps)
        return (wide * scale).to(x.dtype) * self.weight


class Attention(nn.Module):
    def __init__(self, dim, n_heads, n_kv_heads):
        super().__init__()
        self.head_dim, self.n_rep = dim // n_heads, n_heads // n_kv_heads
        rows = n_kv_heads * self.head_dim
        self.wq, self.wo = nn.Linear(dim, dim, bias=False), nn.Linear(dim, dim, bias=False)
        self.wk, self.wv = nn.Linear(dim, rows, bias=False), nn.Linear(dim, rows, bias=False)
        self.cache_k = self.cache_v = None

    def forward(self, x, start_pos, freqs_cis, mask):
        split = (*x.shape[:2], -1, self.head_dim)
        xq, xk, xv = (w(x).view(split) for w in (self.wq, self.wk, self.wv))
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis=freqs_cis)
        old = start_pos and (self.cache_k, self.cache_v)
        keys, values = (
            (torch.cat((o, n), 1) for o, n in zip(old, (xk, xv), strict=True)) if old else (xk, xv)
        )
        self.cache_k, self.cache_v = keys, values
        queries = xq.transpose(1, 2)
        keys, values = (
            x.repeat_interleave(self.n_rep, dim=2).transpose(1, 2) for x in (keys, values)
        )
        scores = torch.matmul(queries, keys.transpose(2, 3)) / self.head_dim**0.5
        scores = scores if mask is None else scores + mask
        scores = F.softmax(scores.float(), dim=-1).type_as(xq)
        return self.wo(torch.matmul(scores, values).transpose(1, 2).flatten(2))


class FeedForward(nn.Module):
    def __init__(self, dim, hidden_dim):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x):
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class TransformerBlock(nn.Module):
    def __init__(self, args, hidden_dim):
        super().__init__()
        self.attention = Attention(args["dim"], args["n_heads"], args["n_kv_heads"])
        self.feed_forward = FeedForward(args["dim"], hidden_dim)
        self.attention_norm = RMSNorm(args["dim"], args["norm_eps"])
        self.ffn_norm = RMSNorm(args["dim"], args["norm_eps"])

    def forward(self, x, start_pos, freqs_cis, mask):
        h = x + self.attention(self.attention_norm(x), start_pos, freqs_cis, mask)
        return h + self.feed_forward(self.ffn_norm(h))


class Transformer(nn.Module):
    def __init__(self, args, weights):
        super().__init__()
        vocab, dim = weights["tok_embeddings.weight"].shape
        hidden_dim = len(weights["layers.0.feed_forward.w1.weight"])
        self.tok_embeddings = nn.Embedding(vocab, dim)
        blocks = (TransformerBlock(args, hidden_dim) for _ in range(args["n_layers"]))
        self.layers, self.norm = nn.ModuleList(blocks), RMSNorm(dim, args["norm_eps"])
        self.output = nn.Linear(dim, vocab, bias=False)
        H = dim // args["n_heads"]
        freqs = args.get("rope_theta", 10000.0) ** -(torch.arange(0, H, 2).float() / H)
        angles = torch.outer(torch.arange(2048).float(), freqs)
        self.freqs_cis = torch.polar(torch.ones_like(angles), angles)
        head = weights.get("output.weight", weights["tok_embeddings.weight"])  # absent if tied
        self.load_state_dict(
            {name: weights[name] for name in weights if name != "rope.freqs"}
            | {"output.weight": head}
        )

    @torch.inference_mode()
    def forward(self, tokens, start_pos):
        T = tokens.shape[1]
        h = self.tok_embeddings(tokens)
        mask = torch.full((T, T), float("-inf")).triu(1).type_as(h) if T > 1 else None
        for layer in self.layers:
            h = layer(h, start_pos, self.freqs_cis[start_pos : start_pos + T], mask)
        return self.output(self.norm(h)).float()


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="a directory with consolidated.00.pth")
    parser.add_argument("--prompt-ids", required=True, help="such as 1,2,3")
    parser.add_argument("--prefill", type=int, help="so many ids in the first call, then one each")
    parser.add_argument("-o", "--out", required=True, help="a .safetensors file")
    args = parser.parse_args()
    ids = [int(part) for part in args.prompt_ids.split(",")]
    weights = torch.load(args.model / "consolidated.00.pth", weights_only=True)
    model = Transformer(json.loads((args.model / "params.json").read_text()), weights)
    first = args.prefill or len(ids)
    with Capture(model) as capture:
        model.forward(torch.tensor([ids[:first]]), 0)
        for position in range(first, len(ids)):
            model.forward(torch.tensor([ids[position : position + 1]]), position)
    capture.save(args.out, ids, args.prefill)


if __name__ == "__main__":
    main()

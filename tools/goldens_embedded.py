"""Make what tests and `llama3np selftest` hold the embedded model against, by other programs.

    python tools/goldens_embedded.py        # needs torch, transformers 5, tokenizers, safetensors

Token ids: transformers' greedy `generate` (float32, eager attention, cache). Logits, intermediates
and likelihoods: a forward in float64 below, in torch's operations. Ids of texts: the tokenizers
library. Nothing of this package is imported. To be run again when weights/shakespeare changes;
it writes tests/goldens/embedded.json and embedded_arrays.npz, and the few of these numbers that
ship with the package. Any weights of a Llama without RoPE scaling will do: an answer ends where
the two largest logits are so near each other that a right float32 may choose either.
"""

from __future__ import annotations

import hashlib
import json
import platform
import re
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import load_file
from torch.nn.functional import embedding, linear, silu

ROOT = Path(__file__).resolve().parents[1]
MODEL = ROOT / "weights" / "shakespeare"
GOLDENS = ROOT / "tests" / "goldens"
SHIPPED = ROOT / "llama3np" / "data" / "shakespeare_goldens.json"

PROMPTS = {
    "line_break": "\n",
    "romeo": "ROMEO:",
    "to_be": "To be, or not to be",
    "lady": "LADY ANNE:\nWhat say you, my",
    "unseen": "Voilà: 世界 🙂",  # bytes that no English text has
}
NEW = 48  # tokens after each
EXACT = "to_be"  # the item whose logits are kept in float64
TRACED = "romeo"  # the item whose prompt's intermediates are kept
MARGIN = 2e-3  # between the two largest logits: float32 is wrong by a tenth of it at most
SHIPPED_ITEMS, SHIPPED_STEPS = ("line_break", "romeo"), 16
SCORED = (
    "The king is come, and with him all his lords;\nSo let us to the gate, and bid them welcome. "
    "If any man ask what we did this night,\nTell him we slept, and dreamt of better days.\n"
)
TEXTS = (
    *("", " ", "a", "ROMEO:\nWhat, ho!", "  two  spaces ", "tab\tand\r\nline", "it's o'er; 'tis"),
    *("1599, 12345", "naïve café", "漢字かな", "🙂🙂", "\x00\x7f\ufeff", "x" * 60, "\n" * 5),
)


# ---- the reference -------------------------------------------------------------------------------


class Reference:
    """The model in float64, angles included; takes one row of token ids without a cache."""

    def __init__(self, folder: Path):
        self.settings = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        assert not self.settings["rope_scaling"]
        stored = load_file(folder / "model.safetensors")
        self.weights = {name.removeprefix("model."): w.double() for name, w in stored.items()}
        self.taps: dict[str, torch.Tensor] = {}

    def logits(self, ids: list[int]) -> torch.Tensor:
        """Logits (T, V); all intermediates are in `taps` then, by the names of llama3np trace."""
        self.taps.clear()
        table_VD = self.weights["embed_tokens.weight"]
        x_TD = self.tap("embed", embedding(torch.tensor(ids), table_VD))
        for i in range(self.settings["num_hidden_layers"]):
            x_TD = self.block(f"layers.{i}.", x_TD)
        norm_TD = self.tap("norm", self.norm("norm.weight", x_TD))
        return self.tap("logits", linear(norm_TD, self.weights.get("lm_head.weight", table_VD)))

    def tap(self, name: str, found: torch.Tensor) -> torch.Tensor:
        self.taps[name] = found
        return found

    def norm(self, name: str, x_TD: torch.Tensor) -> torch.Tensor:
        w_D = self.weights[name]
        return torch.nn.functional.rms_norm(x_TD, w_D.shape, w_D, self.settings["rms_norm_eps"])

    def block(self, at: str, x_TD: torch.Tensor) -> torch.Tensor:
        w = {n.removeprefix(at): w for n, w in self.weights.items() if n.startswith(at)}
        a_TD = self.tap(at + "attn_norm", self.norm(at + "input_layernorm.weight", x_TD))
        heads_TC = self.attention(at, w, a_TD)
        out_TD = self.tap(at + "attn_out", linear(heads_TC, w["self_attn.o_proj.weight"]))
        mid_TD = self.tap(at + "h_mid", x_TD + out_TD)
        m_TD = self.tap(at + "mlp_norm", self.norm(at + "post_attention_layernorm.weight", mid_TD))
        gate_TF = self.tap(at + "gate", linear(m_TD, w["mlp.gate_proj.weight"]))
        up_TF = self.tap(at + "up", linear(m_TD, w["mlp.up_proj.weight"]))
        act_TF = self.tap(at + "act", silu(gate_TF) * up_TF)
        down_TD = self.tap(at + "mlp_out", linear(act_TF, w["mlp.down_proj.weight"]))
        return self.tap(at + "h", mid_TD + down_TD)

    def attention(self, at: str, w: dict[str, torch.Tensor], a_TD: torch.Tensor) -> torch.Tensor:
        T, H = len(a_TD), self.settings["head_dim"]
        q_TNH, k_TKH, v_TKH = (
            linear(a_TD, w[f"self_attn.{name}_proj.weight"]).reshape(T, -1, H) for name in "qkv"
        )
        turned = {"q_rope": self.turned(q_TNH), "k_rope": self.turned(k_TKH)}
        for name, x_TNH in {"q": q_TNH, "k": k_TKH, "v": v_TKH, **turned}.items():
            pairs_TNP2 = x_TNH.reshape(T, -1, 2, H // 2).mT  # shown interleaved, values as they are
            self.tap(at + name, x_TNH if name == "v" else pairs_TNP2.reshape(T, -1, H))
        group = q_TNH.shape[1] // k_TKH.shape[1]
        k_TNH, v_TNH = (x.repeat_interleave(group, 1) for x in (turned["k_rope"], v_TKH))
        raw_NTS = torch.einsum("tnh,snh->nts", turned["q_rope"], k_TNH) / H**0.5
        hidden_TS = torch.ones(T, T, dtype=torch.bool).triu(1)
        scores_NTS = self.tap(at + "scores", raw_NTS.masked_fill(hidden_TS, -torch.inf))
        probs_NTS = self.tap(at + "probs", scores_NTS.softmax(-1))
        attn_TNH = self.tap(at + "attn", torch.einsum("nts,snh->tnh", probs_NTS, v_TNH))
        return attn_TNH.reshape(T, -1)

    def turned(self, x_TNH: torch.Tensor) -> torch.Tensor:
        """RoPE as Hugging Face's files pair it, by complex numbers."""
        T, _, H = x_TNH.shape
        freq_P = self.settings["rope_theta"] ** (-torch.arange(0, H, 2, dtype=torch.float64) / H)
        angle_TP = torch.arange(T, dtype=torch.float64)[:, None] * freq_P
        pair_TNP = torch.complex(x_TNH[..., : H // 2], x_TNH[..., H // 2 :])
        turned_TNP = pair_TNP * torch.polar(torch.ones_like(angle_TP), angle_TP)[:, None]
        return torch.cat([turned_TNP.real, turned_TNP.imag], -1)


# ---- goldens -------------------------------------------------------------------------------------


def item(name: str, reference: Reference, model: Any, tokenizer: Any) -> dict[str, Any]:
    """Greedy ids after a prompt, and the five largest logits before each of them."""
    prompt_ids = tokenizer.encode(PROMPTS[name], add_special_tokens=False).ids
    made = model.generate(torch.tensor([prompt_ids]), max_new_tokens=NEW, do_sample=False)
    ids = made[0, len(prompt_ids) :].tolist()
    logits_TV = reference.logits([*prompt_ids, *ids])[len(prompt_ids) - 1 : -1]
    margins_T = logits_TV.topk(2).values.diff().abs().flatten()
    sure = int((margins_T > MARGIN).int().cumprod(0).sum())
    ids, logits_TV = ids[:sure], logits_TV[:sure]
    assert logits_TV.argmax(-1).tolist() == ids, f"{name}: transformers and float64 differ"
    stop = set(ids) & set(np.ravel(model.generation_config.eos_token_id).tolist())
    text_ids = ids[:-1] if stop else ids
    return {
        "id": name,
        "prompt": PROMPTS[name],
        "prompt_ids": prompt_ids,
        "max_new_tokens": len(ids),
        "stop": "end_of_text" if stop else "length",
        "generated_ids": text_ids,
        "stop_id": ids[-1] if stop else None,
        "generated_text": tokenizer.decode(text_ids),
        "min_top1_top2_margin": round(margins_T[:sure].min().item(), 6),
        "steps": [step(logits_V) for logits_V in logits_TV],
    }


def step(logits_V: torch.Tensor) -> dict[str, Any]:
    top = logits_V.topk(5)
    return {
        "top5_ids": top.indices.tolist(),
        "top5_logits": [round(value, 6) for value in top.values.tolist()],
        "logsumexp": round(logits_V.logsumexp(-1).item(), 6),
    }


def nll(reference: Reference, tokenizer: Any) -> tuple[dict[str, Any], np.ndarray]:
    """What a text costs, and each of its tokens."""
    ids = tokenizer.encode(SCORED, add_special_tokens=False).ids
    logp_TV = reference.logits(ids).log_softmax(-1)
    each_T = -logp_TV[torch.arange(len(ids) - 1), torch.tensor(ids[1:])].numpy()
    facts = {"text": SCORED, "ids": ids, "sum_nll_fp64": round(float(each_T.sum()), 9)}
    return facts, each_T


def arrays(items: list[dict[str, Any]], reference: Reference) -> dict[str, np.ndarray]:
    found = {}
    for known in items:
        ids = [*known["prompt_ids"], *known["generated_ids"]]
        kind = np.float64 if known["id"] == EXACT else np.float32
        found[f"logits/{known['id']}"] = reference.logits(ids).numpy().astype(kind)
        if known["id"] == TRACED:
            reference.logits(known["prompt_ids"])
            for name, tensor in reference.taps.items():
                found[f"taps/{known['id']}/{name}"] = tensor.numpy().astype(np.float32)
    return found


def shipped(items: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, Any]:
    """The few of them that selftest has, as it reads them."""
    chosen = [known for known in items if known["id"] in SHIPPED_ITEMS]
    for known in chosen:  # two logits that are near each other may come early, by chance
        assert len(known["steps"]) >= SHIPPED_STEPS, f"{known['id']}: choose another prompt"
    return {
        "what": "What the embedded model must answer: greedy ids after each prompt, and the five "
        "largest logits before each of them.",
        "made_by": "Not by this package: a part of tests/goldens/embedded.json, which "
        "tools/goldens_embedded.py made.",
        "sha256": facts["weights_sha256"],
        "items": [
            {
                "id": known["id"],
                "prompt_ids": known["prompt_ids"],
                "ids": with_stop(known)[:SHIPPED_STEPS],
                "top5_ids": [s["top5_ids"] for s in known["steps"][:SHIPPED_STEPS]],
                "top5_logits": [s["top5_logits"] for s in known["steps"][:SHIPPED_STEPS]],
            }
            for known in chosen
        ],
    }


def with_stop(known: dict[str, Any]) -> list[int]:
    stop = [] if known["stop_id"] is None else [known["stop_id"]]
    return [*known["generated_ids"], *stop]


def versions() -> dict[str, str]:
    libraries = {lib.__name__: lib.__version__ for lib in (torch, transformers, tokenizers, np)}
    return {**libraries, "python": platform.python_version()}


def write(path: Path, value: dict[str, Any]) -> None:
    """JSON with lists of numbers on one line."""
    text = json.dumps(value, indent=1, ensure_ascii=False)
    flat = re.sub(r"\[\s+([-\d.,e\s]+?)\s+\]", lambda m: f"[{' '.join(m[1].split())}]", text)
    path.write_text(flat + "\n", encoding="utf-8")
    print(f"{path.relative_to(ROOT)}: {path.stat().st_size} bytes")


def main() -> None:
    reference = Reference(MODEL)
    tokenizer = tokenizers.Tokenizer.from_file(str(MODEL / "tokenizer.json"))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        MODEL, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        items = [item(name, reference, model, tokenizer) for name in PROMPTS]
        scored, nll_T = nll(reference, tokenizer)
        kept = arrays(items, reference) | {"nll_per_token": nll_T}
    facts = {
        "model": "weights/shakespeare",
        "weights_sha256": hashlib.sha256((MODEL / "model.safetensors").read_bytes()).hexdigest(),
        "tokenizer_sha256": hashlib.sha256((MODEL / "tokenizer.json").read_bytes()).hexdigest(),
        "reference": "ids: transformers, float32, greedy, eager attention; all else: a float64 "
        "forward in torch's operations (tools/goldens_embedded.py), which picks the same ids",
        "versions": versions(),
        "rules": "no BOS; steps has one entry for each generated id, and one for the id that "
        f"stopped it, if any; an item ends before the two largest logits are within {MARGIN}",
        "arrays": "logits/ID (T, V) after every position of prompt and generated ids (float64 of "
        f"{EXACT}, else float32); taps/{TRACED}/TAP of the prompt (float32), named and ordered as "
        "in llama3np trace; nll_per_token of nll.ids",
    }
    texts = [
        {"text": t, "ids": tokenizer.encode(t, add_special_tokens=False).ids} for t in TEXTS
    ]  # fmt: skip
    write(GOLDENS / "embedded.json", {**facts, "nll": scored, "texts": texts, "items": items})
    write(SHIPPED, shipped(items, facts))
    np.savez_compressed(GOLDENS / "embedded_arrays.npz", **kept)
    print(f"embedded_arrays.npz: {(GOLDENS / 'embedded_arrays.npz').stat().st_size} bytes")


if __name__ == "__main__":
    main()

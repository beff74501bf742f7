"""Compare the profiles of 16 bits with transformers and Meta's own code, operation by operation.

    PYTHONPATH=.:tools python -m parity.short [--models stories260K.bin SMOLLM2.gguf] [--write]

Needs the environment of README.md. Each of our operations is given the very numbers that theirs was
given, and both results are compared bit by bit; then whole models run freely, and the distance
between the two is told beside the error of each against float64. --write writes short.md.
"""

from __future__ import annotations

import argparse
import tempfile
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import made_up
import numpy as np
import transformers
from parity import families, peers
from parity.run import versions

import llama3np
from llama3np.backend import widen
from llama3np.cache import new_cache
from llama3np.config import Config
from llama3np.load import save_hf
from llama3np.load.names import with_pairing
from llama3np.model import Ops, forward, rope_tables
from llama3np.numerics import PROFILES, Profile, short_params, ulps
from llama3np.params import Layer, Params, mapped

HERE = Path(__file__).resolve().parent
Given = Iterator[tuple[str, np.ndarray, np.ndarray]]  # tap, ours, theirs

TOKENS = 64
MADE_UP = ("llama2-7b", "llama3-8b", "llama3.1-8b")
TAPS = (
    *("embed", "attn_norm", "q", "k", "v", "q_rope", "k_rope", "scores", "probs", "attn"),
    *("attn_out", "h_mid", "mlp_norm", "gate", "up", "act", "mlp_out", "h", "norm", "logits"),
)


@dataclass
class Count:
    """How many numbers of a tap were compared, and how they differ."""

    n: int = 0
    equal: int = 0
    neighbours: int = 0  # one ulp apart
    furthest: int = 0
    # The largest difference of those further apart, over the largest value of its array.
    beyond: float = 0.0

    def add(self, ours: np.ndarray, theirs: np.ndarray) -> None:
        """Count one array's numbers."""
        if ours.size == 0:
            return
        apart = ulps(ours, theirs)
        wide, expected = ours.astype(np.float64), theirs.astype(np.float64)
        finite = np.isfinite(expected) & np.isfinite(wide)
        gap = np.abs(wide - expected, where=finite, out=np.zeros(wide.shape))
        self.n += apart.size
        self.equal += int((apart == 0).sum())
        self.neighbours += int((apart == 1).sum())
        self.furthest = max(self.furthest, int(apart.max()))
        beyond = gap[apart > 1].max(initial=0) / (np.abs(expected[finite]).max() or 1)
        self.beyond = max(self.beyond, float(beyond))


@dataclass
class Result:
    """What one model showed."""

    profile: str
    model: str
    counts: dict[str, Count] = field(default_factory=lambda: defaultdict(Count))
    apart: float = 0.0  # ours and theirs, running freely: root mean square over logits, and
    ours: float = 0.0  # each against float64
    theirs: float = 0.0


# ---- operation by operation --------------------------------------------------------------------


def given_theirs(
    params: Params, config: Config, profile: Profile, ids: list[int], theirs: peers.Taps
) -> Given:
    """(tap, ours, theirs) of every operation, ours made from what went into theirs."""
    yield "embed", params.embed_VD[np.array(ids)], theirs["embed"]
    stream_TD = theirs["embed"]
    for i, layer in enumerate(params.layers):
        of_layer = {tap: theirs[f"layers.{i}.{tap}"] for tap in TAPS[1:18]}
        yield from layer_given(layer, config, profile, stream_TD, of_layer)
        stream_TD = of_layer["h"]
    ops = profile.ops
    yield "norm", ops.rms_norm(stream_TD[None], params.norm_D, config.norm_eps)[0], theirs["norm"]
    logits_TV = ops.linear(theirs["norm"][None], params.head_VD)[0]
    yield "logits", logits_TV, theirs["logits"]


def layer_given(
    layer: Layer, config: Config, profile: Profile, stream_TD: np.ndarray, t: peers.Taps
) -> Given:
    """The same of one block, which was given stream_TD."""
    ops, T = profile.ops, len(stream_TD)
    norm = partial(ops.rms_norm, eps=config.norm_eps)

    def linear(tap: str, w: Any) -> np.ndarray:
        return ops.linear(t[tap].reshape(1, T, -1), w)[0]

    yield "attn_norm", norm(stream_TD[None], layer.attn_norm_D)[0], t["attn_norm"]
    for tap, w in (("q", layer.wq), ("k", layer.wk), ("v", layer.wv)):
        yield tap, linear("attn_norm", w).reshape(T, -1, config.head_dim), t[tap]
    positions_BT = np.arange(T)[None]
    cos_BTP, sin_BTP = rope_tables(config, positions_BT, profile.dtype)
    for tap in ("q", "k"):
        turned = ops.rope(t[tap][None], cos_BTP, sin_BTP, config.rope_pairing)[0]
        yield tap + "_rope", turned, t[tap + "_rope"]
    yield from attention_given(ops, positions_BT, t)
    yield "attn_out", linear("attn", layer.wo), t["attn_out"]
    yield "h_mid", stream_TD + t["attn_out"], t["h_mid"]
    yield "mlp_norm", norm(t["h_mid"][None], layer.mlp_norm_D)[0], t["mlp_norm"]
    yield "gate", linear("mlp_norm", layer.w_gate), t["gate"]
    yield "up", linear("mlp_norm", layer.w_up), t["up"]
    yield "act", ops.swiglu(t["gate"][None], t["up"][None])[0], t["act"]
    yield "mlp_out", linear("act", layer.w_down), t["mlp_out"]
    yield "h", t["h_mid"] + t["mlp_out"], t["h"]


def attention_given(ops: Ops, positions_BT: np.ndarray, t: peers.Taps) -> Given:
    """Scores; probs of the rows whose scores are all theirs; attn where the probs are too."""
    seen: dict[str, np.ndarray] = {}
    k_BKSH, v_BKSH = (t[tap].swapaxes(0, 1)[None] for tap in ("k_rope", "v"))

    def see(name: str, array: np.ndarray) -> np.ndarray:
        seen[name] = array[0]
        return array

    attn_TNH = ops.attention(t["q_rope"][None], k_BKSH, v_BKSH, positions_BT, see)[0]
    visible_TS = np.tri(len(attn_TNH), dtype=bool)
    yield "scores", seen["scores"][:, visible_TS], t["scores"][:, visible_TS]
    same_NT = (seen["scores"] == t["scores"]).all(axis=2)
    shown_NTS = same_NT[:, :, None] & visible_TS
    yield "probs", seen["probs"][shown_NTS], t["probs"][shown_NTS]
    same_TN = (same_NT & (seen["probs"] == t["probs"]).all(axis=2)).T
    yield "attn", attn_TNH[same_TN], t["attn"][same_TN]


# ---- whole models ------------------------------------------------------------------------------


def logits_of(params: Params, config: Config, ids: list[int], profile: Profile) -> np.ndarray:
    """Of the spec itself, (T, V)."""
    weights = short_params(params, profile.dtype) if profile.short else params
    cache = new_cache(config, 1, len(ids), profile.dtype)
    logits_BTV, _ = forward(
        weights, config, [ids], cache, dtype=profile.dtype, ops=profile.ops, last_only=False
    )
    return logits_BTV[0].astype(np.float64)


def compared(
    name: str, params: Params, config: Config, profile: Profile, ids: list[int], theirs: peers.Taps
) -> Result:
    """One row: operation by operation, then both models' logits."""
    result = Result(profile.name, name)
    rounded = short_params(params, profile.dtype)
    for tap, ours, expected in given_theirs(rounded, config, profile, ids, theirs):
        result.counts[tap].add(ours, expected)
    truth_TV = logits_of(params, config, ids, PROFILES["float64"])
    ours_TV = logits_of(params, config, ids, profile)
    theirs_TV = widen(theirs["logits"]).astype(np.float64)

    def apart(one_TV: np.ndarray, other_TV: np.ndarray) -> float:
        return float(np.sqrt(((one_TV - other_TV) ** 2).mean() / (truth_TV**2).mean()))

    result.apart = apart(ours_TV, theirs_TV)
    result.ours, result.theirs = apart(ours_TV, truth_TV), apart(theirs_TV, truth_TV)
    return result


def models(paths: list[str]) -> Iterator[tuple[str, Config, Params, list[int]]]:
    """(name, config, params in Meta's order, ids) of every model that is compared."""
    for family in MADE_UP:
        config = families.tiny(family)
        ids = families.token_ids(TOKENS, config.vocab_size).tolist()
        yield f"tiny {family}", config, mapped(made_up.params(config, "f32"), np.asarray), ids
    for path in paths:
        llm = llama3np.load(path, engine="numpy")
        ids = families.token_ids(TOKENS, llm.config.vocab_size).tolist()
        config, params = with_pairing(llm.config, llm.params, "interleaved")
        yield Path(path).stem, config, params, ids


def measured(paths: list[str]) -> Iterator[Result]:
    """A row for every model and profile."""
    for name, config, params, ids in models(paths):
        theirs = peers.meta_taps(params, config, ids, "bfloat16")
        yield compared(name, params, config, PROFILES["bf16-meta"], ids, theirs)
        half, turned = with_pairing(config, params, "half")
        with tempfile.TemporaryDirectory() as folder:
            directory = Path(folder) / "model"
            save_hf(directory, config, params)
            for profile in (PROFILES["bf16-hf"], PROFILES["f16-hf"]):
                theirs = peers.transformers_taps(directory, half, ids, profile.dtype)
                yield compared(name, turned, half, profile, ids, theirs)


# ---- what is written ---------------------------------------------------------------------------

PROFILE_ORDER = ("bf16-meta", "bf16-hf", "f16-hf")


def total(counts: Iterable[Count]) -> Count:
    """All of them in one."""
    some = list(counts)
    return Count(
        sum(c.n for c in some),
        sum(c.equal for c in some),
        sum(c.neighbours for c in some),
        max(c.furthest for c in some),
        max(c.beyond for c in some),
    )


def shares(c: Count) -> str:
    """How many are equal, and how far the others are."""
    rest = c.n - c.equal
    further = f", {rest - c.neighbours} by up to {c.furthest}" if rest > c.neighbours else ""
    apart = f"; {c.neighbours} by 1 ulp{further}" if rest else ""
    return f"{100 * c.equal / c.n:.3f} %{apart}"


def tap_rows(results: list[Result]) -> Iterator[str]:
    yield "| tap | " + " | ".join(PROFILE_ORDER) + " |"
    yield "|---" * (1 + len(PROFILE_ORDER)) + "|"
    for tap in TAPS:
        cells = [
            shares(total(r.counts[tap] for r in results if r.profile == name))
            for name in PROFILE_ORDER
        ]
        yield f"| {tap} | " + " | ".join(cells) + " |"


def model_rows(results: list[Result]) -> Iterator[str]:
    yield "| profile | model | numbers | equal | ours to theirs | ours to float64 | theirs |"
    yield "|---" * 7 + "|"
    for r in sorted(results, key=lambda r: PROFILE_ORDER.index(r.profile)):
        yield row_of(r)


def row_of(r: Result) -> str:
    c = total(r.counts.values())
    freely = f"{r.apart:.1e} | {r.ours:.1e} | {r.theirs:.1e}"
    return f"| {r.profile} | {r.model} | {c.n} | {100 * c.equal / c.n:.3f} % | {freely} |"


def report(results: list[Result]) -> str:
    beyond = total(c for r in results for c in r.counts.values()).beyond
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    return "\n".join(
        (
            "# Parity in 16 bits\n",
            f"Made by `parity.short` ([README.md](README.md)) with {used}.\n",
            "## Operation by operation\n",
            "Each of our operations is given what theirs was given; equal means the same 16 bits.",
            "bf16-meta beside Meta's own model.py, the others beside transformers (eager).\n",
            *tap_rows(results),
            "",
            "No difference of more than 1 ulp is above "
            f"{beyond:.1e} of the largest number of its array.",
            "\n## Model by model\n",
            "The last three columns are of whole models run freely: root mean square distances of",
            f"the logits of {TOKENS} tokens, over that of the logits.\n",
            *model_rows(results),
            "",
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=[], help="beside the made-up ones: paths")
    parser.add_argument("--write", action="store_true", help="short.md, beside this file")
    args = parser.parse_args()
    transformers.utils.logging.disable_progress_bar()
    results = []
    for result in measured(args.models):
        results.append(result)
        print(row_of(result), flush=True)
    print(text := report(results))
    if args.write:
        (HERE / "short.md").write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()

"""Compare llama3np with transformers, both in float32, by their errors against float64.

    PYTHONPATH=.:tools python -m parity.run [--only tiny long tables wide] [--families NAME ...]

Needs the environment of README.md, which has torch. A whole run writes results.md beside this file
and the goldens parity.json and parity.npz in tests/goldens; a part of it prints its rows only.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import tempfile
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import made_up
import numpy as np
import torch
import transformers
from parity import families, reference

import llama3np
from llama3np.config import Config
from llama3np.load import save_hf
from llama3np.model import rope_tables
from llama3np.params import Params
from llama3np.presets import PRESETS

HERE = Path(__file__).resolve().parent
GOLDENS = HERE.parent.parent / "tests" / "goldens"
PARTS = ("tiny", "long", "tables", "wide")
SHORT_KEPT = (0, 1, 2, 3, 7, 15, 31, 63, 127, 200, 255, 300)  # positions whose logits are committed
LONG_KEPT = (8192, 8193, 8255, 8319, 8447)


@dataclass(frozen=True)
class Row:
    """One line of the table: the largest errors over some positions of one model."""

    part: str
    family: str
    config: Config
    positions: str
    largest: float  # of the reference's values
    ours: float
    theirs: float
    seconds: float

    @property
    def ratio(self) -> float:
        """Our error by theirs."""
        return self.ours / self.theirs


# ---- the three sides --------------------------------------------------------------------------


def made_up_params(config: Config) -> Params:
    return made_up.params(config, "bf16")  # exact in bfloat16: float32 and float64 hold the same


def our_logits(directory: Path, ids_T: np.ndarray, first: int) -> np.ndarray:
    llm = llama3np.load(directory, dtype="float32")
    cache = llm.new_cache(1, len(ids_T))
    chunks = [llm.forward(chunk[None], cache)[0] for chunk in in_chunks(ids_T)]
    return np.concatenate(chunks)[first:]


@torch.no_grad()
def their_logits(directory: Path, ids_T: np.ndarray, first: int) -> np.ndarray:
    """Of transformers in float32 with eager attention; with a cache only if there are chunks."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    cache = transformers.DynamicCache(config=model.config) if len(ids_T) > families.SHORT else None
    chunks = [
        model(torch.from_numpy(chunk[None]), past_key_values=cache, use_cache=cache is not None)
        for chunk in in_chunks(ids_T)
    ]
    return np.concatenate([chunk.logits[0].numpy() for chunk in chunks])[first:]


def in_chunks(ids_T: np.ndarray) -> list[np.ndarray]:
    """The short sequence whole; the long one in pieces, whose scores fit in memory."""
    step = len(ids_T) if len(ids_T) <= families.SHORT else families.CHUNK
    return [ids_T[start : start + step] for start in range(0, len(ids_T), step)]


# ---- rows -------------------------------------------------------------------------------------


def compared(part: str, family: str, config: Config, n: int, first: int) -> tuple[Row, np.ndarray]:
    """The row of a model after n tokens, and the reference's logits from position first on."""
    start = time.perf_counter()
    ids_T = families.token_ids(n, config.vocab_size)
    params = made_up_params(config)
    with tempfile.TemporaryDirectory() as temporary:
        directory = Path(temporary) / "model"
        save_hf(directory, config, params)
        ours_TV = our_logits(directory, ids_T, first)
        gc.collect()  # one side's weights at a time
        theirs_TV = their_logits(directory, ids_T, first)
        gc.collect()
    truth_TV = reference.logits(params, config, ids_T, first)
    row = Row(
        part,
        family,
        config,
        f"{first}..{n - 1}",
        float(np.abs(truth_TV).max()),
        float(np.abs(ours_TV - truth_TV).max()),
        float(np.abs(theirs_TV - truth_TV).max()),
        time.perf_counter() - start,
    )
    return row, truth_TV


def tables(family: str) -> Row:
    """Cosines and sines of the full-size model up to its last position, as arrays."""
    start = time.perf_counter()
    config = families.wide(family)
    positions_T = np.append(np.arange(0, config.context_length, 97), config.context_length - 1)
    turns_TP = reference.rotations(config, positions_T)
    truth_2TP = np.stack((turns_TP.real, turns_TP.imag))
    ours_2TP = np.concatenate(rope_tables(config, positions_T[None], "float32"))
    theirs_2TP = their_tables(config, positions_T)
    return Row(
        "tables",
        family,
        config,
        f"every 97th of 0..{positions_T[-1]}",
        1.0,
        float(np.abs(ours_2TP - truth_2TP).max()),
        float(np.abs(theirs_2TP - truth_2TP).max()),
        time.perf_counter() - start,
    )


def their_tables(config: Config, positions_T: np.ndarray) -> np.ndarray:
    rope = {"rope_type": "default", "rope_theta": config.rope_theta}
    if (scaling := config.rope_scaling) is not None:
        rope |= {
            "rope_type": "llama3",
            "factor": scaling.factor,
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.old_context,
        }
    theirs = transformers.LlamaConfig(
        hidden_size=config.dim,
        num_attention_heads=config.n_heads,
        head_dim=config.head_dim,
        max_position_embeddings=config.context_length,
        rope_parameters=rope,
    )
    embedding = transformers.models.llama.modeling_llama.LlamaRotaryEmbedding(theirs)
    both = embedding(torch.zeros(1), torch.from_numpy(positions_T[None]))
    # Each half of a head has the same angles: pair i is (i, i + P).
    return np.concatenate([table.numpy()[..., : config.head_dim // 2] for table in both])


# ---- what is written --------------------------------------------------------------------------


def shape_of(config: Config) -> str:
    c = config
    scaling = f", factor {c.rope_scaling.factor:g}" if c.rope_scaling else ""
    tied = ", tied" if c.tied else ""
    return (
        f"L{c.n_layers} D{c.dim} N{c.n_heads} K{c.n_kv_heads} H{c.head_dim} F{c.ffn_dim} "
        f"V{c.vocab_size}, theta {c.rope_theta:g}{scaling}{tied}"
    )


def versions() -> dict[str, str]:
    return {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }


HEADER = "| family | config | positions | largest value | llama3np | transformers | ratio | s |"
RULE = "|---|---|---|---|---|---|---|---|"
TITLES = {
    "tiny": "Tiny models, logits",
    "long": "Tiny models beyond the old context, logits",
    "tables": "RoPE tables of the full sizes, cosines and sines",
    "wide": "Full width, logits",
}


def line(row: Row) -> str:
    return (
        f"| {row.family} | {shape_of(row.config)} | {row.positions} | {row.largest:.2f} | "
        f"{row.ours:.2e} | {row.theirs:.2e} | {row.ratio:.2f} | {row.seconds:.0f} |"
    )


def report(rows: list[Row]) -> str:
    worst = max(rows, key=lambda row: row.ratio)
    used = ", ".join(f"{name} {version}" for name, version in versions().items())
    parts = [
        "# Parity with transformers",
        f"Made by `parity.run` ([README.md](README.md)) with {used}. "
        "llama3np and transformers: the largest absolute difference from float64, each in float32.",
        f"Largest ratio: {worst.ratio:.2f} ({TITLES[worst.part]}, {worst.family}); 3 is allowed.",
        "405B has one layer, full-width vocabularies have 1000 rows, logits beyond 8192 are "
        "those of one-layer tiny models, and llama3.3-70b has the rows of llama3.1-70b, whose "
        "config it has: why is in the README.",
    ]
    for part in PARTS:
        lines = [line(row) for row in rows if row.part == part]
        parts.append("\n".join((f"## {TITLES[part]}\n", HEADER, RULE, *lines)))
    return "\n\n".join(parts) + "\n"


def write_goldens(rows: list[Row], arrays: dict[str, np.ndarray]) -> None:
    entries = {
        f"{row.part}/{row.family}": {
            "config": asdict(row.config),
            "transformers_error": row.theirs,
            "largest_logit": row.largest,
        }
        for row in rows
        if row.part in ("tiny", "long")
    }
    golden = {
        "made_by": "tools/parity/run.py",
        "versions": versions(),
        "weights": "tools/made_up.py, seed 0; ids and configs: tools/parity/families.py",
        "arrays": "PART/FAMILY: float64 logits (positions, V) of the reference; ids: of all",
        "transformers_error": "largest |transformers float32 - float64| over all positions",
        "positions": {"tiny": SHORT_KEPT, "long": LONG_KEPT},
        "models": entries,
    }
    text = json.dumps(golden, indent=1) + "\n"
    (GOLDENS / "parity.json").write_text(text, encoding="utf-8")
    np.savez_compressed(GOLDENS / "parity.npz", **arrays)


# ---- the run ----------------------------------------------------------------------------------


def measure(part: str, family: str, arrays: dict[str, np.ndarray]) -> Row:
    """One row; of tiny models it leaves the reference's logits in `arrays`."""
    if part == "tables":
        return tables(family)
    if part == "wide":
        return compared(part, family, families.wide(family), families.SHORT, 0)[0]
    if part == "tiny":
        row, truth_TV = compared(part, family, families.tiny(family), families.SHORT, 0)
        arrays[f"{part}/{family}"] = truth_TV[list(SHORT_KEPT)]
        return row
    first = families.OLD_CONTEXT
    row, truth_TV = compared(part, family, families.long(family), families.LONG, first)
    arrays[f"{part}/{family}"] = truth_TV[np.array(LONG_KEPT) - first]
    return row


def repeated(part: str, family: str, rows: list[Row], arrays: dict[str, np.ndarray]) -> Row | None:
    """The row of an earlier family that has the very same config (3.3 70B has that of 3.1)."""
    for row in rows:
        if row.part == part and PRESETS[row.family] == PRESETS[family]:
            if part in ("tiny", "long"):
                arrays[f"{part}/{family}"] = arrays[f"{part}/{row.family}"]
            return replace(row, family=family)
    return None


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument(
        "--families", nargs="+", choices=families.FAMILIES, default=families.FAMILIES
    )
    args = parser.parse_args()
    whole = tuple(args.only) == PARTS and tuple(args.families) == families.FAMILIES
    transformers.utils.logging.disable_progress_bar()
    rows: list[Row] = []
    arrays = {"ids": families.token_ids(families.LONG, families.TINY_VOCABULARY).astype(np.int16)}
    for part in args.only:
        for family in args.families:
            if part == "long" and family not in families.SCALED:
                continue
            row = repeated(part, family, rows, arrays) or measure(part, family, arrays)
            rows.append(row)
            print(line(rows[-1]), flush=True)
        if whole:  # after each part: the last one takes most of the time and memory
            (HERE / "results.md").write_text(report(rows), encoding="utf-8")
            write_goldens(rows, arrays)


if __name__ == "__main__":
    main()

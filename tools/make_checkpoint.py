"""Made-up weights in the form of a real checkpoint: its names, shapes, dtypes, shards and index.

    python tools/make_checkpoint.py llama3-8b hf  DIRECTORY     four safetensors files and an index
    python tools/make_checkpoint.py llama3-8b meta DIRECTORY    consolidated.00.pth and params.json
    python tools/make_checkpoint.py llama3-8b gguf FILE.gguf    one file

--scale-layers 2 keeps the first two layers, --mp 8 cuts Meta's form into eight shards, --dtype
takes bf16, f16, f32 and, for GGUF, q8_0, q4_0 and q4_k_m (Q4_K and Q6_K, shared out as llama.cpp
does). Every format holds the same numbers, by the formula of made_up.py, rounded to blocks as
made_up_blocks.py does; models of Llama 3's vocabulary size have a tokenizer, see
made_up_vocabulary.py. Tensors are written as they are made, so memory stays small: 8B takes
16.06 GB of disk and one core.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import made_up
import made_up_blocks
import made_up_vocabulary

from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.load import save_gguf, save_hf, save_meta
from llama3np.params import from_named, named
from llama3np.presets import PRESETS

SHARD_BYTES = 5_000_000_000  # what the shards of published models were made with
LLAMA3_VOCABULARY = 128_256


def q4_k_m(name: str, config: Config) -> str:
    """The type of a matrix in llama.cpp's mix "Q4_K - Medium": llama-quant.cpp."""
    if name == "head_VD" or (name == "embed_VD" and config.tied):
        return "Q6_K"
    if not name.endswith((".wv", ".w_down")):
        return "Q4_K"
    i, eighth = int(name.split(".")[1]), config.n_layers // 8
    more = i < eighth or i >= 7 * config.n_layers // 8 or (i - eighth) % 3 == 2
    return "Q6_K" if more else "Q4_K"


# --dtype -> the ggml type of a matrix, by its name
BLOCKS: dict[str, Callable[[str, Config], str]] = {
    "q8_0": lambda name, config: "Q8_0",
    "q4_0": lambda name, config: "Q4_0",
    "q4_k_m": q4_k_m,
}


def write(
    config: Config,
    layout: str,
    out: Path,
    seed: int = 0,
    dtype: str = "bf16",
    mp: int = 1,
    shard_bytes: int = SHARD_BYTES,
) -> None:
    """Write a made-up model of this config at `out`. Raises InputError if something is there."""
    if dtype in BLOCKS and layout != "gguf":
        raise InputError(f"--dtype: expected bf16, f16 or f32 for {layout}, found {dtype}")
    if layout == "hf":
        write_hf(replace(config, rope_pairing="half"), out, seed, dtype, shard_bytes)
    elif layout == "meta":
        write_meta(replace(config, rope_pairing="interleaved"), out, seed, dtype, mp)
    else:
        write_gguf(replace(config, rope_pairing="interleaved"), out, seed, dtype)


def write_hf(config: Config, out: Path, seed: int, dtype: str, shard_bytes: int) -> None:
    save_hf(out, config, made_up.params(config, dtype, seed=seed), shard_bytes)
    if config.vocab_size == LLAMA3_VOCABULARY:
        made_up_vocabulary.write_tokenizer_json(out / "tokenizer.json")


def write_meta(config: Config, out: Path, seed: int, dtype: str, mp: int) -> None:
    save_meta(out, config, made_up.params(config, dtype, seed=seed), mp)
    if config.vocab_size == LLAMA3_VOCABULARY:
        made_up_vocabulary.write_tokenizer_model(out / "tokenizer.model")


def write_gguf(config: Config, out: Path, seed: int, dtype: str) -> None:
    """As llama.cpp's converter writes it: norms in float32 whatever the matrices are."""
    metadata: dict[str, object] = {"general.name": "made up", "tokenizer.ggml.model": "none"}
    if config.vocab_size == LLAMA3_VOCABULARY:
        metadata |= made_up_vocabulary.gguf_metadata()
    params = made_up.params(config, "f32" if dtype in BLOCKS else dtype, "f32", seed)
    if dtype in BLOCKS:
        tensors = named(params, config.tied)
        in_blocks = {
            name: w if w.ndim == 1 else made_up_blocks.tensor(w, BLOCKS[dtype](name, config))
            for name, w in tensors.items()
        }
        params = from_named(in_blocks, config)
    save_gguf(out, config, params, metadata)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("preset", choices=PRESETS)
    parser.add_argument("format", choices=("hf", "meta", "gguf"))
    parser.add_argument("out", type=Path)
    parser.add_argument("--scale-layers", type=int, metavar="N", help="layers, in place of all")
    parser.add_argument("--mp", type=int, default=1, metavar="M", help="shards of Meta's form")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--dtype", default="bf16", choices=("bf16", "f16", "f32", *BLOCKS))
    args = parser.parse_args()
    start = time.perf_counter()
    try:
        config = PRESETS[args.preset]
        if args.scale_layers is not None:
            config = replace(config, n_layers=args.scale_layers)
        write(config, args.format, args.out, args.seed, args.dtype, args.mp)
    except InputError as error:
        sys.exit(f"make_checkpoint: {error}")
    files = [file for file in args.out.rglob("*") if file.is_file()] or [args.out]
    gigabytes = sum(file.stat().st_size for file in files) / 1e9
    print(f"{args.out}: {gigabytes:.2f} GB in {time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()

"""Vocabularies for the tests: real ones, made-up ones, and the same ones in other libraries."""

import base64
import functools
import itertools
import json
import struct
import tempfile
from pathlib import Path

import gguf
import paths
import tokenizers

import llama3np.tokenizer
from llama3np.tokenizer.bpe import LLAMA3
from llama3np.tokenizer.bytelevel import byte_alphabet

DIGITS = {"type": "Digits", "individual_digits": True}
SPLIT = {
    "type": "Split",
    "pattern": {"Regex": LLAMA3.pattern},
    "behavior": "Isolated",
    "invert": False,
}


def byte_level(use_regex):
    return {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": use_regex,
    }


PRE = {
    "smollm": {"type": "Sequence", "pretokenizers": [DIGITS, byte_level(True)]},
    "llama-bpe": {"type": "Sequence", "pretokenizers": [SPLIT, byte_level(False)]},
}


@functools.cache
def smollm2_metadata():
    """Metadata of the SmolLM2 file, read by the gguf package."""
    fields = gguf.GGUFReader(paths.smollm2_gguf()).fields
    return {key: field.contents() for key, field in fields.items()}


@functools.cache
def smollm2():
    return llama3np.tokenizer.from_gguf(smollm2_metadata(), "smollm2.gguf")


@functools.cache
def llama3():
    return llama3np.tokenizer.from_tokenizer_model(paths.llama3_tokenizer())


@functools.cache
def tok512():
    return llama3np.tokenizer.from_llama2c(paths.shared("data/tok512.bin"))


def llama2c_bytes(pieces, longest=10):
    """A llama2.c tokenizer file from (score, text) of the tokens after the bytes."""
    first = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens = [*((0.0, text) for text in first), *pieces]
    encoded = ((score, text.encode()) for score, text in tokens)
    body = (struct.pack("<fi", score, len(text)) + text for score, text in encoded)
    return struct.pack("<i", longest) + b"".join(body)


PIECES = [" ", *"abcdehilnorstw", "é", "he", " t", " the", "ll", "an", " a", "  ", " an"]


@functools.cache
def pieces():
    """A made-up vocabulary in llama2.c's format, for what holds of every one of its kind."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "tokenizer.bin"
        file.write_bytes(llama2c_bytes([(-float(i), text) for i, text in enumerate(PIECES)]))
        return llama3np.tokenizer.from_llama2c(file)


def chatml(template=None):
    """A ChatML vocabulary of single bytes and two pairs, with this template."""
    texts = ["<|im_start|>", "<|im_end|>", *byte_alphabet(), "ab", "bc"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": texts,
        "tokenizer.ggml.token_type": [3, 3, *[1] * (len(texts) - 2)],
        "tokenizer.ggml.merges": ["a b", "b c"],
        "tokenizer.chat_template": template,
    }
    return llama3np.tokenizer.from_gguf(metadata, "small.gguf")


REAL = {"llama3": llama3, "smollm2": smollm2, "tok512": tok512}
ALL = REAL | {"pieces": pieces}


def tokenizer_json(pre, vocab, merges, specials, whole_piece):
    """The object in a tokenizer.json, as the tokenizers library writes it."""
    added = {
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": id, "content": name, **added} for name, id in specials.items()],
        "normalizer": None,
        "pre_tokenizer": PRE[pre],
        "post_processor": None,
        "decoder": byte_level(True),
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": whole_piece,
            "vocab": vocab,
            "merges": merges,
        },
    }


@functools.cache
def smollm2_json():
    """SmolLM2's vocabulary as a tokenizer.json; merges as strings."""
    metadata = smollm2_metadata()
    texts = metadata["tokenizer.ggml.tokens"]
    kinds = metadata["tokenizer.ggml.token_type"]
    specials = {text: id for id, text in enumerate(texts) if kinds[id] == 3}
    vocab = {text: id for id, text in enumerate(texts)}
    return tokenizer_json("smollm", vocab, metadata["tokenizer.ggml.merges"], specials, False)


@functools.cache
def llama3_json():
    """Llama 3's ranks as a tokenizer.json: all pairs that make a token, by rank; as pairs."""
    alphabet = byte_alphabet()
    ranks = llama3()._pieces[:128_000]
    texts = ["".join(alphabet[byte] for byte in piece) for piece in ranks]
    vocab = {text: id for id, text in enumerate(texts)}
    merges = []
    for text in texts:
        pairs = ((text[:cut], text[cut:]) for cut in range(1, len(text)))
        known = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
        merges += sorted(known, key=lambda pair: (vocab[pair[0]], vocab[pair[1]]))
    return tokenizer_json("llama-bpe", vocab, merges, llama3().specials, True)


def library(file):
    """The tokenizers library's own tokenizer, from the object of a tokenizer.json."""
    return tokenizers.Tokenizer.from_str(json.dumps(file))


def library_ids(tokenizer, text):
    """Its ids of an ordinary text. Control tokens would be found in it: keep them out."""
    return tokenizer.encode(text, add_special_tokens=False).ids


def rank_lines(n=128_000):
    """A made-up tokenizer.model in Meta's format: every byte, every pair, then triples."""
    by_length = (itertools.product(range(256), repeat=length) for length in (1, 2, 3))
    pieces = itertools.islice(itertools.chain.from_iterable(by_length), n)
    return [base64.b64encode(bytes(p)) + b" %d" % rank for rank, p in enumerate(pieces)]

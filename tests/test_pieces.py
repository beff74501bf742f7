"""Llama 2's vocabulary in its three files, against the sentencepiece and tokenizers libraries.

The vocabulary is trained here, in some milliseconds, with the settings of Llama 2's.
"""

import functools
import io
import json
import sys
import time

import numpy as np
import pytest
import vocabularies as voc
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from llama3np.errors import InputError
from llama3np.tokenizer import from_gguf, from_tokenizer_json, from_tokenizer_model

LINES = [
    "the quick brown fox jumps over the lazy dog, then it jumps back",
    "pack my box with five dozen liquor jugs and 12345 more",
    "<s> is text and so is </s>, [INST] as well [/INST]",
    "h\u00e9llo w\u00f6rld \u4f60\u597d\u4e16\u754c",
    "   many    spaces\tand\ttabs   here",
    "aaaa aaa aaaaaa aa banana bananas",
]
FRAGMENTS = [
    *("the", " the", "quick", "jump", "jumps", "aa", "aaa", "banana", "ana", "12", "345", "."),
    *(" ", "  ", "    ", "\t", "\n", "\u2581", "\u2581the", "\u4f60", "\u00e9", "\u0301", "\x00"),
    *("<s>", "</s>", "<unk>", "<0x41>", "[INST]", "\U0001f600", "\ufeff", "\u3000"),
]
TEXTS = st.lists(st.sampled_from(FRAGMENTS) | st.text(max_size=4), max_size=20).map("".join)
NORMAL, UNKNOWN, CONTROL, UNUSED, BYTE = 1, 2, 3, 5, 6


@functools.cache
def model(**options):
    """The bytes of a sentencepiece model as Llama 2's was made."""
    sentencepiece = pytest.importorskip("sentencepiece", reason="the extra [llama2] is absent")
    written = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 4),
        model_writer=written,
        vocab_size=400,
        hard_vocab_limit=False,
        minloglevel=2,
        **{
            "model_type": "bpe",
            "byte_fallback": True,
            "normalization_rule_name": "identity",
            "remove_extra_whitespaces": False,
            "allow_whitespace_only_pieces": True,
            "character_coverage": 1.0,
            **options,
        },
    )
    return written.getvalue()


@functools.cache
def library(**options):
    import sentencepiece

    return sentencepiece.SentencePieceProcessor(model_proto=model(**options))


def kind(sp, id):
    tests = {UNKNOWN: sp.is_unknown, CONTROL: sp.is_control, UNUSED: sp.is_unused, BYTE: sp.is_byte}
    return next((kind for kind, test in tests.items() if test(id)), NORMAL)


def metadata(sp, **changes):
    """What a GGUF file says of the same vocabulary."""
    ids = range(len(sp))
    keys = {
        "model": "llama",
        "tokens": [sp.id_to_piece(id) for id in ids],
        "scores": np.array([sp.get_score(id) for id in ids], np.float32).tolist(),
        "token_type": [kind(sp, id) for id in ids],
        "bos_token_id": 1,
        "eos_token_id": 2,
        **changes,
    }
    return {f"tokenizer.ggml.{key}": value for key, value in keys.items()}


def tokenizer_json(sp, style="prepend", **changes):
    """A tokenizer.json as converters write it: each pair of pieces that makes one, best first."""
    vocab = {sp.id_to_piece(id): id for id in range(len(sp))}
    scores = {sp.id_to_piece(id): sp.get_score(id) for id in range(len(sp))}
    pairs = [
        (-scores[text], vocab[text[:cut]], vocab[text[cut:]], [text[:cut], text[cut:]])
        for text, id in vocab.items()
        for cut in range(1, len(text))
        if kind(sp, id) == NORMAL and text[:cut] in vocab and text[cut:] in vocab
    ]
    merges = [pair for *_, pair in sorted(pairs)]
    file = voc.tokenizer_json("smollm", vocab, merges, {"<unk>": 0, "<s>": 1, "</s>": 2}, False)
    file["model"] |= {"unk_token": "<unk>", "fuse_unk": True, "byte_fallback": True}
    file |= {"normalizer": PREPEND, "pre_tokenizer": None, "decoder": None}
    if style == "metaspace":
        file |= {"normalizer": None, "pre_tokenizer": METASPACE}
    for key, value in changes.items():
        (file if key in file else file["model"])[key] = value
    return file


PREPEND = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "\u2581"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"},
    ],
}
METASPACE = {
    "type": "Metaspace",
    "replacement": "\u2581",
    "prepend_scheme": "first",
    "split": False,
}


@pytest.fixture(scope="module")
def save(tmp_path_factory):
    """Write a tokenizer's file, with others beside it, into a new folder."""

    def written(name, content, **beside):
        folder = tmp_path_factory.mktemp("tokenizer")
        for other, value in beside.items():
            (folder / f"{other}.json").write_text(json.dumps(value), encoding="utf-8")
        content = json.dumps(content).encode() if isinstance(content, dict) else content
        (folder / name).write_bytes(content)
        return folder / name

    return written


@pytest.fixture(scope="module", params=["tokenizer.model", "gguf", "prepend", "metaspace"])
def tokenizer(request, save):
    """The same vocabulary by each of our readers."""
    sp = (model(), library())[1]
    if request.param == "tokenizer.model":
        return from_tokenizer_model(save("tokenizer.model", model()))
    if request.param == "gguf":
        return from_gguf(metadata(sp), "x.gguf")
    file = tokenizer_json(sp, request.param)
    config = {"bos_token": "<s>", "eos_token": "</s>", "add_bos_token": True}
    return from_tokenizer_json(save("tokenizer.json", file, tokenizer_config=config))


def adds_a_space(tokenizer, text):
    """Metaspace of the tokenizers library does not where a text begins with a space."""
    return getattr(tokenizer, "_prefix", "always") == "always" or text[:1] not in " \u2581"


# ---------------------------------------------------------------------------- laws


@given(text=TEXTS)
@example(text="aaaaaaaaaaa")
@example(text="<s>")
@example(text="\u2581\u2581a")
def test_ids_are_those_of_sentencepiece(tokenizer, text):
    assume(adds_a_space(tokenizer, text))
    assert tokenizer.encode(text) == library().encode(text)


@given(text=TEXTS)
@example(text="   a")
@example(text="aaaaaaaaaaa")
@pytest.mark.parametrize("style", ["prepend", "metaspace"])
def test_ids_are_those_of_the_tokenizers_library(style, text, by_style):
    assume(not any(name in text for name in ("<s>", "</s>", "<unk>")))  # found there in any text
    ours, theirs = by_style[style]
    assert ours.encode(text) == voc.library_ids(theirs, text)


@pytest.fixture(scope="module")
def by_style(save):
    model()
    files = {style: tokenizer_json(library(), style) for style in ("prepend", "metaspace")}
    return {
        style: (from_tokenizer_json(save("tokenizer.json", file)), voc.library(file))
        for style, file in files.items()
    }


@given(text=TEXTS)
def test_no_text_becomes_a_control_token(tokenizer, text):
    for name in ("<s>", "</s>", "<unk>"):
        assert not {0, 1, 2} & set(tokenizer.encode(text + name + text))


@given(text=TEXTS)
def test_text_of_ids_of_a_text_is_the_text(tokenizer, text):
    assume(adds_a_space(tokenizer, text))
    shown = text.replace("\u2581", " ")  # sentencepiece's own sign for a space
    assert tokenizer.decode(tokenizer.encode(text)) == shown
    assert tokenizer.decode(tokenizer.encode(text, bos=True)) == shown


PIECES = st.integers(259, 330).map(lambda id: [id])
BYTES = st.characters(exclude_categories=["Cs"]).map(lambda c: [3 + byte for byte in c.encode()])


@given(parts=st.lists(PIECES | BYTES, max_size=12), bos=st.booleans())
@example(parts=[[3 + 0x20], [259]], bos=True)  # the byte token of a space is no piece
def test_text_of_any_ids_is_that_of_sentencepiece(tokenizer, parts, bos):
    """Whole characters, for which bytes a U+FFFD stands is not the same; and no control token in
    between, after which a text begins here, and not there.
    """
    ids = [1] * bos + [id for part in parts for id in part]
    assert tokenizer.decode(ids) == library().decode(ids)


@given(prompt=TEXTS, ids=st.lists(st.integers(0, 350), max_size=12))
def test_a_stream_continues_its_prompt(tokenizer, prompt, ids):
    before = tokenizer.prompt_ids(prompt)
    stream = tokenizer.stream(before)
    new = "".join([*map(stream.push, ids), stream.flush()])
    assert tokenizer.decode(before) + new == tokenizer.decode([*before, *ids])


def test_a_space_is_dropped_where_a_text_begins_and_only_there(tokenizer):
    the = tokenizer.encode("the")
    assert tokenizer.decode(the) == tokenizer.decode([1, *the]) == "the"
    assert tokenizer.decode([*the, *the]) == "the the"
    assert tokenizer.decode([*the, 2, 1, *the]) == "thethe"
    assert tokenizer.stream([1]).push(the[0]) == "the"
    assert tokenizer.stream(the).push(the[0]) == " the"
    assert tokenizer.decode([3 + 0x20, *the]) == "  the"  # the byte is no piece


def test_what_a_vocabulary_says_of_itself(tokenizer):
    assert tokenizer.n_vocab == len(library())
    assert (tokenizer.bos_id, tokenizer.add_bos, tokenizer.stop_ids) == (1, True, (2,))
    assert tokenizer.specials == {"<unk>": 0, "<s>": 1, "</s>": 2}
    assert tokenizer.prompt_ids("the")[0] == 1
    assert tokenizer.encode("") == []


HARD = {
    "one letter": "a" * 1_000_000,
    "spaces": " " * 1_000_000,
    "words": "the quick " * 100_000,
}


@pytest.mark.parametrize("name", HARD)
def test_a_million_characters_take_seconds(tokenizer, name):
    """A quadratic merge would take hours here; these take three seconds at most."""
    start = time.perf_counter()
    ids = tokenizer.encode(HARD[name])
    assert time.perf_counter() - start < 30
    if adds_a_space(tokenizer, HARD[name]):
        assert ids == library().encode(HARD[name])


# ---------------------------------------------------------------------------- tokenizer.model


def test_without_the_library_the_extra_is_named(save, monkeypatch):
    path = save("tokenizer.model", b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02" + bytes(99))
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(InputError, match=r'tokenizer\.model: .*pip install "llama3np\[llama2\]"$'):
        from_tokenizer_model(path)


def test_a_model_without_a_prefix_gets_none(save):
    options = {"add_dummy_prefix": False}
    tokenizer = from_tokenizer_model(save("tokenizer.model", model(**options)))
    for text in ("the", " the", "  "):
        assert tokenizer.encode(text) == library(**options).encode(text)
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_the_config_beside_a_model_is_read(save):
    config = {"add_bos_token": False, "chat_template": "[INST] <<SYS>>"}
    tokenizer = from_tokenizer_model(save("tokenizer.model", model(), tokenizer_config=config))
    assert (tokenizer.add_bos, tokenizer.chat_template) == (False, "[INST] <<SYS>>")


@settings(max_examples=300)
@given(data=st.data())
def test_a_damaged_model_is_refused_or_read(save, data):
    whole = model()
    at = data.draw(st.integers(0, len(whole) - 1))
    damaged = {
        "cut": lambda: whole[:at],
        "flipped": lambda: whole[:at] + bytes([data.draw(st.integers(0, 255))]) + whole[at + 1 :],
        "hole": lambda: whole[:at] + whole[at + 7 :],
    }[data.draw(st.sampled_from(["cut", "flipped", "hole"]))]()
    told = "tokenizer.model: "
    try:
        assert from_tokenizer_model(save("tokenizer.model", damaged)).encode("the") is not None
    except InputError as error:
        told = str(error)
    assert "tokenizer.model: " in told


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"byte_fallback": False}, "byte tokens"),
        ({"eos_id": -1}, "control token </s>"),
        ({"bos_piece": "<bos>"}, "control token <s>"),
    ],
)
def test_another_kind_of_model_is_refused(save, options, complaint):
    with pytest.raises(InputError, match=rf"tokenizer\.model: .*{complaint}"):
        from_tokenizer_model(save("tokenizer.model", model(**options)))


# ---------------------------------------------------------------------------- GGUF

SMALL_TOKENS = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a"]
SMALL = {
    "tokenizer.ggml.model": "llama",
    "tokenizer.ggml.tokens": [*SMALL_TOKENS, "\u2581a", "aa"],
    "tokenizer.ggml.scores": [0.0] * 259 + [-4.0, -3.0, -1.0, -2.0],
    "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, 1, 1, 1, 1],
}


def small(**changes):
    return {**SMALL, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}


def test_the_best_score_is_joined_first():
    assert from_gguf(SMALL, "x.gguf").encode("aa") == [261, 260]
    scores = [0.0] * 259 + [-4.0, -3.0, -2.0, -1.0]
    assert from_gguf(small(scores=scores), "x.gguf").encode("aa") == [259, 262]


def test_defaults_of_a_gguf_are_those_of_llama_cpp():
    tokenizer = from_gguf(SMALL, "x.gguf")
    assert (tokenizer.bos_id, tokenizer.add_bos, tokenizer.stop_ids) == (1, True, (2,))
    bare = from_gguf(small(add_bos_token=False, add_space_prefix=False, eos_token_id=0), "x.gguf")
    assert (bare.add_bos, bare.stop_ids) == (False, (0,))
    assert bare.encode("a a") == [260, 261]
    assert bare.decode([1, 261]) == " a"


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"scores": None}, "the key tokenizer.ggml.scores"),
        ({"scores": [0.0]}, "scores: expected 263 finite numbers"),
        ({"scores": [0.0] * 262 + [float("nan")]}, "scores: expected 263 finite"),
        ({"scores": ["x"] * 263}, "scores: expected 263 finite"),
        ({"scores": 1.0}, "scores: expected 263 finite"),
        ({"token_type": [2, 3, 3, *[6] * 256, 1, 1, 1, 4]}, "found type 4 for token 262 'aa'"),
        ({"token_type": [2, 3, 3, *[6] * 255, 1, 1, 1, 1, 1]}, "byte tokens"),
        ({"tokens": [*SMALL_TOKENS, "\u2581a", "a"]}, "every token once"),
        ({"tokens": [*SMALL_TOKENS, "\u2581a", "a a"]}, "spaces as U.2581, found 'a a'"),
        ({"tokens": [*SMALL_TOKENS, "\u2581a", ""]}, "spaces as U.2581, found ''"),
        ({"precompiled_charsmap": [1, 2]}, "precompiled_charsmap: not supported"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces: not supported"),
        ({"bos_token_id": 263}, "bos_token_id: expected an id of 263"),
        ({"eos_token_id": -1}, "eos_token_id"),
    ],
)
def test_a_gguf_vocabulary_that_is_broken_or_else_is_refused(changes, complaint):
    with pytest.raises(InputError, match=f"x.gguf: .*{complaint}"):
        from_gguf(small(**changes), "x.gguf")


# ---------------------------------------------------------------------------- tokenizer.json


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"normalizer": None}, "expected Llama 2's normalizer"),
        ({"normalizer": {"type": "NFKC"}}, "NFKC"),
        ({"pre_tokenizer": {"type": "Whitespace"}}, "Whitespace"),
        ({"ignore_merges": True}, "ignore_merges"),
        ({"dropout": 0.1}, "dropout"),
        ({"type": "Unigram"}, "type: expected 'BPE'"),
        ({"merges": [["a", "zzz"]]}, "merge 0 .* no token"),
        ({"merges": [["<s>", "a"]]}, "merge 0 .* no token"),
        ({"merges": [["a", 1]]}, "merge 0: expected two tokens"),
        ({"vocab": {"<unk>": 0, "<s>": 1, "</s>": 2, "a": 3}}, "byte tokens"),
    ],
)
def test_a_tokenizer_json_that_asks_for_something_else_is_refused(save, changes, complaint):
    model()
    path = save("tokenizer.json", tokenizer_json(library(), **changes))
    with pytest.raises(InputError, match=rf"tokenizer\.json: .*{complaint}"):
        from_tokenizer_json(path)

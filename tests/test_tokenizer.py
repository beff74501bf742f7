"""Text to ids and back: against the tokenizers library, published ids, and by its own laws.

Sections follow llama3np/tokenizer: base, bpe, merges, then one for each file format.
"""

import functools
import hashlib
import itertools
import json
import subprocess
import sys
import time
from contextlib import suppress

import numpy as np
import paths
import pytest
import vocabularies as voc
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from llama3np.errors import InputError
from llama3np.tokenizer import (
    from_gguf,
    from_llama2c,
    from_tokenizer_json,
    from_tokenizer_model,
)
from llama3np.tokenizer.llama2c import of_pieces
from llama3np.tokenizer.merges import check_merges

GOLDEN = json.loads((paths.GOLDENS / "tokenizers.json").read_text(encoding="utf-8"))

# What tells pre-tokenizers apart: contractions with the long s, digits of other scripts, white
# space of every kind, a mark without its letter, and bytes that SmolLM2 has no token for.
FRAGMENTS = [
    *("'s", "'S", "'\u017f", "'ll", "'LL", "'re", "'", "a", "Zebra", "the", " the", "é", "ß"),
    *("1", "12", "1234", "½", "²", "Ⅷ", "٣", "!", "?!", "...", "_", "-", "$", "…", "“"),
    *(" ", "  ", "    ", "\t", "\n", "\n\n", "\r", "\r\n", "\x0b", "\x0c", "\x1d", "\x85"),
    *("\u00a0", "\u1680", "\u2003", "\u2028", "\u2029", "\u202f", "\u3000", "\ufeff", "\u200b"),
    *("\u0301", "你好", "世界", "こん", "안녕", "việc", " например", "😀", "👨‍👩‍👧", "\U000f0000"),
    *("\x00", "\x04", "\x06", "\x13", "\x14", "\x16", "\U00040000", "\U00080000", "<|", "|>"),
]
# Unassigned characters are left out: libraries follow different versions of Unicode.
CHARACTERS = st.characters(exclude_categories=["Cs", "Cn"])
TEXTS = st.lists(st.one_of(st.sampled_from(FRAGMENTS), st.text(CHARACTERS, max_size=4))).map(
    "".join
)


@pytest.fixture(scope="module", params=voc.ALL)
def tokenizer(request):
    return voc.ALL[request.param]()


@pytest.fixture(scope="module", params=voc.REAL)
def real(request):
    return voc.REAL[request.param]()


@pytest.fixture(scope="module", params=["llama3", "smollm2"])
def both(request):
    """A byte-pair tokenizer of ours, and the tokenizers library's from the same vocabulary."""
    ours = voc.REAL[request.param]()
    return ours, llama3_library() if request.param == "llama3" else smollm2_library()


@functools.cache
def llama3_library():
    return voc.library(voc.llama3_json())


@functools.cache
def smollm2_library():
    return voc.library(voc.smollm2_json())


def ids_of(tokenizer, max_size=40):
    return st.lists(st.integers(0, tokenizer.n_vocab - 1), max_size=max_size)


def sha256(ids):
    return hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest()


# ---------------------------------------------------------------------------- base


@given(data=st.data())
def test_text_of_ids_of_a_text_is_the_text(tokenizer, data):
    text = data.draw(TEXTS)
    assume(tokenizer is not voc.smollm2() or not any(has_no_token(c) for c in text))
    assert tokenizer.decode(tokenizer.encode(text, bos=True)) == text


def has_no_token(character):
    """Does SmolLM2 lack a token for one of its bytes? (reference: its vocabulary's single bytes)"""
    lacking = {0x04, 0x06, 0x13, 0x14, 0x16, 0x1D, 0xF1, 0xF2}
    return bool(lacking & set(character.encode()))


@given(data=st.data())
def test_no_text_becomes_a_control_token(tokenizer, data):
    names = st.sampled_from(sorted(tokenizer.specials))
    text = "".join(data.draw(st.lists(st.one_of(names, TEXTS), min_size=1)))
    assert not set(tokenizer.encode(text)) & set(tokenizer.specials.values())


def test_text_of_all_control_tokens_becomes_none(tokenizer):
    text = "".join(tokenizer.specials)
    ids = tokenizer.encode(text)
    assert not set(ids) & set(tokenizer.specials.values())
    assert tokenizer.decode(tokenizer.with_bos(ids)) == text


@given(data=st.data())
def test_bos_stands_exactly_once(tokenizer, data):
    text = data.draw(TEXTS)
    ids = tokenizer.encode(text, bos=True)
    assert ids == [tokenizer.bos_id, *tokenizer.encode(text)]
    assert tokenizer.with_bos(ids) == ids
    assert tokenizer.prompt_ids(text) == (ids if tokenizer.add_bos else ids[1:])


def test_an_empty_prompt_is_bos_or_nothing(tokenizer):
    assert tokenizer.encode("") == []
    assert tokenizer.prompt_ids("") == ([tokenizer.bos_id] if tokenizer.add_bos else [])


@given(data=st.data())
def test_streamed_text_is_the_whole_text_for_any_ids(tokenizer, data):
    ids = data.draw(ids_of(tokenizer))
    stream = tokenizer.stream()
    assert "".join([*map(stream.push, ids), stream.flush()]) == tokenizer.decode(ids)


@given(data=st.data())
def test_a_stream_continues_its_prompt(tokenizer, data):
    prompt = tokenizer.prompt_ids(data.draw(TEXTS))
    ids = data.draw(ids_of(tokenizer))
    stream = tokenizer.stream(prompt)
    new = "".join([*map(stream.push, ids), stream.flush()])
    assert tokenizer.decode(prompt) + new == tokenizer.decode([*prompt, *ids])


@given(data=st.data())
def test_a_stream_gives_whole_characters_only(tokenizer, data):
    text = data.draw(TEXTS)
    stream = tokenizer.stream()
    sofar = ""
    for id in tokenizer.encode(text, bos=True):
        sofar += stream.push(id)
        assert tokenizer is voc.smollm2() or text.startswith(sofar)
    assert stream.flush() == "" or tokenizer is voc.smollm2()


def test_a_character_comes_with_the_last_of_its_tokens(tokenizer):
    ids = tokenizer.encode("👧", bos=True)
    stream = tokenizer.stream()
    assert [stream.push(id) for id in ids] == [*[""] * (len(ids) - 1), "👧"]
    cut_off = tokenizer.stream()
    assert "".join(map(cut_off.push, ids[:-1])) == ""
    assert cut_off.flush() == "\ufffd"


def test_control_tokens_are_left_out_or_shown_by_name(tokenizer):
    name, id = list(tokenizer.specials.items())[-1]
    ids = [*tokenizer.encode("a"), id, *tokenizer.encode("b")]
    assert name not in tokenizer.decode(ids)
    assert name in tokenizer.decode(ids, specials=True)
    assert tokenizer.token_bytes(id) == b""


def test_what_is_no_utf8_is_up_to_errors(tokenizer):
    ids = tokenizer.encode("👧", bos=True)
    with pytest.raises(UnicodeDecodeError):
        tokenizer.decode(ids[:-1], errors="strict")
    assert "\ufffd" in tokenizer.decode(ids[:-1])


def test_an_id_outside_the_vocabulary_is_refused(tokenizer):
    for id in (-1, tokenizer.n_vocab, 2**40):
        for use in (
            tokenizer.token_bytes,
            lambda i: tokenizer.decode([i]),
            tokenizer.stream().push,
        ):
            with pytest.raises(InputError, match=rf"{id}: .* 0 to {tokenizer.n_vocab - 1}"):
                use(id)


def test_ids_may_come_from_an_array(tokenizer):
    ids = np.array(tokenizer.encode("Hello, world!", bos=True), np.int32)
    assert tokenizer.decode(ids) == "Hello, world!"
    assert tokenizer.stream(ids).push(ids[1]) == tokenizer.decode(ids[1:2])


@given(text=TEXTS, end=TEXTS, surrogate=st.integers(0xD800, 0xDFFF))
def test_a_lone_surrogate_is_refused_with_its_position(tokenizer, text, end, surrogate):
    with pytest.raises(InputError, match=rf"U\+{surrogate:04X} at position {len(text)}\b"):
        tokenizer.encode(text + chr(surrogate) + end)


# ---------------------------------------------------------------------------- goldens


@pytest.mark.parametrize("item", GOLDEN["items"], ids=lambda item: ascii(item["text"])[:24])
def test_ids_of_the_golden_texts(real, item):
    text = item["text"]
    if real is voc.REAL["tok512"]():
        assert real.prompt_ids(text) == item["tok512_with_bos"]
    elif real.n_vocab > 100_000:
        assert real.encode(text) == item["llama3"]
    else:  # the golden has control tokens parsed: put them in by name, and the text between
        ids = []
        for part in _split_at(text, ("<|im_start|>", "<|im_end|>")):
            special = real.specials.get(part)
            ids += real.encode(part) if special is None else [special]
        assert ids == item["smollm2_specials_parsed"]


def _split_at(text, names):
    for name in names:
        text = text.replace(name, f"\0{name}\0")
    return text.split("\0")


def test_llama3_ids_of_all_of_shakespeare():
    """The golden is of Meta's class, which cuts texts every 400,000 characters."""
    text = paths.shared("data/tinyshakespeare.txt").read_text(encoding="utf-8")
    starts = range(0, len(text), 400_000)
    ids = [id for i in starts for id in voc.llama3().encode(text[i : i + 400_000])]
    assert sha256(ids) == GOLDEN["long_text"]["llama3"]["sha256_int32le"]
    assert voc.llama3().encode(text) == voc.library_ids(llama3_library(), text)


def test_smollm2_ids_of_all_of_shakespeare():
    text = paths.shared("data/tinyshakespeare.txt").read_text(encoding="utf-8")
    assert sha256(voc.smollm2().encode(text)) == GOLDEN["long_text"]["smollm2"]["sha256_int32le"]


PUBLISHED = [
    # naklecha/llama3-from-scratch, cell 9
    (
        "the answer to the ultimate question of life, the universe, and everything is ",
        [1820, 4320, 311, 279, 17139, 3488, 315, 2324, 11, 279, 15861, 11, 323, 4395, 374, 220],
    ),
    ("42", [2983]),
    # meta-llama/llama3 llama/test_tokenizer.py
    ("This is a test sentence.", [2028, 374, 264, 1296, 11914, 13]),
    ("This is a response.", [2028, 374, 264, 2077, 13]),
    # tinygrad test/null/test_llm_tokenizer.py
    (" например", [111797]),  # cannot be reached by merging
    ("hello world", [15339, 1917]),
    (" \x850", [220, 116360, 15]),  # U+0085 is white space
    (" ì\x8b¤í", [1717, 105, 116174, 82638, 2483]),
    ("00000000000000000", [931, 931, 931, 931, 931, 410]),
    ("today\n  \n", [31213, 14211]),
]


@pytest.mark.parametrize(("text", "ids"), PUBLISHED)
def test_llama3_ids_published_by_others(text, ids):
    assert voc.llama3().encode(text) == ids


# ---------------------------------------------------------------------------- bpe


@given(text=TEXTS)
@example("'\u017f 'ſ I'ſ")
@example("\r\n\r\r\n \n\t \r x")
@example("a \u2029\u00a0\x85\n\u3000b")
@example("a\x04b")
@example("t\x04he t\x04\x06he")
@example(" \x04the  \x04  5")
@example("\U00040000\U000bffff")
def test_ids_are_those_of_the_tokenizers_library(both, text):
    ours, library = both
    assert ours.encode(text) == voc.library_ids(library, text)


def test_neighbours_of_a_byte_without_token_join():
    """It is dropped once the text is in pieces: "t", 0x04 and "he" are pieces of their own."""
    smollm2 = voc.smollm2()
    assert smollm2.encode("a\x04b") == [*smollm2.encode("a"), *smollm2.encode("b")]
    # U+40000 is F1 80 80 80 and only F1 has no token; "!" before it is in the same piece.
    assert smollm2.encode("!\x04!") == smollm2.encode("!!")
    assert smollm2.encode("\x04") == []


@given(text=TEXTS)
def test_the_piecewise_way_gives_the_same_ids(both, text):
    assume(not any(has_no_token(c) for c in text))
    assert both[0]._encode_piecewise(text) == both[0]._bpe.encode_ordinary(text)


@settings(max_examples=8)  # the library takes its time
@given(
    run=st.lists(st.sampled_from(" \t\u00a0\u3000\x85\n\r"), min_size=1, max_size=3),
    before=st.sampled_from(["", "a", "!", "!\n", "5", "\n "]),
    after=st.sampled_from(["", "a", "!", "5", "\n", "\n5", "'s"]),
)
def test_a_long_run_of_white_space_has_the_ids_of_the_tokenizers_library(both, run, before, after):
    ours, library = both
    text = before + "".join(run) * (110_000 // len(run)) + after
    assert ours.encode(text) == voc.library_ids(library, text)


HARD = {
    "one letter": "a" * 1_000_000,
    "one letter that merges": "l" * 1_000_000,
    "spaces": " " * 1_000_000,
    "spaces, then a letter": " " * 600_000 + "x",
    "more spaces, then a digit": " " * 1_200_000 + "5",
    "line ends": "\n" * 1_000_000,
    "line ends, then spaces": "!" + "\n" * 10 + " " * 1_000_000 + "x",
    "digits": "1" * 1_000_000,
    "marks": "!" * 1_000_000,
    "words": "ab " * 300_000,
    "faces": "😀" * 200_000,
    "runs just under the limit": (" " * 99_999 + "x") * 10,
    "without tokens": "\x04a" * 500_000,
}


@pytest.mark.parametrize("name", HARD)
def test_a_million_characters_take_seconds(real, name):
    """A quadratic merge would take hours here; linear ones take at most three seconds."""
    text = HARD[name]
    start = time.perf_counter()
    ids = real.encode(text, bos=True)
    assert time.perf_counter() - start < 20
    lost = "\x04" if real is voc.smollm2() else ""
    assert real.decode(ids) == (text.replace(lost, "") if lost else text)


def test_importing_the_package_does_not_import_tiktoken():
    code = "import sys, llama3np.tokenizer; assert not {'tiktoken', 'regex'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


# ---------------------------------------------------------------------------- merges


@st.composite
def merge_lists(draw):
    """Token ids over a few letters and merges in the order of ids, one for each token made."""
    texts = list("abc")
    merges = []
    for _ in range(draw(st.integers(0, 8))):
        pair = draw(st.tuples(st.sampled_from(texts), st.sampled_from(texts)))
        if "".join(pair) not in texts and len("".join(pair)) <= 10:
            merges.append(pair)
            texts.append("".join(pair))
    return {text: id for id, text in enumerate(texts)}, merges


def merged(text, merges):
    """Byte-pair encoding by its definition: the first merge of the list that applies, leftmost."""
    symbols = list(text)
    while True:
        pairs = list(itertools.pairwise(symbols))
        known = [merges.index(pair) for pair in pairs if pair in merges]
        if not known:
            return symbols
        at = pairs.index(merges[min(known)])
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]


def accepts(ids, merges, whole_piece):
    try:
        check_merges(merges, ids, whole_piece, "file")
    except InputError:
        return False
    return True


@settings(max_examples=300)
@given(drawn=merge_lists())
@example(
    (
        dict(zip(["a", "b", "c", "bc", "ab", "abc"], range(6), strict=True)),
        [("b", "c"), ("a", "b"), ("ab", "c")],
    )
)  # abc: bc comes first
@example((dict(zip(["a", "aa", "aaa"], range(3), strict=True)), [("a", "a"), ("a", "aa")]))
def test_one_merge_for_each_token_is_accepted_if_each_token_can_be_reached(drawn):
    ids, merges = drawn
    reachable = all(merged(text, merges) == [text] for text in ids)
    assert accepts(ids, merges, whole_piece=False) == reachable


@settings(max_examples=300)
@given(drawn=merge_lists(), text=st.text("abc", max_size=30))
def test_accepted_merges_are_ranks_by_id(drawn, text):
    """What merges.py proves: joining by lowest id is joining by the list, with any text."""
    ids, merges = drawn
    assume(accepts(ids, merges, whole_piece=False))
    by_rank = [  # any two tokens that make a token may join
        (left, right)
        for token in ids
        for left, right in sorted(itertools.product(ids, ids))
        if left + right == token
    ]
    symbols = list(text)
    while True:  # joined by lowest id, leftmost, as tiktoken does
        made = [ids.get("".join(pair), len(ids)) for pair in itertools.pairwise(symbols)]
        if not made or min(made) == len(ids):
            break
        at = made.index(min(made))
        assert (symbols[at], symbols[at + 1]) in by_rank
        symbols[at : at + 2] = ["".join(symbols[at : at + 2])]
    assert symbols == merged(text, merges)


def test_llama3_has_all_pairs_and_smollm2_one_for_each_token():
    assert len(voc.llama3_json()["model"]["merges"]) == 280_147  # as in the published file
    assert len(voc.smollm2_json()["model"]["merges"]) == 48_900


@pytest.mark.parametrize(
    ("merges", "complaint"),
    [
        ([("b", "c"), ("a", "b"), ("ab", "c")], "'abc' does not give it"),
        ([("a", "b"), ("b", "c"), ("a", "bc")], r"merge 1 .* makes token 3 after token 4"),
        ([("b", "c"), ("a", "b"), ("a", "x")], "'x', which is no token"),
        ([("b", "c"), ("a", "b")], "one merge for each of 3 tokens"),
        ([("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")], "not looked up whole"),
        ([("b", "c"), ("a", "b"), (1, 2)], "no token"),
    ],
)
def test_merges_that_ranks_would_not_follow_are_refused(merges, complaint):
    ids = {"a": 0, "b": 1, "c": 2, "bc": 3, "ab": 4, "abc": 5}
    with pytest.raises(InputError, match=f"file: .*{complaint}"):
        check_merges(merges, ids, False, "file")


def test_a_token_below_its_parts_is_refused():
    """The proof in merges.py goes by ids: what is made later must have the higher one."""
    ids = {"a": 0, "b": 1, "c": 2, "abc": 3, "ab": 4}
    with pytest.raises(InputError, match="'abc' has a lower id than its parts"):
        check_merges([("ab", "c"), ("a", "b")], ids, False, "file")


def test_with_whole_pieces_all_pairs_are_needed():
    ids = {"a": 0, "b": 1, "c": 2, "bc": 3, "ab": 4, "abc": 5}
    all_pairs = [("b", "c"), ("a", "b"), ("a", "bc"), ("ab", "c")]
    assert accepts(ids, all_pairs, whole_piece=True)
    for i in range(len(all_pairs)):
        few = all_pairs[:i] + all_pairs[i + 1 :]
        assert accepts(ids, few, whole_piece=True) == (few == [*all_pairs[:3]])


# ---------------------------------------------------------------------------- llama3


@pytest.fixture(scope="module")
def lines():
    return voc.rank_lines()


@pytest.fixture(scope="module")
def made_up(tmp_path_factory, lines):
    path = tmp_path_factory.mktemp("made_up") / "tokenizer.model"
    path.write_bytes(b"\n".join(lines) + b"\n")
    return from_tokenizer_model(path)


def test_a_rank_file_gives_llama3s_control_tokens(made_up):
    assert (made_up.n_vocab, made_up.bos_id, made_up.add_bos) == (128_256, 128_000, True)
    assert made_up.stop_ids == (128_001, 128_008, 128_009)
    assert sorted(made_up.specials.values()) == list(range(128_000, 128_256))
    known = {"start_header_id": 128_006, "end_header_id": 128_007, "python_tag": 128_010}
    assert {name: made_up.specials[f"<|{name}|>"] for name in known} == known
    assert made_up.specials["<|reserved_special_token_2|>"] == 128_012
    assert made_up.specials["<|reserved_special_token_245|>"] == 128_255


@given(text=TEXTS)
def test_a_rank_file_gives_ids_of_its_own_bytes(made_up, text):
    ids = made_up.encode(text)
    assert b"".join(map(made_up.token_bytes, ids)) == text.encode()


SENTENCEPIECE = b"\n\x0e\n\x05<unk>\x15\x00\x00\x00\x00\x18\x02\n\x0c\n\x03<s>\x15"


@pytest.mark.parametrize(
    ("spoil", "complaint"),
    [
        (lambda lines: [], "expected 128000 ranks, found 0"),
        (lambda lines: lines[:-1], "expected 128000 ranks, found 127999"),
        (lambda lines: [*lines[:-1], lines[-1][:3]], "line 128000: expected base64 and a rank"),
        (lambda lines: [*lines, b"AAAAAAAA 128000"], "found 128001"),
        (lambda lines: [*lines[:-1], b"AAAAAAAA 5"], "line 128000: rank 5 is there twice"),
        (lambda lines: [*lines[:-1], b"AAAAAAAA 128000"], "found none with 127999"),
        (lambda lines: [*lines[:-1], b"AAAA* 127999"], "line 128000"),
        (lambda lines: [*lines[:-1], lines[7].split()[0] + b" 127999"], "repeat the bytes"),
        (lambda lines: [b"AAAAAAAA 0", *lines[1:]], "found none for 0x00"),
        (lambda lines: [b"First Citizen:", b"Before we proceed"], "line 1: .*First Citizen"),
        (lambda lines: [b"\xff\xfe\x00", b"\x00"], "line 1"),
        (lambda lines: [b"", *lines], "line 1"),
        (lambda lines: [SENTENCEPIECE], "sentencepiece"),  # damaged, or without the library
    ],
)
def test_a_broken_rank_file_is_refused(tmp_path, lines, spoil, complaint):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(b"\n".join(spoil(lines)))
    with pytest.raises(InputError, match=rf"tokenizer\.model: .*{complaint}"):
        from_tokenizer_model(path)


@pytest.mark.parametrize("read", [from_tokenizer_model, from_tokenizer_json, from_llama2c])
def test_a_file_that_cannot_be_read_is_named(tmp_path, read):
    for path in (tmp_path / "absent", tmp_path):
        with pytest.raises(InputError, match=f"{path.name}: cannot be read"):
            read(path)


# ---------------------------------------------------------------------------- huggingface


@pytest.fixture
def folder(tmp_path):
    """A writer of a model folder's tokenizer files; gives the path of tokenizer.json."""

    def write(file, **beside):
        path = tmp_path / "tokenizer.json"
        path.write_text(file if isinstance(file, str) else json.dumps(file), encoding="utf-8")
        for name, value in beside.items():
            (tmp_path / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
        return path

    return write


def test_llama3s_ranks_as_tokenizer_json_are_the_same_tokenizer(folder):
    same = from_tokenizer_json(folder(voc.llama3_json()))
    assert same._pieces == voc.llama3()._pieces
    assert same._pattern == voc.llama3()._pattern
    for known in ("n_vocab", "bos_id", "add_bos", "stop_ids", "specials"):
        assert getattr(same, known) == getattr(voc.llama3(), known)


def test_smollm2_as_tokenizer_json_is_the_same_tokenizer(folder):
    metadata = voc.smollm2_metadata()
    config = {
        "bos_token": "<|im_start|>",
        "eos_token": {"content": "<|im_end|>"},
        "chat_template": metadata["tokenizer.chat_template"],
    }
    same = from_tokenizer_json(folder(voc.smollm2_json(), tokenizer_config=config))
    assert (same._pieces, same._pattern) == (voc.smollm2()._pieces, voc.smollm2()._pattern)
    for known in ("bos_id", "add_bos", "stop_ids", "specials", "chat_template"):
        assert getattr(same, known) == getattr(voc.smollm2(), known)


def small(**changes):
    """A tokenizer.json of six tokens; changes go to the model, or to the file where it has them."""
    vocab = {"a": 0, "b": 1, "c": 2, "bc": 3, "ab": 4}
    file = voc.tokenizer_json("smollm", vocab, ["b c", "a b"], {"<s>": 5}, False)
    for key, value in changes.items():
        (file if key in file else file["model"])[key] = value
    return file


@given(drawn=merge_lists(), text=st.text("abcd 5\n", max_size=30))
def test_small_vocabularies_are_read_as_the_tokenizers_library_reads_them(
    tmp_path_factory, drawn, text
):
    ids, merges = drawn
    assume(accepts(ids, merges, whole_piece=False))
    file = voc.tokenizer_json("smollm", ids, merges, {"<s>": len(ids)}, False)
    path = tmp_path_factory.mktemp("small") / "tokenizer.json"
    path.write_text(json.dumps(file), encoding="utf-8")
    assert from_tokenizer_json(path).encode(text) == voc.library_ids(voc.library(file), text)


def test_all_pairs_need_the_word_that_pieces_are_looked_up_whole(folder):
    vocab = {"a": 0, "b": 1, "c": 2, "bc": 3, "ab": 4, "abc": 6}
    pairs = [["b", "c"], ["a", "b"], ["a", "bc"], ["ab", "c"]]
    file = small(vocab=vocab, merges=pairs, ignore_merges=True)
    assert from_tokenizer_json(folder(file)).encode("abc") == [6]
    with pytest.raises(InputError, match="not looked up whole"):
        from_tokenizer_json(folder(small(vocab=vocab, merges=pairs)))


TEMPLATE = {
    "type": "TemplateProcessing",
    "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
}


@pytest.mark.parametrize(
    ("post", "config", "bos_id", "add_bos"),
    [
        (None, {}, None, False),
        (TEMPLATE, {}, 5, True),
        ({"type": "Sequence", "processors": [voc.byte_level(True), TEMPLATE]}, {}, 5, True),
        (None, {"bos_token": "<s>"}, 5, False),
        (None, {"bos_token": {"content": "<s>"}, "add_bos_token": True}, 5, True),
        (TEMPLATE, {"add_bos_token": False}, 5, False),
    ],
)
def test_bos_of_a_tokenizer_json(folder, post, config, bos_id, add_bos):
    tokenizer = from_tokenizer_json(folder(small(post_processor=post), tokenizer_config=config))
    assert (tokenizer.bos_id, tokenizer.add_bos) == (bos_id, add_bos)


def test_bos_cannot_be_asked_of_a_vocabulary_without(folder):
    with pytest.raises(InputError, match="BOS"):
        from_tokenizer_json(folder(small())).encode("a", bos=True)


def test_a_chat_template_may_have_a_file_of_its_own_or_a_name(folder, tmp_path):
    path = folder(small())
    (tmp_path / "chat_template.jinja").write_text("own file")
    assert from_tokenizer_json(path).chat_template == "own file"
    named = [{"name": "rag", "template": "x"}, {"name": "default", "template": "by name"}]
    folder(small(), tokenizer_config={"chat_template": named})
    assert from_tokenizer_json(path).chat_template == "by name"


ADDED = {"id": 5, "content": "<think>", "special": False}


@pytest.mark.parametrize(
    ("file", "complaint"),
    [
        ("", "expected JSON"),
        ("[" * 100_000, "expected JSON"),
        ('{"model": {"vocab"', "expected JSON"),
        ("[1]", "expected an object, found list"),
        ({"added_tokens": []}, "pre_tokenizer: expected .* found null"),
        (small(pre_tokenizer={"type": "Whitespace"}), 'found {"type": "Whitespace"}'),
        (small(pre_tokenizer={"type": "Sequence", "pretokenizers": 1}), "pre_tokenizer"),
        (small(pre_tokenizer={"type": "Sequence", "pretokenizers": [1]}), "pre_tokenizer"),
        (small(normalizer={"type": "NFC"}), 'normalizer: expected None, found {"type": "NFC"}'),
        (small(model=None), "model: expected dict, found NoneType"),
        (small(type="WordPiece"), "type: expected 'BPE', found \"WordPiece\""),
        (small(unk_token="<s>"), "unk_token"),
        (small(byte_fallback=True), "Llama 2.s normalizer"),
        (small(dropout=0.1), "dropout"),
        (small(vocab=[]), "vocab: expected dict, found list"),
        (small(vocab={"a": 0, "b": 2}), r"expected ids 0 to 2, each once, found 5"),
        (small(vocab={"a": "0"}), "found 0 for 'a'"),
        (small(vocab={"a": 0, "b": 1, "c": 2, "": 3, "ab": 4}), "found an empty one"),
        (small(vocab={"a": 0, "b": 1, "c": 2, "b c": 3, "ab": 4}), "'b c' is not written in"),
        (small(merges=None), "merges: expected list"),
        (small(merges=["a b c"]), "merge 0: expected two tokens"),
        (small(merges=[1]), "expected two tokens"),
        (small(merges=["a b", "b c"]), "merge 1"),
        (small(merges=[[[], "b"], "a b"]), "expected two tokens"),
        (small(added_tokens=[ADDED]), "'<think>' is to be found in plain text"),
        (small(added_tokens=[1]), r"added_tokens\[0\]: expected an object"),
        (small(added_tokens=[{}]), r"added_tokens\[0\]: content"),
    ],
)
def test_a_tokenizer_json_that_is_broken_or_else_is_refused(folder, file, complaint):
    with pytest.raises(InputError, match=rf"tokenizer\.json: .*{complaint}"):
        from_tokenizer_json(folder(file))


JSON = st.recursive(
    st.sampled_from([None, True, -1, 0, 3, 1.5, "", "a", "bc", "<s>", "Sequence"]),
    lambda inner: st.one_of(
        st.lists(inner, max_size=2),
        st.dictionaries(st.sampled_from(["type", "id", "content"]), inner, max_size=2),
    ),
    max_leaves=4,
)


def spoiled(value, draw):
    """The value with one thing somewhere in it replaced or gone."""
    if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 3)) == 0:
        return draw(JSON)
    copy = value.copy()
    key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    if draw(st.integers(0, 4)) == 0:
        del copy[key]
    else:
        copy[key] = spoiled(value[key], draw)
    return copy


@settings(max_examples=300)
@given(data=st.data())
def test_a_spoiled_tokenizer_json_is_read_or_refused(tmp_path_factory, data):
    template = {"type": "Sequence", "processors": [TEMPLATE]}
    folder = tmp_path_factory.getbasetemp()
    config = {"bos_token": {"content": "<s>"}, "chat_template": [{"name": "default"}]}
    which = data.draw(st.integers(0, 1))
    files = [small(post_processor=template), config]
    files[which] = spoiled(files[which], data.draw)
    for name, file in zip(("tokenizer.json", "tokenizer_config.json"), files, strict=True):
        (folder / name).write_text(json.dumps(file), encoding="utf-8")
    with suppress(InputError):
        from_tokenizer_json(folder / "tokenizer.json").encode("abc 5")


def test_the_config_beside_must_fit(folder):
    with pytest.raises(InputError, match="'<bos>' among added_tokens"):
        from_tokenizer_json(folder(small(), tokenizer_config={"bos_token": "<bos>"}))
    with pytest.raises(InputError, match=r"tokenizer_config\.json: expected an object"):
        from_tokenizer_json(folder(small(), tokenizer_config=[]))


# ---------------------------------------------------------------------------- gguf

SMALL = {
    "tokenizer.ggml.model": "gpt2",
    "tokenizer.ggml.pre": "smollm",
    "tokenizer.ggml.tokens": ["<s>", "a", "b", "c", "bc", "ab", "<pad>"],
    "tokenizer.ggml.token_type": np.array([3, 1, 1, 1, 1, 1, 5], np.int32),
    "tokenizer.ggml.merges": ["b c", "a b"],
    "tokenizer.ggml.bos_token_id": np.uint32(0),
}


def with_(**changes):
    return {**SMALL, **{f"tokenizer.ggml.{key}": value for key, value in changes.items()}}


def test_a_gguf_vocabulary_has_what_its_keys_say():
    tokenizer = from_gguf(with_(add_bos_token=True, eos_token_id=6), "x.gguf")
    assert (tokenizer.n_vocab, tokenizer.bos_id, tokenizer.add_bos) == (7, 0, True)
    assert (tokenizer.stop_ids, tokenizer.specials) == ((6,), {"<s>": 0, "<pad>": 6})
    assert tokenizer.prompt_ids("abc<s>") == [0, 1, 4]
    assert not from_gguf(SMALL, "x.gguf").add_bos


def test_smollm2s_keys_are_read():
    smollm2 = voc.smollm2()
    assert (smollm2.n_vocab, smollm2.bos_id, smollm2.add_bos) == (49_152, 1, False)
    assert smollm2.stop_ids == (2, 0)
    assert len(smollm2.specials) == 17
    assert "SmolLM" in smollm2.chat_template


def test_llama_bpe_takes_pieces_whole_and_begins_with_bos():
    """llama.cpp does so for this pre-tokenizer, whatever the file leaves out."""
    metadata = with_(pre="llama-bpe", merges=["b c", "a b"])
    metadata["tokenizer.ggml.tokens"] = ["<|begin_of_text|>", *SMALL["tokenizer.ggml.tokens"][1:]]
    del metadata["tokenizer.ggml.bos_token_id"]
    assert from_gguf(metadata, "x.gguf").prompt_ids("ab") == [0, 5]


def test_llama3s_ranks_as_gguf_are_the_same_tokenizer():
    model = voc.llama3_json()["model"]
    metadata = {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "llama-bpe",
        "tokenizer.ggml.tokens": [*model["vocab"], *voc.llama3().specials],
        "tokenizer.ggml.token_type": [1] * 128_000 + [3] * 256,
        "tokenizer.ggml.merges": [" ".join(pair) for pair in model["merges"]],
        "tokenizer.ggml.bos_token_id": 128_000,
        "tokenizer.ggml.eos_token_id": 128_009,
    }
    same = from_gguf(metadata, "llama3.gguf")
    assert (same._pieces, same._pattern) == (voc.llama3()._pieces, voc.llama3()._pattern)
    for known in ("bos_id", "add_bos", "stop_ids", "specials"):
        assert getattr(same, known) == getattr(voc.llama3(), known)


@pytest.mark.parametrize("key", [key for key in SMALL if not key.endswith("bos_token_id")])
def test_a_gguf_without_a_key_is_refused(key):
    with pytest.raises(InputError, match=f"x.gguf: expected the key {key}, found none"):
        from_gguf({k: v for k, v in SMALL.items() if k != key}, "x.gguf")


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"model": "bert"}, "model: expected gpt2 or llama, found 'bert'"),
        ({"pre": "qwen2"}, "pre: expected llama-bpe or smollm, found 'qwen2'"),
        ({"pre": "default"}, "found 'default'"),
        ({"tokens": "abc"}, "tokens: expected list, found str"),
        ({"tokens": ["<s>", "a", "b", "c", "bc", "a", "<pad>"]}, "every token once"),
        ({"tokens": ["<s>", "a", "b", "c", "bc", "a b", "<pad>"]}, "'a b' is not written in"),
        ({"token_type": [3, 1]}, "token_type: expected 7 values, found 2"),
        ({"token_type": [3, 1, 1, 4, 1, 1, 5]}, "found type 4 for token 3 'c'"),
        ({"merges": ["a b", "b c"]}, "merge 1"),
        ({"merges": ["a b"]}, "one merge for each"),
        ({"bos_token_id": 7}, "bos_token_id: expected an id of 7 tokens, found 7"),
        ({"eos_token_id": -1}, "eos_token_id"),
        ({"eos_token_id": "x"}, "eos_token_id"),
    ],
)
def test_a_gguf_vocabulary_that_is_broken_or_else_is_refused(changes, complaint):
    with pytest.raises(InputError, match=f"x.gguf: .*({complaint})"):
        from_gguf(with_(**changes), "x.gguf")


@settings(max_examples=300)
@given(data=st.data())
def test_a_spoiled_gguf_vocabulary_is_read_or_refused(data):
    metadata = with_(token_type=[3, 1, 1, 1, 1, 1, 5], add_bos_token=True, eos_token_id=6)
    key = data.draw(st.sampled_from(sorted(metadata)))
    metadata[key] = spoiled(metadata[key], data.draw)
    with suppress(InputError):
        from_gguf(metadata, "x.gguf").encode("abc 5")


# ---------------------------------------------------------------------------- llama2c


@st.composite
def llama2c_vocabularies(draw):
    """Letters, pieces joined from pieces, scores that may tie; and a text made of them all."""
    texts = [" ", "a", "é"]
    for _ in range(draw(st.integers(0, 8))):
        joined = draw(st.sampled_from(texts)) + draw(st.sampled_from(texts))
        if joined not in texts and len(joined) < 7:
            texts.append(joined)
    scores = st.integers(-6, 0).map(float)
    words = st.one_of(st.sampled_from(texts), st.sampled_from("dö"))  # d, ö: bytes only
    text = "".join(draw(st.lists(words, min_size=1, max_size=12)))
    return [(draw(scores), text) for text in draw(st.permutations(texts))], text


def joined(text, pieces):
    """llama2.c's encoding by its definition: the best pair of all, the leftmost on a tie."""
    scores = {text: score for score, text in pieces}
    symbols = list(text)
    while True:
        pairs = ["".join(pair) for pair in itertools.pairwise(symbols)]
        known = [(-scores[pair], at) for at, pair in enumerate(pairs) if pair in scores]
        if not known:
            break
        _, at = min(known)
        symbols[at : at + 2] = [pairs[at]]
    ids = {text: 259 + i for i, (_, text) in enumerate(pieces)}
    return [
        id for s in symbols for id in ([ids[s]] if s in ids else [3 + byte for byte in s.encode()])
    ]


@settings(max_examples=300)
@given(drawn=llama2c_vocabularies())
def test_llama2c_ids_are_those_of_the_definition(drawn):
    pieces, text = drawn
    tokenizer = of_pieces(*map(list, zip(*pieces, strict=True)))
    assert tokenizer.encode(text) == joined(" " + text, pieces)
    assert tokenizer.decode(tokenizer.encode(text, bos=True)) == text


def test_tok512_decodes_bytes_and_drops_one_space_after_bos():
    tok512 = voc.tok512()
    assert (tok512.n_vocab, tok512.bos_id, tok512.stop_ids) == (512, 1, (1, 2))
    assert tok512.decode([1, 410, 410, 412, 2]) == " a"  # 410 is " ", 412 "a"
    assert tok512.decode([410, 412]) == " a"
    assert tok512.decode([1, 3 + 0x20, 3 + 0x41]) == " A"  # the byte 0x20 is no space of a piece
    assert tok512.decode([3 + byte for byte in "é".encode()]) == "é"
    assert tok512.stream([1]).push(410) == ""
    assert tok512.stream([1, 412]).push(410) == " "


WHOLE = voc.llama2c_bytes([(0.0, "a"), (-1.0, "b"), (-2.0, "ab")])


@pytest.mark.parametrize(
    "data",
    [
        b"",
        WHOLE[:3],
        WHOLE[:4],
        WHOLE[4:],  # the first version of the format has no length before the tokens
        WHOLE[:-1],
        WHOLE[:-9],
        WHOLE[:1000],
        WHOLE + b"\0",
        b"First Citizen:\nBefore we proceed any further, hear me speak.\n" * 99,
        voc.llama2c_bytes([(float("nan"), "a")]),
        voc.llama2c_bytes([(0.0, "a"), (0.0, "a")]),
        voc.llama2c_bytes([(0.0, "longer than ten")]),
        WHOLE.replace(b"<0x41>", b"<0x40>"),
        WHOLE.replace(b"<0x41>", b"\xff0x41>"),
    ],
)
def test_a_broken_llama2c_file_is_refused(tmp_path, data):
    path = tmp_path / "tok.bin"
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"tok\.bin: "):
        from_llama2c(path)


@given(cut=st.integers(0, len(WHOLE) - 1))
def test_a_llama2c_file_cut_anywhere_is_refused_or_read(tmp_path_factory, cut):
    """Cut between two pieces it is a smaller vocabulary: the format does not say how many."""
    path = tmp_path_factory.mktemp("cut") / "tok.bin"
    path.write_bytes(WHOLE[:cut])
    whole = {len(voc.llama2c_bytes(pieces)) for pieces in ([], [(0.0, "a")], [(0, "a"), (0, "b")])}
    if cut in whole:
        assert from_llama2c(path).n_vocab >= 259
    else:
        with pytest.raises(InputError, match=r"tok\.bin: "):
            from_llama2c(path)

"""Tokenizers made from text, token files, and batches as functions of seed and step."""

import io
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import paths
import pytest
import vocabularies as voc
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds

from llama3np.chat import chat_format
from llama3np.errors import InputError
from llama3np.tokenizer.bpe import LLAMA3, SMOLLM, BytePairTokenizer
from llama3np.tokenizer.export import to_tokenizer_json
from llama3np.train import texts, tokens, vocabulary
from llama3np.train.tokens import Tokens
from llama3np.train.vocabulary import byte_level, characters

END = "<|end_of_text|>"
SAMPLE = "naïve “café”: 漢字, 日本 🦙!\n\n  It's 12345 o'clock.\n" * 3
UNSEEN = "ж\u0300👩‍👩‍👧\x00\r\n\t \u3000\u2028" + END

# Letters, digits, signs, and all kinds of white space: \x1c is white space to Python alone.
AWKWARD = "aé1.' \n\r\t\x1c\x85"
awkward = st.lists(st.sampled_from([*AWKWARD, "\n\n", " \n", "'s"]), max_size=40).map("".join)


# ---- texts in pieces -------------------------------------------------------------------------


def all_joined(pre):
    """A vocabulary with every stretch of up to three awkward characters, so that each cut shows."""
    stretches = ("".join(s) for n in (1, 2, 3) for s in itertools.product(AWKWARD, repeat=n))
    many = [s.encode() for s in stretches if len(s.encode()) > 1]
    pieces = [*(bytes([b]) for b in range(256)), *many]
    return BytePairTokenizer(pieces, pre, specials={})


@pytest.fixture(scope="module")
def joined():
    return {pre: all_joined(pre) for pre in (LLAMA3, SMOLLM)}


@pytest.mark.parametrize("pre", [LLAMA3, SMOLLM], ids=lambda pre: pre.name)
@given(text=awkward, size=st.integers(1, 6))
def test_pieces_have_the_ids_of_the_whole_text(joined, pre, text, size):
    pieces = list(texts.cut(io.StringIO(text, newline=""), size))
    assert "".join(pieces) == text
    assert all(pieces)
    encode = joined[pre].encode
    assert [id for piece in pieces for id in encode(piece)] == encode(text)


@pytest.mark.parametrize("text", ["a " * 5000, "a\n" * 5000, "a.\nb" * 2500], ids=repr)
def test_a_piece_is_not_longer_than_it_was_asked_to_be(text):
    assert max(map(len, texts.cut(io.StringIO(text), 100))) <= 100


def test_a_text_without_a_place_to_cut_stays_whole():
    assert list(texts.cut(io.StringIO("a\n\n" * 500), 100)) == ["a\n\n" * 500]


def test_a_byte_order_mark_is_no_text(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfa\xef\xbb\xbf")
    assert "".join(texts.blocks(tmp_path / "a.txt")) == "a\ufeff"


def test_line_ends_are_those_of_python(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"a\r\nb\rc\n")
    assert "".join(texts.blocks(tmp_path / "a.txt")) == "a\nb\nc\n"


# ---- vocabularies ----------------------------------------------------------------------------


def library(tokenizer):
    return voc.library(to_tokenizer_json(tokenizer))


@given(text=st.text(), other=st.text())
def test_every_character_of_the_text_is_one_id_and_no_text_is_lost(text, other):
    tokenizer = byte_level(characters([text]), (END,))
    ids = tokenizer.encode(text)
    assert [tokenizer.decode([id]) for id in ids] == list(text)
    assert tokenizer.decode(tokenizer.encode(other + text)) == other + text
    assert voc.library_ids(library(tokenizer), other + text) == tokenizer.encode(other + text)


def test_ids_are_bytes_then_characters_then_control_tokens(tmp_path):
    tokenizer = vocabulary.make("char", ["né漢"], tmp_path / "new", chat=False)
    assert [tokenizer.decode([id]) for id in (0, 77, 93)] == ["!", "n", "~"]
    assert sorted(map(tokenizer.token_bytes, range(256))) == [bytes([b]) for b in range(256)]
    assert [tokenizer.token_bytes(id) for id in range(256, 260)] == [
        "é".encode(),
        "漢".encode()[:2],
        "漢".encode(),
        b"",
    ]
    assert tokenizer.specials == {END: 259}
    assert (tokenizer.stop_ids, tokenizer.add_bos) == ((259,), False)


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("spec", ["char", "bpe:300"])
def test_files_are_the_same_each_time_and_those_of_the_library(tmp_path, spec, chat):
    made = [vocabulary.make(spec, [SAMPLE], tmp_path / name, chat) for name in "ab"]
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    theirs = voc.library(json.loads((tmp_path / "a/tokenizer.json").read_bytes()))
    assert theirs.get_vocab_size() == made[0].n_vocab
    text = SAMPLE + UNSEEN.removesuffix(END)
    assert voc.library_ids(theirs, text) == made[0].encode(text)
    assert theirs.decode(made[0].encode(text)) == text
    assert chat_format(made[0]) == ("llama3" if chat else None)


def test_a_control_token_in_a_text_is_ordinary_text(tmp_path):
    tokenizer = vocabulary.make("char", [SAMPLE], tmp_path / "new", chat=True)
    assert not {*tokenizer.encode(UNSEEN)} & {*tokenizer.specials.values()}


@pytest.mark.parametrize("chat", [False, True])
def test_bpe_has_as_many_tokens_as_were_asked_for(tmp_path, chat):
    n_specials = 5 if chat else 1
    for n in (256 + n_specials, 280):
        tokenizer = vocabulary.make(f"bpe:{n}", [SAMPLE], tmp_path / str(n), chat)
        assert tokenizer.n_vocab == n
        assert len(tokenizer.specials) == n_specials


def test_bpe_joins_the_most_frequent_pair_first():
    """The example of Gage 1994, "A New Algorithm for Data Compression": ABABCABCD, AB, then ABC."""
    assert vocabulary.trained("bpe:259", ["ABABCABCD"], 1) == [b"AB", b"ABC"]


@pytest.mark.parametrize(
    ("spec", "complaint"),
    [
        ("bpe:256", r"expected 257 tokens or more .*, and at most 1048576, found 'bpe:256'"),
        ("bpe:1000000000", "at most 1048576, found 'bpe:1000000000'"),  # ended the process
        ("bpe:18446744073709551615", "at most 1048576, found 'bpe:18446"),
        ("bpe:" + "9" * 5000, "at most 1048576, found 'bpe:999"),
        ("a" * 300, "expected char, bpe:N or a file, found 'aaa"),
        ("bpe:9999", r"bpe:9999: the text makes only \d+ tokens"),
        ("bpe", "expected char, bpe:N or a file, found 'bpe'"),
        ("bpe:-3", "found 'bpe:-3'"),
        ("word", "found 'word'"),
    ],
)
def test_a_spec_that_cannot_be_followed_is_refused(tmp_path, spec, complaint):
    with pytest.raises(InputError, match=complaint):
        vocabulary.make(spec, [SAMPLE], tmp_path / "new", chat=False)
    assert not list(tmp_path.iterdir())


def test_bpe_names_the_extra_that_it_needs(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    vocabulary.make("char", [SAMPLE], tmp_path / "new", chat=False)
    with pytest.raises(InputError, match=r'pip install "llama3np\[train\]"'):
        vocabulary.make("bpe:300", [SAMPLE], tmp_path / "other", chat=False)


@pytest.mark.parametrize("named", ["{}", "{}/tokenizer.json", "{}/mine.json"])
def test_a_tokenizer_that_exists_is_taken_with_its_settings(tmp_path, named):
    made = vocabulary.make("bpe:300", [SAMPLE], tmp_path / "a", chat=True)
    if named == "{}/mine.json":
        (tmp_path / "a/tokenizer.json").rename(tmp_path / "a/mine.json")
    taken = vocabulary.make(named.format(tmp_path / "a"), [], tmp_path / "b", chat=True)
    assert taken.encode(SAMPLE) == made.encode(SAMPLE)
    assert (taken.bos_id, taken.stop_ids) == (made.bos_id, made.stop_ids)
    assert taken.chat_template == made.chat_template is not None


def test_a_tokenizer_model_is_taken_with_the_same_ids_for_other_programs(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"\n".join(voc.rank_lines()))
    taken = vocabulary.make(str(tmp_path / "tokenizer.model"), [], tmp_path / "b", chat=True)
    assert taken.n_vocab == 128_256
    assert vocabulary.end_of_text(taken) == taken.specials[END]
    files = {"tokenizer.json", "tokenizer_config.json"}
    assert {path.name for path in (tmp_path / "b").iterdir()} == files
    theirs = voc.library(json.loads((tmp_path / "b/tokenizer.json").read_bytes()))
    assert theirs.encode(SAMPLE).ids == taken.encode(SAMPLE, bos=True)
    settings = json.loads((tmp_path / "b/tokenizer_config.json").read_bytes())
    assert settings["eos_token"] == "<|eot_id|>"
    assert "<|start_header_id|>" in settings["chat_template"]


def test_a_tokenizer_json_alone_gets_the_settings_that_other_programs_read(tmp_path):
    made = vocabulary.make("bpe:300", [SAMPLE], tmp_path / "a", chat=False)
    (tmp_path / "a/tokenizer_config.json").unlink()
    taken = vocabulary.make(str(tmp_path / "a/tokenizer.json"), [], tmp_path / "b", chat=False)
    assert (tmp_path / "b/tokenizer_config.json").exists()
    assert taken.encode(SAMPLE) == made.encode(SAMPLE)


def test_a_tokenizer_that_is_not_written_is_copied(tmp_path, monkeypatch):
    """Llama 2's kind."""

    def refuse(_):
        raise InputError("a vocabulary of characters is not written")

    vocabulary.make("bpe:300", [SAMPLE], tmp_path / "a", chat=False)
    (tmp_path / "a/tokenizer_config.json").unlink()
    monkeypatch.setattr(vocabulary, "to_tokenizer_json", refuse)
    vocabulary.make(str(tmp_path / "a"), [], tmp_path / "b", chat=False)
    copied = {path.name: path.read_bytes() for path in (tmp_path / "b").iterdir()}
    assert copied == {"tokenizer.json": (tmp_path / "a/tokenizer.json").read_bytes()}


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "a.bin").touch()
    for path in (tmp_path, tmp_path / "a.bin"):
        with pytest.raises(InputError, match=r"expected tokenizer.json or tokenizer.model"):
            vocabulary.make(str(path), [], tmp_path / "new", chat=False)


def test_a_tokenizer_that_cannot_be_used_is_told_by_its_own_name(tmp_path):
    (tmp_path / "mine.json").write_text("{", encoding="utf-8")
    with pytest.raises(InputError, match=r"mine\.json: expected JSON"):
        vocabulary.make(str(tmp_path / "mine.json"), [], tmp_path / "new", chat=False)
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_is_not_overwritten(tmp_path):
    vocabulary.make("char", ["a"], tmp_path, chat=False)
    with pytest.raises(InputError, match="exists already"):
        vocabulary.make("char", ["b"], tmp_path, chat=False)


# ---- token files -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def char(tmp_path_factory):
    return vocabulary.make("char", [SAMPLE], tmp_path_factory.mktemp("char"), chat=False)


@pytest.mark.parametrize("block", [7, 1 << 20])
def test_the_stream_is_the_texts_with_an_end_between(tmp_path, monkeypatch, char, block):
    monkeypatch.setattr(texts, "BLOCK", block)
    for name, text in {"a": SAMPLE, "b": "x\n" * 300}.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    tokens.write(tmp_path / "new", char, [tmp_path / "a", str(tmp_path / "b")], length=16)
    train, val = tokens.open_tokens(tmp_path / "new")
    assert train.ids_M.dtype == val.ids_M.dtype == np.uint16
    assert train.mask_M is None
    assert isinstance(train.ids_M.base, np.memmap)
    ids = [*train.ids_M, *val.ids_M]
    assert ids == [*char.encode(SAMPLE), char.specials[END], *char.encode("x\n" * 300)]
    assert len(train.ids_M) == int(len(ids) * 0.9)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["train.npy", "val.npy"]


def test_a_text_begins_with_bos_where_prompts_do(tmp_path):
    tokenizer = vocabulary.make("char", [SAMPLE], tmp_path / "voc", chat=True)
    (tmp_path / "a").write_text(SAMPLE, encoding="utf-8")
    tokens.write(tmp_path / "new", tokenizer, [tmp_path / "a"] * 2, length=2)
    ids = np.concatenate([part.ids_M for part in tokens.open_tokens(tmp_path / "new")]).tolist()
    one = [tokenizer.bos_id, *tokenizer.encode(SAMPLE)]
    assert ids == [*one, tokenizer.specials[END], *one]


def test_a_vocabulary_of_characters_encodes_a_file_at_once(tmp_path, monkeypatch):
    """Llama 2's kind puts a space before each text that it is given."""
    monkeypatch.setattr(texts, "BLOCK", 7)
    (tmp_path / "a").write_text("once upon a time\n" * 9, encoding="utf-8")
    tokens.write(tmp_path / "new", voc.pieces(), [tmp_path / "a"], length=2)
    ids = np.concatenate([part.ids_M for part in tokens.open_tokens(tmp_path / "new")]).tolist()
    assert ids == voc.pieces().prompt_ids("once upon a time\n" * 9)


def test_a_large_vocabulary_has_ids_of_32_bits(tmp_path):
    ids_M = np.array([1, 70_000, 3, 4])
    for n_vocab, dtype in ((1 << 16, np.uint16), (70_001, np.uint32)):
        tokens.store(tmp_path / str(n_vocab), n_vocab, [Tokens(ids_M % n_vocab)], lambda _: 3)
        train, val = tokens.open_tokens(tmp_path / str(n_vocab))
        assert train.ids_M.dtype == dtype
        assert [*train.ids_M, *val.ids_M] == [*(ids_M % n_vocab)]


def test_tiny_shakespeare_is_split_as_nanogpt_splits_it(tmp_path):
    """Its data/shakespeare_char/readme.md: train has 1,003,854 tokens, val has 111,540."""
    file = paths.shared("data/tinyshakespeare.txt")
    tokenizer = vocabulary.make("char", [file], tmp_path / "voc", chat=False)
    tokens.write(tmp_path / "new", tokenizer, [file], length=256)
    parts = tokens.open_tokens(tmp_path / "new")
    assert [len(part.ids_M) for part in parts] == [1_003_854, 111_540]


@given(val_fraction=st.floats(0.01, 0.99), length=st.integers(1, 50))
def test_a_text_too_short_is_told_how_long_it_must_be(tmp_path_factory, char, val_fraction, length):
    directory = tmp_path_factory.mktemp("short")

    def written(n):
        (directory / "a").write_text("x" * n, encoding="utf-8")
        tokens.write(directory / f"{n}", char, [directory / "a"], val_fraction, length=length)
        return [len(part.ids_M) for part in tokens.open_tokens(directory / f"{n}")]

    with pytest.raises(InputError, match=r"expected \d+ tokens .*, found 2$") as error:
        written(2)
    needed = int(str(error.value).split()[2])
    assert min(written(needed)) == length + 1
    with pytest.raises(InputError, match=f"expected {needed} tokens"):
        written(needed - 1)
    assert sorted(path.name for path in directory.iterdir()) == sorted(["a", f"{needed}"])


def test_how_long_a_text_must_be_is_told_at_once(tmp_path, char):
    """A search from below took a step for each token."""
    (tmp_path / "a").write_text("x", encoding="utf-8")
    with pytest.raises(InputError, match="expected 10000000001 tokens"):
        tokens.write(tmp_path / "new", char, [tmp_path / "a"], length=10**9)


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        (b"", "a.txt: expected a text, found an empty file"),
        (b"good\nbad \xff\n", r"a.txt:2: expected UTF-8, found the byte 0xff"),
        (None, "a.txt: cannot be read: No such file"),
        ("directory", "a.txt: expected a file, found something else"),
    ],
)
def test_a_file_that_is_no_text_is_named(tmp_path, char, content, complaint):
    path = tmp_path / "a.txt"
    if content == "directory":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content)
    with pytest.raises(InputError, match=complaint):
        vocabulary.make("char", [path], tmp_path / "voc", chat=False)
    with pytest.raises(InputError, match=complaint):
        tokens.write(tmp_path / "new", char, [path], length=1)
    assert [p.name for p in tmp_path.iterdir()] == ([] if content is None else ["a.txt"])


def test_the_line_of_a_bad_byte_is_told_wherever_it_is(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"one line\n" * 100_000 + b"\xe2\x82\n")
    with pytest.raises(InputError, match=r"a\.txt:100001: expected UTF-8, found the byte 0xe2"):
        list(texts.blocks(path))


@pytest.mark.parametrize("name", ["train.npy", "val.npy"])
@pytest.mark.parametrize(
    "spoil",
    [
        Path.unlink,
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:-1]),
        lambda path: np.save(path, np.zeros(4)),
        lambda path: np.save(path, np.zeros((2, 2), np.uint16)),
    ],
)
def test_a_spoiled_token_file_is_named(tmp_path, name, spoil):
    tokens.store(tmp_path / "new", 300, [Tokens(np.arange(9))], lambda _: 5)
    spoil(tmp_path / "new" / name)
    with pytest.raises(InputError, match=rf"{name}: expected"):
        tokens.open_tokens(tmp_path / "new")


# ---- batches ---------------------------------------------------------------------------------


@st.composite
def streams(draw):
    """Tokens that tell their own places, and a length of windows of which they have one or more."""
    length = draw(st.integers(1, 12))
    n_tokens = draw(st.integers(length + 1, 100))
    bits = st.lists(st.integers(0, 1), min_size=n_tokens, max_size=n_tokens)
    mask = draw(st.none() | bits)
    mask_M = None if mask is None else np.array(mask, np.uint8)
    return Tokens(np.arange(n_tokens, dtype=np.uint16), mask_M), length


rows_drawn = st.integers(1, 7)


@given(stream=streams(), seed=seeds, step=st.integers(0, 1000), rows=rows_drawn)
def test_a_batch_has_windows_of_the_stream_and_what_follows(stream, seed, step, rows):
    stream, length = stream
    found = tokens.batch(stream, seed, step, rows, length)
    assert found.ids_BT.shape == found.targets_BT.shape == found.weights_BT.shape == (rows, length)
    assert found.ids_BT.dtype == found.targets_BT.dtype == np.int64
    assert (np.diff(found.ids_BT, axis=1) == 1).all()
    assert (found.targets_BT == found.ids_BT + 1).all()
    assert found.ids_BT.min() >= 0
    assert found.targets_BT.max() < len(stream.ids_M)


@given(stream=streams(), seed=seeds, step=st.integers(0, 1000), rows=rows_drawn)
def test_weights_are_the_masks_and_sum_to_1(stream, seed, step, rows):
    stream, length = stream
    found = tokens.batch(stream, seed, step, rows, length)
    mask_M = np.ones(len(stream.ids_M)) if stream.mask_M is None else stream.mask_M
    learned_BT = mask_M[found.targets_BT]
    assert found.weights_BT.dtype == np.float32
    np.testing.assert_allclose(found.weights_BT * learned_BT.sum(), learned_BT, rtol=1e-6)
    np.testing.assert_allclose(found.weights_BT.sum(), float(learned_BT.any()), rtol=1e-5)


@given(stream=streams(), seed=seeds, epoch=st.integers(0, 50))
def test_an_epoch_has_each_target_once_but_for_the_phase(stream, seed, epoch):
    stream, length = stream
    n_tokens = len(stream.ids_M)
    windows = max(n_tokens // length - 1, 1)
    found = tokens.batch(stream, seed, epoch, windows, length)
    targets = sorted(found.targets_BT.ravel().tolist())
    assert targets == list(range(targets[0], targets[0] + windows * length))
    assert n_tokens - len(targets) < 2 * length


@given(stream=streams(), seed=seeds, step=st.integers(0, 50), rows=rows_drawn)
def test_steps_go_on_where_the_last_one_ended(stream, seed, step, rows):
    """Also: a step is the same with the others and without them, in any order."""
    stream, length = stream
    found = tokens.batch(stream, seed, step, rows, length)
    singles = [tokens.batch(stream, seed, step * rows + i, 1, length) for i in range(rows)][::-1]
    tokens._epoch.cache_clear()
    again = tokens.batch(stream, seed, step, rows, length)
    assert found.ids_BT.tolist() == [single.ids_BT[0].tolist() for single in singles[::-1]]
    assert all(np.array_equal(a, b) for a, b in zip(found, again, strict=True))


def test_seeds_and_epochs_have_orders_and_phases_of_their_own():
    stream = Tokens(np.arange(1000, dtype=np.uint16))
    found = {
        (seed, epoch): tokens.batch(stream, seed, epoch, 124, 8).ids_BT[:, 0]
        for seed in range(4)
        for epoch in range(4)
    }
    assert len({tuple(start_B % 8) for start_B in found.values()}) > 4
    assert len({tuple(start_B // 8) for start_B in found.values()}) == 16


def test_the_order_of_a_seed_stays_what_it_was():
    """What the embedded model was trained on: another order would make another model."""
    stream = Tokens(np.arange(1000, dtype=np.uint16))
    found = [tokens.batch(stream, 1337, step, 4, 8).ids_BT[:, 0].tolist() for step in (0, 31)]
    assert found == [[73, 737, 129, 697], [451, 811, 683, 659]]


def test_fewer_tokens_than_a_window_are_refused():
    with pytest.raises(InputError, match="expected 9 or more for a window, found 8"):
        tokens.batch(Tokens(np.arange(8)), 0, 0, 1, 8)


@given(stream=streams(), rows=rows_drawn)
def test_whole_has_each_target_once(stream, rows):
    stream, length = stream
    n_tokens = len(stream.ids_M)
    found = list(tokens.whole(stream, rows, length))
    ids, targets, weights = (np.concatenate([b[i].ravel() for b in found]) for i in range(3))
    assert {part.dtype for batch in found for part in batch} == {np.dtype("i8"), np.dtype("f4")}
    assert all(len(batch.ids_BT) <= rows for batch in found)
    mask_M = np.ones(n_tokens) if stream.mask_M is None else stream.mask_M
    counted = targets[weights > 0].tolist()
    assert counted == [i for i in range(1, n_tokens) if mask_M[i]]
    assert (ids[weights > 0] + 1).tolist() == counted
    assert set(weights.tolist()) <= {0.0, 1.0}
    assert len(targets) - (n_tokens - 1) < length

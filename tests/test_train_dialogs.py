"""Chat data: which tokens are learned, how dialogs are split, and refusals with file and line."""

import json
import re

import numpy as np
import pytest
import vocabularies as voc
from hypothesis import given
from hypothesis import strategies as st

from llama3np.chat import chat_ids
from llama3np.errors import InputError
from llama3np.tokenizer.bpe import SMOLLM, BytePairTokenizer
from llama3np.train import dialogs, tokens, vocabulary

MARKS = ["<|eot_id|>", "<|start_header_id|>", "<|im_end|>", "<|im_start|>assistant\n", "\n", " "]
CONTENTS = st.lists(st.sampled_from(MARKS) | st.text()).map("".join)
ROLES = st.sampled_from(["system", "user", "assistant"])
MESSAGES = st.fixed_dictionaries({"role": ROLES, "content": CONTENTS})
ANSWER = {"role": "assistant", "content": "Hello!"}
HI = [{"role": "user", "content": "Hi"}, ANSWER]
DEFAULT_SYSTEM = "{{ '<|im_start|>system\nbe kind<|im_end|>\n' }}"


@pytest.fixture(scope="module")
def llama3(tmp_path_factory):
    directory = tmp_path_factory.mktemp("llama3")
    return vocabulary.make("bpe:280", ["assistant user\n\n ab <|eot_id|> " * 9], directory, True)


@pytest.fixture(scope="module")
def formats(llama3):
    """Each tokenizer with the token that closes a turn."""
    return {
        "llama3": (llama3, "<|eot_id|>"),
        "chatml": (voc.chatml(None), "<|im_end|>"),
        "default system": (voc.chatml(DEFAULT_SYSTEM), "<|im_end|>"),
    }


def written(path, lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    return path


# ---- ids and masks ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["llama3", "chatml", "default system"])
@given(messages=st.lists(MESSAGES, max_size=5))
def test_the_masked_tokens_are_the_answers_and_nothing_else(formats, name, messages):
    tokenizer, closing = formats[name]
    ids_M, mask_M = dialogs.encode(tokenizer, messages)
    assert ids_M.tolist() == chat_ids(tokenizer, messages, add_generation_prompt=False)
    answers = [m["content"] + closing for m in messages if m["role"] == "assistant"]
    assert mask_M.dtype == np.uint8
    assert tokenizer.decode(ids_M[mask_M == 1].tolist(), specials=True) == "".join(answers)


@pytest.mark.parametrize("name", ["llama3", "chatml", "default system"])
@given(messages=st.lists(MESSAGES, max_size=3), content=CONTENTS)
def test_what_is_learned_begins_where_the_prompt_ends(formats, name, messages, content):
    tokenizer, _ = formats[name]
    messages = [{"role": "user", "content": "Hi"}, *messages]
    ids_M, mask_M = dialogs.encode(tokenizer, [*messages, {**ANSWER, "content": content}])
    prompt = chat_ids(tokenizer, messages)
    assert ids_M[: len(prompt)].tolist() == prompt
    assert not mask_M[len(prompt) - 1]
    assert mask_M[len(prompt)]


def test_a_token_of_header_and_answer_is_not_learned():
    """SmolLM2's pattern cuts `assistant`, a line break with a space, and ` x`."""
    specials = {"<|im_start|>": 257, "<|im_end|>": 258}
    pieces = [*(bytes([b]) for b in range(256)), b"\n ", b"", b""]
    tokenizer = BytePairTokenizer(pieces, SMOLLM, specials=specials)
    ids_M, mask_M = dialogs.encode(tokenizer, [{"role": "assistant", "content": "  x"}])
    assert 256 in ids_M
    assert tokenizer.decode(ids_M[mask_M == 1].tolist(), specials=True) == " x<|im_end|>"


def test_an_answer_of_weight_0_is_not_learned(llama3):
    messages = [*HI, {"role": "user", "content": "?"}, {**ANSWER, "content": "!", "weight": 0}]
    ids_M, mask_M = dialogs.encode(llama3, messages)
    assert llama3.decode(ids_M[mask_M == 1].tolist(), specials=True) == "Hello!<|eot_id|>"


def test_a_vocabulary_without_dialogs_is_refused(tmp_path):
    tokenizer = vocabulary.make("char", ["a"], tmp_path / "voc", chat=False)
    data = written(tmp_path / "a.jsonl", [HI, HI])
    with pytest.raises(InputError, match="the dialogs of llama3 or chatml, found none"):
        dialogs.write(tmp_path / "new", tokenizer, [data], length=1)
    assert not (tmp_path / "new").exists()


# ---- files -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "n_val"), [(2, 1), (9, 1), (10, 1), (11, 2), (30, 3)])
def test_the_last_tenth_of_the_dialogs_is_for_validation(tmp_path, llama3, n, n_val):
    lines = [[{"role": "user", "content": "x" * i}, ANSWER] for i in range(n)]
    first = written(tmp_path / "a.jsonl", [{"messages": line} for line in lines[:1]])
    second = written(tmp_path / "b.jsonl", lines[1:])
    dialogs.write(tmp_path / "new", llama3, [first, str(second)], length=4)
    parts = [dialogs.encode(llama3, line) for line in lines]
    expected = (parts[: n - n_val], parts[n - n_val :])
    for found, dialogs_of in zip(tokens.open_tokens(tmp_path / "new"), expected, strict=True):
        assert found.ids_M.tolist() == np.concatenate([d.ids_M for d in dialogs_of]).tolist()
        assert found.mask_M.tolist() == np.concatenate([d.mask_M for d in dialogs_of]).tolist()


def test_contents_are_what_the_messages_say(tmp_path):
    data = written(tmp_path / "a.jsonl", [HI, {"messages": [{**ANSWER, "content": "é\n"}]}])
    data.write_text("\n" + data.read_text(encoding="utf-8") + " \n\n", encoding="utf-8")
    assert list(dialogs.contents([data])) == ["Hi", "Hello!", "é\n"]


def test_a_byte_order_mark_before_the_first_line_is_skipped(tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(HI), encoding="utf-8-sig")
    assert list(dialogs.contents([tmp_path / "a.jsonl"])) == ["Hi", "Hello!"]


def test_a_lone_surrogate_is_told_before_a_vocabulary_is_made_of_it(tmp_path):
    data = written(tmp_path / "a.jsonl", [HI, [{**ANSWER, "content": "a\ud800"}]])
    complaint = r"a\.jsonl:2: message 0: content: .* the lone surrogate U\+D800"
    with pytest.raises(InputError, match=complaint):
        vocabulary.make("char", dialogs.contents([data]), tmp_path / "new", True)


def test_a_tools_turn_has_the_role_of_chat_in_the_written_template(llama3):
    tool = {**ANSWER, "role": "tool"}
    assert chat_ids(llama3, [tool]) == chat_ids(llama3, [{**tool, "role": "ipython"}])
    assert "('ipython' if message['role'] == 'tool' else message['role'])" in llama3.chat_template


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "expected JSON, found something else"),
        ("[" * 100_000, "expected JSON, found something else"),
        ("1", "expected a list of messages, found 1"),
        ('{"prompt": "Hi"}', "expected a list of messages, found {'prompt': 'Hi'}"),
        ('["Hi"]', "message 0: expected a text for 'role', found 'Hi'"),
        ('[{"role": "assistant"}]', "message 0: expected a text for 'content'"),
        ('[{"role": "assistant", "content": null}]', "expected a text for 'content'"),
        ('[{"role": "user", "content": "Hi"}]', "expected an assistant's message"),
        (
            "[]",
            "expected an assistant's message, of a weight other than 0, to learn from, found []",
        ),
        ('[{"role": "assistant", "content": "", "weight": 2}]', "weight: expected 0 or 1, found 2"),
        ('[{"role": "assistant", "content": "", "weight": 0}]', "of a weight other than 0"),
        ('[{"role": "user", "role": "assistant", "content": ""}]', "'role' stands twice"),
        (json.dumps([{"role": "bot", "content": ""}, *HI]), "expected a role among"),
        (json.dumps([{**ANSWER, "content": "\ud800"}]), "the lone surrogate U+D800"),
    ],
)
def test_a_line_that_is_no_dialog_is_told_with_its_number(tmp_path, llama3, line, complaint):
    data = tmp_path / "a.jsonl"
    data.write_text(f"{json.dumps(HI)}\n\n{line}\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"a\.jsonl:3: .*" + re.escape(complaint)):
        dialogs.write(tmp_path / "new", llama3, [data], length=1)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


@pytest.mark.parametrize(
    ("lines", "length", "complaint"),
    [
        ([], 1, "expected two dialogs or more, one to validate by, found 0"),
        ([HI], 1, "expected two dialogs or more, one to validate by, found 1"),
        ([HI, HI], 500, r"expected 501 tokens or more to train on, .*, found \d+ of \d+"),
    ],
)
def test_too_little_is_told(tmp_path, llama3, lines, length, complaint):
    data = written(tmp_path / "a.jsonl", lines)
    with pytest.raises(InputError, match=complaint):
        dialogs.write(tmp_path / "new", llama3, [data], length=length)
    assert not (tmp_path / "new").exists()

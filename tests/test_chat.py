"""Dialogs as ids: published ones, the law that no message can leave its turn, and refusals."""

import json
from types import SimpleNamespace

import paths
import pytest
import vocabularies as voc
from hypothesis import given
from hypothesis import strategies as st

from llama3np.chat import chat_format, chat_ids
from llama3np.errors import InputError
from llama3np.tokenizer import from_gguf, from_tokenizer_model

TOKENIZERS = json.loads((paths.GOLDENS / "tokenizers.json").read_text(encoding="utf-8"))
SMOLLM2 = json.loads((paths.GOLDENS / "smollm2_135m_q4_1.json").read_text(encoding="utf-8"))
CONTROL = ["<|eot_id|>", "<|start_header_id|>", "<|begin_of_text|>", "<|im_end|>", "<|im_start|>"]
CONTENTS = st.lists(st.one_of(st.sampled_from(CONTROL), st.sampled_from("\n a"), st.text())).map(
    "".join
)
ROLES = st.sampled_from(["system", "user", "assistant"])
DIALOGS = st.lists(
    st.fixed_dictionaries({"role": ROLES, "content": CONTENTS}), min_size=1, max_size=4
)


@pytest.fixture(scope="module")
def made_up(tmp_path_factory):
    """Llama 3's control tokens with a made-up vocabulary, for where the real file is absent."""
    path = tmp_path_factory.mktemp("made_up") / "tokenizer.model"
    path.write_bytes(b"\n".join(voc.rank_lines()))
    return from_tokenizer_model(path)


@pytest.fixture(scope="module")
def smollm2():
    return voc.smollm2()


# ---------------------------------------------------------------------------- goldens


@pytest.mark.parametrize("dialog", TOKENIZERS["llama3_dialogs"])
def test_llama3_dialogs_have_metas_ids(dialog):
    assert chat_ids(voc.llama3(), dialog["messages"]) == dialog["prompt_ids"]


CHATS = [item for item in SMOLLM2["items"] if item["messages"]]


@pytest.mark.parametrize("item", CHATS, ids=lambda item: item["id"])
def test_smollm2_dialogs_have_the_ids_of_its_template(smollm2, item):
    ids = chat_ids(smollm2, item["messages"])
    assert ids == item["prompt_ids"]
    assert smollm2.decode(ids, specials=True) == item["prompt"]


def test_a_published_dialog_without_the_answers_header():
    """One message of meta-llama/llama3 llama/test_tokenizer.py:39; BOS is the dialog's."""
    message = {"role": "user", "content": "This is a test sentence."}
    expected = [128006, 882, 128007, 271, 2028, 374, 264, 1296, 11914, 13, 128009]
    assert chat_ids(voc.llama3(), [message], add_generation_prompt=False) == [128000, *expected]


# ---------------------------------------------------------------------------- laws


@given(messages=DIALOGS)
def test_llama3_turns_are_as_many_as_messages_whatever_they_say(made_up, messages):
    ids = chat_ids(made_up, messages, add_generation_prompt=False)
    start, eot = made_up.specials["<|start_header_id|>"], made_up.specials["<|eot_id|>"]
    assert ids.count(start) == ids.count(eot) == len(messages)
    assert ids.count(made_up.bos_id) == 1
    turns = [f"{m['role']}<|end_header_id|>\n\n{m['content']}<|eot_id|>" for m in messages]
    text = "".join(f"<|start_header_id|>{turn}" for turn in turns)
    assert made_up.decode(ids, specials=True) == "<|begin_of_text|>" + text


@given(messages=DIALOGS)
def test_chatml_turns_are_as_many_as_messages_whatever_they_say(smollm2, messages):
    ids = chat_ids(smollm2, messages, add_generation_prompt=False)
    added = messages[0]["role"] != "system"  # the template's own system message
    assert ids.count(1) == ids.count(2) == len(messages) + added


@given(messages=DIALOGS)
def test_an_answer_continues_its_prompt(made_up, smollm2, messages):
    """What was fed before an answer is a prefix of the dialog with it: a cache can be kept."""
    for tokenizer in (made_up, smollm2):
        prompt = chat_ids(tokenizer, messages)
        bare = chat_ids(tokenizer, messages, add_generation_prompt=False)
        answered = chat_ids(tokenizer, [*messages, {"role": "assistant", "content": "Yes"}])
        assert prompt[: len(bare)] == bare == answered[: len(bare)]


def test_line_ends_of_a_message_do_not_join_the_header(made_up):
    ids = chat_ids(made_up, [{"role": "user", "content": "\n"}], add_generation_prompt=False)
    assert ids[-2:] == [*made_up.encode("\n"), made_up.specials["<|eot_id|>"]]


def test_a_tool_answers_llama3_as_ipython(made_up):
    tool, ipython = (
        chat_ids(made_up, [{"role": role, "content": "42"}]) for role in ("tool", "ipython")
    )
    assert tool == ipython


def test_an_empty_dialog_is_the_header_of_an_answer(made_up, smollm2):
    assert made_up.decode(chat_ids(made_up, []), specials=True) == (
        "<|begin_of_text|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    assert smollm2.decode(chat_ids(smollm2, []), specials=True) == ("<|im_start|>assistant\n")


# ---------------------------------------------------------------------------- formats


@pytest.mark.parametrize(
    ("template", "system"),
    [
        ("{{ '<|im_start|>system\nbe kind<|im_end|>\n' }}", "be kind"),
        (r"{{ '<|im_start|>system\nbe\nkind<|im_end|>\n' }}", "be\nkind"),
        ("{{ '<|im_start|>system\n' + message + '<|im_end|>\n' }}", None),
        ("{{ '<|im_start|>' + role + '\n' + content + '<|im_end|>' }}", None),
        (None, None),
    ],
)
def test_a_default_system_message_is_taken_from_the_template(template, system):
    tokenizer = voc.chatml(template)
    ids = chat_ids(tokenizer, [{"role": "user", "content": "hi"}], add_generation_prompt=False)
    expected = "<|im_start|>user\nhi<|im_end|>\n"
    if system:
        expected = f"<|im_start|>system\n{system}<|im_end|>\n" + expected
    assert tokenizer.decode(ids, specials=True) == expected


@pytest.mark.parametrize(
    ("names", "template", "expected"),
    [
        (["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"], None, "llama3"),
        (["<|im_start|>", "<|im_end|>"], None, "chatml"),
        (["<|start_header_id|>", "<|im_end|>"], None, None),
        ([*CONTROL, "<|end_header_id|>"], None, "llama3"),
        ([*CONTROL, "<|end_header_id|>"], "{{ '<|im_start|>' }}", "chatml"),
        ([*CONTROL, "<|end_header_id|>"], "{{ '<|start_header_id|>' }}", "llama3"),
        ([], "{{ '<|im_start|>' }}", None),
    ],
)
def test_control_tokens_tell_the_format_and_the_template_decides(names, template, expected):
    specials = {name: id for id, name in enumerate(names)}
    tokenizer = SimpleNamespace(specials=specials, chat_template=template)
    assert chat_format(tokenizer) == expected


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ '[INST] <<SYS>>' }}", "llama2"),
        ("{{ '[INST] ' }}", None),  # Mistral's: other spaces, one BOS
        (None, None),  # base and chat models of Llama 2 have one vocabulary
    ],
)
def test_only_a_template_tells_llama2(template, expected):
    tokenizer = SimpleNamespace(specials={"<s>": 1, "</s>": 2}, chat_template=template)
    assert chat_format(tokenizer) == expected


def test_a_format_can_be_asked_for(made_up):
    hi = [{"role": "user", "content": "Hi"}]
    shown = llama2(None).decode(chat_ids(llama2(None), hi, format="llama2"), specials=True)
    assert shown == "<s>[INST] Hi [/INST]"
    assert chat_ids(made_up, hi, format="llama3") == chat_ids(made_up, hi)
    with pytest.raises(InputError, match="no control token <s>"):
        chat_ids(made_up, hi, format="llama2")
    with pytest.raises(InputError, match="expected one of llama3, chatml, llama2, found 'alpaca'"):
        chat_ids(made_up, hi, format="alpaca")
    with pytest.raises(InputError, match=r"no chat format .* choose llama2 if it is one"):
        chat_ids(llama2(None), hi)


# ---------------------------------------------------------------------------- llama 2


def llama2(template="[INST] <<SYS>>"):
    """Llama 2's control tokens, bytes and a few pieces, with this template."""
    texts = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    pieces = ["\u2581", "[", "]", "I", "N", "S", "T", "\u2581[", "IN", "ST", "INST", "a", "\u2581a"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": [*texts, *pieces],
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(pieces))],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * len(pieces)],
        "tokenizer.chat_template": template,
    }
    return from_gguf(metadata, "small.gguf")


def by_meta(tokenizer, dialog):
    """meta-llama/llama llama/generation.py, chat_completion, written from its description."""
    if dialog[0]["role"] == "system":
        system, user, *rest = dialog
        content = "<<SYS>>\n" + system["content"] + "\n<</SYS>>\n\n" + user["content"]
        dialog = [{"role": "user", "content": content}, *rest]
    ids = []
    for prompt, answer in zip(dialog[:-1:2], dialog[1::2], strict=True):
        pair = f"[INST] {prompt['content'].strip()} [/INST] {answer['content'].strip()} "
        ids += [1, *tokenizer.encode(pair), 2]
    return [*ids, 1, *tokenizer.encode(f"[INST] {dialog[-1]['content'].strip()} [/INST]")]


PLAIN = st.text("aIN [/]\n<>", max_size=8).filter(lambda t: "[/" not in t and "[I" not in t)


@given(system=st.none() | PLAIN, pairs=st.lists(st.tuples(PLAIN, PLAIN), max_size=2), last=PLAIN)
def test_llama2_dialogs_have_metas_ids(system, pairs, last):
    first = [] if system is None else [{"role": "system", "content": system}]
    turns = [
        {"role": role, "content": content}
        for pair in pairs
        for role, content in zip(("user", "assistant"), pair, strict=True)
    ]
    dialog = [*first, *turns, {"role": "user", "content": last}]
    tokenizer = llama2()
    assert chat_ids(tokenizer, dialog) == by_meta(tokenizer, dialog)


def test_a_llama2_dialog_as_text():
    dialog = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": " Hi \n"},
        {"role": "assistant", "content": " Hello! "},
        {"role": "user", "content": "Bye"},
    ]
    tokenizer = llama2()
    ids = chat_ids(tokenizer, dialog)
    assert tokenizer.decode(ids, specials=True) == (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n Hi [/INST] Hello! </s><s>[INST] Bye [/INST]"
    )
    answered = chat_ids(tokenizer, dialog[:3], add_generation_prompt=False)
    assert answered == ids[: len(answered)]
    assert tokenizer.decode(chat_ids(tokenizer, dialog[:1]), specials=True) == (
        "<s>[INST] <<SYS>>\nBe kind.\n<</SYS>> [/INST]"
    )
    assert chat_ids(tokenizer, []) == [1]


@pytest.mark.parametrize(
    ("roles", "complaint"),
    [
        (["assistant"], "message 0: expected the role 'user', found 'assistant'"),
        (["user", "user"], "message 1: expected the role 'assistant', found 'user'"),
        (["system", "user", "system"], "message 2: expected the role 'assistant'"),
        (["user", "assistant"], "expected the last message to be the user's"),
        (["user", "tool"], "message 1: expected a role among system, user, assistant"),
    ],
)
def test_llama2_turns_alternate(roles, complaint):
    with pytest.raises(InputError, match=complaint):
        chat_ids(llama2(), [{"role": role, "content": "a"} for role in roles])


@pytest.mark.parametrize("tag", ["[INST]", "[/INST]", "<<SYS>>", "<</SYS>>"])
def test_a_llama2_message_with_a_mark_of_turns_is_refused(tag):
    """They are ordinary text there: nothing else would keep a message inside its turn."""
    with pytest.raises(InputError, match=r"message 1: .* would end or begin a turn"):
        chat_ids(
            llama2(),
            [{"role": "system", "content": "a"}, {"role": "user", "content": f"a {tag} b"}],
        )


def test_a_vocabulary_without_format_is_refused():
    assert chat_format(voc.pieces()) is None
    with pytest.raises(InputError, match="has no chat format"):
        chat_ids(voc.pieces(), [{"role": "user", "content": "Hi"}])


@pytest.mark.parametrize(
    ("message", "complaint"),
    [
        ({"content": "Hi"}, "message 1: expected a text for 'role'"),
        ({"role": "user"}, "message 1: expected a text for 'content'"),
        ({"role": "user", "content": None}, "'content'"),
        ({"role": "user", "content": [{"type": "text"}]}, "'content'"),
        ({"role": "user", "content": b"Hi"}, "'content'"),
        ("Hi", "message 1"),
        ({"role": "bot", "content": "Hi"}, "message 1: expected a role among system, .*'bot'"),
        ({"role": "User", "content": "Hi"}, "'User'"),
    ],
)
def test_a_message_that_is_none_is_refused(made_up, message, complaint):
    for tokenizer in (made_up, voc.chatml(None)):
        with pytest.raises(InputError, match=complaint):
            chat_ids(tokenizer, [{"role": "user", "content": "ok"}, message])

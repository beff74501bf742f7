"""A chat of many turns gives what each turn gives when its whole dialog is run alone."""

import devices
import numpy as np
import paths
import pytest
import vocabularies as voc
from hypothesis import assume, given
from hypothesis import strategies as st

from llama3np.config import Config
from llama3np.conversation import Conversation
from llama3np.errors import InputError
from llama3np.llm import Llama
from llama3np.params import random


@pytest.fixture(scope="module", params=devices.PLACES)
def llm(request):
    """Random weights behind a tokenizer, on the CPU a real one if there is one: nonsense, exact."""
    real = request.param == "cpu" and any(paths.found_smollm2())
    tokenizer = voc.smollm2() if real else voc.chatml()
    end = tokenizer.specials["<|im_end|>"]
    config = Config(
        dim=8, n_layers=2, n_heads=2, n_kv_heads=1, head_dim=4, ffn_dim=8, tied=True,
        vocab_size=tokenizer.n_vocab, context_length=300,
    )  # fmt: skip
    params = random(config, np.random.default_rng(3))
    dtype = "float32" if request.param == "cuda" else "float64"
    options = {"stop_ids": [end], "dtype": dtype, **devices.placed(request.param)}
    return Llama(config, params, tokenizer, **options)


def undoubted(llm, ids, new_ids):
    """Whether float32 can tell the largest logit before each new id."""
    logits_TV = llm.forward([*ids, *new_ids[:-1]])[0, len(ids) - 1 :]
    second_T, first_T = np.sort(logits_TV)[:, -2:].T
    return (first_T - second_T > 1e-4).all()


said = st.text(st.sampled_from("abc é漢\n<|im_end|>"), min_size=1, max_size=8)


@given(st.lists(st.tuples(said, st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=4))
def test_every_reply_is_that_of_the_whole_dialog(llm, turns):
    """However many tokens each reply has, and wherever the listener breaks it off."""
    conversation, messages = Conversation(llm), []
    for text, count, heard in turns:
        messages.append({"role": "user", "content": text})
        (alone,) = llm.generate(llm.chat_ids(messages), count)
        assume(undoubted(llm, llm.chat_ids(messages), alone.ids))
        steps = []
        replies = conversation.reply(text, count)
        for step in replies:
            steps.append(step)
            if len(steps) == heard:
                break
        replies.close()
        assert conversation.prompt_ids == llm.chat_ids(messages)
        assert [step.id for step in steps] == alone.ids[: len(steps)]
        messages.append({"role": "assistant", "content": "".join(step.text for step in steps)})
        assert conversation.messages == messages


def test_only_what_is_new_is_fed(llm):
    conversation = Conversation(llm, system="Be brief.")
    list(conversation.reply("One", 3))
    before = int(conversation.cache.lengths_B[0])
    fed = []
    run = llm._run
    llm._run = lambda ids_BT, *rest: fed.append(ids_BT.size) or run(ids_BT, *rest)
    try:
        next(conversation.reply("Two", 3))
    finally:
        del llm._run
    whole = len(conversation.prompt_ids)
    assert before < whole
    assert fed[0] < whole - before + 6  # a reply's text may encode to other ids than it came by


def test_a_dialog_that_no_longer_fits_is_told_and_stays_as_it_was(llm):
    conversation = Conversation(llm)
    list(conversation.reply("One", 3))
    messages = list(conversation.messages)
    with pytest.raises(InputError, match="max_seq_len 300"):
        conversation.reply("word " * 400, 3)
    assert conversation.messages == messages
    assert list(conversation.reply("Two", 3))

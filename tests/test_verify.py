"""verify.py: a model whose facts are true passes, any other is told apart, unknown is unknown."""

import copy
import hashlib
import json

import numpy as np
import paths
import pytest
from hypothesis import given
from hypothesis import strategies as st

import llama3np.params
import llama3np.verify
from llama3np.cli import main
from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.llm import Llama
from llama3np.load import save_hf
from llama3np.params import from_named, named
from llama3np.presets import PRESETS
from llama3np.tokenizer import from_tokenizer_model
from llama3np.tokenizer.bpe import LLAMA3, BytePairTokenizer
from llama3np.verify import AGREES, DIFFERS, UNKNOWN, public_facts, status, verify

TINY = Config(32, 2, 4, 2, 8, 48, 257, rope_theta=500000.0)
PARAMS = llama3np.params.random(TINY, np.random.default_rng(1))
PROMPT = "the answer is"


def byte_tokenizer(**known):
    pieces = [bytes([byte]) for byte in range(256)] + [b""]
    specials = {"<|begin_of_text|>": 256}
    return BytePairTokenizer(pieces, LLAMA3, specials=specials, bos_id=256, add_bos=True, **known)


def model(params=PARAMS, config=TINY, tokenizer=None):
    return Llama(config, params, tokenizer or byte_tokenizer(), max_seq_len=64)


def arrays_of(llm, ids):
    """Both arrays of head 1, to the two or three digits that can be read from a plot."""
    seen = {}
    llm.forward(ids, tap=lambda name, array: seen.update({name: array[0]}))
    for name, digits in (("layers.0.scores", 2), ("layers.0.probs", 3)):
        rows = [row[: i + 1] for i, row in enumerate(seen[name][1].tolist())]
        rounded = [[round(value, digits) for value in row] for row in rows]
        tolerance = {"atol": 0.6 * 10**-digits, "rtol": 0.0}
        yield {"name": name, "head": 1, "lower_triangle": rounded, "source": "", **tolerance}


@pytest.fixture(scope="module")
def facts():
    """What the tiny model computes, in the form of the package's own file."""
    llm = model()
    ids = llm.encode(PROMPT)
    next_id = int(llm.forward(ids, last_only=True)[0, 0].argmax())
    (done,) = llm.generate(PROMPT, 12)
    prompt = {"prompt": PROMPT, "ids": ids, "next_id": next_id, "next_text": "", "source": "here"}
    text = {"prompt": PROMPT, "text": done.text, "agreed": len(done.text), "max_new_tokens": 12}
    known = {
        "preset": "llama3-tiny",
        "chat": False,
        "prompts": [prompt | {"arrays": list(arrays_of(llm, ids))}],
        "texts": [text | {"source": "here"}],
    }
    texts = [{"text": "ab", "ids": [97, 98], "source": "here"}]
    tokenizer = {"sha256": hashlib.sha256(b"file").hexdigest(), "source": "here", "texts": texts}
    return {"tokenizers": {"llama3": tokenizer}, "models": {"Tiny": known}}


@pytest.fixture(autouse=True)
def _tiny_is_published(monkeypatch):
    monkeypatch.setitem(PRESETS, "llama3-tiny", TINY)


@pytest.fixture
def place(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"file")
    return tmp_path


def outcomes(llm, place, facts, known_as=None):
    results = list(verify(llm, place, known_as, facts))
    return {result.fact.removeprefix("Tiny: "): result.outcome for result in results}


def test_the_model_itself_agrees_in_everything(place, facts):
    results = list(verify(model(), place, None, facts))
    assert {result.outcome for result in results} == {AGREES}
    assert [result.fact for result in results] == [
        "tensors",
        "tokenizer.model",
        "ids of texts",
        "Tiny: prompt",
        "Tiny: next token",
        "Tiny: layers.0.scores, head 1",
        "Tiny: layers.0.probs, head 1",
        "Tiny: greedy text",
    ]
    assert all(result.source for result in results if not result.fact.endswith("head 1"))
    assert status(results) == 0


@given(st.sampled_from(sorted(named(PARAMS, False))), st.integers(0, 2**32))
def test_a_tensor_of_other_numbers_is_seen(tmp_path_factory, facts, name, seed):
    tensors = dict(named(PARAMS, False))
    tensors[name] = np.random.default_rng(seed).permutation(tensors[name].ravel())
    tensors[name] = tensors[name].reshape(named(PARAMS, False)[name].shape)
    found = outcomes(model(from_named(tensors, TINY)), tmp_path_factory.getbasetemp(), facts)
    if name in ("layers.0.wq", "layers.0.wk", "layers.0.attn_norm_D", "embed_VD"):
        assert found["layers.0.scores, head 1"] == found["layers.0.probs, head 1"] == DIFFERS
    if not name.endswith("norm_D"):  # norms are near 1: a text may survive their permutation
        assert DIFFERS in (found["next token"], found["greedy text"])


def test_scores_that_are_not_numbers_differ(place, facts):
    broken = PARAMS.layers[0]._replace(wq=np.full_like(PARAMS.layers[0].wq, np.nan))
    found = outcomes(model(PARAMS._replace(layers=(broken, *PARAMS.layers[1:]))), place, facts)
    assert found["layers.0.scores, head 1"] == found["greedy text"] == DIFFERS


def test_values_are_held_to_the_tolerance_of_their_source(place, facts):
    for share, expected in ((0.3, AGREES), (1.2, DIFFERS)):
        moved = copy.deepcopy(facts)
        array = moved["models"]["Tiny"]["prompts"][0]["arrays"][0]
        array["atol"], array["rtol"] = 0.1, 0.01
        array["lower_triangle"][3][2] += share * (0.1 + 0.01 * abs(array["lower_triangle"][3][2]))
        assert outcomes(model(), place, moved)["layers.0.scores, head 1"] == expected


def test_a_text_counts_as_far_as_published_runs_agree(place, facts):
    for changed_at, agreed, expected in ((6, 6, AGREES), (5, 6, DIFFERS), (0, 0, AGREES)):
        moved = copy.deepcopy(facts)
        known = moved["models"]["Tiny"]["texts"][0]
        other = "x" if known["text"][changed_at] != "x" else "y"
        known["text"] = known["text"][:changed_at] + other + known["text"][changed_at + 1 :]
        known["agreed"] = agreed
        assert outcomes(model(), place, moved)["greedy text"] == expected


def test_a_wrong_tokenizer_is_seen_by_its_file_and_by_its_ids(place, facts):
    (place / "tokenizer.model").write_bytes(b"file!")
    assert outcomes(model(), place, facts)["tokenizer.model"] == DIFFERS
    (place / "tokenizer.model").unlink()
    assert outcomes(model(), place, facts)["tokenizer.model"] == UNKNOWN
    moved = copy.deepcopy(facts)
    moved["tokenizers"]["llama3"]["texts"][0]["ids"] = [98, 97]
    moved["models"]["Tiny"]["prompts"][0]["ids"][2] += 1
    found = outcomes(model(), place, moved)
    assert (found["ids of texts"], found["prompt"]) == (DIFFERS, DIFFERS)


def test_without_a_tokenizer_the_weights_are_checked_by_ids(place, facts):
    found = outcomes(Llama(TINY, PARAMS), place, facts)
    assert found["next token"] == AGREES
    assert found["ids of texts"] == found["greedy text"] == UNKNOWN


def test_of_an_unknown_architecture_nothing_is_said_to_agree(place, facts):
    config = Config(32, 1, 4, 2, 8, 48, 257)
    llm = model(llama3np.params.random(config, np.random.default_rng(0)), config)
    results = list(verify(llm, place, None, facts))
    assert {result.outcome for result in results} == {UNKNOWN}
    assert status(results) == 2


def test_known_shapes_and_unknown_weights_are_not_verified(place, facts):
    results = list(verify(model(), place, None, facts | {"models": {}}))
    assert results[0].outcome == AGREES
    assert results[-1].outcome == UNKNOWN
    assert status(results) == 2


def test_instruct_is_not_taken_for_base(place, facts):
    llm = model(tokenizer=byte_tokenizer(chat_template="{{ messages }}"))
    assert outcomes(llm, place, facts)["weights"] == UNKNOWN
    assert outcomes(llm, place, facts, "Tiny")["next token"] == AGREES


def test_a_name_of_another_architecture_differs(place, facts):
    moved = copy.deepcopy(facts)
    moved["models"]["Other"] = facts["models"]["Tiny"] | {"preset": "llama3-8b"}
    (result,) = verify(model(), place, "Other", moved)
    assert (result.fact, result.outcome) == ("tensors", DIFFERS)
    with pytest.raises(InputError, match="--as: expected one of Tiny, Other, found 'tiny'"):
        list(verify(model(), place, "tiny", moved))


# ---- the package's own facts -------------------------------------------------------------------


def test_the_facts_are_those_of_the_reference_files():
    values = json.loads(paths.shared("reference/llama3_8b_public_values.json").read_text())
    figures = values["values_read_from_figures"]
    (prompt,) = public_facts()["models"]["Meta-Llama-3-8B"]["prompts"]
    assert (prompt["prompt"], prompt["ids"]) == (values["prompt"], values["token_ids"])
    assert (prompt["next_id"], prompt["next_text"]) == (2983, "42")
    for array, figure in zip(
        prompt["arrays"], ("scores_head0_masked", "softmax_head0"), strict=True
    ):
        rows = figures[figure]["values"]
        assert array["lower_triangle"] == [row[: i + 1] for i, row in enumerate(rows)]
    public = json.loads(paths.shared("reference/llama3_public_facts.json").read_text())
    ours = [text for known in public_facts()["models"].values() for text in known["texts"]]
    theirs = [text.get("text_with_prompt") for text in public["greedy_text"]]
    assert [text["prompt"] + text["text"] for text in ours] == theirs[: len(ours)]


def test_the_real_tokenizer_agrees_with_them():
    path = paths.llama3_tokenizer()
    known, tokenizer = public_facts()["tokenizers"]["llama3"], from_tokenizer_model(path)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == known["sha256"]
    for text in known["texts"]:
        assert tokenizer.encode(text["text"]) == text["ids"]
    (prompt,) = public_facts()["models"]["Meta-Llama-3-8B"]["prompts"]
    assert tokenizer.prompt_ids(prompt["prompt"]) == prompt["ids"]


def test_every_model_of_the_facts_is_a_preset():
    facts = public_facts()
    for known in facts["models"].values():
        assert known["preset"] in PRESETS
        for prompt in known["prompts"]:
            assert all(map(len, [array["lower_triangle"] for array in prompt["arrays"]]))
        for text in known["texts"]:
            assert 0 < text["agreed"] <= len(text["text"])


# ---- the command -------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path, facts, monkeypatch):
    save_hf(tmp_path / "tiny", TINY, PARAMS)
    monkeypatch.setattr(llama3np.verify, "public_facts", lambda: facts)
    return tmp_path / "tiny"


def test_the_command_prints_a_table_and_tells_by_its_status(saved, capsys, facts, monkeypatch):
    assert main(["verify", str(saved)]) == 0
    out = capsys.readouterr().out
    assert "agrees   Tiny: next token" in out
    assert "Nothing differs from what is publicly known." in out
    monkeypatch.setitem(facts["models"]["Tiny"]["prompts"][0], "next_id", -1)
    assert main(["verify", str(saved)]) == 1
    out = capsys.readouterr().out
    assert "differs  Tiny: next token" in out
    assert "say --as NAME" in out


def test_the_command_prints_json(saved, capsys):
    assert main(["verify", str(saved), "--json", "--as", "Tiny"]) == 0
    printed = json.loads(capsys.readouterr().out)
    assert printed["status"] == 0
    assert {"fact", "outcome", "detail", "source"} < set(printed["results"][0])


def test_the_command_does_not_pass_what_is_unknown(tmp_path, capsys):
    config = Config(32, 1, 4, 2, 8, 48, 257)
    save_hf(tmp_path / "x", config, llama3np.params.random(config, np.random.default_rng(0)))
    assert main(["verify", str(tmp_path / "x")]) == 2
    assert "they are not verified" in capsys.readouterr().out

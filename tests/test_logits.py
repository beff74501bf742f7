"""Distances between the predictions of two models: against sums over all logits, in float64."""

import json
from types import SimpleNamespace

import numpy as np
import paths
import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import seeds
from test_cli import llama3np, result

import llama3np as package
from llama3np.cli import main
from llama3np.crosscheck import logits, references, trace
from llama3np.errors import InputError

pytestmark = pytest.mark.usefixtures("compiled_kernels")

TEXT = "Once upon a time, there was a little girl named Lily."
V = 257  # of the embedded model


@st.composite
def pairs(draw):
    """Logits of two models that differ a little, with ties, flat or peaked: (R, V) each."""
    rng = np.random.default_rng(draw(seeds))
    R, V = draw(st.integers(1, 5)), draw(st.integers(6, 40))
    scale = draw(st.sampled_from([0.0, 0.3, 5.0, 60.0]))
    p_RV = np.round(scale * rng.standard_normal((R, V)), draw(st.integers(0, 5)))
    q_RV = p_RV + draw(st.sampled_from([0.0, 0.01, 1.0])) * rng.standard_normal((R, V))
    return p_RV.astype(np.float32), q_RV.astype(np.float32), rng.integers(0, V, R)


def log_softmax(logits_RV):
    wide_RV = logits_RV.astype(np.longdouble)
    wide_RV -= wide_RV.max(axis=-1, keepdims=True)
    return wide_RV - np.log(np.exp(wide_RV).sum(axis=-1, keepdims=True))


def kl(p_RV, q_RV):
    logp_RV, logq_RV = log_softmax(p_RV), log_softmax(q_RV)
    return (np.exp(logp_RV) * (logp_RV - logq_RV)).sum(axis=-1)


def kept(logits_RV, targets_R, top):
    ids_T = np.concatenate([[0], targets_R])
    return logits.Kept(ids_T, np.zeros(1, int), *logits.keep(logits_RV, targets_R, top))


@given(pairs())
def test_with_all_logits_kept_the_divergence_is_exact(drawn):
    p_RV, q_RV, targets_R = drawn
    ref = kept(p_RV, targets_R, p_RV.shape[1])
    far = logits.apart_from(ref, q_RV, kept(q_RV, targets_R, 5).logsumexp_R)
    np.testing.assert_allclose(far.kl_R, kl(p_RV, q_RV), rtol=1e-9, atol=1e-12)
    assert far.same_R.tolist() == (p_RV.argmax(axis=-1) == q_RV.argmax(axis=-1)).tolist()


@given(pairs(), st.integers(5, 12))
def test_a_compact_divergence_is_at_most_the_whole(drawn, top):
    p_RV, q_RV, targets_R = drawn
    ref, cand = (kept(a_RV, targets_R, top) for a_RV in (p_RV, q_RV))
    whole_R = kl(p_RV, q_RV)
    one_R = logits.apart_from(ref, q_RV, cand.logsumexp_R).kl_R
    both_R = logits.apart(ref, cand).kl_R
    assert (one_R <= whole_R + 1e-9).all()
    assert (both_R <= one_R + 1e-9).all()
    assert (both_R >= 0).all()


@given(pairs(), st.integers(5, 12))
def test_a_model_is_not_apart_from_itself(drawn, top):
    p_RV, _, targets_R = drawn
    ref = kept(p_RV, targets_R, top)
    for far in (logits.apart(ref, ref), logits.apart_from(ref, p_RV, ref.logsumexp_R)):
        assert far.kl_R.max() < 1e-12
        assert far.same_R.all()
        assert (far.five_R == 1).all()


@given(pairs())
def test_what_follows_is_scored_as_by_a_sum_over_all(drawn):
    p_RV, _, targets_R = drawn
    found = kept(p_RV, targets_R, 5)
    expected_R = -log_softmax(p_RV)[np.arange(len(p_RV)), targets_R]
    np.testing.assert_allclose(found.nll_R, expected_R, rtol=1e-9, atol=1e-12)


@given(pairs(), st.integers(1, 45))
def test_the_largest_are_in_order_and_none_is_left_out(drawn, k):
    p_RV, _, _ = drawn
    found_RK = logits.largest(p_RV, k)
    values_RK = np.take_along_axis(p_RV, found_RK, axis=-1)
    np.testing.assert_array_equal(values_RK, -np.sort(-p_RV, axis=-1)[:, :k])
    equal = values_RK[:, 1:] == values_RK[:, :-1]
    assert (found_RK[:, 1:] > found_RK[:, :-1])[equal].all()
    assert all(len(set(row)) == len(row) for row in found_RK.tolist())


def test_shares_of_agreement_by_hand():
    ours, theirs = np.array([[1, 2, 3, 4, 5, 6]]), np.array([[2, 1, 9, 8, 5, 3]])
    assert logits.agreement(ours, theirs).tolist() == [0.6]


def test_standard_error_by_hand():
    found = logits.perplexity(np.log([2.0, 8.0]))
    assert found["perplexity"] == pytest.approx(4)
    assert found["standard_error"] == pytest.approx(4 * np.log(8 / 2) / 2)  # sd / sqrt(2)
    assert np.isnan(logits.perplexity(np.array([1.0]))["standard_error"])


# ---- a model -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def llm():
    return package.load(paths.EMBEDDED)


@pytest.fixture(scope="module")
def ids(llm):
    return llm.encode(TEXT * 3)


def test_one_window_scores_as_llm_score_does(llm, ids):
    found, _ = logits.score(llm, logits.windows(llm, ids))
    np.testing.assert_allclose(found.nll_R, -llm.score(ids), rtol=1e-9)


@given(st.lists(st.integers(0, 3), min_size=2), st.integers(2, 40))
def test_windows_hold_every_id_and_begin_with_bos_if_the_text_does(ids, size):
    """A last id that would be alone in its window is left out."""
    reader = SimpleNamespace(tokenizer=SimpleNamespace(bos_id=0), max_seq_len=40)
    parts, head = logits.windows(reader, ids, size), ids[:1] if ids[0] == 0 else []
    assert all(2 <= len(part) <= size and part[: len(head)] == head for part in parts)
    held = head + [id for part in parts for id in part[len(head) :]]
    assert held == ids or (held == ids[:-1] and not head and len(held) % size == 0)


def test_windows_are_no_longer_than_the_models_context_unless_asked(llm):
    """Positions beyond it are told."""
    length, wide = llm.config.context_length, package.load("shakespeare", max_seq_len=1000)
    ids = [10] * (2 * length + 2)
    assert [len(part) for part in logits.windows(wide, ids)] == [length, length, 2]
    assert [len(part) for part in logits.windows(wide, ids, 2 * length)] == [2 * length, 2]


def test_a_window_beyond_the_context_is_told(capsys):
    ids = ",".join(["10"] * 300)
    options = ("--prompt-ids", ids, "--max-seq-len", "300", "--engine", "numpy")
    for option, said in (
        (("--window", "300"), "300 positions, of a model whose context is 256\n"),
        ((), ""),
    ):
        assert main(["score", "shakespeare", *options, *option]) == 0
        assert capsys.readouterr().err == said


def test_a_window_is_scored_on_its_own(llm, ids):
    parts = logits.windows(llm, ids, 20)
    found, _ = logits.score(llm, parts)
    expected = np.concatenate([-llm.score(part) for part in parts])
    np.testing.assert_allclose(found.nll_R, expected, rtol=1e-9)


def test_a_file_of_all_logits_is_as_good_as_a_reference(llm, ids, tmp_path):
    parts = logits.windows(llm, ids)
    references.save(tmp_path / "ref.npz", logits.score(llm, parts, top=V)[0], {})
    all_TV = llm.forward(ids)[0]
    np.savez(tmp_path / "all.npz", ids=np.array(ids), logits=all_TV)
    np.savez(tmp_path / "less.npz", ids=np.array([ids]), logits=all_TV[None, :-1])
    for first in ("ref", "all", "less"):
        for second in ("ref", "all", "less"):
            found = references.compared(tmp_path / f"{first}.npz", tmp_path / f"{second}.npz")
            assert found["tokens"] == len(ids) - 1
            assert abs(found["kl_max"]) < 1e-9
            assert found["top1_agreement"] == found["top5_agreement"] == 1
            assert found["reference"]["perplexity"] == pytest.approx(np.exp(-llm.score(ids).mean()))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda a: a | {"ids": a["ids"][:-1]}, "logits: expected"),
        (lambda a: a | {"ids": np.r_[a["ids"][:-1], 0]}, "expected token id"),
        (lambda a: {"logits": a["logits"]}, "found no ids"),
        (lambda a: {"ids": a["ids"]}, "found no logits"),
        (lambda a: a | {"logits": a["logits"][:-3]}, "logits: expected"),
        (lambda a: a | {"logits": a["logits"][0]}, "logits: expected"),
        (lambda a: a | {"ids": a["ids"].astype(float)}, "integer ids"),
    ],
)
def test_a_candidate_that_cannot_be_compared_is_refused(llm, ids, tmp_path, change, said):
    right = {"ids": np.array(ids), "logits": llm.forward(ids)[0]}
    np.savez(tmp_path / "ref.npz", **right)
    np.savez(tmp_path / "cand.npz", **change(right))
    with pytest.raises(InputError, match=said):
        references.compared(tmp_path / "ref.npz", tmp_path / "cand.npz")


def test_not_a_number_never_passes(llm, ids, tmp_path):
    wrong_TV = llm.forward(ids)[0].copy()
    wrong_TV[3, 4] = np.nan
    np.savez(tmp_path / "ref.npz", ids=np.array(ids), logits=llm.forward(ids)[0])
    np.savez(tmp_path / "cand.npz", ids=np.array(ids), logits=wrong_TV)
    with pytest.raises(InputError, match="finite"):
        references.compared(tmp_path / "ref.npz", tmp_path / "cand.npz")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"logits": lambda a: a[:, :100]}, "ids: expected numbers from 0 to 99"),
        ({"ids": lambda a: a + 1000}, "ids: expected numbers from 0 to 256"),
        ({"ids": lambda a: -a}, "ids: expected numbers from 0 to 256"),
        ({"ids": lambda a: a[:1], "logits": lambda a: a[:1]}, "expected at least 2, found 1"),
        ({"logits": lambda a: a.astype(np.complex64)}, "expected one of f32.*, found complex64"),
        ({"logits": lambda a: a.astype(int)}, "expected one of f32.*, found int64"),
    ],
)
def test_all_logits_of_no_text_are_refused(llm, ids, tmp_path, change, said):
    right = {"ids": np.array(ids), "logits": llm.forward(ids)[0]}
    np.savez(tmp_path / "bad.npz", **right | {k: edit(right[k]) for k, edit in change.items()})
    with pytest.raises(InputError, match=rf"bad\.npz: .*{said}"):
        references.read(tmp_path / "bad.npz")


@pytest.mark.parametrize(
    ("key", "change", "said"),
    [
        ("top_logits", lambda a: a[:, :5], "expected .* rows, one for each predicted id"),
        ("top_logits", lambda a: a + np.nan, "expected finite numbers"),
        ("logsumexp", lambda a: a * np.nan, "expected finite numbers"),
        ("nll", lambda a: a[:-1], "expected .* rows"),
        ("nll", lambda a: a.astype(complex), "expected floats, found complex128"),
        ("top_ids", lambda a: a - 600, "expected ids from 0 on"),
        ("top_ids", lambda a: a.astype(float), "expected whole numbers"),
        ("top_ids", lambda a: a[0], "expected .* rows"),
        ("starts", lambda a: a[:0], "expected where windows"),
        ("starts", lambda a: a + 1, "expected where windows"),
        ("ids", lambda a: a[:1], "expected at least 2"),
        ("ids", lambda a: a - 600, "expected numbers from 0 on"),
    ],
)
def test_a_spoiled_reference_is_refused(llm, ids, tmp_path, key, change, said):
    found, _ = logits.score(llm, logits.windows(llm, ids), 8)
    right = dict(zip(references.KEYS, found, strict=True))
    np.savez(tmp_path / "bad.npz", **right | {key: change(right[key])})
    with pytest.raises(InputError, match=rf"bad\.npz: {key}: {said}"):
        references.read(tmp_path / "bad.npz")


def test_a_smaller_vocabulary_than_the_references_is_refused(llm, ids, tmp_path):
    found, _ = logits.score(llm, logits.windows(llm, ids), 8)
    references.save(tmp_path / "ref.npz", found._replace(top_ids_RK=found.top_ids_RK + V), {})
    np.savez(tmp_path / "all.npz", ids=np.array(ids), logits=llm.forward(ids)[0])
    with pytest.raises(InputError, match="a vocabulary of more than"):
        references.compared(tmp_path / "ref.npz", tmp_path / "all.npz")


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_logits_of_every_dtype_are_compared(llm, ids, tmp_path, dtype):
    """bfloat16 as NumPy keeps it, V2."""
    all_TV = llm.forward(ids)[0]
    np.savez(tmp_path / "wide.npz", ids=np.array(ids), logits=all_TV)
    np.savez(tmp_path / "own.npz", ids=np.array(ids), logits=all_TV.astype(np.dtype(dtype)))
    found = references.compared(tmp_path / "wide.npz", tmp_path / "own.npz")
    assert found["kl_max"] < 0.05
    assert found["top1_agreement"] > 0.9


@pytest.mark.parametrize("name", ["t.safetensors", "t.npz", "t"])
def test_the_logits_of_a_trace_are_as_good(llm, ids, tmp_path, name):
    trace.write(tmp_path / name, llm, ids, taps=["logits"])
    np.savez(tmp_path / "all.npz", ids=np.array(ids), lm_head=llm.forward(ids)[0][None])
    found = references.compared(tmp_path / name, tmp_path / "all.npz")
    assert (found["tokens"], found["top1_agreement"]) == (len(ids) - 1, 1)
    assert found["kl_max"] < 1e-9


# ---- the command ---------------------------------------------------------------------------------


def test_the_command_keeps_a_reference_and_compares_with_it(tmp_path):
    model, ref = "shakespeare", tmp_path / "ref.npz"
    plain = result("score", model, TEXT, "-o", ref)
    against = result("score", model, TEXT, "--against", ref, "--dtype", "bf16-hf")
    assert plain["perplexity"] == pytest.approx(against["perplexity"], rel=0.05)
    assert 0 < against["kl_mean"] <= against["kl_p99"] <= against["kl_max"] < 0.1
    assert json.loads(np.load(ref)["__metadata__"].tobytes())["profile"] == "float32"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "PROMPT"),
        (["a b", "--file", "x"], "one of PROMPT, --file"),
        (["--file", "no such file"], "no such file"),
        ([TEXT, "--window", "1"], "--window"),
        ([TEXT, "--top", "4"], "--top"),
        ([TEXT, "--against", "no such file"], "no such file"),
        ([TEXT, "-o", "out.txt"], ".npz"),
    ],
)
def test_what_is_wrong_is_said_in_a_sentence(options, said):
    done = llama3np("score", "shakespeare", *options)
    assert done.returncode == 2
    assert said in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_an_id_that_no_window_has_room_for_is_told():
    """Of ids that begin without BOS: 3 in windows of 2 leave the last one alone."""
    done = llama3np("score", "shakespeare", "--prompt-ids", "82,79,77", "--window", "2")
    assert done.returncode == 0
    assert "the last id is left out" in done.stderr
    whole = llama3np("score", "shakespeare", "--prompt-ids", "82,79", "--window", "2")
    assert "left out" not in whole.stderr


def test_another_text_than_the_reference_is_refused(tmp_path):
    model, ref = "shakespeare", tmp_path / "ref.npz"
    result("score", model, TEXT, "-o", ref)
    done = llama3np("score", model, TEXT + " She", "--against", ref)
    assert done.returncode == 2
    assert "as the reference has" in done.stderr

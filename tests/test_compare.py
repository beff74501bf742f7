"""Comparing traces: right ones agree however they are kept, wrong ones diverge where they do."""

import candidates
import pytest
from candidates import BUGS, huggingface, llama_cpp, reference, run, wrong
from hypothesis import given, settings
from hypothesis import strategies as st

from llama3np.crosscheck import taps
from llama3np.crosscheck.compare import compare

few = settings(max_examples=25)
subjects = candidates.subjects()


def first(comparison):
    """Where it begins, for a message that tells what went wrong."""
    return comparison.first_divergence and comparison.first_divergence.tap


# ---- right candidates ----------------------------------------------------------------------------


@few
@given(subjects)
def test_a_trace_agrees_with_itself(subject):
    truth = reference(*subject)
    result = compare(truth, truth)
    assert (result.verdict, result.first_divergence) == ("agree", None)
    assert [row.name for row in result.rows] == list(truth.arrays)
    assert (result.recognised, result.missing, result.unused, result.flips) == ({}, [], [], [])
    assert all(row.max_abs == 0 and row.nmse == 0 for row in result.rows)


@few
@given(subjects, st.sampled_from(candidates.PROFILES))
def test_every_profile_agrees_by_its_own_measured_error(subject, profile):
    model, ids = subject
    result = compare(reference(model, ids), run(model, ids, profile))
    assert (result.verdict, first(result)) == ("agree", None)


@few
@given(subjects, st.booleans())
def test_what_hooks_on_transformers_show_agrees(subject, batch):
    model, ids = subject
    found = compare(reference(model, ids), huggingface(run(model, ids, "float32"), batch))
    assert (found.verdict, first(found)) == ("agree", None)
    pairs = [taps for words, taps in found.recognised.items() if "halves" in words]
    assert pairs == [["q", "k", "q_rope", "k_rope"]]
    assert len(found.recognised["names: Hugging Face"]) == 20


@few
@given(subjects)
def test_what_the_nodes_of_llama_cpp_show_agrees(subject):
    model, ids = subject
    theirs = llama_cpp(run(model, ids, "float32"), model.config)
    found = compare(reference(model, ids), theirs)
    assert (found.verdict, first(found)) == ("agree", None)


# ---- wrong candidates ----------------------------------------------------------------------------


@pytest.mark.parametrize("bug", BUGS)
@settings(max_examples=6)
@given(subject=subjects, kept=st.sampled_from(["ours", "transformers", "llama.cpp"]))
def test_a_wrong_operation_is_found_where_it_is(bug, subject, kept):
    model, ids = subject
    theirs = wrong(model, ids, bug)  # float64: what rounding does is not the question here
    if kept == "transformers":
        theirs = huggingface(theirs)
    if kept == "llama.cpp":
        theirs = llama_cpp(theirs, model.config)
    found = compare(reference(model, ids), theirs)
    kind = BUGS[bug][2]
    if kept == "llama.cpp" and "mask" in bug:
        kind = "probs"  # its scores are those before the mask
    expected = f"layers.0.{kind}" if kind in taps.LAYER else kind
    assert (found.verdict, first(found)) == ("diverge", expected)

"""Comparing traces: right ones agree however they are kept, wrong ones diverge where they do."""

import json
import sys
from dataclasses import replace

import candidates
import numpy as np
import pytest
from candidates import BUGS, EXAMPLE, huggingface, llama_cpp, reference, run, stored, wrong
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from rich.console import Console
from strategies import Model

from llama3np.cli import main
from llama3np.crosscheck import budget, report, taps
from llama3np.crosscheck.allowance import precision
from llama3np.crosscheck.compare import compare
from llama3np.crosscheck.output import new_trace
from llama3np.crosscheck.stored import Spec
from llama3np.crosscheck.taps import Trace
from llama3np.errors import InputError
from llama3np.llm import Llama
from llama3np.load import save_hf

IDS = [1, 5, 2, 7]
few = settings(max_examples=15)
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


@few
@given(subjects, st.data())
def test_one_wrong_number_is_found_at_its_place(subject, data):
    model, ids = subject
    truth = reference(model, ids)
    name = data.draw(st.sampled_from(list(truth.arrays)))
    dims, array = taps.DIMS[taps.parse(name)[1]], truth.arrays[name].copy()
    at = data.draw(st.tuples(*(st.integers(0, size - 1) for size in array.shape)))
    assume(np.isfinite(array[at]))
    budget = truth.meta["budgets"]["float32"][name]["max_abs"]
    array[at] += 4 * budget + 1e-6 * np.abs(array[np.isfinite(array)]).max()
    theirs = Trace(truth.arrays | {name: array}, {})
    found = compare(truth, theirs)
    first = found.first_divergence
    heads = next((at[axis] for axis, letter in enumerate(dims) if letter in "NK"), None)
    assert (found.verdict, first.tap) == ("diverge", name)
    assert (first.layer, first.head, first.index) == (taps.parse(name)[0], heads, at[-1])
    assert first.position == at[dims.index("T")]
    assert (first.expected, first.found) == (truth.arrays[name][at], array[at])
    assert [row.name for row in found.rows if not row.agrees] == [name]


@few
@given(subjects, st.data(), st.sampled_from([np.nan, np.inf, -np.inf]))
def test_what_is_not_finite_never_passes(subject, data, bad):
    model, ids = subject
    truth = reference(model, ids)
    name = data.draw(st.sampled_from(list(truth.arrays)))
    array = truth.arrays[name].copy()
    at = data.draw(st.tuples(*(st.integers(0, size - 1) for size in array.shape)))
    assume(np.isfinite(array[at]))
    array[at] = bad
    found = compare(truth, Trace(truth.arrays | {name: array}, {}))
    assert (found.verdict, first(found)) == ("diverge", name)
    json.loads(json.dumps(report.as_json(found), allow_nan=False))


@pytest.mark.parametrize("name", ["layers.0.scores", "layers.0.probs", "logits", "layers.1.q"])
def test_a_trace_of_nothing_but_nan_never_passes(name):
    truth = reference(EXAMPLE, IDS)
    theirs = Trace({name: np.full_like(truth.arrays[name], np.nan)}, {})
    assert compare(truth, theirs, partial=True).verdict == "diverge"


@few
@given(subjects, st.data())
def test_another_shape_never_passes(subject, data):
    model, ids = subject
    truth = reference(model, ids)
    name = data.draw(st.sampled_from(list(truth.arrays)))
    axis = data.draw(st.integers(0, truth.arrays[name].ndim - 1))
    assume(truth.arrays[name].shape[axis] > 2)  # two positions less one are the last position
    less = truth.arrays[name].take(range(truth.arrays[name].shape[axis] - 1), axis=axis)
    found = compare(truth, Trace(truth.arrays | {name: less}, {}))
    assert (found.verdict, first(found)) == ("diverge", name)
    T = taps.DIMS[taps.parse(name)[1]].index("T")
    assert ("positions" if axis == T else "cannot be read as") in found.first_divergence.why


@pytest.mark.parametrize(
    ("rows", "positions"),
    [(4, [-1] * 4), (3, None), (3, [0, 1]), (4, [4, 5, 6, 7])],
)
def test_rows_of_unknown_positions_are_told_as_such(rows, positions):
    truth = reference(EXAMPLE, IDS)
    meta = {} if positions is None else {"positions": positions}
    found = compare(truth, Trace({"logits": truth.arrays["logits"][:rows]}, meta))
    assert found.first_divergence.why == (
        f"expected positions in its metadata that say which of ours its {rows} rows are"
    )


@pytest.mark.parametrize(
    "arrays", [{}, {"x": np.zeros(3)}, {"layers.9.q": np.zeros((4, 6, 4))}], ids=str
)
def test_nothing_to_compare_is_no_agreement(arrays):
    truth = reference(EXAMPLE, IDS)
    with pytest.raises(InputError, match="expected an array that is a tap of the reference"):
        compare(truth, Trace(arrays, {}))


def test_without_logits_a_candidate_is_incomplete_unless_said_to_be_partial():
    truth = reference(EXAMPLE, IDS)
    theirs = Trace({"layers.0.q": truth.arrays["layers.0.q"]}, {})
    assert compare(truth, theirs).verdict == "incomplete"
    assert compare(truth, theirs, partial=True).verdict == "agree"
    assert "logits" in compare(truth, theirs).missing
    headless = Trace({k: v for k, v in truth.arrays.items() if k != "logits"}, truth.meta)
    assert compare(headless, theirs).verdict == "agree"


# ---- masks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("fill", [-np.inf, -1e4, -1e9, -65504, np.finfo(np.float32).min])
def test_a_masked_score_may_have_any_very_low_value(fill):
    truth = reference(EXAMPLE, IDS)
    theirs = {k: np.where(np.isneginf(v), fill, v) for k, v in truth.arrays.items()}
    assert compare(truth, Trace(theirs, {})).verdict == "agree"


@pytest.mark.parametrize(
    ("at", "value", "why"),
    [
        ((1, 0, 2), -9999.0, "masked in the reference, not in the candidate"),
        ((1, 0, 2), 0.0, "masked in the reference, not in the candidate"),
        ((1, 2, 0), -1e9, "masked in the candidate, not in the reference"),
        ((1, 2, 0), -np.inf, "masked in the candidate, not in the reference"),
        ((1, 0, 2), np.nan, "not a finite number"),
    ],
)
def test_another_mask_is_a_divergence(at, value, why):
    truth = reference(EXAMPLE, IDS)
    scores = truth.arrays["layers.1.scores"].copy()
    scores[at] = value
    found = compare(truth, Trace(truth.arrays | {"layers.1.scores": scores}, {}))
    first = found.first_divergence
    assert (first.tap, first.head, first.position, first.index) == ("layers.1.scores", *at)
    assert first.why == why


# ---- budgets and precision -----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", candidates.STORED)
def test_a_run_stored_in_its_own_dtype_is_judged_by_it(dtype):
    profile = {"float32": "float32", "bfloat16": "bf16-hf", "float16": "f16-hf"}[dtype]
    theirs = stored(run(EXAMPLE, IDS, profile), candidates.STORED[dtype])
    found = compare(reference(EXAMPLE, IDS), theirs)
    assert (found.verdict, found.precision.dtype) == ("agree", dtype)
    assert profile in found.precision.profiles


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_numbers_in_a_float32_file_are_known_by_their_values(dtype):
    arrays = stored(run(EXAMPLE, IDS), candidates.STORED[dtype]).arrays
    arrays = {name: array.astype(np.float32) for name, array in arrays.items()}
    assert precision({}, arrays).dtype == dtype
    arrays["layers.0.q"] += np.float32(1e-6)
    assert precision({}, arrays).dtype == "float32"


@pytest.mark.parametrize(
    ("meta", "dtype"),
    [
        ({"dtype": "torch.bfloat16"}, "bfloat16"),
        ({"dtype": "fp16"}, "float16"),
        ({"profile": "bf16-meta"}, "bfloat16"),
        ({"profile": "float64"}, "float64"),
        ({"dtype": "int4"}, "float32"),
    ],
)
def test_metadata_tells_the_precision_before_values_do(meta, dtype):
    assert precision(meta, {"q": np.full((2, 2), 0.1, np.float32)}).dtype == dtype


def test_a_profile_may_be_named():
    truth = reference(EXAMPLE, IDS)
    theirs = run(EXAMPLE, IDS, "bf16-hf")
    assert compare(truth, theirs, profile="float32").verdict == "diverge"
    assert compare(truth, theirs, profile="bf16-hf").precision.profiles == ("bf16-hf",)
    with pytest.raises(InputError, match="--profile: expected one of"):
        compare(truth, theirs, profile="int4")


def test_a_16_bit_error_is_too_large_for_float32():
    """Rounding one tap of a float32 run to bf16 is found there."""
    truth = reference(EXAMPLE, IDS)
    theirs = dict(run(EXAMPLE, IDS, "float32").arrays)
    rounded = stored(Trace({"x": theirs["layers.1.v"]}, {}), candidates.STORED["bfloat16"])
    theirs["layers.1.v"] = rounded.arrays["x"].astype(np.float32)
    assert first(compare(truth, Trace(theirs, {}))) == "layers.1.v"


def test_a_reference_that_is_rounded_itself_says_so_and_allows_for_it():
    truth = reference(EXAMPLE, IDS, profile="float32")
    found = compare(truth, run(EXAMPLE, IDS))
    assert (found.verdict, found.notes) == (
        "agree",
        ["the reference is itself a float32 trace: its own error is allowed too"],
    )
    exact = compare(reference(EXAMPLE, IDS), run(EXAMPLE, IDS))
    assert exact.notes == []
    assert found.rows[-1].allowed.max_abs == pytest.approx(4 / 3 * exact.rows[-1].allowed.max_abs)


def test_without_a_budget_nothing_is_judged():
    truth = reference(EXAMPLE, IDS)
    for budgets, told in (
        ({}, "expected the measured error of float32, found none: give --model"),
        ({"float32": {}}, "expected a measured error of 'embed', found none"),
        (
            {"float32": {name: {"max_abs": np.inf, "nmse": 0} for name in truth.arrays}},
            "the profile itself overflows at 'embed'",
        ),
    ):
        with pytest.raises(InputError, match=told):
            compare(truth, truth._replace(meta={}), profile="float32", budgets=budgets)


def test_small_errors_that_add_up_are_too_large_together():
    truth = reference(EXAMPLE, IDS)
    budget = truth.meta["budgets"]["float32"]["logits"]["max_abs"]
    theirs = Trace(truth.arrays | {"logits": truth.arrays["logits"] + 2.9 * budget}, {})
    found = compare(truth, theirs)
    assert first(found) == "logits"
    assert "all of them together" in found.first_divergence.why


@few
@given(subjects, st.sampled_from(["bf16-hf", "bf16-meta", "f16-hf"]))
def test_a_right_float32_run_agrees_with_a_rounded_reference(subject, profile):
    """Whose budgets, as trace writes them, are at least what it is off itself."""
    model, ids = subject
    llm = Llama(model.config, model.params, engine="numpy", threads=1)
    budgets = budget.measure(llm, ids, ["float32", profile])
    assume(profile in budgets)  # it does not overflow
    truth = run(model, ids, profile)
    truth.meta["budgets"] = budgets
    found = compare(truth, run(model, ids, "float32"))
    assert (found.verdict, first(found)) == ("agree", None)


def test_a_dtype_without_a_budget_is_told():
    found = precision({"dtype": "Q4_1"}, {"q": np.full((2, 2), 0.1, np.float32)})
    assert found.why == "by its values: there is no budget of 'q4_1'"


# ---- ties ----------------------------------------------------------------------------------------


def flipped(gap):
    """A reference whose two largest logits at position 2 are so far apart, and one that flips."""
    truth = reference(EXAMPLE, IDS)
    logits = truth.arrays["logits"].copy()
    logits[2, [3, 8]] = logits.max() + 1
    logits[2, 8] -= gap
    theirs = logits.copy()
    theirs[2, [3, 8]] = theirs[2, [8, 3]]
    return Trace(truth.arrays | {"logits": logits}, truth.meta), Trace({"logits": theirs}, {})


def test_another_likeliest_token_within_the_budget_is_a_tie():
    budget = reference(EXAMPLE, IDS).meta["budgets"]["float32"]["logits"]["max_abs"]
    found = compare(*flipped(budget / 2))
    (flip,) = found.flips
    assert (flip.position, flip.expected, flip.found, flip.tie) == (2, 3, 8, True)
    assert flip.margin == pytest.approx(budget / 2)
    assert found.verdict == "agree"


def test_another_likeliest_token_beyond_the_budget_is_none():
    found = compare(*flipped(0.5))
    (flip,) = found.flips
    assert (flip.margin, flip.tie) == (pytest.approx(0.5), False)
    assert flip.budgets > 2
    assert (found.verdict, found.first_divergence.position) == ("diverge", 2)


# ---- decoding ------------------------------------------------------------------------------------


@few
@given(subjects, st.data())
def test_steps_through_the_cache_are_compared_like_all_at_once(subject, data):
    model, ids = subject
    truth = reference(model, ids, prefill=data.draw(st.integers(1, len(ids))))
    assert compare(truth, huggingface(run(model, ids))).verdict == "agree"


@pytest.mark.parametrize(("theirs", "told"), [(2, False), (4, True), (None, False)])
def test_another_split_into_calls_is_told(theirs, told):
    truth = reference(EXAMPLE, IDS, prefill=2)
    candidate = run(EXAMPLE, IDS, prefill=theirs)
    if theirs is None:
        del candidate.meta["prefill"]
    found = compare(truth, candidate)
    said = "the first call (prefill) took 2 ids of the reference and 4 of the candidate"
    assert found.verdict == "agree"
    assert any(note.startswith(said) for note in found.notes) == told


# ---- what is shown -------------------------------------------------------------------------------


def shown(found, full=False):
    """The table and all lines as text."""
    console = Console(width=200, highlight=False, markup=False)
    with console.capture() as capture:
        console.print(report.table(found, full))
        for line in report.lines(found):
            console.print(line, soft_wrap=True)
    return capture.get()


def test_the_table_has_every_tap_and_the_first_divergence_its_values():
    truth = reference(EXAMPLE, IDS)
    array = truth.arrays["layers.1.q_rope"].copy()
    array[2, 5, 1] += 0.5
    found = compare(truth, Trace(truth.arrays | {"layers.1.q_rope": array}, {}))
    text = shown(found)
    assert all(name in text for name in truth.arrays)
    expected, wrong = truth.arrays["layers.1.q_rope"][2, 5, 1], array[2, 5, 1]
    assert (
        f"diverges first at layers.1.q_rope, position 2, head 5, index 1: expected "
        f"{expected:.7g}, found {wrong:.7g}" in text
    )
    (line,) = [line for line in text.splitlines() if line.startswith("layers.1.q_rope ")]
    assert line.rstrip().endswith("OVER")


def test_layers_in_which_nothing_is_wrong_take_one_row():
    model, ids = Model(replace(EXAMPLE.config, n_layers=5), 5), IDS
    truth = reference(model, ids)
    theirs = Trace(truth.arrays | {"layers.2.k": 2 * truth.arrays["layers.2.k"]}, {})
    text = shown(compare(truth, theirs))
    rows = [line.split()[0] for line in text.splitlines() if line.startswith("layers.")]
    details = [f"layers.2.{kind}" for kind in taps.LAYER]
    assert rows == ["layers.0:", "layers.1:", *details, "layers.3:", "layers.4:"]
    assert len(shown(compare(truth, theirs), full=True).splitlines()) > 5 * len(taps.LAYER)


def test_json_is_complete_and_strict():
    truth = reference(EXAMPLE, IDS)
    theirs = huggingface(wrong(EXAMPLE, IDS, "no mask"))
    theirs.arrays["more"] = np.zeros(2)
    del theirs.arrays["model.norm"]
    found = json.loads(json.dumps(report.as_json(compare(truth, theirs)), allow_nan=False))
    assert set(found) >= {"verdict", "first_divergence", "taps", "recognised", "missing", "ties"}
    assert (found["verdict"], found["missing"], found["unused"]) == ("diverge", ["norm"], ["more"])
    first = found["first_divergence"]
    assert (first["tap"], first["position"], first["index"]) == ("layers.0.scores", 0, 1)
    assert (first["expected"], first["head"]) == ("-inf", 0)
    assert set(found["taps"]) == set(truth.arrays) - {"norm"}
    assert set(found["taps"]["logits"]["kl"]) == {"mean", "max"}


# ---- the command ---------------------------------------------------------------------------------


def write(path, trace):
    """A trace as a file."""
    specs = {name: Spec(array.shape, array.dtype) for name, array in trace.arrays.items()}
    with new_trace(path, specs, trace.meta) as arrays:
        for name, array in trace.arrays.items():
            arrays[name][...] = array
    return str(path)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A reference, a right candidate and a wrong one."""
    folder = tmp_path_factory.mktemp("traces")
    right = huggingface(run(EXAMPLE, IDS, "float32"))
    bad = huggingface(wrong(EXAMPLE, IDS, "no scale", "float32"))
    return {
        "ref": write(folder / "ref.safetensors", reference(EXAMPLE, IDS)),
        "right": write(folder / "right.npz", right),
        "wrong": write(folder / "wrong.safetensors", bad),
        "other": write(folder / "other.npz", right._replace(meta={"ids": [1, 5, 2, 8]})),
        "part": write(folder / "part.npz", Trace({"lm_head": right.arrays["lm_head"][0, -1]}, {})),
        "half": write(folder / "half.npz", Trace({"norm": right.arrays["model.norm"]}, {})),
        "nobudget": write(folder / "nobudget.npz", run(EXAMPLE, IDS)),
    }


@pytest.mark.parametrize(
    ("ref", "cand", "status", "told"),
    [
        ("ref", "right", 0, "agrees: 37 taps, all within the budget"),
        ("ref", "part", 0, "agrees: 1 tap, within the budget"),
        ("ref", "wrong", 1, "diverges first at layers.0.scores, position 0, head"),
        ("ref", "half", 2, "incomplete: 1 tap agrees, but logits are missing"),
        ("ref", "other", 2, "ids: expected 7 at position 3, found 8"),
        ("right", "ref", 2, "expected a trace that llama3np made"),
        ("nobudget", "right", 2, "expected the measured error of float32, found none"),
    ],
)
def test_exit_status_and_sentence(files, capsys, ref, cand, status, told):
    assert main(["compare", files[ref], files[cand]]) == status
    out, err = capsys.readouterr()
    assert told in out + err
    assert "Traceback" not in err


def test_json_of_the_command_is_one_object(files, capsys):
    assert main(["compare", files["ref"], files["wrong"], "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["first_divergence"]["tap"] == "layers.0.scores"


def test_a_map_of_the_users_names(files, tmp_path, capsys):
    arrays = {f"mine/{name}": array for name, array in run(EXAMPLE, IDS).arrays.items()}
    cand = write(tmp_path / "mine.npz", Trace(arrays, {}))
    assert main(["compare", files["ref"], cand]) == 2
    names = {f"mine/layers.{{i}}.{kind}": f"layers.{{i}}.{kind}" for kind in taps.LAYER}
    (tmp_path / "names.json").write_text(json.dumps(names | {"mine/logits": "logits"}))
    assert main(["compare", files["ref"], cand, "--map", str(tmp_path / "names.json")]) == 0
    assert "agrees: 35 taps" in capsys.readouterr().out


def test_a_plot_needs_matplotlib_and_says_so_at_once(files, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert main(["compare", "absent", "absent", "--plot", str(tmp_path / "x.png")]) == 2
    assert 'pip install "llama3np[explain]"' in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_plot_is_a_picture(files, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    path = tmp_path / "growth.png"
    assert main(["compare", files["ref"], files["wrong"], "--plot", str(path)]) == 1
    assert path.read_bytes().startswith(b"\x89PNG")
    assert main(["compare", files["ref"], files["right"], "--plot", str(tmp_path / "x.doc")]) == 2
    assert "expected a picture, .png, .svg or .pdf, found '.doc'" in capsys.readouterr().err
    assert [entry.name for entry in tmp_path.iterdir()] == ["growth.png"]


def test_logits_over_a_text_are_compared_by_their_predictions(tmp_path, capsys):
    logits = run(EXAMPLE, IDS).arrays["logits"]
    np.savez(tmp_path / "ref.npz", ids=IDS, logits=logits)
    np.savez(tmp_path / "cand.npz", ids=IDS, logits=logits[::-1])
    paths = [str(tmp_path / "ref.npz"), str(tmp_path / "cand.npz")]
    assert main(["compare", "--logits", *paths, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["tokens"], found["kl_mean"] > 0.01) == (3, True)
    assert main(["compare", paths[0], paths[0], "--logits"]) == 0
    assert "top-1 agreement        100.00%" in capsys.readouterr().out


@pytest.mark.parametrize(
    "option", ["--partial", "--full", "--plot=x.png", "--map=x", "--profile=float32", "--model=x"]
)
def test_predictions_take_no_options_of_traces(option, capsys):
    assert main(["compare", "absent", "absent", "--logits", option]) == 2
    assert f"without {option.partition('=')[0]}" in capsys.readouterr().err


def test_a_budget_is_measured_with_the_model_where_the_reference_has_none(tmp_path, files, capsys):
    save_hf(tmp_path / "model", EXAMPLE.config, EXAMPLE.params)
    pair = files["nobudget"], files["right"]
    assert main(["compare", *pair, "--model", str(tmp_path / "model")]) == 0
    assert "3 x the measured error of float32" in capsys.readouterr().out
    assert main(["compare", *pair, "--model", str(tmp_path / "absent")]) == 2

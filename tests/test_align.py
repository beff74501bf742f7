"""Other shapes and orders of the same numbers are recognised, in all layers alike; no others."""

import candidates
import numpy as np
import pytest
from candidates import halves, reference
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from llama3np.crosscheck import measure, taps
from llama3np.crosscheck.align import align
from llama3np.crosscheck.allowance import Allowed, beyond
from llama3np.crosscheck.compare import compare
from llama3np.crosscheck.layouts import LAYOUTS, Layout, layouts
from llama3np.crosscheck.recognise import Case, Frame, Positions, choose, readings
from llama3np.crosscheck.taps import Trace
from llama3np.errors import InputError

few = settings(max_examples=20)
subjects = candidates.subjects()


def near(name, found, expected):
    """Right to a millionth."""
    size = np.abs(expected[np.isfinite(expected)]).max(initial=0)
    wrong = beyond(found, expected, Allowed(1e-6 * size, 1e-12)).any()
    return not wrong and measure.nmse(found, expected) <= 1e-12


def changed(truth, *changes):
    """The arrays of a trace, those of some taps changed: change(kind, array) in turn."""
    arrays = {}
    for name, array in truth.arrays.items():
        for change in changes:
            array = change(taps.parse(name)[1], array)
        arrays[name] = array
    return Trace(arrays, {})


def of(kinds, function):
    """A change of these taps only."""
    return lambda kind, array: function(array) if kind in kinds else array


PAIRED, HEADS = ("q", "k", "q_rope", "k_rope"), ("q", "k", "v", "q_rope", "k_rope", "attn")
STREAM = tuple(kind for kind, dims in taps.DIMS.items() if dims in ("TD", "TF", "TV"))


def arrangements(config, order, some):
    """Changes of the arrangement, by what they do; of the first three, only one at a time."""
    G = config.group
    return {
        "heads first": of(HEADS, lambda a: a.swapaxes(0, 1)),
        "flat": of(HEADS, lambda a: a.reshape(len(a), -1)),
        "flat, transposed": of(HEADS, lambda a: a.reshape(len(a), -1).T),
        "halves": of(PAIRED, halves),
        "repeated": of(("k", "v", "k_rope"), lambda a: a.repeat(G, axis=1)),
        "transposed": of(STREAM, np.transpose),
        "ggml's axes": of(STREAM, lambda a: a.reshape(a.shape[::-1])),
        "heads in another order": of(("q", "q_rope", "attn"), lambda a: a[:, order]),
        "scores in another order": of(("scores", "probs"), lambda a: a[order]),
        "positions first": of(("scores", "probs"), lambda a: a.swapaxes(0, 1)),
        "filled": of(("scores",), lambda a: np.where(np.isinf(a), -1e9, a)),
        "batch": of(some, lambda a: a[None]),
    }


INNER = ("halves", "repeated", "heads in another order", "scores in another order", "filled")
OUTER = ("", "heads first", "flat", "flat, transposed", "transposed", "ggml's axes")
OUTER = (*OUTER, "positions first")


@few
@given(
    subjects,
    st.sets(st.sampled_from(INNER)),
    st.sampled_from(OUTER),
    st.sets(st.sampled_from(list(taps.DIMS))),
    st.randoms(use_true_random=False),
)
def test_the_same_numbers_are_recognised_in_any_arrangement(subject, inner, outer, some, random):
    model, ids = subject
    order = list(range(model.config.n_heads))
    random.shuffle(order)
    known = arrangements(model.config, order, some)
    truth = candidates.run(model, ids)
    chosen = [known[name] for name in (*sorted(inner), outer, "batch") if name]
    found = align(truth, changed(truth, *chosen), near)
    assert list(found.taps) == list(truth.arrays)
    assert (found.unused, found.notes) == ([], [])
    for name, tap in found.taps.items():
        right = tap.found is not None and near(name, tap.found, tap.expected)
        assert right, f"{name} of shape {tap.shape}: {found.recognised}"


@few
@given(subjects)
def test_nothing_is_recognised_in_our_own_arrangement(subject):
    truth = candidates.run(*subject)
    assert align(truth, truth, near).recognised == {}


@few
@given(subjects, st.data())
def test_an_arrangement_of_some_layers_only_is_a_mistake(subject, data):
    """Halves in one layer and not in another: one of the two is wrong, whatever is usual."""
    model, ids = subject
    assume(model.config.n_layers > 1)
    truth = candidates.run(model, ids)
    at = data.draw(st.integers(0, model.config.n_layers - 1))
    kind = data.draw(st.sampled_from(PAIRED))
    arrays = dict(truth.arrays)
    arrays[f"layers.{at}.{kind}"] = halves(arrays[f"layers.{at}.{kind}"])
    found = align(truth, Trace(arrays, {}), near)
    wrong = [name for name, tap in found.taps.items() if not near(name, tap.found, tap.expected)]
    others = [f"layers.{i}.{kind}" for i in range(model.config.n_layers) if i != at]
    assert wrong == ([f"layers.{at}.{kind}"] if at else others)
    assert [note.split()[0] for note in found.notes] == wrong


@few
@given(subjects)
def test_keys_repeated_by_tile_are_not_those_of_ours(subject):
    """Query head n reads key head n // G; n % K is the mistake of heads grouped by tile."""
    model, ids = subject
    c = model.config
    assume(c.n_kv_heads > 1 and c.group > 1)
    truth = candidates.run(model, ids)
    theirs = changed(truth, of(("k",), lambda a: np.tile(a, (1, c.group, 1))))
    found = align(truth, theirs, near)
    assert all(found.taps[name].found is None for name in found.taps if name.endswith(".k"))


@few
@given(subjects)
def test_pairs_turned_as_halves_that_are_not_do_not_pass(subject):
    """Right q, in halves; turned as if it were interleaved: position 1 is the first to show it."""
    model, ids = subject
    truth = reference(model, ids)
    arrays = dict(truth.arrays)
    for i in range(model.config.n_layers):
        q, turned = arrays[f"layers.{i}.q"], arrays[f"layers.{i}.q_rope"]
        angles_TP = np.angle(
            (turned[..., 0::2] + 1j * turned[..., 1::2]) / (q[..., 0::2] + 1j * q[..., 1::2])
        )[:, 0]
        mixed = halves(q)
        pairs = (mixed[..., 0::2] + 1j * mixed[..., 1::2]) * np.exp(1j * angles_TP)[:, None]
        arrays[f"layers.{i}.q"] = mixed
        arrays[f"layers.{i}.q_rope"] = np.stack([pairs.real, pairs.imag], -1).reshape(q.shape)
    found = compare(truth, Trace(arrays, {}))
    first = found.first_divergence
    assert (first.tap, first.position) == ("layers.0.q_rope", 1)


@few
@given(subjects, st.data())
def test_a_small_mistake_does_not_hide_how_numbers_are_kept(subject, data):
    """All a little wrong, and rearranged: the reading that is a hundred times nearer is meant."""
    model, ids = subject
    order = data.draw(st.permutations(range(model.config.n_heads)))
    truth = candidates.run(model, ids)
    theirs = changed(
        truth,
        of(PAIRED, lambda a: halves(a) * 1.0001),
        of(("scores",), lambda a: np.where(np.isinf(a), -1e9, a * 1.0001)[order]),
    )
    found = align(truth, theirs, near)
    for name, tap in found.taps.items():
        if taps.parse(name)[1] in (*PAIRED, "scores"):
            seen = np.isfinite(tap.expected)
            np.testing.assert_allclose(tap.found[seen], tap.expected[seen] * 1.0001)


def test_weight_on_keys_that_are_not_there_cannot_be_left_out():
    truth = candidates.run(candidates.EXAMPLE, [1, 2, 3])
    padded = np.pad(truth.arrays["layers.0.probs"], ((0, 0), (0, 0), (0, 4)))
    for value, read in ((0.0, True), (0.1, False)):
        padded[2, 1, 5] = value
        found = align(truth, Trace({"kq_soft_max-0": padded}, {}), near)
        assert (found.taps["layers.0.probs"].found is not None) == read


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_beyond_any_allowance(bad):
    anything = Allowed(np.inf, np.inf)
    assert beyond(np.array([bad]), np.array([1.0]), anything).all()
    assert not beyond(np.array([9.0]), np.array([1.0]), anything).any()


# ---- positions and ids ---------------------------------------------------------------------------


@few
@given(subjects, st.data())
def test_some_positions_are_compared_with_the_same_of_the_reference(subject, data):
    model, ids = subject
    truth = candidates.run(model, ids)
    rows = st.sets(st.sampled_from(range(len(ids))), min_size=1).map(sorted)
    ours, theirs = data.draw(rows), data.draw(rows)
    assume(set(ours) & set(theirs))

    def only(kept):
        cut = {
            name: a.take(kept, axis=taps.DIMS[taps.parse(name)[1]].index("T"))
            for name, a in truth.arrays.items()
        }
        return Trace(cut, truth.meta | {"positions": kept})

    found = align(only(ours), only(theirs), near)
    for name, tap in found.taps.items():
        assert tap.positions == sorted(set(ours) & set(theirs))
        assert near(name, tap.found, tap.expected), name


@few
@given(subjects, st.sampled_from([(), (1,), (1, 1)]))
def test_one_row_of_logits_is_that_of_the_last_position(subject, axes):
    truth = candidates.run(*subject)
    last = truth.arrays["logits"][-1]
    found = align(truth, Trace({"logits": last.reshape(*axes, -1)}, {}), near)
    tap = found.taps["logits"]
    assert tap.positions == [len(subject[1]) - 1]
    assert near("logits", tap.found, tap.expected)
    assert found.recognised[f"1 of the reference's {len(subject[1])} positions"] == ["logits"]


def test_other_ids_are_told_apart_from_other_numbers():
    truth = Trace({}, {"ids": [1, 2, 3], "config": dict.fromkeys(SIZES, 1)})
    for ids, told in (([1, 2, 4], "3 at position 2, found 4"), ([1, 2], "3 in all, found 2")):
        with pytest.raises(InputError, match=told):
            align(truth, Trace({}, {"ids": ids}), near)


@pytest.mark.parametrize("meta", [{}, {"ids": [1]}, {"ids": [1], "config": {"dim": "x"}}])
def test_a_reference_has_to_be_a_trace_of_ours(meta):
    with pytest.raises(InputError, match="expected a trace that llama3np made"):
        align(Trace({}, meta), Trace({}, {}), near)


SIZES = ("dim", "ffn_dim", "vocab_size", "head_dim", "n_kv_heads", "n_heads", "n_layers")

# ---- names ---------------------------------------------------------------------------------------


@few
@given(subjects, st.sampled_from(["q", "q_rope"]))
def test_a_name_that_stands_for_two_taps_is_the_one_it_is_near_to(subject, kind):
    model, ids = subject
    truth = candidates.run(model, ids)
    theirs = {f"Qcur-{i}": truth.arrays[f"layers.{i}.{kind}"] for i in range(model.config.n_layers)}
    found = align(truth, Trace(theirs, {}), near)
    assert list(found.taps) == [f"layers.{i}.{kind}" for i in range(model.config.n_layers)]


@pytest.mark.parametrize("last", [False, True])
def test_of_two_names_for_one_tap_the_nearer_to_the_numbers_is_taken(last):
    truth = candidates.run(candidates.EXAMPLE, [1, 2, 3])
    array = truth.arrays["layers.0.mlp_out"]
    theirs = {"layers.0.mlp": array, "layers.0.mlp.down_proj": array, "another": array}
    theirs = dict(reversed(theirs.items())) if last else theirs
    found = align(truth, Trace(theirs, {}), near)
    assert found.taps["layers.0.mlp_out"].source == "layers.0.mlp.down_proj"
    assert sorted(found.unused) == ["another", "layers.0.mlp"]


# ---- layouts -------------------------------------------------------------------------------------


@given(st.sampled_from([(dims, word) for dims, words in LAYOUTS.items() for word in words]))
def test_a_layout_is_undone_by_reading_it(case):
    """Numbered entries in the layout's order come back as those of ours, letter by letter."""
    dims, word = case
    sizes = {"D": 7, "F": 9, "V": 11, "K": 2, "G": 3, "N": 6, "H": 4, "S": 5, "T": 5}
    layout = Layout(dims, word, False, sizes, 5)
    letters = "".join(layout.axes)
    array = np.arange(np.prod([sizes[x] for x in letters])).reshape([sizes[x] for x in letters])
    ours = (
        np.einsum(f"{letters}->{dims.replace('N', 'KG')}", array) if not layout.repeated else None
    )
    shaped = array.reshape([np.prod([sizes[x] for x in axis]) for axis in layout.axes])
    if ours is None:  # one for each query head: only equal ones are one key head
        assert layout.read(shaped) is None
        first = np.einsum(f"{letters}->TKGH", array)[:, :, :1]
        same = np.einsum(f"TKGH->{letters}", first.repeat(3, axis=2)).reshape(shaped.shape)
        np.testing.assert_array_equal(layout.read(same), first[:, :, 0])
    else:
        np.testing.assert_array_equal(layout.read(shaped), ours.reshape([sizes[x] for x in dims]))


@few
@given(st.integers(0, 2**32 - 1))
def test_of_wrong_numbers_the_likeliest_shape_is_taken_not_the_nearest(seed):
    """(1, 8, 16, 8) are heads before positions, though (H, T, N) might be read out of it too."""
    rng = np.random.default_rng(seed)
    sizes = {"K": 4, "G": 2, "N": 8, "H": 8, "S": 16}
    frame = Frame(sizes, Positions({"ids": range(16)}, {}), lambda *_: False)
    found_1NTH, expected_TNH = rng.normal(size=(1, 8, 16, 8)), rng.normal(size=(16, 8, 8))
    cases = [Case("layers.0.q_rope", "theirs", found_1NTH, expected_TNH, False)]
    assert {option.layout.word for option in readings("q_rope", cases, frame)} == {"NTH", "HTN"}
    layout = choose("q_rope", cases, frame).reading.layout
    assert (layout.word, layout.reversed) == ("NTH", False)


def test_a_shape_that_fits_nothing_has_no_layout():
    sizes = {"D": 7, "K": 2, "G": 3, "N": 6, "H": 4, "S": 5}
    assert list(layouts("TNH", (5, 6, 3), sizes)) == []
    assert list(layouts("TD", (2, 5, 7), sizes)) == []
    assert list(layouts("NTS", (7, 5, 4), sizes)) == []

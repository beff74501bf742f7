"""The cache: what it forgets, copies, refuses; and whatever is done to it, what the model sees."""

from dataclasses import replace

import devices
import ml_dtypes
import numpy as np
import pytest
from checks import assert_close, assert_same
from devices import to_host
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from noise import NOISE, ULP32, noise, oracle_taps
from runs import extend, new_cache, run
from strategies import (
    MAX_TOKENS,
    Model,
    configs,
    models,
    padded,
    ragged_runs,
    runs,
    token_ids,
)

from llama3np import cache as caches
from llama3np.cache import KV_DTYPES, Cache, kv_dtype
from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.llm import Llama
from llama3np.model import forward

pytestmark = pytest.mark.filterwarnings("error")

EXACT = 1e-10  # float64, as in test_model.py
HALVES = (np.float16, ml_dtypes.bfloat16)
SMALL = Model(Config(5, 2, 4, 2, 2, 3, 7), seed=3)


def filled(model, rows, pad=0, slots=MAX_TOKENS):
    """A cache that holds these rows of ids."""
    cache = new_cache(model, len(rows), slots)
    ids_BT, new_B = padded(rows, pad)
    extend(model, ids_BT, cache, new_B=new_B)
    return cache


def contents(cache):
    return [to_host(array).copy() for array in (*cache.k, *cache.v)]


# ---- memory -------------------------------------------------------------------------------------


@given(
    configs(),
    st.integers(1, 3),
    st.integers(1, 9),
    st.sampled_from(["float32", "float64", *HALVES]),
)
def test_a_new_cache_reserves_what_it_says(xp, config, batch, slots, dtype):
    cache = caches.new_cache(config, batch, slots, dtype, xp)
    numbers = 2 * config.n_layers * batch * config.n_kv_heads * slots * config.head_dim
    assert cache.nbytes == numbers * np.dtype(dtype).itemsize
    assert (cache.batch, cache.max_seq_len) == (batch, slots)
    assert cache.lengths_B.tolist() == [0] * batch
    assert {array.dtype for array in (*cache.k, *cache.v)} == {np.dtype(dtype)}


def test_the_arrays_stay_where_they_are(xp):
    """A step writes in place: no reallocation, no growth."""
    small = SMALL.on(xp)
    cache = new_cache(small, 1, 4)
    before = [*cache.k, *cache.v]
    for token in (1, 2, 3):
        extend(small, [[token]], cache)
    cache.trim(1).reset()
    for now, then in zip((*cache.k, *cache.v), before, strict=True):
        assert now is then


@given(ragged_runs())
def test_a_call_writes_the_slots_of_its_real_tokens_and_no_others(xp, run_of):
    model, rows, pad = run_of
    model = model.on(xp)
    cache = new_cache(model, len(rows), MAX_TOKENS)
    for array in (*cache.k, *cache.v):
        array[:] = 7e77
    ids_BT, new_B = padded(rows, pad)
    extend(model, ids_BT, cache, new_B=new_B)
    for array_BKSH in (*cache.k, *cache.v):
        untouched_BKSH = array_BKSH == 7e77
        for b, length in enumerate(new_B):
            assert not untouched_BKSH[b, :, :length].any()
            assert untouched_BKSH[b, :, length:].all()


@given(runs(min_tokens=2), st.sampled_from([1e30, -1e30]), st.data())
def test_slots_beyond_the_length_are_never_seen(xp, run_of, garbage, data):
    model, ids = run_of
    model = model.on(xp)
    held = data.draw(st.integers(0, len(ids) - 1), label="held")
    clean = new_cache(model, 1, len(ids) + 2)
    if held:
        extend(model, [ids[:held]], clean)
    dirty = clean.fork()
    for array_BKSH in (*dirty.k, *dirty.v):
        array_BKSH[:, :, held:] = garbage
    new = [ids[held:]]
    assert_same(extend(model, new, dirty), extend(model, new, clean), "logits")


# ---- keys and values of 16 bits ------------------------------------------------------------------


class RoundedByHand(Cache):
    """A float32 cache whose numbers are rounded before they are written."""

    def write(self, layer, window, k_BTKH, v_BTKH):
        rounded = (array.astype(self.dtype).astype("float32") for array in (k_BTKH, v_BTKH))
        return super().write(layer, window, *rounded)


@given(ragged_runs(), st.sampled_from(HALVES), st.data())
def test_a_cache_of_16_bits_rounds_what_is_written_and_nothing_else(xp, run_of, dtype, data):
    """Bit for bit, over two calls and a fork: what is read is widened, which is exact."""
    model, rows, pad = run_of
    model = model.on(xp)
    more = [data.draw(token_ids(model.config.vocab_size, 1, 4), label="more") for _ in rows]
    narrow = new_cache(model, len(rows), 2 * MAX_TOKENS, dtype)
    by_hand = new_cache(model, len(rows), 2 * MAX_TOKENS, "float32")
    by_hand = RoundedByHand(by_hand.k, by_hand.v, by_hand.lengths_B)
    by_hand.dtype = dtype
    for new in (rows, more):
        ids_BT, new_B = padded(new, pad)
        found, expected = (
            extend(model, ids_BT, cache, "float32", new_B=new_B) for cache in (narrow, by_hand)
        )
        assert_same(found, expected, "logits")
        narrow = narrow.fork()
        narrow.trim(narrow.lengths_B)
    assert {array.dtype for array in (*narrow.k, *narrow.v)} == {np.dtype(dtype)}
    for array, other in zip(contents(narrow), contents(by_hand), strict=True):
        assert_same(array.astype("float32"), other, "cache")


def test_writing_rounds_to_nearest_ties_to_even(xp):
    cache = caches.new_cache(Config(2, 1, 1, 1, 2, 2, 3), 1, 2, ml_dtypes.bfloat16, xp)
    window = cache.window((1, 2))
    tie = 2.0**-8  # half the distance of two bfloat16 from 1 on
    k_BTKH = xp.array([1 + tie, 1 + 3 * tie, 1 + tie * 1.01, -1 - tie], "float32")
    k_BKSH, _ = cache.write(0, window, *[k_BTKH.reshape(1, 2, 1, 2)] * 2)
    rounded = [1, 1 + 4 * tie, 1 + 2 * tie, -1]
    assert_same(to_host(k_BKSH).astype("float32").ravel(), np.array(rounded, "float32"), "keys")


def test_the_names_of_cache_dtypes():
    assert kv_dtype(None, "float32") == np.float32
    assert kv_dtype(None, "float64") == np.float64
    assert {name: kv_dtype(name, "float32") for name in KV_DTYPES} == KV_DTYPES
    assert [kv_dtype(name, "float32").itemsize for name in ("f32", "bf16", "f16")] == [4, 2, 2]


@pytest.mark.parametrize(
    ("name", "dtype", "message"),
    [
        ("q8", "float32", "kv-dtype: expected one of f32, bf16, f16, found 'q8'"),
        ("f32", "float64", "kv-dtype: .*float64.* found 'f32'"),
        ("bf16", "float64", "kv-dtype: .*float64.* found 'bf16'"),
    ],
)
def test_other_cache_dtypes_are_refused(name, dtype, message):
    with pytest.raises(InputError, match=message):
        kv_dtype(name, dtype)


@pytest.mark.parametrize("of_cache", [*HALVES, np.float32, np.int16])
def test_a_cache_that_would_round_the_oracle_is_refused(xp, of_cache):
    small = SMALL.on(xp)
    cache = new_cache(small, 1, 4, of_cache)
    assert_refused(
        cache, f"float64, found .*{np.dtype(of_cache)}", call_forward(small, cache, [[1]])
    )


# ---- trim, reset, fork --------------------------------------------------------------------------


@given(ragged_runs(), st.data())
def test_trim_and_extend_equals_never_having_gone_further(xp, run_of, data):
    model, rows, pad = run_of
    model = model.on(xp)
    kept = [data.draw(st.integers(0, len(row)), label="kept") for row in rows]
    new = [data.draw(token_ids(model.config.vocab_size, 1, 4), label="new") for _ in rows]
    cache = filled(model, rows, pad, slots=2 * MAX_TOKENS).trim(kept)
    ids_BT, new_B = padded(new, pad)
    found = extend(model, ids_BT, cache, new_B=new_B)
    for b, (row, length, after) in enumerate(zip(rows, kept, new, strict=True)):
        expected = run(model, [row[:length] + after])[0, length:]
        assert_close(found[b, : len(after)], expected, EXACT, f"row {b}: logits")


@given(ragged_runs())
def test_reset_equals_a_new_cache(xp, run_of):
    model, rows, pad = run_of
    model = model.on(xp)
    cache = filled(model, rows, pad).reset()
    assert cache.lengths_B.tolist() == [0] * len(rows)
    ids = [[1] * len(rows[0])] * len(rows)
    assert_close(extend(model, ids, cache), run(model, ids), EXACT, "logits")


def test_one_length_trims_every_row(xp):
    small = SMALL.on(xp)
    assert filled(small, [[1, 2, 3], [4, 5]]).trim(2).lengths_B.tolist() == [2, 2]


def test_trim_and_reset_return_the_cache_itself(xp):
    small = SMALL.on(xp)
    cache = filled(small, [[1, 2]])
    assert cache.trim(1) is cache
    assert cache.reset() is cache


def test_trim_keeps_its_own_lengths(xp):
    small = SMALL.on(xp)
    cache, lengths = filled(small, [[1, 2], [3, 4]]), np.array([1, 2])
    cache.trim(lengths)
    lengths[:] = 0
    assert cache.lengths_B.tolist() == [1, 2]


@given(ragged_runs(), st.data())
def test_a_fork_goes_on_as_the_rows_it_was_taken_from(xp, run_of, data):
    model, rows, pad = run_of
    model = model.on(xp)
    row = st.integers(0, len(rows) - 1)
    chosen = data.draw(st.none() | st.lists(row, min_size=1, max_size=4), label="rows")
    fork = filled(model, rows, pad).fork(chosen)
    taken = [rows[b] for b in (range(len(rows)) if chosen is None else chosen)]
    assert fork.lengths_B.tolist() == [len(ids) for ids in taken]
    fork.trim(fork.lengths_B - 1)  # room for one token more, and a way to see all before it
    last = [[ids[-1]] for ids in taken]
    for b, (found, ids) in enumerate(zip(extend(model, last, fork), taken, strict=True)):
        assert_close(found, run(model, [ids])[0, -1:], EXACT, f"row {b}: logits")


@pytest.mark.parametrize("rows", [None, [0, 1], [1, 1]])
def test_a_fork_and_its_source_share_no_memory(xp, rows):
    small = SMALL.on(xp)
    source = filled(small, [[1, 2], [3]])
    fork = source.fork(rows)
    before, lengths = contents(source), source.lengths_B.copy()
    for array in (*fork.k, *fork.v):
        array[:] = np.nan
    fork.lengths_B[:] = 0
    for array, expected in zip(contents(source), before, strict=True):
        assert_same(array, expected, "source")
    assert_same(source.lengths_B, lengths, "lengths")


def test_a_row_forked_twice_is_two_rows(xp):
    small = SMALL.on(xp)
    fork = filled(small, [[1, 2]]).fork([0, 0])
    logits_BTV = extend(small, [[3], [4]], fork)
    for b, token in enumerate((3, 4)):
        assert_close(logits_BTV[b], run(small, [[1, 2, token]])[0, -1:], EXACT, f"row {b}")


# ---- what is refused, and leaves no trace -------------------------------------------------------


def assert_refused(cache, match, call):
    before, lengths = contents(cache), cache.lengths_B.tolist()
    with pytest.raises(InputError, match=match):
        call()
    assert cache.lengths_B.tolist() == lengths
    for array, expected in zip(contents(cache), before, strict=True):
        assert_same(array, expected, "cache")


def call_forward(model, cache, ids, **options):
    return lambda: forward(model.params, model.config, ids, cache, dtype="float64", **options)


def test_more_tokens_than_fit_are_refused_with_the_numbers(xp):
    small = SMALL.on(xp)
    cache = filled(small, [[1], [1, 2, 3]], slots=5)
    assert_refused(cache, r"row 1 .*3 .*3 .*5", call_forward(small, cache, [[1, 2, 3], [1, 2, 3]]))


def test_a_cache_can_be_filled_to_the_last_slot(xp):
    small = SMALL.on(xp)
    cache = new_cache(small, 1, 3)
    assert_close(extend(small, [[1, 2, 3]], cache), run(small, [[1, 2, 3]]), EXACT, "logits")
    assert_refused(cache, "3", call_forward(small, cache, [[4]]))


def test_padding_needs_no_slots(xp):
    """A short row may be padded past the end of the cache."""
    small = SMALL.on(xp)
    cache = filled(small, [[1, 2, 3], [1]], slots=4)
    found = extend(small, [[4, 0, 0], [2, 3, 4]], cache, new_B=[1, 3])
    assert cache.lengths_B.tolist() == [4, 4]
    assert_close(found[0, 0], run(small, [[1, 2, 3, 4]])[0, -1], EXACT, "row 0")
    assert_close(found[1], run(small, [[1, 2, 3, 4]])[0, 1:], EXACT, "row 1")


@pytest.mark.parametrize("new_B", [[1], [1, 1, 1], [1, 3], [-1, 1], [[1, 1]]])
def test_counts_that_do_not_describe_the_rows_are_refused(xp, new_B):
    small = SMALL.on(xp)
    cache = filled(small, [[1], [2]])
    assert_refused(cache, "2 counts", call_forward(small, cache, [[1, 2], [3, 4]], new_B=new_B))


@pytest.mark.parametrize("rows", [1, 3])
def test_another_number_of_rows_is_refused(xp, rows):
    small = SMALL.on(xp)
    cache = filled(small, [[1], [2]])
    assert_refused(cache, f"2 rows.*{rows}", call_forward(small, cache, [[1]] * rows))


@pytest.mark.parametrize("lengths", [-1, 3, [1, 3], [2, -1]])
def test_trimming_to_a_length_that_is_not_held_is_refused(xp, lengths):
    small = SMALL.on(xp)
    cache = filled(small, [[1, 2], [1, 2]])
    assert_refused(cache, "cache", lambda: cache.trim(lengths))


@pytest.mark.parametrize("rows", [[], [2], [-1], [0, 5]])
def test_forking_rows_that_are_not_there_is_refused(xp, rows):
    small = SMALL.on(xp)
    cache = filled(small, [[1, 2], [1, 2]])
    assert_refused(cache, "cache", lambda: cache.fork(rows))


@pytest.mark.parametrize(
    ("batch", "slots", "named"),
    [
        (0, 1, "batch.* 0"),
        (1, 0, "max_seq_len.* 0"),
        (-1, 4, "batch.* -1"),
        (4, -1, "max_seq_len.* -1"),
        (1.5, 4, r"batch.* 1\.5"),
        (1, "8", "max_seq_len.* '8'"),
    ],
)
def test_a_cache_of_nothing_is_refused(batch, slots, named):
    with pytest.raises(InputError, match=named):
        caches.new_cache(SMALL.config, batch, slots)


def test_a_call_that_is_broken_off_leaves_the_lengths(xp):
    """Ctrl-C in the middle of a step: the same step can be taken again."""
    small = SMALL.on(xp)
    cache = filled(small, [[1, 2]])

    def interrupted(name, array):
        if name == "layers.1.scores":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extend(small, [[3]], cache, tap=interrupted)
    assert cache.lengths_B.tolist() == [2]
    assert_close(extend(small, [[3]], cache), run(small, [[1, 2, 3]])[:, -1:], EXACT, "logits")


# ---- any history --------------------------------------------------------------------------------


class CacheMachine(RuleBasedStateMachine):
    """Caches driven at random, against the lists of tokens that they should hold.

    Every append is checked against the same tokens sent through the model from nothing. Forks
    stay alive beside their sources, so that memory they share would show.
    """

    SLOTS = 10
    xp = np

    @initialize(model=models(), rows=st.integers(1, 3))
    def start(self, model, rows):
        self.model = model.on(self.xp)
        self.caches = [(self.empty(rows), [[] for _ in range(rows)])]

    def empty(self, rows):
        return new_cache(self.model, rows, self.SLOTS)

    def feed(self, ids_BT, cache, new_B=None):
        return extend(self.model, ids_BT, cache, new_B=new_B)

    def allowed(self, row):
        return EXACT

    def pick(self, data):
        return data.draw(st.sampled_from(self.caches), label="cache and its tokens")

    @rule(data=st.data(), most=st.sampled_from([1, 4]))
    def append(self, data, most):
        """To any rows, as decoding does or more at a time."""
        cache, rows = self.pick(data)
        V = self.model.config.vocab_size
        room = (min(most, self.SLOTS - len(row)) for row in rows)
        new = [data.draw(token_ids(V, 0, size), label="new") for size in room]
        if not any(new):
            return
        ids_BT, new_B = padded(new, data.draw(st.integers(0, V - 1), label="pad"))
        logits_BTV = self.feed(ids_BT, cache, new_B)
        for b, (row, ids) in enumerate(zip(rows, new, strict=True)):
            row += ids
            if ids:
                expected, found = run(self.model, [row])[0, -len(ids) :], logits_BTV[b, : len(ids)]
                assert_close(found, expected, self.allowed(row), f"row {b}: logits")

    @rule(data=st.data())
    def trim(self, data):
        cache, rows = self.pick(data)
        lengths = [data.draw(st.integers(0, len(row)), label="length") for row in rows]
        cache.trim(lengths)
        for row, length in zip(rows, lengths, strict=True):
            del row[length:]

    @precondition(lambda self: len(self.caches) < 4)
    @rule(data=st.data())
    def fork(self, data):
        cache, rows = self.pick(data)
        row = st.integers(0, len(rows) - 1)
        chosen = data.draw(st.none() | st.lists(row, min_size=1, max_size=3), label="rows")
        copied = range(len(rows)) if chosen is None else chosen
        self.caches.append((cache.fork(chosen), [list(rows[b]) for b in copied]))

    @rule(data=st.data())
    def reset(self, data):
        cache, rows = self.pick(data)
        cache.reset()
        for row in rows:
            row.clear()

    @rule(data=st.data())
    def refuse(self, data):
        """A row too long by one leaves everything as it was, which the next append will show."""
        cache, rows = self.pick(data)
        T = self.SLOTS - max(map(len, rows)) + 1
        with pytest.raises(InputError, match=str(self.SLOTS)):
            self.feed(np.zeros((len(rows), T), int), cache)

    @invariant()
    def lengths_are_those_of_the_tokens(self):
        for cache, rows in getattr(self, "caches", []):
            assert cache.lengths_B.tolist() == [len(row) for row in rows]


class CacheMachineOnCupy(CacheMachine):
    """The same on the device."""

    xp = property(lambda self: devices.cupy)


class CacheMachineOnCuda(CacheMachine):
    """The same by the engine cuda, whose steps are recorded with the arrays of a cache."""

    def empty(self, rows):
        model = self.model
        self.llm = Llama(model.config, model.params, **devices.placed("cuda"), max_seq_len=16)
        return self.llm.new_cache(rows, self.SLOTS)

    def feed(self, ids_BT, cache, new_B=None):
        return self.llm.engine.forward(ids_BT, cache, new_B, last_only=False)

    def allowed(self, row):
        truth = oracle_taps(self.model, row)
        return NOISE * (noise(self.model, row, truth)["logits"] + ULP32)


TestCacheOfAnyHistory = CacheMachine.TestCase
TestCacheOfAnyHistoryOnCupy = pytest.mark.cuda(pytest.mark.gpu(CacheMachineOnCupy.TestCase))
TestCacheOfAnyHistoryOnCuda = pytest.mark.cuda(pytest.mark.gpu(CacheMachineOnCuda.TestCase))
TestCacheOfAnyHistoryOnCupy.settings = settings(max_examples=25)
TestCacheOfAnyHistoryOnCuda.settings = settings(max_examples=30)


@pytest.mark.parametrize("lengths", [1.0, True, [True], "1", [[1]], [1, 1], float("nan")])
def test_lengths_that_are_not_whole_numbers_are_refused(lengths):
    cache = caches.new_cache(Config(4, 1, 1, 1, 2, 2, 3), 1, 4)
    with pytest.raises(InputError, match="cache: expected lengths"):
        cache.trim(lengths)


@pytest.mark.parametrize("rows", [[True, False], [0.9], [[0]], [], np.array([], dtype=int), "0"])
def test_rows_that_are_not_whole_numbers_are_refused(rows):
    cache = caches.new_cache(Config(4, 1, 1, 1, 2, 2, 3), 2, 4)
    with pytest.raises(InputError, match="cache: expected rows"):
        cache.fork(rows)


@pytest.mark.parametrize(
    "other",
    [
        {"n_layers": 2},
        {"n_layers": 4},
        {"n_kv_heads": 1, "n_heads": 2},
        {"head_dim": 4},
    ],
)
def test_the_cache_of_another_model_is_refused(other):
    config = Config(4, 3, 2, 2, 2, 2, 3)
    model = Model(config, seed=0)
    cache = caches.new_cache(replace(config, **other), 1, 4)
    with pytest.raises(InputError, match="cache: expected"):
        forward(model.params, config, [[0]], cache)
    assert not cache.k[0].any()


@pytest.mark.parametrize(("of_cache", "of_call"), [("float32", "float64"), ("float64", "float32")])
def test_the_cache_of_another_precision_is_refused(of_cache, of_call):
    """Either way round it would pass unseen: as a float64 leak, or as an oracle of 24 bits."""
    model = Model(Config(4, 1, 1, 1, 2, 2, 3), seed=0)
    with pytest.raises(InputError, match=f"{of_call}.*found.*{of_cache}"):
        forward(
            model.params,
            model.config,
            [[0]],
            caches.new_cache(model.config, 1, 4, of_cache),
            dtype=of_call,
        )


def test_a_fork_copies_only_the_slots_in_use(xp):
    """A copy of 2 tokens in a cache of 8192 slots must not cost the 8192."""
    config = Config(4, 1, 1, 1, 2, 2, 3)
    model = Model(config, seed=0, xp=xp)
    cache = new_cache(model, 1, 8, "float32")
    forward(model.params, config, [[0, 1]], cache)
    cache.k[0][:, :, 2:] = 7  # a trimmed past
    fork = cache.fork([0, 0])
    assert_same(to_host(fork.k[0][1, :, :2]), to_host(cache.k[0][0, :, :2]), "keys")
    assert not fork.k[0][:, :, 2:].any()

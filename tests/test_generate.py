"""Generation: what is fed, in which order, and where it ends."""

from dataclasses import replace

import numpy as np
import pytest
from checks import assert_close
from devices import placed
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from noise import NOISE, ULP32, noise, oracle_taps, short_noise
from strategies import SHORT, Model, models, ragged_runs, runs

from llama3np import generate as generation
from llama3np.cache import new_cache
from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.llm import Llama
from llama3np.params import random
from llama3np.sample import GREEDY, Sampling, all_ids, choose, draw, log_softmax

# What holds to the bit, as both ways feed the same tokens together, holds in 16 bits too.
profiles = st.sampled_from([{}, *({"dtype": name} for name in SHORT)])


def llama(model, where="cpu", **options):
    """The model there: in the oracle's precision, but where kernels of float32 compute."""
    dtype = "float32" if where == "cuda" else "float64"
    return Llama(model.config, model.params, **{"dtype": dtype, **placed(where), **options})


def error_of(llm, model, ids):
    """How far two ways to compute the logits of these ids may be apart."""
    truth = oracle_taps(model, ids)
    scale = np.abs(truth["logits"]).max()
    if llm.profile.dtype == "float64":
        return 1e-9 * (1 + scale)
    return 2 * NOISE * (noise(model, ids, truth)["logits"] + ULP32) * scale


def undoubted(llm, model, ids, new_ids, sampling=GREEDY, row=0):
    """Whether logits as near to the oracle's as this engine's leave no doubt about these new ids.

    They are the oracle's own. Tried with the error in eight ways; in float64 nothing is so near.
    """
    if llm.profile.dtype == "float64":
        return True
    whole = [*ids, *new_ids]
    logits_TV = llama(model).forward(whole[:-1])[0, len(ids) - 1 :]
    signs = np.random.default_rng(0).choice([-1, 1], (8, *logits_TV.shape))
    for moved_TV in logits_TV + signs * error_of(llm, model, whole):
        rng = sampling.generator(row)
        if [choose(logits_V, sampling, rng) for logits_V in moved_TV] != new_ids:
            return False
    return True


def greedy_by_recomputation(llm, ids, count):
    """The next ids with no cache at all: the whole sequence anew for every token."""
    sequence = list(ids)
    for _ in range(count):
        sequence.append(int(llm.forward(sequence)[0, -1].argmax()))
    return sequence[len(ids) :]


@given(runs(), st.integers(1, 6))
def test_greedy_equals_recomputing_everything_for_each_token(where, run, count):
    """No position is skipped, no slot is left empty, and max_new_tokens means new tokens."""
    model, ids = run
    llm = llama(model, where)
    (completion,) = llm.generate(ids, max_new_tokens=count)
    expected = greedy_by_recomputation(llama(model), ids, count)
    assume(undoubted(llm, model, ids, expected))
    assert completion.ids == expected
    assert completion.finish_reason == "length"


@given(ragged_runs(min_rows=2), st.integers(1, 5), st.sampled_from([0.0, 0.8]))
def test_a_batch_continues_every_row_as_if_alone(where, drawn, count, temperature):
    """Rows of other lengths that stop at other times change nothing; row 0's draws are its own."""
    model, rows, _ = drawn
    oracle, llm = (llama(model, at, stop_ids=[0, 1]) for at in ("cpu", where))
    sampling = Sampling(temperature, seed=5)
    together = llm.generate(rows, count, **sampling._asdict())
    for row, completion in enumerate(together):
        if temperature == 0 or row == 0:
            (alone,) = oracle.generate(rows[row], count, **sampling._asdict())
            assume(undoubted(llm, model, rows[row], alone.ids, sampling))
            assert completion == alone


@given(runs(), st.integers(1, 6), profiles, st.data())
def test_the_first_stop_id_ends_a_row_and_is_its_last_id(where, run, count, profile, data):
    model, ids = run
    free = llama(model, where, **profile).generate(ids, count)[0].ids
    stop = data.draw(st.sampled_from(free))
    completion = llama(model, where, **profile, stop_ids=[stop]).generate(ids, count)[0]
    assert completion.ids == free[: free.index(stop) + 1]
    assert completion.finish_reason == "stop"


@given(runs(), st.integers(1, 6), st.sampled_from([0.0, 1.0]), st.integers(0, 99), profiles)
def test_stream_yields_what_generate_returns(where, run, count, temperature, seed, profile):
    model, ids = run
    llm = llama(model, where, **profile, stop_ids=[1])
    options = {"temperature": temperature, "seed": seed, "logprobs": True}
    steps = list(llm.stream(ids, count, **options))
    (completion,) = llm.generate([ids], count, **options)
    assert [step.id for step in steps] == completion.ids
    assert [step.logprob for step in steps] == completion.logprobs
    assert [step.finish_reason for step in steps] == [None] * (len(steps) - 1) + [
        completion.finish_reason
    ]


@given(runs(min_tokens=2), st.integers(1, 4))
def test_logprobs_are_those_of_the_model_without_a_cache(where, run, count):
    model, ids = run
    llm = llama(model, where)
    (completion,) = llm.generate(ids, count, temperature=0.7, top_k=3, seed=1, logprobs=True)
    whole = [*ids, *completion.ids]
    expected = log_softmax(llama(model).forward(whole)[0])[np.arange(len(whole) - 1), whole[1:]]
    error = 2 * error_of(llm, model, whole)  # of a logit and of the sum below it
    np.testing.assert_allclose(completion.logprobs, expected[len(ids) - 1 :], rtol=0, atol=error)
    np.testing.assert_allclose(llm.score(whole), expected, rtol=0, atol=error)


@given(ragged_runs(), st.integers(1, 30))
def test_prefill_in_chunks_equals_prefill_at_once(where, drawn, chunk):
    model, rows, _ = drawn
    llm = llama(model, where)
    error = 2 * max(error_of(llm, model, row) for row in rows)
    at_once = generation.prefill(llm._run, llm.new_cache(len(rows), 9), rows, 10**6)
    chunked = generation.prefill(llm._run, llm.new_cache(len(rows), 9), rows, chunk)
    np.testing.assert_allclose(chunked, at_once, rtol=0, atol=error)
    for row in rows:
        if len(row) > 1:
            scores = generation.score(llm._run, llm.new_cache(1, len(row)), row, chunk)
            np.testing.assert_allclose(scores, llm.score(row), rtol=0, atol=error)


@given(ragged_runs(), st.integers(1, 30), st.sampled_from([0.0, 0.8]))
def test_any_chunk_gives_the_same_ids(where, drawn, chunk, temperature):
    model, rows, _ = drawn
    sampling = Sampling(temperature, seed=1)
    oracle, llm = (
        llama(model, at, prefill_chunk=tokens, stop_ids=[0])
        for at, tokens in (("cpu", 10**6), (where, chunk))
    )
    expected = oracle.generate(rows, 4, **sampling._asdict())
    for row, completion in enumerate(expected):
        assume(undoubted(llm, model, rows[row], completion.ids, sampling, row))
    assert llm.generate(rows, 4, **sampling._asdict()) == expected


@settings(max_examples=24)
@given(ragged_runs(), st.integers(1, 30), st.sampled_from(SHORT))
def test_in_16_bits_chunks_rows_and_scores_are_as_near_the_oracle_as_they_allow(
    where, drawn, chunk, dtype
):
    """Prefill in any chunks, ragged rows and the log-probabilities of a text."""
    model, rows, _ = drawn
    llm = llama(model, where, dtype=dtype)
    chunked = generation.prefill(llm._run, llm.new_cache(len(rows), 9), rows, chunk)
    together = llm.forward(rows)
    assert together.dtype == chunked.dtype == np.float32
    for b, row in enumerate(rows):
        truth = oracle_taps(model, row)
        allowed = short_noise(model, row, truth, llm.profile.dtype)["logits"]
        assert_close(together[b, : len(row)], truth["logits"], allowed, f"row {b}")
        within = allowed * np.abs(truth["logits"]).max()
        assert np.abs(chunked[b] - truth["logits"][-1]).max() <= within
        if len(row) > 1:
            expected = log_softmax(truth["logits"])[np.arange(len(row) - 1), row[1:]]
            scores = generation.score(llm._run, llm.new_cache(1, len(row)), row, chunk)
            assert np.abs(scores - expected).max() <= 2 * within  # a logit, and those it is beside


@given(ragged_runs(), st.integers(1, 30))
def test_a_chunk_has_as_many_tokens_as_it_may_over_all_rows(where, drawn, chunk):
    model, rows, _ = drawn
    llm, shapes = llama(model, where), []

    def forward(ids_BT, cache, new_B, last_only):
        shapes.append(ids_BT.shape)
        return llm._run(ids_BT, cache, new_B, last_only)

    generation.prefill(forward, llm.new_cache(len(rows), 9), rows, chunk)
    step, longest = max(1, chunk // len(rows)), max(map(len, rows))
    widths = [min(step, longest - start) for start in range(0, longest, step)]
    assert shapes == [(len(rows), width) for width in widths]


@given(runs(), profiles, st.data())
def test_a_stream_continues_a_cache(where, run, profile, data):
    """Two streams over one cache give what one stream gives."""
    model, ids = run
    llm = llama(model, where, **profile)
    whole = [step.id for step in llm.stream(ids, 4)]
    first = data.draw(st.integers(1, 3))
    cache = llm.new_cache(1, len(ids) + 8)
    start = [step.id for step in llm.stream(ids, first, cache=cache)]
    rest = [step.id for step in llm.stream(start[-1:], 4 - first, cache=cache)]
    assert start + rest == whole


@given(models(), profiles)
def test_what_is_in_the_cache_counts_for_the_limit(where, model, profile):
    """The room is the cache's, not the model's, and what it holds is used up."""
    llm = llama(model, where, **profile, max_seq_len=4)
    cache = llm.new_cache(1, 9)
    llm.forward([0] * 5, cache)
    with pytest.raises(InputError, match=r"7 tokens.* 3 .*max_seq_len 9"):
        llm.stream([0, 0], 3, cache=cache)
    assert len(list(llm.stream([0, 0], 2, cache=cache))) == 2


@given(models())
def test_a_stream_takes_a_cache_of_one_row_of_its_own_model(where, model):
    """At once, not at the first step."""
    llm = llama(model, where)
    with pytest.raises(InputError, match="expected 1 rows, found 2"):
        llm.stream([0], 1, cache=llm.new_cache(2, 4))
    other = "float32" if llm.profile.dtype == "float64" else "float64"
    with pytest.raises(InputError, match="cache: expected"):
        llm.stream([0], 1, cache=llama(model, where, dtype=other).new_cache(1, 4))


@given(models())
def test_the_default_context_is_the_models_and_at_most_8192(model):
    for own, limit in ((100, 100), (131072, 8192)):
        config = replace(model.config, context_length=own)
        assert Llama(config, model.params).max_seq_len == limit


def test_the_default_is_256_new_tokens():
    model = Model(Config(2, 1, 1, 1, 2, 1, 2), seed=0)
    assert len(llama(model).generate([0])[0].ids) == 256


@given(models(), st.integers(3, 9))
def test_score_takes_at_most_max_seq_len(model, limit):
    llm = llama(model, max_seq_len=limit)
    assert len(llm.score([0] * limit)) == limit - 1
    with pytest.raises(InputError, match=f"{limit + 1} tokens.*{limit}"):
        llm.score([0] * (limit + 1))


@given(models(), st.integers(0, 3))
def test_a_prompt_too_long_states_the_three_numbers_before_any_work(model, extra):
    llm = llama(model, max_seq_len=8)
    calls = []
    llm._run = lambda *args: calls.append(args)
    for call in (llm.generate, llm.stream):
        with pytest.raises(InputError, match=rf"6 tokens.* {3 + extra} .*max_seq_len 8"):
            call([0] * 6, max_new_tokens=3 + extra)
    assert not calls


@given(models())
def test_max_new_tokens_defaults_to_what_fits_and_may_be_0(where, model):
    llm = llama(model, where, max_seq_len=8)
    assert len(llm.generate([0] * 6)[0].ids) == 2
    assert llm.generate([0] * 8, 0) == [([], "", None, "length")]
    for length in (8, 11):
        with pytest.raises(InputError, match=f"expected at most 7 tokens.* 8, found {length}"):
            llm.generate([0] * length)
    assert llm.generate([], 3) == []
    with pytest.raises(InputError, match="max_new_tokens"):
        llm.generate([0], -1)


@given(models(), st.sampled_from([-1, "V", 10**12]))
def test_ids_outside_the_vocabulary_are_an_error(where, model, wrong):
    llm = llama(model, where)
    wrong = model.config.vocab_size if wrong == "V" else wrong
    for call in (llm.generate, llm.stream, llm.forward, llm.score):
        with pytest.raises(InputError, match=f"found {wrong}"):
            call([0, wrong, 0])


@pytest.mark.parametrize(
    "ids",
    [
        [],
        [[0], []],
        [0.5],
        [[0], [[1]]],
        [[1, [2]]],
        [[1], 2],
        5,
        None,
        [True],
        [2**64],
        [[0], "a"],
    ],
)
@given(models())
def test_prompts_that_are_no_prompts_are_an_error(ids, model):
    llm = llama(model)
    with pytest.raises(InputError, match=r"token ids|prompt"):
        llm.forward(ids)
    if ids != []:  # no prompt at all is an empty batch for generate
        with pytest.raises(InputError, match=r"token ids|prompt|tokenizer"):
            llm.generate(ids, 1)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"max_new_tokens": 1.5}, "max_new_tokens"),
        ({"max_new_tokens": "1"}, "max_new_tokens"),
        ({"stop_ids": 5}, "token ids"),
        ({"stop_ids": "ab"}, "token ids"),
        ({"temperature": "a"}, "temperature"),
        ({"top_k": 2.5}, "top_k"),
        ({"seed": 1.5}, "seed"),
        ({"temprature": 1.0}, "temprature"),
    ],
)
def test_options_of_another_type_are_named(options, named):
    llm = llama(Model(Config(2, 1, 1, 1, 2, 1, 2), seed=0))
    for call in (llm.generate, llm.stream):
        with pytest.raises(InputError, match=named):
            call([0], **{"max_new_tokens": 1, **options})


def test_float64_weights_need_the_float64_profile():
    """Under float32 they would widen every activation."""
    model = Model(Config(2, 1, 1, 1, 2, 1, 2), seed=0)
    params = random(model.config, np.random.default_rng(0), np.float64)
    with pytest.raises(InputError, match="float64"):
        Llama(model.config, params)
    assert Llama(model.config, params, dtype="float64").forward([0]).dtype == np.float64


def test_weights_of_other_types_are_refused():
    model = Model(Config(2, 1, 1, 1, 2, 1, 2), seed=0)
    params = random(model.config, np.random.default_rng(0), np.int32)
    with pytest.raises(InputError, match=r"embed_VD.*int32"):
        Llama(model.config, params)


def test_damaged_weights_are_told_without_warnings(recwarn):
    model = Model(Config(2, 1, 1, 1, 2, 1, 2), seed=0)
    params = model.params._replace(embed_VD=np.full((2, 2), np.inf, np.float32))
    with pytest.raises(InputError, match="damaged"):
        Llama(model.config, params).generate([0], 1)
    assert not recwarn.list


@given(models())
def test_text_without_a_tokenizer_is_an_error(model):
    with pytest.raises(InputError, match="tokenizer"):
        llama(model).generate("text", 1)


@given(ragged_runs())
def test_forward_takes_lists_ragged_lists_and_arrays(where, drawn):
    model, rows, _ = drawn
    llm = llama(model, where)
    alone = [llm.forward(row)[0] for row in rows]
    together = llm.forward(rows)
    for logits_TV, logits_BTV, row in zip(alone, together, rows, strict=True):
        error = error_of(llm, model, row)
        np.testing.assert_allclose(logits_BTV[: len(row)], logits_TV, rtol=0, atol=error)
    last_B1V = llm.forward(rows, last_only=True)
    assert last_B1V.shape == (len(rows), 1, model.config.vocab_size)
    np.testing.assert_allclose(llm.forward(np.array(rows[0]))[0], alone[0])


class FewerTokens:
    """A tokenizer of fewer tokens than the embedding table has rows."""

    n_vocab = 1
    add_bos = True

    def prompt_ids(self, text):
        return [0, *self.encode(text)]

    def encode(self, text):
        return [0] * len(text)

    def stream(self, prompt_ids):
        return self

    def push(self, id):
        assert id < self.n_vocab
        return "x"

    def flush(self):
        return "."


@given(models(), st.integers(1, 6))
def test_rows_of_a_padded_table_have_no_text(where, model, count):
    (completion,) = llama(model, where, tokenizer=FewerTokens()).generate([0], count)
    assert completion.text == "x" * completion.ids.count(0) + "."


def test_a_tokenizer_of_more_tokens_than_the_table_is_refused():
    model = Model(Config(4, 1, 1, 1, 2, 2, vocab_size=3), seed=0)
    tokenizer = FewerTokens()
    tokenizer.n_vocab = 4
    with pytest.raises(InputError, match="at most 3 tokens"):
        llama(model, tokenizer=tokenizer)


def test_a_text_that_continues_a_cache_gets_no_second_bos():
    llm = llama(Model(Config(2, 1, 1, 1, 2, 1, 2), seed=0), tokenizer=FewerTokens())
    cache = llm.new_cache(1, 20)
    next(llm.stream("ab", 1, cache=cache))
    assert cache.lengths_B.tolist() == [3]
    next(llm.stream("ab", 1, cache=cache))
    assert cache.lengths_B.tolist() == [5]


@given(models(), st.integers(1, 6))
def test_the_stop_id_has_no_text(where, model, count):
    llm = llama(model, where, tokenizer=FewerTokens(), stop_ids=range(model.config.vocab_size))
    (completion,) = llm.generate([0], count)
    assert (len(completion.ids), completion.text) == (1, ".")


# ---- an engine that chooses by itself -----------------------------------------------------------

TOYS = Config(4, 1, 1, 1, 4, 4, 7)


class Toy:
    """A model whose next id follows from a row's last one and how many it had before."""

    def next_of(self, ids_B, lengths_B):
        return (3 * ids_B + lengths_B + np.arange(len(ids_B))) % TOYS.vocab_size

    def forward(self, ids_BT, cache, new_B, last_only):
        cache.lengths_B = cache.lengths_B + new_B
        last_B = ids_BT[np.arange(len(ids_BT)), np.maximum(np.asarray(new_B) - 1, 0)]
        return 5 * np.eye(TOYS.vocab_size)[self.next_of(last_B, cache.lengths_B)][:, None]

    def greedy(self, ids_B, cache, n):
        found = []
        for _ in range(n):
            cache.lengths_B = cache.lengths_B + 1
            ids_B = self.next_of(ids_B, cache.lengths_B)
            found.append(ids_B)
        logprobs_V = np.diag(log_softmax(5 * np.eye(TOYS.vocab_size)))
        return np.array(found), logprobs_V[np.array(found)]

    def sample(self, ids_B, cache, sampling, numbers_B):
        logits_BV = self.forward(ids_B[:, None], cache, np.ones_like(ids_B), True)[:, 0]
        ids_B = [
            draw(all_ids(logits_V, sampling.temperature), sampling, number)
            for logits_V, number in zip(logits_BV, numbers_B, strict=True)
        ]
        return np.array([ids_B]), log_softmax(logits_BV)[np.arange(len(ids_B)), ids_B][None]


@given(
    st.lists(st.lists(st.integers(0, 6), min_size=1, max_size=4), min_size=1, max_size=3),
    st.integers(1, 12),
    st.sets(st.integers(0, 6), max_size=3),
    st.integers(1, 5),
    st.booleans(),
    st.sampled_from([GREEDY, Sampling(1.0, seed=3), Sampling(4.0, 3, 0.9, seed=4)]),
)
def test_what_an_engine_chooses_ahead_is_what_the_host_would(
    prompts, most, stops, ahead, logprobs, sampling
):
    """Token by token, whenever rows stop; and the cache holds what was fed, and no more."""
    toy, runs = Toy(), []
    for chooser in (None, toy):
        cache = new_cache(TOYS, len(prompts), 32)
        steps = generation.generate(
            toy.forward, cache, prompts, most, sampling, stops, logprobs, chooser=chooser,
            ahead=ahead,
        )  # fmt: skip
        runs.append(([*steps], cache.lengths_B.tolist()))
    assert runs[0] == runs[1]


@given(st.integers(1, 12), st.integers(1, 6), st.booleans())
def test_what_was_chosen_ahead_of_a_closed_generator_is_forgotten(seen, ahead, touched):
    """Unless its cache is another's by then."""
    toy, cache = Toy(), new_cache(TOYS, 2, 32)
    steps = generation.generate(
        toy.forward, cache, [[1, 2], [3]], 20, GREEDY, (), chooser=toy, ahead=ahead
    )
    for _ in range(seen):
        next(steps)
    if touched:
        cache.reset()
    steps.close()
    fed = [0, 0] if touched else [2 + seen - 1, 1 + seen - 1]
    assert cache.lengths_B.tolist() == fed


@given(st.integers(1, 5), st.sampled_from([GREEDY, Sampling(1.0, seed=0)]))
def test_an_engine_chooses_only_what_is_asked_for(most, sampling):
    """A stream that is left has fed what its reader has seen, if nothing was to be chosen ahead."""
    cache, asked = new_cache(TOYS, 1, 32), []

    class Asked(Toy):
        def greedy(self, ids_B, cache, n):
            asked.append(n)
            return super().greedy(ids_B, cache, n)

        def sample(self, ids_B, cache, sampling, numbers_B):
            asked.append(len(numbers_B))
            return super().sample(ids_B, cache, sampling, numbers_B)

    steps = generation.generate(
        Toy().forward, cache, [[1, 2]], 20, sampling, (), chooser=Asked(), ahead=1
    )
    for _ in range(most):
        next(steps)
    steps.close()
    assert asked == [1] * (most - 1)
    assert cache.lengths_B.tolist() == [2 + most - 1]


@given(ragged_runs(), st.integers(1, 12), st.integers(2, 5), st.booleans(), st.data())
def test_a_cache_holds_nothing_of_what_was_chosen_ahead_in_vain(
    where, drawn, most, ahead, logprobs, data
):
    """By the engine itself: rows stop in the middle of what was chosen, and streams go on there."""
    model, rows, _ = drawn
    llm, runs = llama(model, where, max_seq_len=32), []
    free = [id for completion in llm.generate(rows, most) for id in completion.ids]
    stops = data.draw(st.lists(st.sampled_from(free), max_size=2))
    for tokens_at_once in (1, ahead):
        cache = llm.new_cache(len(rows))
        options = {"stop_ids": stops, "logprobs": logprobs, "ahead": tokens_at_once}
        tokens = [token for step in llm._tokens(rows, most, cache, **options) for token in step]
        new_ids = [[token.id for token in tokens if token.row == b] for b in range(len(rows))]
        fed = [len(row) + len(ids) - 1 for row, ids in zip(rows, new_ids, strict=True)]
        assert cache.lengths_B.tolist() == fed
        more = [
            list(llm.stream(ids[-1:], 2, cache=cache.fork([b]), logprobs=logprobs))
            for b, ids in enumerate(new_ids)
        ]
        runs.append((tokens, more))
    assert runs[0] == runs[1]
    assert [completion.ids for completion in llm.generate(rows, most, stop_ids=stops)] == new_ids

"""How fast a model runs here, and what share that is of what the machine can do.

Decoding a token is reading every matrix once, and the keys and values so far; so its limit is the
bandwidth of memory. Prefill is multiplying, and its limit is the rate of float32 products. Speed
and limits are measured in turns, round by round, and each round's speed is divided by the limits
of that round; what is reported are medians over the rounds. The limits are machine.py's.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import numpy as np

from llama3np import machine
from llama3np.backend import free_memory
from llama3np.cost import prefill_flops
from llama3np.errors import InputError
from llama3np.llm import Llama
from llama3np.model import Ops
from llama3np.params import Params, named

PROMPT_TOKENS, NEW_TOKENS, ROUNDS = 512, 64, 7
PHASES = ("q, k, v", "attention", "wo", "gate, up", "down")  # of a layer: kernels/cpu/step.py

# progress(done, total, what): told as the work goes on
Progress = Callable[[int, int, str], None]

# ---- what is to be measured --------------------------------------------------------------------


class Plan(NamedTuple):
    """The work of a round; every row of the batch does it."""

    prompt_tokens: int
    new_tokens: int
    batch: int
    context: int  # tokens in the cache before the first new one
    rounds: int


def plan(
    room: int,
    prompt_tokens: int | None = None,
    new_tokens: int | None = None,
    batch: int = 1,
    context: int | None = None,
    rounds: int = ROUNDS,
) -> Plan:
    """A plan for a model of `room` positions. What is None is the usual number, or what fits.

    context: as many as the prompt has, if None. Raises InputError, naming the option, for a number
    below 1 and for more than fit.
    """
    if room < 3:
        raise InputError(f"bench: expected a context of at least 3 tokens, found {room}")
    # One place stays free: the last new token is chosen, but not fed.
    new = min(NEW_TOKENS, max(1, room // 4)) if new_tokens is None else new_tokens
    prompt = min(PROMPT_TOKENS, room - 1) if prompt_tokens is None else prompt_tokens
    before = min(prompt, room - new - 1) if context is None else context
    _check("batch", batch)
    _check("rounds", rounds)
    _check("new-tokens", new, room - 2, room)
    _check("prompt-tokens", prompt, room - 1, room)
    _check("context", before, room - new - 1, room)
    return Plan(prompt, new, batch, before, rounds)


def _check(option: str, count: int, most: int | None = None, room: int = 0) -> None:
    if count < 1:
        raise InputError(f"--{option}: expected a number of 1 or more, found {count}")
    if most is not None and count > most:
        raise InputError(
            f"--{option}: expected at most {most} (of a context of {room} tokens), found {count}"
        )


# ---- what the work comes to --------------------------------------------------------------------


def matrix_bytes(params: Params, tied: bool) -> int:
    """Bytes, as they are stored, of all matrices that a token is multiplied by.

    The embedding table is among them only if it is the head as well; else a row of it is looked up.
    """
    return sum(
        w.nbytes
        for name, w in named(params, tied).items()
        if len(w.shape) == 2 and (tied or name != "embed_VD")
    )


def kept_bytes(llm: Llama, plan: Plan) -> float:
    """Bytes of keys and values that a decode step reads, the mean over the new tokens of a round.

    A step reads those of the tokens before its own: `context` of them in the first step of a round
    and context + new_tokens - 1 in the last.
    """
    before = plan.context + (plan.new_tokens - 1) / 2
    return plan.batch * before * llm.new_cache(1, 1).nbytes


def prompt_ids(count: int, vocab_size: int) -> list[int]:
    """Token ids that are the same in every process, with no order in them."""
    return np.random.default_rng(0).integers(0, vocab_size, count).tolist()


class Work:
    """A model and a plan: what is run, with its keys and values."""

    def __init__(self, llm: Llama, plan: Plan):
        self.llm, self.plan = llm, plan
        _check_memory(llm, plan)
        self._prompt, self._before = (
            prompt_ids(count, llm.config.vocab_size) for count in (plan.prompt_tokens, plan.context)
        )
        self._cache = llm.new_cache(plan.batch, plan.context + plan.new_tokens + 1)

    def first_pass(self) -> None:
        """A little of everything, so that what is done once is done: pages read, code compiled."""
        self.fill()
        self.prefill()
        self.decode(1)

    def fill(self) -> None:
        """Put `context` tokens into the cache that decoding goes on from."""
        self._run(self._cache.reset(), self._before, 1)

    def prefill(self) -> None:
        """From the prompt to the first new token, with a cache of its own."""
        self._run(self.llm.new_cache(self.plan.batch, self.plan.prompt_tokens + 1), self._prompt, 1)

    def decode(self, new_tokens: int) -> None:
        """So many steps of one token for each row; after them the cache is as it was."""
        self._run(self._cache, self._before[-1:], new_tokens)
        self._cache.trim(self.plan.context)

    def steps(self, new_tokens: int) -> Iterator[None]:
        """As `decode`, coming back after each step."""
        yield from self._tokens(self._cache, self._before[-1:], new_tokens)
        self._cache.trim(self.plan.context)

    def _run(self, cache: Any, ids: Sequence[int], new_tokens: int) -> None:
        for _ in self._tokens(cache, ids, new_tokens):
            pass

    def _tokens(self, cache: Any, ids: Sequence[int], new_tokens: int) -> Iterator[Any]:
        batch = [list(ids)] * self.plan.batch
        return self.llm._tokens(batch, new_tokens, cache, stop_ids=())


def _check_memory(llm: Llama, plan: Plan) -> None:
    slots = plan.batch * (plan.context + plan.new_tokens + plan.prompt_tokens + 2)
    on_cpu = llm.device.kind == "cpu"
    free = machine.available() if on_cpu else free_memory(llm.device)[0]
    needed = slots * llm.new_cache(1, 1).nbytes
    if free is not None and needed > free:
        raise InputError(
            f"bench: keys and values for --batch {plan.batch}, --context {plan.context} and "
            f"--prompt-tokens {plan.prompt_tokens} take {needed / 1e9:.1f} GB, but only "
            f"{free / 1e9:.1f} GB of memory are free"
        )


# ---- measuring ---------------------------------------------------------------------------------


class Round(NamedTuple):
    """What one round took, and the limits in it."""

    prefill_s: float
    decode_s: float
    read_gb_s: float
    sgemm_gflop_s: float


def measure(llm: Llama, plan: Plan, progress: Progress | None = None) -> dict[str, Any]:
    """Everything that `llama3np bench --json` prints of one model but how it was loaded.

    Raises InputError if keys and values do not fit into memory.
    """
    tell = progress or (lambda done, total, what: None)
    work, elsewhere = Work(llm, plan), machine.Elsewhere()
    tell(0, plan.rounds + 1, "first pass")
    with machine.Peak() as peak:
        warm_s = machine.seconds(work.first_pass)
    held = {"peak_anon": peak.nbytes, "peak_resident": machine.resident("VmHWM")}
    limits = limits_of(llm)  # after the peak: the memory it reads is not the model's
    rounds = []
    for i in range(plan.rounds):
        tell(i + 1, plan.rounds + 1, f"round {i + 1} of {plan.rounds}")
        rounds.append(one_round(work, limits))
    return {
        **about(llm, plan),
        **summary(llm, plan, rounds),
        "first_pass_s": warm_s,
        "memory": held,
        "other_processes_cores": elsewhere.cores(),
    }


def limits_of(llm: Llama) -> Any:
    """The limits of what the model computes on: machine.Limits, or a device's, which has the same.

    The models' own threads are measured, as many as the engine has.
    """
    if llm.device.kind == "cpu":
        return machine.Limits(llm.engine.pool)
    from llama3np.kernels.cuda.limits import DeviceLimits

    return DeviceLimits(llm.device)


def one_round(work: Work, limits: Any) -> Round:
    """Each kind of work next to its limit; memory is read on both sides of the longer decoding."""
    multiplied = limits.sgemm_gflop_s()
    prefill_s = machine.seconds(work.prefill)
    before = limits.read_gb_s()
    decode_s = machine.seconds(lambda: work.decode(work.plan.new_tokens))
    return Round(prefill_s, decode_s, (before + limits.read_gb_s()) / 2, multiplied)


def about(llm: Llama, plan: Plan) -> dict[str, Any]:
    """What was measured, with what, and where."""
    return {
        "structure": repr(llm),
        "vocab_size": llm.config.vocab_size,
        "engine": llm.engine.name,
        "device": str(llm.device),
        "threads": llm.engine.pool.threads if llm.device.kind == "cpu" else None,
        "dtype": llm.profile.name,
        "kv_dtype": str(llm.new_cache(1, 1).k[0].dtype),
        "batch": plan.batch,
        "context": plan.context,
        "rounds": plan.rounds,
        "versions": machine.versions(),
        "processor": machine.processor(),
        **({} if llm.device.kind == "cpu" else {"gpu": gpu(llm)}),
    }


def gpu(llm: Llama) -> dict[str, Any]:
    """The CUDA device of a model."""
    from llama3np.kernels.cuda.limits import describe

    return describe(llm.device)


def summary(llm: Llama, plan: Plan, rounds: Sequence[Round]) -> dict[str, Any]:
    """Medians, ranges and samples of the rounds, and their shares of each round's own limits."""
    flops = plan.batch * prefill_flops(llm.config, plan.prompt_tokens)
    nbytes = matrix_bytes(llm.params, llm.config.tied) + kept_bytes(llm, plan)
    prefilled, decoded = plan.batch * plan.prompt_tokens, plan.batch * plan.new_tokens
    multiplied = [flops / r.prefill_s / 1e9 / r.sgemm_gflop_s for r in rounds]
    read = [plan.new_tokens * nbytes / r.decode_s / 1e9 / r.read_gb_s for r in rounds]
    return {
        **spread("read_limit_gb_s", [r.read_gb_s for r in rounds]),
        **spread("sgemm_gflop_s", [r.sgemm_gflop_s for r in rounds]),
        "time_to_first_token_s": median(r.prefill_s for r in rounds),
        "prefill": {
            "tokens": plan.prompt_tokens,
            "flops": flops,
            **spread("tokens_per_s", [prefilled / r.prefill_s for r in rounds]),
            **spread("share_of_limit", multiplied),
            "samples": [prefilled / r.prefill_s for r in rounds],
            "share_samples": multiplied,
        },
        "decode": {
            "tokens": plan.new_tokens,
            "bytes_per_step": nbytes,
            **spread("tokens_per_s", [decoded / r.decode_s for r in rounds]),
            **spread("share_of_limit", read),
            "samples": [decoded / r.decode_s for r in rounds],
            "share_samples": read,
        },
    }


def spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    """The median under a name, and beside it the smallest and the largest value."""
    return {name: median(values), f"{name}_range": [min(values), max(values)]}


# ---- where the time goes -----------------------------------------------------------------------


def profile_ops(llm: Llama, plan: Plan) -> dict[str, Any]:
    """Seconds of a prefill and of a decode step by their parts; `other` is what no part has.

    A product is named by its weight. A compiled decode step tells its own phases in place of the
    five operations. attention_share_of_limit: the keys and values that a step reads, over the
    seconds of its attention, as a share of the bandwidth measured in the same round; left out
    where nothing tells those seconds. Raises InputError for a model on a CUDA device, where an
    operation has only been handed over when it returns.
    """
    if llm.device.kind != "cpu":
        raise InputError(f"--profile-ops: expected --device cpu, found {llm.device}")
    work, limits = Work(llm, plan), limits_of(llm)
    work.first_pass()
    reads, prefills, decodes = [], [], []
    for _ in range(plan.rounds):
        prefills.append(_prefill_seconds(work))
        before = limits.read_gb_s()
        decodes.append(_decode_seconds(work))
        reads.append((before + limits.read_gb_s()) / 2)
    kept = kept_bytes(llm, plan) / 1e9
    parts = {"prefill": _medians(prefills), "decode": _medians(decodes)}
    if "attention" not in parts["decode"]:
        return parts
    shares = [kept / each["attention"] / read for each, read in zip(decodes, reads, strict=True)]
    return {
        **parts,
        **spread("attention_share_of_limit", shares),
        "attention_share_samples": shares,
    }


def _prefill_seconds(work: Work) -> dict[str, float]:
    with _timed_ops(work.llm) as spent:
        whole = machine.seconds(work.prefill)
    return {**spent, "other": whole - sum(spent.values())}


def _decode_seconds(work: Work) -> dict[str, float]:
    """The mean over new_tokens steps."""
    start = perf_counter()
    with _timed_ops(work.llm) as spent:
        # What computes without a compiled step has no phases to tell of.
        told = getattr(work.llm.engine, "phase_ticks", lambda: None)
        ticks = [told() for _ in work.steps(work.plan.new_tokens)]
    whole = perf_counter() - start
    parts = spent if any(t is None for t in ticks) else phase_seconds(whole, np.array(ticks))
    mean = {name: took / work.plan.new_tokens for name, took in parts.items()}
    return {**mean, "other": whole / work.plan.new_tokens - sum(mean.values())}


def phase_seconds(whole: float, ticks_SP: np.ndarray) -> dict[str, float]:
    """Seconds of each phase, all layers and S steps together, which took `whole` seconds.

    ticks_SP: the processor's clock at the beginning of a step and at the end of each of its
    phases: PHASES of every layer, and then the logits. How long a tick is, is told by the first
    and the last one, which are `whole` seconds apart but for some microseconds.
    """
    tick_s = whole / (ticks_SP[-1, -1] - ticks_SP[0, 0])
    spans_SP = tick_s * np.diff(ticks_SP, axis=1)
    of_layers_SLP = spans_SP[:, :-1].reshape(len(ticks_SP), -1, len(PHASES))
    sums = map(float, (*of_layers_SLP.sum(axis=(0, 1)), spans_SP[:, -1].sum()))
    return dict(zip((*PHASES, "logits"), sums, strict=True))


def _medians(rounds: Sequence[dict[str, float]]) -> dict[str, float]:
    return {name: median(parts[name] for parts in rounds) for name in rounds[0]}


@contextmanager
def _timed_ops(llm: Llama) -> Iterator[dict[str, float]]:
    """Let the engine's operations add up their seconds while the block runs."""
    spent: dict[str, float] = defaultdict(float)
    plain = llm.engine.ops
    llm.engine.ops = timed_ops(plain, weight_names(llm.params), spent)
    try:
        yield spent
    finally:
        llm.engine.ops = plain


def timed_ops(ops: Ops, names: dict[int, str], spent: dict[str, float]) -> Ops:
    """The same operations, which add their seconds to spent[name]; names are weight_names."""

    def timed(name_of: Callable[..., str], op: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **options: Any) -> Any:
            start = perf_counter()
            result = op(*args, **options)
            spent[name_of(*args)] += perf_counter() - start
            return result

        return run

    named_ops = {name: timed(lambda *_, name=name: name, op) for name, op in ops._asdict().items()}
    named_ops["linear"] = timed(lambda x_BTD, w: names[id(w)], ops.linear)
    return Ops(**named_ops)


def weight_names(params: Params) -> dict[int, str]:
    """What each matrix is called in every layer, by the identity of the object."""
    layers = {id(w): name for layer in params.layers for name, w in layer._asdict().items()}
    return layers | {id(params.head_VD): "head_VD"}

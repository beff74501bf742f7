"""backend.py: which device, and what is said where it cannot be used."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

import llama3np
from llama3np import backend
from llama3np import cache as cache_module
from llama3np.cache import new_cache
from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.kernels.engine import engine_class

PIP = r'pip install "llama3np\[cuda13\]"'


def python(code, **env):
    return subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | env,
    )


# ---- names --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cpu", ("cpu", 0)),
        ("cuda", ("cuda", 0)),
        ("cuda:0", ("cuda", 0)),
        ("cuda:12", ("cuda", 12)),
    ],
)
def test_names_of_devices(name, expected):
    assert backend.parse_device(name) == expected


@given(st.text(max_size=8).filter(lambda name: not name.startswith(("cpu", "cuda"))))
@example("cuda:")
@example("cuda:-1")
@example("cuda:x")
@example("cuda:0 ")
@example("cuda:1\n")
@example("cpu:1")
def test_any_other_name_is_refused_in_a_sentence(name):
    with pytest.raises(InputError) as raised:
        backend.parse_device(name)
    assert str(raised.value) == f"device: expected cpu, cuda or cuda:N, found {name!r}"


@pytest.mark.parametrize("name", [None, 0, "cuda:٣"])
def test_what_is_no_name_is_refused(name):
    with pytest.raises(InputError, match="device: expected cpu, cuda or cuda:N"):
        backend.parse_device(name)


def test_a_wrong_device_is_told_before_any_file_is_looked_for():
    with pytest.raises(InputError, match="device: expected cpu, cuda or cuda:N, found 'tpu'"):
        llama3np.load("/nowhere", device="tpu")


# ---- without CuPy, without a GPU ----------------------------------------------------------------


def test_importing_the_package_and_its_commands_imports_no_cupy():
    code = (
        "import sys, llama3np, llama3np.llm, llama3np.bench, llama3np.verify, llama3np.fit\n"
        "import llama3np.cli, llama3np.cli.generate, llama3np.cli.selftest, llama3np.selftest\n"
        "assert not [m for m in sys.modules if m.partition('.')[0].startswith('cupy')]"
    )
    assert python(code).stderr == ""


GENERATE = (
    "\nimport sys; from llama3np.cli import main\n"
    "sys.exit(main(['generate', '/nowhere', 'x', '--device', 'cuda']))"
)


def test_without_cupy_the_sentence_has_the_command():
    run = python("import sys; sys.modules['cupy'] = None" + GENERATE)
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert 'pip install "llama3np[cuda13]"' in run.stderr


def test_without_a_gpu_the_sentence_says_so_before_any_file_is_looked_for():
    pytest.importorskip("cupy")
    run = python(GENERATE, CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 2
    assert run.stderr == (
        "llama3np: device: CuPy finds no CUDA driver or no GPU (nvidia-smi shows what there is), "
        'which it needs beside pip install "llama3np[cuda13]" ("llama3np[cuda12]" for drivers '
        "below 580); --device cpu computes without\n"
    )


def test_a_driver_that_is_too_old_is_told_with_the_other_package():
    """CuPy says no more of it than that there is no device."""
    pytest.importorskip("cupy")
    old = "import cupy; cupy.cuda.runtime.driverGetVersion = lambda: 12040"
    run = python(old + GENERATE, CUDA_VISIBLE_DEVICES="")
    assert run.returncode == 2
    assert run.stderr == (
        "llama3np: device: the driver knows CUDA 12.4 and this CuPy needs 13: a newer driver, or "
        'pip install "llama3np[cuda12]" for drivers below 580; --device cpu computes without\n'
    )


@pytest.mark.parametrize(
    ("part", "error"),
    [
        ("the compiler", RuntimeError("Failure finding libnvrtc.so")),
        ("headers", RuntimeError("Failed to find CUDA headers\nin any place")),
        ("cuBLAS", ImportError('Failure finding "libcublasLt.so.13"')),
    ],
)
def test_a_missing_part_of_the_toolkit_is_told_with_the_command(softcuda, monkeypatch, part, error):
    import cupy

    def missing(*_):
        raise error

    if part == "cuBLAS":
        monkeypatch.setattr(backend, "to_host", missing)  # where the product would be seen
    else:
        monkeypatch.setattr(cupy, "zeros", missing)
    said = " ".join(str(error).split())
    with pytest.raises(InputError, match=PIP) as raised:
        backend.use(backend.Device("cuda"))
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_number_that_no_gpu_has_is_refused(softcuda):
    with pytest.raises(InputError, match=r"device: expected cuda:0 \(there are 1\), found cuda:7"):
        backend.use(backend.parse_device("cuda:7"))


# ---- arrays -------------------------------------------------------------------------------------


@pytest.mark.gpu
def test_to_host_gives_the_numbers_of_either_module():
    import cupy

    ours = np.arange(6.0).reshape(2, 3)
    assert backend.to_host(ours) is ours
    np.testing.assert_array_equal(backend.to_host(cupy.asarray(ours)), ours)


@pytest.mark.gpu
def test_device_ids_are_checked_on_the_host_too():
    import cupy

    np.testing.assert_array_equal(backend.host_ids(cupy.asarray([[1, 2]]), 3), [[1, 2]])
    with pytest.raises(InputError, match="expected 0 <= id < 3"):
        backend.host_ids(cupy.asarray([[1, 3]]), 3)


def test_a_cache_is_copied_and_looked_for_where_it_lies(softcuda, monkeypatch):
    """Of two devices: the current one is 0, as the software has one, and the cache's another."""
    import cupy

    config = Config(8, 1, 2, 1, 4, 16, 9)
    cache, made = new_cache(config, 1, 4, xp=cupy), []
    monkeypatch.setattr(cache_module, "on", noting(made))
    cache.fork()
    assert made == [backend.Device("cuda", 0)]
    monkeypatch.setattr(cache_module, "current", lambda xp: backend.Device("cuda", 1))
    with pytest.raises(InputError, match="one that lies on cuda:1, found one on cuda:0"):
        cache.check(config, "float32", cupy)


def noting(made):
    """backend.on that notes what it was called with."""
    real = backend.on

    def on(device):
        made.append(device)
        return real(device)

    return on


# ---- engines ------------------------------------------------------------------------------------


def test_each_device_has_its_own_engines():
    with pytest.raises(
        InputError, match=r"expected one of numpy, numba \(on the cpu\), found 'cupy'"
    ):
        engine_class("cupy")
    with pytest.raises(InputError, match=r"expected one of cupy, cuda \(on cuda\), found 'numba'"):
        engine_class("numba", backend.Device("cuda"))

"""Hypothesis profiles, array modules, and what a report says at its head and at its end."""

import contextlib
import importlib.util
import os
import signal
import sys
from collections import Counter

import devices
import numpy as np
import paths
import pytest
from hypothesis import HealthCheck, settings

import llama3np

# No deadline: the first call of a test compiles and imports, and machines are shared.
settings.register_profile(
    "local",
    deadline=None,
    max_examples=50,
    stateful_step_count=20,
    print_blob=True,
    suppress_health_check=[HealthCheck.too_slow],
)
# A server repeats the same examples, so that a red build is the fault of its change.
settings.register_profile("ci", settings.get_profile("local"), derandomize=True)
# To hunt: pytest --hypothesis-profile=thorough.
settings.register_profile("thorough", settings.get_profile("local"), max_examples=1000)
# For `make fuzz`: the spoiled files of tests/test_fuzz.py, a few thousand for each format.
settings.register_profile("fuzz", settings.get_profile("local"), max_examples=2000, database=None)
chosen = os.environ.get("HYPOTHESIS_PROFILE", "ci" if os.environ.get("CI") else "local")
settings.load_profile(chosen)

# A test that takes a tenth of a millisecond on NumPy takes 30 of them on the software device, and
# CuPy compiles a kernel for each new combination of dtypes and axes: fewer examples there.
SHARE_ON_CUPY = 8


# ---- array modules ------------------------------------------------------------------------------


def pytest_configure(config):
    """Before any test module can import cupy: it must find the software device."""
    devices.start(devices.wants_gpu(config.getoption("markexpr")))


def pytest_report_header():
    return devices.describe()


def pytest_generate_tests(metafunc):
    """Run each test that takes `xp` on NumPy and on CuPy, and one that takes `where` at each.

    Parameters and not a fixture, because hypothesis refuses function-scoped fixtures.
    """
    if "xp" in metafunc.fixturenames:
        on_cupy = pytest.param(devices.cupy, id="cupy", marks=devices.MARKS)
        metafunc.parametrize("xp", [pytest.param(np, id="numpy"), on_cupy])
    if "where" in metafunc.fixturenames:
        metafunc.parametrize("where", devices.PLACES)


def pytest_collection_modifyitems(items):
    """Give the mark cuda to all that needs CuPy, and skip it where there is none."""
    for item in items:
        if "softcuda" in getattr(item, "fixturenames", ()) or item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.cuda)
        if item.get_closest_marker("cuda") and devices.missing is not None:
            item.add_marker(pytest.mark.skip(reason=devices.missing))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    """Start every test on CuPy with a fresh device."""
    if item.get_closest_marker("cuda") and devices.kind == devices.SOFT and not devices.missing:
        refresh()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    """Draw fewer examples for a test on CuPy."""
    if not item.get_closest_marker("cuda"):
        return (yield)
    with fewer_examples(item):
        return (yield)


@contextlib.contextmanager
def fewer_examples(item):
    """Set the number of examples of one half of a test: hypothesis has no public way to."""
    attribute = "_hypothesis_internal_use_settings"
    if (whole := getattr(item.obj, attribute, None)) is None:
        yield
        return
    fewer = settings(whole, max_examples=max(1, whole.max_examples // SHARE_ON_CUPY))
    test = getattr(item.obj, "__func__", item.obj)
    setattr(test, attribute, fewer)
    try:
        yield
    finally:
        setattr(test, attribute, whole)


def refresh():
    """The software device as after its installation, and its counters at 0."""
    import softcuda

    softcuda.config(**softcuda.DEFAULTS)
    softcuda.reset()


@pytest.fixture
def softcuda():
    """The software device, for tests of counts, memory and streams; skipped on a real GPU."""
    if devices.kind == devices.GPU:
        pytest.skip("counts and checks are those of the software device")
    import softcuda

    return softcuda


@pytest.fixture
def checked(softcuda):
    """The software device at its strictest: NVRTC's PTX, and every array its own allocation."""
    if not softcuda.has_nvrtc():
        pytest.skip("NVRTC is not installed (pip install -e '.[test-cuda]')")
    chosen, pooled = softcuda.executor, devices.cupy.cuda.get_allocator()
    softcuda.executor = "ptx"
    devices.cupy.cuda.set_allocator(None)
    yield softcuda
    devices.cupy.cuda.set_allocator(pooled)
    softcuda.executor = chosen


@pytest.fixture(scope="module")
def signals_heeded():
    """Signals that a shell had ignored when it began the tests (nohup, `&`) do what they do.

    For tests that send some: processes they start inherit what is ignored. A module's, because
    hypothesis refuses fixtures of a function.
    """
    usual = {"SIGINT": signal.default_int_handler, "SIGTERM": signal.SIG_DFL}
    usual["SIGHUP"] = signal.SIG_DFL
    numbers = {getattr(signal, name): usual[name] for name in usual if hasattr(signal, name)}
    ignored = [number for number in numbers if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, numbers[number])
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


@pytest.fixture(scope="session")
def compiled_kernels():
    """The compiled kernels of the models that commands run: a process that compiles says so."""
    if importlib.util.find_spec("numba") is None:
        return
    for path in (paths.EMBEDDED, *paths.found_smollm2()):
        llm = llama3np.load(path)
        for length in (1, 9, 40):
            llm.generate([[10] * length], 2, temperature=1.0, seed=0, logprobs=True)


# ---- what was skipped ---------------------------------------------------------------------------


def pytest_terminal_summary(terminalreporter):
    if fuzz := sys.modules.get("test_fuzz"):
        told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(fuzz.COUNTS.items()))
        terminalreporter.write_line(f"spoiled files: {fuzz.COUNTS.total()} ({told})")
    tell_what_no_gpu_ran(terminalreporter)
    reports = terminalreporter.stats.get("skipped", [])
    if not reports:
        return
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in reports)
    told = "; ".join(f"{count} because {reason}" for reason, count in reasons.most_common())
    terminalreporter.write_line(f"skipped tests: {len(reports)} ({told})")


def tell_what_no_gpu_ran(terminalreporter):
    """One line: how many tests marked gpu had no GPU, and how many of them ran in software."""
    marked = Counter(
        outcome
        for outcome in ("passed", "failed", "skipped")
        for report in terminalreporter.stats.get(outcome, [])
        if "gpu" in report.keywords
    )
    if not marked or (devices.kind == devices.GPU and devices.missing is None):
        return
    ran = marked["passed"] + marked["failed"]
    if fallbacks := sys.modules.get("softcuda") and sys.modules["softcuda"].fallbacks:
        names = ", ".join(name for names, _ in fallbacks for name in names)
        terminalreporter.write_line(f"kernels whose PTX is not known, run as source: {names}")
    terminalreporter.write_line(
        f"gpu tests: {marked.total()} not run on a GPU, for want of one; {ran} of them ran on the "
        "software device (pytest -m gpu runs them where there is a GPU)"
    )

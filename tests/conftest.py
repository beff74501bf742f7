"""Hypothesis profiles, and one line at the end that says what was skipped and why."""

import os
import sys
from collections import Counter

import paths
import pytest
from hypothesis import HealthCheck, settings

sys.path.insert(0, str(paths.SHARED / "softcuda"))
try:  # here, so that no test module has imported cupy before
    import softcuda

    softcuda.install()
except Exception as error:
    softcuda, WHY = None, f"no software CUDA device: {error}"


@pytest.fixture
def device():
    """The software CUDA device: counters at zero, its plainest settings."""
    if softcuda is None:
        pytest.skip(WHY)
    import cupy

    softcuda.config(guard=False, deferred=False, trace=False, sched=0)
    cupy.cuda.Device().synchronize()
    softcuda.reset()
    yield softcuda
    softcuda.config(guard=False, deferred=False, trace=False, sched=0)


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


def pytest_terminal_summary(terminalreporter):
    if fuzz := sys.modules.get("test_fuzz"):
        told = ", ".join(f"{count} {outcome}" for outcome, count in sorted(fuzz.COUNTS.items()))
        terminalreporter.write_line(f"spoiled files: {fuzz.COUNTS.total()} ({told})")
    reports = terminalreporter.stats.get("skipped", [])
    if not reports:
        return
    reasons = Counter(str(report.longrepr[2]).removeprefix("Skipped: ") for report in reports)
    told = "; ".join(f"{count} because {reason}" for reason, count in reasons.most_common())
    terminalreporter.write_line(f"skipped tests: {len(reports)} ({told})")

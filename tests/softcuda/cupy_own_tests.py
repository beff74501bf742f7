"""Run CuPy's own tests on the software device: how far it can be believed.

    git clone --depth 1 --branch v14.2.0 https://github.com/cupy/cupy     (the wheel has no tests)
    python tests/softcuda/cupy_own_tests.py cupy [AREA ...]

Each area is a process of its own, stopped after SECONDS_OF_AN_AREA (3600). A test that did not run,
or that fails and is not in cupy_own_failures.txt, where each line is a pattern of test names and
the reason, makes the exit status 1.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections import Counter
from fnmatch import fnmatchcase
from pathlib import Path

HERE = Path(__file__).resolve().parent
FAILURES = HERE / "cupy_own_failures.txt"
AREAS = {
    "bfloat16": ["core_tests/test_bfloat16.py"],
    "indexing": ["core_tests/test_ndarray_indexing.py", "indexing_tests/test_indexing.py"],
    "matmul": ["math_tests/test_matmul.py"],
    "product": ["linalg_tests/test_product.py"],
    "elementwise": ["core_tests/test_elementwise.py"],
    "user kernels": ["core_tests/test_userkernel.py"],
    "raw kernels": ["core_tests/test_raw.py"],
}
# Arrays of gigabytes; strides that only a real cuBLAS can be wrong about take minutes in NumPy.
DESELECTED = {"matmul": "not Large and not Overflow and not Strides"}


class Recorder:
    """A pytest plugin that writes down, one line each, how many tests there are and how they end.

    At once, so that what ran is known of an area that is stopped.
    """

    def __init__(self, path):
        self.path = path

    def write(self, value):
        with self.path.open("a", encoding="utf-8") as file:
            print(json.dumps(value), file=file)

    def pytest_collection_finish(self, session):
        self.write(len(session.items))

    def pytest_runtest_logreport(self, report):
        if report.when == "call" or report.outcome != "passed":
            crash = getattr(report.longrepr, "reprcrash", None)
            said = crash.message.splitlines()[0] if crash else ""
            self.write((report.nodeid, report.outcome, said))


def child(record, arguments):
    """In a process of its own: install the device, then let pytest import cupy."""
    sys.path.insert(0, str(HERE.parent))
    import softcuda

    softcuda.install()
    import pytest

    return pytest.main(["-q", "-p", "no:cacheprovider", *arguments], [Recorder(Path(record))])


def outcomes_of(area, source, seconds):
    """{test: (outcome, first line of what was said)} of one area, and how many did not run."""
    files = [str(source / "tests" / "cupy_tests" / name) for name in AREAS[area]]
    chosen = ["-k", DESELECTED[area]] if area in DESELECTED else []
    with tempfile.TemporaryDirectory() as folder:
        record = Path(folder) / "outcomes.json"
        command = [sys.executable, __file__, "--child", str(record), *files, *chosen]
        log = Path(tempfile.gettempdir()) / f"cupy-own-{area.replace(' ', '-')}.log"
        with log.open("w", encoding="utf-8") as out, contextlib.suppress(subprocess.TimeoutExpired):
            subprocess.run(
                command, cwd=source, stdout=out, stderr=out, timeout=seconds, check=False
            )
        if not record.exists():
            raise SystemExit(f"{area}: the tests broke off; see {log}")
        lines = record.read_text(encoding="utf-8").splitlines()
    planned, *ended = (json.loads(line) for line in lines)
    outcomes = {test: (outcome, said) for test, outcome, said in ended}
    return outcomes, planned - len(outcomes)


def known_failures():
    """[(pattern, reason)] of tests that are known not to pass."""
    lines = FAILURES.read_text(encoding="utf-8").splitlines()
    rows = (line.split("  ", 1) for line in lines if line and not line.startswith("#"))
    return [(pattern, reason.strip()) for pattern, reason in rows]


def report(area, known, outcomes, left):
    """Print the area's counts and surprises; return how many failures nobody knows of.

    left: tests that did not run, because the area took too long or its process ended.
    """
    counts = Counter(outcome for outcome, _ in outcomes.values())
    told = ", ".join(f"{counts[kind]} {kind}" for kind in ("passed", "failed", "skipped"))
    print(f"{area}: {told}" + (f", {left} not run" if left else ""), flush=True)
    surprises = left
    for test, (outcome, said) in outcomes.items():
        name = test.rpartition("cupy_tests/")[2]
        if outcome == "failed" and not any(fnmatchcase(name, pattern) for pattern, _ in known):
            print(f"    failed: {name}\n        {said[:200]}")
            surprises += 1
    return surprises


def main(arguments):
    """Run the areas that are named, or all."""
    if arguments and arguments[0] == "--child":
        return child(arguments[1], arguments[2:])
    if not arguments or not (Path(arguments[0]) / "tests" / "cupy_tests").is_dir():
        raise SystemExit(__doc__)
    known, source = known_failures(), Path(arguments[0]).resolve()
    seconds = float(os.environ.get("SECONDS_OF_AN_AREA", "3600"))
    areas = arguments[1:] or AREAS
    return min(1, sum(report(area, known, *outcomes_of(area, source, seconds)) for area in areas))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))

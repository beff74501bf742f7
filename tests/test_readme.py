"""What the README shows is what happens."""

import json
import re
import shlex
import subprocess
import sys

import paths
import pytest

README = (paths.GOLDENS.parents[1] / "README.md").read_text(encoding="utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.S)
SHOWN = re.findall(r"^\$ llama3np (.*)\n(.*)$", README, re.M)
MADE = re.compile(r"^\.venv/bin/llama3np ([^\n]*)\n(.*?)```", re.M | re.S)
COMMAND = [sys.executable, "-c", "import sys; from llama3np.cli import main; sys.exit(main())"]


def output(command):
    run = subprocess.run(command, capture_output=True, text=True, encoding="utf-8", check=True)
    return run.stdout


@pytest.mark.parametrize("code", SNIPPETS)
def test_python_snippets_run(code):
    paths.smollm2_gguf()
    assert output([sys.executable, "-c", code]).startswith(" a fundamental concept in physics")


@pytest.mark.parametrize(("arguments", "shown"), SHOWN)
def test_commands_print_what_is_shown(arguments, shown):
    paths.smollm2_gguf()
    printed = output([*COMMAND, *shlex.split(arguments)])
    if shown.startswith("{"):
        given = json.loads(printed)
        expected = json.loads(shown.replace("{...}", "{}"))
        assert list(given) == list(expected)
        printed, shown = {**given, "timings": {}}, expected
    else:
        printed = printed.rstrip("\n")
    assert printed == shown


def test_make_run_prints_what_is_shown():
    paths.smollm2_gguf()
    arguments, shown = MADE.search(README).groups()
    assert output([*COMMAND, *shlex.split(arguments)]) == shown


def test_there_is_something_to_check():
    assert len(SNIPPETS) >= 1
    assert len(SHOWN) >= 2

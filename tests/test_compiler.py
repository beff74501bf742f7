"""Where compiled kernels are kept, and what happens where they cannot be."""

import importlib.util
import os
import shutil
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from llama3np.kernels.cpu import compiler


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A cache folder of the test's own, and no memory of what was said before."""
    monkeypatch.setattr(compiler, "CACHE", tmp_path / "kernels")
    compiler.warn_once.cache_clear()
    return tmp_path / "kernels"


def compiled(tmp_path):
    """A function of a file of its own, as a new process would have it."""
    source = tmp_path / "doubling.py"
    if not source.exists():
        source.write_text("def double(x):\n    return 2 * x\n", encoding="utf-8")
    spec = importlib.util.spec_from_file_location("doubling", source)
    module = importlib.util.module_from_spec(spec)
    sys.modules["doubling"] = module  # numba looks there for what it read from a file
    spec.loader.exec_module(module)
    return compiler.jit(module.double)


def test_a_kernel_is_compiled_once_and_that_is_said_once(folder, tmp_path, caplog):
    assert compiled(tmp_path)(21) == 42
    assert compiled(tmp_path)(1.5) == 3.0  # another type: compiled too, and not said again
    said = [record.message for record in caplog.records if "compiling" in record.message]
    assert len(said) == 1
    assert str(folder) in said[0]
    caplog.clear()
    compiler.warn_once.cache_clear()
    kept = compiled(tmp_path)
    assert kept(21) == 42
    assert sum(kept.stats.cache_hits.values()) == 1
    assert not caplog.records


@pytest.mark.parametrize("kind", ["*.nbi", "*.nbc"])
@pytest.mark.parametrize("content", [b"", b"spoiled"])
def test_a_damaged_file_is_made_again(folder, tmp_path, caplog, kind, content):
    compiled(tmp_path)(21)
    for file in folder.rglob(kind):
        file.write_bytes(content)
    assert compiled(tmp_path)(21) == 42
    kept = compiled(tmp_path)
    assert kept(21) == 42
    assert sum(kept.stats.cache_hits.values()) == 1


def test_a_full_disk_is_said_and_no_error(folder, tmp_path, caplog, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(compiler.numba.core.caching.FunctionCache, "save_overload", full)
    assert compiled(tmp_path)(21) == 42
    assert any("cannot be kept" in record.message for record in caplog.records)


def test_where_nothing_can_be_written_kernels_are_compiled_each_time(tmp_path, monkeypatch, caplog):
    """And not kept where numba would put them next: beside the sources, with no digest."""
    monkeypatch.setattr(compiler, "CACHE", tmp_path / "file" / "kernels")
    (tmp_path / "file").write_text("in the way", encoding="utf-8")
    compiler.warn_once.cache_clear()
    assert compiled(tmp_path)(21) == 42
    assert not list(tmp_path.rglob("*.nbi"))
    assert any("cannot be written to" in record.message for record in caplog.records)


def test_the_folder_is_named_by_all_that_is_compiled_in(tmp_path, monkeypatch):
    name = compiler.cache_folder().name
    other = tmp_path / "ggml.py"
    other.write_text("# another table of formats", encoding="utf-8")
    monkeypatch.setattr(compiler.ggml, "__file__", str(other))
    assert compiler.cache_folder().name != name


def test_a_folder_of_the_users_choice_has_the_digest_as_well(tmp_path, monkeypatch):
    name = compiler.cache_folder().name
    monkeypatch.setattr(compiler._SETTINGS, "CACHE_DIR", str(tmp_path))
    assert compiler.cache_folder() == tmp_path / name


@pytest.mark.skipif(not hasattr(os, "getuid"), reason="users have no numbers on this system")
def test_without_a_home_a_folder_that_only_this_user_can_write_to(tmp_path, monkeypatch):
    def no_home(_):
        raise RuntimeError("could not determine the home directory")

    monkeypatch.setattr(compiler._SETTINGS, "CACHE_DIR", "")
    monkeypatch.setattr(compiler.platformdirs, "user_cache_dir", no_home)
    monkeypatch.setattr(compiler.tempfile, "gettempdir", lambda: str(tmp_path))
    own = compiler.cache_folder().parent
    assert own.parent == tmp_path
    assert stat.S_IMODE(own.stat().st_mode) == 0o700
    own.chmod(0o777)  # as another user would make it
    assert str(compiler.cache_folder().parent) == os.devnull


def kept(name, days_unused, root):
    """A folder of kernels that was last used so many days ago."""
    (root / name / "inside").mkdir(parents=True)
    then = time.time() - days_unused * 86400
    os.utime(root / name, (then, then))
    return root / name


def test_folders_that_were_long_not_used_go_when_a_new_one_comes(tmp_path):
    unused = kept("kernels-0123456789abcdef", 61, tmp_path)
    others = [
        kept("kernels-fedcba9876543210", 59, tmp_path),
        kept("kernels-of-somebody-else", 99, tmp_path),
        kept("another", 99, tmp_path),
    ]
    own = kept("kernels-aaaaaaaaaaaaaaaa", 99, tmp_path)
    compiler.mark_used(own)
    assert unused.exists()  # no new one came
    assert time.time() - own.stat().st_mtime < 60
    compiler.mark_used(tmp_path / "kernels-bbbbbbbbbbbbbbbb")
    assert not unused.exists()
    assert all(folder.exists() for folder in (own, *others))


def test_a_folder_that_cannot_be_removed_or_marked_is_no_error(tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError

    unused = kept("kernels-0123456789abcdef", 61, tmp_path)
    monkeypatch.setattr(os, "rmdir", refuse)
    compiler.mark_used(tmp_path / "kernels-bbbbbbbbbbbbbbbb")
    assert unused.exists()
    monkeypatch.setattr(os, "utime", refuse)
    compiler.mark_used(unused)
    compiler.mark_used(Path(os.devnull, "kernels"))


def test_numbas_own_setting_is_left_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(compiler._SETTINGS, "CACHE_DIR", "somewhere else")
    compiled(tmp_path)
    assert compiler._SETTINGS.CACHE_DIR == "somewhere else"


STEP = """
import sys
import numpy as np
from llama3np.config import Config
from llama3np.llm import Llama
from llama3np.params import random
config = Config(16, 1, 2, 1, 8, 16, 9)
llm = Llama(config, random(config, np.random.default_rng(0)), engine="numba", threads=2)
cache = llm.new_cache(1, 8)
for ids in ([1, 2, 3], [4]):
    sys.stdout.buffer.write(llm.engine.forward([ids], cache).tobytes())
"""


def step_of_another_process(folder):
    environment = {**os.environ, "NUMBA_CACHE_DIR": str(folder)}
    done = subprocess.run(
        [sys.executable, "-c", STEP], capture_output=True, env=environment, check=False
    )
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout


def test_any_part_of_the_kept_kernels_will_do(tmp_path):
    """As a process leaves them that was stopped while it compiled, or has not ended yet."""
    expected = step_of_another_process(compiler.CACHE.parent)
    copy = shutil.copytree(compiler.CACHE, tmp_path / compiler.CACHE.name)
    for name in ("run", "_heads", "_head"):
        files = [*copy.rglob(f"step.{name}-*.nbi")]  # one for each place of the package
        assert files
        for file in files:
            file.unlink()
    assert step_of_another_process(tmp_path) == expected

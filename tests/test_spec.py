"""The rules of the house that can be checked: sizes, imports, names, and shapes as named."""

import ast
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from runs import trace
from strategies import Model

import llama3np
import llama3np.train
from llama3np.config import PAIRINGS, Config, RopeScaling

PACKAGE = Path(llama3np.__file__).parent
SPEC = ("model", "params", "config", "cache", "backend", "numerics")
OWN = "llama3np"


@cache
def tree(name):
    return ast.parse(source(name))


def source(name):
    return (PACKAGE / f"{name}.py").read_text(encoding="utf-8")


def nodes(name, *kinds):
    return [node for node in ast.walk(tree(name)) if isinstance(node, kinds)]


def functions(name):
    return nodes(name, ast.FunctionDef)


def imported(name):
    """Every module that a file imports, wherever in it."""
    for node in nodes(name, ast.Import, ast.ImportFrom):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        else:
            assert node.level == 0, f"{name}.py: a relative import"
            yield from (
                [f"{node.module}.{alias.name}" for alias in node.names]
                if node.module == OWN
                else [node.module]
            )


# ---- sizes --------------------------------------------------------------------------------------


def test_the_spec_fits_its_170_lines():
    assert len(source("model").splitlines()) <= 170


@pytest.mark.parametrize("name", SPEC)
def test_no_function_of_the_spec_is_longer_than_30_lines(name):
    lengths = {f.name: f.end_lineno - f.lineno + 1 for f in functions(name)}
    assert {name: n for name, n in lengths.items() if n > 30} == {}


# ---- what is imported ---------------------------------------------------------------------------


def test_the_model_imports_backend_params_and_cache_at_most():
    own = {module for module in imported("model") if module.startswith(OWN)}
    assert own <= {f"{OWN}.{name}" for name in ("backend", "params", "cache")}
    assert set(imported("model")) - own <= {"__future__", "collections", "functools", "math"} | {
        "numpy",
        "typing",
    }


@pytest.mark.parametrize("name", SPEC)
def test_the_spec_stands_on_itself_alone(name):
    """Arrows point one way: no file of the spec imports what is built on the spec."""
    own = {module for module in imported(name) if module.startswith(OWN)}
    assert own <= {f"{OWN}.{name}" for name in (*SPEC, "errors")}


def test_the_table_of_training_has_every_module_and_what_it_stands_on():
    """A line `x.py | ... over y.py, z.py` is true if x imports y and z."""
    lines = re.findall(r"^\| (\w+)\.py +\| (.*) \|$", llama3np.train.__doc__, re.M)
    told = {name for module, what in lines for name in (module, *re.findall(r"(\w+)\.py", what))}
    there = {path.stem for path in (PACKAGE / "train").glob("*.py")} - {"__init__"}
    assert told - {"model"} == there
    for module, what in lines:
        below = re.findall(r"(\w+)\.py", re.split("[;:]", what.partition(" over ")[2])[0])
        assert set(below) <= set(from_training(f"train/{module}")), module


def from_training(name):
    """The modules of training that a file imports."""
    for node in nodes(name, ast.ImportFrom):
        if node.module == f"{OWN}.train":
            yield from (alias.name for alias in node.names)
        elif node.module.startswith(f"{OWN}.train."):
            yield node.module.rpartition(".")[2]


ATTEMPTS = """
import sys

class Watch:
    def find_spec(self, name, path=None, target=None):
        if name in {"torch", "cupy", "tiktoken", "transformers", "jax", "numba", "rich"}:
            print(name)

sys.meta_path.insert(0, Watch())
import llama3np, llama3np.model, llama3np.cache, llama3np.params, llama3np.config
import numpy as np
config = llama3np.config.Config(4, 1, 2, 1, 2, 5, 9)
params = llama3np.params.random(config, np.random.default_rng(0))
cache = llama3np.cache.new_cache(config, 1, 2)
llama3np.model.forward(params, config, [[1, 2]], cache)
"""


def test_importing_and_running_the_spec_tries_no_framework():
    """Not even in a try: on a machine that has torch, it would cost seconds."""
    found = subprocess.run(
        [sys.executable, "-c", ATTEMPTS], capture_output=True, text=True, check=True
    )
    assert found.stdout == ""


# ---- how it is written --------------------------------------------------------------------------


@pytest.mark.parametrize("name", SPEC)
def test_the_spec_has_no_global_state_and_no_hidden_input(name):
    assert nodes(name, ast.Global, ast.Nonlocal) == []
    assert not re.search(r"\bos\.(environ|getenv)", source(name))
    assert [f.name for f in functions(name) if f.args.kwarg is not None] == []


@pytest.mark.parametrize("name", SPEC)
def test_the_spec_has_no_inheritance(name):
    allowed = {"NamedTuple", "Protocol"}
    bases = {c.name: {ast.unparse(b) for b in c.bases} for c in nodes(name, ast.ClassDef)}
    assert {name: found for name, found in bases.items() if not found <= allowed} == {}


@pytest.mark.parametrize("name", SPEC)
def test_the_spec_never_branches_on_the_number_of_tokens(name):
    """One expression for prefill, chunk, decode and ragged rows."""
    compared = [ast.unparse(node) for node in nodes(name, ast.Compare)]
    assert [c for c in compared if re.search(r"(\bT|\.shape\[1\]) *[=!<>]=? *\d", c)] == []


@pytest.mark.parametrize("name", SPEC)
def test_every_public_function_of_the_spec_says_what_it_does(name):
    public = [f for f in nodes(name, ast.FunctionDef, ast.ClassDef) if f.name[0] != "_"]
    inner = {f for outer in functions(name) for f in ast.walk(outer) if f is not outer}
    assert [f.name for f in public if f not in inner and not ast.get_docstring(f)] == []


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: path.name)
def test_nothing_is_left_to_do(path):
    assert not re.search(r"\b(TODO|FIXME|XXX|HACK)\b", path.read_text(encoding="utf-8"))


# ---- shapes -------------------------------------------------------------------------------------

# All sizes differ, so that no two letters can be mistaken for each other. (N = 6, H = 8, P = 4.)
SIZES = {"B": 5, "T": 7, "K": 2, "G": 3, "N": 6, "H": 8, "P": 4, "D": 10, "F": 11, "V": 13}
GENERIC = {"linear": "D", "rope": "N"}  # whatever width they are given; query or key heads
SUFFIX = re.compile(r"_([BTSDVKGHFLNPM1]+)$")


def assert_shape_as_named(where, name, array, letters, bound):
    assert array.ndim == len(letters), f"{where}: {name} has shape {array.shape}"
    for letter, size in zip(letters, array.shape, strict=True):
        expected = 1 if letter == "1" else bound.setdefault(letter, size)
        assert size == expected, f"{where}: {letter} of {name} is {size}, expected {expected}"


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_every_array_has_the_shape_that_its_name_says(xp, pairing):
    """A whole forward under a tracer that looks at the local names of every function it leaves."""
    scaling = RopeScaling(8.0, 1.0, 4.0, 16)
    config = Config(10, 2, 6, 2, 8, 11, 13, rope_scaling=scaling, rope_pairing=pairing)
    model = Model(config, 1, xp=xp)
    ids_BT = np.random.default_rng(0).integers(0, 13, (5, 7))
    seen = set()

    def leave(frame, event, _):
        if event != "return":
            return leave
        where = frame.f_code.co_name
        bound = {} if where in GENERIC else dict(SIZES)
        for name, value in frame.f_locals.items():
            match = SUFFIX.search(name)
            if match and isinstance(value, np.ndarray | xp.ndarray):
                assert_shape_as_named(where, name, value, match[1], bound)
                seen.add((where, name))
        return leave

    files = {str(PACKAGE / f"{name}.py") for name in SPEC}
    before = sys.gettrace()
    sys.settrace(lambda frame, *_: leave if frame.f_code.co_filename in files else None)
    try:
        trace(model, ids_BT, new_B=[7, 3, 1, 5, 2])
    finally:
        sys.settrace(before)
    assert len(seen) > 50  # the tracer was there: rms_norm to forward have 60 such names
    assert {"rms_norm", "linear", "rope", "attention", "swiglu", "block", "forward"} <= {
        where for where, _ in seen
    }


def test_load_stays_a_function_after_its_package_is_imported():
    """llama3np.load is both: the function of the public surface, and the folder of the loaders."""
    code = "import llama3np; from llama3np.load import gguf; import llama3np.load as l; l.__call__"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0

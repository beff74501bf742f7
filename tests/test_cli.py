"""The command as a process: exit status, stdout, stderr, for good and bad input."""

import json
import os
import re
import signal
import subprocess
import sys
import time

import numpy as np
import paths
import pytest

from llama3np.cli import ended_by_signals, main
from llama3np.cli.common import Timed
from llama3np.config import Config
from llama3np.llm import Step
from llama3np.load import save_hf
from llama3np.params import random

# a process that compiles says so
pytestmark = pytest.mark.usefixtures("compiled_kernels", "signals_heeded")

COMMAND = [sys.executable, "-c", "import sys; from llama3np.cli import main; sys.exit(main())"]
GOLDEN = json.loads((paths.GOLDENS / "embedded.json").read_text(encoding="utf-8"))
ROMEO = next(item for item in GOLDEN["items"] if item["id"] == "romeo")
TINY = Config(
    dim=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, ffn_dim=20, vocab_size=30,
    context_length=64, rope_pairing="half",
)  # fmt: skip


def llama3np(*args, stdin="", timeout=60):
    return subprocess.run(
        [*COMMAND, *map(str, args)],
        input=stdin,
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=timeout,
        check=False,
    )


def start(*args):
    """The command, running."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen([*COMMAND, *map(str, args)], text=True, encoding="utf-8", **pipes)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A Hugging Face directory of random weights, without a tokenizer."""
    directory = tmp_path_factory.mktemp("checkpoints") / "tiny model ü"
    save_hf(directory, TINY, random(TINY, np.random.default_rng(0)))
    return directory


def result(*args, **options):
    """The JSON object of a run that went well and said nothing else."""
    run = llama3np(*args, "--json", **options)
    assert run.stderr == ""
    assert run.returncode == 0
    return json.loads(run.stdout)


# ---- what works ----------------------------------------------------------------------------------


def test_generate_prints_the_text_and_nothing_else():
    run = llama3np("generate", paths.EMBEDDED, "ROMEO:", "--max-new-tokens", 12)
    assert (run.returncode, run.stdout, run.stderr) == (0, ROMEO["generated_text"][:12] + "\n", "")


def test_generate_by_the_name_of_an_installed_model():
    paths.smollm2_gguf()
    assert result("generate", "smollm2", "Gravity is", "--max-new-tokens", 2)["text"] == (
        " a fundamental"
    )


def test_generate_json_has_every_key():
    given = result("generate", paths.EMBEDDED, "ROMEO:", "--logprobs", "--max-new-tokens", 8)
    assert given["prompt_ids"] == ROMEO["prompt_ids"]
    assert given["ids"] == ROMEO["generated_ids"][:8]
    assert given["text"] == ROMEO["generated_text"][:8]
    assert given["finish_reason"] == "length"
    expected = [step["top5_logits"][0] - step["logsumexp"] for step in ROMEO["steps"][:8]]
    assert given["logprobs"] == pytest.approx(expected, abs=1e-3)
    timings = given["timings"]
    assert (timings["prefill_tokens"], timings["decode_tokens"]) == (6, 7)
    assert min(timings["load_s"], timings["prefill_s"], timings["decode_s"]) > 0


def test_generate_answers_a_message():
    given = result(
        *("generate", paths.smollm2_gguf(), "--chat", "What is the capital of France?"),
        *("--logprobs", "--max-new-tokens", 20),
    )
    assert given["text"] == "The capital of France is Paris."
    assert given["finish_reason"] == "stop"
    assert given["ids"][-1] == 2
    assert len(given["logprobs"]) == len(given["ids"]) == 8
    assert all(logprob < 0 for logprob in given["logprobs"])
    timings = given["timings"]
    assert timings["prefill_tokens"] == len(given["prompt_ids"]) == 37
    assert timings["decode_tokens"] == 7


def test_generate_takes_ids_and_needs_no_tokenizer(tiny):
    given = result("generate", tiny, "--prompt-ids", "3,1,4", "--max-new-tokens", 5)
    assert given["prompt_ids"] == [3, 1, 4]
    assert len(given["ids"]) == 5
    assert given["finish_reason"] == "length"
    printed = llama3np("generate", tiny, "--prompt-ids", "3,1,4", "--max-new-tokens", 5).stdout
    assert [int(id) for id in printed.split()] == given["ids"]
    assert "logprobs" not in given


def test_generate_reads_standard_input():
    """And a line end that `echo` adds is not part of the prompt."""
    options = ("generate", paths.EMBEDDED, "-", "--max-new-tokens", 8)
    assert llama3np(*options, stdin="ROMEO:\n").stdout == ROMEO["generated_text"][:8] + "\n"


def test_a_seed_repeats_a_sample(tiny):
    options = ("--prompt-ids", "1", "--temperature", 1, "--top-k", 9, "--max-new-tokens", 12)
    first, same = (result("generate", tiny, *options, "--seed", 5)["ids"] for _ in range(2))
    assert first == same
    assert first != result("generate", tiny, *options, "--seed", 6)["ids"]


def test_float64_is_a_profile(tiny):
    options = ("generate", tiny, "--prompt-ids", "1,2", "--max-new-tokens", 8, "--dtype")
    assert result(*options, "float64")["ids"] == result(*options, "float32")["ids"]


def test_chat_remembers_what_was_said():
    run = llama3np(
        *("chat", paths.smollm2_gguf(), "--max-new-tokens", 24, "--json"),
        stdin="What is the capital of France?\nAnd of Italy?\n/exit\nnot read\n",
    )
    first, second = map(json.loads, run.stdout.splitlines())
    assert first["text"] == "The capital of France is Paris."
    shared = len(first["prompt_ids"]) + len(first["ids"])
    assert second["prompt_ids"][:shared] == first["prompt_ids"] + first["ids"]
    assert "Rome" in second["text"]


def test_chat_goes_on_after_a_message_that_does_not_fit():
    run = llama3np(
        *("chat", paths.smollm2_gguf(), "--max-new-tokens", 8, "--max-seq-len", 200),
        stdin="word " * 300 + "\nWhat is the capital of France?\n",
    )
    assert run.stdout == "The capital of France is Paris.\n"
    assert run.stderr.count("\n") == 1
    assert "200" in run.stderr


def test_info_tells_the_architecture(tiny):
    facts = result("info", tiny)
    assert facts["config"]["n_kv_heads"] == 2
    # 2 tables, then for each of 2 layers: q, o; k, v; 3 of the feed-forward; 2 norms; the last norm
    parameters = 2 * 30 * 16 + 2 * (2 * 16 * 16 + 2 * 8 * 16 + 3 * 20 * 16 + 2 * 16) + 16
    assert facts["parameters"] == parameters
    assert facts["bytes"] == {"float32": 4 * parameters}
    assert facts["cache_bytes_per_token"] == 2 * 2 * 2 * 4 * 4
    shown = llama3np("info", tiny).stdout
    assert "Hugging Face" in shown
    assert "n_kv_heads" in shown


def test_a_pipe_gets_no_control_characters(tiny):
    for args in (("info", tiny), ("generate", tiny, "--prompt-ids", "1"), ("--help",)):
        run = llama3np(*args)
        assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", run.stdout + run.stderr)


@pytest.mark.skipif(sys.platform == "win32", reason="pseudo-terminals are POSIX")
def test_a_terminal_sees_progress_and_the_text_stays_clean():
    import pty

    ours, theirs = pty.openpty()
    command = [*COMMAND, "generate", str(paths.EMBEDDED), "Hi", "--max-new-tokens", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=theirs)
    os.close(theirs)
    seen = b""
    while True:
        try:
            seen += os.read(ours, 4096)
        except OSError:  # the other end has closed
            break
    assert b"loading" in seen
    assert b"tokens" in seen
    assert b"\x1b" not in process.communicate()[0]


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_ctrl_c_keeps_what_was_printed_and_exits_130(tiny):
    options = ["generate", str(tiny), "--prompt-ids", "1", "--max-seq-len", "99999"]
    whole = llama3np(*options, "--max-new-tokens", 200).stdout
    process = start(*options, "--max-new-tokens", "90000")
    text = process.stdout.read(300)
    process.send_signal(signal.SIGINT)
    rest, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "")
    text += rest
    assert text.endswith("\n")
    assert text.startswith(whole[:300])


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_ctrl_c_with_json_prints_what_there_is(tiny):
    options = ["generate", str(tiny), "--prompt-ids", "1", "--max-seq-len", "99999", "--json"]
    process = start(*options, "--max-new-tokens", "90000")
    time.sleep(4)  # JSON comes at the end: nothing tells when it has begun
    process.send_signal(signal.SIGINT)
    out, errors = process.communicate(timeout=20)
    assert (process.returncode, errors) == (130, "")
    given = json.loads(out)
    assert given["finish_reason"] == "interrupted"
    assert 0 < len(given["ids"]) < 90000


def test_a_reader_that_leaves_is_no_error(tiny):
    options = ("--prompt-ids", "1", "--max-seq-len", "99999", "--max-new-tokens", "90000")
    process = start("generate", tiny, *options)
    process.stdout.read(5)
    process.stdout.close()
    assert "Traceback" not in process.stderr.read()
    assert process.wait(timeout=20) == 1


def test_no_command_imports_a_framework(tiny):
    """Nor does the plain path import what only other paths need."""
    code = (
        "import sys; from llama3np.cli import main; main(sys.argv[1:]); "
        "print(*sorted({'torch', 'cupy', 'numba', 'transformers', 'rich'} & set(sys.modules)))"
    )
    for engine, imported in (("numpy", ""), ("numba", "numba")):
        args = ["generate", str(tiny), "--prompt-ids", "1", "--max-new-tokens", "1"]
        run = subprocess.run(
            [sys.executable, "-c", code, *args, "--engine", engine],
            capture_output=True,
            text=True,
            check=True,
        )
        assert run.stdout.splitlines()[-1] == imported


# ---- what does not -------------------------------------------------------------------------------


def refused(*args, **options):
    """The one sentence of a user's mistake: status 2, nothing on stdout, no traceback."""
    run = llama3np(*args, **options)
    assert run.returncode == 2, run.stderr
    assert run.stdout == ""
    assert run.stderr.startswith("llama3np: ")
    assert run.stderr.count("\n") == 1
    assert "Traceback" not in run.stderr
    return run.stderr


def test_a_missing_path_is_named(tmp_path):
    assert "no-such.gguf" in refused("generate", tmp_path / "no-such.gguf", "Hi")
    message = refused("generate", "smollm3", "Hi")
    assert "smollm3" in message
    assert "smollm2" in message  # what there is


def test_a_text_file_renamed_gguf_is_refused(tmp_path):
    file = tmp_path / "notes.gguf"
    file.write_text("not a model, only a name " * 50, encoding="utf-8")
    assert "notes.gguf" in refused("generate", file, "Hi")


def test_an_empty_file_and_an_empty_directory_are_refused(tmp_path):
    (tmp_path / "empty.gguf").touch()
    (tmp_path / "nothing").mkdir()
    assert "empty.gguf" in refused("info", tmp_path / "empty.gguf")
    assert "nothing" in refused("info", tmp_path / "nothing")


def test_a_truncated_safetensors_is_refused(tiny, tmp_path):
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((tiny / name).read_bytes())
    whole = (tiny / "model.safetensors").read_bytes()
    for size in (len(whole) - 1, len(whole) // 2, 100, 4):
        (tmp_path / "model.safetensors").write_bytes(whole[:size])
        assert "model.safetensors" in refused("generate", tmp_path, "--prompt-ids", "1")


def test_token_ids_out_of_range_are_refused(tiny):
    for wrong in (30, -1, 10**30):
        message = refused("generate", tiny, f"--prompt-ids=1,{wrong}")
        assert str(wrong) in message


def test_a_prompt_too_long_states_the_numbers(tiny):
    ids = ",".join(["1"] * 60)
    message = refused("generate", tiny, "--prompt-ids", ids, "--max-new-tokens", 5)
    assert re.search(r"60 tokens.* 5 .*64", message)
    message = refused("generate", tiny, "--prompt-ids", "1,2,3", "--max-seq-len", 2)
    assert re.search(r"expected at most 1 tokens.* 2, found 3", message)


@pytest.mark.skipif(sys.platform == "win32", reason="bytes on a pipe")
def test_text_that_is_not_utf8_is_refused():
    command = [*COMMAND, "generate", str(paths.EMBEDDED), "-"]
    run = subprocess.run(command, input=b"ab\xff", capture_output=True, check=False)
    assert run.returncode == 2
    assert run.stdout == b""
    assert b"UTF-8" in run.stderr
    assert run.stderr.count(b"\n") == 1


def test_a_path_too_long_and_a_pipe_for_a_path_are_refused(tmp_path):
    refused("generate", "x" * 5000, "Hi")
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe")
        assert "pipe" in refused("info", tmp_path / "pipe")


def test_an_empty_prompt_is_refused_where_the_model_has_no_bos():
    assert "prompt" in refused("generate", paths.EMBEDDED, "")


@pytest.mark.parametrize(
    ("args", "named"),
    [
        (["--prompt-ids", "1,x"], "'x'"),
        (["--prompt-ids", ""], "--prompt-ids"),
        ([], "PROMPT"),
        (["text", "--prompt-ids", "1"], "PROMPT"),
        (["text"], "tokenizer"),
        (["text", "--chat"], "tokenizer"),
        (["text", "--system", "s"], "--chat"),
        (["--prompt-ids", "1", "--chat"], "--chat"),
        (["--prompt-ids", "1", "--temperature", "-1"], "temperature"),
        (["--prompt-ids", "1", "--top-p", "0"], "top_p"),
        (["--prompt-ids", "1", "--top-k", "-3"], "top_k"),
        (["--prompt-ids", "1", "--seed", "-3"], "seed"),
        (["--prompt-ids", "1", "--max-new-tokens", "-3"], "max_new_tokens"),
        (["--prompt-ids", "1", "--max-new-tokens", "many"], "many"),
        (["--prompt-ids", "1", "--max-seq-len", "0"], "max_seq_len"),
        (["--prompt-ids", "1", "--dtype", "float8"], "float8"),
        (["--prompt-ids", "1", "--device", "tpu"], "tpu"),
        (["--prompt-ids", "1", "--no-such-option"], "--no-such-option"),
    ],
)
def test_wrong_options_are_named(tiny, args, named):
    assert named in refused("generate", tiny, *args)


def test_chat_needs_a_tokenizer(tiny):
    assert "tokenizer" in refused("chat", tiny, stdin="Hi\n")


def test_no_command_and_an_unknown_one_are_refused():
    assert "COMMAND" in refused()
    assert "dance" in refused("dance")


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_handlers_of_signals_are_as_they_were(tiny, capsys):
    """Of a program that calls main itself; while a command runs, a kill ends it as Ctrl-C does."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    assert main(["info", str(tiny)]) == 0
    assert main(["info", "/no such model"]) == 2
    with pytest.raises(SystemExit, match="143"), ended_by_signals():
        os.kill(os.getpid(), signal.SIGTERM)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before


@pytest.mark.skipif(sys.platform == "win32", reason="signals are POSIX")
def test_a_command_under_nohup_outlives_its_terminal():
    """A signal that was ignored when the command began stays so."""
    signals = (signal.SIGTERM, signal.SIGHUP)
    before = [signal.signal(number, signal.SIG_IGN) for number in signals]
    try:
        with ended_by_signals():
            for number in signals:
                os.kill(os.getpid(), number)
    finally:
        for number, handler in zip(signals, before, strict=True):
            signal.signal(number, handler)


def test_debug_shows_where(tmp_path):
    run = llama3np("generate", tmp_path / "none.gguf", "Hi", "--debug")
    assert run.returncode == 2
    assert "Traceback" in run.stderr


def test_a_fault_of_ours_exits_1_in_one_line(tmp_path):
    """Not 2, which means that the user can mend it."""
    code = (
        "import sys; import llama3np.cli.generate as command; from llama3np.cli import main\n"
        "def run(args): raise RuntimeError('two\\nlines')\n"
        "command.run = run; sys.exit(main())"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, "generate", "m", "Hi"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 1
    assert run.stderr == "llama3np: RuntimeError: two lines (--debug shows where)\n"


def test_a_path_that_exists_wins_over_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "smollm2").touch()
    assert "empty" in refused("info", "smollm2")


def test_prefill_ends_with_the_first_token():
    def steps(before_first, before_second):
        time.sleep(before_first)
        yield Step(1, "", None, None)
        time.sleep(before_second)
        yield Step(2, "", None, "length")

    for pauses, slow in (((0.2, 0), "prefill_s"), ((0, 0.2), "decode_s")):
        timed = Timed(steps(*pauses))
        assert len(list(timed)) == 2
        timings = timed.result([1, 2, 3], 0)["timings"]
        assert timings[slow] >= 0.2
        assert (timings["prefill_tokens"], timings["decode_tokens"]) == (3, 1)

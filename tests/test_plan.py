"""The commands plan and info, and the sizes that people write."""

import json
import sys

import numpy as np
import paths
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama3np import cli, cost
from llama3np.cli.common import parse_bytes, show_bytes
from llama3np.config import Config
from llama3np.errors import InputError
from llama3np.load import inspect, load_checkpoint, save_gguf, save_hf, save_llama2c
from llama3np.load.convert import convert
from llama3np.params import named_shapes, random
from llama3np.presets import PRESETS
from llama3np.sample import Sampling

# ---- sizes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("24GB", 24 * 10**9),
        ("24GiB", 24 * 2**30),
        ("16G", 16 * 10**9),
        ("16Gi", 16 * 2**30),
        ("512MB", 512 * 10**6),
        ("1.5 TB", 1_500_000_000_000),
        (" 80gb ", 80 * 10**9),
        ("100", 100),
        ("100B", 100),
        ("3kB", 3000),
    ],
)
def test_sizes_people_write(text, size):
    assert parse_bytes(text, "--memory") == size


@pytest.mark.parametrize(
    "text", ["", "GB", "24XB", "24 GB GB", "-1GB", "0", "1e9", "nan", "24,5GB", "٣GB", "9" * 400]
)
def test_a_size_that_is_none_is_told(text):
    with pytest.raises(InputError, match=r"^--memory: expected a size such as 24GB"):
        parse_bytes(text, "--memory")


@given(st.text() | st.from_regex(r"\d+(\.\d+)?\s*[kKmMgGtTpP]?i?[bB]?", fullmatch=True))
def test_any_text_is_a_size_or_an_input_error(text):
    size = 1
    try:
        size = parse_bytes(text, "--memory")
    except InputError as error:
        assert str(error).startswith("--memory: ")  # noqa: PT017
    assert size >= 1


@given(st.integers(1, 10**15))
def test_shown_sizes_have_three_digits(size):
    number, unit = show_bytes(size).split()
    scale = dict(zip(("bytes", "kB", "MB", "GB", "TB"), range(5), strict=True))[unit]
    assert float(number.replace(",", "")) * 1000**scale == pytest.approx(size, rel=5.1e-3)


# ---- plan --------------------------------------------------------------------------------------


def run(capsys, *args):
    """Exit status, standard output, standard error."""
    status = cli.main(list(map(str, args)))
    said = capsys.readouterr()
    return status, said.out, said.err


def plan(capsys, *args):
    status, out, err = run(capsys, "plan", *args, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


def test_8b_on_a_24_gb_machine(capsys):
    made = plan(capsys, "llama3-8b", "--memory", "24GB", "--bandwidth", "50GB/s")
    assert made["parameters"] == 8_030_261_248
    assert (made["memory"], made["bandwidth"], made["gpus"]) == (24 * 10**9, 50 * 10**9, 1)
    assert list(made["formats"]) == list(cost.FORMATS)
    assert made["formats"]["f32"]["longest_context"] == 0  # 32 GB
    assert made["formats"]["bf16"]["weight_bytes"] == 16_060_522_496
    assert made["formats"]["bf16"]["longest_context"] == 8192
    cases = {(c["context"], c["batch"]): c for c in made["formats"]["bf16"]["cases"]}
    assert cases[2048, 1]["fits"]
    assert not cases[8192, 8]["fits"]
    assert cases[8192, 8]["tokens_per_s"] is None
    expected = 50e9 / (16_060_522_496 - 2 * 128255 * 4096 + 2048 * 262144)
    assert cases[2048, 1]["tokens_per_s"] == pytest.approx(expected, abs=1e-3)


def test_options_choose_the_cases(capsys):
    rate = ("--memory", "80GiB", "--bandwidth", "3.35TB/s")
    options = ("--gpus", 8, "--context", "4096,100", "--batch", "2", "--cache-dtype", "bf16")
    made = plan(capsys, "llama3.1-405b", *rate, *options)
    form = made["formats"]["q8_0"]
    assert [(case["context"], case["batch"]) for case in form["cases"]] == [(4096, 2), (100, 2)]
    part = cost.share(PRESETS["llama3.1-405b"], 8)
    assert form["weight_bytes"] == cost.weight_bytes(part, "q8_0")
    assert form["cases"][0]["bytes"] == cost.memory(part, "q8_0", 4096, 2, "bf16")


def test_the_table_says_what_the_json_says(capsys):
    args = ("llama3-8b", "--memory", "24GB", "--bandwidth", "50GB/s")
    status, out, _ = run(capsys, "plan", *args)
    assert status == 0
    assert "8,030,261,248 parameters; 24 GB and 50 GB/s" in out
    assert all(len(line) <= 80 for line in out.splitlines()[:-1])
    row = next(line for line in out.splitlines() if line.startswith("bf16"))
    assert row.split() == [
        "bf16",
        "16.1",
        "GB",
        "8,192",
        "2,048",
        "3.2/s",
        "20.7/s",
        "(33.2",
        "GB)",
    ]


def test_a_checkpoint_can_be_planned_for(capsys):
    options = ("--memory", "1G", "--bandwidth", "10GB/s")
    assert plan(capsys, paths.EMBEDDED, *options)["parameters"] == 820_480
    assert plan(capsys, "shakespeare", *options)["parameters"] == 820_480


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        (("llama3-8B",), "llama3-8B: expected a path, smollm2, shakespeare, or one of llama2-7b, "),
        (("llama3-8b", "--memory", "lots"), "--memory: expected a size such as 24GB"),
        (("llama3-8b", "--bandwidth", "fast/s"), "--bandwidth: expected a size"),
        (("llama3-8b", "--gpus", "3"), "divides n_kv_heads 8, found 3"),
        (("llama3-8b", "--gpus", "0"), "divides n_kv_heads 8, found 0"),
        (("llama3-8b", "--context", "8193"), "--context: expected at most 8192"),
        (("llama3-8b", "--context", "1k"), "--context: expected numbers such as 1,2,3"),
        (("llama3-8b", "--batch", "0"), "--batch: expected numbers of 1 or more, found 0"),
        (("llama3-8b", "--cache-dtype", "int4"), "--cache-dtype"),
    ],
)
def test_what_cannot_be_planned_is_told_in_one_sentence(capsys, args, complaint):
    defaults = ("--memory", "24GB", "--bandwidth", "50GB/s")
    status, out, err = run(capsys, "plan", args[0], *defaults, *args[1:])
    assert (status, out) == (2, "")
    assert complaint in err
    assert err.count("\n") == 1


def test_memory_and_bandwidth_are_needed(capsys):
    status, _, err = run(capsys, "plan", "llama3-8b", "--memory", "1G")
    assert status == 2
    assert "--bandwidth" in err


# ---- info --------------------------------------------------------------------------------------

TINY = Config(
    dim=16, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=4, ffn_dim=20, vocab_size=30,
    context_length=64, rope_pairing="half",
)  # fmt: skip


def info(capsys, *args):
    status, out, err = run(capsys, "info", *args, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


def test_a_preset_needs_no_files(capsys):
    facts = info(capsys, "llama3-8b")
    assert facts["parameters"] == 8_030_261_248
    assert sum(facts["parameters_by_part"].values()) == 8_030_261_248
    assert facts["bytes"] == {"bfloat16": 16_060_522_496}
    assert facts["bytes_as"]["q8_0"] == cost.weight_bytes(PRESETS["llama3-8b"], "q8_0")
    assert facts["cache_bytes_per_token"] == 262_144
    assert facts["cache_bytes_per_token_as"]["bf16"] == 131_072
    assert facts["flops_per_token"]["after 0 tokens"] == 15_009_841_152
    assert facts["structure"]["layers"]["count"] == 32
    assert facts["structure"]["layers"]["wk"] == {"shape": [1024, 4096], "type": "bfloat16"}
    assert facts["tokenizer"] is None


def test_the_structure_is_shown_as_a_tree(capsys):
    _, out, _ = run(capsys, "info", "llama3.2-1b")
    lines = out.splitlines()
    assert lines[0] == "Params: 1,235,814,400 parameters"
    assert lines[1] == "├── embed_VD  (128256, 2048)  bfloat16"
    assert lines[2] == "├── layers (16 x)"
    assert lines[5] == "│   ├── wk  (512, 2048)  bfloat16"
    assert lines[13] == "└── head_VD  is embed_VD"


def test_a_gguf_is_told_by_its_header_alone(capsys, monkeypatch, tmp_path):
    convert(paths.EMBEDDED, tmp_path / "x.gguf", dtype="q8_0")
    monkeypatch.setattr(sys.modules["llama3np.load.gguf"], "decode", None)
    facts = info(capsys, tmp_path / "x.gguf")
    assert facts["parameters"] == 820_480
    assert facts["bytes"]["Q8_0"] == 870_536  # 819,328 weights, 34 bytes for 32
    assert facts["structure"]["embed_VD"] == {"shape": [257, 128], "type": "Q8_0"}
    assert facts["structure"]["head_VD"] == {"tied": "embed_VD"}
    assert (facts["tokenizer"], facts["chat_format"]) == ("257 tokens", None)


def test_the_tokenizer_and_chat_format_of_smollm2_are_told(capsys):
    facts = info(capsys, paths.smollm2_gguf())
    assert facts["bytes"]["Q4_1"] == 66_355_200  # 106,168,320 weights, 20 bytes for 32
    assert (facts["tokenizer"], facts["chat_format"]) == ("49152 tokens", "chatml")


def test_layers_of_several_types_are_counted(tmp_path, capsys):
    params = random(TINY, np.random.default_rng(0))
    narrow = params.layers[1]._replace(wv=params.layers[1].wv.astype(np.float16))
    save_hf(tmp_path / "m", TINY, params._replace(layers=(params.layers[0], narrow)))
    facts = info(capsys, tmp_path / "m")
    assert facts["structure"]["layers"]["wv"]["type"] == "float32 (1 x), float16 (1 x)"
    assert facts["structure"]["layers"]["wk"]["type"] == "float32"


@pytest.mark.parametrize("save", [save_hf, save_gguf, save_llama2c])
@pytest.mark.parametrize("tied", [False, True])
def test_inspect_and_load_agree(tmp_path, save, tied):
    config = Config(16, 2, 4, 2, 4, 20, 30, tied=tied, rope_pairing="interleaved")
    path = tmp_path / "model"
    save(path, config, random(config, np.random.default_rng(0)))
    found, loaded = inspect(path), load_checkpoint(path)
    for field in ("config", "layout", "stop_ids", "sampling"):
        assert getattr(found, field) == getattr(loaded, field)
    assert found.tokenizer is loaded.tokenizer is None
    assert {name: w.shape for name, w in found.tensors.items()} == named_shapes(loaded.config)
    assert sum(w.nbytes for w in found.tensors.values()) == cost.weight_bytes(config, "f32")


def test_a_tokenizer_that_cannot_be_used_is_told_and_not_raised(tmp_path, capsys):
    save_hf(tmp_path / "m", TINY, random(TINY, np.random.default_rng(0)))
    (tmp_path / "m" / "tokenizer.json").write_text('{"model": {"type": "WordPiece"}}')
    facts = info(capsys, tmp_path / "m")
    assert "tokenizer.json: " in facts["tokenizer"]
    with pytest.raises(InputError, match=r"tokenizer\.json"):
        load_checkpoint(tmp_path / "m")


# ---- generation_config.json ----------------------------------------------------------------------

LLAMA31 = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "eos_token_id": [7, 8]}


def with_generation(tmp_path, values):
    save_hf(tmp_path / "m", TINY, random(TINY, np.random.default_rng(0)))
    (tmp_path / "m" / "generation_config.json").write_text(json.dumps(values))
    return tmp_path / "m"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (LLAMA31, Sampling(0.6, 0, 0.9)),
        ({"do_sample": True, "top_k": 40}, Sampling(1.0, 40, 1.0)),
        ({"do_sample": True, "temperature": None}, Sampling(1.0)),
        ({"do_sample": False, "temperature": 0.6, "top_p": 0.9}, Sampling()),
        ({"temperature": 0.6}, Sampling()),  # transformers: without do_sample it is greedy
        ({}, Sampling()),
    ],
)
def test_the_files_recommend_a_sampling(tmp_path, values, expected):
    path = with_generation(tmp_path, values)
    assert load_checkpoint(path).sampling == inspect(path).sampling == expected


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": "hot"}, {"temperature": -1}, {"top_p": 0}, {"top_p": [1]},
        {"top_k": 1.5}, {"top_k": True}, {"top_k": -1},
    ],
)  # fmt: skip
def test_a_senseless_sampling_is_refused(tmp_path, values):
    (name,) = values
    path = with_generation(tmp_path, {"do_sample": True, **values})
    with pytest.raises(InputError, match=rf"generation_config\.json: {name}: "):
        load_checkpoint(path)


def test_the_files_sampling_is_used_only_when_asked_for(tmp_path, capsys):
    path = with_generation(tmp_path, LLAMA31 | {"temperature": 100.0, "top_p": 1.0})
    texts = {}
    for name, options in {
        "greedy": (),
        "default": ("--temperature", "default"),
        "given": ("--temperature", "100", "--top-p", "1"),
        "narrowed": ("--temperature", "default", "--top-k", "1"),
    }.items():
        args = ("--prompt-ids", "1,2", "--seed", 3, "--max-new-tokens", 20, "--json", *options)
        _, out, _ = run(capsys, "generate", path, *args)
        texts[name] = json.loads(out)["ids"]
    assert texts["default"] == texts["given"] != texts["greedy"] == texts["narrowed"]
    assert info(capsys, path)["sampling"]["temperature"] == 100.0

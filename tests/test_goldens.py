"""Real models against reference outputs made by other implementations (goldens/README.md).

1e-3 on a logit passes every right float32 forward pass and fails each single mistake that was
tried, a wrong norm epsilon included; equal greedy ids alone do not.
"""

import hashlib
import json

import devices
import numpy as np
import paths
import pytest

import llama3np
from llama3np.backend import to_host
from llama3np.kernels.engine import ENGINES
from llama3np.llm import Llama
from llama3np.load import load_checkpoint, save_gguf, save_llama2c, save_meta
from llama3np.params import from_named, named

LOGIT = 1e-3  # absolute, against the float64 reference
NLL = 1e-5  # relative

EMBEDDED = json.loads((paths.GOLDENS / "embedded.json").read_text(encoding="utf-8"))
EMBEDDED_ITEMS = [pytest.param(item, id=item["id"]) for item in EMBEDDED["items"]]
TRACED = next(item for item in EMBEDDED["items"] if item["id"] == "romeo")
EXACT = next(item for item in EMBEDDED["items"] if item["id"] == "to_be")
SAVED = {"gguf": save_gguf, "meta": save_meta, "llama2c": save_llama2c}
SMOLLM2 = json.loads((paths.GOLDENS / "smollm2_135m_q4_1.json").read_text(encoding="utf-8"))
SMOLLM2_ITEMS = [pytest.param(item, id=item["id"]) for item in SMOLLM2["items"]]
STORIES_IDS = ("bos_only", "tim", "lily_ben", "cat", "quote")
STORIES_FILES = ("stories260K.bin", "stories260K-hf", "stories260K-meta")


ON_CUDA = pytest.param("cuda", marks=devices.MARKS)


@pytest.fixture(
    scope="module",
    params=[
        *((kind, engine) for kind in ("huggingface", *SAVED) for engine in ENGINES),
        pytest.param(("huggingface", "cuda"), marks=devices.MARKS),
    ],
    ids="-".join,
)
def embedded(request, tmp_path_factory):
    """The embedded model: as it is, and from files of the other formats."""
    kind, engine = request.param
    path, device = paths.EMBEDDED, "cuda" if engine == "cuda" else "cpu"
    if kind != "huggingface":
        whole = load_checkpoint(path)
        path = tmp_path_factory.mktemp("embedded") / f"model.{kind}"
        SAVED[kind](path, whole.config, whole.params)
    return llama3np.load(path, engine=engine, device=device)


@pytest.fixture(scope="module")
def embedded_arrays():
    return np.load(paths.GOLDENS / "embedded_arrays.npz")


@pytest.fixture(scope="module", params=[*ENGINES, ON_CUDA])
def smollm2(request):
    device = "cuda" if request.param == "cuda" else "cpu"
    return llama3np.load(paths.smollm2_gguf(), engine=request.param, device=device)


@pytest.fixture(scope="module")
def smollm2_arrays():
    return np.load(paths.GOLDENS / "smollm2_135m_q4_1_arrays.npz")


@pytest.fixture(scope="module")
def stories():
    golden = json.loads(paths.shared("goldens/stories260k.json").read_text(encoding="utf-8"))
    return golden | {"items": {item["id"]: item for item in golden["items"]}}


@pytest.fixture(scope="module")
def stories_arrays():
    return np.load(paths.shared("goldens/stories260k_arrays.npz"))


@pytest.fixture(
    scope="module",
    params=[
        *((name, engine) for name in STORIES_FILES for engine in ENGINES),
        pytest.param(("stories260K-hf", "cuda"), marks=devices.MARKS),
    ],
    ids="-".join,
)
def stories_llm(request):
    name, engine = request.param
    device = "cuda" if engine == "cuda" else "cpu"
    return llama3np.load(paths.shared(f"data/{name}"), engine=engine, device=device)


def steps_on(llm):
    """How many decode steps are compared: of SmolLM2 the software device takes 2.4 s for one."""
    if not devices.is_soft(llm):
        return 999
    if llm.config.dim < 200:  # stories260K and the embedded model: a tenth of a second, and more
        return 24 if llm.config.dim < 100 else 8
    return 12 if devices.LONG else 3


def only_one_on(llm, item):
    """Of SmolLM2's items, the software device has one in the ordinary suite."""
    if item["id"] != "plain_gravity":
        devices.skip_if_long(llm)


def generated_with_stop(item):
    """The reference leaves the stop id out; ours ends with it."""
    return item["generated_ids"] + ([item["stop_id"]] if item["stop_id"] is not None else [])


def steps_of(item, llm):
    """The item's steps that are compared on this device."""
    return item | {"steps": item["steps"][: steps_on(llm)]}


def check_ids(llm, item, stop_ids=None):
    """Compare the ids of as many steps as this device makes; return what was generated."""
    most = min(item["max_new_tokens"], steps_on(llm))
    (completion,) = llm.generate(item["prompt_ids"], most, stop_ids=stop_ids)
    assert completion.ids == generated_with_stop(item)[:most]
    return completion


def logits_of_steps(llm, item):
    """Logits before each generated id: prefill of the prompt, then one id at a time."""
    cache = llm.new_cache(1, len(item["prompt_ids"]) + len(item["steps"]))
    yield llm.forward(item["prompt_ids"], cache, last_only=True)[0, 0]
    for id in item["generated_ids"][: len(item["steps"]) - 1]:
        yield llm.forward([id], cache)[0, 0]


def check_steps(llm, item):
    """Compare the top 5 of every step, and return how many logits were compared."""
    compared = 0
    for logits_V, step in zip(logits_of_steps(llm, item), item["steps"], strict=True):
        assert logits_V.argmax() == step["top5_ids"][0]
        error = np.abs(logits_V[step["top5_ids"]] - step["top5_logits"])
        assert error.max() < LOGIT
        if "logsumexp" in step:
            logsumexp = np.log(np.exp(logits_V.astype(float)).sum())
            assert abs(logsumexp - step["logsumexp"]) < LOGIT
        compared += error.size
    return compared


def residual_stream(llm, ids):
    """The stream after the embedding and each layer (L+1, T, D), and after the last norm (T, D)."""
    taps = {}
    llm.forward(ids, tap=lambda name, array: taps.update({name: to_host(array)[0].copy()}))
    names = ["embed", *(f"layers.{i}.h" for i in range(llm.config.n_layers))]
    return np.stack([taps[name] for name in names]), taps["norm"]


# ---- the embedded model --------------------------------------------------------------------------


def test_the_goldens_are_those_of_the_embedded_model():
    """If not: tools/goldens_embedded.py makes them, where torch and transformers are."""
    for name, key in (("model.safetensors", "weights"), ("tokenizer.json", "tokenizer")):
        found = hashlib.sha256((paths.EMBEDDED / name).read_bytes()).hexdigest()
        assert found == EMBEDDED[f"{key}_sha256"], name


@pytest.mark.parametrize("item", EMBEDDED_ITEMS)
def test_embedded_generates_the_reference_ids(embedded, item):
    check_ids(embedded, item, stop_ids=[256])


@pytest.mark.parametrize("item", EMBEDDED_ITEMS)
def test_embedded_logits(embedded, embedded_arrays, item):
    """At every position by prefill, and at every step by decode."""
    reference_TV = embedded_arrays[f"logits/{item['id']}"]
    ids = item["prompt_ids"] + item["generated_ids"]
    assert np.abs(to_host(embedded.forward(ids))[0] - reference_TV).max() < LOGIT
    item = steps_of(item, embedded)
    assert check_steps(embedded, item) == 5 * len(item["steps"])


def test_embedded_intermediates(embedded, embedded_arrays):
    """All of them, by name and in order; masked scores are -inf in both."""
    found = {}
    ids = TRACED["prompt_ids"]
    embedded.forward(ids, tap=lambda name, array: found.update({name: to_host(array)[0].copy()}))
    prefix = f"taps/{TRACED['id']}/"
    names = [name.removeprefix(prefix) for name in embedded_arrays if name.startswith(prefix)]
    assert names == [name for name in found if name in names]
    assert len(names) == 17 * embedded.config.n_layers + 3
    for name in names:
        reference = embedded_arrays[prefix + name]
        scale = np.abs(reference[np.isfinite(reference)]).max()
        np.testing.assert_allclose(found[name], reference, rtol=0, atol=1e-5 * scale, err_msg=name)


def test_embedded_negative_log_likelihood(embedded, embedded_arrays):
    nll_T = -embedded.score(EMBEDDED["nll"]["ids"])
    assert nll_T.sum() == pytest.approx(EMBEDDED["nll"]["sum_nll_fp64"], rel=NLL)
    assert np.abs(nll_T - embedded_arrays["nll_per_token"]).max() < LOGIT


def test_embedded_generates_the_same_in_one_ragged_batch(embedded):
    items = EMBEDDED["items"]
    most = min(*(item["max_new_tokens"] for item in items), steps_on(embedded))
    completions = embedded.generate([item["prompt_ids"] for item in items], most, stop_ids=[256])
    assert [c.ids for c in completions] == [generated_with_stop(item)[:most] for item in items]


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("engine", ENGINES)
def test_embedded_generates_the_same_over_any_number_of_threads(engine, threads):
    check_ids(llama3np.load(paths.EMBEDDED, engine=engine, threads=threads), TRACED)


def test_embedded_in_float64_equals_the_reference(embedded_arrays):
    """The oracle profile. Its angles are float64 as the reference's are, so little is left over."""
    llm = llama3np.load(paths.EMBEDDED, dtype="float64")
    reference_TV = embedded_arrays[f"logits/{EXACT['id']}"]
    assert reference_TV.dtype == np.float64
    ids = EXACT["prompt_ids"] + EXACT["generated_ids"]
    assert np.abs(llm.forward(ids)[0] - reference_TV).max() < 1e-9


@pytest.mark.parametrize("item", EMBEDDED_ITEMS)
def test_embedded_text_by_its_name(item):
    """From text to text: the tokenizer beside the weights, no BOS, the stop id."""
    llm = llama3np.load("shakespeare")
    (completion,) = llm.generate(item["prompt"], item["max_new_tokens"])
    assert (completion.ids, completion.text) == (generated_with_stop(item), item["generated_text"])
    assert llm.encode(item["prompt"]) == item["prompt_ids"]


def test_embedded_ids_of_texts_are_those_of_the_tokenizers_library():
    tokenizer = load_checkpoint(paths.EMBEDDED).tokenizer
    for known in EMBEDDED["texts"]:
        assert tokenizer.encode(known["text"]) == known["ids"]
        assert tokenizer.decode(known["ids"]) == known["text"]


# ---- SmolLM2-135M-Instruct, Q4_1 GGUF ------------------------------------------------------------


@pytest.mark.parametrize("item", SMOLLM2_ITEMS)
def test_smollm2_generates_the_reference_ids_and_text(smollm2, item):
    only_one_on(smollm2, item)
    completion = check_ids(smollm2, item)
    whole = completion.ids == generated_with_stop(item)
    assert item["generated_text"].startswith(completion.text)
    assert completion.text == item["generated_text"] or not whole
    stopped = whole and item["stop"] != "length"
    assert completion.finish_reason == ("stop" if stopped else "length")


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("threads", [1, 3])
def test_smollm2_generates_the_same_over_any_number_of_threads(engine, threads):
    llm = llama3np.load(paths.smollm2_gguf(), engine=engine, threads=threads)
    item = next(item for item in SMOLLM2["items"] if item["id"] == "plain_gravity")
    (completion,) = llm.generate(item["prompt_ids"], 24)
    assert completion.ids == item["generated_ids"][:24]


def test_smollm2_is_the_same_in_float32(smollm2):
    """Its blocks hold no number that float32 does not have: other kernels, the same model."""
    devices.skip_if_long(smollm2)
    params = from_named(
        {
            name: np.array(to_host(w[:]), np.float32)
            for name, w in named(smollm2.params, smollm2.config.tied).items()
        },
        smollm2.config,
    )
    llm = Llama(smollm2.config, params, engine=smollm2.engine.name, device=str(smollm2.device))
    item = next(item for item in SMOLLM2["items"] if item["id"] == "plain_gravity")
    item = steps_of(item, llm)
    assert check_steps(llm, item) == 5 * len(item["steps"])


def test_smollm2_generates_the_same_in_one_ragged_batch(smollm2):
    devices.skip_if_long(smollm2)
    items, most = SMOLLM2["items"], min(64, steps_on(smollm2))
    completions = smollm2.generate([item["prompt_ids"] for item in items], most)
    assert [c.ids for c in completions] == [generated_with_stop(item)[:most] for item in items]


@pytest.mark.parametrize("item", SMOLLM2_ITEMS)
def test_smollm2_logits_at_every_step(smollm2, item):
    only_one_on(smollm2, item)
    item = steps_of(item, smollm2)
    assert check_steps(smollm2, item) == 5 * len(item["steps"])


@pytest.mark.parametrize("item", SMOLLM2_ITEMS)
def test_smollm2_all_logits_after_the_prompt(smollm2, smollm2_arrays, item):
    only_one_on(smollm2, item)
    logits_V = smollm2.forward(item["prompt_ids"], last_only=True)[0, 0]
    reference_V = smollm2_arrays[f"prefill_last_logits/{item['id']}"]
    assert np.abs(logits_V - reference_V).max() < LOGIT


def test_smollm2_residual_stream(smollm2, smollm2_arrays):
    """Relative to the largest entry of each layer: float32 rounding, 30 layers deep."""
    item = next(item for item in SMOLLM2["items"] if item["id"] == "plain_gravity")
    hidden_LTD, norm_TD = residual_stream(smollm2, item["prompt_ids"])
    for name, ours, reference in (
        *zip(range(99), hidden_LTD, smollm2_arrays["hidden/plain_gravity"], strict=False),
        ("norm", norm_TD, smollm2_arrays["final_norm/plain_gravity"]),
    ):
        assert np.abs(ours - reference).max() < 1e-5 * np.abs(reference).max(), name


def test_smollm2_prompts_encode_to_the_reference_ids(smollm2):
    for item in SMOLLM2["items"]:
        if item["messages"] is None:
            assert smollm2.encode(item["prompt"]) == item["prompt_ids"]


def test_smollm2_negative_log_likelihood_of_1000_tokens(smollm2, smollm2_arrays):
    devices.skip_if_long(smollm2)
    text = paths.shared("data/tinyshakespeare.txt").read_text(encoding="utf-8")
    golden = SMOLLM2["nll"]
    ids = smollm2.encode(text[:5000])[:1000]
    assert (
        hashlib.sha256(np.array(ids, "<i4").tobytes()).hexdigest() == golden["ids_sha256_int32le"]
    )
    nll_T = -smollm2.score(ids)
    assert nll_T.sum() == pytest.approx(golden["sum_nll_fp64"], rel=NLL)
    assert np.abs(nll_T - smollm2_arrays["nll_per_token"]).max() < LOGIT


# ---- stories260K, llama2.c and Hugging Face files ------------------------------------------------


@pytest.mark.parametrize("name", STORIES_IDS)
def test_stories_generates_the_reference_ids(stories_llm, stories, name):
    check_ids(stories_llm, stories["items"][name], stop_ids=[1, 2])


@pytest.mark.parametrize("name", STORIES_IDS)
def test_stories_text(stories, name):
    """From text to text: the tokenizer beside the file, BOS, the dropped space, the stop ids."""
    item = stories["items"][name]
    llm = llama3np.load(paths.shared("data/stories260K.bin"))
    (completion,) = llm.generate(item["prompt"], item["max_new_tokens"])
    assert completion.ids == generated_with_stop(item)
    assert item["prompt"] + completion.text == item["text"]


@pytest.mark.parametrize("name", STORIES_IDS)
def test_stories_logits(stories_llm, stories, stories_arrays, name):
    """At every position by prefill, and at every step by decode."""
    item = stories["items"][name]
    reference_TV = stories_arrays[f"logits/{name}"]
    ids = (item["prompt_ids"] + item["generated_ids"])[: len(reference_TV)]
    assert np.abs(stories_llm.forward(ids)[0] - reference_TV).max() < LOGIT
    item = steps_of(item, stories_llm)
    assert check_steps(stories_llm, item) == 5 * len(item["steps"])


def test_stories_residual_stream(stories_llm, stories, stories_arrays):
    item = stories["items"]["tim"]
    hidden_LTD = stories_arrays["hidden/tim"]
    ids = (item["prompt_ids"] + item["generated_ids"])[: hidden_LTD.shape[1]]
    ours_LTD, norm_TD = residual_stream(stories_llm, ids)
    assert np.abs(ours_LTD - hidden_LTD).max() < LOGIT
    assert np.abs(norm_TD - stories_arrays["final_norm/tim"]).max() < LOGIT


def test_stories_negative_log_likelihood(stories_llm, stories):
    golden = stories["nll"]
    nll = -stories_llm.score(golden["ids"]).sum()
    assert nll == pytest.approx(golden["sum_nll_fp64"], rel=NLL)


def test_stories_in_float64_equals_the_reference_to_its_printed_digits(stories, stories_arrays):
    """The oracle profile. Its angles are float64 as the reference's are, so little is left over."""
    llm = llama3np.load(paths.shared("data/stories260K.bin"), dtype="float64")
    item = stories["items"]["lily_ben"]
    ids = (item["prompt_ids"] + item["generated_ids"])[: len(stories_arrays["logits/lily_ben"])]
    assert np.abs(llm.forward(ids)[0] - stories_arrays["logits/lily_ben"]).max() < 1e-9

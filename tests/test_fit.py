"""fit.py and cost.py's part of it: what fits into a GPU, and what is said where it does not."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st
from strategies import configs

from llama3np import cost, fit
from llama3np.errors import InputError
from llama3np.generate import CHUNK
from llama3np.presets import PRESETS

GIB = 1 << 30
LLAMA_8B = PRESETS["llama3-8b"]
# What a driver and a desktop hold of a card before any program comes.
HELD = GIB // 2


def wish(config, format="bf16", context=8192, kv="f32", chunk=CHUNK, size=4):
    return fit.Wish(config, cost.weight_bytes(config, format), context, kv, chunk, size)


@pytest.mark.parametrize(
    ("format", "card", "smaller"), [("bf16", 24, 16), ("q8_0", 12, 8), ("q4_0", 8, 6)]
)
@pytest.mark.parametrize("preset", ["llama3-8b", "llama3.1-8b"])
def test_8b_with_8192_tokens_fits_the_card_that_it_is_meant_for(preset, format, card, smaller):
    """With keys and values in float32, so no option is needed; and the next smaller card is not."""
    asked = wish(PRESETS[preset], format)
    free = card * GIB - HELD
    fit.check(asked, "cuda:0", free, card * GIB)
    with pytest.raises(InputError):
        fit.check(asked, "cuda:0", smaller * GIB - HELD, smaller * GIB)


def test_the_plan_of_8b_names_its_parts():
    assert fit.told(wish(LLAMA_8B), "cuda:0", 24 * 10**9, 25 * 10**9) == (
        "cuda:0: 19.02 GB needed: weights 16.06 GB, keys and values of 8192 tokens in f32 2.15 GB, "
        "workspace 0.82 GB; 24.00 GB of 25.00 GB free"
    )


def test_what_does_not_fit_is_told_with_what_would():
    with pytest.raises(InputError) as raised:
        fit.check(wish(LLAMA_8B), "cuda:0", 12 * 10**9, 12 * GIB)
    message = str(raised.value)
    assert "\n" not in message
    assert message.startswith("device: does not fit: cuda:0: 19.02 GB needed")
    assert "weights in q8_0 (11.50 GB); weights in q4_0 (7.48 GB); 2 such GPUs" in message
    assert "--max-seq-len" not in message  # the weights alone are more


def test_a_shorter_context_and_a_smaller_cache_are_proposed_where_they_do():
    with pytest.raises(
        InputError, match=r"What fits: --max-seq-len (\d+); --kv-dtype bf16;"
    ) as raised:
        fit.check(wish(LLAMA_8B), "cuda:0", 18_500_000_000, 24 * GIB)
    context = int(re.search(r"--max-seq-len (\d+)", str(raised.value))[1])
    fit.check(wish(LLAMA_8B, context=context), "cuda:0", 18_500_000_000, 24 * GIB)
    with pytest.raises(InputError):
        fit.check(wish(LLAMA_8B, context=context + 1), "cuda:0", 18_500_000_000, 24 * GIB)


@given(
    configs(),
    st.sampled_from(["f32", "bf16", "q8_0"]),
    st.integers(1, 5000),
    st.sampled_from(["f32", "bf16", "f16"]),
    st.floats(0, 1.2),
)
def test_every_way_that_is_proposed_fits(config, format, context, kv, share):
    asked = wish(config, format, context, kv)
    free = int(share * asked.needs().total)
    ways = list(fit.alternatives(asked, free))
    if free >= asked.needs().total:
        fit.check(asked, "cuda:0", free, free)
        return
    with pytest.raises(InputError, match="; ".join(map(re.escape, ways)) or "nothing smaller"):
        fit.check(asked, "cuda:0", free, free)
    for way in ways:
        length = re.search(r"--max-seq-len (\d+)", way)
        kept = int(length[1]) if length else context
        stored = "bf16" if "bf16" in way else kv
        if "GPUs" not in way and "weights" not in way:
            assert asked.needs(context=kept, kv=stored).total <= free


@given(configs(), st.integers(1, 4096), st.integers(1, 4096), st.integers(1, 64))
def test_more_of_anything_needs_more(config, tokens, context, more):
    few = cost.workspace_bytes(config, tokens, context)
    assert few <= cost.workspace_bytes(config, tokens + more, context)
    assert few <= cost.workspace_bytes(config, tokens, context + more)
    assert few < cost.workspace_bytes(config, tokens, context, size=8)


@pytest.mark.parametrize("kv", ["bf16", "f16"])
def test_16_bits_need_the_workspace_of_float32_and_no_blocks_are_proposed(kv):
    """What is computed is widened; and weights are rounded to 16 bits whatever their storage."""
    short, wide = wish(LLAMA_8B, kv=kv, size=2), wish(LLAMA_8B, kv=kv)
    assert short.needs() == wide.needs()
    ways = list(fit.alternatives(short, 16_500_000_000))
    assert [way for way in fit.alternatives(wide, 16_500_000_000) if "weights in" in way]
    assert ways
    assert not [way for way in ways if "weights in" in way or "--kv-dtype" in way]

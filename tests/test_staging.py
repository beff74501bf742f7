"""kernels/cuda/staging.py and loading.py: what arrives on the device, in whatever order it goes."""

import tracemalloc

import ml_dtypes
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from strategies import models

from llama3np import params as tree
from llama3np.backend import to_host
from llama3np.kernels import Joined
from llama3np.kernels.blocks import Blocks
from llama3np.kernels.ggml import FORMATS
from llama3np.load.lazy import Lazy

DTYPES = (np.float32, np.float16, ml_dtypes.bfloat16, np.uint8, np.float64)
on_a_device = settings(
    max_examples=400, suppress_health_check=[HealthCheck.function_scoped_fixture]
)  # an eighth of them


@pytest.fixture
def staging(softcuda):
    """The module, on a device that does its work as late as it may."""
    import cupy

    from llama3np.kernels.cuda import staging

    softcuda.config(deferred=True)
    yield staging
    cupy.cuda.Device().synchronize()


def bits(array):
    array = np.ascontiguousarray(to_host(array))
    return array.shape, array.dtype, array.tobytes()


@st.composite
def sources(draw):
    """(what is put, the array that must arrive)."""
    shape = draw(st.lists(st.integers(0, 9), min_size=1, max_size=2).map(tuple))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    rng = np.random.default_rng(draw(st.integers(0, 99)))
    whole = rng.integers(0, 256, (*shape, dtype.itemsize), np.uint8).view(dtype)[..., 0]
    kind = draw(st.sampled_from(["array", "strided", "lazy", "rows", "columns"]))
    if kind in ("rows", "columns") and len(shape) == 2 and whole.size:
        axis = int(kind == "columns")
        return Joined([whole, whole[::-1]], axis), np.concatenate([whole, whole[::-1]], axis)
    if kind == "lazy":
        parts = [whole.reshape(-1)[i : i + 3] for i in range(0, whole.size, 3)]
        return Lazy(whole.shape, dtype, lambda: iter(parts)), whole
    return (np.asfortranarray(whole) if kind == "strided" else whole), whole


@on_a_device
@given(st.lists(sources(), min_size=1, max_size=6), st.integers(1, 40))
def test_every_bit_arrives_through_buffers_of_any_size(staging, pairs, size):
    """With two buffers in turn: none may be filled before the device has taken what was in it."""
    with staging.Staging(size) as context:
        arrived = [context.put(source) for source, _ in pairs]
    for found, (_, expected) in zip(arrived, pairs, strict=True):
        assert bits(found) == bits(expected)


def test_memory_that_kernels_still_write_to_is_not_overtaken(staging):
    """A freed array's memory goes to the next one, while a kernel that fills it waits its turn."""
    import cupy

    expected = np.arange(1000, dtype=np.float32)
    for _ in range(3):
        old = cupy.full(1000, 7, np.float32)  # in the current stream: not done yet
        del old
        with staging.Staging(512) as context:
            new = context.put(expected)
        np.testing.assert_array_equal(to_host(new), expected)


def test_a_buffer_is_filled_while_the_device_takes_the_other(staging, monkeypatch):
    """So no part of a file waits for the part before it: the two take turns."""
    import cupy

    sent, send = [], cupy.cuda.runtime.memcpyAsync
    monkeypatch.setattr(
        cupy.cuda.runtime,
        "memcpyAsync",
        lambda to, at, *rest: sent.append(at) or send(to, at, *rest),
    )
    with staging.Staging(16) as context:
        context.put(np.arange(20, dtype=np.float32))
    assert len(sent) == 5
    assert len(set(sent[::2])) == len(set(sent[1::2])) == 1
    assert sent[0] != sent[1]


def test_what_is_too_short_is_no_tensor(staging):
    lazy = Lazy((4,), np.dtype(np.float32), lambda: iter((np.zeros(3, np.float32),)))
    with (
        pytest.raises(ValueError, match="expected 16 bytes, found 12"),
        staging.Staging() as context,
    ):
        context.put(lazy)


# ---- whole models -------------------------------------------------------------------------------


@pytest.mark.gpu
@given(models())
def test_a_model_arrives_with_its_bits_and_its_progress(model):
    from llama3np.kernels.cuda.loading import device_params

    told = []
    config = model.config
    placed = device_params(model.params, config, lambda *each: told.append(each))
    assert (placed.head_VD is placed.embed_VD) == config.tied
    ours, theirs = tree.named(model.params, config.tied), tree.named(placed, config.tied)
    assert {n: bits(w) for n, w in ours.items()} == {n: bits(w) for n, w in theirs.items()}
    done, totals, names = zip(*told, strict=True)
    assert list(done) == sorted(done)
    assert set(totals) == {done[-1]} == {sum(w.nbytes for w in ours.values())}
    assert list(dict.fromkeys(names)) == list(ours)


@pytest.mark.gpu
@pytest.mark.parametrize("name", [n for n, form in FORMATS.items() if form.weights > 1])
def test_blocks_are_laid_out_part_by_part_as_in_one_go(name):
    from llama3np.kernels.cuda.weights import pieces, repack

    form = FORMATS[name]
    stored_NC = np.random.default_rng(0).integers(0, 256, (7, 3 * form.nbytes), np.uint8)
    for weights in (1, 6 * form.weights, 1 << 20):
        parts = [part.reshape(-1) for part in pieces(name, stored_NC, weights)]
        assert max(map(len, parts)) <= max(3 * form.nbytes, weights * form.nbytes // form.weights)
        np.testing.assert_array_equal(np.concatenate(parts), repack(name, stored_NC))


@pytest.mark.gpu
def test_blocks_arrive_as_the_numbers_they_mean():
    from llama3np.config import Config
    from llama3np.kernels.cuda.loading import device_params
    from llama3np.kernels.cuda.plain import product

    config = Config(32, 1, 2, 1, 16, 64, 9, tied=True)
    rng = np.random.default_rng(0)
    params = tree.random(config, rng)
    stored = rng.integers(0, 256, (64, 34), np.uint8)
    stored[:, :2] = np.array([0.01], np.float16).view(np.uint8)
    w = Blocks("Q8_0", stored)
    layer = params.layers[0]._replace(w_gate=w)
    placed = device_params(params._replace(layers=(layer,)), config)
    x_MD = rng.standard_normal((3, 32), np.float32)
    import cupy

    found = to_host(product(cupy.asarray(x_MD), placed.layers[0].w_gate))
    np.testing.assert_allclose(found, x_MD @ np.asarray(w).T, rtol=1e-5, atol=1e-5)


def test_a_mapped_model_passes_through_the_two_buffers_only(staging, tmp_path):
    """Traced: beside page-locked buffers, loading 64 MB from a file holds next to nothing."""
    path = tmp_path / "weights"
    np.arange(1 << 24, dtype=np.float32).tofile(path)
    mapped = np.memmap(path, np.float32, mode="r", shape=(1 << 12, 1 << 12))
    tracemalloc.start()
    with staging.Staging(1 << 20) as context:
        arrived = context.put(mapped)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1 << 20
    assert staging.BUFFER * 2 < 1 << 30
    np.testing.assert_array_equal(to_host(arrived[-1]), mapped[-1])


def test_without_page_locked_memory_there_is_a_memory_error(staging, monkeypatch):
    """As without memory of the device: who loads a model says both in a sentence."""
    import cupy

    def failing(status):
        def fails(_):
            raise cupy.cuda.runtime.CUDARuntimeError(status)

        return fails

    monkeypatch.setattr(cupy.cuda, "alloc_pinned_memory", failing(2))
    with pytest.raises(MemoryError, match=r"^64 bytes of page-locked memory: cudaErrorMemory"):
        staging.Staging(64)
    monkeypatch.setattr(cupy.cuda, "alloc_pinned_memory", failing(1))
    with pytest.raises(cupy.cuda.runtime.CUDARuntimeError, match="cudaErrorInvalidValue"):
        staging.Staging(64)

"""load/lazy.py: a tensor written in chunks makes the same file as the same tensor written whole."""

import io

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from llama3np.load import gguf_file, safetensors
from llama3np.load.gguf_file import Raw
from llama3np.load.lazy import Lazy, write_tensor

DTYPES = [np.dtype(np.float32), np.dtype(np.float16), np.dtype(ml_dtypes.bfloat16)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("lazy")


@st.composite
def cut_tensors(draw):
    """An array, and a Lazy tensor of the same numbers in chunks of any size, empty ones too."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3).map(tuple))
    dtype = draw(st.sampled_from(DTYPES))
    whole = np.arange(np.prod(shape)).astype(dtype).reshape(shape)
    cuts = sorted(draw(st.lists(st.integers(0, whole.size), max_size=4)))
    return whole, Lazy(shape, dtype, lambda: iter(np.split(whole.reshape(-1), cuts)))


@given(st.lists(cut_tensors(), min_size=1, max_size=4))
def test_files_do_not_depend_on_the_chunks(folder, pairs):
    for write in (safetensors.write, lambda path, w: gguf_file.write(path, {"k": 1}, w)):
        written = []
        for which in (0, 1):
            (path := folder / "file").unlink(missing_ok=True)
            write(path, {f"t{i}": pair[which] for i, pair in enumerate(pairs)})
            written.append(path.read_bytes())
        assert written[0] == written[1]


@given(cut_tensors())
def test_a_lazy_tensor_has_the_size_of_the_array(pair):
    whole, lazy = pair
    assert (lazy.ndim, lazy.size, lazy.nbytes) == (whole.ndim, whole.size, whole.nbytes)
    file = io.BytesIO()
    write_tensor(file, "t", lazy)
    assert file.getvalue() == whole.tobytes() == np.asarray(lazy).tobytes()
    assert np.asarray(lazy).shape == whole.shape


def test_ready_made_blocks_may_be_lazy(folder):
    blocks = np.arange(68, dtype=np.uint8)
    lazy = Lazy((68,), blocks.dtype, lambda: iter((blocks[:30], blocks[30:])))
    gguf_file.write(folder / "q8", {}, {"t": Raw("Q8_0", (2, 32), lazy)})
    np.testing.assert_array_equal(gguf_file.read(folder / "q8").stored("t").ravel(), blocks)


@pytest.mark.parametrize(
    ("chunk", "message"),
    [
        (np.zeros(5, np.float32), "expected 24 bytes, found 20"),
        (np.zeros(6, np.float16), "expected float32, found float16"),
    ],
)
def test_chunks_that_break_the_promise_leave_no_file(tmp_path, chunk, message):
    lazy = Lazy((2, 3), np.dtype(np.float32), lambda: iter((chunk,)))
    with pytest.raises(ValueError, match=f"tensor 't': {message}"):
        safetensors.write(tmp_path / "x", {"t": lazy})
    assert list(tmp_path.iterdir()) == []


@given(st.permutations(DTYPES[:2]))  # 3 numbers of 16 bits would leave float32 astray
def test_every_tensor_of_a_safetensors_file_lies_aligned(folder, dtypes):
    (path := folder / "aligned").unlink(missing_ok=True)
    safetensors.write(path, {str(d): np.ones(3, d) for d in dtypes})
    assert all(w.flags.aligned for w in safetensors.read(path).values())

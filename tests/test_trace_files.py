"""crosscheck/files.py, npz.py, output.py: three forms of one trace, and files that others wrote."""

import errno
import io
import json
import os
import shutil
import sys
import zipfile
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import safetensors.numpy
from checks import assert_same
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from llama3np.crosscheck import files, output
from llama3np.crosscheck.stored import FLOATS, Spec
from llama3np.errors import CheckpointError, InputError

NAMES = ("t.safetensors", "t.npz", "t")
META = {"format": "x", "ids": [1, 2], "positions": [0, 1], "config": {"dim": 4}, "model": "ü 漢"}
kinds = st.sampled_from(sorted(FLOATS.values(), key=str))
numbers = array_shapes(max_dims=3, max_side=4).flatmap(
    lambda shape: kinds.flatmap(lambda kind: arrays(np.uint8, (*shape, kind.itemsize)).map(
        lambda raw: raw.view(kind)[..., 0]
    ))
)  # fmt: skip
plain_names = st.text("abz019._", min_size=1, max_size=8).filter(lambda n: set(n) != {"."})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("traces")


def fresh(path):
    shutil.rmtree(path, ignore_errors=True)
    path.unlink(missing_ok=True)
    return path


def write(path, given_arrays, meta=META):
    specs = {name: Spec(a.shape, a.dtype) for name, a in given_arrays.items()}
    with output.new_trace(path, specs, meta) as places:
        for name in reversed(list(places)):  # in any order
            places[name][...] = given_arrays[name]
    return path


def bits(array):
    return str(array.dtype), array.shape, np.ascontiguousarray(array).tobytes()


def all_read(path):
    """Every array, numbers and all."""
    trace = files.read(path)
    return {name: bits(array) for name, array in trace.arrays.items()}, trace.meta


SMALL = {
    "embed": np.arange(6, dtype="<f4").reshape(2, 3),
    "layers.0.scores": np.array([[[1, -np.inf], [2, 3]]], "<f4"),
    "logits": np.ones((2, 5), "<f4"),
}

# ---- our own ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
@given(tensors=st.dictionaries(plain_names, numbers, min_size=1, max_size=4))
def test_what_is_written_is_read_in_its_order_to_the_last_bit(folder, name, tensors):
    path = write(fresh(folder / name), tensors)
    found, meta = all_read(path)
    assert list(found) == list(tensors)
    assert found == {n: bits(a) for n, a in tensors.items()}
    assert meta == META


@pytest.mark.parametrize("name", NAMES)
def test_files_are_told_by_their_content_not_by_their_names(tmp_path, name):
    path = write(tmp_path / name, SMALL).rename(tmp_path / "x.bin")
    assert all_read(path)[0] == {n: bits(a) for n, a in SMALL.items()}


def test_independent_readers_read_them(tmp_path):
    found = safetensors.numpy.load_file(write(tmp_path / "t.safetensors", SMALL))
    with np.load(write(tmp_path / "t.npz", SMALL), allow_pickle=False) as archive:
        also = dict(archive)
    assert json.loads(also.pop("__metadata__").tobytes()) == META
    for name, array in SMALL.items():
        assert_same(found[name], array, name)
        assert_same(also[name], array, name)


def test_a_reader_in_c_needs_the_manifest_and_the_raw_files_alone(tmp_path):
    path = write(tmp_path / "t", SMALL)
    text = (path / "manifest.json").read_text()
    manifest = json.loads(text)
    assert sum(line.startswith('{"name"') for line in text.splitlines()) == len(SMALL)
    assert manifest["metadata"] == META
    assert [item["name"] for item in manifest["arrays"]] == list(SMALL)
    item = manifest["arrays"][1]
    assert item == {
        "name": "layers.0.scores",
        "file": "layers.0.scores.f32",
        "shape": [1, 2, 2],
        "dtype": "f32",
    }
    raw = (path / item["file"]).read_bytes()
    assert raw == np.array([1, -np.inf, 2, 3], "<f4").tobytes()
    assert sorted(p.name for p in path.iterdir()) == sorted(
        ["manifest.json", *(f"{name}.f32" for name in SMALL)]
    )


def test_the_numbers_of_an_npz_file_are_aligned(tmp_path):
    path = write(tmp_path / "t.npz", SMALL)
    with zipfile.ZipFile(path) as archive:
        for info in archive.infolist():
            with path.open("rb") as file:
                file.seek(info.header_offset + 26)
                name, extra = np.frombuffer(file.read(4), "<u2")
            assert (info.header_offset + 30 + int(name) + int(extra)) % 64 == 0
            assert info.compress_type == zipfile.ZIP_STORED


# ---- where they are written ---------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_nothing_is_overwritten(tmp_path, name):
    path = write(tmp_path / name, SMALL)
    before = all_read(path)
    with pytest.raises(InputError, match="exists already"):
        write(path, SMALL)
    assert all_read(path) == before


def test_an_empty_directory_is_filled(tmp_path):
    (tmp_path / "t").mkdir()
    assert all_read(write(tmp_path / "t", SMALL))[1] == META


@pytest.mark.parametrize("name", ["t.json", "t.pt", "t.npy", "t.f32"])
def test_other_endings_are_refused(tmp_path, name):
    with pytest.raises(InputError, match=f"in neither for a directory, found .{name[2:]}"):
        write(tmp_path / name, SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_failure_leaves_nothing_behind(tmp_path, name):
    specs = {n: Spec(a.shape, a.dtype) for n, a in SMALL.items()}
    with pytest.raises(KeyboardInterrupt), output.new_trace(tmp_path / "a" / name, specs, {}):
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_what_was_written_does_not_stay_mapped(tmp_path, name):
    """Else a trace would take as much memory as it is large."""
    specs = {n: Spec(a.shape, a.dtype) for n, a in SMALL.items()}
    with output.new_trace(tmp_path / name, specs, {}) as places:
        place = places["logits"]
        if sys.platform == "linux":
            assert mapped(tmp_path) == 1
        place[...] = 1
        del place
        for tap in places:
            places[tap][...] = 1
        assert mapped(tmp_path) == 0


def mapped(folder):
    """How many maps of files in a folder this process has."""
    maps = Path("/proc/self/maps")
    return maps.read_text().count(f" {folder}/") if maps.exists() else 0


@pytest.mark.parametrize("name", NAMES)
def test_a_full_disk_is_told_before_anything_is_computed(tmp_path, monkeypatch, name):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(InputError, match=rf"{name}: cannot be written: No space left"):
        write(tmp_path / name, SMALL)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_trace_larger_than_the_disk_is_refused(tmp_path, name):
    specs = {"logits": Spec((10**6, 10**12), np.dtype("<f4"))}
    with pytest.raises(InputError, match=r"needs [\d,]+ bytes, but .* has [\d,]+ free"):
        output.room_for(tmp_path / "a" / "b" / name, specs)
    assert output.room_for(tmp_path / name, {"q": Spec((2, 3), np.dtype("<f4"))}) == 24


def test_an_npz_file_needs_room_for_two(tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=30))
    specs = {"q": Spec((2, 3), np.dtype("<f4"))}
    assert output.room_for(tmp_path / "t", specs) == 24
    with pytest.raises(InputError, match="needs 48 bytes"):
        output.room_for(tmp_path / "t.npz", specs)


# ---- what others wrote --------------------------------------------------------------------------


@given(st.dictionaries(plain_names, numbers, min_size=1, max_size=4))
def test_files_of_the_safetensors_library_are_read(folder, tensors):
    path = folder / "other.safetensors"
    safetensors.numpy.save_file({n: np.ascontiguousarray(a) for n, a in tensors.items()}, path)
    assert all_read(path) == ({n: bits(a) for n, a in sorted_as(path, tensors)}, {})


def sorted_as(path, tensors):
    return [(name, tensors[name]) for name in files.read(path).arrays]


@given(st.dictionaries(plain_names, numbers, min_size=1, max_size=4), st.booleans(), st.booleans())
def test_npz_files_of_numpy_are_read(folder, tensors, compressed, big_endian):
    """Compressed or not, of either byte order, in C or Fortran order; bfloat16 comes as V2."""
    path = folder / "other.npz"
    turned = {  # V2 knows no order of bytes
        name: a.astype(a.dtype.newbyteorder(">")) if big_endian and a.dtype.kind == "f" else a
        for name, a in tensors.items()
    }
    given_arrays = {name: np.asfortranarray(a) for name, a in turned.items()}
    (np.savez_compressed if compressed else np.savez)(path, **given_arrays)
    assert all_read(path) == ({n: bits(a) for n, a in tensors.items()}, {})


@given(st.dictionaries(plain_names, numbers, min_size=1, max_size=4))
def test_directories_of_other_programs_are_read(folder, tensors):
    """Without metadata, with more keys than ours, files named as they like."""
    path = fresh(folder / "other")
    path.mkdir()
    code = {kind: name for name, kind in FLOATS.items()}
    items = []
    for i, (name, a) in enumerate(tensors.items()):
        (path / f"{i}.bin").write_bytes(a.tobytes())
        items.append(
            {"name": name, "file": f"{i}.bin", "shape": a.shape, "dtype": code[a.dtype], "n": i}
        )
    (path / "manifest.json").write_text(json.dumps({"arrays": items}))
    assert all_read(path) == ({n: bits(a) for n, a in tensors.items()}, {})


def test_whole_numbers_beside_the_taps_are_ids_and_positions_or_left_out(tmp_path):
    beside = {"input_ids": np.array([[3, 4]]), "position_ids": np.array([[0, 1]], "<i4")}
    beside |= {"mask": np.ones(2, bool), "q_int8": np.ones(2, np.int8), "word": np.array("hello")}
    np.savez(tmp_path / "a.npz", q=np.ones(2), **beside)
    trace = files.read(tmp_path / "a.npz")
    assert list(trace.arrays) == ["q"]
    assert trace.meta == {
        "ids": [3, 4],
        "positions": [0, 1],
        "left_out": ["mask", "q_int8", "word"],
    }
    del beside["word"]
    safetensors.numpy.save_file({"q": np.ones(2), **beside}, tmp_path / "a.safetensors")
    trace = files.read(tmp_path / "a.safetensors")
    assert (trace.meta["ids"], sorted(trace.meta["left_out"])) == ([3, 4], ["mask", "q_int8"])


def test_null_is_as_good_as_absent(tmp_path):
    meta = dict.fromkeys(("ids", "positions", "prefill", "profile", "dtype", "config", "budgets"))
    assert files.read(write(tmp_path / "t", SMALL, meta)).meta == {}
    text = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    np.savez(tmp_path / "a.npz", q=np.ones(2), ids=np.array([4]), __metadata__=text)
    assert files.read(tmp_path / "a.npz").meta == {"ids": [4]}


def test_metadata_win_over_arrays_of_that_name(tmp_path):
    tensors = {"q": np.ones(2, "f4"), "ids": np.array([9])}
    text = {"llama3np": json.dumps({"ids": [1]})}
    safetensors.numpy.save_file(tensors, tmp_path / "a", text)
    assert files.read(tmp_path / "a").meta["ids"] == [1]


# ---- what cannot be read ------------------------------------------------------------------------


class Payload:
    """Unpickled, it would make a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_arrays_of_objects_are_refused_and_not_unpickled(tmp_path):
    objects = np.array([Payload(tmp_path / "made")], dtype=object)
    np.savez(tmp_path / "a.npz", q=objects)
    with pytest.raises(CheckpointError, match=r"a\.npz: the member 'q\.npy': .* not unpickled"):
        files.read(tmp_path / "a.npz")
    assert not (tmp_path / "made").exists()


def archive(**members):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made:
        for name, content in members.items():
            made.writestr(name.replace("_", "."), content)
    return file.getvalue()


def header(text, data=b""):
    text = text.encode()
    return b"\x93NUMPY\x01\x00" + len(text).to_bytes(2, "little") + text + data


HUGE = "{'descr': '<f4', 'fortran_order': False, 'shape': (1000000, 1000000000)}\n"
BAD_FILES = {
    "nothing": (b"", "the file is empty"),
    "text": (b"hello, world", "begins with b'hello, w'"),
    "torch": (archive(data_pkl=b"\x80\x02."), "'data.pkl': expected an array"),
    "no array": (archive(q_npy=b"abc"), "'q.npy': "),
    "no header": (archive(q_npy=header("[1]\n")), "'q.npy': "),
    "huge": (archive(q_npy=header(HUGE)), "expected 4000000000000000 bytes of numbers, found 0"),
    "metadata": (archive(__metadata___npy=b""), "metadata"),
}


@pytest.mark.parametrize("name", BAD_FILES)
def test_what_is_no_trace_is_told_in_one_sentence(tmp_path, name):
    content, words = BAD_FILES[name]
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        all_read(tmp_path / "x")
    assert str(caught.value).startswith(f"{tmp_path / 'x'}: ")
    assert "\n" not in str(caught.value)
    if name != "metadata":
        assert words in str(caught.value)


ITEM = {"name": "q", "file": "q.f32", "shape": [2], "dtype": "f32"}
BAD_MANIFESTS = {
    "no list": ({}, "expected a list of arrays"),
    "metadata": ({"arrays": [], "metadata": 3}, "metadata to be an object"),
    "item": ({"arrays": [7]}, "the array 7: expected name, file, shape"),
    "dtype": ({"arrays": [ITEM | {"dtype": "f8"}]}, "a dtype of f32, f64, f16, bf16"),
    "shape": ({"arrays": [ITEM | {"shape": [-1]}]}, "the array 'q': expected name"),
    "outside": ({"arrays": [ITEM | {"file": "../q.f32"}]}, "found '../q.f32'"),
    "size": ({"arrays": [ITEM | {"shape": [3]}]}, "takes 12 bytes, found 8"),
    "more": ({"arrays": [ITEM | {"shape": [1]}]}, "takes 4 bytes, found 8"),
    "absent": ({"arrays": [ITEM | {"file": "x.f32"}]}, "x.f32: cannot be read"),
    "twice": ({"arrays": [ITEM, ITEM]}, "is there twice"),
    "ids": ({"arrays": [ITEM], "metadata": {"ids": "1,2"}}, "ids: expected a list of whole"),
    "config": ({"arrays": [ITEM], "metadata": {"config": [1]}}, "config: expected an object"),
    "profile": ({"arrays": [ITEM], "metadata": {"profile": {}}}, "profile: expected text"),
    "told dtype": ({"arrays": [ITEM], "metadata": {"dtype": [1]}}, "dtype: expected text"),
    **{
        f"prefill {value}": (
            {"arrays": [ITEM], "metadata": {"prefill": value}},
            "prefill: expected a whole number from 1 on, found",
        )
        for value in ("x", 3.5, 0, True)
    },
    **{
        f"budgets {value}": (
            {"arrays": [ITEM], "metadata": {"budgets": {"float32": value}}},
            "budgets: ",
        )
        for value in (None, [], {"q": 1}, {"q": {"max_abs": 1}}, {"q": {"max_abs": 1, "nmse": "x"}})
    },
}


@pytest.mark.parametrize("name", BAD_MANIFESTS)
def test_a_wrong_manifest_is_told_in_one_sentence(tmp_path, name):
    content, words = BAD_MANIFESTS[name]
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    (tmp_path / "q.f32").write_bytes(bytes(8))
    with pytest.raises(CheckpointError) as caught:
        files.read(tmp_path)
    assert str(caught.value).startswith(str(tmp_path))
    assert words in str(caught.value)


def test_a_directory_without_a_manifest_is_told(tmp_path):
    with pytest.raises(CheckpointError, match=r"expected a directory with manifest\.json"):
        files.read(tmp_path)


@pytest.mark.parametrize("name", ["t.safetensors", "t.npz"])
@settings(max_examples=200)
@given(data=st.data())
def test_spoiled_files_are_read_or_refused_in_one_sentence(folder, name, data):
    """Cut short, or with a few bytes changed: never another error, never a warning."""
    whole = write(fresh(folder / name), SMALL).read_bytes()
    spoiled = bytearray(whole[: data.draw(st.integers(1, len(whole)))])
    places = st.integers(0, len(spoiled) - 1)
    for at in data.draw(st.lists(places, max_size=3)):
        spoiled[at] = data.draw(st.integers(0, 255))
    path = folder / f"spoiled {name}"
    path.write_bytes(spoiled)
    said = refusal(path)
    assert said is None or (str(path) in said and "\n" not in said)


def refusal(path):
    """What is said of a file, or None if it is read."""
    try:
        all_read(path)
    except InputError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", NAMES)
def test_every_cut_is_noticed(folder, name):
    path = write(fresh(folder / name), SMALL)
    file = path / "logits.f32" if path.is_dir() else path
    whole = file.read_bytes()
    for end in range(0, len(whole), 7):
        file.write_bytes(whole[:end])
        with pytest.raises(InputError):
            all_read(path)


def test_numbers_of_an_npz_file_are_checked_when_they_are_read(tmp_path):
    """By the sums that the archive holds."""
    large = SMALL | {"logits": np.arange(20_000, dtype="<f4")}
    path = write(tmp_path / "t.npz", large)
    spoiled = bytearray(path.read_bytes())
    spoiled[spoiled.index(large["logits"][-50:].tobytes())] ^= 1
    path.write_bytes(spoiled)
    found = files.read(path).arrays
    assert_same(found["embed"], large["embed"], "embed")
    with pytest.raises(CheckpointError, match=r"t\.npz: the member 'logits\.npy': Bad CRC"):
        found["logits"]


def test_bfloat16_of_numpy_is_bfloat16(tmp_path):
    np.savez(tmp_path / "a.npz", q=np.array([1.5, -2], ml_dtypes.bfloat16))
    assert files.read(tmp_path / "a.npz").arrays["q"].dtype == ml_dtypes.bfloat16

"""GGUF: the blocks against the gguf package's decoders, the file against its reader and writer."""

import hashlib
import json
import struct
import time
import tracemalloc

import gguf
import ml_dtypes
import numpy as np
import paths
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from llama3np.errors import InputError
from llama3np.kernels import ggml as dequant
from llama3np.kernels.ggml import FORMATS, decode, decode_rows
from llama3np.load import gguf as ours
from llama3np.load.gguf import Raw

BLOCKS = [name for name, form in FORMATS.items() if form.dtype is None]


def assert_same_bits(actual, expected):
    """Equal bits where a number is; a NaN's own bits have no meaning."""
    number = ~np.isnan(expected)
    assert (np.isnan(actual) == ~number).all()
    assert (actual[number].view(np.uint32) == expected[number].view(np.uint32)).all()


# ---- blocks ------------------------------------------------------------------------------------


def test_the_table_of_types_agrees_with_the_gguf_package():
    for name, form in FORMATS.items():
        number = gguf.GGMLQuantizationType[name]
        assert form.number == number
        assert (form.weights, form.nbytes) == gguf.GGML_QUANT_SIZES[number]
    others = {t.value: t.name for t in gguf.GGMLQuantizationType if t.name not in FORMATS}
    assert others == dequant.OTHER_TYPES


@pytest.mark.parametrize("type_name", FORMATS)
@given(data=st.data())
def test_any_block_decodes_as_the_gguf_package_decodes_it(type_name, data):
    """All bytes are drawn, so scales are any float16: subnormal, infinite and NaN ones too."""
    nbytes, n_blocks = FORMATS[type_name].nbytes, 3
    stored = np.frombuffer(
        data.draw(st.binary(min_size=n_blocks * nbytes, max_size=n_blocks * nbytes)), np.uint8
    )
    stored = stored.reshape(1, -1)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(stored, gguf.GGMLQuantizationType[type_name])
    actual = decode(type_name, stored, expected.shape)
    assert_same_bits(actual, np.asarray(expected, np.float32))


@pytest.mark.parametrize("type_name", BLOCKS)
def test_many_random_blocks_decode_alike_in_pieces_of_any_size(type_name, monkeypatch):
    form = FORMATS[type_name]
    stored = np.random.default_rng(3).integers(0, 256, (7, 100 * form.nbytes), np.uint8)
    with np.errstate(all="ignore"):
        expected = gguf.dequantize(stored, gguf.GGMLQuantizationType[type_name])
    for piece in (1 << 20, 3 * form.weights, 250 * form.weights, 1):
        monkeypatch.setattr(dequant, "PIECE", piece)
        assert_same_bits(decode(type_name, stored, expected.shape), expected)
        rows = np.empty(expected.shape, np.float32)
        decode_rows(type_name, stored, rows)
        assert_same_bits(rows, expected)


ONE, TWO = struct.pack("<e", 1), struct.pack("<e", 2)
COUNT = bytes(range(0xF0, 0, -0x0F))[:16]  # low nibbles 0, 1, 2, ..., high nibbles 15, 14, 13, ...
LOW, HIGH = list(range(16)), list(range(15, -1, -1))


@pytest.mark.parametrize(
    ("type_name", "block", "expected"),
    [
        ("Q4_0", TWO + COUNT, [2 * (q - 8) for q in LOW + HIGH]),
        ("Q4_1", TWO + ONE + COUNT, [2 * q + 1 for q in LOW + HIGH]),
        (
            "Q5_0",
            TWO + b"\x01\0\0\x80" + COUNT,
            [2 * (q - 16) for q in [16, *LOW[1:], *HIGH[:15], 16]],
        ),
        (
            "Q5_1",
            TWO + ONE + b"\x01\0\0\x80" + COUNT,
            [2 * q + 1 for q in [16, *LOW[1:], *HIGH[:15], 16]],
        ),
        ("Q8_0", TWO + bytes(range(240, 256)) + bytes(16), [*range(-32, 0, 2), *[0] * 16]),
        ("Q6_K", bytes(192) + b"\1" * 8 + b"\xff" * 8 + TWO, [-64] * 128 + [64] * 128),
    ],
)
def test_blocks_by_hand(type_name, block, expected):
    assert decode(type_name, np.frombuffer(block, np.uint8), (len(expected),)).tolist() == expected


def test_every_tensor_of_smollm2_has_the_sha256_of_another_implementation():
    golden = json.loads((paths.GOLDENS / "smollm2_dequant_sha256.json").read_text("utf-8"))
    file = ours.read(paths.smollm2_gguf())
    assert set(file.tensors) == set(golden["tensors"])
    for name, expected in golden["tensors"].items():
        info = file.tensors[name]
        assert (info.type, list(info.shape)) == (expected["type"], expected["shape"])
        weights = decode(info.type, file.stored(name), info.shape)
        assert hashlib.sha256(weights).hexdigest() == expected["sha256"], name


# ---- files -------------------------------------------------------------------------------------

keys = st.text(min_size=1, max_size=12).filter(lambda key: key != "general.alignment")
scalars = [st.booleans(), st.integers(-(2**63), 2**64 - 1), st.floats(allow_nan=False), st.text()]
signed = st.integers(-(2**63), 2**63 - 1)
values = st.one_of(*scalars, *(st.lists(s) for s in (scalars[0], signed, scalars[2], scalars[3])))
metadatas = st.dictionaries(keys, values, max_size=6)

DTYPES = [np.float32, np.float16, ml_dtypes.bfloat16]


@st.composite
def tensor_dicts(draw):
    """Random bits of any of the types, 1 to 4 dimensions."""
    tensors = {}
    for name in draw(st.lists(st.text(max_size=8), unique=True, max_size=4)):
        rng = np.random.default_rng(draw(st.integers(0, 99)))
        shape = tuple(draw(st.lists(st.integers(1, 4), min_size=1, max_size=4)))
        if draw(st.booleans()):
            dtype = np.dtype(draw(st.sampled_from(DTYPES)))
            bits = rng.integers(0, 256, (*shape[:-1], shape[-1] * dtype.itemsize), np.uint8)
            tensors[name] = bits.view(dtype)
        else:
            form = FORMATS[type_name := draw(st.sampled_from(BLOCKS))]
            blocks = rng.integers(0, 256, (*shape[:-1], shape[-1] * form.nbytes), np.uint8)
            tensors[name] = Raw(type_name, (*shape[:-1], shape[-1] * form.weights), blocks)
    return tensors


def as_raw(tensor):
    if isinstance(tensor, Raw):
        return tensor.type, tensor.shape, tensor.blocks.tobytes()
    name = {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}[tensor.dtype.name]
    return name, tensor.shape, tensor.tobytes()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("gguf")


def fresh(folder, name="x.gguf"):
    """A path in the folder at which there is nothing."""
    path = folder / name
    path.unlink(missing_ok=True)
    return path


@given(metadata=metadatas, tensors=tensor_dicts(), version=st.sampled_from([2, 3]))
@example({"short": 0.1, "shorts": [0.1, -1e-5], "long": 1 / 3, "longs": [0.1, 1 / 3]}, {}, 3)
def test_what_is_written_is_read(folder, metadata, tensors, version):
    path = fresh(folder)
    ours.write(path, metadata, tensors, version)
    file = ours.read(path)
    assert file.version == version
    assert file.metadata == metadata
    assert [type(v) for v in file.metadata.values()] == [type(v) for v in metadata.values()]
    assert list(file.tensors) == list(tensors)
    for name, tensor in tensors.items():
        info = file.tensors[name]
        assert (info.type, info.shape, file.stored(name).tobytes()) == as_raw(tensor)
        assert info.offset % 32 == 0


@given(metadata=metadatas, tensors=tensor_dicts(), alignment=st.sampled_from([8, 32, 64, 4096]))
def test_the_gguf_package_reads_what_is_written(folder, metadata, tensors, alignment):
    tensors = {f"t{i}": tensor for i, tensor in enumerate(tensors.values())}
    metadata = {f"k.{i}": v for i, v in enumerate(metadata.values()) if v != []}  # it reads no []
    path = fresh(folder)
    ours.write(path, metadata | {"general.alignment": alignment}, tensors)
    theirs = gguf.GGUFReader(path)
    assert theirs.alignment == alignment
    for key, value in metadata.items():
        found = theirs.fields[key].contents()
        assert found == value or np.allclose(found, np.float32(value), rtol=0, atol=0)
    for tensor in theirs.tensors:
        type_name, shape, stored = as_raw(tensors[tensor.name])
        assert tensor.tensor_type.name == type_name
        assert tuple(tensor.shape[::-1]) == shape
        assert tensor.data.tobytes() == stored
    assert len(theirs.tensors) == len(tensors)


def test_what_the_gguf_package_writes_is_read(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "w.gguf", "llama")
    for number_type in ("uint8", "int8", "uint16", "int16", "uint32", "int32", "uint64", "int64"):
        getattr(writer, f"add_{number_type}")(number_type, 100)
    writer.add_float32("f32", 1e-5)
    writer.add_float64("f64", 1 / 3)
    writer.add_bool("yes", True)
    writer.add_string("text", "naïve 漢")
    writer.add_array("words", ["Ġa", "", "b"])
    writer.add_array("numbers", [1, -2, 3])
    writer.add_array("reals", [0.5, 0.25])
    writer.add_array("flags", [True, False])
    matrix = np.random.default_rng(0).standard_normal((6, 64)).astype(np.float32)
    writer.add_tensor("f32", matrix)
    writer.add_tensor("f16", matrix.astype(np.float16))
    kind = gguf.GGMLQuantizationType.Q8_0
    writer.add_tensor("q8", gguf.quantize(matrix, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    file = ours.read(tmp_path / "w.gguf")
    assert file.metadata["general.architecture"] == "llama"
    assert all(file.metadata[t] == 100 for t in ("uint8", "int16", "uint32", "int64"))
    assert file.metadata["f32"] == 1e-5
    assert file.metadata["f64"] == 1 / 3
    assert file.metadata["yes"] is True
    assert file.metadata["text"] == "naïve 漢"
    assert file.metadata["words"] == ["Ġa", "", "b"]
    assert file.metadata["numbers"] == [1, -2, 3]
    assert file.metadata["reals"] == [0.5, 0.25]
    assert file.metadata["flags"] == [True, False]
    assert (ours.plain_array(file, "f32") == matrix).all()
    assert (ours.plain_array(file, "f16") == matrix.astype(np.float16)).all()
    decoded = decode("Q8_0", file.stored("q8"), (6, 64))
    assert (decoded == gguf.dequantize(gguf.quantize(matrix, kind), kind)).all()
    with pytest.raises(InputError, match=r"'q8'.*Q8_0"):
        ours.plain_array(file, "q8")


def test_plain_arrays_lie_in_the_map(tmp_path):
    ours.write(tmp_path / "x.gguf", {}, {"a": np.ones((3, 4), np.float32)})
    array = ours.plain_array(ours.read(tmp_path / "x.gguf"), "a")
    assert not array.flags.owndata
    assert not array.flags.writeable
    assert type(array.base).__name__ == "mmap"


def test_a_vocabulary_of_llama_3_size_opens_within_a_second(tmp_path):
    tokens = [f"Ġtoken{i}" for i in range(128_256)]
    merges = [f"Ġtok en{i}" for i in range(280_147)]
    ours.write(
        tmp_path / "v.gguf", {"tokens": tokens, "merges": merges, "types": [1] * 128_256}, {}
    )
    start = time.perf_counter()
    file = ours.read(tmp_path / "v.gguf")
    assert time.perf_counter() - start < 1
    assert (file.metadata["tokens"], file.metadata["merges"]) == (tokens, merges)


# ---- files that are not as they should be ------------------------------------------------------


def text(chars):
    utf8 = chars.encode()
    return struct.pack("<Q", len(utf8)) + utf8


def header(n_tensors=0, n_pairs=0, version=3):
    return b"GGUF" + struct.pack("<IQQ", version, n_tensors, n_pairs)


def info(name="a", dims=(32,), number=0, offset=0):
    shape = struct.pack(f"<I{len(dims)}Q", len(dims), *dims)
    return text(name) + shape + struct.pack("<IQ", number, offset)


def padded(head, data=b""):
    return head + bytes(-len(head) % 32) + data


BIG = 2**63
HOSTILE = {
    "empty": (b"", "empty"),
    "short header": (b"GGUF\3\0", "header: expected 8 more bytes"),
    "text": (b"{hello world, this is a text file}", "begins with b'{hel'"),
    "version 1": (header(version=1), "version 2 or 3, found 1"),
    "version 9": (header(version=9), "version 2 or 3, found 9"),
    "big endian": (b"GGUF" + struct.pack(">IQQ", 3, 0, 0), "big-endian"),
    "tensor count": (header(n_tensors=BIG), "tensor infos"),
    "pair count": (header(n_pairs=BIG), "metadata pairs"),
    "key length": (header(n_pairs=1) + struct.pack("<Q", BIG) + bytes(32), "cut short"),
    "value type": (header(n_pairs=1) + text("k") + struct.pack("<IQ", 13, 0), "'k'.*0 to 12.*13"),
    "string length": (header(n_pairs=1) + text("k") + struct.pack("<IQQ", 8, BIG, 0), "cut short"),
    "not UTF-8": (header(n_pairs=1) + text("k") + struct.pack("<IQ", 8, 4) + b"\xff" * 4, "UTF-8"),
    "array count": (header(n_pairs=1) + text("k") + struct.pack("<IIQ", 9, 4, BIG), "more bytes"),
    "strings": (header(n_pairs=1) + text("k") + struct.pack("<IIQ", 9, 8, BIG), "more bytes"),
    "string in strings": (
        header(n_pairs=1) + text("k") + struct.pack("<IIQQQ", 9, 8, 2, BIG, 0),
        "cut short",
    ),
    "strings cut": (
        header(n_pairs=1) + text("k") + struct.pack("<IIQQQ", 9, 8, 2, 8, 0),
        "1 of 2 strings",
    ),
    "nested array": (
        header(n_pairs=1) + text("k") + struct.pack("<IIQIQ", 9, 9, 1, 4, 0),
        "array of numbers or strings, found type 9",
    ),
    "key twice": (header(n_pairs=2) + 2 * (text("k") + struct.pack("<IQ", 10, 1)), "'k' stands tw"),
    "alignment 0": (
        header(n_pairs=1) + text("general.alignment") + struct.pack("<II", 4, 0),
        "alignment.*power of 2, found 0",
    ),
    "alignment 24": (
        header(n_pairs=1) + text("general.alignment") + struct.pack("<II", 4, 24),
        "alignment.*power of 2, found 24",
    ),
    "alignment text": (
        header(n_pairs=1) + text("general.alignment") + struct.pack("<I", 8) + text("x"),
        "alignment.*power of 2",
    ),
    "5 dims": (padded(header(1) + info(dims=(1,) * 5)), "'a'.*1 to 4 dimensions, found 5"),
    "no dims": (padded(header(1) + info(dims=()) + bytes(32)), "'a'.*1 to 4 dimensions, found 0"),
    "dims count": (padded(header(1) + text("a") + b"\xff" * 4 + bytes(64)), "1 to 4 dimensions"),
    "zero dim": (padded(header(1) + info(dims=(32, 0))), r"'a'.*dimensions >= 1.*\[32, 0\]"),
    "huge dims": (padded(header(1) + info(dims=(BIG, BIG, BIG, BIG))), "'a'.*the file has"),
    "part of a block": (padded(header(1) + info(dims=(31,), number=8)), "multiple of 32 for Q8_0"),
    "IQ4_XS": (padded(header(1) + info(number=23)), "'a'.*expected a type of F32.*found IQ4_XS"),
    "unknown type": (padded(header(1) + info(number=999)), "'a'.*found number 999"),
    "unaligned": (padded(header(1) + info(offset=4), bytes(256)), "'a'.*aligned to 32, found 4"),
    "offset": (padded(header(1) + info(offset=2**64 - 32), bytes(256)), "'a'.*the file has"),
    "cut data": (padded(header(1) + info(), bytes(127)), "'a'.*end at byte.*complete"),
    "twice": (padded(header(2) + info() + info(offset=128), bytes(256)), "'a' stands twice"),
    "overlap": (padded(header(2) + info() + info("b", offset=96), bytes(256)), "'b'.*inside"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_file_is_an_input_error_that_costs_nothing(tmp_path, case):
    content, told = HOSTILE[case]
    path = tmp_path / "x.gguf"
    path.write_bytes(content)
    tracemalloc.start()
    try:
        with pytest.raises(InputError, match=f"x.gguf: .*{told}"):
            ours.read(path)
        assert tracemalloc.get_traced_memory()[1] < 1_000_000
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("value", [None, {}, [1, "a"], [[1]], 2**64, -(2**63) - 1, [2**63], 1j])
def test_metadata_that_has_no_type_is_refused(tmp_path, value):
    with pytest.raises(InputError, match="'k'"):
        ours.write(tmp_path / "x.gguf", {"k": value}, {})
    assert list(tmp_path.iterdir()) == []


def test_tensors_that_cannot_be_written_are_refused(tmp_path):
    path = tmp_path / "x.gguf"
    with pytest.raises(InputError, match=r"'a'.*float64"):
        ours.write(path, {}, {"a": np.ones(3)})
    with pytest.raises(InputError, match=r"'a'.*Q8_0.*takes 34 bytes.*found 33"):
        ours.write(path, {}, {"a": Raw("Q8_0", (32,), np.zeros(33, np.uint8))})
    with pytest.raises(InputError, match="version 2 or 3, found 1"):
        ours.write(path, {}, {}, version=1)
    with pytest.raises(InputError, match=r"alignment.*power of 2, found 24"):
        ours.write(path, {"general.alignment": 24}, {})
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path):
    (tmp_path / "x.gguf").write_text("precious")
    with pytest.raises(InputError, match="exists already"):
        ours.write(tmp_path / "x.gguf", {}, {})
    assert (tmp_path / "x.gguf").read_text() == "precious"

"""Every file format, spoiled: a correct load, or a CheckpointError that names the file.

Nothing else may come of a file: no other exception, no time, no memory beyond twice its size, no
code of its own. `make fuzz` runs thousands of cases; the suite a few hundred.
"""

import json
import os
import shutil
import struct
import sys
import time
import tracemalloc
import zipfile
import zlib
from collections import Counter
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import test_pieces
import torches
import vocabularies
from hypothesis import given
from hypothesis import strategies as st
from test_load import version_1
from test_tokenizer import small, with_
from vocabularies import llama2c_bytes

import llama3np.params
from llama3np import tokenizer
from llama3np.config import Config, RopeScaling
from llama3np.errors import CheckpointError
from llama3np.load import inspect, load_checkpoint, save_gguf, save_hf, save_llama2c, save_meta

BF16 = np.dtype(ml_dtypes.bfloat16)
PLAIN = Config(dim=8, n_layers=2, n_heads=4, n_kv_heads=2, head_dim=2, ffn_dim=6, vocab_size=6)
SCALED = replace(PLAIN, rope_scaling=RopeScaling(8.0, 1.0, 4.0, 8192), tied=True)
SECONDS = 20  # a case takes milliseconds; a loaded machine must not fail it
SLACK = 8 << 20  # what Python takes for a file of any size
COUNTS: Counter[str] = Counter()

# ---- one intact checkpoint of each format: what writes it, and what reads it --------------------


def params(config, dtype=np.float32):
    return llama3np.params.random(config, np.random.default_rng(0), dtype)


def hugging_face(folder, config=PLAIN, **options):
    save_hf(folder / "hf", config, params(config), **options)
    (folder / "hf" / "generation_config.json").write_text('{"eos_token_id": [1, 2]}')
    return folder / "hf"


def with_tokenizer(folder):
    path = hugging_face(folder)
    (path / "tokenizer.json").write_text(json.dumps(small()))
    (path / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    return path


def gguf(folder):
    config = replace(SCALED, vocab_size=7, head_dim=64)  # so many that divisors tell the factor
    metadata = {key: np.asarray(v).tolist() for key, v in with_().items()}
    save_gguf(folder / "x.gguf", config, params(config, BF16), metadata)
    return folder / "x.gguf"


def gguf_of_pieces(folder):
    metadata = test_pieces.metadata(test_pieces.library())
    config = replace(PLAIN, vocab_size=len(test_pieces.library()))
    save_gguf(folder / "x.gguf", config, params(config), metadata)
    return folder / "x.gguf"


def json_of_pieces(folder):
    file = test_pieces.tokenizer_json(test_pieces.library())
    (folder / "tokenizer.json").write_text(json.dumps(file))
    return folder / "tokenizer.json"


def sentencepiece(folder):
    (folder / "tokenizer.model").write_bytes(test_pieces.model())
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    return folder / "tokenizer.model"


def llama2c(folder):
    config = replace(PLAIN, vocab_size=260)
    save_llama2c(folder / "x.bin", config, params(config))
    (folder / "tokenizer.bin").write_bytes(llama2c_bytes([(-1.0, " ")]))
    return folder / "x.bin"


def llama2c_1(folder):
    (folder / "x.bin").write_bytes(version_1(PLAIN, params(PLAIN)))
    return folder / "x.bin"


def meta(folder):
    save_meta(folder / "meta", SCALED, params(SCALED, BF16))
    return folder / "meta"


def meta_shards(folder):
    save_meta(folder / "meta", PLAIN, params(PLAIN), 2)
    return folder / "meta"


def ranks(folder):
    (folder / "tokenizer.model").write_bytes(b"\n".join(vocabularies.rank_lines()) + b"\n")
    return folder / "tokenizer.model"


def pieces(folder):
    (folder / "tok.bin").write_bytes(llama2c_bytes([(-1.0, "a"), (-2.0, " "), (-3.0, " a")]))
    return folder / "tok.bin"


def sharded(folder):
    return hugging_face(folder, shard_bytes=1200)


def scaled(folder):
    return hugging_face(folder, SCALED)


def read_model(path):
    checkpoint = load_checkpoint(path)
    llama3np.params.check(checkpoint.params, checkpoint.config)
    inspect(path)
    if checkpoint.tokenizer:
        checkpoint.tokenizer.encode("a b")
    for w in llama3np.params.named(checkpoint.params, checkpoint.config.tied).values():
        assert len(np.asarray(w[0:1] if w.ndim == 2 else w).tobytes()) > 0


def read_pieces(path):
    tokenizer.from_llama2c(path).encode("a b")


def read_tokenizer_model(path):
    tokenizer.from_tokenizer_model(path).encode("a b")


def read_tokenizer_json(path):
    tokenizer.from_tokenizer_json(path).encode("a b")


FORMATS = {
    "hugging_face": (scaled, read_model),
    "sharded": (sharded, read_model),
    "tokenizer_json": (with_tokenizer, read_model),
    "gguf": (gguf, read_model),
    "llama2c": (llama2c, read_model),
    "llama2c_1": (llama2c_1, read_model),
    "meta": (meta, read_model),
    "meta_shards": (meta_shards, read_model),
    "gguf_of_pieces": (gguf_of_pieces, read_model),
    "llama2c_tokenizer": (pieces, read_pieces),
    "json_of_pieces": (json_of_pieces, read_tokenizer_json),
    "sentencepiece": (sentencepiece, read_tokenizer_model),
}


# ---- what is done to it ------------------------------------------------------------------------

LENGTHS = [0, 1, 2, 7, 2**15, 2**16 - 1, 2**31 - 1, 2**32 - 1, 2**40, 2**62, 2**63 - 1, 2**64 - 1]
VALUES = [None, True, False, -1, 0, 1, 3, 2**31, 2**63, 10**30, 0.5, -1e308, float("nan")]
VALUES += [float("inf"), "", "x", "../x", "/etc/hostname", "\0", "a" * 300, "\ud800", [], {}, [[]]]
new_bytes = st.one_of(
    st.integers(0, 255).map(lambda byte: bytes([byte])),
    st.sampled_from(LENGTHS).map(lambda n: struct.pack("<Q", n)),
    st.sampled_from(LENGTHS[:8]).map(lambda n: struct.pack("<I", n)),
    st.binary(max_size=12),
)


def place(draw, content):
    """Anywhere, but most often near the beginning or the end, where formats keep their tables."""
    near = draw(st.integers(0, min(400, len(content))))
    return draw(st.sampled_from([near, len(content) - near, draw(st.integers(0, len(content)))]))


def overwrite(content, draw):
    at, new = place(draw, content), draw(new_bytes)
    return content[:at] + new + content[at + len(new) :]


def cut(content, draw):
    return content[: place(draw, content)]


def insert(content, draw):
    at = place(draw, content)
    return content[:at] + draw(new_bytes) + content[at:]


def leave_out(content, draw):
    at = place(draw, content)
    return content[:at] + content[at + draw(st.integers(1, 16)) :]


def repeat(content, draw):
    """Copy a stretch over another place: offsets that overlap, entries that stand twice."""
    source, target, length = place(draw, content), place(draw, content), draw(st.integers(1, 64))
    stretch = content[source : source + length]
    return content[:target] + stretch + content[target + len(stretch) :]


def spoiled(value, draw):
    """A JSON value with one thing somewhere in it replaced, gone or added."""
    if not isinstance(value, (dict, list)) or not value or draw(st.integers(0, 5)) == 0:
        return draw(st.sampled_from(VALUES))
    copy = value.copy()
    key = draw(st.sampled_from(sorted(value) if isinstance(value, dict) else range(len(value))))
    action = draw(st.sampled_from(["deeper", "deeper", "deeper", "delete", "add"]))
    if action == "deeper":
        copy[key] = spoiled(value[key], draw)
    elif action == "delete":
        del copy[key]
    elif isinstance(copy, dict):
        copy[draw(st.sampled_from(["x", "", f"{key}.x"]))] = draw(st.sampled_from(VALUES))
    else:
        copy.append(draw(st.sampled_from(VALUES)))
    return copy


def json_value(content, draw):
    return json.dumps(spoiled(json.loads(content), draw)).encode()


def nest(content, draw):
    """Brackets without end: the parser's stack is not Python's."""
    return draw(st.sampled_from([b"[", b'{"a":'])) * draw(st.sampled_from([900, 200_000]))


def header_value(content, draw):
    """The JSON header of a safetensors file, its length set right."""
    (length,) = struct.unpack_from("<Q", content)
    text = json_value(content[8 : 8 + length], draw)
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


BYTES = (overwrite, overwrite, overwrite, cut, insert, leave_out, repeat)
EDITS = {".json": (*BYTES, json_value, json_value, json_value, nest)}
EDITS |= {".safetensors": (*BYTES, header_value, header_value, header_value)}


def edit(path, draw):
    """The file with other bytes."""
    if path.suffix == ".pth" and draw(st.booleans()):
        edit_member(path, draw)
    else:
        change = draw(st.sampled_from(EDITS.get(path.suffix, BYTES)))
        path.write_bytes(change(path.read_bytes(), draw))


def edit_member(path, draw):
    """A member of the archive with other bytes, in an archive that is right."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    name = draw(st.sampled_from([*sorted(members), *[n for n in members if n.endswith("pkl")] * 9]))
    members[name] = draw(st.sampled_from(BYTES))(members[name], draw)
    torches.archive(path, members)


def remove(path, draw):
    path.unlink()


def rename(path, draw):
    number = draw(st.sampled_from(["02", "1", "00", "99", "-1", "x"]))
    name = path.name.replace("01", number).replace("00", number, 1)
    path.rename(path.with_name(name if name != path.name else "renamed" + path.suffix))


def double(path, draw):
    name = path.name.replace("00", draw(st.sampled_from(["01", "02", "03", "4"])), 1)
    shutil.copyfile(path, path.with_name(name))


def link(path, draw):
    """In its place a link: to itself, to nothing, to a sibling, upwards, to what has no end."""
    siblings = [file.name for file in sorted(path.parent.iterdir())]
    target = draw(st.sampled_from([*siblings, "absent", "..", ".", "/dev/zero", "/dev/null"]))
    path.unlink()
    path.symlink_to(target)


def pipe(path, draw):
    path.unlink()
    os.mkfifo(path)


def folder_in_place(path, draw):
    path.unlink()
    path.mkdir()


# What a change raises where an earlier one has spoiled the file so that it cannot be changed again.
SPOILED = (OSError, ValueError, RecursionError, struct.error, zipfile.BadZipFile, RuntimeError)
SPOILED += (NotImplementedError, EOFError, zlib.error)
CHANGES = (edit,) * 20 + (remove, rename, double, link, link, pipe, folder_in_place)


def spoil(path, draw):
    files = sorted(path.iterdir()) if path.is_dir() else sorted(path.parent.iterdir())
    for _ in range(draw(st.integers(1, 3))):
        file = draw(st.sampled_from(files))
        if file.is_file() and not file.is_symlink():
            change = draw(st.sampled_from(CHANGES))
            if change is not double or "00" in file.name:
                with suppress(*SPOILED):
                    change(file, draw)


# ---- what may come of it -----------------------------------------------------------------------

FORBIDDEN = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "subprocess.Popen")
FORBIDDEN += ("socket.connect", "pickle.find_class", "os.remove", "os.rename", "os.mkdir")
WATCH = {"on": False, "seen": []}


def audit(event, arguments):
    if WATCH["on"]:
        mode = arguments[1] if event == "open" else None
        writes = isinstance(mode, str) and set(mode) & set("wxa+")
        if event in FORBIDDEN or writes:
            WATCH["seen"].append((event, arguments))


sys.addaudithook(audit)


@contextmanager
def bounded(size):
    """Fail if what is inside takes long, more memory than twice `size`, or leaves the process.

    Nothing is checked if it raises: pytest.raises stands within, not around.
    """
    WATCH.update(on=True, seen=[])
    start = time.perf_counter()
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
        WATCH["on"] = False
    assert peak <= 2 * size + SLACK, f"{peak} bytes allocated for a file of {size}"
    assert time.perf_counter() - start < SECONDS
    assert WATCH["seen"] == []


def size_of(path):
    files = path.rglob("*") if path.is_dir() else path.parent.iterdir()
    return sum(file.stat().st_size for file in files if file.is_file())


def read_or_refuse(read, path):
    told = None
    with bounded(size_of(path)):
        try:
            read(path)
        except CheckpointError as error:
            told = str(error)
    COUNTS["refused" if told else "loaded"] += 1
    if told is not None:
        assert path.name in told or path.parent.name in told, told
        assert len(told) < 2000
        assert "\n" not in told.split("found something else")[0]


@pytest.fixture(scope="module", params=FORMATS)
def intact(request, tmp_path_factory):
    """(a folder with an intact checkpoint, its path in there, what reads it)."""
    folder = tmp_path_factory.mktemp("intact") / request.param
    folder.mkdir()
    write, read = FORMATS[request.param]
    path = write(folder)
    read(path)
    return folder, path.relative_to(folder), read


def restored(intact):
    """The path of a fresh copy of the intact checkpoint."""
    folder, path, _ = intact
    copy = folder.with_name(folder.name + ".spoiled")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    return copy / path


@given(data=st.data())
def test_a_spoiled_file_loads_or_is_a_checkpoint_error(intact, data):
    path = restored(intact)
    spoil(path, data.draw)
    read_or_refuse(intact[2], path)


@pytest.fixture(scope="module")
def rank_file(tmp_path_factory):
    return ranks(tmp_path_factory.mktemp("ranks"))


@given(data=st.data())
def test_a_spoiled_rank_file_is_read_or_is_a_checkpoint_error(rank_file, data):
    """The slow one: two megabytes of lines."""
    content = rank_file.read_bytes()
    path = rank_file.with_name("spoiled.model")
    path.write_bytes(data.draw(st.sampled_from(BYTES))(content, data.draw))
    told = None
    try:
        read_tokenizer_model(path)
    except CheckpointError as error:
        told = str(error)
    COUNTS["refused" if told else "loaded"] += 1
    assert told is None or path.name in told


STARTS = [b"", b"GGUF\3\0\0\0", b"24ka\1\0\0\0", b"PK\3\4", b"\x80\2", b"PK\5\6", b"{", b"\n\x0e\n"]
NAMES = ["model.safetensors", "consolidated.00.pth", "tokenizer.model", "x.gguf", "config.json"]


@given(st.sampled_from(STARTS), st.binary(max_size=200), st.sampled_from(NAMES), st.booleans())
def test_any_bytes_load_or_are_a_checkpoint_error(tmp_path_factory, start, content, name, beside):
    folder = tmp_path_factory.getbasetemp() / "any"
    shutil.rmtree(folder, ignore_errors=True)
    save_meta(folder, PLAIN, params(PLAIN))
    (folder / "config.json").write_text("{}")
    (folder / name).write_bytes(start + content)
    read_or_refuse(read_model, folder if beside else folder / name)


@pytest.mark.parametrize(
    "path", ["absent", "absent/x", "a" * 300, "a\0b", "\ud800", "/dev/zero", "/dev/null", "loop"]
)
def test_a_path_that_is_no_checkpoint_is_told(tmp_path, path):
    (tmp_path / "loop").symlink_to("loop")
    with bounded(0), pytest.raises(CheckpointError):
        load_checkpoint(tmp_path / path)


# ---- what small files do not show --------------------------------------------------------------


def large(content, size=12 << 20):
    return content * (size // len(content))


LARGE = {
    "config.json of lists": ("hf/config.json", lambda: b'{"a":[' + large(b"[],") + b"[]]}"),
    "header of lists": (
        "hf/model.safetensors",
        lambda: struct.pack("<Q", 12 << 20) + (b'{"a":[' + large(b"[],")).ljust(12 << 20),
    ),
    "empty pickles": ("meta/consolidated.00.pth", lambda: pickle_archive(large(b"}"))),
    "many dicts": ("meta/consolidated.00.pth", lambda: pickle_archive(large(b"}", (1 << 22) - 9))),
    "many members": ("meta/consolidated.00.pth", lambda: many_members(400_000)),
    "gguf strings": ("x.gguf", lambda: gguf_array(8, struct.pack("<Q", 2) + b"xy", 3 << 20)),
    "gguf bytes": ("x.gguf", lambda: gguf_array(0, b"\0", 1 << 24)),
    "gguf floats": ("x.gguf", lambda: gguf_array(6, b"\0\0\x80\x3f", 1 << 22)),
    "gguf tensors": ("x.gguf", lambda: gguf_tensors(300_000)),
}


def pickle_archive(content):
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"fuzz-{os.getpid()}.pth"
    torches.archive(path, {"archive/data.pkl": b"\x80\2" + content + b"."})
    data = path.read_bytes()
    path.unlink()
    return data


def many_members(count):
    """Empty files with names of six digits: all as it should be, but for their number."""
    names = [b"%06d" % i for i in range(count)]
    local = struct.pack("<4s5H3L2H", b"PK\3\4", *[0] * 8, 6, 0)
    data = b"".join(local + name for name in names)
    start = struct.pack("<4s6H3L5H", b"PK\1\2", *[0] * 9, 6, 0, 0, 0, 0)
    directory = b"".join(start + struct.pack("<2L", 0, 36 * i) + n for i, n in enumerate(names))
    place = len(directory), len(data)
    zip64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 0, 0, 0, 0, count, count, *place)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, sum(place), 1)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, 0xFFFF, 0xFFFF, 0, 0, 0)
    return data + directory + zip64 + locator + end


def gguf_tensors(count):
    """Tensors of one number in one place."""
    infos = (struct.pack("<Q8sIQIQ", 8, b"%08d" % i, 1, 1, 0, 0) for i in range(count))
    return gguf_header(count, 0) + b"".join(infos) + bytes(64)


def gguf_array(kind, item, count):
    pair = struct.pack("<Q1sIIQ", 1, b"a", 9, kind, count) + item * count
    return gguf_header(0, 1) + pair


def gguf_header(n_tensors, n_pairs):
    return b"GGUF" + struct.pack("<IQQ", 3, n_tensors, n_pairs)


@pytest.mark.parametrize("case", LARGE)
def test_a_large_file_of_small_things_is_not_made_into_objects(tmp_path, case):
    """A list of JSON has two bytes, and 56 as an object: there is an end no model comes near."""
    file, content = LARGE[case]
    scaled(tmp_path)
    meta(tmp_path)
    (tmp_path / file).write_bytes(content())
    path = tmp_path / file if file == "x.gguf" else (tmp_path / file).parent
    size = (tmp_path / file).stat().st_size
    with bounded(max(size, 32 << 20)), pytest.raises(CheckpointError, match=path.name):
        load_checkpoint(path)

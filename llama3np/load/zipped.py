"""Zip archives as PyTorch writes them: read in place, and written with aligned members.

The standard library's reader copies what it reads; here a member stays a place in the map. Only
what PyTorch writes is read: stored members, a directory that ends the file, one disk.
Format: PKWARE's APPNOTE.TXT, sections 4.3 and 4.5.3 (zip64).
"""

from __future__ import annotations

import mmap
import struct
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import BinaryIO, NamedTuple

from llama3np.errors import CheckpointError

MAGIC = b"PK\x03\x04"
ALIGNMENT = 64  # of each member's first byte, as PyTorch has it
MAX_MEMBERS = 100_000  # a model of 126 layers has 1,137 tensors

_END = struct.Struct("<4s4H2LH")  # directory: entries, bytes and place are the last but one three
_END64_LOCATOR = struct.Struct("<4sLQL")
_END64 = struct.Struct("<4sQ2H2L4Q")
_ENTRY = struct.Struct("<4s6H3L5H2L")  # of the directory
_LOCAL = struct.Struct("<4s5H3L2H")  # before each member's bytes
_ZIP64_EXTRA = 1
_FULL32 = 0xFFFFFFFF  # stands for a number in the zip64 extra


class Member(NamedTuple):
    """One file of the archive: its bytes are data[start:stop] of the map."""

    start: int
    stop: int


class _Entry(NamedTuple):
    name: str
    flags: int
    method: int
    stored: int  # bytes in the archive
    size: int  # bytes of the member
    header: int  # where its local header begins


def members(data: mmap.mmap, path: Path) -> dict[str, Member]:
    """Name -> place of every member.

    Raises CheckpointError for an archive that is cut short or damaged, and for a member that is
    compressed, encrypted, there twice, or lies over another.
    """
    archive = _Archive(data, path)
    found: dict[str, Member] = {}
    for entry in archive.entries():
        if entry.name in found:
            raise archive.fail(f"the member {entry.name[:200]!r} is there twice")
        found[entry.name] = archive.member(entry)
    places = sorted((place, name) for name, place in found.items())
    for (before, _), (after, name) in pairwise(places):
        if after.start < before.stop:
            raise archive.fail(f"the member {name[:200]!r} lies over another")
    return found


class _Archive:
    def __init__(self, data: mmap.mmap, path: Path):
        self.data, self.path = data, path

    def fail(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path}: zip archive: {what}")

    def unpack(self, form: struct.Struct, magic: bytes, offset: int, what: str) -> tuple:
        """A record at `offset`, without its magic."""
        if not 0 <= offset <= len(self.data) - form.size:
            raise self.fail(f"{what}: expected {form.size} bytes at {offset}, found the file's end")
        found, *fields = form.unpack_from(self.data, offset)
        if found != magic:
            raise self.fail(f"{what}: expected {magic!r} at {offset}, found {found!r}")
        return tuple(fields)

    def directory(self) -> tuple[int, int, int]:
        """The number of entries, where they begin, and where they end."""
        end = len(self.data) - _END.size
        what = "its directory (is the file complete?)"
        *_, count, size, start, _ = self.unpack(_END, b"PK\x05\x06", end, what)
        if count == 0xFFFF or size == _FULL32 or start == _FULL32:
            _, at, _ = self.unpack(_END64_LOCATOR, b"PK\x06\x07", end - _END64_LOCATOR.size, what)
            *_, count, size, start = self.unpack(_END64, b"PK\x06\x06", at, what)
            end = at
        if count > MAX_MEMBERS or start + size > end or count * _ENTRY.size > size:
            raise self.fail(f"{count} members in {size} bytes at {start} do not fit the file")
        return count, start, start + size

    def entries(self) -> Iterator[_Entry]:
        count, at, end = self.directory()
        for i in range(count):
            what = f"entry {i} of its directory"
            fields = self.unpack(_ENTRY, b"PK\x01\x02", at, what)
            _, _, flags, method, _, _, _, stored, size, name, extra, comment, *_, header = fields
            name_at, extra_at = at + _ENTRY.size, at + _ENTRY.size + name
            at = extra_at + extra + comment
            if at > end:
                raise self.fail(f"{what} is cut short")
            text = self.data[name_at:extra_at].decode("utf-8", "backslashreplace")
            wide = self._wide(self.data[extra_at : extra_at + extra], (size, stored, header), what)
            size, stored, header = wide
            yield _Entry(text, flags, method, stored, size, header)

    def _wide(self, extra: bytes, numbers: tuple[int, ...], what: str) -> list[int]:
        """The three numbers of an entry, those that need 64 bits taken from its extra fields."""
        wide: list[int] = []
        at = 0
        while at + 4 <= len(extra):
            kind, length = struct.unpack_from("<HH", extra, at)
            if kind == _ZIP64_EXTRA:
                field = extra[at + 4 : at + 4 + length]
                wide = [n for (n,) in struct.iter_unpack("<Q", field[: len(field) // 8 * 8])]
            at += 4 + length
        if numbers.count(_FULL32) > len(wide):
            raise self.fail(f"{what}: expected numbers of 64 bits, found none")
        rest = iter(wide)
        return [next(rest) if n == _FULL32 else n for n in numbers]

    def member(self, entry: _Entry) -> Member:
        name = entry.name
        what = f"the member {name[:200]!r}"
        if entry.method != 0 or entry.flags & 1 or entry.stored != entry.size:
            raise self.fail(f"{what} is compressed or encrypted, which is not read")
        fields = self.unpack(_LOCAL, MAGIC, entry.header, what)
        name_at, name_length, extra_length = entry.header + _LOCAL.size, *fields[-2:]
        start = name_at + name_length + extra_length
        if start + entry.size > len(self.data):
            raise self.fail(
                f"{what}: expected {entry.size} bytes at {start}, "
                f"but the file ends at {len(self.data)} (is it complete?)"
            )
        local_name = self.data[name_at : name_at + name_length]
        if local_name.decode("utf-8", "backslashreplace") != name:
            raise self.fail(f"{what} has another name where it lies")
        return Member(start, start + entry.size)


# ---- writing ---------------------------------------------------------------------------------


@contextmanager
def new_member(
    archive: zipfile.ZipFile, file: BinaryIO, name: str, size: int
) -> Iterator[BinaryIO]:
    """Write one stored member whose bytes begin at a multiple of ALIGNMENT in `file`.

    An extra field "FB" of zeros fills the gap before it, as in PyTorch's own files.
    """
    info = zipfile.ZipInfo(name)
    wide = size >= zipfile.ZIP64_LIMIT
    before = file.tell() + _LOCAL.size + len(name.encode()) + 4 + (20 if wide else 0)
    padding = -before % ALIGNMENT
    info.extra = struct.pack("<2sH", b"FB", padding) + bytes(padding)
    with archive.open(info, "w", force_zip64=wide) as member:
        yield member  # type: ignore[misc]

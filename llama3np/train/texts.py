"""Text files, read in pieces whose ids are, one after the other, the ids of the whole text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

from llama3np.errors import InputError
from llama3np.load.files import refuse_special

BLOCK = 1 << 20  # characters: their ids are a Python list for a moment, of some 50 MB at most

# The last place of a text where Llama 3's and SmolLM2's patterns (tokenizer/bpe.py) end a match,
# and would end it too if the text ended there:
# - before a space after a character that is none: a space is the first of a match, or among white
#   space alone;
# - after a line break between two characters that are no white space: it is a match of its own,
#   or the last of a match of signs.
# Nowhere else in white space, for how a stretch of it is cut depends on what comes after it.
# Neither pattern looks back. What Python's \S matches is no white space to tiktoken either.
_LAST_CUT = re.compile(r"(?s:.*)(?:(?<=\S)(?= )|(?<=\S\n)(?=\S))")


@contextmanager
def open_text(path: str | Path) -> Iterator[TextIO]:
    r"""Open a UTF-8 file; every line ends with \n, as in all of Python's text files.

    A byte order mark at its beginning is left out: editors put it there, nobody wrote it.
    Raises InputError for a file that is missing, no regular file, or not UTF-8.
    """
    path = Path(path)
    refuse_special(path)
    try:
        with path.open(encoding="utf-8-sig") as file:
            yield file
    except OSError as error:
        raise InputError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        byte, line = error.object[error.start], _first_bad_line(path)
        raise InputError(f"{path}:{line}: expected UTF-8, found the byte {byte:#04x}") from None


def _first_bad_line(path: Path) -> int:
    """The line that is not UTF-8: no character has the byte of a line break, so lines stand alone.

    A decoder of a file tells a position in its own buffer only.
    """
    number = 1
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):  # noqa: B007
            try:
                line.decode("utf-8")
            except UnicodeDecodeError:
                break
    return number


def blocks(path: str | Path, whole: bool = False) -> Iterator[str]:
    """A file's text in pieces of about BLOCK characters, cut where no tokenizer of bytes sees it.

    whole: in one piece, for vocabularies of characters (Llama 2's), which put a space before each
    text. Raises InputError as open_text does, and for an empty file.
    """
    with open_text(path) as file:
        empty = True
        for text in [file.read()] if whole else cut(file, BLOCK):
            empty = empty and not text
            yield text
    if empty:
        raise InputError(f"{path}: expected a text, found an empty file")


def cut(file: TextIO, size: int) -> Iterator[str]:
    """Pieces of a text, each of `size` characters or the few less that end where a cut can be.

    A text without spaces and line breaks stays whole: what has no place to cut is read on by as
    many characters as it has, so that the search takes time in proportion to the text.
    """
    rest = ""
    while more := file.read(max(size, len(rest))):
        text = rest + more
        found = _LAST_CUT.match(text)
        at = found.end() if found else 0
        if at:
            yield text[:at]
        rest = text[at:]
    if rest:
        yield rest

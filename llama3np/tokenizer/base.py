"""What every tokenizer promises, and the decoder that turns single ids into whole characters."""

from __future__ import annotations

import codecs
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from pathlib import Path

from llama3np.errors import CheckpointError, InputError

MAX_BYTES = 1 << 25  # of a tokenizer's file; Llama 3's tokenizer.json, a long one, has 17 MB

# Control tokens that end a generation: Llama 3's (Meta llama/tokenizer.py:91 and, for <|eom_id|>,
# llama-models tokenizer.py), then those of ChatML models.
STOP_NAMES = ("<|end_of_text|>", "<|eom_id|>", "<|eot_id|>", "<|im_end|>", "<|endoftext|>")


def stop_ids(specials: dict[str, int], *declared: int | None) -> tuple[int, ...]:
    """Ids of the STOP_NAMES that exist, then those that the file declares, each once."""
    found = [specials[name] for name in STOP_NAMES if name in specials]
    return tuple(dict.fromkeys([*found, *(id for id in declared if id is not None)]))


def read_bytes(path: str | Path) -> bytes:
    """The content of a file. Raises CheckpointError if it cannot be read."""
    try:
        path = Path(path)
        if path.exists() and not path.is_file():  # a pipe or a device has no end
            raise CheckpointError(f"{path}: cannot be read (no regular file)")
        if (size := path.stat().st_size) > MAX_BYTES:
            raise CheckpointError(f"{path}: expected at most {MAX_BYTES} bytes, found {size}")
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None


class Tokenizer(ABC):
    """A vocabulary: ordinary tokens are byte strings, control tokens have names and no bytes.

    Text never becomes a control token, whatever it says: `encode` knows ordinary tokens only, and
    control tokens are put among ids by name, through `specials`.
    """

    def __init__(
        self,
        pieces: list[bytes],
        specials: dict[str, int],
        bos_id: int | None = None,
        add_bos: bool = False,
        stop_ids: tuple[int, ...] = (),
        chat_template: str | None = None,
    ):
        self.n_vocab = len(pieces)
        self.bos_id = bos_id
        self.add_bos = add_bos and bos_id is not None  # does a prompt begin with BOS
        self.stop_ids = stop_ids  # the ids that end a generation
        self.specials = specials  # control tokens: name -> id
        self.chat_template = chat_template  # the checkpoint's Jinja text; never executed
        self._pieces = pieces
        self._names = {id: name for name, id in specials.items()}

    # ------------------------------------------------------------------ text to ids

    @abstractmethod
    def _encode(self, text: str, utf8: bytes) -> list[int]:
        """Ordinary ids of a text that is given with its UTF-8 bytes."""

    def encode(self, text: str, bos: bool = False) -> list[int]:
        """Ids of a text: ordinary tokens only, after exactly one BOS if `bos`.

        Raises InputError for a lone surrogate, which no UTF-8 text can hold, and for `bos` where
        the vocabulary has none.
        """
        try:
            utf8 = text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise InputError(
                f"text: expected Unicode (in UTF-8), found the lone surrogate "
                f"U+{ord(text[error.start]):04X} at position {error.start}"
            ) from None
        ids = self._encode(text, utf8)
        return self.with_bos(ids) if bos else ids

    def prompt_ids(self, text: str) -> list[int]:
        """Ids of a prompt: with BOS where the model was trained with it."""
        return self.encode(text, bos=self.add_bos)

    def with_bos(self, ids: Iterable[int]) -> list[int]:
        """The ids with BOS before them; unchanged if they begin with it already."""
        if self.bos_id is None:
            raise InputError("tokenizer: BOS was asked for, but the vocabulary has none")
        ids = list(ids)
        return ids if ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    # ------------------------------------------------------------------ ids to text

    def token_bytes(self, id: int) -> bytes:
        """The bytes an ordinary token stands for; b"" for a control token.

        Raises InputError for an id outside the vocabulary.
        """
        if not 0 <= id < self.n_vocab:
            raise InputError(f"token id {id}: the vocabulary has ids 0 to {self.n_vocab - 1}")
        return self._pieces[id]

    def bytes_after(self, previous: int | None, id: int) -> bytes:
        """What an id adds to a text whose last id is `previous` (None: the text begins here)."""
        return self.token_bytes(id)

    def decode(self, ids: Iterable[int], specials: bool = False, errors: str = "replace") -> str:
        """Text of ids; control tokens are left out, or shown by their names if `specials`.

        `errors` is what bytes.decode makes of bytes that are not UTF-8. Raises InputError for an
        id outside the vocabulary.
        """
        parts = []
        previous = None
        for id in ids:
            part = self.bytes_after(previous, id)
            parts.append(self._names[id].encode() if specials and id in self._names else part)
            previous = id
        return b"".join(parts).decode("utf-8", errors)

    def stream(self, prompt_ids: Sequence[int] = ()) -> StreamDecoder:
        """A decoder of what follows `prompt_ids`; it is fed id by id."""
        return StreamDecoder(self, prompt_ids[-1] if len(prompt_ids) else None)


class StreamDecoder:
    """Ids to text as they come: `push` gives whole characters only and keeps the bytes of others.

    What all pushes and the last `flush` return is `decode` of all ids, joined: a character whose
    bytes are spread over several tokens comes with its last one.
    """

    def __init__(self, tokenizer: Tokenizer, previous: int | None = None):
        self._tokenizer = tokenizer
        self._previous = previous
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, id: int) -> str:
        """The characters that this id completes; InputError for an id outside the vocabulary."""
        new = self._tokenizer.bytes_after(self._previous, id)
        self._previous = id
        return self._utf8.decode(new)

    def flush(self) -> str:
        """What is left of an unfinished character at the end: U+FFFD, or nothing."""
        return self._utf8.decode(b"", final=True)

"""metrics.jsonl: a line of JSON for each step and for each validation.

    {"step": 7, "loss": 3.21, "lr": 0.0002, "tokens_per_s": 31000}
    {"step": 8, "val_loss": 3.25}

step counts finished steps: loss is that of the batch which made the model of `step`, before it was
made; val_loss is the model's own after so many steps.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from llama3np.errors import InputError
from llama3np.train import durable


class Metrics:
    """The file, open at its end; each line is handed to the system at once."""

    def __init__(self, path: Path, length: int = 0):
        """Cut the file back to its first `length` bytes, what a checkpoint knows of, and go on.

        Raises InputError if it has fewer.
        """
        self.path = path
        with durable.told(path):
            self._file = durable.open_end(path)
            found = path.stat().st_size
            if found < length:
                self._file.close()
                raise InputError(
                    f"{path}: expected at least the {length} bytes that the checkpoint knows of, "
                    f"found {found}"
                )
            os.truncate(path, length)
            self._file.seek(0, os.SEEK_END)  # tell() is the old end until then, or a write

    def write(self, **line: Any) -> None:
        """Add a line. Raises ValueError for a number that is not finite: JSON has none."""
        text = json.dumps(line, allow_nan=False) + "\n"
        with durable.told(self.path):
            self._file.write(text.encode())
            self._file.flush()

    def sync(self) -> int:
        """Return the length in bytes once all of them are on the disk."""
        with durable.told(self.path):
            durable.sync(self._file)
            return self._file.tell()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read(path: Path) -> list[dict[str, Any]]:
    """All whole lines; the last may be cut short."""
    lines = path.read_bytes().split(b"\n")[:-1]
    return [json.loads(line) for line in lines]

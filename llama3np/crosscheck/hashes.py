"""Which files a model's weights are in, and their sha256."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from pathlib import Path

from llama3np.errors import CheckpointError
from llama3np.load import detect, huggingface, meta
from llama3np.load.files import read_json
from llama3np.load.lazy import Progress

STEP = 1 << 22  # bytes read at a time


def weight_files(path: str | Path) -> list[Path]:
    """The files that hold the weights of the checkpoint at `path`, its settings not among them.

    Raises CheckpointError if there is none.
    """
    path, kind = Path(path), detect(path)
    if kind == "meta":
        return sorted((meta.folder(path) or path).glob("consolidated*.pth"))
    if kind != "huggingface":
        return [path]
    if (single := path / huggingface.SINGLE).exists():
        return [single]
    shards = read_json(path / huggingface.INDEX)["weight_map"].values()
    return [path / name for name in sorted(set(shards))]


def sha256(path: str | Path, progress: Progress | None = None) -> dict[str, str]:
    """Name -> sha256, as sha256sum prints it, of each weight file of the checkpoint at `path`.

    progress(done_bytes, total_bytes, name). Raises CheckpointError for a file that cannot be read.
    """
    files = weight_files(path)
    try:
        total, done = sum(file.stat().st_size for file in files), 0
        found = {}
        for file in files:
            digest = hashlib.sha256()
            for part in _parts(file):
                digest.update(part)
                done += len(part)
                if progress is not None:
                    progress(done, total, file.name)
            found[file.name] = digest.hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror}") from None
    return found


def _parts(file: Path) -> Iterator[bytes]:
    with file.open("rb") as opened:
        while part := opened.read(STEP):
            yield part

"""Files of predictions: a compact reference, or all logits that another implementation saved."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np

from llama3np.crosscheck.logits import (
    Kept,
    apart,
    apart_from,
    check_same_text,
    figures,
    kept,
    perplexity,
)
from llama3np.errors import InputError
from llama3np.load.files import new_file, refuse_existing

KEYS = ("ids", "starts", "top_ids", "top_logits", "logsumexp", "nll")


def check_new(path: str | Path) -> None:
    """Raise InputError for a name that `save` would not write to."""
    if Path(path).suffix != ".npz":
        raise InputError(f"{path}: expected a name that ends in .npz")
    refuse_existing(Path(path))


def save(path: str | Path, found: Kept, meta: dict[str, Any]) -> None:
    """Write a reference: an .npz of the arrays KEYS and `__metadata__`, JSON as bytes.

    Raises InputError for another suffix, or a path that exists.
    """
    check_new(path)
    told = np.frombuffer(json.dumps(meta).encode(), np.uint8)
    with new_file(Path(path)) as temporary, temporary.open("wb") as file:
        arrays: dict[str, Any] = dict(zip(KEYS, found, strict=True))
        np.savez_compressed(file, __metadata__=told, **arrays)


def read(path: str | Path) -> Kept | tuple[np.ndarray, np.ndarray]:
    """A reference that `save` wrote, or anyone's `ids` and `logits`: (ids_T, logits_RV).

    logits: of every position, (T, V) or (1, T, V), or without the last, which predicts nothing.
    Raises InputError for a file that is neither, naming what is missing or of another shape.
    """
    arrays = _arrays(path)
    if all(key in arrays for key in KEYS):
        found = Kept(*(arrays[key] for key in KEYS))
        R = len(found.ids_T) - len(found.starts_W)
        if wrong := [
            key for key, a in zip(KEYS[2:], found[2:], strict=True) if a.shape[:1] != (R,)
        ]:
            raise InputError(f"{path}: {wrong[0]}: expected {R} rows, one for each predicted id")
        return found
    return _whole(path, arrays)


def _whole(path: str | Path, arrays: dict[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    if missing := [key for key in ("ids", "logits") if key not in arrays]:
        raise InputError(f"{path}: expected arrays ids and logits, found no {missing[0]}")
    ids_T, logits = arrays["ids"].reshape(-1), arrays["logits"]
    logits_TV = logits[0] if logits.ndim == 3 and len(logits) == 1 else logits
    T = len(ids_T)
    if logits_TV.ndim != 2 or len(logits_TV) not in (T, T - 1) or ids_T.dtype.kind not in "iu":
        raise InputError(
            f"{path}: logits: expected ({T}, V) or ({T - 1}, V) for {T} integer ids, found "
            f"{logits.shape} and ids of {ids_T.dtype}"
        )
    if (bad := np.argwhere(~np.isfinite(logits_TV[: T - 1]))).size:
        where = tuple(bad[0].tolist())
        raise InputError(
            f"{path}: logits: expected finite numbers, found {logits_TV[where]} at {where}"
        )
    return ids_T, logits_TV[: T - 1]


def _arrays(path: str | Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: file[name] for name in file.files}
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from None
    except (ValueError, EOFError, AttributeError, zipfile.BadZipFile) as error:
        raise InputError(f"{path}: expected an .npz file of logits ({error})") from None


def compared(reference: str | Path, candidate: str | Path) -> dict[str, Any]:
    """What `llama3np compare --logits` prints: both perplexities, and how far apart they are.

    A file of all logits is as good as a compact one on either side; of two compact ones the
    divergence is over the ids that both kept. Raises InputError for files of other ids.
    """
    found, cand = read(reference), read(candidate)
    ref = found if isinstance(found, Kept) else kept(*found)
    if isinstance(cand, Kept):
        far, nll_R = apart(ref, cand), cand.nll_R
    else:
        ids_T, logits_RV = cand
        check_same_text(ref, ids_T, np.zeros(1, np.int64))
        own = kept(ids_T, logits_RV)
        far, nll_R = apart_from(ref, logits_RV, own.logsumexp_R), own.nll_R
    names = {"reference": perplexity(ref.nll_R), "candidate": perplexity(nll_R)}
    return {"tokens": len(nll_R), **names, **figures(far)}

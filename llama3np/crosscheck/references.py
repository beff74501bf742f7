"""Files of predictions: a compact reference, or all logits that another implementation saved."""

from __future__ import annotations

import json
from pathlib import Path
from reprlib import repr as short
from typing import Any

import numpy as np

from llama3np.crosscheck import files
from llama3np.crosscheck.logits import (
    FIVE,
    Kept,
    apart,
    apart_from,
    check_same_text,
    figures,
    kept,
    perplexity,
)
from llama3np.crosscheck.schemes import meaning
from llama3np.crosscheck.stored import FLOATS, Entry
from llama3np.errors import InputError
from llama3np.load.files import new_file, refuse_existing

KEYS = ("ids", "starts", "top_ids", "top_logits", "logsumexp", "nll")
FINITE = KEYS[3:]  # which are floats


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
    """A reference that `save` wrote, or anyone's ids and logits: (ids_T, logits_RV).

    The latter in any form of a trace (files.py), under any name of the logits (schemes.py), ids as
    an array or in the metadata; logits of every position, (T, V) or (1, T, V), or without the last,
    which predicts nothing; of 16 bits they come as float32.
    Raises InputError for a file that is neither, naming what is missing or of another shape.
    """
    found, meta = files.opened(Path(path))
    if all(key in found for key in KEYS):
        return checked(Kept(*(found[key].read() for key in KEYS)), path)
    names = [name for name in found if (meant := meaning(name, 0)) and "logits" in meant.kinds]
    ids_T = _ids(found, meta)
    if ids_T is None or not names:
        missing = "ids" if ids_T is None else "logits"
        raise InputError(f"{path}: expected ids and logits, found no {missing}")
    return _whole(path, ids_T, found[names[0]])


def _ids(found: dict[str, Entry], meta: dict[str, Any]) -> np.ndarray | None:
    """The ids, in whatever dtype they are."""
    for name in ("ids", "input_ids"):
        if name in found:
            return found[name].read().reshape(-1)
    return None if meta.get("ids") is None else np.array(meta["ids"]).reshape(-1)


def _whole(path: str | Path, ids_T: np.ndarray, entry: Entry) -> tuple[np.ndarray, np.ndarray]:
    if entry.dtype not in FLOATS.values():
        raise InputError(
            f"{path}: logits: expected one of {', '.join(FLOATS)}, found {entry.dtype}"
        )
    logits, T = entry.read(), len(ids_T)
    logits_TV = logits[0] if logits.ndim == 3 and len(logits) == 1 else logits
    if logits_TV.ndim != 2 or len(logits_TV) not in (T, T - 1) or ids_T.dtype.kind not in "iu":
        raise InputError(
            f"{path}: logits: expected ({T}, V) or ({T - 1}, V) for {T} integer ids, found "
            f"{logits.shape} and ids of {ids_T.dtype}"
        )
    _check_ids(path, ids_T, logits_TV.shape[1])
    logits_RV = logits_TV[: T - 1]
    _check_finite(path, "logits", logits_RV)
    return ids_T, logits_RV.astype(np.float32) if logits_RV.itemsize == 2 else logits_RV


def _check_ids(path: str | Path, ids_T: np.ndarray, V: int | None = None) -> None:
    """At least two, so that one is predicted, and none outside of the vocabulary."""
    if len(ids_T) < 2:
        raise InputError(f"{path}: ids: expected at least 2, found {len(ids_T)}")
    if (wrong := ids_T[(ids_T < 0) | (ids_T >= (np.inf if V is None else V))]).size:
        most = "from 0 on" if V is None else f"from 0 to {V - 1}, as there are {V} logits"
        raise InputError(f"{path}: ids: expected numbers {most}, found {wrong[0]}")


def _check_finite(path: str | Path, key: str, array: np.ndarray) -> None:
    if (bad := np.argwhere(~np.isfinite(array))).size:
        at = tuple(bad[0].tolist())
        raise InputError(f"{path}: {key}: expected finite numbers, found {array[at]} at {at}")


def checked(found: Kept, path: str | Path) -> Kept:
    """The same, if its arrays are of one text and have each other's shapes; InputError if not."""
    for key, array in zip(KEYS, found, strict=True):
        kinds, numbers = ("f", "floats") if key in FINITE else ("iu", "whole numbers")
        if array.dtype.kind not in kinds:
            raise InputError(f"{path}: {key}: expected {numbers}, found {array.dtype}")
    _check_windows(path, found)
    R, K = len(found.ids_T) - len(found.starts_W), found.top_ids_RK.shape[-1]
    shapes = {"top_ids": (R, K), "top_logits": (R, K), "logsumexp": (R,), "nll": (R,)}
    for key, array in zip(KEYS[2:], found[2:], strict=True):
        if array.shape != shapes[key] or K < FIVE:
            raise InputError(
                f"{path}: {key}: expected {R} rows, one for each predicted id, of the same {FIVE} "
                f"or more logits, found shape {array.shape}"
            )
        if key in FINITE:
            _check_finite(path, key, array)
    if found.top_ids_RK.min() < 0:
        raise InputError(f"{path}: top_ids: expected ids from 0 on, found {found.top_ids_RK.min()}")
    return found


def _check_windows(path: str | Path, found: Kept) -> None:
    ids_T, starts_W = found[:2]
    if ids_T.ndim != 1 or starts_W.ndim != 1:
        raise InputError(f"{path}: ids and starts: expected one axis each")
    _check_ids(path, ids_T)
    if starts_W[:1].tolist() != [0] or np.diff(starts_W, append=len(ids_T)).min() < 2:
        raise InputError(
            f"{path}: starts: expected where windows of 2 ids or more begin, the first at 0, found "
            f"{short(starts_W.tolist())}"
        )


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

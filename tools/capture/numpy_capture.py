"""Capture what a port in NumPy computes, for `llama3np compare` and `llama3np diagnose`.

Copy this file next to your code, call tap(name, array) where a value is made, and save:

    from numpy_capture import save, tap
    q = tap(f"layers.{i}.q", x @ wq.T)
    ...
    save("candidate.npz", ids)

The names are llama3np's, Hugging Face's, Meta's or llama.cpp's, or your own with a map
(docs/crosscheck.md). Decoding is several calls with the same names: each adds its rows.
"""

import json

import numpy as np

calls: dict[str, list[np.ndarray]] = {}  # name -> an array of each call


def tap(name, array):
    """Keep a copy of an array, and return the array itself."""
    calls.setdefault(name, []).append(np.array(array))
    return array


def save(path, ids, prefill=None, **metadata):
    """Write an .npz file and forget what was kept.

    ids: all of them; prefill: how many went into the first call, if the calls do not tell that.
    Positions are the first axis, but the second of scores and probs, (N, T, S); an early query's
    later keys are filled as masked. Pass dtype="bfloat16" or the like where the values themselves
    do not tell in which type they were computed.
    """
    metadata = {"implementation": "NumPy", **metadata, "ids": list(ids)}
    metadata["prefill"] = prefill or first_call(len(ids))
    text = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
    np.savez(path, __metadata__=text, **{name: joined(name, calls[name]) for name in calls})
    calls.clear()


def first_call(count):
    """Of so many ids those in the first call, if all others went one at a time; else None."""
    for name, arrays in calls.items():
        axis = 1 if name.endswith(("scores", "probs")) else 0
        rows = [sum(a.shape[axis : axis + 1]) for a in arrays]
        if sum(rows) == count and all(n == 1 for n in rows[1:]):
            return rows[0]
    return None


def joined(name, arrays):
    """One array of several calls' arrays."""
    if not name.endswith(("scores", "probs")):
        return np.concatenate(arrays)
    S, hidden = max(a.shape[-1] for a in arrays), -np.inf if name.endswith("scores") else 0
    padded = [
        np.pad(a, ((0, 0), (0, 0), (0, S - a.shape[-1])), constant_values=hidden) for a in arrays
    ]
    return np.concatenate(padded, axis=1)

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

    ids: all of them; prefill: how many went into the first call. Positions are the first axis, but
    the second of scores and probs, (N, T, S); an early query's later keys are filled as masked.
    """
    metadata = {"implementation": "NumPy", **metadata, "ids": list(ids)}
    metadata["prefill"] = prefill or len(ids)
    metadata["dtype"] = str(next(iter(calls.values()))[0].dtype)
    text = np.frombuffer(json.dumps(metadata).encode(), np.uint8)
    np.savez(path, __metadata__=text, **{name: joined(name, calls[name]) for name in calls})
    calls.clear()


def joined(name, arrays):
    """One array of several calls' arrays."""
    if not name.endswith(("scores", "probs")):
        return np.concatenate(arrays)
    S, hidden = max(a.shape[-1] for a in arrays), -np.inf if name.endswith("scores") else 0
    padded = [
        np.pad(a, ((0, 0), (0, 0), (0, S - a.shape[-1])), constant_values=hidden) for a in arrays
    ]
    return np.concatenate(padded, axis=1)

"""Proof that a file's list of merges does what tiktoken does with the ids as ranks.

The two rules differ: a list joins the pairs it lists, first the one listed first; tiktoken joins
any pair whose bytes together are a token, first the one with the lowest id. They give the same ids
if the merges stand in the order of the ids they make, and

- the list has every pair of tokens that together are a token (Llama 3's does), or
- it has one pair for each token, and merging a token's own bytes gives that token (SmolLM2's).

Why the second is enough: let both rules agree up to some state, and let tiktoken then join x and y
to the token t where the list does not. All merges below t are done, so a run of the list on t's
own bytes stands at x, y as well. But it ends in t, so its last merge is x, y: it is listed.
In that case taking a whole piece at once changes nothing either; with all pairs listed it may, as
588 tokens of Llama 3 cannot be reached by merging: such a file must say that pieces come first.
"""

from __future__ import annotations

from collections.abc import Iterable
from operator import add

import numpy as np

from llama3np.errors import CheckpointError


def check_merges(
    merges: list[tuple[str, ...]], ids: dict[str, int], whole_piece: bool, source: str
) -> None:
    """Refuse a list of merges that tiktoken would not follow to the letter.

    ids: token text -> id, ordinary tokens only. Raises CheckpointError naming the merge or token.
    """
    lefts, rights = [left for left, _ in merges], [right for _, right in merges]
    try:
        made = map(add, lefts, rights)
        left_M, right_M, made_M = (_ids_of(texts, ids) for texts in (lefts, rights, made))
    except (KeyError, TypeError) as error:
        raise CheckpointError(
            f"{source}: a merge has or makes {error}, which is no token"
        ) from None
    _check_order(merges, made_M, source)
    names = {id: text for text, id in ids.items()}
    n_long = sum(len(text) > 1 for text in ids)
    if len(merges) == n_long and (made_M[1:] > made_M[:-1]).all():
        _check_reachable(left_M, right_M, made_M, names, source)
    elif not whole_piece:
        raise CheckpointError(
            f"{source}: expected one merge for each of {n_long} tokens of two bytes or more, "
            f"found {len(merges)} (and pieces are not looked up whole)"
        )
    else:
        _check_complete(merges, ids, source)


def _ids_of(texts: Iterable[str], ids: dict[str, int]) -> np.ndarray:
    return np.fromiter(map(ids.__getitem__, texts), np.int64)


def _check_order(merges: list[tuple[str, ...]], made_M: np.ndarray, source: str) -> None:
    falls = np.flatnonzero(made_M[1:] < made_M[:-1])
    if falls.size:
        i = int(falls[0]) + 1
        raise CheckpointError(
            f"{source}: merge {i} {merges[i]} makes token {made_M[i]} after token "
            f"{made_M[i - 1]}; only merges in the order of the ids they make are supported"
        )


def _check_complete(merges: list[tuple[str, ...]], ids: dict[str, int], source: str) -> None:
    """The list has all pairs of tokens that together are a token, each once."""
    n_pairs = 0
    for text in ids:  # 700,000 cuts in a large vocabulary: a plain loop is a third faster than sum
        for cut in range(1, len(text)):
            if text[:cut] in ids and text[cut:] in ids:
                n_pairs += 1
    if len(set(merges)) != len(merges) or len(merges) != n_pairs:
        raise CheckpointError(
            f"{source}: expected one merge for each token, or all {n_pairs} pairs of tokens that "
            f"make one, found {len(merges)} merges"
        )


def _check_reachable(
    left_M: np.ndarray, right_M: np.ndarray, made_M: np.ndarray, names: dict[int, str], source: str
) -> None:
    """Merging the bytes of a token gives that token, for all tokens at once.

    Fails only if some merge joins bytes across the seam of the token's own last merge before both
    sides are whole. Time is the id that is made: walk it backwards from the last merge, taking
    apart the side that was made later, and look whether what then meets at the seam has a merge
    that comes earlier. Of two merges to the same id the left one comes first.
    """
    n_ids = max(names, default=-1) + 1
    left_of, right_of, made_at = (np.full(n_ids, -1) for _ in range(3))  # -1: a byte, never made
    left_of[made_M], right_of[made_M], made_at[made_M] = left_M, right_M, made_M
    for i in np.flatnonzero(np.maximum(made_at[left_M], made_at[right_M]) >= made_M)[:1]:
        raise CheckpointError(f"{source}: token {names[made_M[i]]!r} has a lower id than its parts")
    made_by = _PairTable(left_M * n_ids + right_M, made_M)

    token_A, a_A, b_A = made_M, left_M, right_M  # A tokens still open, and what meets at the seam
    while (open_A := np.maximum(made_at[a_A], made_at[b_A]) >= 0).any():
        token_A, a_A, b_A = token_A[open_A], a_A[open_A], b_A[open_A]
        until_A = np.maximum(made_at[a_A], made_at[b_A])
        left_later_A = made_at[a_A] > made_at[b_A]
        a_A, b_A = np.where(left_later_A, (right_of[a_A], b_A), (a_A, left_of[b_A]))
        joined_A = made_by.look_up(a_A * n_ids + b_A)
        early_A = (joined_A < until_A) | (joined_A == until_A) & ~left_later_A
        for token in token_A[early_A][:1]:
            raise CheckpointError(
                f"{source}: merging the bytes of token {names[token]!r} does not give it"
            )


class _PairTable:
    """Which token a pair makes, for arrays of pairs written as single integers."""

    def __init__(self, pair_M: np.ndarray, made_M: np.ndarray):
        order_M = np.argsort(pair_M)
        self._pair_M = pair_M[order_M]
        self._made_M = made_M[order_M]

    def look_up(self, pair_A: np.ndarray) -> np.ndarray:
        """The token each pair makes; an id above all others for a pair that makes none."""
        at_A = np.minimum(np.searchsorted(self._pair_M, pair_A), len(self._pair_M) - 1)
        return np.where(self._pair_M[at_A] == pair_A, self._made_M[at_A], np.iinfo(np.int64).max)

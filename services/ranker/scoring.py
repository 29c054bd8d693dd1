"""Which candidates to show, in which order, once each has a score."""

from collections import Counter
from collections.abc import Hashable, Iterable, Sequence

import numpy as np


def mmr(vectors: np.ndarray, scores: np.ndarray, k: int, lam: float) -> np.ndarray:
    """Up to k candidates, each the best to follow those before it: int64 [min(k, n)], in order of choice.

    Maximal marginal relevance (Carbonell, Goldstein 1998): `lam` times the score, less (1 - `lam`) times the
    cosine to the most similar one chosen so far. `vectors` float32 [n, d] of any length (a zero vector
    resembles nothing); `scores` [n], taken to 0..1. `lam` 1 is the order of scores, 0 diversity alone;
    of equals the earlier candidate goes first. O(k n d).
    """
    n = len(scores)
    chosen = np.empty(min(k, n), dtype=np.int64)
    if not len(chosen):
        return chosen
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    unit = vectors / np.where(lengths > 0, lengths, 1)
    low, high = float(scores.min()), float(scores.max())
    gains = lam * (scores.astype(np.float64) - low) / (high - low if high > low else 1.0)
    closest = np.full(n, -np.inf)
    chosen[0] = np.argmax(scores)
    for i in range(1, len(chosen)):
        last = chosen[i - 1]
        gains[last] = -np.inf
        np.maximum(closest, unit @ unit[last], out=closest)
        chosen[i] = np.argmax(gains - (1 - lam) * closest)
    return chosen


def group(values: Sequence[Hashable | None], order: Iterable[int], per_group: int, k: int) -> list[int]:
    """The first k of `order` with at most `per_group` of each value; None is no value and never limited."""
    shown: Counter[Hashable] = Counter()
    kept: list[int] = []
    for i in order:
        if len(kept) == k:
            break
        if (value := values[i]) is not None:
            if shown[value] == per_group:
                continue
            shown[value] += 1
        kept.append(i)
    return kept

"""The right answer, found by comparing a query with everything in float64."""

from collections.abc import Sequence

import numpy as np


def scores(metric: str, query: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """What each of the vectors, [n, dim], scores for the query, [dim]: float64 [n], larger is better."""
    query, vectors = query.astype(np.float64), vectors.astype(np.float64)
    match metric:
        case "inner_product":
            return vectors @ query
        case "l2":
            return -((vectors - query) ** 2).sum(axis=1)
        case _:
            return vectors @ query / (np.linalg.norm(vectors, axis=1) * np.linalg.norm(query))


def best(found: np.ndarray, ids: Sequence[str], k: int, allowed: np.ndarray | None = None) -> list[str]:
    """The ids of the k largest scores among those allowed, best first."""
    rows = np.arange(len(ids)) if allowed is None else np.flatnonzero(allowed)
    return [ids[row] for row in rows[np.argsort(-found[rows], kind="stable")][:k]]

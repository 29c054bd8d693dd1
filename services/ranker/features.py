"""Features that can be added up although their units differ: each as its percentile among the candidates."""

import math
from collections.abc import Mapping

import numpy as np

#: The feature that retrieval brings; used as it is.
SIMILARITY = "similarity"
#: Scores are float32: a heavier weight would drown every other feature, and overflow in the end.
MAX_WEIGHT = 1e6


def fault_of(weight: float) -> str | None:
    """What is wrong with a feature's weight; None where nothing is."""
    if not math.isfinite(weight):
        return "the weight must be a finite number"
    return f"the weight must be at most {MAX_WEIGHT:g}" if abs(weight) > MAX_WEIGHT else None


def percentile(values: np.ndarray) -> np.ndarray:
    """The share of the other candidates that each one beats; float64 [n] in and out, larger is better.

    Equal values share their mean rank. NaN is null: it beats nobody (0), and every value beats it. A
    candidate without others has 0.5, as in a tie of all.
    """
    n = len(values)
    order = np.argsort(values, kind="stable")
    ordered = values[order]
    known = n - int(np.isnan(ordered).sum())
    starts = (
        np.flatnonzero(np.r_[True, ordered[1:known] != ordered[: known - 1]]) if known else np.empty(0, int)
    )
    sizes = np.diff(np.r_[starts, known])
    shares = np.zeros(n)
    beaten = (n - known) + starts + (sizes - 1) / 2
    shares[order[:known]] = np.repeat(beaten / (n - 1) if n > 1 else np.full(len(starts), 0.5), sizes)
    return shares


def blend(
    similarity: np.ndarray, numbers: Mapping[str, np.ndarray], weights: Mapping[str, float]
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Weighted sums of features, float32 [n], and the features that went in, float64 [n] each.

    `similarity`: float32 [n], as retrieved. `numbers`: the attribute of each feature that `weights`
    names, float64 [n], NaN where null. Similarity counts 1 where `weights` does not name it.
    """
    features = {SIMILARITY: similarity.astype(np.float64)}
    scores = weights.get(SIMILARITY, 1.0) * features[SIMILARITY]
    for name, weight in weights.items():
        if name != SIMILARITY:
            features[name] = percentile(numbers[name])
            scores += weight * features[name]
    return scores.astype(np.float32), features

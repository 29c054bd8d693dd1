"""Sequences of reads with a known shape, and what a first tier of a given size takes off them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from services.cache.policy import S3Fifo

#: Bytes an entry; only the number of entries that have room matters.
_ENTRY_BYTES = 100


def ninety_ten(keys: int, reads: int, rng: np.random.Generator, first_hot: int = 0) -> np.ndarray:
    """Nine tenths of the reads go to a tenth of the keys, which begins at `first_hot`; int64 [reads]."""
    tenth = keys // 10
    hot = (first_hot + rng.integers(0, tenth, reads)) % keys
    cold = (first_hot + tenth + rng.integers(0, keys - tenth, reads)) % keys
    return np.where(rng.random(reads) < 0.9, hot, cold)


def zipf(keys: int, reads: int, rng: np.random.Generator) -> np.ndarray:
    """The n-th key is read 1/n times as often as the first, in a mixed order of keys; int64 [reads]."""
    weights = 1 / np.arange(1, keys + 1)
    order = rng.permutation(keys)
    return order[np.searchsorted(np.cumsum(weights / weights.sum()), rng.random(reads), side="right")]


@dataclass
class FirstTier:
    """L1 of so many entries, which keeps whatever it was asked for and did not have."""

    entries: int

    def __post_init__(self) -> None:
        self._l1: S3Fifo[int] = S3Fifo(self.entries * _ENTRY_BYTES)

    def relief(self, trace: np.ndarray) -> float:
        """The share of the reads that it answered itself."""
        hits = 0
        l1 = self._l1
        for number in trace.tolist():
            key = number.to_bytes(8, "little")
            if l1.get(key) is None:
                l1.put(key, number, _ENTRY_BYTES)
            else:
                hits += 1
        return hits / len(trace)


def recovery(keys: int, reads: int, rng: np.random.Generator) -> tuple[float, Sequence[float]]:
    """What L1 of a tenth of the keys takes off 90/10 reads, and after their hot set has moved altogether.

    The latter for each tenth of `reads`, from the move on.
    """
    tier = FirstTier(keys // 10)
    tier.relief(ninety_ten(keys, 10 * keys, rng))
    before = tier.relief(ninety_ten(keys, reads, rng))
    moved = ninety_ten(keys, reads, rng, first_hot=keys // 2)
    return before, [tier.relief(part) for part in np.array_split(moved, 10)]

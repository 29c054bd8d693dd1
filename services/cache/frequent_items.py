"""The most frequent keys of a stream in bounded memory.

Misra and Gries, "Finding repeated elements" (1982), weighted and in batches, as in Anderson et al., "A
high-performance algorithm for identifying frequent items in data streams" (2017): where there are too many
keys, the count of the first one too many is taken off all of them, and those without a rest are forgotten.
"""

from collections import Counter
from collections.abc import Iterable, Mapping
from heapq import nlargest


class FrequentItems:
    """Counts of at most `capacity` keys: each too low by at most `error`, which is total / (capacity + 1).

    So every key that is more than that share of the stream is among them.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity = capacity
        self._counts: Counter[bytes] = Counter()
        #: Keys seen, by weight.
        self.total = 0
        #: The most that a count falls short, or that a key not held may have been seen.
        self.error = 0

    def __len__(self) -> int:
        return len(self._counts)

    def update(self, keys: Iterable[bytes], seen: int) -> None:
        """So many keys went by, as many as there are in `keys`."""
        self._counts.update(keys)
        self.total += seen
        self._trim()

    def merge(self, counts: Mapping[bytes, int], total: int, error: int = 0) -> None:
        """Add what another one counted of another stream."""
        self._counts.update(counts)
        self.total += total
        self.error += error
        self._trim()

    def top(self, count: int) -> list[tuple[bytes, int]]:
        """The most frequent keys and how often they were seen at least, most frequent first."""
        return nlargest(count, self._counts.items(), key=lambda item: (item[1], item[0]))

    def _trim(self) -> None:
        if len(self._counts) <= self._capacity:
            return
        off = nlargest(self._capacity + 1, self._counts.values())[-1]
        self._counts = Counter({key: count - off for key, count in self._counts.items() if count > off})
        self.error += off

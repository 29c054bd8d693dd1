"""A consistent-hash ring with virtual nodes (Karger et al., 1997).

Used where an order of preference has to be agreed on without talking: shard maps are made in ring order.
"""

from bisect import bisect_left
from collections.abc import Mapping

from xxhash import xxh3_64_intdigest


class Ring:
    """Nodes on a circle of hashes; a key belongs to the first node at or after its own hash.

    A node of weight w has about w × virtual_nodes points. Adding or removing a node moves only the keys
    it gains or loses, and the order is the same on every machine and in every release.
    """

    __slots__ = ("_hashes", "_nodes", "_size")

    def __init__(self, weights: Mapping[str, float], virtual_nodes: int = 128) -> None:
        """ValueError where no node has a point on the ring."""
        points = sorted(
            (_hash(f"{node}#{i}"), node)
            for node, weight in weights.items()
            for i in range(round(weight * virtual_nodes))
        )
        if not points:
            raise ValueError("a ring needs a node of positive weight")
        self._hashes = [point for point, _ in points]
        self._nodes = [node for _, node in points]
        self._size = len(set(self._nodes))

    def owner(self, key: str) -> str:
        """The node a key belongs to."""
        return self._nodes[self._start(key)]

    def preference(self, key: str) -> tuple[str, ...]:
        """Every node once, in the order in which the ring meets them from the key on."""
        start = self._start(key)
        # A dict keeps the order of first sight.
        met: dict[str, None] = {}
        for i in range(start, start + len(self._nodes)):
            met[self._nodes[i % len(self._nodes)]] = None
            if len(met) == self._size:
                break
        return tuple(met)

    def _start(self, key: str) -> int:
        return bisect_left(self._hashes, _hash(key)) % len(self._nodes)


def _hash(text: str) -> int:
    return xxh3_64_intdigest(text.encode())

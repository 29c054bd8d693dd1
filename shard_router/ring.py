"""A consistent-hash ring with virtual nodes (Karger et al., 1997).

Used where an order of preference has to be agreed on without talking: shard maps are made in ring order.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

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

    @property
    def size(self) -> int:
        """How many nodes there are."""
        return self._size

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


def even(keys: Sequence[str], nodes: Iterable[str]) -> tuple[str, ...]:
    """A node for each key: the first with room in ring order, so that all are within one key of even.

    Consistent hashing with bounded loads (Mirrokni et al., 2018). ValueError without nodes.
    """
    ring = Ring(dict.fromkeys(nodes, 1.0))
    share, larger = divmod(len(keys), ring.size)
    sizes = Counter[str]()
    owners = []
    for key in keys:
        # `larger` counts the nodes that may still take one key more than their share.
        limit = share + (larger > 0)
        owner = next(node for node in ring.preference(key) if sizes[node] < limit)
        larger -= sizes[owner] == share
        sizes[owner] += 1
        owners.append(owner)
    return tuple(owners)


def _hash(text: str) -> int:
    return xxh3_64_intdigest(text.encode())

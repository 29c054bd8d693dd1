"""Which node keeps which copy of which shard."""

from collections import Counter
from collections.abc import Collection, Mapping

from shard_router.errors import PreconditionFailed
from shard_router.resharding import Copy
from shard_router.ring import Ring


def place(
    shards: Collection[int], replicas: int, nodes: Mapping[str, float], current: Mapping[Copy, str]
) -> dict[Copy, str]:
    """A node for every copy: `replicas` of each shard, over nodes by weight.

    Never two copies of a shard on one node while a node without one is there; with fewer nodes than replicas
    a shard's copies are spread as evenly as can be. A copy stays where it is unless its node is gone, holds
    another copy of its shard that need not be there, or holds more than its share by weight. The same
    arguments make the same placement everywhere. PreconditionFailed without nodes.
    """
    weights = {node: weight for node, weight in sorted(nodes.items()) if weight > 0}
    if not weights:
        raise PreconditionFailed("there is no node to place a shard on")
    copies = [Copy(shard, replica) for shard in sorted(shards) for replica in range(replicas)]
    #: No node need have more copies of one shard than this.
    most = -(-replicas // len(weights))
    room = _shares(len(copies), weights)
    placed: dict[Copy, str] = {}
    held = Counter[tuple[int, str]]()

    def put(copy: Copy, node: str) -> None:
        placed[copy] = node
        held[copy.shard, node] += 1
        room[node] -= 1

    ring = Ring(weights)
    for copy in copies:
        node = current.get(copy)
        if node in weights and held[copy.shard, node] < most:
            put(copy, node)
    for copy in copies:
        if copy not in placed:
            order = ring.preference(f"shard-{copy.shard}/{copy.replica}")
            put(copy, min(order, key=lambda node: (held[copy.shard, node], room[node] <= 0, -room[node])))
    for copy in reversed(copies):
        node = placed[copy]
        takers = [other for other in weights if room[other] > 0 and held[copy.shard, other] < most]
        if room[node] < 0 and takers:
            held[copy.shard, node] -= 1
            room[node] += 1
            put(copy, max(takers, key=room.__getitem__))
    return placed


def _shares(copies: int, weights: Mapping[str, float]) -> dict[str, int]:
    """How many copies each node may keep: its share by weight, rounded up."""
    total = sum(weights.values())
    return {node: -int(-copies * weight // total) for node, weight in weights.items()}
